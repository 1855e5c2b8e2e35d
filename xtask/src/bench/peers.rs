//! `cargo xtask bench peers`: Koya's monitor compared with others by counted instructions, with one kernel for all; and a
//! whole sandbox compared with others that run a distribution's kernel.

use super::report::Report;
use super::{counting, guest_files};
use crate::arch::{Arch, ArchArgs};
use crate::archive::Archive;
use crate::rig::{Host, RunDir};
use crate::setup;
use crate::{apt, build, cache};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

pub(super) const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// Directories of QEMU's firmware, and the files for the microvm machine.
const FIRMWARE: &[&str] = &["/usr/share/qemu", "/usr/share/seabios"];
const FIRMWARE_FILES: &[&str] = &[
    "qboot.rom",
    "bios-microvm.bin",
    "pvh.bin",
    "linuxboot_dma.bin",
];

#[derive(Args)]
pub(super) struct PeersArgs {
    #[command(flatten)]
    arch: ArchArgs,
    /// Measure this firecracker program as well
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// Measure this cloud-hypervisor program as well
    #[arg(long, value_name = "PATH")]
    cloud_hypervisor: Option<PathBuf>,
    /// Measure another monitor as well, which prints its guest's serial port: its command line, with the placeholders
    /// {kernel} (an ELF file), {initramfs} and {cmdline}
    #[arg(long, value_name = "NAME=COMMAND", value_parser = other)]
    monitor: Vec<(String, String)>,
    /// Fail if a goal is missed: at most 0.6 of the exits of Firecracker with Koya's kernel, for the monitor with
    /// that kernel, and for a whole sandbox
    #[arg(long, requires = "firecracker")]
    check: bool,
    /// Instead of figures, list the exits of each monitor's guest up to user space, by reason
    #[arg(long, conflicts_with_all = ["check", "json"])]
    exits: bool,
    /// Boot another build of Koya's kernel in all monitors: an ELF image; each guest has one second of the counted clock
    #[arg(long, value_name = "FILE", conflicts_with_all = ["check", "json"])]
    kernel: Option<PathBuf>,
    #[command(flatten)]
    report: Report,
}

/// `cargo xtask bench peers`
pub(super) fn run(args: &PeersArgs) -> Result<()> {
    setup::ensure()?;
    let arch = args.arch.arch();
    build::ensure_for(arch)?;
    let monitor = build::example(arch, "boot")?;
    let qemu = format!("qemu-system-{}", arch.name());
    let mut programs = vec![
        ("boot".to_owned(), build::bench(arch, "peers")?),
        ("sandbox".to_owned(), build::bench(arch, "boot")?),
        ("monitor".to_owned(), monitor),
        (qemu.clone(), qemu_for(arch)?.join(&qemu)),
    ];
    let given = [
        ("firecracker", &args.firecracker),
        ("cloud-hypervisor", &args.cloud_hypervisor),
    ];
    for (name, path) in given {
        programs.extend(path.clone().map(|path| (name.to_owned(), path)));
    }
    let mut others: Vec<(&String, String)> = Vec::new();
    for (name, command) in &args.monitor {
        if others.iter().any(|(other, _)| *other == name) {
            bail!("two monitors are called {name}");
        }
        let (program, words) = command.split_once(' ').unwrap_or((command, ""));
        let program = PathBuf::from(program);
        // A name that collides with none of the bench's own.
        let own = format!("monitor-{}", others.len());
        others.push((name, format!("/bin/{own} {words}")));
        programs.push((own, program));
    }
    let mut files = files(arch, &programs, args)?;
    files.file("monitors.json", 0o644, &serde_json::to_vec(&others)?)?;
    if args.exits {
        print!(
            "{}",
            counting::run(arch, files, "exits", counting::ONE_GUEST)?
        );
        return Ok(());
    }
    let said = counting::run(arch, files, "", counting::ONE_GUEST)?;
    let rows = counting::rows(&said)?;
    args.report.finish(&rows, &programs[3..], args.check)
}

/// The directory of Debian's QEMU for hosts of this architecture.
fn qemu_for(arch: Arch) -> Result<PathBuf> {
    let package = match arch {
        _ if arch.is_native() => return Ok("/usr/bin".into()),
        Arch::X86_64 => "qemu-system-x86",
        Arch::Aarch64 => "qemu-system-arm",
    };
    let key = cache::key([apt::RELEASE, arch.debian(), package]);
    let root = cache::ensure("peers", &key, |dir| {
        apt::unpack_root(arch, apt::RELEASE, &[package], dir)
    })?;
    Ok(root.join("usr/bin"))
}

/// Names of columns that exist without `--monitor`.
const KNOWN: &[&str] = &["", "goal", "Firecracker", "QEMU", "Cloud Hypervisor"];

/// `NAME=COMMAND`
fn other(text: &str) -> Result<(String, String), String> {
    let (name, command) = text.split_once('=').ok_or("say NAME=COMMAND")?;
    if KNOWN.contains(&name) {
        return Err(format!("{name} has a column already"));
    }
    Ok((name.to_owned(), command.to_owned()))
}

fn files(arch: Arch, programs: &[(String, PathBuf)], args: &PeersArgs) -> Result<Archive> {
    let mut files = guest_files(arch, args.kernel.as_deref())?;
    let mut guest = Archive::default();
    guest.file("init", 0o755, &fs::read(build::up(arch)?)?)?;
    files.file("initramfs", 0o644, &guest.finish()?)?;
    if !args.exits && arch == Arch::X86_64 {
        let stock = Host::ensure_for(arch)?.dir.join("vmlinuz");
        let stock = fs::read(stock).context("cannot read Debian's kernel")?;
        files.dir("stock")?;
        files.file("stock/vmlinux", 0o644, &elf_of(&stock)?)?;
    }
    add_firmware(&mut files)?;
    counting::add_programs(arch, &mut files, programs)?;
    Ok(files)
}

/// Adds the firmware of QEMU's microvm machine at the path used by the benches.
pub(super) fn add_firmware(files: &mut Archive) -> Result<()> {
    files.dir("share/qemu")?;
    for name in FIRMWARE_FILES {
        let places = FIRMWARE.iter().map(|dir| Path::new(dir).join(name));
        if let Some(path) = places.into_iter().find(|path| path.exists()) {
            files.file(&format!("share/qemu/{name}"), 0o644, &fs::read(path)?)?;
        }
    }
    Ok(())
}

/// The ELF kernel in a bzImage, for monitors that do not unpack it (Documentation/arch/x86/boot.rst).
fn elf_of(image: &[u8]) -> Result<Vec<u8>> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    let payload = || {
        let sectors = usize::from(*image.get(0x1f1)?);
        let start = (sectors + 1) * 512 + word(0x248)?;
        // The last four bytes are the size of the kernel.
        image.get(start..start + word(0x24c)?.checked_sub(4)?)
    };
    let payload = payload().context("Debian's kernel is no bzImage")?;
    let unpack = match payload {
        [0xfd, b'7', b'z', ..] => "xz",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        _ => bail!("Debian's kernel is compressed with neither xz nor zstd"),
    };
    let run = RunDir::create()?;
    let packed = run.path("kernel");
    fs::write(&packed, payload)?;
    let output = Command::new(unpack)
        .arg("-dc")
        .stdin(File::open(packed)?)
        .output()
        .with_context(|| format!("cannot start {unpack}"))?;
    if !output.status.success() {
        bail!("{unpack}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(output.stdout)
}
