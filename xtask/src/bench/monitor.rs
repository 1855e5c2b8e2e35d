//! `cargo xtask bench monitor`: cost of a start of the monitor, compared with its peers.

use super::peers::{self, QEMU};
use super::report::Report;
use super::{STRACE, counting, guest_files};
use crate::arch::Arch;
use crate::{build, setup};
use anyhow::{Result, bail};
use clap::Args;
use std::path::PathBuf;
use std::process::{Command, Stdio};

const PACKAGES: &[(&str, &str)] = &[STRACE, ("time", "the benches' peaks of memory")];

#[derive(Args)]
pub(super) struct MonitorArgs {
    /// Number of starts of each kind, alternating; each figure is a median
    #[arg(long, default_value_t = 100)]
    rounds: u32,
    #[command(flatten)]
    report: Report,
    /// Measure this firecracker program as well
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// Measure Debian's QEMU as well, as a microvm machine
    #[arg(long)]
    qemu: bool,
    /// Measure on the instruction-counting emulated host instead of this machine's KVM
    #[arg(long)]
    counted: bool,
    /// Fail if a goal for the given peers is missed: CPU time at most 0.7 of Firecracker's, each
    /// without and with its seccomp filters, and 0.06 of QEMU's, and 110 system calls before the guest
    #[arg(long)]
    check: bool,
}

/// `cargo xtask bench monitor`
pub(super) fn run(args: &MonitorArgs) -> Result<()> {
    setup::ensure()?;
    setup::ensure_these(PACKAGES)?;
    let said = match args.counted {
        true => counted(args)?,
        false => here(args)?,
    };
    let rows = counting::rows(&said)?;
    let qemu = args.qemu.then(|| ("qemu".to_owned(), QEMU.into()));
    let firecracker = args.firecracker.clone();
    let firecracker = firecracker.map(|path| ("firecracker".to_owned(), path));
    let peers: Vec<_> = qemu.into_iter().chain(firecracker).collect();
    args.report.finish(&rows, &peers, args.check)
}

/// Measures on this machine; returns the output of the bench.
fn here(args: &MonitorArgs) -> Result<String> {
    let arch = Arch::of_this_machine();
    let examples = build::examples()?;
    let mut bench = Command::new(build::bench(arch, "monitor")?);
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
    Ok(String::from_utf8(out.stdout)?)
}

/// Number of rounds when all of them are identical.
const COUNTED_ROUNDS: u32 = 3;
/// Tools added for the counted host.
const TOOLS: [(&str, &str); 2] = [("strace", "/usr/bin/strace"), ("time", "/usr/bin/time")];
/// Directory of the examples in that host: not that of the bench, which has the same name as one of them.
const EXAMPLES: &str = "examples";

/// Measures in an emulated host; returns the output of the bench.
fn counted(args: &MonitorArgs) -> Result<String> {
    build::ensure()?;
    let arch = Arch::of_this_machine();
    let examples = build::examples()?;
    let mut files = guest_files(arch, None)?;
    files.dir(&format!("bin/{EXAMPLES}"))?;
    let of_examples = |name| (format!("{EXAMPLES}/{name}"), examples.join(name));
    let mut programs = vec![
        ("boot".to_owned(), build::bench(arch, "monitor")?),
        of_examples("boot"),
        of_examples("floor"),
    ];
    programs.extend(TOOLS.map(|(name, path)| (name.to_owned(), path.into())));
    let mut words = format!("{COUNTED_ROUNDS} /bin/{EXAMPLES} --small-pages");
    if args.qemu {
        peers::add_firmware(&mut files)?;
        programs.push(("qemu".to_owned(), QEMU.into()));
        words += " --qemu /bin/qemu";
    }
    if let Some(path) = &args.firecracker {
        programs.push(("firecracker".to_owned(), path.clone()));
        words += " --firecracker /bin/firecracker";
    }
    counting::add_programs(arch, &mut files, &programs)?;
    counting::run(arch, files, &words, counting::ONE_GUEST)
}
