//! `cargo xtask fuzz`: the fuzz targets in turn, each driven by libFuzzer.
//!
//! Inputs that reached new code, failing inputs and statistics are kept in the cache, so that each run continues where the
//! last one ended. The libfuzzer-sys crate contains the engine; a nightly compiler is not required.

mod coverage;

use crate::arch::Arch;
use crate::{cache, proc};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::collections::VecDeque;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// Instrumentation of branches and comparisons in libFuzzer's format.
const FLAGS: [&str; 6] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// Time limit for an input in seconds; a slower one counts as a failure.
const INPUT_LIMIT: u32 = 25;
/// Maximum size of an input in bytes: enough for a full queue, or a layer of an image.
const MAX_LEN: u32 = 8192;

#[derive(Args)]
pub(crate) struct FuzzArgs {
    /// Set the duration in minutes, for all targets together
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    minutes: u32,
    /// Set the number of targets that run at a time [default: one for each CPU]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=256))]
    jobs: Option<u32>,
    /// Print the targets
    #[arg(long)]
    list: bool,
    /// Instead of fuzzing, print the lines that are covered by the kept inputs
    #[arg(long, conflicts_with_all = ["minutes", "jobs", "list"])]
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
    if args.coverage {
        return coverage::run(&chosen);
    }
    let programs = build()?;
    let jobs = match args.jobs {
        Some(jobs) => jobs,
        None => std::thread::available_parallelism()?.get() as u32,
    };
    let jobs = jobs.min(chosen.len() as u32);
    let seconds = (u64::from(args.minutes) * 60 * u64::from(jobs) / chosen.len() as u64).max(1);
    eprintln!(
        "fuzz: {} targets, {seconds} s each, {jobs} at a time",
        chosen.len()
    );
    let (waiting, done) = (Mutex::new(VecDeque::from(chosen)), Mutex::new(Vec::new()));
    let next = || waiting.lock().ok()?.pop_front();
    let work = || -> Result<()> {
        while let Some(target) = next() {
            let row = fuzz(&programs, &target, seconds)?;
            eprintln!("fuzz: {}", row.line());
            done.lock().map(|mut rows| rows.push(row)).ok();
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .try_for_each(|thread| match thread.join() {
                Ok(result) => result,
                Err(_) => bail!("a thread panicked"),
            })
    })?;
    let mut rows = done.into_inner().unwrap_or_default();
    rows.sort_by(|a, b| a.target.cmp(&b.target));
    println!(
        "| target | executions | in all | edges | inputs kept | failures |\n|---|---|---|---|---|---|"
    );
    rows.iter().for_each(|row| println!("{}", row.line()));
    let failures: Vec<_> = rows.iter().flat_map(|row| &row.failures).collect();
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

/// Runs a target. Its temporary files are in memory if possible: many targets create some for each input.
fn target_command(programs: &Path, target: &str) -> Command {
    const IN_MEMORY: &str = "/dev/shm";
    let mut command = Command::new(programs.join(target));
    if Path::new(IN_MEMORY).is_dir() {
        command.env("TMPDIR", IN_MEMORY);
    }
    command
}

/// Result of a target.
struct Row {
    target: String,
    executions: u64,
    total: u64,
    edges: u64,
    kept: usize,
    failures: Vec<PathBuf>,
}

impl Row {
    fn line(&self) -> String {
        let Self {
            target,
            executions,
            total,
            edges,
            kept,
            failures,
        } = self;
        format!(
            "| {target} | {executions} | {total} | {edges} | {kept} | {} |",
            failures.len()
        )
    }
}

fn fuzz(programs: &Path, target: &str, seconds: u64) -> Result<Row> {
    let home = home(target);
    let (inputs, failed) = (home.join("inputs"), home.join("failed"));
    for directory in [&inputs, &failed] {
        fs::create_dir_all(directory).with_context(|| format!("{}", directory.display()))?;
    }
    let before = files(&failed)?;
    let log = home.join("log");
    let output = File::create(&log).with_context(|| format!("{}", log.display()))?;
    let status = target_command(programs, target)
        .arg(&inputs)
        .arg(format!("-artifact_prefix={}/", failed.display()))
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-timeout={INPUT_LIMIT}"))
        // An input below the limit has not failed: other processes may slow it down.
        .arg(format!("-report_slow_units={INPUT_LIMIT}"))
        .arg(format!("-max_len={MAX_LEN}"))
        .args(["-print_final_stats=1", "-rss_limit_mb=2048"])
        .stdout(output.try_clone()?)
        .stderr(output)
        .status()
        .with_context(|| format!("cannot run {target}"))?;
    let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    let mut failures = files(&failed)?;
    failures.retain(|file| !before.contains(file));
    ensure!(
        status.success() || !failures.is_empty(),
        "{target} ended with {status} and left no input; the end of {}:\n{}",
        log.display(),
        proc::tail(&log, 20)
    );
    let executions = executions(&text).unwrap_or(0);
    let count = home.join("executions");
    let earlier = fs::read_to_string(&count).ok();
    let earlier = earlier.and_then(|text| text.trim().parse::<u64>().ok());
    let total = earlier.unwrap_or(0) + executions;
    fs::write(&count, format!("{total}\n"))?;
    Ok(Row {
        target: target.into(),
        executions,
        total,
        edges: edges(&text).unwrap_or(0),
        kept: files(&inputs)?.len(),
        failures,
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    const PROGRESS: &str = "INFO: Seed: 1
#2\tINITED cov: 12 ft: 13 corp: 1/1b exec/s: 0 rss: 30Mb
#4096\tpulse  cov: 212 ft: 513 corp: 40/1b lim: 4 exec/s: 2048 rss: 35Mb
";

    #[test]
    fn a_log_is_read() {
        assert_eq!(executions(PROGRESS), Some(4096));
        assert_eq!(edges(PROGRESS), Some(212));
        let ended = format!("{PROGRESS}Done 5000 runs\nstat::number_of_executed_units: 5000\n");
        assert_eq!(executions(&ended), Some(5000));
        assert_eq!(executions("INFO: Seed: 1\n"), None);
        assert_eq!(edges(""), None);
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
