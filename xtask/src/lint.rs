//! Formatting, clippy and the documentation of what others embed with warnings denied, and the aarch64 build's
//! check.

use crate::{proc, setup};
use anyhow::Result;

/// `cargo xtask lint`
pub(crate) fn run() -> Result<()> {
    eprintln!("lint: formatting");
    proc::run(proc::cargo().args(["fmt", "--all", "--check"]))?;
    eprintln!("lint: clippy");
    proc::run(proc::cargo().args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))?;
    eprintln!("lint: documentation");
    let packages = ["koya-host", "koya-devices", "koya-vmm"].map(|name| ["--package", name]);
    let mut doc = proc::cargo();
    doc.args(["doc", "--no-deps"]).args(packages.as_flattened());
    proc::run(doc.env("RUSTDOCFLAGS", "-D warnings"))?;
    // Without the target's standard library nothing can be checked: said, not hidden.
    let target = "aarch64-unknown-linux-gnu";
    if !setup::rust_target(target, "a check of its build") {
        eprintln!("lint: NOT CHECKED: {target} can't be had (rustup target add {target})");
        return Ok(());
    }
    eprintln!("lint: checking the {target} build");
    proc::run(proc::cargo().args([
        "check",
        "--target",
        target,
        "--package",
        "koya-vmm",
        "--package",
        "koya-cli",
    ]))
}
