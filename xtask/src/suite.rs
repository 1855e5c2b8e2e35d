//! `cargo xtask test`: every test there is, cheapest first.

use crate::{apt, build, cache, lint, proc};
use anyhow::{Result, bail};
use clap::Args;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

#[derive(Args)]
pub(crate) struct TestArgs {
    /// Only the tests that need no Linux guest
    #[arg(long)]
    quick: bool,
    /// Only tests whose name contains this
    filter: Option<String>,
}

/// Lints, unit tests and tiny guests, then Linux guests in the rig.
pub(crate) fn run(args: &TestArgs) -> Result<()> {
    let products = build::ensure()?;
    if args.filter.is_none() {
        lint::run()?;
    }
    let cargo = || {
        let mut cargo = proc::cargo();
        cargo.envs(products.env());
        cargo
    };
    let test = |packages: &[&str]| {
        let mut test = cargo();
        test.arg("test").args(packages);
        if let Some(filter) = &args.filter {
            test.args(["--", filter]);
        }
        test
    };
    eprintln!("test: units and tiny guests on this machine");
    proc::run(&mut test(&["--workspace", "--exclude", "koya-tests"]))?;
    if build::has_musl() {
        eprintln!("test: host, devices and monitor, built with musl, as what is shipped");
        let packages = ["koya-host", "koya-devices", "koya-vmm"].map(|name| ["--package", name]);
        proc::run(&mut test(
            &[packages.as_flattened(), &["--target", build::MUSL]].concat(),
        ))?;
    }
    if args.quick {
        eprintln!("test: --quick: Linux guests were not run");
        return Ok(());
    }
    eprintln!("test: Linux guests");
    let (debian, fsx) = (debian()?, fsx()?);
    let (containerds, dockers) = (containerds()?, dockers()?);
    proc::run(cargo().args([
        "build",
        "--package",
        "koya-vmm",
        "--package",
        "koya",
        "--examples",
    ]))?;
    let mut system = test(&["--package", "koya-tests"]);
    system
        .env("KOYA_TEST_DEBIAN", &debian)
        .env("KOYA_TEST_FSX", &fsx)
        .env("KOYA_TEST_CONTAINERD", &containerds)
        .env("KOYA_TEST_DOCKER", &dockers);
    proc::run(&mut system)
}

/// A tar of Debian's minimal root file system with a C compiler, git and SQLite, made once.
pub(crate) fn debian() -> Result<PathBuf> {
    const SUITE: &str = "bookworm";
    const INCLUDE: &str = "--include=gcc,libc6-dev,make,git,sqlite3";
    let key = cache::key([SUITE, "minbase", INCLUDE]);
    let dir = cache::ensure("debian", &key, |dir| {
        let root = dir.join("root");
        proc::long(
            "making a Debian root file system (once)",
            Command::new("/usr/sbin/debootstrap")
                .args(["--variant=minbase", INCLUDE, SUITE])
                .arg(&root),
            &dir.with_extension("log"),
        )?;
        proc::run(
            Command::new("tar")
                .args(["--exclude=./var/cache/apt/archives/*.deb", "-cf"])
                .arg(dir.join("root.tar"))
                .arg(".")
                .current_dir(&root),
        )?;
        Ok(std::fs::remove_dir_all(&root)?)
    })?;
    Ok(dir.join("root.tar"))
}

/// Debian's suites whose containerds are tested with: 1.6, 1.7 and 2.
pub(crate) const CONTAINERD_SUITES: [&str; 3] = ["bookworm", "trixie", "forky"];

/// Their directories, with colons between them.
fn containerds() -> Result<OsString> {
    let directories = CONTAINERD_SUITES.into_iter().map(containerd);
    let directories = directories.collect::<Result<Vec<_>>>()?;
    Ok(std::env::join_paths(directories)?)
}

/// The directory of a suite's containerd, unpacked once.
pub(crate) fn containerd(suite: &str) -> Result<PathBuf> {
    let key = cache::key(["containerd", suite]);
    let dir = cache::ensure("containerd", &key, |dir| {
        apt::unpack(suite, &["containerd"], dir)
    })?;
    Ok(dir.join("usr/bin"))
}

/// Debian's suites whose Dockers can be tested with, 26 and 28, each with what has its containers' first process.
const DOCKER_SUITES: [(&str, &str); 2] = [("trixie", "tini"), ("forky", "tini-static")];

/// Chooses the Dockers: `first` or `all`. Their tests take minutes, so without it there are none.
const WHICH_DOCKERS: &str = "KOYA_TEST_DOCKERS";

/// The directories of those that are tested with, with colons between them.
fn dockers() -> Result<OsString> {
    let which = std::env::var(WHICH_DOCKERS).unwrap_or_default();
    let count = match which.as_str() {
        "" => 0,
        "first" => 1,
        "all" => DOCKER_SUITES.len(),
        other => bail!("{WHICH_DOCKERS} is {other:?}, not `first` or `all`"),
    };
    let directories = DOCKER_SUITES[..count].iter();
    let directories = directories.map(|(suite, init)| docker(suite, init));
    Ok(std::env::join_paths(
        directories.collect::<Result<Vec<_>>>()?,
    )?)
}

/// The directory of a suite's Docker, unpacked once. Its runc is Debian 12's, whose C library the machine has.
fn docker(suite: &str, init: &str) -> Result<PathBuf> {
    let packages = ["docker.io", "docker-cli", "containerd", init];
    let key = cache::key([&[suite, "runc"], &packages[..]].concat());
    cache::ensure("docker", &key, |dir| {
        apt::unpack(suite, &packages, dir)?;
        apt::unpack("bookworm", &["runc"], dir)
    })
}

/// The directory of the file-system exerciser, built once.
fn fsx() -> Result<PathBuf> {
    const VERSION: &str = "0.3.2";
    let key = cache::key(["fsx", VERSION]);
    let dir = cache::ensure("fsx", &key, |dir| {
        proc::long(
            "building fsx, which exercises file systems (once)",
            proc::cargo()
                .args(["install", "fsx", "--locked", "--version", VERSION, "--root"])
                .arg(dir),
            &dir.with_extension("log"),
        )
    })?;
    Ok(dir.join("bin"))
}
