//! `cargo xtask`: the single entry point for builds and tests.
//!
//! Each command installs its requirements, shows progress while it waits, and keeps expensive results in a cache outside the
//! checkout, named by the hash of their inputs.

mod apt;
mod arch;
mod archive;
mod bats;
mod bench;
mod build;
mod cache;
mod contest;
mod crun_tests;
mod deb;
mod deb_try;
mod demo;
mod dependencies;
mod dockers;
mod fuzz;
mod install;
mod kernel;
mod lint;
mod podman_tests;
mod proc;
mod rig;
mod runc_tests;
mod setup;
mod suite;
mod unsafe_blocks;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Builds, runs and tests Koya.
///
/// A newcomer needs two commands: `cargo xtask demo` and `cargo xtask test`.
/// Expensive results (kernels, the rig) are kept under $KOYA_CACHE, by default ~/.cache/koya.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install the Debian packages for builds and tests (as root; otherwise print the command)
    Setup,
    /// Build the guest kernel: an ELF vmlinux and a bzImage
    Kernel(kernel::KernelArgs),
    /// Build everything that is needed to run a container: koya, agent, initramfs, kernel
    Build(build::BuildArgs),
    /// Install Koya below a prefix, with manual pages and completions; or remove it
    Install(install::InstallArgs),
    /// Build a Debian package
    Deb(deb::DebArgs),
    /// Run a command or a shell on a host with KVM: an emulated one, or this machine
    Rig(rig::RigArgs),
    /// Run a busybox container in a virtual machine and show its `uname -a`
    Demo(demo::DemoArgs),
    /// Run all tests: lints, unit tests, tiny guests, Linux guests in the rig
    Test(suite::TestArgs),
    /// Run runc's own integration tests with koya-runtime in its place
    RuncTests(bats::BatsArgs),
    /// Run crun's own tests with koya-runtime in its place
    CrunTests(crun_tests::CrunTestsArgs),
    /// Run youki's tests of OCI runtimes (contest) with koya-runtime
    Contest(contest::ContestArgs),
    /// Run podman's own system tests with koya-runtime
    PodmanTests(podman_tests::PodmanTestsArgs),
    /// Run the fuzz targets; their inputs are kept for the next run
    Fuzz(fuzz::FuzzArgs),
    /// Run benchmarks of Koya and its peers
    Bench(bench::BenchArgs),
    /// Check formatting, dependencies, clippy (also for aarch64), documentation and packages
    Lint,
    /// Count unsafe blocks by directory; fail if there are others than docs/security.md records
    Unsafe,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Setup => setup::run().map(|()| 0),
        Command::Kernel(args) => kernel::run(&args).map(|()| 0),
        Command::Build(args) => build::run(&args).map(|()| 0),
        Command::Install(args) => install::run(&args).map(|()| 0),
        Command::Deb(args) => deb::run(&args).map(|()| 0),
        Command::Rig(args) => rig::run(args),
        Command::Demo(args) => demo::run(&args),
        Command::Test(args) => suite::run(&args).map(|()| 0),
        Command::RuncTests(args) => runc_tests::run(&args).map(|()| 0),
        Command::CrunTests(args) => crun_tests::run(&args).map(|()| 0),
        Command::Contest(args) => contest::run(&args).map(|()| 0),
        Command::PodmanTests(args) => podman_tests::run(&args).map(|()| 0),
        Command::Fuzz(args) => fuzz::run(&args).map(|()| 0),
        Command::Bench(args) => bench::run(&args).map(|()| 0),
        Command::Lint => lint::run().map(|()| 0),
        Command::Unsafe => unsafe_blocks::check(&proc::checkout())
            .map(|table| {
                print!("{table}");
                0
            })
            .map_err(anyhow::Error::msg),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
