//! `cargo xtask bench`: Koya compared with others, measured on hosts with KVM.

mod boot;
mod counting;
mod criterion;
mod monitor;
mod peers;
mod profile;
mod report;
mod tools;

use crate::arch::{Arch, ArchArgs};
use crate::archive::Archive;
use crate::build::{self, Products};
use crate::{dockers, rig, setup, suite};
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use report::Report;
use serde_json::Value;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Packages for benches, in addition to those for builds and tests.
const PACKAGES: &[(&str, &str)] = &[
    ("fio", "the benches' disk load"),
    ("iperf3", "the benches' network load"),
    STRACE,
];
const STRACE: (&str, &str) = ("strace", "the benches' counts of system calls");
const PEERS: &[(&str, &str)] = &[("runc", "the peers' start"), ("crun", "the peers' start")];

/// Configuration for runc and crun: one process with the defaults of `koya run`, including the seccomp filter.
const OCI_CONFIG: &str = include_str!("../../../benches/guest/config.json");

#[derive(Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Measure disks, networks, files, vsock and memory, compared with QEMU's microvm machine with the same kernel
    /// and guest
    Devices {
        /// Run only benchmarks whose name contains TEXT: disk, network, files, vsock, memory
        #[arg(long, value_name = "TEXT")]
        only: Option<String>,
        /// Number of guests of each kind; each figure is a median
        #[arg(long, default_value_t = 3)]
        rounds: u32,
        /// Compare with Koya's own devices on unconfined threads, instead of QEMU's devices
        #[arg(long)]
        unconfined: bool,
        #[command(flatten)]
        report: Report,
    },
    /// Measure a cold start on the instruction-counting host: identical on every run and every machine
    Boot(boot::BootArgs),
    /// Measure a start of the monitor, exec to exit, with a guest that resets at once, on this machine's
    /// /dev/kvm; compared with an empty program and bare KVM calls
    Monitor(monitor::MonitorArgs),
    /// Measure the host memory of the monitor and of whole sandboxes beyond that of the guest, by kind
    Memory {
        #[command(flatten)]
        arch: ArchArgs,
        /// Fail if a figure misses its goal
        #[arg(long)]
        check: bool,
        #[command(flatten)]
        report: Report,
    },
    /// Measure the cost to create a sandbox, and its memory, with many running at once
    Many {
        #[command(flatten)]
        arch: ArchArgs,
        /// Numbers of sandboxes running at once
        #[arg(long, default_value = "1,10,50", value_name = "N,N")]
        counts: String,
        /// Fail if one of many costs more than 1.1 times as much as with the first number
        #[arg(long)]
        check: bool,
        #[command(flatten)]
        report: Report,
    },
    /// Run the criterion benchmarks of code inside the process: queues, devices, exits, start and teardown
    Criterion {
        /// Take fewer samples, for a rough estimate
        #[arg(long)]
        quick: bool,
        #[command(flatten)]
        report: Report,
    },
    /// Compare Koya's monitor with QEMU's microvm and others, with one kernel for all, on the instruction-counting host:
    /// exec to the guest's user space, system calls, exits, memory; and a whole sandbox with the others running
    /// Debian's kernel
    Peers(peers::PeersArgs),
    /// Measure a container under Koya, runc and crun by their own command lines, ctr, podman and docker
    Containers {
        /// Number of containers of each kind; each figure is a median
        #[arg(long, default_value_t = 7)]
        rounds: u32,
        #[command(flatten)]
        report: Report,
    },
}

/// `cargo xtask bench`
pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    match &args.what {
        What::Devices {
            only,
            rounds,
            unconfined,
            report,
        } => report.save(&devices(*rounds, *unconfined, only.as_deref())?, &[]),
        What::Boot(args) => boot::run(args),
        What::Memory {
            arch,
            check,
            report,
        } => report.finish(&memory(arch.arch())?, &[], *check),
        What::Many {
            arch,
            counts,
            check,
            report,
        } => report.finish(&many(arch.arch(), counts)?, &[], *check),
        What::Criterion { quick, report } => report.save(&criterion::run(*quick)?, &[]),
        What::Peers(args) => peers::run(args),
        What::Monitor(args) => monitor::run(args),
        What::Containers { rounds, report } => report.save(&containers(*rounds)?, &[]),
    }
}

