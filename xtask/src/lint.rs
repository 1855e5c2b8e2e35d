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
    // Without the target's standard library nothing can be checked: said, not hidden.
    let target = "aarch64-unknown-linux-gnu";
    if !has_target(target) {
        eprintln!("lint: getting {target} for a check of its build");
        let got = Command::new("timeout")
            .args(["120", "rustup", "target", "add", target])
            .status();
        if !got.is_ok_and(|status| status.success()) {
            eprintln!("lint: NOT CHECKED: {target} can't be had (rustup target add {target})");
            return Ok(());
        }
    }
    eprintln!("lint: checking the {target} build");
    proc::run(cargo().args([
        "check",
        "--target",
        target,
        "--package",
        "koya-vmm",
        "--package",
        "koya",
    ]))
}

/// Whether the Rust standard library for `target` is installed.
pub(crate) fn has_target(target: &str) -> bool {
    Command::new("rustc")
        .args(["--print", "target-libdir", "--target", target])
        .stderr(Stdio::null())
        .output()
        .is_ok_and(|out| std::path::Path::new(String::from_utf8_lossy(&out.stdout).trim()).is_dir())
}
