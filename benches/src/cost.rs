//! Cost of a process, from exec to exit.

use crate::counts::cpu_us;
use nix::sys::resource::UsageWho;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Cost of one run of a process.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// User and system time of it and its children, in microseconds.
    pub cpu_us: f64,
    /// From the call to its end, in microseconds.
    pub wall_us: f64,
}

/// Runs a command with its output discarded and returns its cost.
///
/// # Errors
/// If it can't be run, or ends with another status than `expected`.
pub fn cost_of(command: &mut Command, expected: i32) -> Result<Cost> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let (before, started) = (cpu_us(UsageWho::RUSAGE_CHILDREN)?, Instant::now());
    let status = command.status()?;
    let wall_us = started.elapsed().as_secs_f64() * 1e6;
    let cpu_us = (cpu_us(UsageWho::RUSAGE_CHILDREN)? - before) as f64;
    if status.code() != Some(expected) {
        return Err(format!("{command:?}: {status}").into());
    }
    Ok(Cost { cpu_us, wall_us })
}

/// Peak memory of a command, in KiB. It is started by GNU time, which is small (1 MiB): the memory of the starting process
/// is counted as well.
///
/// # Errors
/// If it can't be run, or time does not report the figure.
pub fn peak_rss(command: &Command) -> Result<f64> {
    let mut time = Command::new("time");
    time.args(["--format", "peak %M"]);
    time.arg(command.get_program()).args(command.get_args());
    let output = time.stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    let peak = said.lines().find_map(|line| line.strip_prefix("peak "));
    let peak: f64 = peak.ok_or("time says nothing")?.trim().parse()?;
    Ok(peak)
}

/// Results of strace for a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    /// System calls between execve's return and the first KVM_RUN, of all threads.
    pub before_run: u32,
    /// All of them.
    pub all: u32,
    /// Maximum number of threads and processes alive at once, including the first.
    pub threads: u32,
}

/// Runs a command under strace.
///
/// # Errors
/// If strace can't be run.
pub fn calls_of(command: &Command, log: &Path) -> Result<Calls> {
    let mut strace = Command::new("strace");
    strace.args(["--follow-forks", "--output"]).arg(log);
    strace.arg("--").arg(command.get_program());
    strace.args(command.get_args());
    strace.stdin(Stdio::null()).stdout(Stdio::null());
    strace.stderr(Stdio::null()).status()?;
    Ok(count(&fs::read_to_string(log)?))
}

/// Each line is `PID call(...) = result`; an interrupted call has a second line.
fn count(log: &str) -> Calls {
    let mut calls = Calls {
        threads: 1,
        ..Calls::default()
    };
    let (mut alive, mut runs) = (1, false);
    // The first line is strace's own, before the program's first instruction.
    for line in log.lines().skip(1) {
        let Some((_, call)) = line.split_once(' ') else {
            continue;
        };
        let call = call.trim_start();
        if call.starts_with("+++ ") {
            alive -= 1;
            continue;
        }
        if ["clone", "fork", "vfork"].iter().any(|c| call.contains(c)) && makes_one(call) {
            alive += 1;
            calls.threads = calls.threads.max(alive);
        }
        if call.starts_with("<... ") || call.starts_with("--- ") {
            continue;
        }
        runs |= call.contains(", KVM_RUN");
        calls.all += 1;
        calls.before_run += u32::from(!runs);
    }
    calls
}

/// Whether a line contains the result of a call, and that is a PID.
fn makes_one(call: &str) -> bool {
    let result = call.rsplit_once(") = ").map(|(_, result)| result);
    result.is_some_and(|result| result.trim().parse::<u32>().is_ok_and(|pid| pid > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_up_to_the_first_entry_of_the_guest() {
        let log = "7 execve(\"/a\", [\"/a\"], 0x7 /* 3 vars */) = 0\n\
                   7 brk(NULL) = 0x5\n\
                   7 clone3({flags=CLONE_VM}, 88 <unfinished ...>\n\
                   8 rseq(0x7f, 0x20, 0, 0x53) = 0\n\
                   7 <... clone3 resumed> => {parent_tid=[8]}, 88) = 8\n\
                   8 ioctl(14, KVM_RUN, 0) = 0\n\
                   8 exit(0) = ?\n\
                   8 +++ exited with 0 +++\n\
                   7 clone3({flags=CLONE_VM} => {parent_tid=[9]}, 88) = 9\n\
                   7 exit_group(0) = ?\n";
        let calls = count(log);
        assert_eq!((calls.before_run, calls.all, calls.threads), (3, 7, 2));
    }
}
