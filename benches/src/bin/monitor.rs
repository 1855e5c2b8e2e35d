//! Cost of a start of the monitor, exec to exit, with a guest that ends at once: this machine's `/dev/kvm`, 128 MiB, one
//! CPU, a serial port. Run by `cargo xtask bench monitor`.
//!
//! `monitor ROUNDS DIRECTORY [--qemu QEMU] [--firecracker FIRECRACKER] [--small-pages]`: DIRECTORY contains the examples
//! `boot` and `floor` of `koya-vmm`. Rows are printed as JSON on standard output, and a table on standard error. Wall time
//! includes waits in the kernel when a virtual machine is torn down.
//!
//! With `--small-pages` the host uses huge pages only for processes that request them: otherwise every monitor has two for
//! such a guest, and clearing them takes as long as everything else.
//!
//! Programs are copied first, as in an installation: the page cache has the output of a linker in smaller pieces, which
//! cause more page faults.

use koya_benches::cost::{Calls, Cost, calls_of, cost_of, peak_rss};
use koya_benches::{median, print_marked, row, tiny};
use serde_json::{Value, json};
use std::error::Error;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A measured program: name, command, and expected exit status.
struct Kind {
    name: &'static str,
    words: Vec<std::ffi::OsString>,
    status: i32,
}

/// Results of a program.
struct Seen {
    name: &'static str,
    costs: Vec<Cost>,
    rss_kib: f64,
    calls: Calls,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [rounds, directory, ..] = args.as_slice() else {
        return Err("say ROUNDS DIRECTORY".into());
    };
    let (rounds, directory): (usize, _) = (rounds.parse()?, Path::new(directory));
    let option = |name: &str| {
        let at = args.iter().position(|arg| arg == name)?;
        args.get(at + 1).map(PathBuf::from)
    };
    if !Path::new("/dev/kvm").exists() {
        return Err("no /dev/kvm here".into());
    }
    if args.iter().any(|arg| arg == "--small-pages") {
        fs::write("/sys/kernel/mm/transparent_hugepage/enabled", "madvise")?;
    }
    let dir = std::env::temp_dir().join(format!("koya-monitor-{}", std::process::id()));
    fs::create_dir_all(&dir)?;
    let kinds = kinds(&dir, directory, option("--qemu"), option("--firecracker"))?;
    let rows = measure(&kinds, rounds, &dir);
    fs::remove_dir_all(&dir)?;
    Ok(print_marked(&rows?)?)
}

fn kinds(
    dir: &Path,
    directory: &Path,
    qemu: Option<PathBuf>,
    firecracker: Option<PathBuf>,
) -> Result<Vec<Kind>> {
    let (guest, nothing) = (dir.join("guest"), dir.join("nothing"));
    tiny::write_guest(&guest)?;
    tiny::write_program(&nothing)?;
    let kind = |name, words: &[&OsStr], status| Kind {
        name,
        words: words.iter().map(|&word| word.to_owned()).collect(),
        status,
    };
    let (monitor, floor) = (
        installed(&directory.join("boot"), dir)?,
        installed(&directory.join("floor"), dir)?,
    );
    let mut kinds = vec![
        kind(KOYA, &[monitor.as_ref(), guest.as_ref()], 0),
        kind(
            CONFINED,
            &[monitor.as_ref(), "--confined".as_ref(), guest.as_ref()],
            0,
        ),
        kind("empty", &[nothing.as_ref()], 0),
        kind("bare KVM", &[floor.as_ref()], 0),
    ];
    if let Some(qemu) = qemu {
        let words = "-accel kvm -cpu host,-arch-capabilities -M microvm,pic=off,pit=off,rtc=off,acpi=off -m 128 -nodefaults \
                     -no-user-config -serial stdio -display none -no-reboot \
                     -device isa-debug-exit -kernel";
        let mut all: Vec<&OsStr> = vec![qemu.as_ref()];
        if Path::new(FIRMWARE).exists() {
            all.extend(["-L", FIRMWARE].map(OsStr::new));
        }
        all.extend(words.split_whitespace().map(OsStr::new));
        all.push(guest.as_ref());
        kinds.push(kind(QEMU, &all, tiny::QEMU_STATUS));
    }
    if let Some(firecracker) = firecracker {
        let firecracker = installed(&firecracker, dir)?;
        let config = dir.join("firecracker.json");
        let text = json!({
            "boot-source": {"kernel_image_path": &guest, "boot_args": "console=ttyS0"},
            "drives": [],
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 128},
        });
        fs::write(&config, text.to_string())?;
        let words = ["--level", "Off", "--no-api", "--config-file"].map(OsStr::new);
        let mut all: Vec<&OsStr> = vec![firecracker.as_ref()];
        all.extend(words);
        all.push(config.as_ref());
        kinds.push(kind(FIRECRACKER, &all, 0));
        all.push("--no-seccomp".as_ref());
        kinds.push(kind(FIRECRACKER_BARE, &all, 0));
    }
    Ok(kinds)
}

