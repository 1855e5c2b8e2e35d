//! Linux guests, by the `koya` command as a user has it.
//!
//! The tests need a KVM on which Linux runs. Where the machine has none, this program starts
//! itself once more in the rig (`cargo xtask rig`) and all tests share that one boot. It says
//! which KVM it ran on; nothing is skipped.

mod debian;
mod exec;
mod files;
mod life;
mod run;
mod tool;

use libtest_mimic::{Arguments, Trial};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let Ok(rig) = std::env::var("KOYA_RIG") else {
        return in_rig();
    };
    eprintln!("system tests: on the {rig} KVM");
    let mut arguments = Arguments::from_args();
    // Each test has a machine to itself, and much of its time it waits.
    arguments.test_threads.get_or_insert(2);
    let trials: Vec<Trial> = [
        run::trials(),
        exec::trials(),
        files::trials(),
        life::trials(),
        debian::trials(),
    ]
    .into_iter()
    .flatten()
    .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// The same program, with the same arguments, where there is a KVM.
fn in_rig() -> ExitCode {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let error = Command::new(cargo)
        .args(["run", "--quiet", "--package", "xtask", "--", "rig"])
        // One emulated CPU: QEMU's emulation of several can run stale copies of code that a kernel
        // patches in itself, and then a kernel dies for no fault of ours.
        .args(["--cpus", "1", "--"])
        .args(std::env::args_os())
        .exec();
    eprintln!("cannot start the rig: {error}");
    ExitCode::FAILURE
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
