//! `cargo xtask fuzz`: the fuzz targets in turn, each driven by libFuzzer.
//!
//! Inputs that reached new code, failing inputs and a record of all runs are kept in the cache, so that each run continues
//! where the last one ended. The libfuzzer-sys crate contains the engine; a nightly compiler is not required.

mod coverage;
mod record;

use crate::arch::Arch;
use crate::{cache, proc};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use record::{Record, Target};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Instrumentation of branches in libFuzzer's format. Comparisons are not traced: that would take three quarters of the time
/// of a parser, and the words that a parser compares with are in dictionaries.
const FLAGS: [&str; 5] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=3",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
];

/// Time limit for an input in seconds; a slower one counts as a failure.
const INPUT_LIMIT: u32 = 25;
/// Maximum size of an input in bytes: enough for a full queue, or a hundred steps of a driver.
const MAX_LEN: u32 = 1024;
/// That of the targets whose inputs are files.
const MAX_FILE: u32 = 4096;
const FILES: [&str; 2] = ["image_files", "kernel_images"];
/// Longest time for which a target runs before the record is written, and the next one has its turn.
const TURN: Duration = Duration::from_secs(120);

/// Lines of a part, and the covered ones.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
struct Lines {
    count: u64,
    covered: u64,
}

#[derive(Args)]
pub(crate) struct FuzzArgs {
    /// Set the duration in minutes, for all targets together
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    minutes: u32,
    /// Set the number of targets that run at a time [default: one for each CPU]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=256))]
    jobs: Option<u32>,
    /// Leave out targets that have been executed this many times, in all runs together
    #[arg(long)]
    executions: Option<u64>,
    /// Print the targets
    #[arg(long, conflicts_with_all = ["minutes", "jobs", "executions"])]
    list: bool,
    /// Build the targets only
    #[arg(long, conflicts_with_all = ["minutes", "jobs", "executions", "list"])]
    no_run: bool,
    /// Print the record of all runs
    #[arg(long, conflicts_with_all = ["minutes", "jobs", "executions", "list", "no_run"])]
    status: bool,
    /// Instead of fuzzing, print the lines that are covered by the kept inputs
    #[arg(long, conflicts_with_all = ["minutes", "jobs", "executions", "list", "status"])]
    coverage: bool,
    /// Run only these targets
    targets: Vec<String>,
}

/// `cargo xtask fuzz`
pub(crate) fn run(args: &FuzzArgs) -> Result<()> {
    let all = targets()?;
    if args.list {
        all.iter().for_each(|target| println!("{target}"));
        return Ok(());
    }
    for target in &args.targets {
        ensure!(
            all.contains(target),
            "no target {target}: there are {}",
            all.join(", ")
        );
    }
    let chosen = match args.targets.is_empty() {
        true => all,
        false => args.targets.clone(),
    };
    if args.status {
        let record = Record::read()?;
        print!("{}", record.table(&chosen));
        print!("{}", coverage::table(&record.coverage));
        return Ok(());
    }
    if args.coverage {
        return coverage::run(&chosen, !args.no_run);
    }
    let programs = build()?;
    if args.no_run {
        return Ok(());
    }
    let jobs = match args.jobs {
        Some(jobs) => jobs,
        None => std::thread::available_parallelism()?.get() as u32,
    };
    let jobs = jobs.min(chosen.len() as u32);
    let time = Duration::from_secs(u64::from(args.minutes) * 60);
    let turn = (time * jobs / chosen.len() as u32).clamp(Duration::from_secs(1), TURN);
    eprintln!(
        "fuzz: {} targets in turns of {} s, {jobs} at a time, for {} minutes",
        chosen.len(),
        turn.as_secs(),
        args.minutes
    );
    for target in &chosen {
        seed(&home(target).join("inputs"))?;
    }
    let turns = Turns {
        end: Instant::now() + time,
        turn,
        wanted: args.executions,
        waiting: Mutex::new(VecDeque::from(chosen.clone())),
    };
    let work = || -> Result<Vec<PathBuf>> {
        let mut failures = Vec::new();
        while let Some((target, turn, runs)) = turns.next()? {
            let failed = fuzz(&programs, &target, turn, runs)?;
            // A target that has failed would fail again.
            if failed.is_empty() {
                turns.again(target);
            }
            failures.extend(failed);
        }
        Ok(failures)
    };
    let failures = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        let mut failures = Vec::new();
        for thread in threads {
            match thread.join() {
                Ok(result) => failures.extend(result?),
                Err(_) => bail!("a thread panicked"),
            }
        }
        Ok(failures)
    })?;
    print!("{}", Record::read()?.table(&chosen));
    for failure in &failures {
        println!("failed: {}", failure.display());
    }
    ensure!(
        failures.is_empty(),
        "{} inputs failed; `{}/TARGET FILE` runs one again",
        failures.len(),
        programs.display()
    );
    Ok(())
}

