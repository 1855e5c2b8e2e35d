//! The `koya` command.

use std::process::ExitCode;

/// musl's own gives memory back to the kernel, and asks for it again, with each buffer that comes and goes.
#[cfg(target_env = "musl")]
#[global_allocator]
static HEAP: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    koya_cli::main()
}
