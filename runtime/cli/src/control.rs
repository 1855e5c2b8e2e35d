//! Control socket of a sandbox, by which other commands reach a container that this process runs.
//!
//! Each connection carries one request, a line of JSON. Further lines belong to the same process (signals, sizes). The reply
//! is a line, too; for requests with streams, an earlier line carries their descriptors, so that only the user's command
//! reads the user's terminal. Access is controlled by the mode of the directory.

use super::attach::ProcessStreams;
use super::disk::{DiskRequest, Disks};
use super::state::{Directory, Owned};
use super::stats::Stats;
use super::variables::merge_env;
use super::wire::{Wire, send};
use anyhow::{Context, Result, bail};
use koya::vmm::host::sync::lock;
use koya::vmm::host::threads;
use koya::{Container, Process, ProcessConfig, Sandbox, Size, Stdio, User};
use koya_tasks::{send_signal, terminate};
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// Time for which the console is still shown after the end of the input.
const CONSOLE_GRACE: Duration = Duration::from_millis(500);

/// Time limit for a container to end after SIGKILL, not counting the flushing of its disks: the virtual machine is ended
/// earlier if the container does not end.
pub(super) const KILL_LIMIT: Duration = Duration::from_secs(12);

/// A request to a running container.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Request {
    /// Run a process. Missing properties are those of the container.
    Exec {
        args: Vec<String>,
        env: Vec<String>,
        cwd: Option<PathBuf>,
        user: Option<String>,
        terminal: Option<(u16, u16)>,
        interactive: bool,
    },
    /// Send a signal to the first process, or to the process of this connection.
    Signal(i32),
    /// Resize the terminal of the process of this connection.
    Resize(u16, u16),
    /// End the container: SIGTERM, and SIGKILL after this many seconds.
    Stop(u64),
    /// Report the number of writes to its disks, for a wait for its end.
    Writes,
    /// Connect a stream to the guest's console.
    Console,
    /// Report the resource usage in the guest and on the host.
    Stats,
    /// Change its disks.
    Disk(DiskRequest),
    /// Resize the guest.
    Update {
        cpus: Option<u32>,
        memory_mib: Option<u64>,
    },
}

/// A reply.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// The process runs; the descriptors of its streams are attached, and another reply follows.
    Started,
    /// Resource usage; another reply follows.
    Stats(Box<Stats>),
    /// Number of writes so far, and whether the host is processing more; another reply follows.
    Writes { done: u64, in_flight: bool },
    /// Path of the disk in the container; another reply follows.
    Device(PathBuf),
    /// Size of the guest; another reply follows.
    Size { cpus: u32, memory_mib: u64 },
    /// Success; for a process, its exit status.
    Done(i32),
    /// Failure.
    Failed { status: i32, reason: String },
}

/// Number of processes that other commands are running in the container.
#[derive(Clone, Default)]
pub(super) struct Execs(Arc<(Mutex<usize>, Condvar)>);

impl Execs {
    /// Increments the count until the returned value is dropped.
    fn begin(&self) -> Running {
        *self.count() += 1;
        Running(self.clone())
    }

    /// Waits up to `limit` until all have been sent their status. They end with the container, and their commands must get
    /// the status before this process ends.
    pub(super) fn wait(&self, limit: Duration) {
        let ended = self.0.1.wait_timeout_while(self.count(), limit, |n| *n > 0);
        if ended.is_ok_and(|(_, limit)| limit.timed_out()) {
            log::warn!("some added processes have not ended with the container");
        }
    }

    fn count(&self) -> MutexGuard<'_, usize> {
        lock(&self.0.0)
    }
}

struct Running(Execs);

impl Drop for Running {
    fn drop(&mut self) {
        *self.0.count() -= 1;
        self.0.0.1.notify_all();
    }
}

