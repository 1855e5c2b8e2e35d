//! Targets for the attempts of [`traitor_tests`](super::traitor_tests): the descriptors of a process with a machine, and
//! files of the host outside its reach. Without confinement, root succeeds in each attempt.

use super::traitor_tests::call;
use crate::descriptors;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::mount::{OpenTreeFlags, open_tree};
use std::ffi::{CString, c_char};
use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixListener};
use std::path::Path;

/// `struct file_handle` with room for the largest handle.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    data: [u8; libc::MAX_HANDLE_SZ as usize],
}

#[repr(align(4096))]
struct Page([u8; 4096]);

/// Prepared before the thread of the attempt is confined.
pub(super) struct Ground {
    share: OwnedFd,
    file: File,
    new_file: CString,
    old_file: CString,
    handle: Handle,
    address: libc::sockaddr_un,
    abstract_address: (libc::sockaddr_un, usize),
    _listeners: [UnixListener; 2],
    datagrams: UdpSocket,
    /// Address of that socket.
    to: libc::sockaddr_in,
    /// A socket of TCP that is not connected, and the address of one that listens.
    stream: i32,
    server: libc::sockaddr_in,
    _server: TcpListener,
    /// Descriptors of a virtual machine and its vCPU.
    machine: Option<(i32, i32)>,
}

impl Ground {
    /// Prepares the targets of an attempt in an empty directory.
    pub(super) fn new(dir: &Path, name: &str) -> Self {
        let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = internet_address(datagrams.local_addr().unwrap());
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let abstract_name = format!("koya-traitor-{}", std::process::id());
        let abstract_listener = UnixAddress::from_abstract_name(&abstract_name)
            .and_then(|address| UnixListener::bind_addr(&address));
        let text = |name: &str| CString::new(dir.join(name).as_os_str().as_bytes()).unwrap();
        fs::create_dir(dir.join("share")).unwrap();
        // The null device; only root can create it.
        let device = rustix::fs::makedev(1, 3);
        let at = dir.join("share/null");
        mknodat(CWD, at, FileType::CharacterDevice, Mode::RWXU, device).ok();
        fs::write(dir.join("share/file"), "text").unwrap();
        fs::write(dir.join("file"), "text").unwrap();
        fs::write(dir.join("old"), "text").unwrap();
        Self {
            share: share(&dir.join("share")),
            file: File::open(dir.join("file")).unwrap(),
            new_file: text("new"),
            handle: handle(&text("old")),
            old_file: text("old"),
            address: address(&text("socket")),
            abstract_address: abstract_address(abstract_name.as_bytes()),
            _listeners: [
                UnixListener::bind(dir.join("socket")).unwrap(),
                abstract_listener.unwrap(),
            ],
            datagrams,
            to,
            stream: call!(SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0) as i32,
            server: internet_address(server.local_addr().unwrap()),
            _server: server,
            machine: name.starts_with("KVM_").then(machine),
        }
    }

    /// A shared directory, on a mount like that of a share.
    pub(super) fn share(&self) -> i32 {
        self.share.as_raw_fd()
    }

    /// A file that the process has open for reading.
    pub(super) fn file(&self) -> i32 {
        self.file.as_raw_fd()
    }

    /// A path by which this thread can reopen it.
    pub(super) fn file_again(&self) -> CString {
        CString::new(descriptors::path(self.file.as_fd())).unwrap()
    }

    pub(super) fn new_file(&self) -> *const c_char {
        self.new_file.as_ptr()
    }

    pub(super) fn old_file(&self) -> *const c_char {
        self.old_file.as_ptr()
    }

    /// The handle of the old file.
    pub(super) fn handle(&self) -> *const u8 {
        (&raw const self.handle).cast()
    }

    /// The address of a listening socket.
    pub(super) fn address(&self) -> (*const u8, usize) {
        ((&raw const self.address).cast(), size_of_val(&self.address))
    }

    /// The address of a listening socket without a path.
    pub(super) fn abstract_address(&self) -> (*const u8, usize) {
        let (address, len) = &self.abstract_address;
        ((&raw const *address).cast(), *len)
    }

    /// A TCP socket that the process has open; it is not connected.
    pub(super) fn stream(&self) -> i32 {
        self.stream
    }

    /// An address that it can connect to.
    pub(super) fn server(&self) -> (*const u8, usize) {
        ((&raw const self.server).cast(), size_of_val(&self.server))
    }

    /// A UDP socket that the process has open, as for a published port; it is not connected.
    pub(super) fn datagrams(&self) -> i32 {
        self.datagrams.as_raw_fd()
    }

    /// An address that it can send to.
    pub(super) fn internet_address(&self) -> (*const u8, usize) {
        ((&raw const self.to).cast(), size_of_val(&self.to))
    }

