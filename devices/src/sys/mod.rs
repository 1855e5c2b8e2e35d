//! System calls that no safe crate wraps: vectored I/O on guest memory, io_uring, file handles and mount
//! attributes. Every function here is safe to call; each `unsafe` block states why.

mod iovecs;
mod ring;
mod tap;

pub use iovecs::Iovecs;
pub use ring::{Completion, Ring, Transfer};
pub use tap::{attach_tap, offload, set_tap_offload, use_tap_queue};

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::time::Duration;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Maximum number of iovecs of one call (IOV_MAX); the rest of a longer list is left to the caller's next
/// call, as after any short read or write.
const MAX_IOVECS: usize = 1024;

fn checked(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn iovecs<B: BitmapSlice>(slices: &[VolatileSlice<'_, B>]) -> Vec<libc::iovec> {
    slices
        .iter()
        .take(MAX_IOVECS)
        .map(|slice| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        })
        .collect()
}

/// Reads from `fd` at `offset` directly into guest memory.
///
/// # Errors
/// The error from preadv(2).
pub fn read_at<B: BitmapSlice>(
    fd: impl AsFd,
    slices: &[VolatileSlice<'_, B>],
    offset: u64,
) -> io::Result<usize> {
    let iovecs = iovecs(slices);
    // SAFETY: each iovec comes from a VolatileSlice, which borrows its mapping for longer than this call; the
    // kernel writes only inside them, and nobody holds references into them.
    checked(unsafe {
        libc::preadv(
            fd.as_fd().as_raw_fd(),
            iovecs.as_ptr(),
            iovecs.len() as libc::c_int,
            offset as libc::off_t,
        )
    })
}

/// Writes guest memory directly to `fd`, at `offset` or with `append` at the end of the file.
///
/// # Errors
/// The error from pwritev2(2).
pub fn write_at<B: BitmapSlice>(
    fd: impl AsFd,
    slices: &[VolatileSlice<'_, B>],
    offset: u64,
    append: bool,
) -> io::Result<usize> {
    let iovecs = iovecs(slices);
    // SAFETY: each iovec comes from a VolatileSlice, which borrows its mapping for longer than this call; the
    // kernel only reads them.
    checked(unsafe {
        libc::pwritev2(
            fd.as_fd().as_raw_fd(),
            iovecs.as_ptr(),
            iovecs.len() as libc::c_int,
            offset as libc::off_t,
            if append { libc::RWF_APPEND } else { 0 },
        )
    })
}

/// Closes a descriptor and returns the file system's error, if any.
///
/// # Errors
/// The error from close(2); the descriptor is closed all the same.
pub fn close(fd: OwnedFd) -> io::Result<()> {
    // SAFETY: the descriptor was owned and is given up.
    checked(unsafe { libc::close(fd.into_raw_fd()) } as isize).map(drop)
}

/// Waits up to `limit` until one of these descriptors is readable; `None` entries are ignored. Returns which
/// ones are readable (or have failed); none after a timeout or a signal.
///
/// # Errors
/// The error from poll(2).
pub fn wait_readable<const N: usize>(
    fds: [Option<&dyn AsRawFd>; N],
    limit: Option<Duration>,
) -> io::Result<[bool; N]> {
    let mut watched = fds.map(|fd| libc::pollfd {
        fd: fd.map_or(-1, AsRawFd::as_raw_fd),
        events: libc::POLLIN,
        revents: 0,
    });
    // Rounded up to whole milliseconds: rounding down would cause a busy loop.
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

/// Advice to the host about guest memory (madvise(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Discard pages of private memory; they read as zero from then on.
    DiscardPrivate,
    /// Punch a hole into the file behind the memory.
    PunchHole,
    /// Use transparent huge pages if the host has them.
    HugePages,
    /// Leave the memory out of core dumps of this process.
    NoDump,
}

/// Advises the host about the whole pages of guest memory in `slice`.
///
/// # Errors
/// The error from madvise(2).
pub fn advise<B: BitmapSlice>(slice: &VolatileSlice<'_, B>, advice: Advice) -> io::Result<()> {
    let guard = slice.ptr_guard_mut();
    let start = guard.as_ptr() as usize;
    let pages = whole_pages(start..start + slice.len(), rustix::param::page_size());
    if pages.is_empty() {
        return Ok(());
    }
    let advice = match advice {
        Advice::DiscardPrivate => libc::MADV_DONTNEED,
        Advice::PunchHole => libc::MADV_REMOVE,
        Advice::HugePages => libc::MADV_HUGEPAGE,
        Advice::NoDump => libc::MADV_DONTDUMP,
    };
    // SAFETY: the range lies inside the slice and thus inside a mapping of guest memory, which belongs to the
    // guest alone: at most its pages become zero, as if the guest had written them. Exclusion from core dumps makes no
    // difference to its users.
    let result = unsafe { libc::madvise(pages.start as *mut libc::c_void, pages.len(), advice) };
    checked(result as isize).map(drop)
}

/// The whole pages of `page` bytes in a range of addresses; the guest's pages may be smaller than the host's.
fn whole_pages(bytes: Range<usize>, page: usize) -> Range<usize> {
    bytes.start.next_multiple_of(page)..bytes.end / page * page
}

/// Receives from a socket directly into guest memory.
///
/// # Errors
/// The error from readv(2).
pub fn receive<B: BitmapSlice>(
    fd: impl AsFd,
    slices: &[VolatileSlice<'_, B>],
) -> io::Result<usize> {
    let iovecs = iovecs(slices);
    // SAFETY: as in `read_at`.
    checked(unsafe {
        libc::readv(
            fd.as_fd().as_raw_fd(),
            iovecs.as_ptr(),
            iovecs.len() as libc::c_int,
        )
    })
}

/// Writes guest memory directly to a non-seekable descriptor, as one frame.
///
/// # Errors
/// The error from writev(2).
pub fn write<B: BitmapSlice>(fd: impl AsFd, slices: &[VolatileSlice<'_, B>]) -> io::Result<usize> {
    let iovecs = iovecs(slices);
    // SAFETY: as in `write_at`.
    checked(unsafe {
        libc::writev(
            fd.as_fd().as_raw_fd(),
            iovecs.as_ptr(),
            iovecs.len() as libc::c_int,
        )
    })
}

/// Sends guest memory directly to a connected socket, without waiting and without SIGPIPE.
///
/// One call for each slice: sendmsg(2) would take them all, but has its address in memory, where a seccomp filter cannot see
/// it, so no thread that serves a guest may make it. A packet's data is nearly always one slice.
///
/// # Errors
/// The error from send(2), if nothing was sent.
pub fn send<B: BitmapSlice>(fd: impl AsFd, slices: &[VolatileSlice<'_, B>]) -> io::Result<usize> {
    let mut sent = 0;
    for iovec in iovecs(slices) {
        // SAFETY: as in `write_at`.
        let part = checked(unsafe {
            libc::send(
                fd.as_fd().as_raw_fd(),
                iovec.iov_base,
                iovec.iov_len,
                libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
            )
        });
        match part {
            Ok(count) if count == iovec.iov_len => sent += count,
            Ok(count) => return Ok(sent + count),
            Err(error) if sent == 0 => return Err(error),
            // Reported by the next call, if it persists.
            Err(_) => return Ok(sent),
        }
    }
    Ok(sent)
}

/// A persistent file handle, from name_to_handle_at(2).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FileHandle {
    kind: i32,
    bytes: Vec<u8>,
}

/// `struct file_handle` with space for the largest handle.
#[repr(C)]
struct RawHandle {
    bytes: u32,
    kind: i32,
    data: [u8; libc::MAX_HANDLE_SZ as usize],
}

impl FileHandle {
    /// The handle of the file that `fd` refers to, which may be an O_PATH descriptor.
    ///
    /// # Errors
    /// EOPNOTSUPP if the file system has no handles.
    pub fn from_fd(fd: impl AsFd) -> io::Result<Self> {
        let mut raw = RawHandle {
            bytes: libc::MAX_HANDLE_SZ as u32,
            kind: 0,
            data: [0; libc::MAX_HANDLE_SZ as usize],
        };
        let mut mount_id = 0;
        // SAFETY: RawHandle begins like struct file_handle and states how much space follows; the kernel
        // writes at most that much. The path is a static empty string.
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

    /// Reopens the file; requires CAP_DAC_READ_SEARCH. `mount` is any descriptor on the mount.
    ///
    /// # Errors
    /// ESTALE if the file no longer exists, EPERM without the capability.
    pub fn open(&self, mount: impl AsFd, flags: i32) -> io::Result<OwnedFd> {
        let mut raw = RawHandle {
            bytes: self.bytes.len() as u32,
            kind: self.kind,
            data: [0; libc::MAX_HANDLE_SZ as usize],
        };
        raw.data[..self.bytes.len()].copy_from_slice(&self.bytes);
        // SAFETY: RawHandle has the layout of struct file_handle followed by its data; the kernel only reads
        // it.
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

/// Changes attributes of a detached mount, depending on `flags` also of all mounts below it.
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

/// Restricts a detached mount and all mounts below it to the needs of a file server: no executables, no device
/// nodes, and no propagation of mounts to or from the host.
///
/// # Errors
/// The error from mount_setattr(2).
pub fn restrict_mount(mount: BorrowedFd<'_>, read_only: bool) -> io::Result<()> {
    change_all(mount, libc::MOUNT_ATTR_NOEXEC, read_only, libc::MS_PRIVATE)
}

/// As [`restrict_mount`], for programs of the host: executables are permitted, and later mounts of the host appear on request.
///
/// # Errors
/// The error from mount_setattr(2).
pub fn protect_mount(mount: BorrowedFd<'_>, read_only: bool, follows: bool) -> io::Result<()> {
    let propagation = match follows {
        true => libc::MS_SLAVE,
        false => libc::MS_PRIVATE,
    };
    change_all(mount, 0, read_only, propagation)
}

/// Changes a detached mount and all mounts below it: no device nodes, no privileges of executables, and these attributes.
fn change_all(
    mount: BorrowedFd<'_>,
    more: u64,
    read_only: bool,
    propagation: u64,
) -> io::Result<()> {
    let mut attributes = no_mount_change();
    attributes.attr_set = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | more;
    if read_only {
        attributes.attr_set |= libc::MOUNT_ATTR_RDONLY;
    }
    attributes.propagation = propagation;
    change_mount(mount, libc::AT_RECURSIVE, attributes)
}

/// Makes a detached mount writable again, but no mount below it.
///
/// # Errors
/// The error from mount_setattr(2).
pub fn make_mount_writable(mount: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = no_mount_change();
    attributes.attr_clr = libc::MOUNT_ATTR_RDONLY;
    change_mount(mount, 0, attributes)
}

/// fchmodat2(2): the same number on every architecture, but libc does not define it for all.
const FCHMODAT2: libc::c_long = 452;

/// Changes the mode of a file through an O_PATH descriptor, never following a symbolic link.
///
/// # Errors
/// The error from fchmodat2(2); ENOSYS before Linux 6.6.
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn only_whole_pages_of_the_host_are_meant() {
        // x86_64 has pages of 4 KiB, aarch64 also of 16 and 64.
        for page in [4 << 10, 16 << 10, 64 << 10] {
            let at = 10 * page;
            let whole = at..at + 2 * page;
            assert_eq!(whole_pages(whole.clone(), page), whole);
            let around = at - 1..at + 3 * page - 1;
            assert_eq!(whole_pages(around, page), whole);
            assert!(whole_pages(at + 1..at + 2 * page - 1, page).is_empty());
            assert!(whole_pages(at + 1..at + 2, page).is_empty());
        }
        // A page of the guest is none of this host.
        assert!(whole_pages(0x1_0000..0x1_1000, 64 << 10).is_empty());
    }

    #[test]
    fn slices_are_sent_in_order_as_far_as_they_fit() {
        const MORE: usize = 4 << 20;
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (mut one, mut other) = (vec![1_u8; 10], vec![2_u8; MORE]);
        let slices = [
            VolatileSlice::from(one.as_mut_slice()),
            VolatileSlice::from(other.as_mut_slice()),
        ];
        let sent = send(&ours, &slices).unwrap();
        assert!(sent > 10 && sent < 10 + MORE, "{sent}");
        let error = send(&ours, &slices).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(ours);
        let mut got = Vec::new();
        theirs.read_to_end(&mut got).unwrap();
        assert_eq!(got.len(), sent);
        assert_eq!(&got[..10], &[1; 10]);
        assert!(got[10..].iter().all(|byte| *byte == 2));
    }

    #[test]
    fn a_closed_stream_is_an_error_and_no_signal() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let mut data = [0_u8; 8];
        let error = send(&ours, &[VolatileSlice::from(data.as_mut_slice())]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