/// Starts serving, until the end of this process. `stop_signal` asks the container to end.
///
/// # Errors
/// If the host refuses the socket or the thread.
pub(super) fn serve(
    owned: &Owned,
    container: Arc<Container>,
    sandbox: Arc<Sandbox>,
    stop_signal: i32,
) -> Result<Execs> {
    let directory: &Directory = &owned.directory;
    let listener = directory.listen()?;
    let execs = Execs::default();
    let served = Arc::new(ServerState {
        container,
        sandbox,
        disks: Disks::default(),
        stop_signal,
        execs: execs.clone(),
    });
    spawn("koya-control", move || {
        for stream in listener.incoming().flatten() {
            let served = served.clone();
            let spawned = spawn("koya-request", move || answer(&stream, &served));
            if let Err(error) = spawned {
                log::warn!("{error:#}");
            }
        }
    })?;
    Ok(execs)
}

fn spawn(name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    threads::spawn(name, work).context("cannot start a thread")?;
    Ok(())
}

/// The objects that requests act on.
struct ServerState {
    container: Arc<Container>,
    sandbox: Arc<Sandbox>,
    disks: Disks,
    stop_signal: i32,
    execs: Execs,
}

fn answer(stream: &UnixStream, served: &ServerState) {
    // Until the reply is sent.
    let mut counted = None;
    let answer = match carry_out(stream, served, &mut counted) {
        Ok(status) => Answer::Done(status),
        Err(error) => Answer::Failed {
            status: super::failure_status(&error).into(),
            reason: format!("{error:#}"),
        },
    };
    if let Err(error) = send(stream, &answer, &[]) {
        log::debug!("nobody waits for {answer:?}: {error:#}");
    }
}

fn carry_out(
    stream: &UnixStream,
    served: &ServerState,
    counted: &mut Option<Running>,
) -> Result<i32> {
    let ServerState {
        container,
        sandbox,
        disks,
        stop_signal,
        execs,
    } = served;
    let mut wire = Wire::new(stream.try_clone()?);
    let Some((request, _)) = wire.receive()? else {
        bail!("no request was received");
    };
    match request {
        Request::Signal(number) => send_signal(container, number)?,
        Request::Resize(rows, columns) => container.process().resize(rows, columns)?,
        Request::Stop(seconds) => terminate(container, *stop_signal, Duration::from_secs(seconds))?,
        Request::Writes => {
            let writes = sandbox.disk_writes();
            let answer = Answer::Writes {
                done: writes.done,
                in_flight: writes.in_flight,
            };
            send(stream, &answer, &[])?;
        }
        Request::Console => console(stream, sandbox)?,
        Request::Stats => {
            let stats = Box::new(Stats::of(sandbox)?);
            send(stream, &Answer::Stats(stats), &[])?;
        }
        Request::Disk(request) => {
            if let Some(path) = disks.carry_out(&request, container, sandbox)? {
                send(stream, &Answer::Device(path), &[])?;
            }
        }
        Request::Update { cpus, memory_mib } => {
            let size = sandbox.update(Size { cpus, memory_mib })?;
            let answer = Answer::Size {
                cpus: size.cpus.unwrap_or_default(),
                memory_mib: size.memory_mib.unwrap_or_default(),
            };
            send(stream, &answer, &[])?;
        }
        Request::Exec {
            args,
            env,
            cwd,
            user,
            terminal,
            interactive,
        } => {
            let stdio = match (terminal, interactive) {
                (Some((rows, columns)), _) => Stdio::Terminal {
                    rows,
                    columns,
                    keep_newlines: false,
                },
                (None, true) => Stdio::Pipes,
                (None, false) => Stdio::Output,
            };
            let own = container.config().context("it has no configuration")?;
            let own = &own.process;
            let process = ProcessConfig {
                args,
                env: merge_env(env, &own.env),
                cwd: cwd.or_else(|| own.cwd.clone()),
                user: User {
                    text: user.unwrap_or_else(|| own.user.text.clone()),
                    ..own.user.clone()
                },
                stdio,
            };
            *counted = Some(execs.begin());
            return exec(stream, wire, container, &process);
        }
    }
    Ok(0)
}

