//! The `koya-runtime` command.

use std::process::ExitCode;

/// As in the `koya` command.
#[cfg(target_env = "musl")]
#[global_allocator]
static HEAP: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    koya_oci::main()
}
