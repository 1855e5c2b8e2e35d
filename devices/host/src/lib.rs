//! Host support for Koya's libraries that is not part of a device.
//!
//! | module | what |
//! |---|---|
//! | [`process`] | what a program sets up at its start |
//! | [`threads`] | starts threads by [role](threads::Role) |
//! | [`walls`] | confines threads: seccomp filters and capabilities by role |
//! | [`descriptors`] | opens descriptors again, by `/proc/self/fd` |
//! | [`sync`] | locks |
//! | [`sys`] | signals, the heap, BPF redirection of loopback connections |
//!
//! A role fixes what a thread may do when the thread starts, and names it. `unsafe` code is in [`sys`] only.

pub mod descriptors;
pub mod process;
pub mod sync;
#[allow(unsafe_code)] // The one place for system calls that no safe crate wraps.
pub mod sys;
pub mod threads;
pub mod walls;