/// The guest runs on the main thread, which has no filter.
const KOYA: &str = "koya";
/// The guest runs on a thread of its own, with its filter.
const CONFINED: &str = "koya confined";
const FIRECRACKER: &str = "Firecracker";
const FIRECRACKER_BARE: &str = "Firecracker without seccomp";
const QEMU: &str = "QEMU";
/// Goals: maximum CPU time of a start relative to a peer's, without filters and with them.
const SHARES: [(&str, &str, f64); 3] = [
    (KOYA, FIRECRACKER_BARE, 0.7),
    (CONFINED, FIRECRACKER, 0.7),
    (KOYA, QEMU, 0.06),
];
/// Goal: maximum number of system calls before the guest runs.
const CALLS: f64 = 110.0;

/// Directory of the firmware on a host without Debian's QEMU package.
const FIRMWARE: &str = "/share/qemu";

/// Copies a program into this directory.
fn installed(program: &Path, dir: &Path) -> Result<PathBuf> {
    let copy = dir.join(program.file_name().ok_or("no program")?);
    fs::copy(program, &copy)?;
    Ok(copy)
}

fn command(kind: &Kind) -> Command {
    let mut command = Command::new(&kind.words[0]);
    command.args(&kind.words[1..]);
    command
}

fn measure(kinds: &[Kind], rounds: usize, dir: &Path) -> Result<Vec<Value>> {
    let mut seen = Vec::new();
    for kind in kinds {
        // The first run fills caches.
        cost_of(&mut command(kind), kind.status)?;
        seen.push(Seen {
            name: kind.name,
            costs: Vec::new(),
            rss_kib: peak_rss(&command(kind))?,
            calls: calls_of(&command(kind), &dir.join("calls"))?,
        });
    }
    for _ in 0..rounds {
        for (kind, seen) in kinds.iter().zip(&mut seen) {
            seen.costs.push(cost_of(&mut command(kind), kind.status)?);
        }
    }
    Ok(rows(&seen))
}

fn rows(seen: &[Seen]) -> Vec<Value> {
    let value = |of: fn(&Cost) -> f64| {
        move |seen: &Seen| median(&seen.costs.iter().map(of).collect::<Vec<_>>())
    };
    let all = |name: &str, unit: &str, value: &dyn Fn(&Seen) -> f64| {
        let peers = seen[1..].iter().map(|s| (s.name.to_owned(), value(s)));
        row(name, unit, true, value(&seen[0]), peers)
    };
    let cpu = value(|c| c.cpu_us);
    let wall = value(|c| c.wall_us);
    let mut rows = vec![
        all("monitor start: exec to exit, CPU", "us", &cpu),
        all("monitor start: exec to exit, wall", "us", &wall),
        all("monitor start: peak RSS", "KiB", &|s| s.rss_kib),
        all("monitor start: system calls", "", &|s| s.calls.all.into()),
        all("monitor start: threads", "", &|s| s.calls.threads.into()),
    ];
    let goal = |value: f64| [("goal".to_owned(), value)];
    let before = |seen: &Seen| f64::from(seen.calls.before_run);
    let peers = seen[1..].iter().map(|s| (s.name.to_owned(), before(s)));
    let name = "monitor start: system calls before the guest";
    let beside = peers.chain(goal(CALLS));
    rows.push(row(name, "", true, before(&seen[0]), beside));
    let named = |name: &str| seen.iter().find(|seen| seen.name == name);
    for (own, peer, most) in SHARES {
        if let (Some(ours), Some(theirs)) = (named(own), named(peer)) {
            let name = match own {
                KOYA => format!("monitor start: share of the CPU that {peer} takes"),
                _ => format!("monitor start: share of the CPU that {peer} takes, {own}"),
            };
            let share = cpu(ours) / cpu(theirs);
            rows.push(row(&name, "", true, share, goal(most)));
        }
    }
    rows
}
