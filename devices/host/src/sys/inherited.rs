//! Descriptors that a program was started with.

use std::io;
use std::os::fd::RawFd;

/// Has every descriptor from `first` on closed when this process executes another program. For the start of a
/// program, which knows of none of them; a library leaves that to the program.
///
/// # Errors
/// If the host lists no descriptors (an old kernel without /proc).
pub fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    // SAFETY: no memory is passed; descriptors stay open in this process, and only a flag of theirs changes.
    let set = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    match set {
        0 => Ok(()),
        // Before Linux 5.11.
        _ => one_by_one(first),
    }
}

fn one_by_one(first: RawFd) -> io::Result<()> {
    let open: Vec<RawFd> = std::fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    for fd in open.into_iter().filter(|fd| *fd >= first) {
        // SAFETY: no memory is passed. One that is closed by now (the listing itself) is an error, which
        // changes nothing.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
    use std::os::fd::AsRawFd;

    #[test]
    fn inherited_descriptors_do_not_outlive_an_exec() {
        for close in [close_on_exec_from, one_by_one] {
            let (low, high) = std::io::pipe().unwrap();
            fcntl_setfd(&low, FdFlags::empty()).unwrap();
            fcntl_setfd(&high, FdFlags::empty()).unwrap();
            close(high.as_raw_fd()).unwrap();
            assert_eq!(fcntl_getfd(&high).unwrap(), FdFlags::CLOEXEC);
            if low.as_raw_fd() < high.as_raw_fd() {
                assert_eq!(fcntl_getfd(&low).unwrap(), FdFlags::empty());
            }
        }
    }
}
