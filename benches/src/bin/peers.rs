//! Koya's monitor beside others with one kernel and one initramfs, where instructions are counted: from
//! exec to the guest's user space. `cargo xtask bench peers` runs it in that host, with what it finds
//! in `/bin`.

use koya_benches::{counts, held, print_marked, row};
use koya_vmm::arch::BASE_CMDLINE;
use serde_json::json;
use std::error::Error;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const KERNEL: &str = "/share/koya/vmlinux";
const INITRAMFS: &str = "/initramfs";
/// What the guest's first program says.
const UP: &str = "GUEST-UP";
/// Each kernel's words beside what its monitor adds: no messages, no look for a keyboard.
const WORDS: &str = "quiet initcall_blacklist=i8042_init";
/// Koya adds its console, and the words that every guest of its own has; for the others they are named.
const FOR_OTHERS: &str = "console=ttyS0 8250.nr_uarts=1";
/// The first run of each fills caches, the one before the last counts, the last is traced.
const RUNS: usize = 4;
const MEMORY_KIB: u64 = 128 << 10;
const TRACING: &str = "/sys/kernel/debug/tracing";
/// How long a guest is left alone before its monitor's memory is looked at.
const REST: Duration = Duration::from_millis(300);

/// Milliseconds of the clock that the trace has too.
fn now() -> Result<f64> {
    Ok(counts::now_ns()? as f64 / 1e6)
}

/// What one run came to.
#[derive(Clone, Copy, Default)]
struct Seen {
    up: f64,
    entered: f64,
    exits: f64,
    beyond: f64,
    threads: f64,
}

fn main() -> Result<()> {
    let mut all = Vec::new();
    for (name, words) in monitors()? {
        let mut seen = Seen::default();
        for run in 0..RUNS {
            let traced = run + 1 == RUNS;
            let this = start(&words, traced)?;
            match traced {
                true => seen.entered = this.entered,
                false => seen = this,
            }
        }
        all.push((name, seen));
    }
    let rows: Vec<_> = [
        (
            "exec to the first entry of the guest",
            "ms",
            (|s| s.entered) as fn(&Seen) -> f64,
        ),
        ("exec to the guest's user space", "ms", |s| s.up),
        ("KVM exits to the guest's user space", "", |s| s.exits),
        ("memory of the process beyond the guest's", "KiB", |s| {
            s.beyond
        }),
        ("threads", "", |s| s.threads),
    ]
    .into_iter()
    .map(|(name, unit, value)| {
        let peers = all[1..]
            .iter()
            .map(|(peer, seen)| ((*peer).to_owned(), value(seen)));
        row(name, unit, true, value(&all[0].1), peers)
    })
    .collect();
    Ok(print_marked(&rows)?)
}

/// Koya, and what else there is, with its words.
fn monitors() -> Result<Vec<(&'static str, Vec<String>)>> {
    let words = |line: &str| {
        line.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let line = format!("{BASE_CMDLINE} {FOR_OTHERS} {WORDS}");
    let mut all = vec![(
        "koya",
        vec![
            "/bin/monitor".into(),
            KERNEL.into(),
            INITRAMFS.into(),
            WORDS.into(),
        ],
    )];
    if Path::new("/bin/firecracker").exists() {
        let config = json!({
            "boot-source": {"kernel_image_path": KERNEL, "initrd_path": INITRAMFS, "boot_args": line},
            "drives": [],
            "machine-config": {"vcpu_count": 1, "mem_size_mib": MEMORY_KIB >> 10},
        });
        fs::write("/run/firecracker.json", config.to_string())?;
        let how = "/bin/firecracker --level Off --no-api --no-seccomp --config-file /run/firecracker.json";
        all.push(("Firecracker", words(how)));
    }
    if Path::new("/bin/qemu-system-x86_64").exists() {
        let mut how = words(
            "/bin/qemu-system-x86_64 -L /share/qemu -accel kvm -cpu host \
             -M microvm,pic=off,pit=off,rtc=off,acpi=off -m 128 -nodefaults -no-user-config \
             -serial stdio -display none -no-reboot",
        );
        how.extend(["-kernel", KERNEL, "-initrd", INITRAMFS, "-append"].map(str::to_owned));
        how.push(line.clone());
        all.push(("QEMU", how));
    }
    if Path::new("/bin/cloud-hypervisor").exists() {
        let mut how = words(
            "/bin/cloud-hypervisor --cpus boot=1 --memory size=128M --serial tty --console off",
        );
        how.extend(["--kernel", KERNEL, "--initramfs", INITRAMFS, "--cmdline"].map(str::to_owned));
        how.push(line);
        all.push(("Cloud Hypervisor", how));
    }
    Ok(all)
}

fn start(words: &[String], traced: bool) -> Result<Seen> {
    let tracing = Path::new(TRACING);
    let set = |file: &str, value: &str| fs::write(tracing.join(file), value);
    if traced {
        set("trace_clock", "mono")?;
        set("events/kvm/kvm_entry/enable", "1")?;
        set("trace", "")?;
        set("tracing_on", "1")?;
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
    let mut seen = seen.map_err(|error| format!("{}: {error}", words[0]))?;
    if traced {
        set("tracing_on", "0")?;
        set("events/kvm/kvm_entry/enable", "0")?;
        let trace = fs::read_to_string(tracing.join("trace"))?;
        let entry = trace.lines().find(|line| line.contains(" kvm_entry:"));
        // `vcpu-7 [000] d... 12.345678: kvm_entry: ...`
        let entry = entry.and_then(|line| line.split(": kvm_entry:").next());
        let seconds = entry.and_then(|line| line.split_whitespace().last());
        seen.entered = seconds.ok_or("no entry in the trace")?.parse::<f64>()? * 1e3 - from;
    }
    Ok(seen)
}

/// Waits for the guest's word, then looks at the monitor.
fn look(process: &mut Child, from: f64) -> Result<Seen> {
    let output = process.stdout.take().ok_or("no output")?;
    let mut said = String::new();
    let mut lines = BufReader::new(output).lines();
    loop {
        let line = lines.next().ok_or_else(|| format!("ended: {said}"))??;
        if line.contains(UP) {
            break;
        }
        said += &line;
        said.push('\n');
    }
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
