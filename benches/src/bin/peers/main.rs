//! Koya's monitor compared with others by counted instructions, from exec to the guest's user space: with one kernel and one
//! initramfs for all, and a whole sandbox of Koya's compared with others running a distribution's kernel. `cargo xtask bench
//! peers` runs it in that host, with the programs in `/bin`. `peers exits` lists the exits of each monitor's guest instead.

mod trace;

use koya_benches::{counts, print_marked, process_memory, row};
use koya_vmm::internals::BASE_CMDLINE;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};
use std::error::Error;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};
use trace::Trace;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Koya's kernel, for all monitors.
const KERNEL: &str = "/share/koya/vmlinux";
/// Debian's kernel, for the others.
const STOCK_KERNEL: &str = "/stock/vmlinux";
/// Additional monitors: name and command line of each.
const OTHERS: &str = "/monitors.json";
const INITRAMFS: &str = "/initramfs";
/// Message of the guest's init.
const UP: &str = "GUEST-UP";
/// Kernel parameters in addition to those of the monitor: no messages, no probing for a keyboard.
const WORDS: &str = "quiet initcall_blacklist=i8042_init";
/// Parameters that Koya's monitor adds by itself: the console, and one that all its guests have.
const SERIAL: &str = "console=ttyS0 8250.nr_uarts=1";
/// Instead, for QEMU's `virt`, which has no serial port that Koya's kernel knows.
const VIRTIO_CONSOLE: &str = "console=hvc0";
/// Number of runs of each: the first fills caches, the last counts. Two more are traced, which costs instructions.
const RUNS: usize = 2;
const MEMORY_KIB: u64 = 128 << 10;
/// Time for a guest to come to rest before its monitor's memory is measured.
const REST: Duration = Duration::from_millis(300);
/// Time limit for a guest with Koya's kernel to reach user space, by the counted clock: ten times that of the slowest. QEMU
/// 7.2 may inject an interrupt into a nested guest twice if its budget of instructions ends between the injection and the
/// guest's next exit (`exception_index`, which VMRUN leaves set): mostly the first one of asynchronous page faults, which
/// then waits for a lock that it holds. Each second of that takes more than a minute of real time. The guest is started
/// again, with different timing.
const LIMIT: Duration = Duration::from_secs(1);
/// The same with Debian's kernel.
const STOCK_LIMIT: Duration = Duration::from_secs(5);
const TRIES: usize = 3;

/// Milliseconds of the trace's clock.
fn now() -> Result<f64> {
    Ok(counts::now_ns()? as f64 / 1e6)
}

/// A monitor, or a whole sandbox.
struct Monitor {
    name: String,
    words: Vec<String>,
    /// Time limit of its guest.
    limit: Duration,
    look: Look,
}

/// Function that observes a process started at this time, up to a limit; returns `None` if its guest hangs.
type Look = fn(&mut Child, f64, Duration) -> Result<Option<Seen>>;

/// Results of one run.
#[derive(Clone, Copy, Default)]
struct Seen {
    began: f64,
    up: f64,
    entered: f64,
    calls: f64,
    exits: f64,
    beyond: f64,
    threads: f64,
}

/// A figure: name, unit, and accessor.
type Figure = (&'static str, &'static str, fn(&Seen) -> f64);

const EXITS: &str = "KVM exits to the guest's user space";
/// Goal: maximum number relative to Firecracker's with the same kernel.
const EXITS_GOAL: f64 = 0.6;
const FIRECRACKER: &str = "Firecracker";

const FIGURES: &[Figure] = &[
    ("exec to the first entry of the guest", "ms", |s| s.entered),
    ("system calls before it, of all threads", "", |s| s.calls),
    ("exec to the guest's user space", "ms", |s| s.up),
    (EXITS, "", |s| s.exits),
    ("memory of the process beyond the guest's", "KiB", |s| {
        s.beyond
    }),
    ("threads", "", |s| s.threads),
];

fn main() -> Result<()> {
    let koya = Monitor {
        name: "Koya".to_owned(),
        words: ["/bin/monitor", KERNEL, INITRAMFS, WORDS]
            .map(str::to_owned)
            .into(),
        limit: LIMIT,
        look,
    };
    match std::env::args().nth(1).as_deref() {
        None => figures(&koya),
        Some("exits") => exits(koya),
        Some(other) => Err(format!("{other}: say exits, or nothing").into()),
    }
}

