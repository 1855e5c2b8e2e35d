//! The `koya` command.

use std::process::ExitCode;

/// musl's allocator returns memory to the kernel, and requests it again, for each buffer.
#[cfg(target_env = "musl")]
#[global_allocator]
static HEAP: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    koya_cli::main()
}
