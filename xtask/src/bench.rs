//! `cargo xtask bench`: benchmarks of Koya and its peers, on a host with KVM.

use crate::arch::Arch;
use crate::archive::Archive;
use crate::build::Products;
use crate::profile::Symbols;
use crate::{build, cache, counting, criterion, kernel, monitor, peers, proc, setup, suite};
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use serde_json::Value;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Packages for benches, in addition to those for builds and tests.
const PACKAGES: &[(&str, &str)] = &[
    ("fio", "the benches' disk load"),
    ("iperf3", "the benches' network load"),
    ("strace", "the benches' counts of system calls"),
];

const INIT: &str = include_str!("../../benches/guest/init.sh");
/// Scripts for guests, by name.
const SCRIPTS: &[(&str, &str)] = &[
    ("lib.sh", include_str!("../../benches/guest/lib.sh")),
    (
        "measure-disks.sh",
        include_str!("../../benches/guest/measure-disks.sh"),
    ),
    (
        "measure-files.sh",
        include_str!("../../benches/guest/measure-files.sh"),
    ),
    (
        "measure-vsock.sh",
        include_str!("../../benches/guest/measure-vsock.sh"),
    ),
    (
        "measure-memory.sh",
        include_str!("../../benches/guest/measure-memory.sh"),
    ),
];

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
        /// Write the rows to FILE as JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Measure a cold start on the instruction-counting host: identical on every run and every machine
    Boot(BootArgs),
    /// Measure a start of the monitor, exec to exit, with a guest that resets at once, on this machine's
    /// /dev/kvm; compared with an empty program and bare KVM calls
    Monitor(monitor::MonitorArgs),
    /// Measure the host memory of the monitor and of whole sandboxes beyond that of the guest, by kind
    Memory {
        /// Fail if a figure misses its goal
        #[arg(long)]
        check: bool,
        /// Write the rows to FILE as JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Measure the cost to create a sandbox, and its memory, with many running at once
    Many {
        /// Numbers of sandboxes running at once
        #[arg(long, default_value = "1,10,50", value_name = "N,N")]
        counts: String,
        /// Fail if one of many costs more than 1.1 times as much as with the first number
        #[arg(long)]
        check: bool,
        /// Write the rows to FILE as JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Run the criterion benchmarks of code inside the process: queues, devices, exits, start and teardown
    Criterion {
        /// Take fewer samples, for a rough estimate
        #[arg(long)]
        quick: bool,
        /// Write the medians to FILE as JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Compare Koya's monitor with QEMU's microvm and others, with one kernel for all, on the instruction-counting host:
    /// exec to the guest's user space, system calls, exits, memory; and a whole sandbox with the others running
    /// Debian's kernel
    Peers(peers::PeersArgs),
    /// Measure `ctr run` of a container under Koya, runc and crun, with the steps of Koya's start
    Containers {
        /// Number of containers of each kind; each figure is a median
        #[arg(long, default_value_t = 7)]
        rounds: u32,
        /// Write the rows to FILE as JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
}

#[derive(Args)]
struct BootArgs {
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
    /// Write the rows to FILE as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// `cargo xtask bench`
pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    match &args.what {
        What::Devices {
            only,
            rounds,
            unconfined,
            json,
        } => devices(*rounds, *unconfined, only.as_deref(), json.as_deref()),
        What::Boot(args) => boot(args),
        What::Memory { check, json } => memory(*check, json.as_deref()),
        What::Many {
            counts,
            check,
            json,
        } => many(counts, *check, json.as_deref()),
        What::Criterion { quick, json } => criterion::run(*quick, json.as_deref()),
        What::Peers(args) => peers::run(args),
        What::Monitor(args) => monitor::run(args),
        What::Containers { rounds, json } => containers(*rounds, json.as_deref()),
    }
}

fn devices(rounds: u32, unconfined: bool, only: Option<&str>, json: Option<&Path>) -> Result<()> {
    setup::ensure()?;
    setup::ensure_these(PACKAGES)?;
    let program = program("devices")?;
    let tools = tools()?;
    let rounds = rounds.to_string();
    // The network of the host is not changed.
    let mut command: Vec<&OsStr> = vec!["unshare".as_ref(), "--net".as_ref()];
    let peer = if unconfined { "unconfined" } else { "qemu" };
    command.extend([program.as_ref(), rounds.as_ref(), tools.as_os_str()]);
    command.push(peer.as_ref());
    command.extend(only.map(OsStr::new));
    in_rig(&command, json)?;
    Ok(())
}

fn containers(rounds: u32, json: Option<&Path>) -> Result<()> {
    setup::ensure()?;
    setup::ensure_these(PEERS)?;
    let program = program("containers")?;
    let directory = suite::containerd(suite::CONTAINERD_SUITES[0])?;
    let rounds = rounds.to_string();
    in_rig(
        &[program.as_ref(), rounds.as_ref(), directory.as_ref()],
        json,
    )?;
    Ok(())
}

fn memory(check: bool, json: Option<&Path>) -> Result<()> {
    let examples = build::examples()?;
    let program = program("memory")?;
    let command: [&OsStr; 3] = [program.as_ref(), "held".as_ref(), examples.as_ref()];
    let rows = in_rig(&command, json)?;
    match check {
        true => check_goals(&rows),
        false => Ok(()),
    }
}

/// Fails if a figure misses its goal, which is listed in the column of a peer.
pub(crate) fn check_goals(rows: &Value) -> Result<()> {
    let goals = rows.as_array().into_iter().flatten().filter_map(|row| {
        let ratio = row["ratio"]["goal"].as_f64()?;
        let text = format!(
            "{}: {} {}, goal {}",
            row["name"].as_str()?,
            row["koya"],
            row["unit"].as_str()?,
            row["peers"]["goal"]
        );
        Some((ratio >= 1.0, text))
    });
    let (met, missed): (Vec<_>, Vec<_>) = goals.partition(|(is_met, _)| *is_met);
    for (_, text) in &met {
        eprintln!("bench: met: {text}");
    }
    if met.is_empty() && missed.is_empty() {
        bail!("no figure has a goal");
    }
    let missed: Vec<_> = missed.into_iter().map(|(_, text)| text).collect();
    match missed.is_empty() {
        true => Ok(()),
        false => bail!("not met:\n{}", missed.join("\n")),
    }
}

fn many(counts: &str, check: bool, json: Option<&Path>) -> Result<()> {
    setup::ensure()?;
    let program = program("memory")?;
    let mut files = guest_files(None)?;
    // For the sandboxes' networks.
    files.file("more-modules", 0o644, b"tun.ko\n")?;
    counting::add_programs(&mut files, &[("boot", program)])?;
    let said = counting::run(files, &format!("many {counts}"), counting::MANY_GUESTS)?;
    let rows = counting::rows(&said)?;
    if let Some(file) = json {
        save_rows(file, &rows)?;
    }
    match check {
        true => check_goals(&rows),
        false => Ok(()),
    }
}

/// The recorded baseline of the cost of a start.
const BASELINE: &str = "benches/baseline/boot.json";
/// Prefix of the line with the diagram, as a JSON string.
const PICTURE: &str = "picture: ";

/// Files of the counted host for any guest: kernel and initramfs, a root file system, a shell.
pub(crate) fn guest_files(kernel: Option<&Path>) -> Result<Archive> {
    let products = Products::places();
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
    let busybox = fs::read("/bin/busybox").context("busybox-static is not installed")?;
    for name in ["sh", "echo"] {
        files.file(&format!("rootfs/bin/{name}"), 0o755, &busybox)?;
    }
    files.file("bin/sh", 0o755, &busybox)?;
    for name in ["vmlinux", "initramfs"] {
        let path = match kernel.filter(|_| name == "vmlinux") {
            Some(kernel) => stripped(kernel)?,
            None => products.share.join(name),
        };
        files.file(&format!("share/koya/{name}"), 0o644, &fs::read(path)?)?;
    }
    files.file("config.json", 0o644, OCI_CONFIG.as_bytes())?;
    Ok(files)
}

/// The same with koya and its peers.
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
fn stripped(kernel: &Path) -> Result<PathBuf> {
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

fn boot(args: &BootArgs) -> Result<()> {
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
        save(file, picture)?;
    }
    let rows = counting::rows(&said.join("\n"))?;
    if let Some(file) = &args.json {
        save_rows(file, &rows)?;
    }
    let baseline = proc::checkout().join(BASELINE);
    if let Some(share) = args.check.then_some(args.share) {
        let before = fs::read(&baseline).with_context(|| format!("no {BASELINE}"))?;
        compare(&serde_json::from_slice(&before)?, &rows, share)?;
    }
    if args.record {
        if let Some(directory) = baseline.parent() {
            fs::create_dir_all(directory)?;
        }
        save_rows(&baseline, &rows)?;
        eprintln!("bench: {BASELINE} is written");
    }
    Ok(())
}

/// Configuration for runc and crun: one process with the defaults of `koya run`, including the seccomp filter.
const OCI_CONFIG: &str = include_str!("../../benches/guest/config.json");
const PEERS: &[(&str, &str)] = &[("runc", "the peers' start"), ("crun", "the peers' start")];

/// Tolerance for counts of exits and faults, which vary by this much with the timing of a tick.
const FEW: f64 = 8.0;

/// Writes a requested output file.
pub(crate) fn save(file: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    fs::write(file, content).with_context(|| format!("cannot write {}", file.display()))
}

pub(crate) fn save_rows(file: &Path, rows: &Value) -> Result<()> {
    save(file, serde_json::to_string_pretty(rows)? + "\n")
}

/// Fails if a figure is worse than before by more than `share` per cent.
fn compare(before: &Value, now: &Value, share: f64) -> Result<()> {
    let figure = |rows: &Value, name: &str| {
        let mut rows = rows.as_array().into_iter().flatten();
        let row = rows.find(|row| row["name"] == name)?;
        row["koya"].as_f64()
    };
    let mut worse = Vec::new();
    for row in before.as_array().into_iter().flatten() {
        let name = row["name"].as_str().unwrap_or_default();
        // Steps are parts of the compared figures.
        let (Some(before), Some(now)) = (row["koya"].as_f64(), figure(now, name)) else {
            bail!("{name}: no such figure any more; --record puts the new ones on record");
        };
        let slack = if row["unit"] == "" { FEW } else { 0.0 };
        if !name.starts_with("step: ") && now > before * (1.0 + share / 100.0) + slack {
            worse.push(format!("{name}: {now} instead of {before}"));
        }
    }
    if worse.is_empty() {
        eprintln!("bench: nothing is worse than on record by more than {share} %");
        return Ok(());
    }
    bail!("worse by more than {share} %:\n{}", worse.join("\n"))
}

/// Builds a program of the benches, and the programs that it measures.
fn program(name: &str) -> Result<PathBuf> {
    build::ensure()?;
    build::bench(name)
}

/// Runs a measurement on a host with KVM. Rows are printed on standard output, everything else on standard error.
fn in_rig(command: &[&OsStr], json: Option<&Path>) -> Result<Value> {
    let mut rig = Command::new(std::env::current_exe()?);
    // One CPU: with several, the emulation may crash a host that runs virtual machines.
    rig.args(["rig", "--no-build", "--cpus", "1", "--memory", "8192"])
        .args(["--timeout", "14400", "--"])
        .args(command)
        .envs(Products::places().env());
    let out = rig
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the rig")?
        .wait_with_output()?;
    if !out.status.success() {
        bail!("the measurement failed ({})", out.status);
    }
    match json {
        Some(file) => save(file, &out.stdout)?,
        None => eprintln!("(--json FILE keeps the rows)"),
    }
    serde_json::from_slice(&out.stdout).context("no rows")
}

/// The directory with a guest's initramfs and the image of its tools, created once.
fn tools() -> Result<PathBuf> {
    let load = build::vsock_load()?;
    let mut inputs = vec![INIT.to_owned()];
    inputs.extend(SCRIPTS.iter().map(|(_, text)| (*text).to_owned()));
    inputs.push(fs::read_to_string(
        proc::checkout().join("benches/src/bin/vsock_load.rs"),
    )?);
    for (package, _) in PACKAGES {
        inputs.push(proc::output(Command::new("dpkg-query").args([
            "-W",
            "-f=${Version}",
            package,
        ]))?);
    }
    let key = cache::key(&inputs);
    cache::ensure("bench", &key, |dir| {
        let mut archive = Archive::default();
        for name in ["bin", "dev", "proc", "sys", "tools"] {
            archive.dir(name)?;
        }
        archive.file("init", 0o755, INIT.as_bytes())?;
        archive.file("bin/busybox", 0o755, &fs::read("/bin/busybox")?)?;
        fs::write(dir.join("initrd"), archive.finish()?)?;

        let root = dir.join("root");
        for name in [
            "bin",
            "lib",
            "lib64",
            "dev",
            "proc",
            "sys",
            "tmp",
            "share",
            "writeback",
        ] {
            fs::create_dir_all(root.join(name))?;
        }
        for (name, text) in SCRIPTS {
            fs::write(root.join(name), text)?;
        }
        source_tree(dir, &root)?;
        fs::copy(&load, root.join("bin/vsock-load"))?;
        fs::copy("/bin/busybox", root.join("bin/busybox"))?;
        let names = proc::output(Command::new("/bin/busybox").arg("--list"))?;
        for name in names.lines().filter(|name| *name != "busybox") {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(name))?;
        }
        for program in ["fio", "iperf3"] {
            let path = Path::new("/usr/bin").join(program);
            fs::copy(&path, root.join("bin").join(program))?;
            copy_libraries(&path, &root)?;
        }
        proc::long(
            "making an image of the benches' tools (once)",
            Command::new("/sbin/mkfs.ext4")
                .args(["-q", "-F", "-m", "0", "-d"])
                .arg(&root)
                .arg(dir.join("tools.img"))
                .arg("224m"),
            &dir.with_extension("log"),
        )?;
        Ok(fs::remove_dir_all(&root)?)
    })
}

/// A tar that resembles a source tree: 2,000 files of 0 to 18 KiB in 100 directories.
fn source_tree(dir: &Path, root: &Path) -> Result<()> {
    let tree = dir.join("tree");
    for directory in 0..100 {
        let directory_path = tree.join(format!("part{}/module{directory}", directory / 10));
        fs::create_dir_all(&directory_path)?;
        for file in 0..20 {
            let lines = (directory * 7 + file * 31) % 600;
            let text = "a line of some thirty letters.\n".repeat(lines);
            fs::write(directory_path.join(format!("file{file}.c")), text)?;
        }
    }
    proc::run(
        Command::new("tar")
            .args(["-cf"])
            .arg(root.join("tree.tar"))
            .args(["-C"])
            .arg(dir)
            .arg("tree"),
    )?;
    Ok(fs::remove_dir_all(&tree)?)
}

/// Copies the libraries of a program, and the loader to its expected path.
fn copy_libraries(program: &Path, root: &Path) -> Result<()> {
    for (to, path) in libraries_of(program)? {
        fs::copy(path, root.join(to))?;
    }
    Ok(())
}

/// The libraries of a program: path at run time, and path here. Empty for a static one.
pub(crate) fn libraries_of(program: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut all = Vec::new();
    let ldd = Command::new("ldd").arg(program).output();
    let ldd = ldd.context("cannot run ldd")?;
    let why = String::from_utf8_lossy(&ldd.stderr);
    if !ldd.status.success() && !why.contains("not a dynamic executable") {
        bail!("ldd {}: {}", program.display(), why.trim());
    }
    for line in String::from_utf8(ldd.stdout)?.lines() {
        let Some(path) = line.split_whitespace().find(|word| word.starts_with('/')) else {
            continue;
        };
        let name = path.rsplit('/').next().unwrap_or(path);
        let directory = match path.starts_with("/lib64/") {
            true => "lib64",
            false => "lib",
        };
        all.push((format!("{directory}/{name}"), path.into()));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_worse_is_named() {
        let rows = |executed: f64, exits: f64| {
            json!([{"name": "executed", "unit": "M instr", "koya": executed},
                {"name": "exits", "unit": "", "koya": exits}])
        };
        let before = rows(100.0, 7.0);
        assert!(compare(&before, &rows(101.9, 9.0), 2.0).is_ok());
        let worse = |now: Value| compare(&before, &now, 2.0).unwrap_err().to_string();
        assert!(worse(rows(102.1, 7.0)).contains("executed: 102.1 instead of 100"));
        assert!(worse(rows(90.0, 17.0)).contains("exits: 17 instead of 7"));
        assert!(worse(json!([])).contains("executed: no such figure"));
    }
}
