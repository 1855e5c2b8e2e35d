//! Koya's devices beside those of QEMU's microvm machine: the same kernel, the same guest, the same
//! disk and tap, in turns. `cargo xtask bench devices` runs it where there is a KVM.

use koya_vmm::{DiskConfig, NetConfig, Vm, VmConfig};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// The tap that all guests share, with the host's address on it.
const TAP: &str = "bench0";
const DATA_BYTES: u64 = 1 << 30;
/// How often a guest may be lost: the emulation of several CPUs kills one now and then.
const TRIES: usize = 3;
/// How long one guest may take.
const LIMIT: Duration = Duration::from_secs(300);
/// The first argument of the process that is one of Koya's guests.
const GUEST: &str = "guest";
const CMDLINE: &str = "quiet";

/// What a guest reports: its name, ours, the unit, the factor to it, whether less is better.
const FIGURES: &[(&str, &str, &str, f64, bool)] = &[
    (
        "sequential-read",
        "sequential read, 1 MiB",
        "MiB/s",
        1.0 / 1024.0,
        false,
    ),
    (
        "sequential-write",
        "sequential write, 1 MiB",
        "MiB/s",
        1.0 / 1024.0,
        false,
    ),
    ("random-read", "random read, 4 KiB", "1/s", 1.0, false),
    ("random-write", "random write, 4 KiB", "1/s", 1.0, false),
    (
        "tcp-send",
        "TCP from the guest",
        "Mbit/s",
        1.0 / 1000.0,
        false,
    ),
    (
        "tcp-receive",
        "TCP to the guest",
        "Mbit/s",
        1.0 / 1000.0,
        false,
    ),
    ("round-trip", "round trip (ping)", "ms", 1.0, true),
];

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Monitor {
    Koya,
    Qemu,
}

/// Figures by place of the disk's cache, name, and monitor: one a round.
type Results = BTreeMap<(bool, String, Monitor), Vec<f64>>;

fn main() -> Outcome<()> {
    let mut args = std::env::args().skip(1);
    match args.next().as_deref() {
        Some(GUEST) => guest(),
        Some(rounds) => compare(
            rounds.parse()?,
            &PathBuf::from(args.next().ok_or("no folder")?),
        ),
        None => Err("say `cargo xtask bench devices`".into()),
    }
}

/// Runs the guest whose configuration is on standard input, its console on standard output.
fn guest() -> Outcome<()> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let spec = VmConfig::from_toml(&text)?.check()?;
    let vm = Vm::builder(spec).console(std::io::stdout()).start()?;
    eprintln!("koya: {}", vm.wait());
    Ok(())
}

/// Where a guest finds its tools and its disk.
struct Places {
    tools: PathBuf,
    data: PathBuf,
}

fn compare(rounds: usize, tools: &Path) -> Outcome<()> {
    let scratch = match Path::new("/run/scratch").is_dir() {
        true => PathBuf::from("/run/scratch"),
        false => std::env::temp_dir(),
    };
    let places = Places {
        tools: tools.to_owned(),
        data: scratch.join(format!("koya-bench-{}.img", std::process::id())),
    };
    let compared = compare_at(rounds, &places);
    std::fs::remove_file(&places.data).ok();
    compared
}

fn compare_at(rounds: usize, places: &Places) -> Outcome<()> {
    prepare(&places.data)?;
    let mut results = Results::new();
    for round in 1..=rounds {
        // Who is first changes, so that neither always finds what the other left.
        let order = match round % 2 {
            0 => [Monitor::Qemu, Monitor::Koya],
            _ => [Monitor::Koya, Monitor::Qemu],
        };
        for direct in [false, true] {
            for monitor in order {
                let name = if monitor == Monitor::Koya {
                    "koya"
                } else {
                    "qemu"
                };
                let cache = if direct { "direct" } else { "page cache" };
                let started = Instant::now();
                eprintln!("round {round} of {rounds}: {name}, {cache}");
                for (figure, value) in measure_again(monitor, direct, places)? {
                    results
                        .entry((direct, figure, monitor))
                        .or_default()
                        .push(value);
                }
                eprintln!("  {:.0?}", started.elapsed());
            }
        }
    }
    let rows = rows(&results);
    print_table(&rows);
    println!("{}", serde_json::to_string_pretty(&rows)?);
    Ok(())
}

/// The tap, the server, and a disk whose every block is there.
fn prepare(data: &Path) -> Outcome<()> {
    let mut disk = File::create(data)?;
    let block = vec![0x5a; 1 << 20];
    for _ in 0..DATA_BYTES >> 20 {
        disk.write_all(&block)?;
    }
    disk.sync_all()?;
    run("ip", &["tuntap", "add", TAP, "mode", "tap"])?;
    run("ip", &["addr", "add", "192.0.2.1/24", "dev", TAP])?;
    run("ip", &["link", "set", TAP, "up"])?;
    run("iperf3", &["--server", "--daemon"])
}

fn run(program: &str, args: &[&str]) -> Outcome<()> {
    let status = Command::new(program)
        .args(args)
        .stdout(Stdio::null())
        .status()?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("{program} {args:?}: {status}").into()),
    }
}

fn kernel() -> PathBuf {
    let share = std::env::var_os("KOYA_SHARE").unwrap_or_else(|| "/usr/share/koya".into());
    Path::new(&share).join("vmlinux")
}

fn measure_again(monitor: Monitor, direct: bool, places: &Places) -> Outcome<Vec<(String, f64)>> {
    for _ in 1..TRIES {
        match measure(monitor, direct, places) {
            Err(error) => eprintln!("  LOST, once more: {error}"),
            figures => return figures,
        }
    }
    measure(monitor, direct, places)
}

