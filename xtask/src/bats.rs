//! Integration tests of other projects that print TAP (Test Anything Protocol), each file in its own rig: by bats, or
//! programs.
//!
//! Their output is kept under `target`: an interrupted run is continued with the files that did not end, and a file is run
//! again once its results are removed, or with `--again`.

use crate::{build, proc};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Packages for such tests.
pub(crate) const PACKAGES: [(&str, &str); 2] = [
    ("bats", "runs the tests"),
    ("jq", "is what they read and change JSON with"),
];

/// Files of bats. A test may pass on bats's output descriptor, which is therefore a pipe instead of the console.
pub(crate) const BATS: Files = Files {
    prefix: "",
    extension: ".bats",
    run: "cd \"$1\" && bats --tap ${3:+--filter \"$3\"} \"$2\" | cat
",
};

/// Time limit for a file of tests, in seconds.
const LIMIT: &str = "3600";

#[derive(Args)]
pub(crate) struct BatsArgs {
    /// A checkout of the project
    #[arg(long, value_name = "DIR")]
    pub(crate) source: PathBuf,
    /// Also run files that already have results
    #[arg(long)]
    again: bool,
    /// Use the existing build of koya
    #[arg(long)]
    no_build: bool,
    /// Run only tests whose name matches (crun's and youki's: those of these names), of the named files; results of whole files
    /// are not replaced
    #[arg(long, value_name = "REGEX", requires = "files")]
    filter: Option<String>,
    /// Set the CPUs of the rig. With more than one, guests in an emulated host may hang
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Run only these files, without `.bats`, or `test_` and `.py`; of youki's, groups
    files: Vec<String>,
}

/// The runtime under test, and the one whose results are in the tables.
const OURS: &str = "koya-runtime";

#[derive(Args)]
pub(crate) struct RuntimeArgs {
    /// Set the runtime, a program on PATH, for comparison: what another one fails in the same surroundings, too, is not
    /// Koya's fault
    #[arg(long, default_value = OURS)]
    pub(crate) runtime: String,
}

impl RuntimeArgs {
    /// Directory of the results of these tests: those of other runtimes are below it.
    pub(crate) fn results_of(&self, tests: &str) -> String {
        match self.runtime.as_str() {
            OURS => tests.to_owned(),
            other => format!("{tests}/{other}"),
        }
    }
}

/// A project's kind of files.
pub(crate) struct Files {
    /// Beginning and end of their names.
    pub(crate) prefix: &'static str,
    pub(crate) extension: &'static str,
    /// A shell script that runs one, with the arguments of [`Project::script`].
    pub(crate) run: &'static str,
}

/// A project's tests.
pub(crate) struct Project<'a> {
    /// Directory of its results, below `target`.
    pub(crate) name: &'a str,
    /// The directory of its files.
    pub(crate) tests: PathBuf,
    pub(crate) files: Files,
    /// A shell script that prepares the rig for a file. Its arguments, and those of [`Files::run`], are the directory of the
    /// tests, the file, a filter of its tests (empty for all), and those of `further`.
    pub(crate) script: &'a str,
    pub(crate) further: &'a dyn Fn(&str) -> Vec<String>,
}

/// Results of the tests of a file.
#[derive(Debug, Default, PartialEq, Eq)]
struct Results {
    passed: usize,
    skipped: usize,
    failed: Vec<String>,
    /// Number of tests announced by the file.
    planned: usize,
}

