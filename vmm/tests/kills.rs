//! SIGKILL at any point in the life of a machine: resources that the kernel does not reclaim must not keep the next machine
//! from starting. `KOYA_KILLS=500 KOYA_SEED=7 cargo test -p koya-vmm --test kills -- --nocapture` kills 500 times and prints
//! the phases.
#![cfg(target_arch = "x86_64")]

mod guests;

use guests::program::{Program, Target};
use koya_vmm::devices::balloon::Balloon;
use koya_vmm::devices::blk::{Block, Disk, DiskOptions};
use koya_vmm::devices::fs::passthrough::Options;
use koya_vmm::devices::fs::{Fs, Shares};
use koya_vmm::devices::net::{MacAddr, Net, NetOptions, Tap};
use koya_vmm::devices::rate_limit::RateLimits;
use koya_vmm::devices::rng::Rng;
use koya_vmm::devices::vsock::{Ports, UnixSockets, Vsock};
use koya_vmm::{ExitReason, Spec, Vm};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

const TEST: &str = "a_monitor_killed_at_any_point_leaves_nothing_in_the_way";
/// The directory of a monitor's files.
const DIR: &str = "KOYA_KILLS_DIR";
/// Set for the monitor that is not killed.
const ONCE: &str = "KOYA_KILLS_ONCE";
const PHASES: [&str; 5] = [
    "before the first",
    "opening files",
    "building",
    "running",
    "stopping",
];

/// A machine with a device of each kind, whose guest brings up and resets its disk in an endless loop.
fn machine(dir: &Path, phase: &dyn Fn(u8)) {
    phase(1);
    let disk = Disk::open(&dir.join("disk"), DiskOptions::default()).unwrap();
    let disk = Block::new(disk, 1).unwrap();
    let target = Target::of(&disk, vec![vec![0; 16]]);
    let mut guest = Program::filled(&target);
    let again = guest.here();
    guest.bring_up(&target);
    guest.store16(target.queues[0].used + 2, 0);
    guest.store16(target.queues[0].available + 2, 8);
    guest.notify(0);
    guest.again(again);
    let shares = Shares::default();
    shares.add("share", dir.join("share"), false).unwrap();
    let ports = Ports::new().unwrap();
    let sockets = UnixSockets::listen(&ports, dir.join("vsock")).unwrap();
    let mut builder = Vm::builder(Spec::flat(guest.image()))
        .device(disk)
        .device(Fs::new("koya", shares, Options::default(), 1).unwrap())
        .device(Vsock::new(3, ports))
        .device(Balloon::new().unwrap())
        .device(Rng::default());
    // A new tap, where this user may create one, and only sometimes: it takes longer than all the rest.
    if std::process::id().is_multiple_of(4)
        && let Ok(tap) = Tap::open("", 1)
    {
        let limits = RateLimits::default;
        let (mac, mtu) = (MacAddr([2; 6]), None);
        let options = NetOptions {
            mac,
            mtu,
            send_limits: limits(),
            receive_limits: limits(),
        };
        builder = builder.device(Net::new(tap, options).unwrap());
    }
    phase(2);
    let vm = builder.start_paused().unwrap();
    phase(3);
    vm.handle().resume();
    std::thread::sleep(Duration::from_millis(10));
    phase(4);
    assert_eq!(vm.stop(), ExitReason::Stopped);
    drop(sockets);
}

/// One machine after the other, until it is killed.
fn be_a_monitor(dir: &Path) {
    let file = File::options().write(true).open(dir.join("phase")).unwrap();
    let phase = |number: u8| file.write_all_at(&[number], 0).unwrap();
    loop {
        machine(dir, &phase);
        if std::env::var_os(ONCE).is_some() {
            return;
        }
    }
}

fn monitor(dir: &Path, once: bool) -> Child {
    let program = std::env::current_exe().unwrap();
    monitor_by(Command::new(program), dir, once)
}

fn monitor_by(mut command: Command, dir: &Path, once: bool) -> Child {
    command
        .args(["--exact", TEST, "--test-threads=1"])
        .env(DIR, dir);
    if once {
        command.env(ONCE, "1");
    }
    command.stdout(std::process::Stdio::null()).spawn().unwrap()
}

fn prepare(dir: &Path) {
    fs::write(dir.join("disk"), vec![0; 1 << 20]).unwrap();
    fs::write(dir.join("phase"), [0]).unwrap();
    fs::create_dir(dir.join("share")).unwrap();
}

fn names(dir: &str) -> BTreeSet<PathBuf> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect()
}

/// Resources on the host that a monitor could leave behind: mounts, interfaces, listening sockets, children and descriptors
/// of this process.
fn surroundings(dir: &Path) -> Vec<(&'static str, BTreeSet<PathBuf>)> {
    let lines = |file: &str, with: &str| {
        let text = fs::read_to_string(file).unwrap();
        text.lines()
            .filter(|line| line.contains(with))
            .map(PathBuf::from)
            .collect()
    };
    let children = fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    vec![
        ("mounts", lines("/proc/self/mountinfo", "")),
        ("interfaces", names("/sys/class/net")),
        ("sockets", lines("/proc/net/unix", dir.to_str().unwrap())),
        (
            "children",
            children.split_whitespace().map(PathBuf::from).collect(),
        ),
        ("descriptors", names("/proc/self/fd")),
    ]
}

