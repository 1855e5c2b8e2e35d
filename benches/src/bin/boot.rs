//! Cost of a cold start in counted instructions: `cargo xtask bench boot`.
//!
//! `boot` measures, and starts itself again as `boot once`, the measured process: one sandbox, from exec to the end of its
//! first container. For comparison, complete runs of `koya run`, `runc run` and `crun run` with one root file system.
//! Virtual time and executed instructions are listed separately: a wait advances only the former. With `boot unconfined`,
//! also runs of `koya run --no-seccomp`: the difference is the cost of confining threads.

use koya::{ContainerConfig, Sandbox, SandboxConfig};
use koya_benches::cost::calls_of;
use koya_benches::counts::{self, cpu_us, now_ns};
use koya_benches::{median, print_marked, row};
use nix::sys::resource::{UsageWho, getrusage};
use serde_json::{Value, json};
use std::error::Error;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The first argument of the measured process.
const ONCE: &str = "once";
/// Guest memory for programs, in MiB. The total is 128, which other monitors count.
const MEMORY_MIB: u64 = 112;
/// Number of runs of each: the first fills caches; the last counts.
const RUNS: usize = 3;
/// Bundle directory, prepared by init.
const BUNDLE: &str = "/run/bundle";
const ROOTFS: &str = "/run/bundle/rootfs";
/// Number of lines of each kind in a trace.
const SHOWN: usize = 40;
/// KVM counters that are shown, if the architecture has them: all exits; those to the monitor and to the kernel's devices;
/// page faults, interrupts, halts, calls.
const KINDS: &[&str] = &[
    "exits",
    "io_exits",
    "mmio_exits",
    "mmio_exit_user",
    "mmio_exit_kernel",
    "pf_taken",
    "irq_exits",
    "halt_exits",
    "wfi_exit_stat",
    "hvc_exit_stat",
    "insn_emulation",
];
/// Page faults of the monitor, which are few: the guest's memory consists of huge pages.
const FAULTS: &str = "page faults";
/// Serial port of the instruction logger (`xtask/src/bench/profile.rs`).
const LOGGER: &str = "/dev/ttyS1";
/// Prefix of the line with the diagram of the last `koya run`, as a JSON string.
const PICTURE: &str = "picture: ";
/// The name of its container.
const RUN: &str = "hello";
/// Goals: how much confined threads may add to a run, as a factor and in millions of instructions.
const CONFINEMENT: (f64, f64) = (1.05, 2.0);

fn main() -> Result<()> {
    // Like koya.
    koya::prepare_process();
    match std::env::args().nth(1).as_deref() {
        Some(ONCE) => once(),
        Some("trace") => trace(),
        Some("profile") => profile(),
        None => measure(false),
        Some("unconfined") => measure(true),
        Some(other) => Err(format!("{other:?}: say nothing").into()),
    }
}

/// Runs one start between two messages to the instruction logger, after others that fill caches.
fn profile() -> Result<()> {
    let own = std::env::current_exe()?;
    for _ in 1..RUNS {
        cost_of(Command::new(&own).arg(ONCE))?;
    }
    say("begin")?;
    cost_of(Command::new(&own).arg(ONCE))?;
    say("end")?;
    tell_symbols()
}

/// Replies to addresses with the host function from /proc/kallsyms, until an empty line.
fn tell_symbols() -> Result<()> {
    let all = fs::read_to_string("/proc/kallsyms")?;
    let address = |line: &str| u64::from_str_radix(line.split(' ').next()?, 16).ok();
    let functions = all
        .lines()
        .filter(|line| matches!(line.split(' ').nth(1), Some("t" | "T")));
    let mut functions: Vec<(u64, &str)> = functions
        .filter_map(|line| Some((address(line)?, line)))
        .collect();
    functions.sort_unstable();
    let mut port = File::options().read(true).write(true).open(LOGGER)?;
    let mut asked = BufReader::new(port.try_clone()?);
    loop {
        let mut line = String::new();
        asked.read_line(&mut line)?;
        let Some(address) = address(line.trim()) else {
            return Ok(());
        };
        let after = functions.partition_point(|function| function.0 <= address);
        let function = functions[..after].last().map_or("", |function| function.1);
        writeln!(port, "{function} !")?;
    }
}

/// Writes a word to the second serial port and waits for a reply line.
fn say(word: &str) -> Result<()> {
    let mut port = File::options().read(true).write(true).open(LOGGER)?;
    writeln!(port, "{word}")?;
    port.read_exact(&mut [0])?;
    Ok(())
}