/// Runs a process with its streams passed to the other side; returns its exit status.
fn exec(
    stream: &UnixStream,
    wire: Wire,
    container: &Container,
    process: &ProcessConfig,
) -> Result<i32> {
    let mut process = container.exec(process)?;
    let streams = ProcessStreams::take(&mut process).context("it has no streams")?;
    send(stream, &Answer::Started, &streams.fds()).ok();
    // The other side has its own copies now; the guest sees the end of the stream when those are closed.
    drop(streams);
    let process = Arc::new(process);
    follow(wire, &process)?;
    Ok(process.wait()?)
}

/// Forwards input from the other side to the console, until it hangs up.
fn console(stream: &UnixStream, sandbox: &Sandbox) -> Result<()> {
    let (mut ours, theirs) = UnixStream::pair()?;
    sandbox.follow_console(ours.try_clone()?);
    send(stream, &Answer::Started, &[theirs.as_fd()])?;
    drop(theirs);
    let mut bytes = [0; 256];
    loop {
        let count = ours.read(&mut bytes)?;
        if count == 0 {
            // The kept output is sent first; then the follower ends.
            std::thread::sleep(CONSOLE_GRACE);
            ours.shutdown(std::net::Shutdown::Both).ok();
            return Ok(());
        }
        sandbox.console_input(&bytes[..count]);
    }
}

/// Forwards signals and sizes from the connection to the process; a broken connection means that the user has hung up.
fn follow(mut wire: Wire, process: &Arc<Process>) -> Result<()> {
    let process = process.clone();
    spawn("koya-follow", move || {
        while let Ok(Some((request, _))) = wire.receive() {
            match request {
                Request::Signal(number) => process.signal(number).ok(),
                Request::Resize(rows, columns) => process.resize(rows, columns).ok(),
                _ => None,
            };
        }
        process.signal(libc::SIGHUP).ok();
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// moby/moby 13907, containers/podman 10825.
    #[test]
    fn an_end_waits_for_those_who_are_still_to_hear_of_theirs() {
        let execs = Execs::default();
        execs.wait(Duration::ZERO);
        let (first, second) = (execs.begin(), execs.begin());
        drop(first);
        let began = std::time::Instant::now();
        execs.wait(Duration::from_millis(20));
        assert!(began.elapsed() >= Duration::from_millis(20));
        let waiter = std::thread::spawn(move || execs.wait(Duration::from_secs(60)));
        drop(second);
        waiter.join().unwrap();
    }

    /// Containers may be killed and stopped by another version of koya: the format of version 0.1.
    #[test]
    fn requests_of_other_versions_are_understood() {
        let request = |text: &str| serde_json::from_str::<Request>(text).unwrap();
        assert!(matches!(request(r#"{"signal":9}"#), Request::Signal(9)));
        assert!(matches!(request(r#"{"stop":10}"#), Request::Stop(10)));
        let exec = r#"{"exec":{"args":["sh"],"env":[],"cwd":null,"user":null,"terminal":[24,80],
            "interactive":true,"of_a_later_version":1}}"#;
        assert!(matches!(
            request(exec),
            Request::Exec {
                interactive: true,
                ..
            }
        ));
        let signal = serde_json::to_string(&Request::Signal(15)).unwrap();
        assert_eq!(signal, r#"{"signal":15}"#);
        let stop = serde_json::to_string(&Request::Stop(3)).unwrap();
        assert_eq!(stop, r#"{"stop":3}"#);
        let answer = |text: &str| serde_json::from_str::<Answer>(text).unwrap();
        assert!(matches!(answer(r#"{"done":0}"#), Answer::Done(0)));
        let failed = r#"{"failed":{"status":125,"reason":"why"}}"#;
        assert!(matches!(answer(failed), Answer::Failed { status: 125, .. }));
    }
}
