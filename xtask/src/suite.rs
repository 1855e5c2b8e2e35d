//! `cargo xtask test`: all tests, cheapest first.

use crate::arch::{Arch, ArchArgs};
use crate::rig::{self, Model};
use crate::{apt, build, cache, dockers, lint, proc};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

#[derive(Args)]
pub(crate) struct TestArgs {
    #[command(flatten)]
    arch: ArchArgs,
    #[command(flatten)]
    model: Model,
    /// Run only the tests that need no Linux guest
    #[arg(long)]
    quick: bool,
    /// On x86_64, run a few Linux guests on emulated aarch64 hosts after all other tests (`smoke`)
    #[arg(long, conflicts_with_all = ["arch", "quick", "filter"])]
    with_aarch64: bool,
    /// Leave out the Linux guests that passed in earlier runs with this option; the others are run, and stored when they
    /// pass
    #[arg(long)]
    resume: bool,
    /// Run only tests whose name contains this; `smoke` for a few Linux guests that cover the essentials, `long` for tests
    /// that take minutes each, which are left out otherwise
    filter: Option<String>,
}

/// The examples used by system tests. Other examples are for one architecture.
const EXAMPLES: [&str; 4] = ["--example", "console", "--example", "hello"];

/// If set, the system tests' program does nothing: it is built with the unit tests, since cargo would build libraries with
/// other features for it alone.
const NO_SYSTEM_TESTS: &str = "KOYA_TEST_NONE";

/// Lints, unit tests and tiny guests, then Linux guests in the rig, and with `--with-aarch64` a few of aarch64.
pub(crate) fn run(args: &TestArgs) -> Result<()> {
    let arch = args.arch.arch();
    args.model.check(arch, 1)?;
    if !arch.is_native() {
        return run_foreign(arch, args);
    }
    let products = build::ensure()?;
    if args.filter.is_none() {
        lint::run()?;
    }
    let cargo = || {
        let mut cargo = proc::cargo();
        cargo.envs(products.env());
        cargo
    };
    let test = |targets: &[&str]| {
        let mut test = cargo();
        test.arg("test").args(targets);
        if let Some(filter) = &args.filter {
            test.args(["--", filter]);
        }
        test
    };
    eprintln!("test: units and tiny guests on this machine");
    proc::run(test(&["--workspace"]).env(NO_SYSTEM_TESTS, "1"))?;
    if build::has_musl(arch) {
        eprintln!("test: host, devices and monitor, built with musl, as what is shipped");
        let packages = ["koya-host", "koya-devices", "koya-vmm"].map(|name| ["--package", name]);
        proc::run(&mut test(
            &[packages.as_flattened(), &["--target", arch.musl()]].concat(),
        ))?;
    }
    if args.quick {
        eprintln!("test: --quick: Linux guests were not run");
        return Ok(());
    }
    eprintln!("test: Linux guests");
    let (debian, fsx) = (debian()?, fsx(arch)?);
    let (containerds, dockers) = (containerds(arch)?, dockers::selected_for(arch)?);
    proc::run(cargo().args(["build", "--workspace"]).args(EXAMPLES))?;
    let mut system = test(&["--workspace", "--test", "system"]);
    system
        .env("KOYA_TEST_DEBIAN", &debian)
        .env("KOYA_TEST_FSX", &fsx)
        .env("KOYA_TEST_CONTAINERD", &containerds)
        .env("KOYA_TEST_DOCKER", &dockers)
        .env(MODEL, args.model.words().join(" "));
    resume(&mut system, arch, args.model, args)?;
    proc::run(&mut system)?;
    if args.with_aarch64 && !Arch::Aarch64.is_native() {
        eprintln!("test: a few Linux guests of aarch64");
        let ready = Foreign::prepare(Arch::Aarch64, ALL, true);
        ready
            .context("the aarch64 tests cannot be set up")?
            .smoke(Model::default(), args)?;
    }
    Ok(())
}

/// Options of the rigs that tests start, which select an emulated host.
const MODEL: &str = "KOYA_TEST_MODEL";

/// Names a file with the tests that have passed, for `--resume`: one for each kind of host.
fn resume(system: &mut Command, arch: Arch, model: Model, args: &TestArgs) -> Result<()> {
    if args.resume {
        let directory = proc::checkout().join("target/passed-tests");
        std::fs::create_dir_all(&directory)?;
        let host = [vec![arch.name().to_owned()], model.words()].concat();
        system.env("KOYA_TEST_PASSED", directory.join(host.concat()));
    }
    Ok(())
}

/// The crates whose unit tests and tiny guests also run on another architecture: those with code for it.
const FOREIGN_UNITS: [&str; 4] = ["koya-host", "koya-devices", "koya-vmm", "koya-agent"];

/// The filter for a few tests that need only Koya (`tests/tests/system/smoke.rs`).
const SMOKE: &str = "smoke";

