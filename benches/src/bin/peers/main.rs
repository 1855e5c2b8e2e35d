//! Koya's monitor beside others where instructions are counted, from exec to the guest's user space:
//! with one kernel and one initramfs for all, and a whole sandbox of Koya's beside what others make of a
//! distribution's kernel. `cargo xtask bench peers` runs it in that host, with what it finds in `/bin`.

use koya_benches::{counts, held, print_marked, row};
use koya_vmm::arch::BASE_CMDLINE;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};
use std::error::Error;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Koya's, for all.
const KERNEL: &str = "/share/koya/vmlinux";
/// Debian's, for the others.
const STOCK_KERNEL: &str = "/stock/vmlinux";
/// Monitors that this program does not know: a name and words of each.
const OTHERS: &str = "/monitors.json";
const INITRAMFS: &str = "/initramfs";
/// What the guest's first program says.
const UP: &str = "GUEST-UP";
/// Each kernel's words beside what its monitor adds: no messages, no look for a keyboard.
const WORDS: &str = "quiet initcall_blacklist=i8042_init";
/// Koya adds its console, and the words that every guest of its own has; for the others they are named.
const FOR_OTHERS: &str = "console=ttyS0 8250.nr_uarts=1";
/// The first run of each fills caches, the last counts. Two more are traced, which costs instructions.
const RUNS: usize = 2;
const MEMORY_KIB: u64 = 128 << 10;
const TRACING: &str = "/sys/kernel/debug/tracing";
/// How long a guest is left alone before its monitor's memory is looked at.
const REST: Duration = Duration::from_millis(300);
/// How long a guest may take to its word, by the counted clock: ten times what the slowest does.
const LIMIT: Duration = Duration::from_secs(30);

/// Milliseconds of the clock that the trace has too.
fn now() -> Result<f64> {
    Ok(counts::now_ns()? as f64 / 1e6)
}

/// What one run came to.
#[derive(Clone, Copy, Default)]
struct Seen {
    up: f64,
    entered: f64,
    calls: f64,
    exits: f64,
    beyond: f64,
    threads: f64,
}

/// A figure: its name, its unit, and where it is.
type Figure = (&'static str, &'static str, fn(&Seen) -> f64);

const EXITS: &str = "KVM exits to the guest's user space";
/// What share of Firecracker's they may be.
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
    let koya = ["/bin/monitor", KERNEL, INITRAMFS, WORDS].map(str::to_owned);
    let own = runs_of(&koya)?;
    let peers = all_of(&peers(KERNEL)?)?;
    let mut rows = Vec::new();
    for (name, unit, value) in FIGURES {
        let mut beside = beside(&peers, *value);
        let theirs = beside.iter().find(|(name, _)| name == FIRECRACKER);
        if let (EXITS, Some((_, theirs))) = (*name, theirs) {
            beside.push(("goal".to_owned(), theirs * EXITS_GOAL));
        }
        rows.push(row(name, unit, true, value(&own), beside));
    }
    let (ready, exits) = sandbox()?;
    let stock = all_of(&peers_of_stock()?)?;
    let name = "whole sandbox to its agent; Debian's kernel to user space";
    rows.push(row(name, "ms", true, ready, beside(&stock, |s| s.up)));
    let name = "KVM exits of the same";
    rows.push(row(name, "", true, exits, beside(&stock, |s| s.exits)));
    Ok(print_marked(&rows)?)
}

/// A figure of each peer, by its name.
fn beside(peers: &[(String, Seen)], value: fn(&Seen) -> f64) -> Vec<(String, f64)> {
    let figures = peers.iter().map(|(name, seen)| (name.clone(), value(seen)));
    figures.collect()
}

/// A whole sandbox of Koya's, with its own kernel, files, vsock, balloon and entropy: milliseconds from exec to its
/// agent's word, and exits.
fn sandbox() -> Result<(f64, f64)> {
    let mut last = (0.0, 0.0);
    for _ in 0..RUNS {
        let from = now()?;
        let output = Command::new("/bin/sandbox").arg("once").output()?;
        if !output.status.success() {
            return Err(format!("/bin/sandbox: {output:?}").into());
        }
        let said: Value = serde_json::from_slice(&output.stdout)?;
        let number = |value: &Value| value.as_f64().ok_or("no figure of a sandbox");
        let ready = &said["ready"];
        last = (number(&ready[0])? / 1e6 - from, number(&ready[2]["exits"])?);
    }
    Ok(last)
}

fn all_of(monitors: &[(String, Vec<String>)]) -> Result<Vec<(String, Seen)>> {
    let each = monitors.iter();
    each.map(|(name, words)| Ok((name.clone(), runs_of(words)?)))
        .collect()
}

fn runs_of(words: &[String]) -> Result<Seen> {
    // On the console, which is shown if there is no end to it.
    eprintln!("{}", words.join(" "));
    let mut seen = Seen::default();
    for _ in 0..RUNS {
        seen = start(words, &[])?.0;
    }
    let (_, trace) = start(words, &[ENTRIES])?;
    let lacks = || format!("{}: no entry in the trace", words[0]);
    seen.entered = first_entry(&trace).ok_or_else(lacks)?.1;
    let (_, trace) = start(words, &[ENTRIES, CALLS])?;
    seen.calls = first_entry(&trace).ok_or_else(lacks)?.0 as f64;
    Ok(seen)
}

fn peers_of_stock() -> Result<Vec<(String, Vec<String>)>> {
    match Path::new(STOCK_KERNEL).exists() {
        true => peers(STOCK_KERNEL),
        false => Ok(Vec::new()),
    }
}