fn figures(koya: &Monitor) -> Result<()> {
    let own = runs_of(koya)?;
    let peers = all_of(&peers_with(KERNEL, LIMIT)?)?;
    // Also for a whole sandbox, which has four devices that Firecracker's guest does not have here.
    let theirs = peers.iter().find(|(name, _)| name == FIRECRACKER);
    let goal = theirs.map(|(_, seen)| ("goal".to_owned(), seen.exits * EXITS_GOAL));
    let mut rows = Vec::new();
    for (name, unit, value) in FIGURES {
        let mut beside = beside(&peers, *value);
        if *name == EXITS {
            beside.extend(goal.clone());
        }
        rows.push(row(name, unit, true, value(&own), beside));
    }
    // Printed before the others begin, in case they fail with Debian's kernel.
    print_marked(&rows)?;
    let sandbox = last_of(&sandbox())?;
    let stock = all_of(&peers_of_stock()?)?;
    let name = "whole sandbox to its agent; Debian's kernel to user space";
    let time = row(name, "ms", true, sandbox.up, beside(&stock, |s| s.up));
    let name = "KVM exits of the same";
    let mut beside_exits = beside(&stock, |s| s.exits);
    beside_exits.extend(goal);
    let exits = row(name, "", true, sandbox.exits, beside_exits);
    Ok(print_marked(&[time, exits])?)
}

/// Lists the exits of each monitor's guest up to user space, and of a whole sandbox up to its agent's connection.
fn exits(koya: Monitor) -> Result<()> {
    let mut all = vec![koya];
    all.extend(peers_with(KERNEL, LIMIT)?);
    all.push(sandbox());
    for monitor in all {
        last_of(&monitor)?;
        let (seen, trace) = start(&monitor, trace::EXITS)?;
        print_exits(&monitor.name, &trace, seen.began + seen.up);
    }
    Ok(())
}

fn print_exits(name: &str, trace: &str, until: f64) {
    let exits = trace::exits(trace, until);
    let count: usize = exits.iter().map(|(count, _)| count).sum();
    eprintln!("{name}: {count} exits, and what for");
    for (count, exit) in exits {
        eprintln!("{count:>6} {exit}");
    }
}

/// A figure of each peer, by name.
fn beside(peers: &[(String, Seen)], value: fn(&Seen) -> f64) -> Vec<(String, f64)> {
    let figures = peers.iter().map(|(name, seen)| (name.clone(), value(seen)));
    figures.collect()
}

/// A whole sandbox of Koya's, with its kernel, files, vsock, balloon and entropy, up to its agent's connection.
fn sandbox() -> Monitor {
    Monitor {
        name: "Koya's whole sandbox".to_owned(),
        words: ["/bin/sandbox", "once"].map(str::to_owned).into(),
        limit: LIMIT,
        look: look_at_sandbox,
    }
}

fn look_at_sandbox(process: &mut Child, began: f64, limit: Duration) -> Result<Option<Seen>> {
    let mut output = process.stdout.take().ok_or("no output")?;
    let Some(said) = hear(&mut output, None, limit)? else {
        return Ok(None);
    };
    let said: Value = serde_json::from_str(&said)?;
    let number = |value: &Value| value.as_f64().ok_or("no figure of a sandbox");
    let ready = &said["ready"];
    Ok(Some(Seen {
        began,
        up: number(&ready[0])? / 1e6 - began,
        exits: number(&ready[2]["exits"])?,
        ..Seen::default()
    }))
}

fn all_of(monitors: &[Monitor]) -> Result<Vec<(String, Seen)>> {
    let each = monitors.iter();
    each.map(|monitor| Ok((monitor.name.clone(), runs_of(monitor)?)))
        .collect()
}

fn runs_of(monitor: &Monitor) -> Result<Seen> {
    let words = &monitor.words;
    // Printed, since the console is shown after a timeout.
    eprintln!("{}", words.join(" "));
    let mut seen = last_of(monitor)?;
    let entry = |events| -> Result<(usize, f64)> {
        let (seen, trace) = start(monitor, events)?;
        let entry = trace::first_entry(&trace, std::process::id());
        let (calls, at) = entry.ok_or_else(|| format!("{}: no entry in the trace", words[0]))?;
        Ok((calls, at - seen.began))
    };
    seen.entered = entry(trace::ENTRIES)?.1;
    seen.calls = entry(trace::ENTRIES_AND_CALLS)?.0 as f64;
    Ok(seen)
}

/// The results of the last run.
fn last_of(monitor: &Monitor) -> Result<Seen> {
    let mut seen = Seen::default();
    for _ in 0..RUNS {
        seen = start(monitor, &[])?.0;
    }
    Ok(seen)
}

fn peers_of_stock() -> Result<Vec<Monitor>> {
    match Path::new(STOCK_KERNEL).exists() {
        true => peers_with(STOCK_KERNEL, STOCK_LIMIT),
        false => Ok(Vec::new()),
    }
}

