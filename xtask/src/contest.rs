//! `cargo xtask contest`: youki's tests of OCI runtimes (contest) with `koya-runtime`, each of their groups in its own rig.

use crate::bats::{BatsArgs, Files, Project, RuntimeArgs};
use crate::{cache, proc, setup};
use anyhow::{Context, Result};
use clap::Args;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const PACKAGES: [(&str, &str); 1] = [("libseccomp-dev", "is what youki's tests are linked with")];

/// The target of the program that runs in the containers: it is static.
const STATIC: &str = "x86_64-unknown-linux-musl";

/// Preparation in the rig: the bundle that tests unpack, and a place for them on a disk. Tests that runc need not pass are
/// skipped by them.
const PREPARE: &str = "mkdir -p /run/scratch/tmp
cp \"$1/bundle.tar.gz\" /run/scratch/
export TMPDIR=/run/scratch/tmp RUNTIME_KIND=runc
cd /run/scratch
group=${2%.group}
";

/// The output of a group, as that of other tests. A result follows the number, the number of tests and the name; the reason is
/// on the next line.
const GROUPS: Files = Files {
    prefix: "",
    extension: ".group",
    run: "\"$1/contest\" run --runtime \"$4\" --runtimetest \"$1/runtimetest\" \
          --tests \"$group${3:+::$3}\" 2>&1 | awk -F ' : ' '
    $1 ~ /^[0-9]+ \\/ [0-9]+$/ {
        split($1, number, \" / \")
        if (number[1] == 1) print \"1..\" number[2]
        if ($3 == \"skipped\") print \"ok \" number[1] \" \" $2 \" # skip\"
        else print $3 \" \" number[1] \" \" $2
        next
    }
    { print \"# \" $0 }'
",
};

#[derive(Args)]
pub(crate) struct ContestArgs {
    #[command(flatten)]
    bats: BatsArgs,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

pub(crate) fn run(args: &ContestArgs) -> Result<()> {
    setup::ensure_these(&PACKAGES)?;
    let project = Project {
        name: &args.runtime.results_of("contest"),
        tests: tests(&args.bats.source)?,
        files: GROUPS,
        script: PREPARE,
        further: &|_| vec![args.runtime.runtime.clone()],
    };
    project.run(&args.bats)
}

/// The programs of contest, built once for each commit, and a file for each group.
fn tests(source: &Path) -> Result<PathBuf> {
    let bundle = source.join("tests/contest/contest/bundle.tar.gz");
    let is_there = bundle.exists();
    let commit = proc::output(
        Command::new("git")
            .args(["rev-parse", "HEAD"])
            .current_dir(source),
    );
    let commit = commit
        .ok()
        .filter(|_| is_there)
        .with_context(|| format!("{} is no checkout of youki", source.display()))?;
    cache::ensure("contest", &cache::key([commit]), |dir| {
        let target = dir.join("target");
        let build = |what: &str, options: &[&str]| -> Result<()> {
            let mut cargo = proc::cargo();
            cargo.current_dir(source).env("CARGO_TARGET_DIR", &target);
            // Nothing here is measured.
            cargo.env("CARGO_PROFILE_RELEASE_LTO", "off");
            // Not by `--package`: it relies on the features that the others select.
            cargo.args(["build", "--locked", "--release", "--bin", what]);
            let log = dir.join(format!("{what}.log"));
            let title = format!("building {what} of youki");
            proc::long(&title, cargo.args(options), &log)
        };
        build("contest", &[])?;
        build("runtimetest", &["--target", STATIC])?;
        let contest = dir.join("contest");
        fs::copy(target.join("release/contest"), &contest)?;
        let inner = target.join(STATIC).join("release/runtimetest");
        fs::copy(inner, dir.join("runtimetest"))?;
        fs::copy(&bundle, dir.join("bundle.tar.gz"))?;
        for group in proc::output(Command::new(&contest).arg("list").current_dir(dir))?.lines() {
            fs::write(dir.join(format!("{group}.group")), "")?;
        }
        fs::remove_dir_all(&target).context("cannot remove what the build leaves")
    })
}
