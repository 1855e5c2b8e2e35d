//! Guests that break the rules on purpose, each beside well-behaved neighbours: a machine in the same process and one in
//! another. `cargo test -p koya-vmm --test hostile -- --nocapture` prints the latency of the neighbours. `KOYA_ATTACK_MS`
//! sets the duration of each attack.
#![cfg(target_arch = "x86_64")]

mod guests;

use guests::attacks::{ATTACKS, Attack};
use guests::program::{Program, Target};
use koya_vmm::devices::balloon::Balloon;
use koya_vmm::devices::blk::{Block, Disk, DiskOptions};
use koya_vmm::devices::fs::passthrough::Options;
use koya_vmm::devices::fs::{Fs, Shares};
use koya_vmm::devices::mem::Mem;
use koya_vmm::devices::net::{MacAddr, Net, NetOptions, Tap};
use koya_vmm::devices::rate_limit::RateLimits;
use koya_vmm::devices::rng::Rng;
use koya_vmm::devices::virtio::loop_worker::LoopWorker;
use koya_vmm::devices::virtio::{
    ActivateError, Activation, DeviceKind, EventWorker, VirtioDevice, Worker,
};
use koya_vmm::devices::vsock::{Ports, Vsock};
use koya_vmm::{ExitReason, Spec, Vm};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Latency of a neighbour's requests: their number, total and maximum.
#[derive(Clone, Copy, Default)]
struct Latency {
    count: u32,
    total: Duration,
    longest: Duration,
}

/// A neighbour's device: its driver has one request in flight at a time.
#[derive(Clone, Default)]
struct Probe(Arc<Mutex<Latency>>);

