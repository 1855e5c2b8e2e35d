//! Starts this program again in rigs (`cargo xtask rig`) on a machine without a KVM for Linux guests.
//!
//! The tests are divided into batches with a rig each: side effects (memory, page cache, loaded modules) do not reach the
//! next batch, and rigs do not wait for one another.
//!
//! An emulated host sometimes crashes or hangs, and so do its guests (the CPU loses interrupts under nested virtualization),
//! which was never seen on hardware. So on such a host, tests that a crashed rig did not finish, and a few failed ones, are
//! run once more in a fresh rig. Each such test is listed at the end.

use crate::{RIG, is_wanted};
use anyhow::{Context, Result};
use libtest_mimic::{Arguments, Trial};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Names of the tests to run, one on each line; without it, all.
pub(crate) const ONLY: &str = "KOYA_TEST_ONLY";
/// Architecture to test if not the machine's: its name, and the path of this program built for it.
const ARCH: &str = "KOYA_TEST_ARCH";
const PROGRAM: &str = "KOYA_TEST_PROGRAM";
/// Further options of the rigs, which select an emulated host (`--cpu`, `--gic`).
const MODEL: &str = "KOYA_TEST_MODEL";
/// File with the names of the tests that have passed; those in it are left out.
const PASSED: &str = "KOYA_TEST_PASSED";
/// Prefix of a test's duration line, before name and seconds.
pub(crate) const TOOK: &str = "system tests: seconds of ";
/// Number of slowest tests to print.
const SLOWEST: usize = 30;
/// First line of `cargo xtask rig` on a machine without a suitable KVM.
const EMULATED: &str = "rig: starting an emulated host";

/// A rig has 6 GiB of memory.
const MAX_RIGS: usize = 3;
/// Number of tests in a batch: a rig takes as long to start as one test.
const BATCH: usize = 40;
/// Time limits for a batch in seconds: about twice what one takes on a slow machine, and for another architecture, whose
/// emulation is slower.
const BATCH_LIMIT: &str = "2400";
const FOREIGN_BATCH_LIMIT: &str = "7200";
/// If more tests than these fail, emulation is not the cause.
const MAX_SECOND_TRIES: usize = 4;

/// Result of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Passed,
    Failed,
    /// The rig ended before the test.
    Unfinished,
}

/// Remaining tests and results.
#[derive(Default)]
struct Board {
    batches: VecDeque<Vec<String>>,
    outcomes: BTreeMap<String, Outcome>,
    /// Whether a rig has reported an emulated KVM.
    emulated: bool,
    /// Duration of each test in seconds, with others in the same rig.
    seconds: BTreeMap<String, f64>,
    /// Failures of rigs without a failed test.
    troubles: Vec<String>,
    /// Gets the name of each test that passes.
    passed: Option<File>,
}

