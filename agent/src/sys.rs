//! System calls that no safe crate wraps. Every function is safe to call; each `unsafe` block
//! states why.

use crate::enosys_filter::Step;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

fn checked(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// Writes a line to the kernel's log.
pub(crate) fn kernel_log(text: &str) {
    if let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg") {
        // Level 2, critical: shown on the console even with "quiet". Each write is a message
        // of its own, with a level of its own.
        log.write_all(format!("<2>{text}\n").as_bytes()).ok();
    } else {
        eprintln!("{text}");
    }
}

/// Makes executed programs inherit descriptors, at numbers from `first` on, where the process has nothing else open.
pub(crate) fn leave_open_from(first: i32, fds: Vec<OwnedFd>) -> io::Result<()> {
    let beyond = first + fds.len() as i32;
    // Moved out of the way, so that none is overwritten.
    let copies = fds.iter().map(|fd| fcntl_dupfd_cloexec(fd, beyond));
    let copies = copies.collect::<Result<Vec<_>, _>>()?;
    drop(fds);
    for (number, copy) in (first..).zip(&copies) {
        // SAFETY: no memory is passed, and nobody owns a descriptor with this number: the original ones are closed, and
        // the caller has no others there.
        checked(unsafe { libc::dup2(copy.as_raw_fd(), number) }.into())?;
    }
    Ok(())
}

/// Resets signals to their default dispositions, as programs expect: ignored signals stay ignored across exec, such as
/// SIGPIPE by Rust's runtime, and two internal signals of glibc in processes that it spawns.
pub(crate) fn reset_signals() {
    /// The kernel's `struct sigaction`; zeros are the default (SIG_DFL, no flags, no mask).
    const DEFAULT: [u64; 4] = [0; 4];
    /// Size of the kernel type `sigset_t`, in bytes.
    const SET: usize = 8;
    for signal in 1..=64 {
        // SAFETY: the kernel reads 32 bytes at most, which are there, and no handler is involved. SIGKILL and
        // SIGSTOP can't be changed, which is an error that changes nothing.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                DEFAULT.as_ptr(),
                std::ptr::null_mut::<u64>(),
                SET,
            );
        }
    }
    // SAFETY: an empty mask is installed; the process has one thread.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
    }
}

/// Adjusts the clock gradually, like adjtime(3); replaces an adjustment in progress.
pub(crate) fn slew_clock(microseconds: i64) -> io::Result<()> {
    adjust_clock(libc::ADJ_OFFSET_SINGLESHOT, |time| {
        time.offset = microseconds;
    })
}

/// Adjusts the clock at once; nanoseconds are less than a second.
pub(crate) fn step_clock(seconds: i64, nanoseconds: i64) -> io::Result<()> {
    adjust_clock(libc::ADJ_SETOFFSET | libc::ADJ_NANO, |time| {
        time.time.tv_sec = seconds;
        time.time.tv_usec = nanoseconds;
    })
}

fn adjust_clock(modes: libc::c_uint, set: impl FnOnce(&mut libc::timex)) -> io::Result<()> {
    // SAFETY: all zeroes are a timex, of plain numbers.
    let mut time: libc::timex = unsafe { std::mem::zeroed() };
    time.modes = modes as _;
    set(&mut time);
    // SAFETY: the structure is of this frame, and the kernel writes no more than it.
    checked(unsafe { libc::adjtimex(&raw mut time) }.into()).map(drop)
}

/// A descriptor that can be awaited for readability.
pub(crate) fn wait_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor stays open and the same as long as its owner, which the return value owns until it is no longer
    // registered.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

/// Makes the kernel reap this process's children.
pub(crate) fn collect_children() {
    // SAFETY: a disposition is set; no handler is involved.
    unsafe {
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
    }
}

/// Puts future children into a new pid namespace.
pub(crate) fn new_pids() -> io::Result<()> {
    unshare(libc::CLONE_NEWPID)
}

/// Moves this process into a new mount namespace.
pub(crate) fn new_mounts() -> io::Result<()> {
    unshare(libc::CLONE_NEWNS)
}

