//! Host support for Koya's libraries that is not part of a device.
//!
//! | module | what |
//! |---|---|
//! | [`process`] | settings at the start of a program |
//! | [`privileges`] | the capabilities that a program keeps while its sandbox runs |
//! | [`security_modules`] | AppArmor and SELinux on the host |
//! | [`threads`] | starts threads by [role](threads::Role) |
//! | [`walls`] | confines threads: seccomp filters, capabilities and Landlock by role |
//! | [`descriptors`] | reopens descriptors, by `/proc/self/fd` |
//! | [`sockets`] | private Unix sockets, and long paths of sockets |
//! | [`limited`] | log messages whose number a guest determines |
//! | [`sync`] | locks, counters |
//! | [`sys`] | signals, the heap, BPF redirection of loopback connections |
//!
//! A role sets the name and the permissions of a thread at its start. `unsafe` code is in [`sys`] only.

pub mod descriptors;
pub mod limited;
pub mod privileges;
pub mod process;
pub mod security_modules;
pub mod sockets;
pub mod sync;
#[allow(unsafe_code)] // The one place for system calls that no safe crate wraps.
pub mod sys;
pub mod threads;
pub mod walls;
