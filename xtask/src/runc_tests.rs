//! `cargo xtask runc-tests`: runc's own integration tests (bats) with `koya-runtime` in runc's place, as root and
//! without systemd.
//!
//! Each file of tests has a rig of its own, and its results are kept under `target/runc-tests`: what was stopped is
//! continued, and a file is run again once its results are removed, or with `--again`.

use crate::arch::Arch;
use crate::{apt, build, cache, demo, proc, setup, suite};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The suite whose Go is new enough for runc's test programs, and the packages.
const GO_SUITE: &str = "forky";
const GO: [&str; 2] = ["golang-1.27-go", "golang-1.27-src"];

/// What runc's tests call, which are programs in Go of its own.
const PROGRAMS: [&str; 4] = ["recvtty", "remap-rootfs", "fs-idmap", "pidfd-kill"];

const PACKAGES: [(&str, &str); 3] = [
    ("bats", "runs runc's tests"),
    ("jq", "is what they change configurations with"),
    ("gawk", "is what they read tables with"),
];

/// How long a file of tests may take, in seconds.
const LIMIT: &str = "3600";

/// Takes the place of the script that downloads root file systems.
const IMAGES: &str = "#!/bin/sh
here=$(dirname \"$(readlink -f \"$0\")\")/testdata
echo \"BUSYBOX_IMAGE=$here/busybox.tar HELLO_IMAGE=$here/busybox.tar DEBIAN_IMAGE=$here/debian.tar\"
";

/// What runs in the rig: the tests want a program called runc.
const RUN: &str = "mkdir -p /run/scratch/bin /run/scratch/tmp
ln -s \"$(command -v koya-runtime)\" /run/scratch/bin/runc
export PATH=/run/scratch/bin:$PATH RUNC=/run/scratch/bin/runc TMPDIR=/run/scratch/tmp
cd \"$1\" && exec bats --tap \"$2\"
";

#[derive(Args)]
pub(crate) struct RuncTestsArgs {
    /// A checkout of runc, with what it vendors
    #[arg(long, value_name = "DIR")]
    source: PathBuf,
    /// Run also what there are results of
    #[arg(long)]
    again: bool,
    /// Only these files, without `.bats`
    files: Vec<String>,
}

/// What became of the tests of a file.
#[derive(Debug, Default, PartialEq, Eq)]
struct Results {
    passed: usize,
    skipped: usize,
    failed: Vec<String>,
    /// As the file says how many there are.
    planned: usize,
}

/// Runs what there are no results of, and prints a table of all results.
pub(crate) fn run(args: &RuncTestsArgs) -> Result<()> {
    setup::ensure_these(&PACKAGES)?;
    let tests = tests(&args.source)?;
    build::ensure()?;
    let results = proc::checkout().join("target/runc-tests");
    fs::create_dir_all(&results)?;
    let files = match args.files.is_empty() {
        true => all_files(&tests)?,
        false => args.files.clone(),
    };
    for file in &files {
        let kept = results.join(format!("{file}.tap"));
        if args.again || !kept.exists() {
            run_file(&tests, file, &kept)?;
        }
    }
    println!("| file | passed | skipped | failed |\n|---|---|---|---|");
    for file in &files {
        let text = fs::read_to_string(results.join(format!("{file}.tap")))?;
        println!("{}", row(file, &read(&text)));
    }
    Ok(())
}

/// runc's tests with what they need, made once.
fn tests(source: &Path) -> Result<PathBuf> {
    let version = fs::read_to_string(source.join("VERSION"))
        .with_context(|| format!("{} is no checkout of runc", source.display()))?;
    let debian = suite::debian()?;
    let go = go()?;
    let key = cache::key([version.trim(), IMAGES, &GO.join(" ")]);
    let dir = cache::ensure("runc-tests", &key, |dir| {
        copy(&source.join("tests"), dir)?;
        let programs = dir.join("tests/cmd/_bin");
        fs::create_dir_all(&programs)?;
        proc::long(
            "building the programs of runc's tests (once)",
            Command::new(go.join("bin/go"))
                .args(["build", "-mod=vendor", "-o"])
                .arg(&programs)
                .args(PROGRAMS.map(|name| format!("./tests/cmd/{name}")))
                .current_dir(source)
                .env("GOROOT", &go)
                .env("GOTOOLCHAIN", "local")
                .env("GOPATH", dir.join("go"))
                .env("GOCACHE", dir.join("go/cache")),
            &dir.with_extension("log"),
        )?;
        let integration = dir.join("tests/integration");
        fs::write(integration.join("get-images.sh"), IMAGES)?;
        let rootfs = dir.join("rootfs");
        demo::make_busybox_rootfs(Arch::of_this_machine(), &rootfs)?;
        // The image that runc's tests have is without them, and they put links there.
        for name in ["proc", "sys"] {
            fs::remove_dir(rootfs.join(name))?;
        }
        let busybox = integration.join("testdata/busybox.tar");
        let mut tar = Command::new("tar");
        proc::run(tar.arg("-C").arg(&rootfs).arg("-cf").arg(busybox).arg("."))?;
        fs::copy(&debian, integration.join("testdata/debian.tar"))?;
        Ok(fs::remove_dir_all(dir.join("go"))?)
    })?;
    Ok(dir.join("tests/integration"))
}

/// The directory of a Go, unpacked once.
fn go() -> Result<PathBuf> {
    let key = cache::key([&[GO_SUITE], &GO[..]].concat());
    let dir = cache::ensure("go", &key, |dir| apt::unpack(GO_SUITE, &GO, dir))?;
    let version = GO[0].trim_start_matches("golang-").trim_end_matches("-go");
    Ok(dir.join(format!("usr/lib/go-{version}")))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    proc::run(Command::new("cp").arg("-a").arg(from).arg(to))
}

fn all_files(tests: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(tests)? {
        let name = entry?.file_name();
        files.extend(
            name.to_str()
                .and_then(|name| name.strip_suffix(".bats"))
                .map(str::to_owned),
        );
    }
    files.sort();
    Ok(files)
}

/// Runs a file's tests in a rig; what they print is kept if all of them were run.
fn run_file(tests: &Path, file: &str, kept: &Path) -> Result<()> {
    let partial = kept.with_extension("partial");
    let mut rig = Command::new(std::env::current_exe()?);
    rig.args(["rig", "--no-build", "--timeout", LIMIT, "--"]);
    rig.args(["sh", "-c", RUN, "sh"]).arg(tests);
    rig.arg(format!("{file}.bats"));
    rig.stdout(File::create(&partial)?);
    eprintln!("runc-tests: {file} (results: {})", partial.display());
    // A failed test is a status, too.
    rig.status().context("cannot start a rig")?;
    let found = read(&fs::read_to_string(&partial)?);
    let run = found.passed + found.skipped + found.failed.len();
    if found.planned == 0 || run < found.planned {
        bail!("{file}: {run} of {} tests were run", found.planned);
    }
    Ok(fs::rename(partial, kept)?)
}

/// Reads what bats prints (Test Anything Protocol).
fn read(text: &str) -> Results {
    let mut results = Results::default();
    for line in text.lines() {
        if let Some(count) = line.strip_prefix("1..") {
            results.planned = count.parse().unwrap_or_default();
        } else if let Some(name) = line.strip_prefix("not ok ") {
            let name = name.split_once(' ').map_or(name, |(_, name)| name);
            results.failed.push(name.to_owned());
        } else if line.starts_with("ok ") {
            match line.contains(" # skip") {
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
        assert_eq!(read("").planned, 0);
    }
}