fn unshare(namespace: libc::c_int) -> io::Result<()> {
    // SAFETY: no memory is passed, and memory and descriptors stay as they are.
    let made = unsafe { libc::unshare(namespace) };
    checked(made.into()).map(drop)
}

/// Sends any signal, including real-time ones, to one process.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // Other numbers would mean a group of processes, or all.
    if pid <= 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: no memory is passed.
    let sent = unsafe { libc::kill(pid, signal) };
    checked(sent.into()).map(drop)
}

/// Replaces this program. Returns only if that fails.
pub(crate) fn exec(path: &std::ffi::CStr, args: &[std::ffi::CString]) -> io::Error {
    let mut pointers: Vec<*const libc::c_char> = args.iter().map(|a| a.as_ptr()).collect();
    pointers.push(std::ptr::null());
    // SAFETY: the path and every argument are terminated strings that outlive the call, the array
    // ends with a null pointer; the environment is the process's own.
    unsafe {
        libc::execv(path.as_ptr(), pointers.as_ptr());
    }
    io::Error::last_os_error()
}

/// `struct ifreq` for SIOCSIFFLAGS.
#[repr(C)]
struct InterfaceFlags {
    name: [u8; 16],
    flags: libc::c_short,
    padding: [u8; 22],
}

/// `ip link set lo up`
pub(crate) fn bring_up_loopback() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let mut request = InterfaceFlags {
        name: [0; 16],
        flags: (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short,
        padding: [0; 22],
    };
    request.name[..2].copy_from_slice(b"lo");
    // SAFETY: the request is laid out as struct ifreq (40 bytes) and only read.
    let result = unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw const request,
        )
    };
    checked(result.into())?;
    Ok(())
}

/// `struct fuse_host_event` of Koya's kernel (`guest-kernel/patches`).
#[repr(C)]
struct HostEvent {
    nodeid: u64,
    mask: u32,
    cookie: u32,
    name_len: u32,
    padding: u32,
    name: [u8; 256],
}

/// `FUSE_IOC_HOST_EVENT`: `_IOW('K', 0x59, struct fuse_host_event)`.
const FUSE_IOC_HOST_EVENT: u32 =
    1 << 30 | (size_of::<HostEvent>() as u32) << 16 | (b'K' as u32) << 8 | 0x59;

/// Makes the kernel fire watches for a node, or for its entry `name` if not empty, of the FUSE file system of `root`. False
/// if there are none.
pub(crate) fn fire_host_event(
    root: BorrowedFd<'_>,
    nodeid: u64,
    mask: u32,
    cookie: u32,
    name: &[u8],
) -> io::Result<bool> {
    let mut event = HostEvent {
        nodeid,
        mask,
        cookie,
        name_len: name.len() as u32,
        padding: 0,
        name: [0; 256],
    };
    // The last byte stays zero.
    let room = event.name[..255].get_mut(..name.len());
    room.ok_or(io::ErrorKind::InvalidInput)?
        .copy_from_slice(name);
    // SAFETY: the event is laid out as the kernel's structure, whose size is in the number of the call,
    // and only read.
    let result =
        unsafe { libc::ioctl(root.as_raw_fd(), FUSE_IOC_HOST_EVENT as _, &raw const event) };
    Ok(checked(result.into())? != 0)
}

/// Repeats a call while it is interrupted by signals: the agent gets one for each process that ends.
pub(crate) fn retried<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            done => return done,
        }
    }
}

/// Connects to a port of the host. Linux gives up a vsock connection whose connect(2) is interrupted by a signal
/// (net/vmw_vsock/af_vsock.c), so connect(2) does not block here: poll(2) does, and can be repeated.
pub(crate) fn connect_to_host(port: u32) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no memory is passed.
    let socket = checked(unsafe { libc::socket(libc::AF_VSOCK, kind, 0) }.into())?;
    // SAFETY: the call returned a new descriptor that nobody else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(socket as i32) };
    // SAFETY: every field of the structure is a number, for which all zeroes is a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = libc::VMADDR_CID_HOST;
    address.svm_port = port;
    // SAFETY: the address is a sockaddr_vm of the length that is passed, and only read.
    let asked = unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_vm>() as libc::socklen_t,
        )
    };
    match checked(asked.into()) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => wait_connected(&socket)?,
        done => drop(done?),
    }
    let flags = rustix::fs::fcntl_getfl(&socket)?;
    rustix::fs::fcntl_setfl(&socket, flags - rustix::fs::OFlags::NONBLOCK)?;
    Ok(socket)
}