/// The guest kernel's initcalls by duration, and the longest gaps between its messages.
fn trace() -> Result<()> {
    let config = SandboxConfig {
        memory_mib: MEMORY_MIB,
        // Quiet: otherwise each character would wait for the serial port.
        cmdline: "quiet printk.time=1 initcall_debug log_buf_len=256K".into(),
        ..SandboxConfig::default()
    };
    let sandbox = Sandbox::start(&config)?;
    let container = ContainerConfig {
        privileged: true,
        ..ContainerConfig::new(ROOTFS, ["/bin/sh", "-c", "dmesg"])
    };
    let output = sandbox.run("c", &container)?.output()?;
    let log = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut calls: Vec<(u64, &str)> = log
        .lines()
        .filter_map(|line| {
            let (_, call) = line.split_once("initcall ")?;
            let (name, rest) = call.split_once(" returned ")?;
            let micros = rest.split_once(" after ")?.1.split(' ').next()?;
            Some((micros.parse().ok()?, name))
        })
        .collect();
    calls.sort_unstable_by(|a, b| b.cmp(a));
    let all: u64 = calls.iter().map(|call| call.0).sum();
    println!("{} init calls, {all} us in all; the dearest:", calls.len());
    for (micros, name) in calls.iter().take(SHOWN) {
        println!("{micros:>8} us  {name}");
    }
    println!("the longest gaps between messages that are not init calls:");
    let own = log
        .lines()
        .filter(|line| !line.contains("initcall ") && !line.contains("calling "));
    let own: Vec<(f64, &str)> = own.filter_map(message).collect();
    let mut gaps: Vec<_> = own
        .windows(2)
        .map(|two| (two[1].0 - two[0].0, two[0].1, two[1].1))
        .collect();
    gaps.sort_by(|a, b| b.0.total_cmp(&a.0));
    for (seconds, before, after) in gaps.iter().take(SHOWN) {
        println!(
            "{:>8.0} us  after {before:?}, before {after:?}",
            seconds * 1e6
        );
    }
    sandbox.stop();
    Ok(())
}

/// `[    0.012345] text`
fn message(line: &str) -> Option<(f64, &str)> {
    let (time, text) = line.strip_prefix('[')?.split_once("] ")?;
    Some((time.trim().parse().ok()?, text))
}

/// Number of huge pages that the host has allocated for processes since its start.
fn huge_pages() -> Result<u64> {
    let all = fs::read_to_string("/proc/vmstat")?;
    let count = all
        .lines()
        .find_map(|line| line.strip_prefix("thp_fault_alloc "));
    Ok(count.ok_or("no count of huge pages")?.parse()?)
}

fn once() -> Result<()> {
    let entered = now_ns()?;
    let config = SandboxConfig {
        memory_mib: MEMORY_MIB,
        ..SandboxConfig::default()
    };
    let sandbox = Sandbox::start(&config)?;
    let at = || -> Result<Value> {
        let (time, used) = (now_ns()?, cpu_us(UsageWho::RUSAGE_SELF)?);
        let faults = getrusage(UsageWho::RUSAGE_SELF)?.minor_page_faults();
        let mut counts = counts::of_kvm(std::process::id())?;
        counts.insert(FAULTS.into(), u64::try_from(faults)?);
        Ok(json!([time, used, counts]))
    };
    let ready = at()?;
    let container = sandbox.run("c", &ContainerConfig::new(ROOTFS, ["/bin/echo", "hello"]))?;
    let output = container.output()?;
    let ended = at()?;
    if output.stdout != b"hello\n" {
        return Err(format!("{output:?}").into());
    }
    let steps: Vec<Value> = sandbox
        .timeline()
        .steps
        .iter()
        .map(|step| json!([step.name, step.took().as_micros() as u64]))
        .collect();
    println!(
        "{}",
        json!({"entered": entered, "ready": ready, "ended": ended, "steps": steps})
    );
    sandbox.stop();
    Ok(())
}

/// Virtual milliseconds and millions of instructions of a command, and its output.
fn cost_of(command: &mut Command) -> Result<(f64, f64, String)> {
    let (before, from) = (cpu_us(UsageWho::RUSAGE_CHILDREN)?, now_ns()?);
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    let (took, cpu) = (
        now_ns()? - from,
        cpu_us(UsageWho::RUSAGE_CHILDREN)? - before,
    );
    if !output.status.success() {
        return Err(format!("{command:?}: {}", output.status).into());
    }
    let said = String::from_utf8(output.stdout)?;
    Ok((took as f64 / 1e6, cpu as f64 / 1e3, said))
}