/// The order of the targets.
struct Turns {
    end: Instant,
    turn: Duration,
    /// Executions after which a target is left out.
    wanted: Option<u64>,
    waiting: Mutex<VecDeque<String>>,
}

impl Turns {
    /// The next target, with a limit of time and of executions.
    fn next(&self) -> Result<Option<(String, Duration, Option<u64>)>> {
        loop {
            let left = self.end.saturating_duration_since(Instant::now());
            let waiting = self.waiting.lock().map(|mut waiting| waiting.pop_front());
            let Ok(Some(target)) = waiting else {
                return Ok(None);
            };
            if left < Duration::from_secs(1) {
                return Ok(None);
            }
            let runs = match self.wanted {
                Some(wanted) => Some(wanted.saturating_sub(Record::read()?.executions(&target))),
                None => None,
            };
            if runs != Some(0) {
                return Ok(Some((target, self.turn.min(left), runs)));
            }
        }
    }

    /// Gives a target another turn after all others.
    fn again(&self, target: String) {
        self.waiting
            .lock()
            .map(|mut waiting| waiting.push_back(target))
            .ok();
    }
}

/// The targets: one file for each.
fn targets() -> Result<Vec<String>> {
    let directory = proc::checkout().join("fuzz/targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&directory).with_context(|| format!("{}", directory.display()))? {
        let path = entry?.path();
        names.extend(
            path.file_stem()
                .map(|name| name.to_string_lossy().into_owned()),
        );
    }
    names.sort();
    Ok(names)
}

/// Builds all targets in a separate directory, since they are instrumented; returns the directory.
fn build() -> Result<PathBuf> {
    let here = Arch::of_this_machine();
    let directory = here.target("fuzz");
    proc::run(&mut build_command(&directory, &FLAGS)?)?;
    Ok(directory.join(here.gnu()).join("fuzz"))
}

/// Builds the targets, with these flags only for the crates of the workspace: instrumenting dependencies would take an hour,
/// and lead the search into foreign code.
fn build_command(directory: &Path, flags: &[&str]) -> Result<Command> {
    let wrapper = wrapper(directory, flags)?;
    let mut cargo = proc::cargo();
    cargo.env("RUSTC_WORKSPACE_WRAPPER", wrapper);
    cargo
        .args(["build", "--package", "koya-fuzz", "--features", "libfuzzer"])
        .args(["--profile", "fuzz", "--target"])
        .arg(Arch::of_this_machine().gnu())
        .arg("--target-dir")
        .arg(directory);
    Ok(cargo)
}

