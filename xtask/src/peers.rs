//! `cargo xtask bench peers`: Koya's monitor beside others, one kernel and one initramfs for all, where
//! instructions are counted.

use crate::bench;
use crate::build::{self, Products};
use crate::rig::Archive;
use crate::{counting, setup};
use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// Where QEMU's firmware is, and what of it the microvm machine takes.
const FIRMWARE: &[&str] = &["/usr/share/qemu", "/usr/share/seabios"];
const FIRMWARE_FILES: &[&str] = &[
    "qboot.rom",
    "bios-microvm.bin",
    "pvh.bin",
    "linuxboot_dma.bin",
];

#[derive(Args)]
pub(crate) struct PeersArgs {
    /// A firecracker program to measure beside
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// A cloud-hypervisor program to measure beside
    #[arg(long, value_name = "PATH")]
    cloud_hypervisor: Option<PathBuf>,
    /// Write the rows, this machine and the programs' versions to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// `cargo xtask bench peers`
pub(crate) fn run(args: &PeersArgs) -> Result<()> {
    setup::ensure()?;
    build::ensure()?;
    let monitor = build::examples()?.join("boot");
    let mut programs = vec![
        ("boot", build::bench("peers")?),
        ("monitor", monitor),
        ("qemu-system-x86_64", QEMU.into()),
    ];
    let given = [
        ("firecracker", &args.firecracker),
        ("cloud-hypervisor", &args.cloud_hypervisor),
    ];
    for (name, path) in given {
        programs.extend(path.clone().map(|path| (name, path)));
    }
    let said = counting::run(files(&programs)?, "")?;
    let rows = counting::rows(&said)?;
    if let Some(file) = &args.json {
        let text = serde_json::to_string_pretty(&json!({
            "machine": machine(),
            "versions": versions(&programs[2..]),
            "rows": rows,
        }))?;
        bench::save(file, text + "\n")?;
    }
    Ok(())
}

fn files(programs: &[(&str, PathBuf)]) -> Result<Archive> {
    let mut files = Archive::default();
    for dir in [
        "share",
        "share/koya",
        "share/qemu",
        "lib",
        "lib64",
        "rootfs",
    ] {
        files.dir(dir)?;
    }
    files.file("config.json", 0o644, b"{}")?;
    files.file("bin/sh", 0o755, &fs::read("/bin/busybox")?)?;
    let kernel = Products::places().share.join("vmlinux");
    files.file("share/koya/vmlinux", 0o644, &fs::read(kernel)?)?;
    let mut guest = Archive::default();
    guest.file("init", 0o755, &fs::read(build::up()?)?)?;
    files.file("initramfs", 0o644, &guest.finish()?)?;
    for name in FIRMWARE_FILES {
        let places = FIRMWARE.iter().map(|dir| Path::new(dir).join(name));
        if let Some(path) = places.into_iter().find(|path| path.exists()) {
            files.file(&format!("share/qemu/{name}"), 0o644, &fs::read(path)?)?;
        }
    }
    counting::add_programs(&mut files, programs)?;
    Ok(files)
}

/// What the figures were taken on; where instructions are counted they are the same elsewhere.
fn machine() -> Value {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find(|line| line.starts_with("model name"));
    let model = model.and_then(|line| line.split_once(": "));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    json!({"cpu": model.map(|model| model.1), "kernel": kernel.trim()})
}

fn versions(programs: &[(&str, PathBuf)]) -> Value {
    let version = |path: &Path| {
        let output = Command::new(path).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Some(text.lines().next()?.to_owned())
    };
    let all = programs
        .iter()
        .map(|(name, path)| ((*name).to_owned(), json!(version(path))));
    Value::Object(all.collect())
}
