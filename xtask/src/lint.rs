//! Formatting, clippy with warnings denied, and the aarch64 build's check.

use crate::proc;
use anyhow::Result;
use std::process::{Command, Stdio};

/// `cargo xtask lint`
pub(crate) fn run() -> Result<()> {
    let root = proc::checkout();
    let cargo = || {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(&root);
        cargo
    };
    eprintln!("lint: formatting");
    proc::run(cargo().args(["fmt", "--all", "--check"]))?;
    eprintln!("lint: clippy");
    proc::run(cargo().args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))?;
    Ok(())
}

/// Whether the Rust standard library for `target` is installed.
pub(crate) fn has_target(target: &str) -> bool {
    Command::new("rustc")
        .args(["--print", "target-libdir", "--target", target])
        .stderr(Stdio::null())
        .output()
        .is_ok_and(|out| std::path::Path::new(String::from_utf8_lossy(&out.stdout).trim()).is_dir())
}