/// The tests for another architecture than this machine's, in emulated hosts. Lints, and unit tests of
/// architecture-independent crates are left out.
fn run_foreign(arch: Arch, args: &TestArgs) -> Result<()> {
    if args.filter.is_none() {
        build::ensure_for(arch)?;
        eprintln!(
            "test: units and tiny guests for {}, each program in a rig",
            arch.name()
        );
        let packages = FOREIGN_UNITS.map(|name| ["--package", name]);
        let mut units = foreign_cargo(arch, &["test"])?;
        units
            .args(packages.as_flattened())
            .args(["--lib", "--bins", "--tests"]);
        let xtask = std::env::current_exe()?;
        // The file system of a rig's root has no file handles, which file tests need.
        let runner = format!(
            "{} rig --arch {} --no-build --cpus 1 -- env TMPDIR=/run/scratch",
            xtask.display(),
            arch.name()
        );
        let variable = arch.gnu().to_uppercase().replace('-', "_");
        units.env(format!("CARGO_TARGET_{variable}_RUNNER"), runner);
        proc::run(&mut units)?;
    }
    if args.quick {
        eprintln!("test: --quick: Linux guests were not run");
        return Ok(());
    }
    eprintln!("test: Linux guests");
    let smoke = args.filter.as_deref() == Some(SMOKE);
    let ready = Foreign::prepare(arch, FEW, smoke)?;
    if smoke {
        return ready.smoke(args.model, args);
    }
    let mut system = ready.command(args.model);
    if let Some(filter) = &args.filter {
        system.args(["--", filter]);
    }
    system
        .env("KOYA_TEST_DEBIAN", debian_for(arch)?)
        .env("KOYA_TEST_FSX", fsx(arch)?)
        .env("KOYA_TEST_CONTAINERD", containerds(arch)?)
        .env("KOYA_TEST_DOCKER", dockers::selected_for(arch)?);
    resume(&mut system, arch, args.model, args)?;
    proc::run(&mut system)
}

/// What the system tests for another architecture need.
struct Foreign {
    arch: Arch,
    products: build::Products,
    program: PathBuf,
    /// The packages that cargo selects for the program of this machine.
    packages: &'static [&'static str],
}

/// Only those that it needs.
const FEW: &[&str] = &["--package", "koya-tests"];
/// As the tests of this machine: otherwise, cargo would build libraries once more, with other features.
const ALL: &[&str] = &["--workspace"];

impl Foreign {
    /// Builds it; the examples are not for the smoke set.
    fn prepare(arch: Arch, packages: &'static [&'static str], smoke: bool) -> Result<Self> {
        let products = build::ensure_for(arch)?;
        rig::Host::ensure_for(arch)?;
        let program = system_tests(arch)?;
        if !smoke {
            let of = ["build", "--package", "koya-vmm", "--package", "koya"];
            proc::run(foreign_cargo(arch, &of)?.args(EXAMPLES))?;
        }
        Ok(Self {
            arch,
            products,
            program,
            packages,
        })
    }

    /// The smoke set, on this kind of host or, if none is selected, on two.
    fn smoke(&self, model: Model, args: &TestArgs) -> Result<()> {
        let models = match model.is_chosen() {
            true => vec![model],
            false => vec![model, Model::SMALL],
        };
        for model in models {
            let mut system = self.command(model);
            system.args(["--", SMOKE]);
            resume(&mut system, self.arch, model, args)?;
            proc::run(&mut system)?;
        }
        Ok(())
    }

    /// The program for this machine, which selects the tests and starts their rigs.
    fn command(&self, model: Model) -> Command {
        let examples = format!("target/static/{}/debug/examples", self.arch.gnu());
        let mut system = proc::cargo();
        system
            .arg("test")
            .args(self.packages)
            .args(["--test", "system"])
            .envs(self.products.env())
            .env("KOYA_TEST_ARCH", self.arch.name())
            .env("KOYA_TEST_PROGRAM", &self.program)
            .env("KOYA_TEST_EXAMPLES", proc::checkout().join(examples))
            .env(MODEL, model.words().join(" "));
        system
    }
}

/// A cargo command that builds static programs for another architecture.
fn foreign_cargo(arch: Arch, words: &[&str]) -> Result<Command> {
    let mut cargo = arch.cargo(arch.gnu())?;
    cargo
        .args(words)
        .args(["--target", arch.gnu(), "--target-dir"]);
    cargo.arg(proc::checkout().join("target/static"));
    build::link_static(&mut cargo, arch, build::STATIC)?;
    Ok(cargo)
}

/// The program of the system tests for another architecture.
fn system_tests(arch: Arch) -> Result<PathBuf> {
    let words = [
        "test",
        "--no-run",
        "--package",
        "koya-tests",
        "--test",
        "system",
    ];
    let mut cargo = foreign_cargo(arch, &words)?;
    cargo.args(["--message-format", "json-render-diagnostics"]);
    let out = cargo.stderr(Stdio::inherit()).output()?;
    if !out.status.success() {
        bail!("the system tests for {} do not build", arch.name());
    }
    let said = String::from_utf8(out.stdout)?;
    said.lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| Some(message.get("executable")?.as_str()?.to_owned()))
        .map(PathBuf::from)
        .find(|program| is_system_tests(program))
        .context("cargo names no program of the system tests")
}

