//! `cargo xtask bench boot`: a cold start, compared with its baseline, runc and crun.

use super::profile::Symbols;
use super::report::{self, Report};
use super::{PEERS, counting, guest_files, program};
use crate::arch::Arch;
use crate::archive::Archive;
use crate::build::{self, Products};
use crate::{kernel, proc, setup};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The recorded baseline of the cost of a start.
const BASELINE: &str = "benches/baseline/boot.json";
/// Prefix of the line with the diagram, as a JSON string.
const PICTURE: &str = "picture: ";

#[derive(Args)]
pub(super) struct BootArgs {
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
    /// Write the timeline of the last `koya run` to FILE as SVG
    #[arg(long, value_name = "FILE", conflicts_with = "trace")]
    svg: Option<PathBuf>,
    /// Make this run's figures the baseline (benches/baseline/boot.json)
    #[arg(long)]
    record: bool,
    #[command(flatten)]
    report: Report,
}

pub(super) fn run(args: &BootArgs) -> Result<()> {
    if (args.check || args.record) && !build::has_musl() {
        bail!(
            "the figures in {BASELINE} are those of programs built with musl, whose library is not \
             here: rustup target add {}",
            Arch::of_this_machine().musl()
        );
    }
    let files = boot_files(args.kernel.as_deref())?;
    if args.trace {
        print!("{}", counting::run(files, "trace", counting::ONE_GUEST)?);
        return Ok(());
    }
    if args.profile {
        let symbols = symbols(args.kernel.as_deref())?;
        counting::profile(files, "profile", &symbols)?.print(&symbols);
        return Ok(());
    }
    let said = counting::run(files, "", counting::ONE_GUEST)?;
    let (pictures, said): (Vec<&str>, Vec<&str>) =
        said.lines().partition(|line| line.starts_with(PICTURE));
    if let (Some(file), [picture, ..]) = (&args.svg, &*pictures) {
        let picture: String = serde_json::from_str(&picture[PICTURE.len()..])?;
        report::save(file, picture)?;
    }
    let rows = counting::rows(&said.join("\n"))?;
    args.report.save(&rows, &[])?;
    let baseline = proc::checkout().join(BASELINE);
    if let Some(share) = args.check.then_some(args.share) {
        let before = fs::read(&baseline).with_context(|| format!("no {BASELINE}"))?;
        report::compare(&serde_json::from_slice(&before)?, &rows, share)?;
    }
    if args.record {
        if let Some(directory) = baseline.parent() {
            fs::create_dir_all(directory)?;
        }
        report::save_json(&baseline, &rows)?;
        eprintln!("bench: {BASELINE} is written");
    }
    Ok(())
}

/// Files of the counted host for a start, with koya, runc and crun.
fn boot_files(kernel: Option<&Path>) -> Result<Archive> {
    setup::ensure()?;
    setup::ensure_these(PEERS)?;
    let program = program("boot")?;
    let products = Products::places();
    let mut files = guest_files(kernel)?;
    let programs = [
        ("boot", program),
        ("koya", products.bin.join("koya")),
        ("runc", "/usr/bin/runc".into()),
        ("crun", "/usr/bin/crun".into()),
    ];
    counting::add_programs(&mut files, &programs)?;
    Ok(files)
}

/// A kernel without symbols, as shipped.
pub(super) fn stripped(kernel: &Path) -> Result<PathBuf> {
    let directory = proc::checkout().join("target/koya");
    fs::create_dir_all(&directory)?;
    let image = directory.join("vmlinux-stripped");
    proc::run(
        Command::new("strip")
            .args(["-s", "-o"])
            .arg(&image)
            .arg(kernel),
    )?;
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
