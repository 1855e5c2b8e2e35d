//! `cargo xtask test`: every test there is, cheapest first.

use crate::{build, lint, proc};
use anyhow::Result;
use clap::Args;
use std::process::Command;

#[derive(Args)]
pub(crate) struct TestArgs {
    /// Only the tests that need no Linux guest
    #[arg(long)]
    quick: bool,
    /// Only tests whose name contains this
    filter: Option<String>,
}

/// Lints, unit tests and tiny guests, then Linux guests in the rig.
pub(crate) fn run(args: &TestArgs) -> Result<()> {
    let root = proc::checkout();
    let products = build::ensure()?;
    if args.filter.is_none() {
        lint::run()?;
    }
    let cargo = || {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(&root).envs(products.env());
        cargo
    };
    eprintln!("test: units and tiny guests on this machine");
    let mut units = cargo();
    units.args(["test", "--workspace", "--exclude", "koya-tests"]);
    if let Some(filter) = &args.filter {
        units.args(["--", filter]);
    }
    proc::run(&mut units)?;
    if args.quick {
        eprintln!("test: --quick: Linux guests were not run");
        return Ok(());
    }
    eprintln!("test: Linux guests");
    proc::run(cargo().args([
        "build",
        "--package",
        "koya-vmm",
        "--package",
        "koya",
        "--examples",
    ]))?;
    let mut system = cargo();
    system.args(["test", "--package", "koya-tests"]);
    if let Some(filter) = &args.filter {
        system.args(["--", filter]);
    }
    proc::run(&mut system)
}
