//! The `koya` command: thin front ends over the `koya` library.
//!
//! Exit statuses: that of the container's program for `run` and `exec`; 125 if Koya itself could
//! not do it, 126 and 127 if the program can't be run or found, as with other container tools.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    koya::share_heap();
    cli::main()
}
