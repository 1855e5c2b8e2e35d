//! Host memory used by sandboxes, and the cost of creating many: `cargo xtask bench memory` runs it on a host for Linux
//! guests, `cargo xtask bench many` on the instruction-counting host.
//!
//! - `memory held DIRECTORY`: the monitor with a serial port (the example `boot` of `koya-vmm`, in DIRECTORY), and
//!   whole sandboxes, at rest and after work
//! - `memory many COUNTS`: this many whole sandboxes at once, created one after the other
//! - `memory sandbox SET`: one of them; a line on standard input makes it work, end of file ends it
//!
//! A table is printed on standard error, rows as JSON on standard output. If instructions are the clock, each counts as a
//! nanosecond of CPU time.

use koya::{ContainerConfig, DiskConfig, HostEnd, NetworkConfig, Sandbox, SandboxConfig};
use koya_benches::process_memory::{self, Group, ProcessMemory};
use koya_benches::{print_marked, print_table, row, tiny};
use serde_json::Value;
use std::error::Error;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Memory of each guest, in MiB.
const MEMORY_MIB: u64 = 128;
/// Goals for private memory and page tables, in KiB: of the monitor with a serial port, and of a whole sandbox with network,
/// files and vsock.
const MONITOR_GOAL: f64 = 3.0 * 1024.0;
const SANDBOX_GOAL: f64 = 5.0 * 1024.0;
/// Goal for the cost of a sandbox among fifty, relative to one alone.
const MANY_GOAL: f64 = 1.1;
/// Time for a guest to come to rest before its memory is measured.
const REST: Duration = Duration::from_secs(3);

type Change = fn(&mut SandboxConfig);

/// Configurations of a sandbox beyond files, vsock, a balloon, entropy and a console.
const SETS: &[(&str, Change)] = &[
    ("files, vsock", |_| {}),
    ("files, vsock, network", |config| {
        config.networks.push(NetworkConfig::new(HostEnd::Tap {
            name: String::new(),
            address: None,
        }));
    }),
    ("files, vsock, disk", |config| {
        config.disks.push(DiskConfig {
            read_only: true,
            ..DiskConfig::new("/dev/vda")
        });
    }),
    ("files, vsock, room for 4 GiB", |config| {
        config.memory_max_mib = Some(config.memory_mib + 4096);
    }),
    ("files, vsock, 4 CPUs", |config| config.cpus = 4),
];
/// Index of the configuration that the goals apply to.
const WHOLE: usize = 1;
/// Work of a container: reads files, starts processes.
const WORK: &str = "for n in 1 2 3; do cat /bin/busybox > /dev/null; done; \
                    for n in 1 2 3 4 5; do ls -lR / > /dev/null 2>&1; done; true";

fn main() -> Result<()> {
    // Like koya.
    koya::prepare_process();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let rows = match words.as_slice() {
        ["sandbox", set] => return sandbox(set.parse()?),
        ["held", directory] => memory(Path::new(directory))?,
        ["many", counts] => return Ok(print_marked(&many(counts)?)?),
        _ => return Err("say `held DIRECTORY` or `many COUNTS`".into()),
    };
    print_table(&rows);
    println!("{}", serde_json::to_string_pretty(&rows)?);
    Ok(())
}

/// Runs one sandbox, controlled by standard input.
fn sandbox(set: usize) -> Result<()> {
    let mut config = SandboxConfig {
        memory_mib: MEMORY_MIB,
        ..SandboxConfig::default()
    };
    (SETS.get(set).ok_or("no such set")?.1)(&mut config);
    let sandbox = Sandbox::start(&config)?;
    println!("ready");
    for (number, line) in std::io::stdin().lines().enumerate() {
        let rootfs = line?;
        let container = ContainerConfig::new(rootfs, ["/bin/sh", "-c", WORK]);
        let output = sandbox.run(&format!("c{number}"), &container)?.output()?;
        println!("{}", output.status);
    }
    sandbox.stop();
    Ok(())
}

/// A sandbox in a separate process.
struct Running {
    process: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    group: Option<Group>,
}

impl Running {
    fn start(set: usize) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["sandbox", &set.to_string()]);
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let group = Group::with(process.id()).ok();
        let output = process.stdout.take().ok_or("no output")?;
        let mut running = Self {
            input: process.stdin.take(),
            process,
            output: BufReader::new(output),
            group,
        };
        running.expect("ready")?;
        Ok(running)
    }

    fn expect(&mut self, word: &str) -> Result<()> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        match line.trim() == word {
            true => Ok(()),
            false => Err(format!("{line:?} instead of {word:?}").into()),
        }
    }

    fn work(&mut self, rootfs: &Path) -> Result<()> {
        let input = self.input.as_mut().ok_or("no input")?;
        writeln!(input, "{}", rootfs.display())?;
        self.expect("0")
    }

    fn held(&self) -> Result<ProcessMemory> {
        Ok(process_memory::of(self.process.id(), MEMORY_MIB << 10)?)
    }

    /// Kernel memory of the process, in KiB, if the host provides it.
    fn kernel(&self) -> Option<u64> {
        self.group.as_ref()?.kernel().ok()
    }

    /// CPU time so far, and the guest's part of it, in milliseconds.
    fn cpu_ms(&self) -> Result<(f64, f64)> {
        let proc = PathBuf::from(format!("/proc/{}", self.process.id()));
        let mut nanos = 0;
        for thread in fs::read_dir(proc.join("task"))? {
            let text = fs::read_to_string(thread?.path().join("schedstat"))?;
            nanos += text.split(' ').next().unwrap_or("0").parse::<u64>()?;
        }
        // proc(5): guest_time is the 43rd, in hundredths of a second; after the name, which may have
        // blanks, it is the 41st.
        let stat = fs::read_to_string(proc.join("stat"))?;
        let (_, rest) = stat.rsplit_once(')').ok_or("no stat")?;
        let guest = rest.split_whitespace().nth(40).unwrap_or("0");
        Ok((nanos as f64 / 1e6, guest.parse::<f64>()? * 10.0))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.input.take());
        self.process.wait().ok();
        self.group.take();
    }
}

