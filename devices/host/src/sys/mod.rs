//! Calls that no safe crate wraps: a thread's signals, BPF, and the allocator's settings. Every function
//! here is safe to call; each `unsafe` block states why.

mod inherited;
mod steer;

pub use inherited::close_on_exec_from;
pub use steer::steer_loopback;

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
