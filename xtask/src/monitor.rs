//! `cargo xtask bench monitor`: what a start of the monitor costs beside its peers'.

use crate::{bench, build, setup};
use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Stdio};

const PACKAGES: &[(&str, &str)] = &[
    ("strace", "the benches' counts of system calls"),
    ("time", "the benches' peaks of memory"),
];
const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// A row of the table, the peer in it (none: Koya itself), and what Koya's figure may be at most: a share
/// of the peer's, or a number.
const GOALS: &[(&str, Option<&str>, f64)] = &[
    (CPU, Some("Firecracker without seccomp"), 0.7),
    (CPU, Some("QEMU"), 0.06),
    ("monitor start: system calls before the guest", None, 110.0),
];
const CPU: &str = "monitor start: exec to exit, CPU";

#[derive(Args)]
pub(crate) struct MonitorArgs {
    /// Starts of each kind, in turns; each figure is a median
    #[arg(long, default_value_t = 20)]
    rounds: u32,
    /// Also write the rows to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// A firecracker program to measure beside
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// Measure Debian's QEMU beside, as a microvm machine
    #[arg(long)]
    qemu: bool,
    /// Fail if a goal for the peers that are there is not met: CPU time at most 0.7 of Firecracker's
    /// without seccomp and 0.06 of QEMU's, and 110 system calls before the guest
    #[arg(long)]
    check: bool,
}

/// `cargo xtask bench monitor`
pub(crate) fn run(args: &MonitorArgs) -> Result<()> {
    setup::ensure()?;
    setup::ensure_these(PACKAGES)?;
    let examples = build::examples()?;
    let mut bench = Command::new(build::bench("monitor")?);
    bench.arg(args.rounds.to_string()).arg(examples);
    if args.qemu {
        bench.args(["--qemu", QEMU]);
    }
    if let Some(path) = &args.firecracker {
        bench.arg("--firecracker").arg(path);
    }
    let out = bench.stdout(Stdio::piped()).spawn()?.wait_with_output()?;
    if !out.status.success() {
        bail!("the measurement failed ({})", out.status);
    }
    if let Some(file) = &args.json {
        bench::save(file, &out.stdout)?;
    }
    match args.check {
        true => check(&serde_json::from_slice(&out.stdout)?),
        false => Ok(()),
    }
}

fn check(rows: &Value) -> Result<()> {
    let rows = rows.as_array().context("no rows")?;
    let mut missed = Vec::new();
    for (name, peer, most) in GOALS {
        let row = rows.iter().find(|row| row["name"] == *name);
        let row = row.with_context(|| format!("no row {name:?}"))?;
        let koya = row["koya"].as_f64().context("no figure")?;
        let (value, what) = match peer {
            None => (koya, String::new()),
            Some(peer) => match row["peers"][peer].as_f64() {
                Some(theirs) => (koya / theirs, format!(" of {peer}'s")),
                None => continue,
            },
        };
        let text = format!("{name}: {value:.3}{what}, wanted at most {most}");
        eprintln!("bench: {text}");
        if value > *most {
            missed.push(text);
        }
    }
    match missed.is_empty() {
        true => Ok(()),
        false => bail!("not met:\n{}", missed.join("\n")),
    }
}
