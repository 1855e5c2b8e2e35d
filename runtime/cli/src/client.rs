//! Commands that send requests to a running container's process.

use super::at_once::at_once;
use super::attach::{ProcessStreams, Pumps, RawTerminal, UserStreams, terminal_size};
use super::connection::{START_LIMIT, is_starting, no_connection};
use super::control::{Answer, KILL_LIMIT, Request};
use super::output::{complain, say};
use super::parse::parse_signal;
use super::run::check_terminal;
use super::signals::forwarded_signals;
use super::state::{Directory, KILLED};
use super::variables::EnvArgs;
use super::wire::{Wire, send};
use super::{FAILED, Outcome};
use anyhow::{Context, Result, bail};
use clap::Args;
use koya::vmm::host::threads;
use signal_hook::consts::SIGWINCH;
use signal_hook::iterator::Signals;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[derive(Args)]
pub(super) struct ExecArgs {
    /// Allocate a terminal
    #[arg(long, short)]
    tty: bool,
    /// Keep standard input open
    #[arg(long, short)]
    interactive: bool,
    #[command(flatten)]
    env: EnvArgs,
    /// Set the working directory (default: that of the container)
    #[arg(long, short, value_name = "DIR")]
    workdir: Option<PathBuf>,
    /// Set the user and group, by name or ID (default: those of the container)
    #[arg(long, short, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// The container
    name: String,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<String>,
}

impl ExecArgs {
    #[cfg(test)]
    pub(super) fn words(&self) -> &[String] {
        &self.command
    }
}

#[derive(Args)]
pub(super) struct StopArgs {
    /// Wait this many seconds before SIGKILL
    #[arg(long, short, default_value_t = 10)]
    time: u64,
    /// The containers
    #[arg(required = true)]
    names: Vec<String>,
}

