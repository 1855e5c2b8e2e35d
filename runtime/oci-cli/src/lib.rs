//! `koya-runtime`: the command line of OCI runtimes, compatible with runc, for podman and others that drive a runtime
//! by its commands.
//!
//! `create` leaves a process behind ([`serve`]) that contains the virtual machine: callers get its PID, it owns the
//! sandbox's network namespace, and it exits with the container's status. The other commands find it by the state stored
//! under `--root` ([`state`]) and send it requests over a socket ([`ask`]).

mod capabilities;
mod cli;
mod console;
mod create;
mod events;
mod exec;
mod ipc;
mod life;
mod list;
mod logging;
mod long_lived;
mod member;
mod notifier;
mod notify;
mod oom;
mod pidfd;
mod preserved;
mod program;
mod serve;
mod signal;
mod source;
mod spec;
mod state;
mod update;
mod values;

use anyhow::Context as _;
use clap::CommandFactory as _;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use cli::{Cli, Command};
use koya::vmm::guest_text;
use preserved::PreservedFds;
use std::io::Write as _;
use std::process::ExitCode;

/// Exit status of a command that failed, as in runc.
const FAILED: u8 = 1;

/// Exit status if `exec` failed, as in runc.
const EXEC_FAILED: u8 = 255;

/// Exit status of a command, or its error.
type Outcome = anyhow::Result<u8>;

/// The definition of the command line, for its manual pages.
pub fn command() -> clap::Command {
    Cli::command()
}

/// The whole command, with the arguments of this process.
pub fn main() -> ExitCode {
    koya::prepare_process();
    // Open descriptors of the caller must not leak to long-lived processes.
    if let Err(error) = koya::vmm::host::sys::close_on_exec_from(3) {
        writeln!(std::io::stderr(), "koya-runtime: {error}").ok();
        return ExitCode::from(FAILED);
    }
    let cli = match Cli::read(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => {
            error.print().ok();
            if error.kind() == ErrorKind::InvalidSubcommand
                && let Some(ContextValue::String(name)) = error.get(ContextKind::InvalidSubcommand)
            {
                // In runc's wording.
                writeln!(std::io::stderr(), "No help topic for '{name}'").ok();
            }
            return ExitCode::from(if error.use_stderr() { FAILED } else { 0 });
        }
    };
    let given = PreservedFds::take(&cli.command);
    if let Err(error) = logging::start(&cli.globals) {
        writeln!(std::io::stderr(), "{error:#}").ok();
        return ExitCode::from(FAILED);
    }
    let failed = match cli.command {
        Command::Exec(_) => EXEC_FAILED,
        _ => FAILED,
    };
    match given.and_then(|given| carry_out(cli, &given)) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            // Callers show the last error in the log, or standard error without a log.
            log::error!("{error:#}");
            if logging::is_to_file() {
                let text = guest_text::sanitize(format!("{error:#}"));
                writeln!(std::io::stderr(), "{text}").ok();
            }
            ExitCode::from(failed)
        }
    }
}

fn carry_out(cli: Cli, given: &PreservedFds) -> Outcome {
    let root = state::Root::of(&cli.globals);
    let words = std::env::args().skip(1).collect::<Vec<_>>();
    log::debug!("koya-runtime {}", words.join(" "));
    match cli.command {
        Command::Create(args) => create::create(&root, &cli.globals, &args, given),
        Command::Run(args) => create::run(&root, &cli.globals, &args, given),
        Command::Start(args) => life::start(&root, &args.id),
        Command::State(args) => list::state(&root, &args.id),
        Command::Kill(args) => life::kill(&root, &args),
        Command::Delete(args) => life::delete(&root, &args),
        Command::Exec(args) => exec::exec(&root, &args, given).context("exec failed"),
        Command::Ps(args) => list::ps(&root, &args),
        Command::List(args) => list::list(&root, &args),
        Command::Pause(args) => life::pause(&root, &args.id),
        Command::Resume(args) => life::resume(&root, &args.id),
        Command::Update(args) => update::update(&root, &args),
        Command::Events(args) => events::events(&root, &args),
        Command::Spec(args) => spec::spec(&args),
        Command::Features => spec::features(),
        Command::Checkpoint(_) => anyhow::bail!("checkpoint is not supported"),
        Command::Restore(_) => anyhow::bail!("restore is not supported"),
        Command::Serve(_) => serve::serve(),
        Command::Stub => exec::stub(),
    }
}
