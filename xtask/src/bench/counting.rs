//! An emulated host whose clock is the number of executed instructions (QEMU's `-icount shift=0`): measurements are
//! identical on every run and every machine, a nanosecond per instruction.
//!
//! It has no caches and no TLB, and an exit of a guest counts as one instruction. Waits also advance its clock.

use super::profile::{self, Profile, Symbols};
use crate::arch::Arch;
use crate::archive::Archive;
use crate::proc;
use crate::rig::{Host, Model, RunDir};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const INIT: &str = include_str!("counting-init.sh");
/// Prefix of its last line.
const END: &str = "counting: exit ";
/// On x86_64 without fast string instructions, long or short: each step of one would count.
fn machine(arch: Arch) -> Vec<String> {
    match arch {
        Arch::X86_64 => {
            let cpu = "max,-erms,-fsrm,-fzrm,-fsrs,-fsrc";
            ["-M", "q35", "-cpu", cpu].map(str::to_owned).into()
        }
        Arch::Aarch64 => Model::default().aarch64(),
    }
}

/// The console of its kernel.
fn console_of(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "ttyS0",
        Arch::Aarch64 => "ttyAMA0",
    }
}

/// Memory sizes of an emulated host.
#[derive(Clone, Copy)]
pub(super) struct Room {
    /// Its memory, in MiB.
    memory: u32,
    /// QEMU's cache of translated code, including the guests' kernels, in MiB: 2047 at most, `None` for QEMU's default. When
    /// it is full, QEMU discards it and starts again.
    translations: Option<u32>,
}

/// For one guest at a time.
pub(super) const ONE_GUEST: Room = Room {
    memory: 3072,
    translations: None,
};
/// For fifty guests at once: each has its own copy of its kernel, and some 60 MiB. Without enough memory the host keeps
/// reclaiming forever.
pub(super) const MANY_GUESTS: Room = Room {
    memory: 8192,
    translations: Some(2047),
};
const LIMIT: Duration = Duration::from_secs(1200);

/// Prefix of the line with a bench's rows (`koya_benches::print_marked`).
const ROWS: &str = "rows: ";

/// The rows printed by all parts of a bench; its other output goes to standard error.
///
/// # Errors
/// If there are none.
pub(super) fn rows(said: &str) -> Result<Value> {
    let mut rows = Vec::new();
    for line in said.lines() {
        match line.strip_prefix(ROWS) {
            Some(json) => rows.extend(serde_json::from_str::<Vec<Value>>(json)?),
            None => eprintln!("{line}"),
        }
    }
    if rows.is_empty() {
        bail!("no rows");
    }
    Ok(rows.into())
}

/// Adds programs to `bin`, and their libraries at the paths where they are looked for.
pub(super) fn add_programs(
    arch: Arch,
    files: &mut Archive,
    programs: &[(impl AsRef<str>, PathBuf)],
) -> Result<()> {
    let mut libraries = BTreeMap::new();
    for (name, path) in programs {
        let program = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        files.file(&format!("bin/{}", name.as_ref()), 0o755, &program)?;
        libraries.extend(match arch.is_native() {
            true => libraries_of(path)?,
            false => foreign_libraries_of(arch, path)?,
        });
    }
    for (to, path) in libraries {
        files.file(&to, 0o755, &fs::read(path)?)?;
    }
    Ok(())
}

/// Boots it with this much memory and these files, runs `/bin/boot ARGUMENTS` in it, and returns the output.
///
/// # Errors
/// If it ends with another status than 0, with the end of its console.
pub(super) fn run(arch: Arch, files: Archive, arguments: &str, room: Room) -> Result<String> {
    Ok(boot(arch, files, arguments, room, None)?.0)
}

/// As [`run`], with a profile of the instructions between two messages of the program.
pub(super) fn profile(files: Archive, arguments: &str, symbols: &Symbols) -> Result<Profile> {
    let arch = Arch::of_this_machine();
    let (_, profile) = boot(arch, files, arguments, ONE_GUEST, Some(symbols))?;
    profile.context("no profile")
}