    /// `struct msghdr`: a byte to that address.
    pub(super) fn message(&self) -> *const u8 {
        let (address, len) = self.internet_address();
        let part: &[usize; 2] = Box::leak(Box::new([c"x".as_ptr() as usize, 1]));
        let part = part.as_ptr() as usize;
        // Name, its length (padded), parts, their number, no control data, no flags.
        let message: &[usize; 7] = Box::leak(Box::new([address as usize, len, part, 1, 0, 0, 0]));
        message.as_ptr().cast()
    }

    pub(super) fn vm(&self) -> i32 {
        self.machine.unwrap().0
    }

    pub(super) fn vcpu(&self) -> i32 {
        self.machine.unwrap().1
    }

    /// `struct kvm_userspace_memory_region`: a memory slot that maps a page of this process.
    pub(super) fn memory_slot(number: u64) -> *const u8 {
        let page = Box::leak(Box::new(Page([0; 4096])));
        let address = page.0.as_ptr() as u64;
        let slot: &[u64; 4] = Box::leak(Box::new([number, number * 4096, 4096, address]));
        slot.as_ptr().cast()
    }

    /// `struct io_uring_params`, filled by the kernel.
    pub(super) fn ring_parameters() -> *mut u8 {
        Box::leak(Box::new([0_u64; 16])).as_mut_ptr().cast()
    }
}

/// A separate mount without device nodes, where the host permits it.
fn share(path: &Path) -> OwnedFd {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    match open_tree(CWD, path, flags) {
        Ok(mount) => {
            let attributes = [libc::MOUNT_ATTR_NODEV, 0, 0, 0];
            let (empty, size) = (c"".as_ptr(), size_of_val(&attributes));
            let attributes = attributes.as_ptr();
            let at = mount.as_raw_fd();
            let set = call!(
                SYS_mount_setattr,
                at,
                empty,
                libc::AT_EMPTY_PATH,
                attributes,
                size
            );
            assert_eq!(set, 0);
            mount
        }
        Err(_) => File::open(path).unwrap().into(),
    }
}

fn handle(path: &CString) -> Handle {
    let mut handle = Handle {
        bytes: libc::MAX_HANDLE_SZ as u32,
        kind: 0,
        data: [0; libc::MAX_HANDLE_SZ as usize],
    };
    let mut mount = 0_i32;
    let (handle_at, mount_at) = (&raw mut handle, &raw mut mount);
    let made = call!(
        SYS_name_to_handle_at,
        libc::AT_FDCWD,
        path.as_ptr(),
        handle_at,
        mount_at,
        0
    );
    assert_eq!(made, 0);
    handle
}

fn address(path: &CString) -> libc::sockaddr_un {
    let mut address = libc::sockaddr_un {
        sun_family: libc::AF_UNIX as u16,
        sun_path: [0; 108],
    };
    let bytes = path.as_bytes().iter().map(|byte| *byte as c_char);
    address
        .sun_path
        .iter_mut()
        .zip(bytes)
        .for_each(|(to, from)| *to = from);
    address
}

/// An address that begins with a null byte, and its length.
fn abstract_address(name: &[u8]) -> (libc::sockaddr_un, usize) {
    let mut address = libc::sockaddr_un {
        sun_family: libc::AF_UNIX as u16,
        sun_path: [0; 108],
    };
    let bytes = name.iter().map(|byte| *byte as c_char);
    let room = address.sun_path.iter_mut().skip(1);
    room.zip(bytes).for_each(|(to, from)| *to = from);
    (address, size_of::<u16>() + 1 + name.len())
}

/// The address of a socket of IPv4.
fn internet_address(address: SocketAddr) -> libc::sockaddr_in {
    let SocketAddr::V4(address) = address else {
        panic!("an address of IPv6");
    };
    libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from_ne_bytes(address.ip().octets()),
        },
        sin_zero: [0; 8],
    }
}

/// Left open until the process ends.
fn machine() -> (i32, i32) {
    let options = File::options().read(true).write(true).open("/dev/kvm");
    let kvm = options.unwrap();
    // KVM_CREATE_VM, KVM_SET_USER_MEMORY_REGION (running needs some memory) and KVM_CREATE_VCPU.
    let vm = call!(SYS_ioctl, kvm.as_raw_fd(), 0xae01, 0) as i32;
    let slot = call!(SYS_ioctl, vm, 0x4020_ae46_u64, Ground::memory_slot(0));
    let vcpu = call!(SYS_ioctl, vm, 0xae41, 0) as i32;
    assert!(slot == 0 && vcpu > 0);
    (vm, vcpu)
}