/// Waits for a connection in progress. The kernel has a time limit for that, two seconds by default.
pub(crate) fn wait_connected(socket: &OwnedFd) -> io::Result<()> {
    let mut wanted = [PollFd::new(socket, PollFlags::OUT)];
    retried(|| poll(&mut wanted, None))?;
    Ok(rustix::net::sockopt::socket_error(socket)??)
}

/// One eBPF instruction: include/uapi/linux/bpf.h, `struct bpf_insn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Instruction {
    pub(crate) code: u8,
    /// Destination register in the low half, source register in the high half.
    pub(crate) registers: u8,
    pub(crate) offset: i16,
    pub(crate) immediate: i32,
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 1 << 1;
const BPF_F_REPLACE: u32 = 1 << 2;

/// The head of `union bpf_attr` for BPF_PROG_LOAD; the kernel treats missing fields as zero.
#[repr(C)]
struct LoadAttributes {
    program_type: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// The head of `union bpf_attr` for BPF_PROG_ATTACH.
#[repr(C)]
struct AttachAttributes {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
    replaced: u32,
}

/// Loads a cgroup-device program and attaches it to a cgroup, replacing another one if given. Child groups may have their
/// own programs: a device must be allowed by all of them.
pub(crate) fn attach_device_program(
    cgroup: BorrowedFd<'_>,
    program: &[Instruction],
    replaced: Option<BorrowedFd<'_>>,
) -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let load = LoadAttributes {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
    };
    // SAFETY: the attributes point to the instructions and the license, which outlive the call;
    // the kernel only reads them.
    let fd = checked(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const load,
            size_of::<LoadAttributes>(),
        )
    })?;
    // SAFETY: the call returned a new descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let attach = AttachAttributes {
        target: cgroup.as_raw_fd() as u32,
        program: fd.as_raw_fd() as u32,
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI | replaced.map_or(0, |_| BPF_F_REPLACE),
        replaced: replaced.map_or(0, |program| program.as_raw_fd() as u32),
    };
    // SAFETY: the attributes live on this stack and are only read. The cgroup holds the program
    // from then on.
    checked(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_ATTACH,
            &raw const attach,
            size_of::<AttachAttributes>(),
        )
    })?;
    Ok(fd)
}

/// Adds a seccomp filter to those of the calling thread.
pub(crate) fn filter_calls(program: &[Step], flags: u32) -> io::Result<()> {
    const SET_MODE_FILTER: libc::c_uint = 1;
    let instruction = |&(code, jt, jf, k): &Step| libc::sock_filter { code, jt, jf, k };
    let mut instructions: Vec<_> = program.iter().map(instruction).collect();
    let program = libc::sock_fprog {
        len: instructions.len() as u16,
        filter: instructions.as_mut_ptr(),
    };
    // SAFETY: the program points to the instructions, which outlive the call; the kernel checks and copies them.
    checked(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    })?;
    Ok(())
}

/// The error of a system call without arguments.
#[cfg(test)]
pub(crate) fn answer_to_call(number: i64) -> Option<i32> {
    // SAFETY: the test uses numbers that no kernel implements.
    let answer = unsafe { libc::syscall(number) };
    checked(answer).err()?.raw_os_error()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupted_call_is_made_again() {
        let mut answers = [Err(Errno::INTR), Err(Errno::INTR), Ok(7), Ok(8)].into_iter();
        assert_eq!(retried(|| answers.next().unwrap()), Ok(7));
        let mut calls = 0;
        let failed = retried(|| {
            calls += 1;
            Err::<(), _>(Errno::IO)
        });
        assert_eq!((failed, calls), (Err(Errno::IO), 1));
    }
}