/// One guest's life: what it reported.
fn measure(monitor: Monitor, direct: bool, places: &Places) -> Outcome<Vec<(String, f64)>> {
    let mut command = match monitor {
        Monitor::Koya => Command::new(std::env::current_exe()?),
        Monitor::Qemu => qemu(direct, places),
    };
    if monitor == Monitor::Koya {
        command.arg(GUEST);
    }
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take()
        && monitor == Monitor::Koya
    {
        stdin.write_all(toml::to_string(&config(direct, places))?.as_bytes())?;
    }
    let out = child.stdout.take().ok_or("no console")?;
    let (sender, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(out).split(b'\n').map_while(Result::ok) {
            if sender
                .send(String::from_utf8_lossy(&line).trim().to_owned())
                .is_err()
            {
                return;
            }
        }
    });
    let deadline = Instant::now() + LIMIT;
    let mut figures = Vec::new();
    let mut said = Vec::new();
    while let Ok(line) = lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        let mut words = line.split_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some("RESULT"), Some(name), Some(value)) => {
                figures.push((name.to_owned(), value.parse()?));
            }
            _ => said.push(line),
        }
    }
    child.kill().ok();
    child.wait()?;
    let wanted = FIGURES.len();
    if figures.len() != wanted {
        let said = said.join("\n");
        return Err(format!(
            "{} of {wanted} figures; the guest said:\n{said}",
            figures.len()
        )
        .into());
    }
    Ok(figures)
}

fn config(direct: bool, places: &Places) -> VmConfig {
    let disk = |path: &Path, serial: &str| DiskConfig {
        serial: serial.into(),
        ..DiskConfig::new(path)
    };
    VmConfig {
        initramfs: Some(places.tools.join("initrd")),
        cmdline: CMDLINE.into(),
        memory_mib: 512,
        disks: vec![
            DiskConfig {
                read_only: true,
                ..disk(&places.tools.join("tools.img"), "tools")
            },
            DiskConfig {
                direct,
                ..disk(&places.data, "data")
            },
        ],
        networks: vec![NetConfig {
            tap: TAP.into(),
            ..NetConfig::default()
        }],
        ..VmConfig::new(kernel())
    }
}

/// QEMU as its own documentation sets up a microvm, with the best it has for each disk.
fn qemu(direct: bool, places: &Places) -> Command {
    let mut qemu = Command::new("/usr/bin/qemu-system-x86_64");
    let drive = |id: &str, path: &Path, more: &str| {
        format!("id={id},file={},format=raw,if=none,{more}", path.display())
    };
    let cache = match direct {
        true => "cache=none,aio=io_uring",
        false => "cache=writeback,aio=io_uring",
    };
    qemu.args([
        "-M",
        "microvm,acpi=off,x-option-roms=off,rtc=off,isa-serial=on",
    ])
    .args(["-accel", "kvm", "-cpu", "host", "-m", "512", "-smp", "1"])
    .args(["-global", "virtio-mmio.force-legacy=false"])
    .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
    .args(["-serial", "stdio", "-object", "iothread,id=io"])
    .arg("-kernel")
    .arg(kernel())
    .arg("-initrd")
    .arg(places.tools.join("initrd"))
    .args([
        "-append",
        &format!("console=ttyS0 reboot=t panic=-1 i8042.noaux {CMDLINE}"),
    ])
    .args([
        "-drive",
        &drive("tools", &places.tools.join("tools.img"), "readonly=on"),
    ])
    .args(["-device", "virtio-blk-device,drive=tools,serial=tools"])
    .args(["-drive", &drive("data", &places.data, cache)])
    .args([
        "-device",
        "virtio-blk-device,drive=data,serial=data,iothread=io",
    ])
    .args([
        "-netdev",
        &format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost=off"),
    ])
    .args(["-device", "virtio-net-device,netdev=net"]);
    qemu
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn rows(results: &Results) -> Vec<Value> {
    let mut rows = Vec::new();
    for direct in [false, true] {
        for (key, name, unit, factor, less_is_better) in FIGURES {
            let network = !key.starts_with("sequential") && !key.starts_with("random");
            let figure = |monitor| {
                let values = results.get(&(direct, (*key).to_owned(), monitor))?;
                Some(median(values) * factor)
            };
            let (Some(koya), Some(qemu)) = (figure(Monitor::Koya), figure(Monitor::Qemu)) else {
                continue;
            };
            let name = match (network, direct) {
                (true, true) => continue,
                (true, false) => format!("net: {name}"),
                (false, true) => format!("blk, direct: {name}"),
                (false, false) => format!("blk, page cache: {name}"),
            };
            let ratio = if *less_is_better {
                qemu / koya
            } else {
                koya / qemu
            };
            rows.push(json!({
                "name": name, "unit": unit, "koya": round(koya),
                "peers": {"qemu": round(qemu)}, "ratio": {"qemu": round(ratio)},
            }));
        }
    }
    rows
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

fn print_table(rows: &[Value]) {
    eprintln!(
        "{:<42} {:>8} {:>12} {:>12} {:>7}",
        "", "unit", "koya", "qemu", "ratio"
    );
    for row in rows {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let number = |value: &Value| value.as_f64().unwrap_or_default();
        eprintln!(
            "{:<42} {:>8} {:>12.2} {:>12.2} {:>7.2}",
            text(&row["name"]),
            text(&row["unit"]),
            number(&row["koya"]),
            number(&row["peers"]["qemu"]),
            number(&row["ratio"]["qemu"]),
        );
    }
}
