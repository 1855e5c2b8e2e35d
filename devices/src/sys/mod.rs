//! Calls that no safe crate wraps: vectored I/O on guest memory, io_uring, file handles, per-mount
//! attributes, BPF, and the allocator's settings. Every function here is safe to call; each `unsafe` block states why.

mod inherited;
mod pieces;
mod ring;
mod steer;
mod tap;

pub use inherited::close_on_exec_from;
pub use pieces::Pieces;
pub use ring::{Completion, Ring, Transfer};
pub use steer::steer_loopback;
pub use tap::{attach_tap, offload, set_tap_offload, use_tap_queue};

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::time::Duration;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Has all threads of this process allocate from one heap, those that come after this: glibc gives each a
/// heap of its own, some pages and page tables for every device's thread. For the start of a program; a
/// library leaves that to the program. Nothing happens where the C library is another.
pub fn share_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a number that the allocator reads under its own lock. No memory changes hands.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// The most pieces that one call takes (IOV_MAX); the rest of a longer list is left for the
/// caller's next call, as with any short read or write.
const MAX_PIECES: usize = 1024;

fn checked(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn pieces<B: BitmapSlice>(slices: &[VolatileSlice<'_, B>]) -> Vec<libc::iovec> {
    slices
        .iter()
        .take(MAX_PIECES)
        .map(|slice| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        })
        .collect()
}

/// Reads from `fd` at `offset` straight into guest memory.
///
/// # Errors
/// What preadv(2) says.
pub fn read_at<B: BitmapSlice>(
    fd: impl AsFd,
    slices: &[VolatileSlice<'_, B>],
    offset: u64,
) -> io::Result<usize> {
    let pieces = pieces(slices);
    // SAFETY: each piece comes from a VolatileSlice, which borrows its mapping for longer than
    // this call; the kernel writes only inside them, and nobody holds references into them.
    checked(unsafe {
        libc::preadv(
            fd.as_fd().as_raw_fd(),
            pieces.as_ptr(),
            pieces.len() as libc::c_int,
            offset as libc::off_t,
        )
    })
}

/// Writes guest memory straight to `fd`, at `offset` or with `append` at the file's end.
///
/// # Errors
/// What pwritev2(2) says.
pub fn write_at<B: BitmapSlice>(
    fd: impl AsFd,
    slices: &[VolatileSlice<'_, B>],
    offset: u64,
    append: bool,
) -> io::Result<usize> {
    let pieces = pieces(slices);
    // SAFETY: each piece comes from a VolatileSlice, which borrows its mapping for longer than
    // this call; the kernel only reads them.
    checked(unsafe {
        libc::pwritev2(
            fd.as_fd().as_raw_fd(),
            pieces.as_ptr(),
            pieces.len() as libc::c_int,
            offset as libc::off_t,
            if append { libc::RWF_APPEND } else { 0 },
        )
    })
}

/// Closes a descriptor and says what the file system says of it.
///
/// # Errors
/// What close(2) says; the descriptor is closed all the same.
pub fn close(fd: OwnedFd) -> io::Result<()> {
    // SAFETY: the descriptor was owned and is given up.
    checked(unsafe { libc::close(fd.into_raw_fd()) } as isize).map(drop)
}

/// Waits until one of these descriptors is readable, at most for `limit`; those that are none are not
/// waited for. Which ones are (or have failed); none after the limit or a signal.
///
/// # Errors
/// What poll(2) says.
pub fn wait_readable<const N: usize>(
    fds: [Option<&dyn AsRawFd>; N],
    limit: Option<Duration>,
) -> io::Result<[bool; N]> {
    let mut watched = fds.map(|fd| libc::pollfd {
        fd: fd.map_or(-1, AsRawFd::as_raw_fd),
        events: libc::POLLIN,
        revents: 0,
    });
    // Up to a whole millisecond: less would be a busy loop.
    let limit = limit.map_or(-1, |limit| {
        limit.as_micros().div_ceil(1000).min(i32::MAX as u128) as libc::c_int
    });
    // SAFETY: the array lives on this stack and its length is given.
    let ready = unsafe { libc::poll(watched.as_mut_ptr(), N as libc::nfds_t, limit) };
    match checked(ready as isize) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(watched.map(|one| one.revents != 0)),
    }
}

/// Advice on guest memory that the host may take (madvise(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Private memory: its pages go back to the host and read as zero from then on.
    GiveBackPrivate,
    /// Memory of a file: a hole is made in the file.
    GiveBackShared,
    /// Use huge pages where the host has them (transparent huge pages).
    HugePages,
    /// Leave it out when this process's memory is written to a core dump.
    NoDump,
}

/// Advises the host on the whole pages of guest memory in `slice`.
///
/// # Errors
/// What madvise(2) says.
pub fn advise<B: BitmapSlice>(slice: &VolatileSlice<'_, B>, advice: Advice) -> io::Result<()> {
    let page = rustix::param::page_size();
    let guard = slice.ptr_guard_mut();
    let start = guard.as_ptr() as usize;
    let first = start.next_multiple_of(page);
    let end = (start + slice.len()) / page * page;
    if first >= end {
        return Ok(());
    }
    let advice = match advice {
        Advice::GiveBackPrivate => libc::MADV_DONTNEED,
        Advice::GiveBackShared => libc::MADV_REMOVE,
        Advice::HugePages => libc::MADV_HUGEPAGE,
        Advice::NoDump => libc::MADV_DONTDUMP,
    };
    // SAFETY: the range lies inside the slice, so inside a mapping of guest memory, which is the
    // guest's alone: at most its pages become zeroes, as if the guest had written them. Whether it is
    // dumped changes nothing for whoever uses it.
    let result = unsafe { libc::madvise(first as *mut libc::c_void, end - first, advice) };
    checked(result as isize).map(drop)
}

/// Receives from a socket straight into guest memory.
///
/// # Errors
/// What readv(2) says.
pub fn receive<B: BitmapSlice>(
    fd: impl AsFd,
    slices: &[VolatileSlice<'_, B>],
) -> io::Result<usize> {
    let pieces = pieces(slices);
    // SAFETY: as in `read_at`.
    checked(unsafe {
        libc::readv(
            fd.as_fd().as_raw_fd(),
            pieces.as_ptr(),
            pieces.len() as libc::c_int,
        )
    })
}

/// Writes guest memory straight to a descriptor that has no place in it, as one frame.
///
/// # Errors
/// What writev(2) says.
pub fn write<B: BitmapSlice>(fd: impl AsFd, slices: &[VolatileSlice<'_, B>]) -> io::Result<usize> {
    let pieces = pieces(slices);
    // SAFETY: as in `write_at`.
    checked(unsafe {
        libc::writev(
            fd.as_fd().as_raw_fd(),
            pieces.as_ptr(),
            pieces.len() as libc::c_int,
        )
    })
}

/// Sends guest memory straight to a socket, without SIGPIPE.
///
/// # Errors
/// What sendmsg(2) says.
pub fn send<B: BitmapSlice>(fd: impl AsFd, slices: &[VolatileSlice<'_, B>]) -> io::Result<usize> {
    let mut pieces = pieces(slices);
    // SAFETY: msghdr is plain data for which all zeroes is a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len() as _;
    // SAFETY: the message points to `pieces`, which outlives the call; the pieces are as in
    // `write_at`.
    checked(unsafe {
        libc::sendmsg(
            fd.as_fd().as_raw_fd(),
            &message,
            libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
        )
    })
}

/// A file's identity beyond its lifetime, as name_to_handle_at(2) gives it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FileHandle {
    kind: i32,
    bytes: Vec<u8>,
}

/// `struct file_handle` with room for the largest handle.
#[repr(C)]
struct RawHandle {
    bytes: u32,
    kind: i32,
    data: [u8; libc::MAX_HANDLE_SZ as usize],
}

impl FileHandle {
    /// The handle of the file that `fd` (O_PATH will do) refers to.
    ///
    /// # Errors
    /// EOPNOTSUPP where the file system has no handles.
    pub fn of(fd: impl AsFd) -> io::Result<Self> {
        let mut raw = RawHandle {
            bytes: libc::MAX_HANDLE_SZ as u32,
            kind: 0,
            data: [0; libc::MAX_HANDLE_SZ as usize],
        };
        let mut mount_id = 0;
        // SAFETY: RawHandle begins as struct file_handle does and says how much room follows;
        // the kernel writes at most that much. The path is a static empty string.
        let result = unsafe {
            libc::name_to_handle_at(
                fd.as_fd().as_raw_fd(),
                c"".as_ptr(),
                (&raw mut raw).cast(),
                &mut mount_id,
                libc::AT_EMPTY_PATH,
            )
        };
        checked(result as isize)?;
        let len = (raw.bytes as usize).min(raw.data.len());
        Ok(Self {
            kind: raw.kind,
            bytes: raw.data[..len].to_vec(),
        })
    }

    /// Opens the file again; needs CAP_DAC_READ_SEARCH. `mount` is any descriptor on the mount.
    ///
    /// # Errors
    /// ESTALE if the file is gone, EPERM without the capability.
    pub fn open(&self, mount: impl AsFd, flags: i32) -> io::Result<OwnedFd> {
        let mut raw = RawHandle {
            bytes: self.bytes.len() as u32,
            kind: self.kind,
            data: [0; libc::MAX_HANDLE_SZ as usize],
        };
        raw.data[..self.bytes.len()].copy_from_slice(&self.bytes);
        // SAFETY: RawHandle is laid out as struct file_handle with its data following; the
        // kernel only reads it.
        let fd = unsafe {
            libc::open_by_handle_at(
                mount.as_fd().as_raw_fd(),
                (&raw mut raw).cast(),
                flags | libc::O_CLOEXEC,
            )
        };
        checked(fd as isize)?;
        // SAFETY: the call returned a new descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// Changes attributes of a detached mount, with `flags` also of everything under it.
fn change_mount(
    mount: BorrowedFd<'_>,
    flags: libc::c_int,
    attributes: libc::mount_attr,
) -> io::Result<()> {
    // SAFETY: the path is a static empty string, the attributes live on this stack and their
    // size is given; the kernel only reads them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    checked(result as isize).map(drop)
}

fn no_mount_change() -> libc::mount_attr {
    // SAFETY: mount_attr is plain data for which all zeroes is a valid value.
    unsafe { std::mem::zeroed() }
}

/// Leaves a detached mount, with everything under it, what a server of files needs: nothing runs from
/// it, no device node of it is opened, and the host's mounts neither come to it nor wait for it.
///
/// # Errors
/// What mount_setattr(2) says.
pub fn restrict_mount(mount: BorrowedFd<'_>, read_only: bool) -> io::Result<()> {
    let mut attributes = no_mount_change();
    attributes.attr_set =
        libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    if read_only {
        attributes.attr_set |= libc::MOUNT_ATTR_RDONLY;
    }
    attributes.propagation = libc::MS_PRIVATE;
    change_mount(mount, libc::AT_RECURSIVE, attributes)
}

/// Lets a detached mount be written again, and nothing under it.
///
/// # Errors
/// What mount_setattr(2) says.
pub fn make_mount_writable(mount: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = no_mount_change();
    attributes.attr_clr = libc::MOUNT_ATTR_RDONLY;
    change_mount(mount, 0, attributes)
}

/// fchmodat2(2): one number on every architecture, which libc does not name on all.
const FCHMODAT2: libc::c_long = 452;

/// Changes a file's mode through an O_PATH descriptor, never through a link.
///
/// # Errors
/// What fchmodat2(2) says; ENOSYS before Linux 6.6.
pub fn change_mode(fd: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
    // SAFETY: the path is a static empty string; the other arguments are plain numbers.
    let result = unsafe {
        libc::syscall(
            FCHMODAT2,
            fd.as_raw_fd(),
            c"".as_ptr(),
            mode,
            libc::AT_EMPTY_PATH,
        )
    };
    checked(result as isize).map(drop)
}

/// Gives this thread a file-mode mask (and a working directory) of its own, so that it can set
/// the mask for one request without touching the process's.
///
/// # Errors
/// What unshare(2) says.
pub fn unshare_fs_state() -> io::Result<()> {
    // SAFETY: CLONE_FS only unshares the thread's umask, working directory and root from the
    // other threads'; no memory or descriptor is affected.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }?;
    Ok(())
}

/// Keeps every signal of the process from this thread: handlers belong to its owner's threads, and
/// SIGXFSZ becomes the error that a guest is to get (EFBIG). Returns what is blocked from now on.
pub fn block_signals() -> libc::sigset_t {
    // SAFETY: both calls get a valid set on this stack; only the calling thread's mask changes.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
        all
    }
}

/// The path by which this process can reach an O_PATH descriptor's file.
pub fn proc_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}