fn measure(with_unconfined: bool) -> Result<()> {
    let mut rows = Vec::new();
    let own = std::env::current_exe()?;
    for run in 0..RUNS {
        let huge_before = huge_pages()?;
        let from = now_ns()?;
        let (_, _, said) = cost_of(Command::new(&own).arg(ONCE))?;
        if run + 1 == RUNS {
            rows.extend(rows_of(from, &serde_json::from_str(&said)?)?);
            let huge = huge_pages()? - huge_before;
            rows.push(row("cold boot: huge pages", "", true, huge as f64, []));
        }
    }
    let runs: [(&str, &[&str]); 3] = [
        (
            "koya",
            &[
                "koya",
                "run",
                "--name",
                RUN,
                "--rootfs",
                ROOTFS,
                "--",
                "/bin/echo",
                "hello",
            ],
        ),
        ("runc", &["runc", "run", "--no-pivot", "--bundle", BUNDLE]),
        ("crun", &["crun", "run", "--no-pivot", "--bundle", BUNDLE]),
    ];
    let mut costs = Vec::new();
    for (name, words) in runs {
        let mut last = (0.0, 0.0, String::new());
        for run in 0..RUNS {
            let mut command = Command::new(words[0]);
            command.args(&words[1..]);
            if name != "koya" {
                command.arg(format!("c{run}"));
            }
            last = cost_of(&mut command)?;
        }
        costs.push((name.to_owned(), last));
    }
    let peers = |value: fn(&(f64, f64, String)) -> f64| {
        let peers = costs[1..]
            .iter()
            .map(|(name, cost)| (name.clone(), value(cost)));
        peers.collect::<Vec<_>>()
    };
    let own = &costs[0].1;
    let name = "run of a container, exec to exit: executed";
    rows.push(row(name, "M instr", true, own.1, peers(|cost| cost.1)));
    let name = "run of a container, exec to exit: virtual time";
    rows.push(row(name, "ms", true, own.0, peers(|cost| cost.0)));
    if with_unconfined {
        rows.extend(confinement()?);
    }
    let (_, _, picture) = cost_of(Command::new("koya").args(["timeline", RUN, "--svg", "-"]))?;
    println!("{PICTURE}{}", serde_json::to_string(&picture)?);
    Ok(print_marked(&rows)?)
}

/// The same run with confined threads and without: instructions, and system calls of all threads.
fn confinement() -> Result<Vec<Value>> {
    let log = std::env::temp_dir().join("calls");
    let cost = |more: &[&str]| -> Result<(f64, f64)> {
        let command = || {
            let mut command = Command::new("koya");
            command.args(["run", "--name", "confined"]).args(more);
            command.args(["--rootfs", ROOTFS, "--", "/bin/echo", "hello"]);
            command
        };
        let (mut executed, mut calls) = (0.0, Vec::new());
        for _ in 0..RUNS {
            executed = cost_of(&mut command())?.1;
        }
        for _ in 0..RUNS {
            calls.push(f64::from(calls_of(&command(), &log)?.all));
        }
        Ok((executed, median(&calls)))
    };
    let (with, without) = (cost(&[])?, cost(&["--no-seccomp"])?);
    let peer = |value: f64| [("without".to_owned(), value)];
    let goal = |value: f64| [("goal".to_owned(), value)];
    // A goal is compared by a ratio.
    let added = (with.0 - without.0).max(0.001);
    let name = |what: &str| format!("run of a container with confined threads: {what}");
    Ok(vec![
        row(&name("executed"), "M instr", true, with.0, peer(without.0)),
        row(&name("system calls"), "", true, with.1, peer(without.1)),
        row(
            &name("executed, with / without"),
            "",
            true,
            with.0 / without.0,
            goal(CONFINEMENT.0),
        ),
        row(
            &name("executed in addition"),
            "M instr",
            true,
            added,
            goal(CONFINEMENT.1),
        ),
    ])
}

fn rows_of(from: u64, said: &Value) -> Result<Vec<Value>> {
    let number = |value: &Value| value.as_u64().unwrap_or(0) as f64;
    let since = |value: &Value| (number(value) - from as f64) / 1e6;
    let mut rows = vec![row(
        "cold boot: exec to main, virtual time",
        "ms",
        true,
        since(&said["entered"]),
        [],
    )];
    for (what, at) in [
        ("agent ready", &said["ready"]),
        ("container ended", &said["ended"]),
    ] {
        let name = |unit: &str| format!("cold boot: exec to {what}, {unit}");
        rows.push(row(
            &name("executed"),
            "M instr",
            true,
            number(&at[1]) / 1e3,
            [],
        ));
        rows.push(row(&name("virtual time"), "ms", true, since(&at[0]), []));
        let kinds = KINDS.iter().map(|kind| (*kind, format!("KVM {kind}")));
        let kinds = kinds.chain([(FAULTS, FAULTS.to_owned())]);
        for (kind, title) in kinds.filter(|(kind, _)| !at[2][kind].is_null()) {
            let name = format!("cold boot: exec to {what}, {title}");
            rows.push(row(&name, "", true, number(&at[2][kind]), []));
        }
    }
    for step in said["steps"].as_array().into_iter().flatten() {
        let name = format!("step: {}", step[0].as_str().unwrap_or_default());
        rows.push(row(&name, "ms", true, number(&step[1]) / 1e3, []));
    }
    Ok(rows)
}
