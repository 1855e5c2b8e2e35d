//! Commands that ask a running container's process for something.

use super::attach::{RawTerminal, terminal_size};
use super::control::{Answer, Request, send};
use super::run::expand_env;
use super::state::Folder;
use super::{FAILED, Outcome};
use anyhow::{Context, Result, bail};
use clap::Args;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

#[derive(Args)]
pub(super) struct ExecArgs {
    /// Give the process a terminal
    #[arg(long, short)]
    tty: bool,
    /// Connect standard input
    #[arg(long, short)]
    interactive: bool,
    /// An environment variable; without a value, the one of this environment
    #[arg(long, short, value_name = "K[=V]")]
    env: Vec<String>,
    /// The working directory
    #[arg(long, short, value_name = "DIR")]
    workdir: Option<PathBuf>,
    /// The user, by name or number, and the group
    #[arg(long, short, value_name = "USER[:GROUP]", default_value = "")]
    user: String,
    /// The container
    name: String,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<String>,
}

#[derive(Args)]
pub(super) struct StopArgs {
    /// Seconds before SIGKILL
    #[arg(long, short, default_value_t = 10)]
    time: u64,
    /// The containers
    #[arg(required = true)]
    names: Vec<String>,
}

#[derive(Args)]
pub(super) struct KillArgs {
    /// The signal, by number or name
    #[arg(long, short, default_value = "KILL", value_parser = parse_signal)]
    signal: i32,
    /// The containers
    #[arg(required = true)]
    names: Vec<String>,
}

#[derive(Args)]
pub(super) struct ConsoleArgs {
    /// The container
    name: String,
}

fn parse_signal(text: &str) -> Result<i32, String> {
    if let Ok(number) = text.parse::<i32>() {
        return match number {
            1..=31 => Ok(number),
            _ => Err(format!("there is no signal {number}; 1 to 31 can be sent")),
        };
    }
    let name = text.to_uppercase();
    let name = name.trim_start_matches("SIG");
    (1..=31)
        .find(|n| {
            signal_hook::low_level::signal_name(*n).is_some_and(|s| s == format!("SIG{name}"))
        })
        .ok_or_else(|| format!("there is no signal {text}"))
}

fn connect(name: &str) -> Result<UnixStream> {
    let folder = Folder::find(name)?;
    if !folder.is_running() {
        bail!("container {name} is not running");
    }
    UnixStream::connect(folder.control())
        .with_context(|| format!("container {name} does not answer"))
}

fn answer(name: &str, stream: UnixStream) -> Outcome {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    if line.is_empty() {
        bail!("container {name} ended");
    }
    match serde_json::from_str(&line)? {
        Answer::Done(status) => Ok(status as u8),
        Answer::Failed { status, reason } => {
            eprintln!("koya: {reason}");
            Ok(u8::try_from(status).unwrap_or(FAILED))
        }
    }
}

pub(super) fn exec(args: &ExecArgs) -> Outcome {
    let stream = connect(&args.name)?;
    let request = Request::Exec {
        args: args.command.clone(),
        env: expand_env(&args.env),
        cwd: args.workdir.clone(),
        user: args.user.clone(),
        terminal: args.tty.then(|| terminal_size().unwrap_or((0, 0))),
        interactive: args.interactive,
    };
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGWINCH])?;
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    send(
        &stream,
        &request,
        &[stdin.as_fd(), stdout.as_fd(), stderr.as_fd()],
    )?;
    let raw = match args.tty {
        true => RawTerminal::enter().ok(),
        false => None,
    };
    let forward = stream.try_clone()?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            let request = match (signal, terminal_size()) {
                (SIGWINCH, Some((rows, columns))) => Request::Resize(rows, columns),
                (SIGWINCH, None) => continue,
                (signal, _) => Request::Signal(signal),
            };
            if send(&forward, &request, &[]).is_err() {
                return;
            }
        }
    });
    let status = answer(&args.name, stream);
    drop(raw);
    status
}

/// Asks each container, and goes on when one can't.
fn for_each(names: &[String], request: impl Fn() -> Request) -> Outcome {
    let mut worst = 0;
    for name in names {
        let asked = connect(name).and_then(|stream| {
            send(&stream, &request(), &[])?;
            answer(name, stream)
        });
        match asked {
            Ok(0) => println!("{name}"),
            Ok(status) => worst = worst.max(status),
            Err(error) => {
                eprintln!("koya: {error:#}");
                worst = worst.max(FAILED);
            }
        }
    }
    Ok(worst)
}

pub(super) fn stop(args: &StopArgs) -> Outcome {
    for_each(&args.names, || Request::Stop(args.time))
}

pub(super) fn kill(args: &KillArgs) -> Outcome {
    for_each(&args.names, || Request::Signal(args.signal))
}

pub(super) fn console(args: &ConsoleArgs) -> Outcome {
    let stream = connect(&args.name)?;
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    send(
        &stream,
        &Request::Console,
        &[stdin.as_fd(), stdout.as_fd(), stderr.as_fd()],
    )?;
    answer(&args.name, stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        assert_eq!(parse_signal("9"), Ok(9));
        assert_eq!(parse_signal("term"), Ok(15));
        assert_eq!(parse_signal("SIGHUP"), Ok(1));
        assert!(parse_signal("nope").is_err());
        assert!(parse_signal("0").is_err());
        assert!(parse_signal("99").is_err());
    }
}