impl Probe {
    fn take(&self) -> Latency {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl VirtioDevice for Probe {
    fn kind(&self) -> DeviceKind {
        DeviceKind(0x1002)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Worker, ActivateError> {
        let (queue, seen) = (activation.take_queue(0)?, self.0.clone());
        let mut last = Instant::now();
        let worker = LoopWorker::new("probe", queue, move |_, _| {
            let took = last.elapsed();
            last += took;
            let mut seen = seen.lock().unwrap();
            seen.count += 1;
            seen.total += took;
            seen.longest = seen.longest.max(took);
            0
        });
        Ok(Worker::EventLoop(Box::new(worker)))
    }

    fn reset(&mut self, _worker: Option<EventWorker>) {}
}

fn neighbour(probe: &Probe) -> Vm {
    let target = Target::of(probe, vec![vec![0; 64]]);
    let queue = target.queues[0];
    let mut guest = Program::filled(&target);
    guest.bring_up(&target);
    let again = guest.here();
    guest.add16(queue.available + 2, 1);
    guest.notify(0);
    guest.wait_for(queue);
    guest.again(again);
    let spec = Spec::flat(guest.image());
    Vm::builder(spec).device(probe.clone()).start().unwrap()
}

const CHILD: &str = "KOYA_NEIGHBOUR";
const TEST: &str = "neighbours_live_on_beside_hostile_guests";

/// The neighbour in a separate process: answers each line with its latency since the last one.
fn be_a_neighbour() {
    let probe = Probe::default();
    let vm = neighbour(&probe);
    for _ in std::io::stdin().lines() {
        let seen = probe.take();
        println!(
            "\n@ {} {} {}",
            seen.count,
            seen.total.as_micros(),
            seen.longest.as_micros()
        );
    }
    assert_eq!(vm.stop(), ExitReason::Stopped);
}

struct Other {
    child: Child,
    answers: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Other {
    fn start() -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", TEST, "--nocapture", "--test-threads=1"])
            .env(CHILD, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, answers }
    }

    fn take(&mut self) -> Latency {
        self.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        let line = self
            .answers
            .find_map(|line| line.unwrap().strip_prefix("@ ").map(str::to_owned));
        let numbers: Vec<u64> = line
            .unwrap()
            .split(' ')
            .map(|n| n.parse().unwrap())
            .collect();
        Latency {
            count: numbers[0] as u32,
            total: Duration::from_micros(numbers[1]),
            longest: Duration::from_micros(numbers[2]),
        }
    }

    fn end(mut self) {
        drop(self.child.stdin.take());
        assert!(self.child.wait().unwrap().success());
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A FUSE request: a header with this operation and node, and its argument.
fn fuse(operation: u32, node: u64, argument: &[u32]) -> Vec<u8> {
    let [low, high] = [node as u32, (node >> 32) as u32];
    words(&[&[4096, operation, 7, 0, low, high, 0, 0, 0, 0], argument].concat())
}

/// A vsock packet to the host.
fn packet(operation: u32, from: u32, to: u32, len: u32) -> Vec<u8> {
    words(&[
        3,
        0,
        2,
        0,
        from,
        to,
        len,
        1 | operation << 16,
        u32::MAX,
        u32::MAX,
        0x8000_0000,
    ])
}

/// Time limit for a machine to stop and for its resources to be released.
const LIMIT: Duration = Duration::from_secs(30);

const ALL: u32 = u32::MAX;

/// Starts a machine with the device of this name and a guest that attacks it.
fn attack(attack: Attack, device: &str, dir: &Path) -> Vm {
    fn start(device: impl VirtioDevice + 'static, requests: Vec<Vec<u8>>, attack: Attack) -> Vm {
        let target = Target::of(&device, requests);
        let spec = Spec::flat(attack(&target).image());
        Vm::builder(spec).device(device).start().unwrap()
    }
    match device {
        "entropy" => start(Rng::default(), vec![vec![0; 16]], attack),
        "disk" => {
            let disk = Disk::open(&dir.join("disk"), DiskOptions::default()).unwrap();
            let kinds = [0, 1, 4, 8, 11, 13, 2, ALL];
            let sectors = [(0, 0), (ALL, ALL), (ALL, ALL >> 1), (2047, 0)];
            let requests = kinds.iter().zip(sectors.iter().cycle());
            let requests =
                requests.map(|(kind, at)| words(&[*kind, 0, at.0, at.1, ALL, ALL, ALL, 1]));
            start(Block::new(disk, 1).unwrap(), requests.collect(), attack)
        }
        "files" => {
            let shares = Shares::default();
            shares.add("share", dir.join("share"), false).unwrap();
            let fs = Fs::new("koya", shares, Options::default(), 1).unwrap();
            let requests = vec![
                fuse(26, 0, &[7, 38, 0, ALL, ALL]), // INIT, repeatedly
                fuse(1, 1, &[u32::from_le_bytes(*b"shar"), u32::from(b'e')]), // LOOKUP
                fuse(27, 1, &[0, 0]),               // OPENDIR, never released
                fuse(2, 1, &[ALL, ALL]),            // FORGET of more references than exist
                fuse(42, 0, &[ALL, 0, 2, 0, ALL, ALL]), // BATCH_FORGET with a false count
                fuse(28, 1, &[0, 0, 0, 0, ALL, 0, 0, 0, 0, 0]), // READDIR of 4 GiB
                fuse(16, 1, &[0, 0, ALL, ALL, ALL, 0, 0, 0, 0, 0]), // WRITE of 4 GiB
                fuse(38, ALL.into(), &[0]),         // DESTROY
            ];
            start(fs, requests, attack)
        }
        "sockets" => {
            let requests = vec![
                packet(1, 1, 1024, 0),
                packet(1, 2, 1024, ALL),
                packet(5, 1, 1024, 64 << 10),
                packet(7, 1, 1024, 0),
                packet(4, 1, 1024, 0),
                packet(3, ALL, ALL, 0),
                packet(0xffff, 9, 9, 0),
                vec![0; 12],
            ];
            start(Vsock::new(3, Ports::new().unwrap()), requests, attack)
        }
        "balloon" => {
            // Its own rings, no memory at all, the same page many times, one and a half numbers.
            let rings: Vec<u32> = (0x100..0x110).collect();
            let requests = vec![
                words(&rings),
                words(&[ALL; 64]),
                words(&[0x1f0; 64]),
                vec![1; 6],
            ];
            start(Balloon::new().unwrap(), requests, attack)
        }
        "memory" => {
            let mem = Mem::new(4 << 30, 256 << 20, 128 << 20).unwrap();
            mem.handle().set_requested(128 << 20);
            // Plug, unplug, unplug all, state: of existing and of non-existent blocks.
            let of =
                |kind: u32, low: u32, high: u32, count: u32| words(&[kind, 0, low, high, count, 0]);
            let requests = vec![
                of(0, 0, 1, 8),
                of(1, 0, 1, 4),
                of(2, 0, 0, 0),
                of(3, 0, 1, 128),
                of(0, ALL, ALL, 0xffff),
                of(1, 1, 1, 1),
                of(3, 0x1000, 0, 0),
                of(9, 0, 1, 1),
            ];
            start(mem, requests, attack)
        }
        "network" => {
            let (ours, theirs) = UnixDatagram::pair().unwrap();
            let tap = Tap::from_queues("test", vec![ours.into()]).unwrap();
            let limits = RateLimits::default;
            let options = NetOptions {
                mac: MacAddr([2; 6]),
                mtu: None,
                send_limits: limits(),
                receive_limits: limits(),
            };
            let requests = [0, 11, 12, 13, 60, 1514, 4000].map(|len| vec![0xff; len]);
            let vm = start(Net::new(tap, options).unwrap(), requests.to_vec(), attack);
            drop(theirs);
            vm
        }
        other => panic!("no device {other}"),
    }
}

const DEVICES: &[&str] = &[
    "entropy", "disk", "files", "sockets", "balloon", "memory", "network",
];

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn entries(dir: &str) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

fn row(name: &str, seen: &[Latency]) {
    let mean = |one: &Latency| one.total.as_micros() / u128::from(one.count.max(1));
    let cells = seen
        .iter()
        .map(|one| format!("{} / {}", mean(one), one.longest.as_micros()));
    println!("| {name} | {} |", cells.collect::<Vec<_>>().join(" | "));
}

/// Latency of neighbours in µs per request, on average and at most. The host's scheduling is outside the scope of this test:
/// it checks that the neighbours make progress, and that nothing grows or is left behind.
#[test]
fn neighbours_live_on_beside_hostile_guests() {
    if std::env::var_os(CHILD).is_some() {
        return be_a_neighbour();
    }
    let ms = std::env::var("KOYA_ATTACK_MS")
        .ok()
        .and_then(|text| text.parse().ok());
    let lasts = Duration::from_millis(ms.unwrap_or(100));
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("disk"), vec![0; 1 << 20]).unwrap();
    std::fs::create_dir(dir.path().join("share")).unwrap();
    let (probe, mut other) = (Probe::default(), Other::start());
    let beside = neighbour(&probe);
    let during = |probe: &Probe, other: &mut Other| {
        probe.take();
        other.take();
        std::thread::sleep(lasts);
        let mut seen = [probe.take(), other.take()];
        // They make progress, however slow the host is.
        let began = Instant::now();
        while seen.iter().any(|one| one.count == 0) {
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "a neighbour does not go on"
            );
            std::thread::sleep(lasts);
            seen = [probe.take(), other.take()];
        }
        seen
    };
    println!("| attack | same process | another process |\n|---|---|---|");
    row("none", &during(&probe, &mut other));
    // The baseline: a guest that only spins.
    let spins = Vm::builder(Spec::flat(guests::SPIN)).start().unwrap();
    row("none: it spins", &during(&probe, &mut other));
    assert_eq!(spins.stop(), ExitReason::Stopped);
    let mut before = None;
    for (name, kind) in ATTACKS {
        let mut worst = [Latency::default(); 2];
        for device in DEVICES {
            let vm = attack(*kind, device, dir.path());
            let seen = during(&probe, &mut other);
            let began = Instant::now();
            let events = vm.handle().boot_events().clone();
            let ended = vm.handle().ended();
            let reason = vm.stop();
            assert!(
                began.elapsed() < LIMIT,
                "{name}, {device}: it does not stop"
            );
            let exits = events.exits();
            println!(
                "  {device}: {reason}{}; {exits:?}",
                if ended.is_some() { ", by itself" } else { "" },
            );
            // It was brought up, at least; kicks do not exit.
            assert!(exits.mmio > 10, "{name}, {device}: {exits:?}");
            for (worst, seen) in worst.iter_mut().zip(seen) {
                worst.count += seen.count;
                worst.total += seen.total;
                worst.longest = worst.longest.max(seen.longest);
            }
            let counts = || (entries("/proc/self/fd"), entries("/proc/self/task"));
            let (there, resident) = *before.get_or_insert_with(|| (counts(), resident_kib()));
            // A joined thread takes a moment to disappear from /proc.
            while counts() != there {
                let took = began.elapsed();
                assert!(
                    took < LIMIT,
                    "{:?}, not {there:?}, after {name}, {device}",
                    counts()
                );
                std::thread::sleep(Duration::from_millis(1));
            }
            let grown = resident_kib().saturating_sub(resident);
            assert!(grown < 32 << 10, "{grown} KiB more after {name}, {device}");
        }
        row(name, &worst);
    }
    assert_eq!(beside.stop(), ExitReason::Stopped);
    other.end();
}