/// What there is beside Koya, with its words for a kernel.
fn peers(kernel: &str) -> Result<Vec<(String, Vec<String>)>> {
    let line = format!("{BASE_CMDLINE} {FOR_OTHERS} {WORDS}");
    let config = format!("/run/firecracker{}.json", kernel.replace('/', "-"));
    let of = |template: &str| -> Vec<String> {
        let words = template.split_whitespace().map(|word| {
            let word = word.replace("{kernel}", kernel);
            let word = word.replace("{initramfs}", INITRAMFS);
            word.replace("{config}", &config)
                .replace("{cmdline}", &line)
        });
        words.collect()
    };
    let mut all = Vec::new();
    for (name, program, words) in KNOWN {
        if Path::new(program).exists() {
            all.push(((*name).to_owned(), of(&format!("{program} {words}"))));
        }
    }
    if Path::new(OTHERS).exists() {
        let others: Vec<(String, String)> = serde_json::from_slice(&fs::read(OTHERS)?)?;
        all.extend(others.into_iter().map(|(name, words)| (name, of(&words))));
    }
    let config_of = json!({
        "boot-source": {"kernel_image_path": kernel, "initrd_path": INITRAMFS, "boot_args": line},
        "drives": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": MEMORY_KIB >> 10},
    });
    fs::write(&config, config_of.to_string())?;
    Ok(all)
}

/// Name, program and words of the monitors that this program knows; each prints its serial port.
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
        "Cloud Hypervisor",
        "/bin/cloud-hypervisor",
        "--cpus boot=1 --memory size=128M --serial tty --console off \
         --kernel {kernel} --initramfs {initramfs} --cmdline {cmdline}",
    ),
];

/// What the kernel's trace tells of this program's children: entries of guests, and system calls.
const ENTRIES: &str = "kvm/kvm_entry";
const CALLS: &str = "raw_syscalls/sys_enter";
/// execve, as the trace has it.
const EXEC: &str = "NR 59 ";

/// One run, and what the kernel's trace told of it.
fn start(words: &[String], events: &[&str]) -> Result<(Seen, String)> {
    let tracing = Path::new(TRACING);
    let set = |file: &str, value: &str| fs::write(tracing.join(file), value);
    if !events.is_empty() {
        set("trace_clock", "mono")?;
        set("options/event-fork", "1")?;
        set("set_event_pid", &std::process::id().to_string())?;
        // What is wanted comes first.
        set("options/overwrite", "0")?;
        set("trace", "")?;
    }
    for event in events {
        set(&format!("events/{event}/enable"), "1")?;
    }
    let from = now()?;
    let mut process = Command::new(&words[0])
        .args(&words[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let seen = look(&mut process, from);
    process.kill()?;
    process.wait()?;
    for event in events {
        set(&format!("events/{event}/enable"), "0")?;
    }
    let seen = seen.map_err(|error| format!("{}: {error}", words[0]))?;
    let trace = match events {
        [] => String::new(),
        _ => format!("{from}\n{}", fs::read_to_string(tracing.join("trace"))?),
    };
    Ok((seen, trace))
}

/// System calls from exec up to the first entry of a guest, and milliseconds up to that.
fn first_entry(trace: &str) -> Option<(usize, f64)> {
    let (from, trace) = trace.split_once('\n')?;
    let from: f64 = from.parse().ok()?;
    let own = format!("-{} ", std::process::id());
    let mut calls = None;
    for line in trace.lines().filter(|line| !line.contains(&own)) {
        if line.contains(EXEC) {
            calls.get_or_insert(0);
        }
        // `vcpu-7 [000] d... 12.345678: kvm_entry: ...`
        if let Some((before, _)) = line.split_once(": kvm_entry:") {
            let seconds: f64 = before.split_whitespace().last()?.parse().ok()?;
            return Some((calls.unwrap_or(0), seconds * 1e3 - from));
        }
        if line.contains(": sys_enter:") {
            calls = calls.map(|calls| calls + 1);
        }
    }
    None
}

/// Waits until the guest said its word; not for ever.
fn hear(output: &mut ChildStdout) -> Result<()> {
    let (mut said, by) = (Vec::new(), Instant::now() + LIMIT);
    loop {
        let left = Timespec::try_from(by.saturating_duration_since(Instant::now()))?;
        if poll(&mut [PollFd::new(output, PollFlags::IN)], Some(&left))? == 0 {
            let said = String::from_utf8_lossy(&said);
            return Err(format!("no word of its guest in {LIMIT:?}: {said}").into());
        }
        let mut piece = [0; 4096];
        let count = output.read(&mut piece)?;
        said.extend(&piece[..count]);
        let said = String::from_utf8_lossy(&said);
        if said.contains(UP) {
            return Ok(());
        }
        if count == 0 {
            return Err(format!("ended: {said}").into());
        }
    }
}

/// Waits for the guest's word, then looks at the monitor. All in this thread, whose system calls the trace's
/// reader knows from the monitor's.
fn look(process: &mut Child, from: f64) -> Result<Seen> {
    let mut output = process.stdout.take().ok_or("no output")?;
    hear(&mut output)?;
    let mut seen = Seen {
        up: now()? - from,
        ..Seen::default()
    };
    let pid = process.id();
    seen.exits = counts::of_kvm(pid)?["exits"] as f64;
    std::thread::sleep(REST);
    let held = held::of(pid, MEMORY_KIB)?;
    seen.beyond = (held.rss - held.guest) as f64;
    seen.threads = fs::read_dir(format!("/proc/{pid}/task"))?.count() as f64;
    Ok(seen)
}