/// The other monitors, with their parameters for a kernel.
fn peers_with(kernel: &str, limit: Duration) -> Result<Vec<Monitor>> {
    let with = |console: &str| format!("{BASE_CMDLINE} {console} {WORDS}");
    let (line, virtio_line) = (with(SERIAL), with(VIRTIO_CONSOLE));
    let config = format!("/run/firecracker{}.json", kernel.replace('/', "-"));
    let of = |name: &str, template: &str| {
        let words = template.split_whitespace().map(|word| {
            let word = word.replace("{kernel}", kernel);
            let word = word.replace("{initramfs}", INITRAMFS);
            word.replace("{config}", &config)
                .replace("{cmdline}", &line)
                .replace("{virtio_cmdline}", &virtio_line)
        });
        Monitor {
            name: name.to_owned(),
            words: words.collect(),
            limit,
            look,
        }
    };
    let mut all = Vec::new();
    for (name, program, words) in KNOWN {
        if Path::new(program).exists() {
            all.push(of(name, &format!("{program} {words}")));
        }
    }
    if Path::new(OTHERS).exists() {
        let others: Vec<(String, String)> = serde_json::from_slice(&fs::read(OTHERS)?)?;
        all.extend(others.iter().map(|(name, words)| of(name, words)));
    }
    let config_of = json!({
        "boot-source": {"kernel_image_path": kernel, "initrd_path": INITRAMFS, "boot_args": line},
        "drives": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": MEMORY_KIB >> 10},
    });
    fs::write(&config, config_of.to_string())?;
    Ok(all)
}

/// Name, program and arguments of the known monitors; each prints its serial port.
const KNOWN: &[(&str, &str, &str)] = &[
    (
        FIRECRACKER,
        "/bin/firecracker",
        "--level Off --no-api --no-seccomp --config-file {config}",
    ),
    (
        "QEMU",
        "/bin/qemu-system-x86_64",
        "-L /share/qemu -accel kvm -cpu host -M microvm,pic=off,pit=off,rtc=off,acpi=off -m 128 \
         -nodefaults -no-user-config -serial stdio -display none -no-reboot \
         -kernel {kernel} -initrd {initramfs} -append {cmdline}",
    ),
    (
        "QEMU",
        "/bin/qemu-system-aarch64",
        "-L /share/qemu -accel kvm -cpu host -M virt,gic-version=3 -m 128 \
         -nodefaults -no-user-config -display none -no-reboot \
         -chardev stdio,id=out -device virtio-serial-device -device virtconsole,chardev=out \
         -kernel {kernel} -initrd {initramfs} -append {virtio_cmdline}",
    ),
    (
        "Cloud Hypervisor",
        "/bin/cloud-hypervisor",
        "--cpus boot=1 --memory size=128M --serial tty --console off \
         --kernel {kernel} --initramfs {initramfs} --cmdline {cmdline}",
    ),
];

/// Runs a monitor, with retries; returns its results and the kernel's trace.
fn start(monitor: &Monitor, events: &[&str]) -> Result<(Seen, String)> {
    let name = &monitor.words[0];
    for _ in 0..TRIES {
        match try_start(monitor, events) {
            Ok(Some(done)) => return Ok(done),
            Ok(None) => eprintln!("{name}: its guest stands still"),
            Err(error) => return Err(format!("{name}: {error}").into()),
        }
    }
    Err(format!("{name}: its guest stood still {TRIES} times").into())
}

/// `None` if the guest hangs.
fn try_start(monitor: &Monitor, events: &[&str]) -> Result<Option<(Seen, String)>> {
    let words = &monitor.words;
    let trace = Trace::begin(events)?;
    let from = now()?;
    let mut process = Command::new(&words[0])
        .args(&words[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let seen = (monitor.look)(&mut process, from, monitor.limit);
    process.kill()?;
    process.wait()?;
    let trace = trace.end()?;
    Ok(seen?.map(|seen| (seen, trace)))
}

/// Reads output up to this word, or otherwise to the end; `None` after the time limit.
fn hear(output: &mut ChildStdout, word: Option<&str>, limit: Duration) -> Result<Option<String>> {
    let (mut said, by) = (Vec::new(), Instant::now() + limit);
    loop {
        let left = Timespec::try_from(by.saturating_duration_since(Instant::now()))?;
        if poll(&mut [PollFd::new(output, PollFlags::IN)], Some(&left))? == 0 {
            return Ok(None);
        }
        let mut piece = [0; 4096];
        let count = output.read(&mut piece)?;
        said.extend(&piece[..count]);
        let so_far = String::from_utf8_lossy(&said);
        match word {
            Some(word) if so_far.contains(word) => return Ok(Some(so_far.into())),
            Some(_) if count == 0 => return Err(format!("ended: {so_far}").into()),
            None if count == 0 => return Ok(Some(so_far.into())),
            _ => {}
        }
    }
}

/// Waits for the guest's message, then inspects the monitor. All of it on this thread, whose system calls the reader of the
/// trace can distinguish from the monitor's.
fn look(process: &mut Child, from: f64, limit: Duration) -> Result<Option<Seen>> {
    let mut output = process.stdout.take().ok_or("no output")?;
    if hear(&mut output, Some(UP), limit)?.is_none() {
        return Ok(None);
    }
    let mut seen = Seen {
        began: from,
        up: now()? - from,
        ..Seen::default()
    };
    let pid = process.id();
    seen.exits = counts::of_kvm(pid)?["exits"] as f64;
    std::thread::sleep(REST);
    let held = process_memory::of(pid, MEMORY_KIB)?;
    seen.beyond = (held.rss - held.guest) as f64;
    seen.threads = fs::read_dir(format!("/proc/{pid}/task"))?.count() as f64;
    Ok(Some(seen))
}