fn is_system_tests(program: &Path) -> bool {
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with("system-")
}

/// A tar of Debian's minimal root file system with a C compiler, git and SQLite, created once.
pub(crate) fn debian() -> Result<PathBuf> {
    debian_for(Arch::of_this_machine())
}

/// As [`debian`], for an architecture.
fn debian_for(arch: Arch) -> Result<PathBuf> {
    const SUITE: &str = "bookworm";
    const INCLUDE: &str = "--include=gcc,libc6-dev,make,git,sqlite3";
    let key = arch.key(&[SUITE, "minbase", INCLUDE]);
    let dir = cache::ensure("debian", &key, |dir| {
        let root = dir.join("root");
        let log = dir.with_extension("log");
        debootstrap(arch, SUITE, INCLUDE, &root, &log)?;
        let tar = std::fs::File::create(dir.join("root.tar"))?;
        let mut pack = match arch.is_native() {
            true => {
                let mut pack = Command::new("tar");
                pack.args(PACK).current_dir(&root);
                pack
            }
            false => configured(arch, &root)?,
        };
        proc::run(pack.stdout(tar))?;
        Ok(std::fs::remove_dir_all(&root)?)
    })?;
    Ok(dir.join("root.tar"))
}

/// Creates Debian's minimal root file system with further packages. That of another architecture still has to be configured.
pub(crate) fn debootstrap(
    arch: Arch,
    suite: &str,
    include: &str,
    root: &Path,
    log: &Path,
) -> Result<()> {
    let mut debootstrap = Command::new("/usr/sbin/debootstrap");
    debootstrap.args(["--variant=minbase", include]);
    debootstrap.arg(format!("--arch={}", arch.debian()));
    if !arch.is_native() {
        debootstrap.arg("--foreign");
    }
    let what = "making a Debian root file system (once)";
    proc::long(what, debootstrap.arg(suite).arg(root), log)
}

/// Options of tar for packing a root file system without the downloaded packages.
const PACK: [&str; 3] = ["--exclude=./var/cache/apt/archives/*.deb", "-c", "."];

/// The command that configures the packages of another architecture in an emulated host, and packs them.
fn configured(arch: Arch, root: &Path) -> Result<Command> {
    let script = format!(
        "cp -a '{}' /run/scratch/root && cd /run/scratch/root && \
         chroot . /debootstrap/debootstrap --second-stage >&2 && exec tar {}",
        root.display(),
        PACK.join(" ")
    );
    eprintln!("configuring it in a rig, which takes some minutes");
    let mut rig = Command::new(std::env::current_exe()?);
    rig.args(["rig", "--arch", arch.name(), "--no-build", "--cpus", "1"]);
    rig.args(["--", "/bin/sh", "-c", &script]);
    Ok(rig)
}

/// Debian suites with the tested versions of containerd: 1.6, 1.7 and 2.
pub(crate) const CONTAINERD_SUITES: [&str; 3] = ["bookworm", "trixie", "forky"];

/// Their directories, separated by colons.
fn containerds(arch: Arch) -> Result<OsString> {
    let directories = CONTAINERD_SUITES.into_iter();
    let directories = directories.map(|suite| containerd_for(arch, suite));
    let directories = directories.collect::<Result<Vec<_>>>()?;
    Ok(std::env::join_paths(directories)?)
}

/// The directory of containerd from a suite, unpacked once.
pub(crate) fn containerd(suite: &str) -> Result<PathBuf> {
    containerd_for(Arch::of_this_machine(), suite)
}

fn containerd_for(arch: Arch, suite: &str) -> Result<PathBuf> {
    let dir = cache::ensure("containerd", &arch.key(&["containerd", suite]), |dir| {
        apt::unpack_for(arch, suite, &["containerd"], dir)
    })?;
    Ok(dir.join("usr/bin"))
}

/// The directory of fsx, the file system exerciser, built once.
fn fsx(arch: Arch) -> Result<PathBuf> {
    const VERSION: &str = "0.3.2";
    let dir = cache::ensure("fsx", &arch.key(&["fsx", VERSION]), |dir| {
        let mut cargo = arch.cargo(arch.gnu())?;
        cargo.args(["install", "fsx", "--locked", "--version", VERSION, "--root"]);
        cargo.arg(dir);
        if !arch.is_native() {
            cargo.args(["--target", arch.gnu()]);
        }
        let log = dir.with_extension("log");
        let what = "building fsx, which exercises file systems (once)";
        proc::long(what, &mut cargo, &log)
    })?;
    Ok(dir.join("bin"))
}
