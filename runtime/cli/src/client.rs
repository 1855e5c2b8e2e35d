//! Commands that ask a running container's process for something.

use super::attach::{ProcessStreams, Pumps, RawTerminal, UserStreams, terminal_size};
use super::control::{Answer, KILL_LIMIT, Request};
use super::ignored::heeded;
use super::output::{complain, say};
use super::run::{check_terminal, expand_env};
use super::state::Folder;
use super::wire::{Wire, send};
use super::{FAILED, Outcome};
use anyhow::{Context, Result, bail};
use clap::Args;
use koya::vmm::devices::threads;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

#[derive(Args)]
pub(super) struct ExecArgs {
    /// Give the process a terminal
    #[arg(long, short)]
    tty: bool,
    /// Connect standard input
    #[arg(long, short)]
    interactive: bool,
    /// An environment variable beside the container's; without a value, the one of this environment
    #[arg(long, short, value_name = "K[=V]")]
    env: Vec<String>,
    /// The working directory (default: the container's)
    #[arg(long, short, value_name = "DIR")]
    workdir: Option<PathBuf>,
    /// The user, by name or number, and the group (default: the container's)
    #[arg(long, short, value_name = "USER[:GROUP]")]
    user: Option<String>,
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

/// How long a sandbox may take to go once its container has ended, or once it was killed.
const GONE_LIMIT: Duration = Duration::from_secs(30);
/// How long it may take to take up a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How long it may take to answer, beyond what it waits for itself.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);
/// The status of a container that ended by SIGKILL.
const KILLED: i32 = 128 + libc::SIGKILL;

fn find(name: &str) -> Result<Folder> {
    let folder = Folder::find(name)?;
    if !folder.is_running() {
        bail!("container {name} is not running");
    }
    Ok(folder)
}

pub(super) fn connect(name: &str) -> Result<(Folder, UnixStream)> {
    let folder = find(name)?;
    let stream = folder
        .connect(CONNECT_LIMIT)
        .with_context(|| format!("container {name} does not answer"))?;
    Ok((folder, stream))
}

/// One request and its one answer.
pub(super) fn ask(name: &str, request: &Request) -> Result<Answer> {
    let (_, stream) = connect(name)?;
    if matches!(request, Request::Stats) {
        // Of several containers, one that hangs is not to hide the others.
        stream.set_read_timeout(Some(KILL_LIMIT))?;
    }
    send(&stream, request, &[])?;
    let answer = Wire::new(stream).receive();
    let answer = answer.with_context(|| format!("container {name} does not answer"))?;
    match answer.with_context(|| format!("container {name} ended"))?.0 {
        Answer::Failed { reason, .. } => bail!("{reason}"),
        answer => Ok(answer),
    }
}

/// What a container's process answers.
enum Heard {
    Started(Vec<OwnedFd>),
    Over(u8),
}

fn hear(name: &str, wire: &mut Wire) -> Result<Heard> {
    match wire.receive()? {
        None => bail!("container {name} ended"),
        Some((Answer::Stats(_) | Answer::Size { .. } | Answer::Device(_), _)) => {
            bail!("container {name} answers something else")
        }
        Some((Answer::Started, fds)) => Ok(Heard::Started(fds)),
        Some((Answer::Done(status), _)) => Ok(Heard::Over(status as u8)),
        Some((Answer::Failed { status, reason }, _)) => {
            complain!("koya: {reason}");
            Ok(Heard::Over(u8::try_from(status).unwrap_or(FAILED)))
        }
    }
}

fn hear_end(name: &str, wire: &mut Wire) -> Outcome {
    loop {
        if let Heard::Over(status) = hear(name, wire)? {
            return Ok(status);
        }
    }
}

pub(super) fn exec(args: &ExecArgs) -> Outcome {
    check_terminal(args.tty, args.interactive)?;
    let (_, stream) = connect(&args.name)?;
    let request = Request::Exec {
        args: args.command.clone(),
        env: expand_env(&args.env),
        cwd: args.workdir.clone(),
        user: args.user.clone(),
        terminal: args.tty.then(|| terminal_size().unwrap_or((0, 0))),
        interactive: args.interactive,
    };
    // Before any thread exists, so that none misses it.
    let signals = Signals::new(heeded(&[SIGINT, SIGTERM, SIGHUP, SIGQUIT]))?;
    signals.add_signal(SIGWINCH)?;
    send(&stream, &request, &[])?;
    let mut wire = Wire::new(stream.try_clone()?);
    let over = Arc::new(AtomicBool::new(false));
    forward_signals(signals, stream, over.clone())?;
    let fds = match hear(&args.name, &mut wire)? {
        Heard::Over(status) => return Ok(status),
        Heard::Started(fds) => fds,
    };
    let streams = ProcessStreams::from_fds(fds).context("the process has no streams")?;
    let raw = match args.tty && args.interactive {
        true => RawTerminal::enter().ok(),
        false => None,
    };
    let pumps = Pumps::start(streams, UserStreams::own(args.interactive)?)?;
    let status = hear_end(&args.name, &mut wire);
    over.store(true, Ordering::SeqCst);
    let delivered = pumps.finish();
    drop(raw);
    match status? {
        0 if !delivered => Ok(FAILED),
        status => Ok(status),
    }
}

/// Passes signals on; once the process is over, they are this command's own.
fn forward_signals(mut signals: Signals, stream: UnixStream, over: Arc<AtomicBool>) -> Result<()> {
    threads::spawn("koya-signals", move || {
        for signal in signals.forever() {
            if over.load(Ordering::SeqCst) && signal != SIGWINCH {
                super::attach::restore();
                std::process::exit(128 + signal);
            }
            let request = match (signal, terminal_size()) {
                (SIGWINCH, Some((rows, columns))) => Request::Resize(rows, columns),
                (SIGWINCH, None) => continue,
                (signal, _) => Request::Signal(signal),
            };
            if send(&stream, &request, &[]).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

/// What is asked of containers.
struct Wish {
    request: Request,
    /// How long the answer may take.
    limit: Duration,
    /// The same of a process that is stopped (SIGSTOP) or takes up no connections: it does nothing meanwhile.
    limit_if_stopped: Duration,
    /// They are to end: one whose process does not answer is killed.
    is_end: bool,
    /// Until the process has ended too.
    until_gone: bool,
}

/// Asks each container, and goes on when one can't.
fn for_each(names: &[String], wish: &Wish) -> Outcome {
    let (mut worst, mut said) = (0, Ok(()));
    for name in names {
        match find(name).and_then(|folder| ask_one(name, &folder, wish)) {
            // The others are asked all the same if nobody reads of this one.
            Ok(0) => said = said.and(say!("{name}")),
            Ok(status) => worst = worst.max(status),
            Err(error) => {
                complain!("koya: {error:#}");
                worst = worst.max(FAILED);
            }
        }
    }
    said?;
    Ok(worst)
}

fn ask_one(name: &str, folder: &Folder, wish: &Wish) -> Outcome {
    let answered = folder
        .connect(CONNECT_LIMIT.min(wish.limit_if_stopped))
        .map_err(Into::into);
    let answered = answered.and_then(|stream| hear_in_time(name, folder, wish, stream));
    let why = match answered {
        Err(error) if is_silence(&error) && wish.is_end => "its process does not answer",
        Err(error) => {
            return Err(error).with_context(|| format!("container {name} does not answer"));
        }
        Ok(0) if wish.until_gone && !folder.wait_ended(GONE_LIMIT) => {
            "it ended, but its sandbox is still there"
        }
        Ok(status) => return Ok(status),
    };
    complain!("koya: container {name}: {why}, and is killed");
    let killed = folder.kill(GONE_LIMIT).and_then(|()| folder.settle(KILLED));
    killed.with_context(|| format!("cannot end container {name}"))?;
    Ok(0)
}

/// The answer to a wish, or that nothing came within its limit.
fn hear_in_time(name: &str, folder: &Folder, wish: &Wish, stream: UnixStream) -> Outcome {
    send(&stream, &wish.request, &[])?;
    let first = wish.limit.min(wish.limit_if_stopped);
    stream.set_read_timeout(Some(first))?;
    let mut wire = Wire::new(stream.try_clone()?);
    match hear_end(name, &mut wire) {
        Err(error) if is_silence(&error) && first < wish.limit && !folder.is_stopped() => {
            stream.set_read_timeout(Some(wish.limit - first))?;
            hear_end(name, &mut wire)
        }
        answer => answer,
    }
}

/// Nothing came within the limit.
fn is_silence(error: &anyhow::Error) -> bool {
    let timed_out = |error: &std::io::Error| error.kind() == std::io::ErrorKind::TimedOut;
    error.downcast_ref().is_some_and(timed_out)
        || error.downcast_ref() == Some(&rustix::io::Errno::AGAIN)
}

pub(super) fn stop(args: &StopArgs) -> Outcome {
    // The sandbox has these limits itself, and ends the machine after them.
    let term = Duration::from_secs(args.time);
    let own = term.saturating_add(KILL_LIMIT);
    for_each(
        &args.names,
        &Wish {
            request: Request::Stop(args.time),
            limit: own.saturating_add(ANSWER_LIMIT),
            limit_if_stopped: term.saturating_add(ANSWER_LIMIT),
            is_end: true,
            until_gone: true,
        },
    )
}

pub(super) fn kill(args: &KillArgs) -> Outcome {
    let is_end = args.signal == libc::SIGKILL;
    for_each(
        &args.names,
        &Wish {
            request: Request::Signal(args.signal),
            limit: KILL_LIMIT,
            // Another signal may come when the process goes on.
            limit_if_stopped: if is_end { ANSWER_LIMIT } else { KILL_LIMIT },
            is_end,
            until_gone: false,
        },
    )
}

pub(super) fn console(args: &ConsoleArgs) -> Outcome {
    let (_, stream) = connect(&args.name)?;
    send(&stream, &Request::Console, &[])?;
    let mut wire = Wire::new(stream);
    let Heard::Started(fds) = hear(&args.name, &mut wire)? else {
        bail!("container {} has no console", args.name);
    };
    let console = fds
        .into_iter()
        .next()
        .context("the console has no stream")?;
    let console = UnixStream::from(console);
    // The end of what is typed is told by closing that direction.
    let streams = ProcessStreams::Pipes {
        stdin: Some(console.try_clone()?),
        stdout: console,
        stderr: UnixStream::pair()?.0,
    };
    let pumps = Pumps::start(streams, UserStreams::own(true)?)?;
    let status = hear_end(&args.name, &mut wire);
    pumps.finish();
    status
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_container_whose_process_hangs_is_stopped_after_the_limit() {
        use super::super::state::tests::hanging;
        for keep in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("c");
            std::fs::create_dir(&path).unwrap();
            let (folder, mut child) = hanging(&path, keep);
            // Connections are taken up by the kernel, and nobody reads.
            let _listener = folder.listen().unwrap();
            let pid = rustix::process::Pid::from_child(&child);
            rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
            let mut wish = Wish {
                request: Request::Signal(libc::SIGTERM),
                limit: Duration::from_secs(60),
                limit_if_stopped: Duration::from_millis(200),
                is_end: false,
                until_gone: false,
            };
            assert!(ask_one("c", &folder, &wish).is_err());
            assert!(folder.is_running(), "a signal that is no end kills nobody");
            wish.is_end = true;
            let started = Instant::now();
            assert_eq!(ask_one("c", &folder, &wish).unwrap(), 0);
            assert!(started.elapsed() < wish.limit / 2, "not the whole limit");
            assert!(!folder.is_running());
            assert_eq!(child.wait().unwrap().code(), None);
            match keep {
                true => assert_eq!(folder.read().unwrap().status, Some(137)),
                false => assert!(!path.exists()),
            }
        }
    }

    #[test]
    fn a_process_that_is_not_stopped_has_the_whole_limit() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, mut child) = super::super::state::tests::hanging(dir.path(), true);
        let listener = folder.listen().unwrap();
        let wish = Wish {
            request: Request::Stop(0),
            limit: Duration::from_secs(60),
            limit_if_stopped: Duration::from_millis(50),
            is_end: true,
            until_gone: false,
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (stream, _) = listener.accept().unwrap();
                std::thread::sleep(wish.limit_if_stopped * 10);
                send(&stream, &Answer::Done(0), &[]).unwrap();
            });
            assert_eq!(ask_one("c", &folder, &wish).unwrap(), 0);
        });
        assert!(folder.is_running(), "it has answered");
        child.kill().unwrap();
        child.wait().unwrap();
    }

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
