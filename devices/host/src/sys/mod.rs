//! System calls and settings that no safe crate wraps: signal masks, BPF, the allocator, the umask of a thread. Every
//! function here is safe to call; each `unsafe` block states why.

mod inherited;
pub(crate) mod landlock;
mod redirect;
#[cfg(test)]
mod traitor_ground;
#[cfg(test)]
mod traitor_landlock_tests;
#[cfg(test)]
mod traitor_tests;
mod violation;

pub use inherited::close_on_exec_from;
pub use redirect::redirect_loopback;
pub use violation::{
    VIOLATION_STATUS, has_seccomp_filters, report_violations, report_violations_in,
    report_violations_to,
};

use std::io;

/// Makes all future threads of this process allocate from one heap: glibc otherwise gives each thread its
/// own, which costs some pages and page tables per device thread. Call it at the start of a program;
/// libraries must leave it to the program. Does nothing with other C libraries.
pub fn share_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number that the allocator reads under its own lock. No memory changes hands.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Blocks all signals in this thread but SIGSYS: handlers run on the owner's threads, and a blocked SIGXFSZ
/// becomes the error EFBIG for the guest. The kernel sends SIGSYS for calls that a seccomp filter does not
/// allow, and kills the process without calling a handler if it is blocked. Returns the resulting signal mask.
pub fn block_signals() -> libc::sigset_t {
    // SAFETY: both calls get a valid set on this stack; only the calling thread's mask changes.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::sigdelset(&mut all, libc::SIGSYS);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
        all
    }
}

/// Unblocks all signals in this thread.
pub fn unblock_signals() {
    // SAFETY: both calls get a valid set on this stack; only the calling thread's mask changes.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::pthread_sigmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
    }
}

/// Gives this thread its own umask, working directory and root directory, so that it can set them without
/// affecting the process.
///
/// # Errors
/// The error from unshare(2).
pub fn unshare_fs_state() -> io::Result<()> {
    // SAFETY: CLONE_FS only unshares the umask, working directory and root of the thread from the others; no
    // memory or descriptor is affected.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }?;
    Ok(())
}
