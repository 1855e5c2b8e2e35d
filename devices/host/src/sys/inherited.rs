//! File descriptors inherited by a program.

use std::io;
use std::os::fd::RawFd;

/// Sets close-on-exec on every descriptor from `first` on. Call it at the start of a program, before it opens
/// descriptors of its own; libraries must leave it to the program.
///
/// # Errors
/// If the descriptors can't be listed (an old kernel without /proc).
pub fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    // SAFETY: no memory is passed; descriptors stay open in this process, and only a flag of them changes.
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
        _ => set_each(first),
    }
}

fn set_each(first: RawFd) -> io::Result<()> {
    let open: Vec<RawFd> = std::fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    for fd in open.into_iter().filter(|fd| *fd >= first) {
        // SAFETY: no memory is passed. A descriptor that is closed by now (that of the listing itself) gives
        // an error and changes nothing.
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
        for close in [close_on_exec_from, set_each] {
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
