//! Koya's devices compared with those of QEMU's microvm machine, or with the same ones on unconfined threads: the same kernel,
//! guest, disk, tap and files, alternating. Run by `cargo xtask bench devices` on a host with KVM.

mod figures;
mod guest;

use figures::Results;
use guest::{Counting, Guest, Monitor, Places, Set, VSOCK_PORT};
use std::error::Error;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use vsock::{VMADDR_CID_ANY, VsockListener};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// The tap shared by all guests, with the host's address on it.
const TAP: &str = "bench0";
const DATA_BYTES: u64 = 1 << 30;
/// Maximum number of attempts for a guest: an emulated host occasionally crashes one.
const TRIES: usize = 3;
/// Time limit for one guest.
const LIMIT: Duration = Duration::from_secs(1800);
/// Time limit for freed memory to return to the host.
const BACK_LIMIT: Duration = Duration::from_secs(120);

fn main() -> Outcome<()> {
    let mut args = std::env::args().skip(1);
    let first = args.next().ok_or("say `cargo xtask bench devices`")?;
    if first == guest::ARGUMENT {
        return guest::main(args);
    }
    let tools = PathBuf::from(args.next().ok_or("no directory")?);
    let peer = match args.next().as_deref() {
        Some("qemu") => Monitor::Qemu,
        Some("unconfined") => Monitor::Unconfined,
        other => return Err(format!("{other:?} is no peer").into()),
    };
    let only = args.next();
    let wanted = |set: &Set| only.as_deref().is_none_or(|only| set.name().contains(only));
    let sets: Vec<Set> = Set::ALL.into_iter().filter(wanted).collect();
    if sets.is_empty() {
        let names: Vec<_> = Set::ALL.iter().map(|set| set.name()).collect();
        return Err(format!("--only fits none of: {}", names.join("; ")).into());
    }
    compare(first.parse()?, &sets, &tools, peer)
}

fn compare(rounds: usize, sets: &[Set], tools: &Path, peer: Monitor) -> Outcome<()> {
    let scratch = match Path::new("/run/scratch").is_dir() {
        true => PathBuf::from("/run/scratch"),
        false => std::env::temp_dir(),
    };
    let run = scratch.join(format!("koya-bench-{}", std::process::id()));
    let places = Places {
        tools: tools.to_owned(),
        data: run.join("data.img"),
        shared: run.join("shared/dir"),
        run: run.clone(),
    };
    let compared = compare_at(rounds, sets, &places, peer);
    std::fs::remove_dir_all(&run).ok();
    compared
}

fn compare_at(rounds: usize, sets: &[Set], places: &Places, peer: Monitor) -> Outcome<()> {
    prepare(sets, places)?;
    let mut results = Results::new();
    for round in 1..=rounds {
        // The order alternates, so that neither always starts from the other's state.
        let order = match round % 2 {
            0 => [peer, Monitor::Koya],
            _ => [Monitor::Koya, peer],
        };
        for set in sets {
            for monitor in order {
                let started = Instant::now();
                eprintln!("round {round} of {rounds}: {monitor:?}, {}", set.name());
                for (figure, value) in measure_again(monitor, *set, Counting::Exits, places)? {
                    let key = (*set, figure, monitor);
                    results.entry(key).or_default().push(value);
                }
                eprintln!("  {:.0?}", started.elapsed());
            }
        }
    }
    let counted = sets
        .iter()
        .filter(|set| [Set::Cached, Set::Files].contains(set));
    for set in counted {
        for monitor in [Monitor::Koya, peer] {
            eprintln!("system calls: {monitor:?}, {}", set.name());
            let figures = measure_again(monitor, *set, Counting::Calls, places)?;
            for (figure, value) in figures
                .into_iter()
                .filter(|(name, _)| name.ends_with(CALLS))
            {
                results.insert((*set, figure, monitor), vec![value]);
            }
        }
    }
    let rows = figures::rows(&results, peer);
    koya_benches::print_table(&rows);
    println!("{}", serde_json::to_string_pretty(&rows)?);
    Ok(())
}

/// Prepares the tap, the servers, the shared directory, and a fully allocated disk.
fn prepare(sets: &[Set], places: &Places) -> Outcome<()> {
    std::fs::create_dir_all(&places.shared)?;
    // It may be mounted already; if it can't be mounted, exits are not counted.
    run("mount", &["-t", "debugfs", "none", DEBUGFS]).ok();
    if sets.contains(&Set::Cached) || sets.contains(&Set::Direct) {
        let mut disk = File::create(&places.data)?;
        let block = vec![0x5a; 1 << 20];
        for _ in 0..DATA_BYTES >> 20 {
            disk.write_all(&block)?;
        }
        disk.sync_all()?;
    }
    if sets.contains(&Set::Cached) {
        run("ip", &["tuntap", "add", TAP, "mode", "tap"])?;
        run("ip", &["addr", "add", "192.0.2.1/24", "dev", TAP])?;
        run("ip", &["link", "set", TAP, "up"])?;
        run("iperf3", &["--server", "--daemon"])?;
    }
    if sets.contains(&Set::Sockets) {
        let socket = UnixListener::bind(format!("{}_{VSOCK_PORT}", places.vsock().display()))?;
        let kernel = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, VSOCK_PORT)?;
        std::thread::spawn(move || socket.incoming().flatten().for_each(serve));
        std::thread::spawn(move || kernel.incoming().flatten().for_each(serve));
    }
    Ok(())
}

