//! A sandbox's control socket: how other commands reach a container that this process runs.
//!
//! A connection is one request, a line of JSON. Lines that follow belong to the same process
//! (signals, sizes). The answer is a line too; for what has streams, a line before it brings their
//! descriptors, so that the user's terminal is read by the user's own command and by nobody else.
//! Who may connect is whom the directory's mode lets in.

use super::attach::ProcessStreams;
use super::disk::{DiskRequest, Disks};
use super::parse::merge_env;
use super::state::{Directory, Owned};
use super::stats::Stats;
use super::wire::{Wire, send};
use anyhow::{Context, Result, bail};
use koya::vmm::host::threads;
use koya::{Container, Process, ProcessConfig, Sandbox, Size, Stdio, User};
use koya_tasks::{send_signal, terminate};
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long the console is still shown once nothing more is typed.
const CONSOLE_GRACE: Duration = Duration::from_millis(500);

/// How long a container may take to end after SIGKILL, but for its disks' being written out: its virtual machine
/// ends before that if it does not.
pub(super) const KILL_LIMIT: Duration = Duration::from_secs(12);

/// What a command asks of a running container.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Request {
    /// Run a process. What is not given is as the container's own.
    Exec {
        args: Vec<String>,
        env: Vec<String>,
        cwd: Option<PathBuf>,
        user: Option<String>,
        terminal: Option<(u16, u16)>,
        interactive: bool,
    },
    /// Signal the first process, or the one that this connection runs.
    Signal(i32),
    /// A new size for the terminal of the one that this connection runs.
    Resize(u16, u16),
    /// End the container: SIGTERM, and SIGKILL after so many seconds.
    Stop(u64),
    /// How much was written to its disks: what an end waits for.
    Writes,
    /// Connect a stream to the guest's console.
    Console,
    /// What guest and host use.
    Stats,
    /// Change its disks.
    Disk(DiskRequest),
    /// Make the guest larger or smaller.
    Update {
        cpus: Option<u32>,
        memory_mib: Option<u64>,
    },
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// It runs; its streams' descriptors are beside this, and another answer follows.
    Started,
    /// What was asked for; another answer follows.
    Stats(Box<Stats>),
    /// How much was written so far, and whether the host is at work on more; another answer follows.
    Writes { done: u64, is_host_at_work: bool },
    /// Where the container has it now; another answer follows.
    Device(PathBuf),
    /// How large the guest is now; another answer follows.
    Size { cpus: u32, memory_mib: u64 },
    /// It was done; for a process, its exit status.
    Done(i32),
    /// It was not.
    Failed { status: i32, reason: String },
}

/// How many processes other commands run in the container at this moment.
#[derive(Clone, Default)]
pub(super) struct Execs(Arc<(Mutex<usize>, Condvar)>);

impl Execs {
    /// Counts one until what is returned is dropped.
    fn begin(&self) -> Running {
        *self.count() += 1;
        Running(self.clone())
    }

    /// Waits until all have their status, so long at most. They end with the container, and whoever waits for them
    /// is to hear that before this process ends.
    pub(super) fn wait(&self, limit: Duration) {
        let ended = self.0.1.wait_timeout_while(self.count(), limit, |n| *n > 0);
        if ended.is_ok_and(|(_, limit)| limit.timed_out()) {
            log::warn!("some added processes have not ended with the container");
        }
    }

    fn count(&self) -> MutexGuard<'_, usize> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Running(Execs);

impl Drop for Running {
    fn drop(&mut self) {
        *self.0.count() -= 1;
        self.0.0.1.notify_all();
    }
}

/// Starts to answer. It ends with this process. `stop_signal` asks the container to end.
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
    let served = Arc::new(Served {
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

/// What requests are about.
struct Served {
    container: Arc<Container>,
    sandbox: Arc<Sandbox>,
    disks: Disks,
    stop_signal: i32,
    execs: Execs,
}

fn answer(stream: &UnixStream, served: &Served) {
    // Until the answer is sent.
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

fn carry_out(stream: &UnixStream, served: &Served, counted: &mut Option<Running>) -> Result<i32> {
    let Served {
        container,
        sandbox,
        disks,
        stop_signal,
        execs,
    } = served;
    let mut wire = Wire::new(stream.try_clone()?);
    let Some((request, _)) = wire.receive()? else {
        bail!("nothing was asked");
    };
    match request {
        Request::Signal(number) => send_signal(container, number)?,
        Request::Resize(rows, columns) => container.process().resize(rows, columns)?,
        Request::Stop(seconds) => terminate(container, *stop_signal, Duration::from_secs(seconds))?,
        Request::Writes => {
            let writes = sandbox.disk_writes();
            let answer = Answer::Writes {
                done: writes.done,
                is_host_at_work: writes.is_host_at_work,
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
                user: user.map_or_else(|| own.user.clone(), |text| User { text }),
                stdio,
            };
            *counted = Some(execs.begin());
            return exec(stream, wire, container, &process);
        }
    }
    Ok(0)
}

/// Runs a process, whose streams go to the other side; its exit status.
fn exec(
    stream: &UnixStream,
    wire: Wire,
    container: &Container,
    process: &ProcessConfig,
) -> Result<i32> {
    let mut process = container.exec(process)?;
    let streams = ProcessStreams::take(&mut process).context("it has no streams")?;
    send(stream, &Answer::Started, &streams.fds()).ok();
    // The other side has its own now; the guest sees the end when that goes.
    drop(streams);
    let process = Arc::new(process);
    follow(wire, &process)?;
    Ok(process.wait()?)
}

/// Types what comes from the other side, until it hangs up.
fn console(stream: &UnixStream, sandbox: &Sandbox) -> Result<()> {
    let (mut ours, theirs) = UnixStream::pair()?;
    sandbox.follow_console(ours.try_clone()?);
    send(stream, &Answer::Started, &[theirs.as_fd()])?;
    drop(theirs);
    let mut bytes = [0; 256];
    loop {
        let count = ours.read(&mut bytes)?;
        if count == 0 {
            // What was kept goes out first; then nobody follows any more.
            std::thread::sleep(CONSOLE_GRACE);
            ours.shutdown(std::net::Shutdown::Both).ok();
            return Ok(());
        }
        sandbox.console_input(&bytes[..count]);
    }
}

/// Carries signals and sizes from the connection to the process; a connection that breaks is a
/// user who hung up.
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

    /// Containers are killed and stopped by a koya of another version: what version 0.1 says and understands.
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