fn devices(rounds: u32, unconfined: bool, only: Option<&str>) -> Result<Value> {
    setup::ensure()?;
    setup::ensure_these(PACKAGES)?;
    let program = program(Arch::of_this_machine(), "devices")?;
    let tools = tools::tools()?;
    let rounds = rounds.to_string();
    // The network of the host is not changed.
    let mut command: Vec<&OsStr> = vec!["unshare".as_ref(), "--net".as_ref()];
    let peer = if unconfined { "unconfined" } else { "qemu" };
    command.extend([program.as_ref(), rounds.as_ref(), tools.as_os_str()]);
    command.push(peer.as_ref());
    command.extend(only.map(OsStr::new));
    in_rig(Arch::of_this_machine(), &command)
}

fn containers(rounds: u32) -> Result<Value> {
    setup::ensure()?;
    setup::ensure_these(PEERS)?;
    let program = program(Arch::of_this_machine(), "containers")?;
    let containerd = suite::containerd(suite::CONTAINERD_SUITES[0])?;
    let docker = dockers::first()?;
    let rounds = rounds.to_string();
    let command: [&OsStr; 4] = [
        program.as_ref(),
        rounds.as_ref(),
        containerd.as_ref(),
        docker.as_ref(),
    ];
    in_rig(Arch::of_this_machine(), &command)
}

fn memory(arch: Arch) -> Result<Value> {
    let monitor = build::example(arch, "boot")?;
    let examples = monitor.parent().context("an example has a directory")?;
    let program = program(arch, "memory")?;
    let command: [&OsStr; 3] = [program.as_ref(), "held".as_ref(), examples.as_ref()];
    in_rig(arch, &command)
}

fn many(arch: Arch, counts: &str) -> Result<Value> {
    setup::ensure()?;
    let program = program(arch, "memory")?;
    let mut files = guest_files(arch, None)?;
    // For the sandboxes' networks.
    files.file("more-modules", 0o644, b"tun.ko\n")?;
    counting::add_programs(arch, &mut files, &[("boot", program)])?;
    let words = format!("many {counts}");
    let said = counting::run(arch, files, &words, counting::MANY_GUESTS)?;
    counting::rows(&said)
}

/// Files of the counted host for any guest: kernel and initramfs, a root file system, a shell.
fn guest_files(arch: Arch, kernel: Option<&Path>) -> Result<Archive> {
    let products = Products::places_of(arch);
    let mut files = Archive::default();
    for dir in [
        "share",
        "share/koya",
        "rootfs",
        "rootfs/bin",
        "lib",
        "lib64",
    ] {
        files.dir(dir)?;
    }
    for dir in ["proc", "sys", "dev", "tmp", "run", "etc"] {
        files.dir(&format!("rootfs/{dir}"))?;
    }
    let busybox = fs::read(rig::busybox(arch)?).context("busybox-static is not installed")?;
    for name in ["sh", "echo"] {
        files.file(&format!("rootfs/bin/{name}"), 0o755, &busybox)?;
    }
    files.file("bin/sh", 0o755, &busybox)?;
    for name in ["vmlinux", "initramfs"] {
        let path = match kernel.filter(|_| name == "vmlinux") {
            Some(kernel) => boot::stripped(arch, kernel)?,
            None => products.share.join(name),
        };
        files.file(&format!("share/koya/{name}"), 0o644, &fs::read(path)?)?;
    }
    files.file("config.json", 0o644, oci_config(arch).as_bytes())?;
    Ok(files)
}

/// The configuration for runc and crun, with the system call tables of an architecture.
fn oci_config(arch: Arch) -> String {
    match arch {
        Arch::X86_64 => OCI_CONFIG.to_owned(),
        Arch::Aarch64 => OCI_CONFIG
            .replace("SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64")
            .replace("SCMP_ARCH_X86", "SCMP_ARCH_ARM")
            .replace("SCMP_ARCH_X32", "SCMP_ARCH_ARM"),
    }
}

/// Builds a program of the benches, and the programs that it measures.
fn program(arch: Arch, name: &str) -> Result<PathBuf> {
    build::ensure_for(arch)?;
    build::bench(arch, name)
}

/// Runs a measurement on a host with KVM. Rows are printed on standard output, everything else on standard error.
fn in_rig(arch: Arch, command: &[&OsStr]) -> Result<Value> {
    let mut rig = Command::new(std::env::current_exe()?);
    // One CPU: with several, the emulation may crash a host that runs virtual machines.
    rig.args(["rig", "--no-build", "--cpus", "1", "--memory", "8192"])
        .args(["--timeout", "14400", "--arch", arch.name(), "--"])
        .args(command)
        .envs(Products::places_of(arch).env());
    let out = rig
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the rig")?
        .wait_with_output()?;
    if !out.status.success() {
        bail!("the measurement failed ({})", out.status);
    }
    serde_json::from_slice(&out.stdout).context("no rows")
}
