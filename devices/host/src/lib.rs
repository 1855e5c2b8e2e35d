//! What Koya's libraries need of their host and what is no device's.
//!
//! | module | what |
//! |---|---|
//! | [`process`] | what a program sets up at its start |
//! | [`threads`] | how each thread is started, by its [role](threads::Role) |
//! | [`sync`] | locks |
//! | [`sys`] | signals, the heap, connections that are steered by BPF |
//!
//! A process is divided by its threads: what a thread may do is a matter of its role, which is fixed when it
//! starts and known by name. `unsafe` stands in [`sys`] alone.

pub mod process;
pub mod sync;
#[allow(unsafe_code)] // The one place for system calls that no safe crate wraps.
pub mod sys;
pub mod threads;
