//! The `koya` command: thin front ends over the `koya` library.
//!
//! Exit statuses: that of the container's program for `run` and `exec`; 125 if Koya itself failed, 126 and 127 if the
//! program can't be run or found, as with other container tools.

mod at_once;
mod attach;
mod check;
mod client;
mod config;
mod connection;
mod container_log;
mod control;
mod datagrams;
mod detach;
mod disk;
mod environment;
mod link_local;
mod list;
mod log_records;
mod mounts;
mod names;
mod net;
mod output;
mod parse;
mod programs;
mod publish;
mod recorder;
mod removal;
mod run;
mod signals;
mod size;
mod state;
mod stats;
mod timeline;
mod variables;
mod volume;

use clap::{CommandFactory, Parser, Subcommand};
use koya::vmm::guest_text;
use koya_tasks::wire;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

/// Exit status of a command if Koya itself failed.
const FAILED: u8 = 125;

/// Environment variable for the log filter, in env_logger's syntax: `koya=info`, `koya_devices=debug`, ...
const LOG_VARIABLE: &str = "KOYA_LOG";

/// Containers that each run in a virtual machine of their own.
#[derive(Parser)]
#[command(
    name = "koya",
    version,
    arg_required_else_help = true,
    after_help = "These commands need no container engine; engines such as podman call `koya-runtime`, which has the \
                  commands of an OCI runtime. Set KOYA_LOG=koya=info for a more verbose log; KOYA_SHARE, \
                  KOYA_KERNEL and KOYA_INITRAMFS for the location of the guest kernel and the agent."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a command in a new container
    Run(Box<run::RunArgs>),
    /// Run a command in a running container
    Exec(client::ExecArgs),
    /// List containers
    Ps(list::PsArgs),
    /// Show the output of a detached container
    Logs(list::LogsArgs),
    /// Stop containers: send SIGTERM (or their stop signal), then SIGKILL after a timeout
    Stop(client::StopArgs),
    /// Wait until containers exit, and print their exit statuses
    Wait(list::WaitArgs),
    /// Send a signal to containers
    Kill(client::KillArgs),
    /// Remove containers that have exited
    Rm(list::RmArgs),
    /// Show the resource usage of containers, in the guest and on the host
    Stats(stats::StatsArgs),
    /// Show the timeline of a start, including failed starts
    Timeline(timeline::TimelineArgs),
    /// Update the CPUs and memory of a running container
    Update(size::UpdateArgs),
    /// Attach or detach disks of a running container
    Disk(disk::DiskArgs),
    /// Attach to the console of the guest kernel
    Console(client::ConsoleArgs),
    /// Check whether this machine can run Koya, by running a tiny guest
    Check(check::CheckArgs),
    /// Check or show the configuration of sandboxes under containerd
    Config(config::ConfigArgs),
    /// Manage direct volumes: block devices that guests mount themselves
    Volume(volume::VolumeArgs),
    /// Show versions, paths and the features of the host
    Env(environment::EnvArgs),
}

/// Exit status of a command, or its error.
type Outcome = anyhow::Result<u8>;

/// The definition of the command line, for its manual pages and completions.
pub fn command() -> clap::Command {
    Cli::command()
}

/// The whole command, with the arguments of this process.
pub fn main() -> ExitCode {
    let began = Instant::now();
    koya::prepare_process();
    // A limit of file sizes (`ulimit -f`) is an error of the write, not the end of this process.
    if let Err(error) = signal_hook::flag::register(libc::SIGXFSZ, Arc::default()) {
        output::complain!("koya: cannot handle SIGXFSZ: {error}");
        return ExitCode::from(FAILED);
    }
    // Open descriptors of the caller must not leak to helpers or to the process of a detached container.
    if let Err(error) = koya::vmm::host::sys::close_on_exec_from(3) {
        output::complain!("koya: cannot set close-on-exec on inherited descriptors: {error}");
        return ExitCode::from(FAILED);
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    log_to_stderr();
    if let Err(error) = state::sweep() {
        // A command that needs the directories reports the error itself.
        log::debug!("cannot clear away what killed containers left: {error:#}");
    }
    let outcome = match cli.command {
        Command::Run(args) => run::main(&args, began),
        Command::Exec(args) => client::exec(&args),
        Command::Ps(args) => list::ps(&args),
        Command::Logs(args) => list::logs(&args),
        Command::Stop(args) => client::stop(&args),
        Command::Wait(args) => list::wait(&args),
        Command::Kill(args) => client::kill(&args),
        Command::Rm(args) => list::rm(&args),
        Command::Stats(args) => stats::main(&args),
        Command::Timeline(args) => timeline::main(&args),
        Command::Update(args) => size::update(&args),
        Command::Disk(args) => disk::main(&args),
        Command::Console(args) => client::console(&args),
        Command::Check(args) => check::main(&args),
        Command::Config(args) => config::main(args),
        Command::Volume(args) => volume::main(args),
        Command::Env(args) => environment::main(&args),
    };
    match outcome {
        Ok(status) => ExitCode::from(status),
        Err(error) if output::is_reader_gone(&error) => ExitCode::from(output::READER_GONE),
        Err(error) => {
            output::complain!("koya: {error:#}");
            ExitCode::from(failure_status(&error))
        }
    }
}

/// Prints the requested help, or the error in the arguments.
fn usage(error: &clap::Error) -> ExitCode {
    let shown = error.print().and_then(|()| std::io::stdout().flush());
    // An invalid command line is a failure of Koya, too: clap's status 2 could be a program's.
    let status = if error.use_stderr() { FAILED } else { 0 };
    ExitCode::from(match shown {
        Err(_) if error.use_stderr() => status,
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => output::READER_GONE,
        Err(e) => {
            output::complain!("koya: cannot write to standard output: {e}");
            FAILED
        }
        Ok(()) => status,
    })
}

/// Logs warnings of Koya's own crates, or as set by `KOYA_LOG`.
fn log_to_stderr() {
    let filter = env_logger::Env::new().filter_or(LOG_VARIABLE, "koya=warn");
    env_logger::Builder::from_env(filter)
        .filter_module(koya::GUEST_LOG, log::LevelFilter::Off)
        .format(|out, record| {
            let level = record.level().as_str().to_lowercase();
            let text = guest_text::sanitize(record.args().to_string());
            writeln!(out, "koya: {level}: {text}")
        })
        .init();
}

/// Exit status for an error: 126 or 127 for a program that can't be executed, 125 for everything else.
fn failure_status(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<koya::Error>() {
        Some(koya::Error::NotExecutable { status, .. }) => *status as u8,
        _ => FAILED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// girder/girder_worker 114, phusion/baseimage-docker 206, GoogleContainerTools/distroless 56.
    #[test]
    fn the_words_of_a_program_reach_it_as_they_are() {
        let parse = |words: &[&str]| {
            Cli::try_parse_from([&["koya"], words].concat())
                .unwrap()
                .command
        };
        let program = ["sh", "", "--", "-v", "a b", "--rm", "--", ""];
        for before in [
            &["run", "--rootfs", "/"][..],
            &["run", "--rootfs", "/", "--"],
        ] {
            let Command::Run(run) = parse(&[before, &program].concat()) else {
                panic!("it is another command");
            };
            assert_eq!(run.words(), program, "{before:?}");
        }
        for before in [
            &["exec", "name"][..],
            &["exec", "name", "--"],
            &["exec", "-i", "--", "name"],
        ] {
            let Command::Exec(exec) = parse(&[before, &program].concat()) else {
                panic!("it is another command");
            };
            assert_eq!(exec.words(), program, "{before:?}");
        }
    }
}