/// Runs the selected tests of `trials` with this program in rigs.
pub(crate) fn run(arguments: &Arguments, trials: Vec<Trial>) -> Result<ExitCode> {
    let names: Vec<String> = trials
        .iter()
        .filter(|trial| is_wanted(trial, arguments))
        .map(|trial| trial.name().to_owned())
        .collect();
    if names.is_empty() {
        return Ok(libtest_mimic::run(arguments, trials).exit_code());
    }
    let (names, passed) = match std::env::var_os(PASSED) {
        Some(file) => without_passed(names, file.as_ref())?,
        None => (names, None),
    };
    if names.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let built = xtask(&["build"])
        .args(arch())
        .stdout(Stdio::null())
        .status();
    if !built.context("cannot start cargo")?.success() {
        return Ok(ExitCode::FAILURE);
    }
    let started = Instant::now();
    let board = Mutex::new(Board {
        passed,
        ..Board::default()
    });
    run_all(&board, &names)?;
    let first = std::mem::take(&mut lock(&board).outcomes);
    let again = second_tries(&first, lock(&board).emulated);
    if !again.is_empty() {
        eprintln!(
            "system tests: once more, in a fresh rig: {}",
            again.join(" ")
        );
        run_all(&board, &again)?;
    }
    let board = board.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut outcomes = first;
    outcomes.extend(board.outcomes);
    for name in &again {
        eprintln!("system tests: second try of {name}: {:?}", outcomes[name]);
    }
    for trouble in &board.troubles {
        eprintln!("system tests: {trouble}");
    }
    if names.len() > 1 {
        print_slowest(&board.seconds);
    }
    let passed = outcomes.values().filter(|o| **o == Outcome::Passed).count();
    let failed = outcomes.len() - passed;
    let well = failed == 0 && board.troubles.is_empty();
    println!(
        "\ntest result: {}. {passed} passed; {failed} failed; 0 ignored; 0 measured; {} filtered out; finished in {:.2}s\n",
        if well { "ok" } else { "FAILED" },
        trials.len() - names.len(),
        started.elapsed().as_secs_f64(),
    );
    Ok(if well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Leaves out the tests that have passed in an earlier run, whose names are in `file`, and opens it for further names.
fn without_passed(names: Vec<String>, file: &Path) -> Result<(Vec<String>, Option<File>)> {
    let context = || format!("cannot use {}", file.display());
    let earlier = match fs::read_to_string(file) {
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        read => read.with_context(context)?,
    };
    let earlier: BTreeSet<&str> = earlier.lines().collect();
    let count = names.len();
    let mut left = names;
    left.retain(|name| !earlier.contains(name.as_str()));
    eprintln!(
        "system tests: {} of {count} passed in earlier runs and are left out; remove {} to run all",
        count - left.len(),
        file.display()
    );
    let appended = File::options().create(true).append(true).open(file);
    Ok((left, Some(appended.with_context(context)?)))
}

/// Tests to be run again.
fn second_tries(outcomes: &BTreeMap<String, Outcome>, emulated: bool) -> Vec<String> {
    let failed = outcomes.values().filter(|o| **o == Outcome::Failed).count();
    let worth = |outcome| match outcome {
        Outcome::Passed => false,
        Outcome::Failed => failed <= MAX_SECOND_TRIES,
        Outcome::Unfinished => true,
    };
    let again = outcomes.iter().filter(|(_, outcome)| worth(**outcome));
    let again = again.map(|(name, _)| name.clone());
    if emulated {
        again.collect()
    } else {
        Vec::new()
    }
}

fn lock(board: &Mutex<Board>) -> MutexGuard<'_, Board> {
    board.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `names` in as many concurrent rigs as the machine has CPUs: each emulates one.
fn run_all(board: &Mutex<Board>, names: &[String]) -> Result<()> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let rigs = names.len().min(cpus).min(MAX_RIGS);
    lock(board).batches = batches(names, rigs);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..rigs)
            .map(|rig| {
                scope.spawn(move || -> Result<()> {
                    loop {
                        let Some(batch) = lock(board).batches.pop_front() else {
                            return Ok(());
                        };
                        run_batch(board, rig, &batch)?;
                    }
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| {
            worker
                .join()
                .unwrap_or_else(|e| std::panic::resume_unwind(e))
        })
    })
}

/// Adjacent tests are of one kind and take similar times, so they go to different batches; each rig has as many.
fn batches(names: &[String], rigs: usize) -> VecDeque<Vec<String>> {
    let count = names.len().div_ceil(BATCH).next_multiple_of(rigs);
    let batch = |first| names.iter().skip(first).step_by(count).cloned().collect();
    (0..count).map(batch).collect()
}

fn run_batch(board: &Mutex<Board>, rig: usize, batch: &[String]) -> Result<()> {
    // One emulated CPU each: with several, QEMU may run stale code after the kernel has patched itself, and the kernel
    // crashes.
    let mut command = xtask(&["rig", "--no-build", "--cpus", "1"]);
    if batch.len() > 1 {
        let limit = match arch().is_empty() {
            true => BATCH_LIMIT,
            false => FOREIGN_BATCH_LIMIT,
        };
        command.args(["--timeout", limit]);
    }
    let mut words = std::env::args_os();
    let own = words.next().unwrap_or_default();
    let model = std::env::var(MODEL).unwrap_or_default();
    command
        .args(arch())
        .args(model.split_whitespace())
        .arg("--");
    command
        .arg(std::env::var_os(PROGRAM).unwrap_or(own))
        .args(words);
    command.env(RIG, rig.to_string());
    command.env(ONLY, batch.join("\n"));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context("cannot start the rig")?;
    let label = format!("rig {}: ", rig + 1);
    let (out, err) = (child.stdout.take(), child.stderr.take());
    std::thread::scope(|scope| {
        scope.spawn(|| relay(&label, out, |line| note(&mut lock(board), line)));
        scope.spawn(|| {
            relay(&label, err, |line| {
                let board = &mut lock(board);
                board.emulated |= line.starts_with(EMULATED);
                note_seconds(board, line);
            })
        });
    });
    let status = child.wait()?;
    let mut board = lock(board);
    let mut bad = false;
    for name in batch {
        let outcome = board.outcomes.entry(name.clone());
        bad |= *outcome.or_insert(Outcome::Unfinished) != Outcome::Passed;
    }
    if !status.success() && !bad {
        let trouble = format!("all tests of a batch passed, and then its rig failed: {status}");
        board.troubles.push(trouble);
    }
    Ok(())
}

/// Parses a line like `test files::links ... ok`.
fn note(board: &mut Board, line: &str) {
    let result = line
        .strip_prefix("test ")
        .and_then(|l| l.rsplit_once(" ... "));
    let Some((name, outcome)) = result else {
        return;
    };
    let outcome = match outcome {
        "ok" => Outcome::Passed,
        "FAILED" => Outcome::Failed,
        _ => return,
    };
    let name = name.trim_end();
    if outcome == Outcome::Passed
        && let Some(passed) = &mut board.passed
        && let Err(error) = writeln!(passed, "{name}")
    {
        let trouble = format!("{name} passed, which could not be stored: {error}");
        board.troubles.push(trouble);
    }
    board.outcomes.insert(name.to_owned(), outcome);
}

/// Parses a test's duration line.
fn note_seconds(board: &mut Board, line: &str) {
    let took = line.strip_prefix(TOOK).and_then(|l| l.rsplit_once(' '));
    if let Some((name, seconds)) = took
        && let Ok(seconds) = seconds.parse()
    {
        board.seconds.insert(name.to_owned(), seconds);
    }
}

/// Prints the slowest tests, as candidates for a shorter run.
fn print_slowest(seconds: &BTreeMap<String, f64>) {
    let mut all: Vec<_> = seconds.iter().collect();
    all.sort_by(|a, b| b.1.total_cmp(a.1));
    let sum: f64 = all.iter().map(|(_, seconds)| **seconds).sum();
    eprintln!("system tests: {sum:.0} seconds in all, of which the longest:");
    for (name, seconds) in all.iter().take(SLOWEST) {
        eprintln!("{seconds:8.1} {name}");
    }
}

/// The option `--arch`, if not the machine's architecture.
fn arch() -> Vec<String> {
    let arch = std::env::var(ARCH).map(|name| vec!["--arch".into(), name]);
    arch.unwrap_or_default()
}

fn xtask(words: &[&str]) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["run", "--quiet", "--package", "xtask", "--"]);
    command.args(words);
    command
}

/// Forwards lines as they arrive, with a label.
fn relay(label: &str, from: Option<impl Read>, mut note: impl FnMut(&str)) {
    let lines = from.map(|from| BufReader::new(from).split(b'\n'));
    for line in lines.into_iter().flatten().map_while(|line| line.ok()) {
        let line = String::from_utf8_lossy(&line);
        note(&line);
        println!("{label}{line}");
    }
}
