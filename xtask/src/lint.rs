//! Formatting, clippy with warnings denied, and the aarch64 build's check.

use crate::{proc, setup};
use anyhow::Result;
use std::process::Command;

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
    if !setup::rust_target(target, "a check of its build") {
        eprintln!("lint: NOT CHECKED: {target} can't be had (rustup target add {target})");
        return Ok(());
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