fn rootfs() -> Result<PathBuf> {
    let dir = std::env::temp_dir().join(format!("koya-memory-{}", std::process::id()));
    let bin = dir.join("bin");
    fs::create_dir_all(&bin)?;
    fs::copy("/bin/busybox", bin.join("busybox"))?;
    for name in ["sh", "cat", "ls"] {
        symlink("busybox", bin.join(name))?;
    }
    Ok(dir)
}

fn memory(directory: &Path) -> Result<Vec<Value>> {
    let dir = rootfs()?;
    let mut rows = Vec::new();
    monitor(directory, &dir, &mut rows)?;
    for (set, (name, _)) in SETS.iter().enumerate() {
        let mut running = match Running::start(set) {
            Ok(running) => running,
            Err(error) if set == WHOLE => return Err(error),
            Err(error) => {
                eprintln!("{name}: not here: {error}");
                continue;
            }
        };
        std::thread::sleep(REST);
        let goal = (set == WHOLE).then_some(SANDBOX_GOAL);
        let name = format!("sandbox, {name}");
        add(
            &mut rows,
            &format!("{name}: at rest"),
            &running.held()?,
            goal,
            running.kernel(),
        );
        if set == WHOLE {
            running.work(&dir)?;
            let name = format!("{name}: after work");
            add(&mut rows, &name, &running.held()?, goal, running.kernel());
        }
    }
    fs::remove_dir_all(&dir)?;
    Ok(rows)
}

/// The monitor without a sandbox, with a guest that halts.
fn monitor(directory: &Path, dir: &Path, rows: &mut Vec<Value>) -> Result<()> {
    let guest = dir.join("guest");
    tiny::write_idle_guest(&guest)?;
    let mut process = Command::new(directory.join("boot")).arg(&guest).spawn()?;
    let group = Group::with(process.id()).ok();
    std::thread::sleep(REST);
    let held = process_memory::of(process.id(), MEMORY_MIB << 10);
    let kernel = group.as_ref().and_then(|group| group.kernel().ok());
    process.kill()?;
    process.wait()?;
    add(
        rows,
        "monitor, serial port",
        &held?,
        Some(MONITOR_GOAL),
        kernel,
    );
    Ok(())
}

fn add(
    rows: &mut Vec<Value>,
    name: &str,
    held: &ProcessMemory,
    goal: Option<f64>,
    kernel: Option<u64>,
) {
    let mut figure = |what: &str, kib: u64, goal: Option<f64>| {
        let goal = goal.map(|goal| ("goal".to_owned(), goal));
        rows.push(row(
            &format!("{name}: {what}"),
            "KiB",
            true,
            kib as f64,
            goal,
        ));
    };
    let both = held.private + held.page_tables;
    figure("private and page tables", both, goal);
    for (kind, kib) in &held.kinds {
        figure(&format!("private: {kind}"), *kib, None);
    }
    figure("page tables", held.page_tables, None);
    if let Some(kernel) = kernel {
        figure("the kernel's memory for it", kernel, None);
    }
    figure("RSS without the guest", held.rss - held.guest, None);
    figure("the guest's pages", held.guest, None);
}

/// Cost per sandbox when this many run at once: they are created one after the other, and none ends before the last one.
/// (After guests have ended, an emulated host is slow for a long time, since it had translated code in their memory.)
fn many(counts: &str) -> Result<Vec<Value>> {
    let mut counts = counts
        .split(',')
        .map(str::parse)
        .collect::<std::result::Result<Vec<usize>, _>>()?;
    counts.sort_unstable();
    let mut rows = Vec::new();
    let mut first: Option<[f64; 3]> = None;
    // The first one fills the host's caches.
    drop(Running::start(WHOLE)?);
    let mut all = Vec::new();
    let (mut cpu, mut guest) = (0.0, 0.0);
    for number in 1..=counts.last().copied().unwrap_or_default() {
        let running = Running::start(WHOLE)?;
        let used = running.cpu_ms()?;
        eprintln!("number {number}: {:.1} ms", used.0);
        (cpu, guest) = (cpu + used.0, guest + used.1);
        all.push(running);
        if !counts.contains(&number) {
            continue;
        }
        std::thread::sleep(REST);
        let (mut private, mut kernel) = (0, 0);
        for running in &all {
            let held = running.held()?;
            private += held.private + held.page_tables;
            kernel += running.kernel().unwrap_or(0);
        }
        let each = |sum: f64| sum / number as f64;
        let values = [each(cpu), each(cpu - guest), each(private as f64)];
        let is_first = first.is_none();
        let alone = *first.get_or_insert(values);
        let names = [
            ("CPU to make one", "ms"),
            ("CPU to make one, without the guest's", "ms"),
            ("private and page tables of one", "KiB"),
        ];
        for (((name, unit), value), alone) in names.into_iter().zip(values).zip(alone) {
            let goal = ("goal".to_owned(), alone * MANY_GOAL);
            let goal = (!is_first).then_some(goal);
            let name = format!("{number} at once: {name}");
            rows.push(row(&name, unit, true, value, goal));
        }
        let name = format!("{number} at once: the kernel's memory for one");
        rows.push(row(&name, "KiB", true, each(kernel as f64), []));
    }
    Ok(rows)
}