/// A script that cargo runs as a wrapper of the compiler. Its name identifies the flags: cargo rebuilds for a different
/// wrapper. Build scripts and macros, which are not built for a target, are not instrumented.
fn wrapper(directory: &Path, flags: &[&str]) -> Result<PathBuf> {
    let flags = flags.join(" ");
    let mut hasher = DefaultHasher::new();
    flags.hash(&mut hasher);
    let path = directory.join(format!("rustc-{:016x}", hasher.finish()));
    let script = format!(
        "#!/bin/sh\ncase \" $* \" in *' --target '*) exec \"$@\" {flags} ;; esac\nexec \"$@\"\n"
    );
    fs::create_dir_all(directory)?;
    // Not rewritten if unchanged: cargo checks its modification time.
    if fs::read_to_string(&path).is_ok_and(|there| there == script) {
        return Ok(path);
    }
    fs::write(&path, script).with_context(|| format!("{}", path.display()))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// Directory of a target's inputs, failing inputs, log and statistics.
fn home(target: &str) -> PathBuf {
    cache::root().join("fuzz").join(target)
}

/// Runs a target. Its temporary files are in memory if possible, and removed when the directory is dropped.
fn target_command(programs: &Path, target: &str) -> Result<(Command, TempDir)> {
    const IN_MEMORY: &str = "/dev/shm";
    let temporary = match Path::new(IN_MEMORY).is_dir() {
        true => tempfile::tempdir_in(IN_MEMORY)?,
        false => tempfile::tempdir()?,
    };
    let mut command = Command::new(programs.join(target));
    command.env("TMPDIR", temporary.path());
    Ok((command, temporary))
}

/// Number of inputs that a target begins with.
const SEEDS: u32 = 400;

/// Writes inputs to begin with, once: pseudorandom bytes of many lengths. Most targets read an input as a list of steps, so
/// these get deeper than what libFuzzer makes of an empty one in an hour.
fn seed(inputs: &Path) -> Result<()> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    fs::create_dir_all(inputs).with_context(|| format!("{}", inputs.display()))?;
    for number in 0..SEEDS {
        let path = inputs.join(format!("seed-{number}"));
        let len = 16 + next() % u64::from(MAX_LEN - 16);
        let bytes: Vec<u8> = (0..len).map(|_| (next() >> 32) as u8).collect();
        if !path.exists() {
            fs::write(&path, bytes).with_context(|| format!("{}", path.display()))?;
        }
    }
    Ok(())
}

/// Words that the inputs of a target contain, if there is a file of them.
fn dictionary(target: &str) -> Option<PathBuf> {
    let path = proc::checkout().join(format!("fuzz/dictionaries/{target}.dict"));
    path.exists().then_some(path)
}

/// Runs a target for this time, or this many executions, and adds that to the record; returns the inputs that failed.
fn fuzz(programs: &Path, target: &str, turn: Duration, runs: Option<u64>) -> Result<Vec<PathBuf>> {
    let home = home(target);
    let (inputs, failed) = (home.join("inputs"), home.join("failed"));
    fs::create_dir_all(&failed).with_context(|| format!("{}", failed.display()))?;
    let before = files(&failed)?;
    let log = home.join("log");
    let output = File::create(&log).with_context(|| format!("{}", log.display()))?;
    let max_len = match FILES.contains(&target) {
        true => MAX_FILE,
        false => MAX_LEN,
    };
    let (mut command, _temporary) = target_command(programs, target)?;
    if let Some(words) = dictionary(target) {
        command.arg(format!("-dict={}", words.display()));
    }
    if let Some(runs) = runs {
        command.arg(format!("-runs={runs}"));
    }
    let began = Instant::now();
    let status = command
        .arg(&inputs)
        .arg(format!("-artifact_prefix={}/", failed.display()))
        .arg(format!("-max_total_time={}", turn.as_secs()))
        .arg(format!("-timeout={INPUT_LIMIT}"))
        // An input below the limit has not failed: other processes may slow it down.
        .arg(format!("-report_slow_units={INPUT_LIMIT}"))
        .arg(format!("-max_len={max_len}"))
        // Most targets read an input as a list of steps, so long ones are tried early. The rest saves time: to look for
        // smaller inputs, and to weigh the kept ones, takes libFuzzer longer than many inputs.
        .args(["-len_control=20", "-reduce_inputs=0", "-entropic=0"])
        .args(["-print_final_stats=1", "-rss_limit_mb=2048"])
        .stdout(output.try_clone()?)
        .stderr(output)
        .status()
        .with_context(|| format!("cannot run {target}"))?;
    let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    let all = files(&failed)?;
    let crashes = all.len() as u64;
    let failures: Vec<_> = all
        .into_iter()
        .filter(|file| !before.contains(file))
        .collect();
    let kept = files(&inputs)?.len() as u64;
    let record = Record::change(|record| {
        let known = record.targets.entry(target.into()).or_default();
        *known = Target {
            executions: known.executions + executions(&text).unwrap_or(0),
            seconds: known.seconds + began.elapsed().as_secs(),
            edges: edges(&text).unwrap_or(known.edges),
            all_edges: all_edges(&text).unwrap_or(known.all_edges),
            inputs: kept,
            crashes,
        };
    })?;
    ensure!(
        status.success() || !failures.is_empty(),
        "{target} ended with {status} and left no input; the end of {}:\n{}",
        log.display(),
        proc::tail(&log, 20)
    );
    eprintln!(
        "fuzz: {target}: {} executions in all",
        record.executions(target)
    );
    Ok(failures)
}

fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory)?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

/// Number of inputs that a target has run: from its last line, or from the last progress line.
fn executions(log: &str) -> Option<u64> {
    let last = |prefix: &str| {
        log.lines()
            .rev()
            .find_map(|line| line.trim().strip_prefix(prefix))
    };
    if let Some(count) = last("stat::number_of_executed_units:") {
        return count.trim().parse().ok();
    }
    let line = last("#")?;
    line.split_whitespace().next()?.parse().ok()
}

/// Number of edges reached by its inputs.
fn edges(log: &str) -> Option<u64> {
    log.lines().rev().find_map(|line| {
        let (_, rest) = line.split_once(" cov: ")?;
        rest.split_whitespace().next()?.parse().ok()
    })
}

/// Number of edges of a program.
fn all_edges(log: &str) -> Option<u64> {
    let line = log
        .lines()
        .find(|line| line.contains("inline 8-bit counters): "))?;
    let (_, rest) = line.split_once(" (")?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROGRESS: &str = "INFO: Seed: 1
INFO: Loaded 1 modules   (33034 inline 8-bit counters): 33034 [0x55, 0x66), 
#2\tINITED cov: 12 ft: 13 corp: 1/1b exec/s: 0 rss: 30Mb
#4096\tpulse  cov: 212 ft: 513 corp: 40/1b lim: 4 exec/s: 2048 rss: 35Mb
";

    #[test]
    fn a_log_is_read() {
        assert_eq!(executions(PROGRESS), Some(4096));
        assert_eq!(edges(PROGRESS), Some(212));
        assert_eq!(all_edges(PROGRESS), Some(33034));
        assert_eq!(all_edges("#2"), None);
        let ended = format!("{PROGRESS}Done 5000 runs\nstat::number_of_executed_units: 5000\n");
        assert_eq!(executions(&ended), Some(5000));
        assert_eq!(executions("INFO: Seed: 1\n"), None);
        assert_eq!(edges(""), None);
    }

    #[test]
    fn targets_have_turns_until_the_end() {
        let turns = Turns {
            end: Instant::now() + Duration::from_secs(100),
            turn: Duration::from_secs(7),
            wanted: None,
            waiting: Mutex::new(VecDeque::from(["a".to_owned(), "b".to_owned()])),
        };
        let mut order = Vec::new();
        for _ in 0..4 {
            let (target, turn, runs) = turns.next().unwrap().unwrap();
            assert_eq!((turn, runs), (turns.turn, None));
            order.push(target.clone());
            turns.again(target);
        }
        assert_eq!(order, ["a", "b", "a", "b"]);
        let over = Turns {
            end: Instant::now(),
            ..turns
        };
        assert!(over.next().unwrap().is_none());
    }

    #[test]
    fn targets_begin_with_the_same_inputs() {
        let [one, two] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        for dir in [&one, &two] {
            seed(dir.path()).unwrap();
        }
        let all = files(one.path()).unwrap();
        assert_eq!(all.len(), SEEDS as usize);
        for path in all {
            let bytes = fs::read(&path).unwrap();
            assert!((16..MAX_LEN as usize).contains(&bytes.len()));
            let again = two.path().join(path.file_name().unwrap());
            assert_eq!(fs::read(again).unwrap(), bytes);
        }
    }

    #[test]
    fn every_dictionary_belongs_to_a_target() {
        let targets = targets().unwrap();
        let words = files(&proc::checkout().join("fuzz/dictionaries")).unwrap();
        assert!(!words.is_empty());
        for path in words {
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            assert!(targets.contains(&name), "{name}");
            assert_eq!(dictionary(&name), Some(path));
        }
    }

    #[test]
    fn every_target_is_a_program_of_the_crate() {
        let manifest = fs::read_to_string(proc::checkout().join("fuzz/Cargo.toml")).unwrap();
        let targets = targets().unwrap();
        assert!(targets.contains(&"descriptor_chain".to_owned()));
        for target in &targets {
            let path = format!("path = \"targets/{target}.rs\"");
            assert!(manifest.contains(&path), "{target}");
        }
        assert_eq!(manifest.matches("path = \"targets/").count(), targets.len());
    }
}
