//! The `koya` command: thin front ends over the `koya` library.
//!
//! Exit statuses: that of the container's program for `run` and `exec`; 125 if Koya itself could
//! not do it, 126 and 127 if the program can't be run or found, as with other container tools.

mod cli;

use std::process::ExitCode;

/// musl's own gives memory back to the kernel, and asks for it again, with each buffer that comes and goes.
#[cfg(target_env = "musl")]
#[global_allocator]
static HEAP: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    koya::share_heap();
    cli::main()
}
