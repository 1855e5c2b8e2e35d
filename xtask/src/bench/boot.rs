//! `cargo xtask bench boot`: a cold start, compared with its baseline, runc and crun.

use super::profile::Symbols;
use super::report::{self, Report};
use super::{PEERS, STRACE, counting, guest_files, program};
use crate::arch::{Arch, ArchArgs};
use crate::archive::Archive;
use crate::build::{self, Products};
use crate::{kernel, proc, rig, setup};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The recorded baseline of the cost of a start.
fn baseline(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "benches/baseline/boot.json",
        Arch::Aarch64 => "benches/baseline/boot-aarch64.json",
    }
}
/// Prefix of the line with the diagram, as a JSON string.
const PICTURE: &str = "picture: ";

#[derive(Args)]
pub(super) struct BootArgs {
    #[command(flatten)]
    arch: ArchArgs,
    /// Fail if Koya's figures are worse than the baseline
    #[arg(long)]
    check: bool,
    /// Tolerance of --check, in per cent
    #[arg(long, default_value_t = 2.0, value_name = "PERCENT")]
    share: f64,
    /// Instead of figures, list the guest kernel's initcalls by cost
    #[arg(long, conflicts_with_all = ["check", "record", "json"])]
    trace: bool,
    /// Instead of figures, profile a start by functions of the guest kernel
    #[arg(long, conflicts_with_all = ["check", "record", "json", "trace"])]
    profile: bool,
    /// Boot another guest kernel: an ELF image; for --profile with symbols or a System.map beside it
    #[arg(long, value_name = "FILE", conflicts_with = "record")]
    kernel: Option<PathBuf>,
    /// Also measure a run with threads that are not confined (koya run --no-seccomp); with --check,
    /// fail if confinement adds more than 5 % or 2 million instructions
    #[arg(long, conflicts_with_all = ["record", "trace", "profile"])]
    unconfined: bool,
    /// Write the timeline of the last `koya run` to FILE as SVG
    #[arg(long, value_name = "FILE", conflicts_with = "trace")]
    svg: Option<PathBuf>,
    /// Make this run's figures the baseline (benches/baseline/boot.json, boot-aarch64.json)
    #[arg(long)]
    record: bool,
    #[command(flatten)]
    report: Report,
}

pub(super) fn run(args: &BootArgs) -> Result<()> {
    let arch = args.arch.arch();
    let file = baseline(arch);
    if (args.check || args.record) && !build::has_musl(arch) {
        bail!(
            "the figures in {file} are those of programs built with musl, whose library is not \
             here: rustup target add {}",
            arch.musl()
        );
    }
    if args.profile && !arch.is_native() {
        bail!("--profile knows the instructions of this machine's architecture only");
    }
    if args.unconfined && !arch.is_native() {
        bail!("--unconfined counts system calls with this machine's strace");
    }
    let files = boot_files(arch, args)?;
    if args.trace {
        let said = counting::run(arch, files, "trace", counting::ONE_GUEST)?;
        print!("{said}");
        return Ok(());
    }
    if args.profile {
        let symbols = symbols(args.kernel.as_deref())?;
        counting::profile(files, "profile", &symbols)?.print(&symbols);
        return Ok(());
    }
    let words = if args.unconfined { "unconfined" } else { "" };
    let said = counting::run(arch, files, words, counting::ONE_GUEST)?;
    let (pictures, said): (Vec<&str>, Vec<&str>) =
        said.lines().partition(|line| line.starts_with(PICTURE));
    if let (Some(file), [picture, ..]) = (&args.svg, &*pictures) {
        let picture: String = serde_json::from_str(&picture[PICTURE.len()..])?;
        report::save(file, picture)?;
    }
    let rows = counting::rows(&said.join("\n"))?;
    args.report
        .finish(&rows, &[], args.check && args.unconfined)?;
    let path = proc::checkout().join(file);
    if let Some(share) = args.check.then_some(args.share) {
        let before = fs::read(&path).with_context(|| format!("no {file}"))?;
        report::compare(&serde_json::from_slice(&before)?, &rows, share)?;
    }
    if args.record {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        report::save_json(&path, &rows)?;
        eprintln!("bench: {file} is written");
    }
    Ok(())
}

/// Files of the counted host for a start, with koya, runc and crun.
fn boot_files(arch: Arch, args: &BootArgs) -> Result<Archive> {
    setup::ensure()?;
    let peers = match arch.is_native() {
        true => {
            setup::ensure_these(PEERS)?;
            PathBuf::from("/")
        }
        false => rig::programs(arch)?,
    };
    let program = program(arch, "boot")?;
    let products = Products::places_of(arch);
    let mut files = guest_files(arch, args.kernel.as_deref())?;
    let mut programs = vec![
        ("boot", program),
        ("koya", products.bin.join("koya")),
        ("runc", peers.join("usr/bin/runc")),
        ("crun", peers.join("usr/bin/crun")),
    ];
    if args.unconfined {
        setup::ensure_these(&[STRACE])?;
        programs.push(("strace", "/usr/bin/strace".into()));
    }
    counting::add_programs(arch, &mut files, &programs)?;
    Ok(files)
}

/// A kernel without symbols, as shipped.
pub(super) fn stripped(arch: Arch, kernel: &Path) -> Result<PathBuf> {
    if arch == Arch::Aarch64 {
        // An Image has none.
        return Ok(kernel.into());
    }
    let directory = arch.target("koya");
    fs::create_dir_all(&directory)?;
    let image = directory.join("vmlinux-stripped");
    let mut strip = arch.tool("strip");
    proc::run(strip.args(["-s", "-o"]).arg(&image).arg(kernel))?;
    Ok(image)
}

/// Symbols of a kernel: the project's, or another one with symbols in the file or in a System.map beside it.
fn symbols(kernel: Option<&Path>) -> Result<Symbols> {
    let Some(kernel) = kernel else {
        return Ok(Symbols::parse(&fs::read_to_string(
            kernel::ensure(Arch::of_this_machine())?.symbols,
        )?));
    };
    let beside = kernel.with_file_name("System.map");
    let text = match beside.exists() {
        true => fs::read_to_string(beside)?,
        false => proc::output(Command::new("nm").arg(kernel))?,
    };
    if text.trim().is_empty() {
        let kernel = kernel.display();
        bail!("{kernel} has no symbols, and there is no System.map beside it");
    }
    Ok(Symbols::parse(&text))
}