impl Project<'_> {
    /// Runs files without results, and prints a table of all results. A file that does not end (its rig hung, or exceeded its
    /// time) does not keep the others from being run.
    pub(crate) fn run(&self, args: &BatsArgs) -> Result<()> {
        if !args.no_build {
            build::ensure()?;
        }
        let results = proc::checkout().join("target").join(self.name);
        fs::create_dir_all(&results)?;
        let files = match args.files.is_empty() {
            true => self.all_files()?,
            false => args.files.clone(),
        };
        for file in &files {
            let name = [self.files.prefix, file, self.files.extension].concat();
            if !self.tests.join(&name).exists() {
                bail!("there is no {name} in {}", self.tests.display());
            }
        }
        let kept = |file: &str| match args.filter {
            Some(_) => results.join(format!("{file}.filtered")),
            None => results.join(format!("{file}.tap")),
        };
        for (index, file) in files.iter().enumerate() {
            let kept = kept(file);
            if !args.again && args.filter.is_none() && kept.exists() {
                continue;
            }
            let partial = kept.with_extension("partial");
            fs::remove_file(&kept).ok();
            let place = format!("{} of {}", index + 1, files.len());
            eprintln!("{}: {file} ({place}): {}", self.name, partial.display());
            let filter = args.filter.as_deref().unwrap_or_default();
            if self.run_file(file, filter, args.cpus, &partial)?.is_whole() {
                fs::rename(partial, kept)?;
            }
        }
        println!("| file | passed | skipped | failed |\n|---|---|---|---|");
        let mut all = Results::default();
        let mut unfinished = Vec::new();
        for file in &files {
            let Ok(text) = fs::read(kept(file)) else {
                unfinished.push(file.as_str());
                continue;
            };
            let found = read(&String::from_utf8_lossy(&text));
            println!("{}", row(file, &found));
            all.add(found);
        }
        let (passed, skipped, failed) = (all.passed, all.skipped, all.failed.len());
        println!("\n{passed} passed, {failed} failed, {skipped} skipped");
        if !unfinished.is_empty() {
            bail!(
                "these files did not end, and are run again next time: {} (their output: {})",
                unfinished.join(" "),
                results.join("*.partial").display()
            );
        }
        Ok(())
    }

    /// Runs the tests of a file in a rig, all of them if the filter is empty, and keeps their output. The result of each test
    /// is also printed when it ends.
    fn run_file(&self, file: &str, filter: &str, cpus: u32, printed: &Path) -> Result<Results> {
        let mut rig = Command::new(std::env::current_exe()?);
        rig.args(["rig", "--no-build", "--timeout", LIMIT, "--cpus"]);
        rig.args([&cpus.to_string(), "--"]);
        let Files {
            prefix,
            extension,
            run,
        } = &self.files;
        let script = [self.script, run].concat();
        rig.args(["sh", "-c", &script, "sh"]).arg(&self.tests);
        rig.arg(format!("{prefix}{file}{extension}")).arg(filter);
        rig.args((self.further)(file)).stdout(Stdio::piped());
        let started = Instant::now();
        let mut output = File::create(printed)?;
        let mut rig = rig.spawn().context("cannot start a rig")?;
        let stdout = rig.stdout.take().context("a rig without output")?;
        let mut lines = BufReader::new(stdout);
        let mut line = Vec::new();
        // Tests print what their containers print, which need not be UTF-8.
        while lines.read_until(b'\n', &mut line)? > 0 {
            output.write_all(&line)?;
            let text = String::from_utf8_lossy(&line);
            if text.starts_with("ok ") || text.starts_with("not ok ") {
                eprintln!(
                    "{:5} s  {file}: {}",
                    started.elapsed().as_secs(),
                    text.trim_end()
                );
            }
            line.clear();
        }
        // A failed test also gives an error status.
        rig.wait()?;
        let text = fs::read(printed)?;
        Ok(read(&String::from_utf8_lossy(&text)))
    }

    fn all_files(&self) -> Result<Vec<String>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.tests)? {
            let name = entry?.file_name();
            let name = name
                .to_str()
                .and_then(|name| name.strip_prefix(self.files.prefix));
            let name = name.and_then(|name| name.strip_suffix(self.files.extension));
            files.extend(name.map(str::to_owned));
        }
        files.sort();
        Ok(files)
    }
}

impl Results {
    /// The number of tests that have a result.
    fn run(&self) -> usize {
        self.passed + self.skipped + self.failed.len()
    }

    /// Whether all tests of the file have a result.
    fn is_whole(&self) -> bool {
        self.planned > 0 && self.run() >= self.planned
    }

    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.skipped += other.skipped;
        self.planned += other.planned;
        self.failed.extend(other.failed);
    }
}

/// Copies a tree.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    proc::run(Command::new("cp").arg("-a").arg(from).arg(to))
}

/// Packs a tree.
pub(crate) fn pack(tree: &Path, archive: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    proc::run(tar.arg("-C").arg(tree).arg("-cf").arg(archive).arg("."))
}

/// Parses the output of a file (Test Anything Protocol). In crun's, a name has a dash before it, and the time after it.
fn read(text: &str) -> Results {
    let mut results = Results::default();
    for line in text.lines() {
        if let Some(count) = line.strip_prefix("1..") {
            results.planned = count.parse().unwrap_or_default();
        } else if let Some(name) = line.strip_prefix("not ok ") {
            let name = name.split_once(' ').map_or(name, |(_, name)| name);
            let name = name.split_once(" # ").map_or(name, |(name, _)| name);
            results
                .failed
                .push(name.trim_start_matches("- ").to_owned());
        } else if line.starts_with("ok ") {
            match line.contains(" # skip") || line.contains(" #SKIP") {
                true => results.skipped += 1,
                false => results.passed += 1,
            }
        }
    }
    results
}

fn row(file: &str, results: &Results) -> String {
    let Results {
        passed, skipped, ..
    } = results;
    let run = results.planned - skipped.min(&results.planned);
    let failed = results.failed.join("; ");
    format!("| `{file}` | {passed} of {run} | {skipped} | {failed} |")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted() {
        let text = "1..4\nok 1 runc exec\nok 2 runc x # skip test requires criu\n\
                    not ok 3 runc exec --cgroup [v2]\n# (in test file exec.bats, line 1)\nok 4 y # z\n";
        let results = read(text);
        assert_eq!(
            (results.passed, results.skipped, results.planned),
            (2, 1, 4)
        );
        assert_eq!(results.failed, ["runc exec --cgroup [v2]"]);
        assert_eq!(
            row("exec", &results),
            "| `exec` | 2 of 3 | 1 | runc exec --cgroup [v2] |"
        );
        assert!(results.is_whole());
        assert!(!read("").is_whole(), "a rig that printed nothing");
        assert!(!read("1..2\nok 1 a\n").is_whole(), "a rig that hung");
        let text = "1..3\nok 1 - mount-ro # 9.041s\nok 2 - tty #SKIP requires TTY # 0.000s\n\
                    not ok 3 - mount a # 4.100s\n# Test 'mount a' failed with return code -1\n";
        let results = read(text);
        assert_eq!((results.passed, results.skipped), (1, 1));
        assert_eq!(results.failed, ["mount a"]);
    }
}