fn boot(
    arch: Arch,
    mut files: Archive,
    arguments: &str,
    room: Room,
    symbols: Option<&Symbols>,
) -> Result<(String, Option<Profile>)> {
    let host = Host::ensure_for(arch)?;
    let run = RunDir::create()?;
    files.file("init", 0o755, INIT.as_bytes())?;
    files.file("arguments", 0o644, arguments.as_bytes())?;
    // The archives are concatenated, and later entries win.
    let mut initrd = fs::read(host.dir.join("initrd"))?;
    initrd.extend(files.finish()?);
    fs::write(run.path("initrd"), initrd)?;
    let console = run.path("console");
    let mut qemu = host.qemu();
    let mut accel = "tcg,thread=single".to_owned();
    if let Some(mib) = room.translations {
        accel += &format!(",tb-size={mib}");
    }
    qemu.args(["-accel", &accel])
        .args(machine(arch))
        .args(["-icount", "shift=0,sleep=off", "-seed", "1"])
        .args(["-rtc", "base=2020-01-01,clock=vm", "-smp", "1"])
        .args(["-m", &room.memory.to_string()])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-vga", "none", "-net", "none", "-no-reboot"])
        .arg("-kernel")
        .arg(host.dir.join("vmlinuz"))
        .arg("-initrd")
        .arg(run.path("initrd"))
        .arg("-append")
        .arg(format!(
            "console={} quiet panic=-1 nokaslr",
            console_of(arch)
        ))
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .stdin(Stdio::null());
    let (words, monitor) = (run.path("words"), run.path("monitor"));
    if symbols.is_some() {
        let socket = |path: &Path| format!("unix:{},server=on,wait=off", path.display());
        qemu.args(["-serial", &socket(&words), "-monitor", &socket(&monitor)]);
    }
    eprintln!("counting: starting an emulated host whose instructions are counted");
    let started = Instant::now();
    let mut child = qemu.spawn().context("cannot start QEMU")?;
    let profile = symbols.map(|symbols| {
        eprintln!("counting: each instruction of one start is logged, which takes minutes");
        profile::watch(&words, &monitor, &run.path("log"), symbols)
    });
    let ended = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if started.elapsed() > LIMIT {
            child.kill()?;
            child.wait()?;
            bail!("no end after {LIMIT:?}:\n{}", proc::tail(&console, 40));
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    if !ended.success() || !console.exists() {
        bail!("QEMU ended with {ended}");
    }
    eprintln!("counting: done in {:.1?}", started.elapsed());
    let said = fs::read_to_string(&console)?.replace('\r', "");
    let status = said.lines().find_map(|line| line.strip_prefix(END));
    if status.map(str::trim) != Some("0") {
        bail!("it failed:\n{}", proc::tail(&console, 40));
    }
    Ok((said, profile.transpose()?))
}

/// As [`libraries_of`], for another architecture: the libraries in the root directory that the program is in.
fn foreign_libraries_of(arch: Arch, program: &Path) -> Result<Vec<(String, PathBuf)>> {
    let directories = program.ancestors();
    let mut directories =
        directories.map(|root| root.join(format!("usr/lib/{}-linux-gnu", arch.name())));
    // A static program needs none.
    let directory = directories.find(|directory| directory.is_dir());
    let directory = directory.unwrap_or_default();
    let mut all = BTreeMap::new();
    let mut left = vec![program.to_path_buf()];
    while let Some(file) = left.pop() {
        let said = proc::output(arch.tool("readelf").arg("--dynamic").arg(&file))?;
        let interpreter = proc::output(arch.tool("readelf").arg("--program-headers").arg(&file))?;
        let loader = interpreter
            .lines()
            .filter_map(|line| bracketed(line, "Requesting program interpreter: "));
        let loader = loader.filter_map(|path| path.rsplit('/').next());
        let needed = said.lines().filter(|line| line.contains("(NEEDED)"));
        let needed = needed.filter_map(|line| bracketed(line, "Shared library: ["));
        for name in needed.chain(loader) {
            let path = directory.join(name);
            if !path.exists() {
                bail!("{} needs {}", file.display(), path.display());
            }
            if all.insert(format!("lib/{name}"), path.clone()).is_none() {
                left.push(path);
            }
        }
    }
    Ok(all.into_iter().collect())
}

/// The text of a line from after `begin` to the next bracket.
fn bracketed<'a>(line: &'a str, begin: &str) -> Option<&'a str> {
    line.split_once(begin)?.1.split(']').next()
}

/// The libraries of a program: path at run time, and path here. Empty for a static one.
pub(super) fn libraries_of(program: &Path) -> Result<Vec<(String, PathBuf)>> {
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