#[derive(Args)]
pub(super) struct KillArgs {
    /// Set the signal, by number or name
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

/// Time limit for a sandbox to end once its container has ended, or once it was killed.
const GONE_LIMIT: Duration = Duration::from_secs(30);
/// Time limit for it to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Time limit for its reply, beyond its own waiting time.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);
/// Time for which an ending sandbox may write nothing to its disks: the sandbox has such a limit itself, which is shorter.
const WRITE_PAUSE: Duration = Duration::from_secs(15);
/// Time limit for flushing them; the sandbox's own limit is shorter.
const WRITE_OUT_LIMIT: Duration = Duration::from_secs(620);

fn check_running(name: &str, directory: &Directory) -> Result<()> {
    match directory.is_running() {
        true => Ok(()),
        false => bail!("container {name} is not running"),
    }
}

fn connect(name: &str, start_limit: Duration) -> Result<(Directory, UnixStream)> {
    let directory = Directory::find(name)?;
    check_running(name, &directory)?;
    let stream = directory
        .connect(CONNECT_LIMIT, start_limit)
        .map_err(|error| no_connection(name, error))?;
    Ok((directory, stream))
}

/// Sends one request and returns the reply.
pub(super) fn ask(name: &str, request: &Request) -> Result<Answer> {
    // One hanging container must not hide the others.
    let is_stats = matches!(request, Request::Stats);
    let start_limit = if is_stats {
        Duration::ZERO
    } else {
        START_LIMIT
    };
    let (_, stream) = connect(name, start_limit)?;
    if is_stats {
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

/// A reply of a container's process.
enum ExecReply {
    Started(Vec<OwnedFd>),
    Exited(u8),
}

fn receive_reply(name: &str, wire: &mut Wire) -> Result<ExecReply> {
    match wire.receive()? {
        None => bail!("container {name} ended"),
        Some((
            Answer::Stats(_) | Answer::Size { .. } | Answer::Device(_) | Answer::Writes { .. },
            _,
        )) => bail!("container {name} sent an unexpected reply"),
        Some((Answer::Started, fds)) => Ok(ExecReply::Started(fds)),
        Some((Answer::Done(status), _)) => Ok(ExecReply::Exited(status as u8)),
        Some((Answer::Failed { status, reason }, _)) => {
            complain!("koya: {reason}");
            Ok(ExecReply::Exited(u8::try_from(status).unwrap_or(FAILED)))
        }
    }
}

fn hear_end(name: &str, wire: &mut Wire) -> Outcome {
    loop {
        if let ExecReply::Exited(status) = receive_reply(name, wire)? {
            return Ok(status);
        }
    }
}

pub(super) fn exec(args: &ExecArgs) -> Outcome {
    check_terminal(args.tty, args.interactive)?;
    let (_, stream) = connect(&args.name, START_LIMIT)?;
    let request = Request::Exec {
        args: args.command.clone(),
        env: args.env.read()?,
        cwd: args.workdir.clone(),
        user: args.user.clone(),
        terminal: args.tty.then(|| terminal_size().unwrap_or((0, 0))),
        interactive: args.interactive,
    };
    // Before any thread exists, so that no signal is lost.
    let signals = Signals::new(forwarded_signals()).context("cannot catch signals")?;
    signals.add_signal(SIGWINCH)?;
    send(&stream, &request, &[])?;
    let mut wire = Wire::new(stream.try_clone()?);
    let over = Arc::new(AtomicBool::new(false));
    forward_signals(signals, stream, over.clone())?;
    let fds = match receive_reply(&args.name, &mut wire)? {
        ExecReply::Exited(status) => return Ok(status),
        ExecReply::Started(fds) => fds,
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

/// Forwards signals; once the process has ended, they apply to this command.
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

/// A request to several containers, and its time limits.
struct Order {
    request: Request,
    /// Time limit for the reply.
    limit: Duration,
    /// Time limit if the process is stopped (SIGSTOP) or accepts no connections, and thus makes no progress.
    limit_if_stopped: Duration,
    /// Whether the containers are to end: one whose process does not reply is killed.
    is_end: bool,
    /// Time for which the process may write nothing to the container's disks before it must have ended; `None` if it need
    /// not end.
    write_pause: Option<Duration>,
}

/// An ending sandbox, which may still have to write to its disks.
struct Ending<'a> {
    directory: &'a Directory,
    /// Maximum time without a write.
    pause: Duration,
    began: Instant,
    /// Number of writes at the last check.
    written: Option<u64>,
}

impl<'a> Ending<'a> {
    fn of(directory: &'a Directory, order: &Order) -> Option<Self> {
        Some(Self {
            directory,
            pause: order.write_pause?,
            began: Instant::now(),
            written: None,
        })
    }

    /// Whether it has written since the last check, or is about to. Without a reply it has not.
    fn writes(&mut self) -> bool {
        if self.began.elapsed() > WRITE_OUT_LIMIT {
            return false;
        }
        let asked = ask_writes(self.directory, self.pause.min(ANSWER_LIMIT));
        let (done, in_flight) = match asked {
            Ok(answer) => answer,
            Err(error) => {
                log::debug!("its process says nothing of its disks: {error:#}");
                return false;
            }
        };
        self.written.replace(done) != Some(done) || in_flight
    }

    /// Waits until its process has ended; false if it is not making progress.
    fn wait(&mut self) -> bool {
        let mut limit = GONE_LIMIT.min(self.pause * 2);
        while !self.directory.wait_ended(limit) {
            if !self.writes() {
                // It may have ended just now.
                return !self.directory.is_running();
            }
            limit = self.pause;
        }
        true
    }
}

/// Number of writes to a container's disks, and whether the host is processing more.
fn ask_writes(directory: &Directory, limit: Duration) -> Result<(u64, bool)> {
    let stream = directory.connect(limit, Duration::ZERO)?;
    stream.set_read_timeout(Some(limit))?;
    send(&stream, &Request::Writes, &[])?;
    match Wire::new(stream).receive()? {
        Some((Answer::Writes { done, in_flight }, _)) => Ok((done, in_flight)),
        other => bail!("unexpected reply: {:?}", other.map(|(answer, _)| answer)),
    }
}

/// Sends the request to all containers at once, and continues on failures.
fn for_each(names: &[String], order: &Order) -> Outcome {
    let (mut worst, mut said) = (0, Ok(()));
    at_once(
        names,
        |name| send_to(name, order),
        |name, told| match told {
            // Continues with the others even if the output can't be written.
            Ok(0) if said.is_err() => {}
            Ok(0) => said = say!("{name}"),
            Ok(status) => worst = worst.max(status),
            Err(error) => {
                complain!("koya: {error:#}");
                worst = worst.max(FAILED);
            }
        },
    );
    said?;
    Ok(worst)
}

/// Sends the request. It is no error to stop a container that has ended, as with other engines: in scripts `rm` follows
/// `stop`.
fn send_to(name: &str, order: &Order) -> Outcome {
    let directory = Directory::find(name)?;
    let told = check_running(name, &directory).and_then(|()| ask_one(name, &directory, order));
    match told {
        Err(_) if matches!(order.request, Request::Stop(_)) && !directory.is_running() => Ok(0),
        told => told,
    }
}

fn ask_one(name: &str, directory: &Directory, order: &Order) -> Outcome {
    let answered = directory.connect(CONNECT_LIMIT.min(order.limit_if_stopped), START_LIMIT);
    let answered = match answered {
        Err(error) if is_starting(&error) => return Err(no_connection(name, error)),
        answered => answered.map_err(Into::into),
    };
    let mut ending = Ending::of(directory, order);
    let answered = answered
        .and_then(|stream| receive_with_timeout(name, directory, order, &mut ending, stream));
    let why = match answered {
        Err(error) if is_timeout(&error) && order.is_end => "its process does not answer",
        Err(error) => {
            return Err(error).with_context(|| format!("container {name} does not answer"));
        }
        Ok(0) if ending.as_mut().is_some_and(|ending| !ending.wait()) => {
            "it ended, but its sandbox is still there"
        }
        Ok(status) => return Ok(status),
    };
    complain!("koya: container {name}: {why}, and is killed");
    let killed = directory
        .kill(GONE_LIMIT)
        .and_then(|()| directory.settle(KILLED));
    killed.with_context(|| format!("cannot end container {name}"))?;
    Ok(0)
}

/// The reply to a request, or a timeout. An ending sandbox may take longer while it writes to its disks.
fn receive_with_timeout(
    name: &str,
    directory: &Directory,
    order: &Order,
    ending: &mut Option<Ending>,
    stream: UnixStream,
) -> Outcome {
    send(&stream, &order.request, &[])?;
    let first = order.limit.min(order.limit_if_stopped);
    stream.set_read_timeout(Some(first))?;
    let mut wire = Wire::new(stream.try_clone()?);
    let mut answer = hear_end(name, &mut wire);
    if answer.as_ref().is_err_and(is_timeout) && first < order.limit && !directory.is_stopped() {
        stream.set_read_timeout(Some(order.limit - first))?;
        answer = hear_end(name, &mut wire);
    }
    while let Some(ending) = ending
        && answer.as_ref().is_err_and(is_timeout)
        && ending.writes()
    {
        stream.set_read_timeout(Some(ending.pause))?;
        answer = hear_end(name, &mut wire);
    }
    answer
}

/// Whether the time limit has expired.
fn is_timeout(error: &anyhow::Error) -> bool {
    let timed_out = |error: &std::io::Error| error.kind() == std::io::ErrorKind::TimedOut;
    error.downcast_ref().is_some_and(timed_out)
        || error.downcast_ref() == Some(&rustix::io::Errno::AGAIN)
}

pub(super) fn stop(args: &StopArgs) -> Outcome {
    // The sandbox applies these limits itself, and ends the machine after them.
    let term = Duration::from_secs(args.time);
    let own = term.saturating_add(KILL_LIMIT);
    for_each(
        &args.names,
        &Order {
            request: Request::Stop(args.time),
            limit: own.saturating_add(ANSWER_LIMIT),
            limit_if_stopped: term.saturating_add(ANSWER_LIMIT),
            is_end: true,
            write_pause: Some(WRITE_PAUSE),
        },
    )
}

pub(super) fn kill(args: &KillArgs) -> Outcome {
    let is_end = args.signal == libc::SIGKILL;
    for_each(
        &args.names,
        &Order {
            request: Request::Signal(args.signal),
            limit: KILL_LIMIT,
            // Another signal may arrive when the process continues.
            limit_if_stopped: if is_end { ANSWER_LIMIT } else { KILL_LIMIT },
            is_end,
            write_pause: None,
        },
    )
}

pub(super) fn console(args: &ConsoleArgs) -> Outcome {
    let (_, stream) = connect(&args.name, START_LIMIT)?;
    send(&stream, &Request::Console, &[])?;
    let mut wire = Wire::new(stream);
    let ExecReply::Started(fds) = receive_reply(&args.name, &mut wire)? else {
        bail!("container {} has no console", args.name);
    };
    let console = fds
        .into_iter()
        .next()
        .context("the console has no stream")?;
    let console = UnixStream::from(console);
    // The end of the input is signalled by closing that direction.
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
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_container_whose_process_hangs_is_stopped_after_the_limit() {
        use super::super::state::tests::hanging;
        for keep in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("c");
            std::fs::create_dir(&path).unwrap();
            let (directory, mut child) = hanging(&path, keep);
            // The kernel accepts connections, and nothing reads from them.
            let _listener = directory.listen().unwrap();
            let pid = rustix::process::Pid::from_child(&child);
            rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
            let mut order = Order {
                request: Request::Signal(libc::SIGTERM),
                limit: Duration::from_secs(60),
                limit_if_stopped: Duration::from_millis(200),
                is_end: false,
                write_pause: None,
            };
            assert!(ask_one("c", &directory, &order).is_err());
            assert!(
                directory.is_running(),
                "a signal that is no end kills nobody"
            );
            order.is_end = true;
            let started = Instant::now();
            assert_eq!(ask_one("c", &directory, &order).unwrap(), 0);
            assert!(started.elapsed() < order.limit / 2, "not the whole limit");
            assert!(!directory.is_running());
            assert_eq!(child.wait().unwrap().code(), None);
            match keep {
                true => assert_eq!(directory.read().unwrap().status, Some(137)),
                false => assert!(!path.exists()),
            }
        }
    }

    #[test]
    fn a_process_that_is_not_stopped_has_the_whole_limit() {
        let dir = tempfile::tempdir().unwrap();
        let (directory, mut child) = super::super::state::tests::hanging(dir.path(), true);
        let listener = directory.listen().unwrap();
        let order = Order {
            request: Request::Stop(0),
            limit: Duration::from_secs(60),
            limit_if_stopped: Duration::from_millis(50),
            is_end: true,
            write_pause: None,
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (stream, _) = listener.accept().unwrap();
                std::thread::sleep(order.limit_if_stopped * 10);
                send(&stream, &Answer::Done(0), &[]).unwrap();
            });
            assert_eq!(ask_one("c", &directory, &order).unwrap(), 0);
        });
        assert!(directory.is_running(), "it has answered");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn stop_order() -> Order {
        Order {
            request: Request::Stop(0),
            limit: Duration::from_millis(100),
            limit_if_stopped: Duration::from_millis(100),
            is_end: true,
            write_pause: Some(Duration::from_millis(300)),
        }
    }

    /// The next connection, with a time limit.
    fn accept(listener: &UnixListener) -> UnixStream {
        let limit = Timespec {
            tv_sec: 20,
            tv_nsec: 0,
        };
        let mut polled = [PollFd::new(listener, PollFlags::IN)];
        assert_eq!(poll(&mut polled, Some(&limit)).unwrap(), 1, "nobody asks");
        listener.accept().unwrap().0
    }

    /// Replies to one request about disk writes.
    fn answer_writes(listener: &UnixListener, done: u64) {
        let asked = accept(listener);
        let request = Wire::new(asked.try_clone().unwrap()).receive::<Request>();
        assert!(matches!(request.unwrap().unwrap().0, Request::Writes));
        let in_flight = false;
        let answer = Answer::Writes { done, in_flight };
        send(&asked, &answer, &[]).unwrap();
    }

    #[test]
    fn a_sandbox_that_writes_its_disks_out_is_not_killed() {
        let dir = tempfile::tempdir().unwrap();
        let (directory, mut child) = super::super::state::tests::hanging(dir.path(), true);
        let listener = directory.listen().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let stopped = accept(&listener);
                // Its container ends slowly, and then its machine.
                (0..4).for_each(|done| answer_writes(&listener, done));
                send(&stopped, &Answer::Done(0), &[]).unwrap();
                (4..7).for_each(|done| answer_writes(&listener, done));
                child.kill().unwrap();
                child.wait().unwrap();
            });
            assert_eq!(ask_one("c", &directory, &stop_order()).unwrap(), 0);
        });
        assert_eq!(directory.read().unwrap().status, None, "it ended by itself");
    }

    #[test]
    fn a_sandbox_that_writes_nothing_more_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let (directory, mut child) = super::super::state::tests::hanging(dir.path(), true);
        let listener = directory.listen().unwrap();
        let (over, hold) = std::sync::mpsc::channel::<()>();
        let listener = &listener;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let stopped = accept(listener);
                (0..2).for_each(|_| answer_writes(listener, 7));
                hold.recv().ok();
                drop(stopped);
            });
            assert_eq!(ask_one("c", &directory, &stop_order()).unwrap(), 0);
            drop(over);
        });
        assert_eq!(directory.read().unwrap().status, Some(137));
        child.wait().unwrap();
    }
}
