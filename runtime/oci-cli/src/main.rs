//! The `koya-runtime` command.

use std::process::ExitCode;

/// As the `koya` command's.
#[cfg(target_env = "musl")]
#[global_allocator]
static HEAP: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    koya_oci::main()
}