/// Other programs on this host may add and remove mounts and interfaces meanwhile.
fn nothing_is_left(dir: &Path, before: &[(&str, BTreeSet<PathBuf>)], after: &str) {
    let began = Instant::now();
    while surroundings(dir) != before {
        let now = surroundings(dir);
        assert!(
            began.elapsed() < FAULT_LIMIT,
            "{after}: {now:?}, not {before:?}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

#[test]
fn a_monitor_killed_at_any_point_leaves_nothing_in_the_way() {
    if let Some(dir) = std::env::var_os(DIR) {
        return be_a_monitor(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepare(dir);
    let (kills, mut seed) = (
        number("KOYA_KILLS").unwrap_or(40),
        number("KOYA_SEED").unwrap_or(1),
    );
    let before = surroundings(dir);
    let mut phases = BTreeMap::new();
    for kill in 0..kills {
        fs::write(dir.join("phase"), [0]).unwrap();
        let mut child = monitor(dir, false);
        // Knuth's generator: any distribution will do, but it must be reproducible.
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        std::thread::sleep(Duration::from_micros((seed >> 33) % 60_000));
        child.kill().unwrap();
        let ended = child.wait().unwrap();
        assert_eq!(
            ended.code(),
            None,
            "kill {kill}: it ended by itself: {ended}"
        );
        *phases
            .entry(fs::read(dir.join("phase")).unwrap()[0])
            .or_insert(0) += 1;
        nothing_is_left(dir, &before, &format!("kill {kill}"));
    }
    // Neither the socket nor the disk of the killed monitors is in the way.
    assert!(monitor(dir, true).wait().unwrap().success());
    for (phase, count) in phases {
        println!("| {} | {count} |", PHASES[usize::from(phase)]);
    }
    let mut left: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["disk", "phase", "share"]);
}

/// Host system calls and the errors injected into them. `strace(1)` makes the n-th call of each thread fail.
const FAULTS: &[(&str, &str)] = &[
    ("openat", "EMFILE"),
    ("openat", "ENOMEM"),
    ("open_tree", "EMFILE"),
    ("statx", "EIO"),
    ("fcntl", "EMFILE"),
    ("eventfd2", "EMFILE"),
    ("epoll_create1", "EMFILE"),
    ("epoll_ctl", "ENOSPC"),
    ("epoll_wait", "ENOMEM"),
    ("socketpair", "EMFILE"),
    ("socket", "EMFILE"),
    ("bind", "ENOSPC"),
    ("madvise", "ENOMEM"),
    ("clone3", "EAGAIN"),
    ("unshare", "EPERM"),
    ("seccomp", "EINVAL"),
    ("prctl", "EPERM"),
    ("io_uring_setup", "ENOMEM"),
    ("io_uring_register", "ENOMEM"),
    ("io_uring_enter", "EIO"),
    ("ioctl", "ENOMEM"),
    ("ioctl", "EIO"),
    ("read", "EIO"),
    ("write", "ENOSPC"),
    ("preadv", "EIO"),
    ("pwritev", "ENOSPC"),
    ("unlink", "EIO"),
];

/// Maximum n: each call fails at its first, second, ... invocation.
const TIMES: u64 = 24;
const FAULT_LIMIT: Duration = Duration::from_secs(60);

#[test]
#[ignore = "takes minutes, and strace(1)"]
fn a_host_that_fails_at_any_call_is_an_error_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepare(dir);
    let before = surroundings(dir);
    println!("| call | error | went on | an error | an abort |\n|---|---|---|---|---|");
    for (call, error) in FAULTS {
        let mut outcomes = [0; 3];
        for time in 1..=number("KOYA_FAULTS").unwrap_or(TIMES) {
            fs::write(dir.join("phase"), [0]).unwrap();
            let mut strace = Command::new("strace");
            strace.args(["-f", "-qq", "-o", "/dev/null", "--trace", call]);
            // Another call stands in for the one that fails: a seccomp filter would see the number -1, which is a violation.
            let how = format!("--inject={call}:error={error}:when={time}:syscall=gettid");
            strace.arg(how).env_remove("RUST_BACKTRACE");
            strace.arg(std::env::current_exe().unwrap());
            let mut child = monitor_by(strace, dir, true);
            let began = Instant::now();
            let ended = loop {
                if let Some(status) = child.try_wait().unwrap() {
                    break status;
                }
                assert!(
                    began.elapsed() < FAULT_LIMIT,
                    "{call}: {error} at {time}: it hangs"
                );
                std::thread::sleep(Duration::from_millis(5));
            };
            nothing_is_left(dir, &before, &format!("{call}: {error} at {time}"));
            // A failure while the program was being loaded tells nothing about it.
            if fs::read(dir.join("phase")).unwrap() == [0] {
                continue;
            }
            match (ended.code(), ended.signal()) {
                (Some(0), _) => outcomes[0] += 1,
                // A panic of this test: an operation returned its error.
                (Some(101), _) => outcomes[1] += 1,
                // An allocation without memory.
                (_, Some(6)) | (Some(134), _) => outcomes[2] += 1,
                _ => panic!("{call}: {error} at {time}: {ended}"),
            }
        }
        let [on, failed, killed] = outcomes;
        println!("| {call} | {error} | {on} | {failed} | {killed} |");
    }
    assert!(monitor(dir, true).wait().unwrap().success());
}
