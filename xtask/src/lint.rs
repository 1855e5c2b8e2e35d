//! Formatting, dependencies, clippy and the documentation of the library crates with warnings denied, the contents of the
//! published packages, and clippy for aarch64.

use crate::{dependencies, proc, setup};
use anyhow::Result;

/// The library crates for embedders.
const LIBRARIES: [&str; 8] = [
    "koya-host",
    "koya-devices",
    "koya-vmm",
    "koya-protocol",
    "koya-rootfs",
    "koya-image",
    "koya",
    "koya-tasks",
];

/// `cargo xtask lint`
pub(crate) fn run() -> Result<()> {
    eprintln!("lint: formatting");
    proc::run(proc::cargo().args(["fmt", "--all", "--check"]))?;
    eprintln!("lint: licences, sources and versions of dependencies");
    dependencies::check()?;
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
    let packages = LIBRARIES.map(|name| ["--package", name]);
    let mut doc = proc::cargo();
    doc.args(["doc", "--no-deps"]).args(packages.as_flattened());
    proc::run(doc.env("RUSTDOCFLAGS", "-D warnings"))?;
    eprintln!("lint: packages of the libraries");
    // Without the build from the archives, which takes as long as everything else.
    let mut package = proc::cargo();
    package.args(["package", "--quiet", "--no-verify", "--allow-dirty"]);
    proc::run(package.args(packages.as_flattened()))?;
    // Without the target's standard library this check is impossible, which is reported.
    let target = "aarch64-unknown-linux-gnu";
    if !setup::rust_target(target, "a check of its build") {
        eprintln!("lint: NOT CHECKED: {target} can't be had (rustup target add {target})");
        return Ok(());
    }
    eprintln!("lint: clippy for {target}");
    proc::run(proc::cargo().args([
        "clippy",
        "--target",
        target,
        "--package",
        "koya-vmm",
        "--package",
        "koya-cli",
        "--",
        "-D",
        "warnings",
    ]))
}
