//! Ends this program if a test does not: every wait in the tests has a limit, but a call into a kernel or a client may not
//! return. The other tests of a batch then run in a fresh rig instead of waiting for the time limit of this one.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

/// Time limit for a test in seconds: about twice what the slowest takes on a slow machine.
const DEFAULT_LIMIT: u64 = 600;
/// Variable with another limit, for tests that are made longer.
const LIMIT: &str = "KOYA_TEST_LIMIT";
/// Time between two looks at the running tests.
const INTERVAL: Duration = Duration::from_secs(5);
/// Exit status of the program in this case.
const STATUS: i32 = 3;

static RUNNING: Mutex<BTreeMap<String, Instant>> = Mutex::new(BTreeMap::new());

/// A running test.
pub(crate) struct Running(String);

impl Running {
    pub(crate) fn start(name: &str) -> Self {
        static WATCH: Once = Once::new();
        WATCH.call_once(|| drop(std::thread::spawn(watch)));
        running().insert(name.to_owned(), Instant::now());
        Self(name.to_owned())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        running().remove(&self.0);
    }
}

fn running() -> MutexGuard<'static, BTreeMap<String, Instant>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

fn watch() {
    let given = std::env::var(LIMIT)
        .ok()
        .and_then(|limit| limit.parse().ok());
    let limit = Duration::from_secs(given.unwrap_or(DEFAULT_LIMIT));
    loop {
        std::thread::sleep(INTERVAL);
        let stalled = running()
            .iter()
            .filter(|(_, started)| started.elapsed() > limit)
            .map(|(name, _)| name.clone())
            .collect::<Vec<_>>();
        if !stalled.is_empty() {
            eprintln!(
                "system tests: {} did not end within {limit:?}; the processes are",
                stalled.join(" ")
            );
            print_processes();
            std::process::exit(STATUS);
        }
    }
}

/// Prints all processes, and where each thread of Koya's programs and of this one waits in the kernel.
fn print_processes() {
    let list = ["-eo", "pid,ppid,etimes,stat,wchan:24,args"];
    if let Ok(processes) = Command::new("ps").args(list).output() {
        for line in String::from_utf8_lossy(&processes.stdout).lines() {
            // Names in brackets are the kernel's own threads.
            if !line.ends_with(']') {
                eprintln!("{line}");
            }
        }
    }
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let program = fs::read_link(entry.path().join("exe")).unwrap_or_default();
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        if !["koya", "containerd-shim-koya", "system-"]
            .iter()
            .any(|own| name.starts_with(own))
        {
            continue;
        }
        let threads = fs::read_dir(entry.path().join("task"));
        for thread in threads.into_iter().flatten().flatten() {
            let read = |what| fs::read_to_string(thread.path().join(what)).unwrap_or_default();
            let stack = read("stack");
            let calls = stack
                .lines()
                .filter_map(|line| line.split_whitespace().nth(1));
            eprintln!(
                "{name} {} {}: {}: {}",
                thread.path().display(),
                read("comm").trim(),
                read("syscall").trim(),
                calls.collect::<Vec<_>>().join(" < ")
            );
        }
    }
}