/// The host's end of a vsock connection. The first byte from the guest selects the operation: receive (`s`), send a number
/// of MiB (`r`, followed by the number), echo (`e`), or nothing.
fn serve(mut stream: impl Read + Write + Send + 'static) {
    std::thread::spawn(move || -> std::io::Result<()> {
        let mut buffer = vec![0; 256 << 10];
        stream.read_exact(&mut buffer[..2])?;
        let (wish, mib) = (buffer[0], buffer[1]);
        match wish {
            b'r' => {
                for _ in 0..u32::from(mib) * 4 {
                    stream.write_all(&buffer)?;
                }
            }
            b'e' => loop {
                let count = stream.read(&mut buffer)?;
                if count == 0 {
                    break;
                }
                stream.write_all(&buffer[..count])?;
            },
            _ => while stream.read(&mut buffer)? > 0 {},
        }
        // Tells the guest that everything has arrived.
        stream.write_all(b".")
    });
}

fn run(program: &str, args: &[&str]) -> Outcome<()> {
    let status = Command::new(program)
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("{program} {args:?}: {status}").into()),
    }
}

fn measure_again(
    monitor: Monitor,
    set: Set,
    counting: Counting,
    places: &Places,
) -> Outcome<Vec<(String, f64)>> {
    for _ in 1..TRIES {
        match measure(monitor, set, counting, places) {
            Err(error) => eprintln!("  LOST, once more: {error}"),
            figures => return figures,
        }
    }
    measure(monitor, set, counting, places)
}

/// Suffix of the names of counts.
const EXITS: &str = ".exits";
const CALLS: &str = ".calls";

const DEBUGFS: &str = "/sys/kernel/debug";

/// All exits of all guests so far, if the host kernel counts them.
fn exits() -> Option<f64> {
    let text = std::fs::read_to_string(format!("{DEBUGFS}/kvm/exits")).ok()?;
    text.trim().parse().ok()
}

/// Runs one guest; returns the figures that it reported, and those observed from outside.
///
/// The guest prints `RESULT name value`; `COUNT name` before and `COUNTED name operations` after operations whose exits are
/// counted; `FILLED` with its memory in use and `FREED name` after freeing it.
fn measure(
    monitor: Monitor,
    set: Set,
    counting: Counting,
    places: &Places,
) -> Outcome<Vec<(String, f64)>> {
    let guest = Guest::start(monitor, set, counting, places)?;
    let deadline = Instant::now() + LIMIT;
    let mut figures = Vec::new();
    let mut said = Vec::new();
    let (mut tracer, mut counted, mut empty, mut full) = (None, None, 0, 0);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(line) = guest.lines.recv_timeout(left) else {
            break;
        };
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["RESULT", name, value] => {
                eprintln!("  {name} {value}");
                figures.push(((*name).to_owned(), value.parse()?));
            }
            ["COUNT", _] if counting == Counting::Calls => tracer = Some(guest.trace(places)?),
            ["COUNT", _] => counted = exits(),
            ["COUNTED", name, operations] => {
                let operations: f64 = operations.parse()?;
                if let Some(tracer) = tracer.take() {
                    figures.push((format!("{name}{CALLS}"), tracer.stop()? / operations));
                }
                if let (Some(before), Some(after)) = (counted.take(), exits()) {
                    figures.push((format!("{name}{EXITS}"), (after - before) / operations));
                }
            }
            ["EMPTY"] => empty = guest.resident()?,
            ["FILLED"] => full = guest.resident()?,
            ["FREED", name] => {
                figures.push(((*name).to_owned(), until_back(&guest, empty, full)?));
                break;
            }
            ["MEASURED"] => break,
            [] => {}
            _ => {
                eprintln!("  {line}");
                said.push(line);
            }
        }
    }
    match figures::is_missing(set, monitor, &figures) {
        None => Ok(figures),
        Some(key) => Err(format!("no {key}; the guest said:\n{}", said.join("\n")).into()),
    }
}

/// Seconds until nine tenths of the memory used by a guest have been returned.
fn until_back(guest: &Guest, empty: u64, full: u64) -> Outcome<f64> {
    let started = Instant::now();
    let enough = full - full.saturating_sub(empty) / 10 * 9;
    while guest.resident()? > enough {
        if started.elapsed() > BACK_LIMIT {
            let left = guest.resident()? >> 20;
            return Err(format!("{left} MiB after {BACK_LIMIT:?}").into());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(started.elapsed().as_secs_f64())
}
