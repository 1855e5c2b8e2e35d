//! Linux guests, by the `koya` command as a user has it.
//!
//! The tests need a KVM on which Linux runs. Where the machine has none, this program starts
//! itself once more in rigs (`cargo xtask rig`): one for each of the machine's CPUs, up to
//! [`MAX_RIGS`], since each emulates one CPU, and each rig's tests share its one boot. It says which
//! KVM it ran on; nothing is skipped.

mod cases;
mod command_line;
mod confinement;
mod containerd;
mod cri;
mod daemon;
mod debian;
mod disks;
mod docker;
mod exec;
mod faults;
mod files;
mod hooks;
mod images;
mod kernel;
mod lent;
mod life;
mod memory;
mod network;
mod oci;
mod pod;
mod pod_files;
mod podman;
mod run;
mod surroundings;
mod timeline;
mod tool;
mod torture;
mod volumes;
mod vsock;
mod walls;
mod watches;

use anyhow::{Context, Result};
use libtest_mimic::{Arguments, Trial};
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, ExitCode, Stdio};
use std::thread::JoinHandle;

/// A rig has 6 GiB of memory.
const MAX_RIGS: usize = 3;
/// `I/N`: of all tests, those of the I-th of N rigs.
pub(crate) const SHARE: &str = "KOYA_TEST_SHARE";

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    let all = [
        cases::trials(),
        command_line::trials(),
        run::trials(),
        torture::trials(),
        containerd::trials(),
        cri::trials(),
        debian::trials(),
        disks::trials(),
        docker::trials(),
        exec::trials(),
        faults::trials(),
        files::trials(),
        images::trials(),
        kernel::trials(),
        life::trials(),
        memory::trials(),
        network::trials(),
        oci::trials(),
        pod_files::trials(),
        podman::trials(),
        surroundings::trials(),
        timeline::trials(),
        vsock::trials(),
        walls::trials(),
        watches::trials(),
    ];
    let mut trials: Vec<Trial> = all.into_iter().flatten().collect();
    let Ok(rig) = std::env::var("KOYA_RIG") else {
        if arguments.list {
            return libtest_mimic::run(&arguments, trials).exit_code();
        }
        let wanted = trials.iter().filter(|t| is_wanted(t, &arguments)).count();
        return match in_rigs(wanted) {
            Ok(code) => code,
            Err(error) => {
                eprintln!("system tests: {error:#}");
                ExitCode::FAILURE
            }
        };
    };
    if let Ok(share) = std::env::var(SHARE) {
        let Some((index, rigs)) = parse_share(&share) else {
            eprintln!("system tests: {SHARE} is {share:?}, not I/N");
            return ExitCode::FAILURE;
        };
        let mut place = 0;
        trials.retain(|trial| {
            place += usize::from(is_wanted(trial, &arguments));
            place % rigs == index
        });
    }
    eprintln!("system tests: on the {rig} KVM");
    // Each test has a machine to itself, and much of its time it waits.
    arguments.test_threads.get_or_insert(2);
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn is_wanted(trial: &Trial, arguments: &Arguments) -> bool {
    match &arguments.filter {
        Some(filter) if arguments.exact => trial.name() == filter,
        Some(filter) => trial.name().contains(filter.as_str()),
        None => true,
    }
}

fn parse_share(text: &str) -> Option<(usize, usize)> {
    let (index, rigs) = text.split_once('/')?;
    let (index, rigs) = (index.parse().ok()?, rigs.parse().ok()?);
    (index < rigs).then_some((index, rigs))
}

/// The same program, with the same arguments, where there is a KVM.
fn in_rigs(tests: usize) -> Result<ExitCode> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let xtask = |words: &[&str]| {
        let mut command = Command::new(&cargo);
        command.args(["run", "--quiet", "--package", "xtask", "--"]);
        command.args(words);
        command
    };
    let built = xtask(&["build"]).stdout(Stdio::null()).status();
    if !built.context("cannot start cargo")?.success() {
        return Ok(ExitCode::FAILURE);
    }
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let rigs = tests.clamp(1, cpus.min(MAX_RIGS));
    let mut children = Vec::new();
    for index in 0..rigs {
        // One emulated CPU each: QEMU's emulation of several can run stale copies of code that a
        // kernel patches in itself, and then a kernel dies for no fault of ours.
        let mut command = xtask(&["rig", "--no-build", "--cpus", "1", "--"]);
        command.args(std::env::args_os());
        command.env(SHARE, format!("{index}/{rigs}"));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot start the rig")?;
        let label = format!("rig {}: ", index + 1);
        let copiers = [
            child.stdout.take().map(|out| relay(&label, out)),
            child.stderr.take().map(|out| relay(&label, out)),
        ];
        children.push((child, copiers));
    }
    let mut code = ExitCode::SUCCESS;
    for (mut child, copiers) in children {
        if !child.wait()?.success() {
            code = ExitCode::FAILURE;
        }
        for copier in copiers.into_iter().flatten() {
            copier.join().ok();
        }
    }
    Ok(code)
}

/// Passes lines on as they come, each with who said it.
fn relay(label: &str, from: impl Read + Send + 'static) -> JoinHandle<()> {
    let label = label.to_owned();
    std::thread::spawn(move || {
        for line in BufReader::new(from)
            .split(b'\n')
            .map_while(|line| line.ok())
        {
            println!("{label}{}", String::from_utf8_lossy(&line));
        }
    })
}

/// A test by its function's name.
#[macro_export]
macro_rules! trials {
    ($($name:ident),* $(,)?) => {
        /// This file's tests.
        pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
            vec![$(libtest_mimic::Trial::test(
                concat!(module_path!(), "::", stringify!($name)).trim_start_matches("system::"),
                || $name().map_err(|error| format!("{error:#}").into()),
            )),*]
        }
    };
}
