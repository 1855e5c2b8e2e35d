//! The long-lived process: it contains the sandbox, and ends with the container's status.
//!
//! Its standard input is a connection to the command that created it, which sends the request ([`Boot`]) with the
//! container's streams. It enters the sandbox's namespaces while it is single-threaded, so that `/proc/PID/ns/net` of its
//! PID is the sandbox's, and gives up privileges; then hooks may run, and then the container is created.

use crate::console::{self, Pty, spawn};
use crate::ipc::{Boot, ContainerRequest, Request, Response};
use crate::notifier::Notifiers;
use crate::preserved::{self, Count};
use crate::signal::PASSED;
use crate::source::Source;
use crate::state::{self, Status};
use crate::{Outcome, events, long_lived, member, oom};
use anyhow::{Context, Result, anyhow, bail};
use koya::Settings;
use koya::vmm::host::sync::lock;
use koya_tasks::wire::{Wire, send};
use koya_tasks::{
    CreateTask, Event, EventSink, ExecTask, Exit, Overlay, PidHolder, Spec, StdioConfig,
    StdioDescriptors, TaskSet, TaskSetConfig, cgroup, enter_own_mounts, give_up_privileges,
    read_process, read_resources,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::SIGWINCH;
use signal_hook::iterator::Signals;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

const SIGKILL: u32 = 9;
/// Time limit for sending the last replies.
const LAST_ANSWER: Duration = Duration::from_millis(50);

/// Interval of checks whether a client still waits for OOM events.
const LISTENS: Duration = Duration::from_millis(500);

/// Receiver of the end of the container's process, and counter of OOM events.
struct TaskEvents {
    id: String,
    end: Mutex<Sender<Exit>>,
    /// By container.
    ooms: Mutex<HashMap<String, u64>>,
    counted: Condvar,
}

impl EventSink for TaskEvents {
    fn send(&self, event: Event) {
        match event {
            Event::Exited {
                id, exec_id, exit, ..
            } if exec_id.is_empty() && id == self.id => {
                lock(&self.end).send(exit).ok();
            }
            Event::OutOfMemory { id, .. } => {
                *lock(&self.ooms).entry(id).or_default() += 1;
                self.counted.notify_all();
            }
            _ => {}
        }
    }
}

impl TaskEvents {
    fn ooms(&self, id: &str) -> u64 {
        lock(&self.ooms).get(id).copied().unwrap_or(0)
    }

    /// Waits until a container has had more OOM events than `known`, no longer than [`LISTENS`].
    fn ooms_after(&self, id: &str, known: u64) -> u64 {
        let ooms = lock(&self.ooms);
        let waited = self.counted.wait_timeout_while(ooms, LISTENS, |ooms| {
            ooms.get(id).copied().unwrap_or(0) <= known
        });
        drop(waited);
        self.ooms(id)
    }
}

/// The objects that requests act on.
pub(crate) struct ServerState {
    /// The container that this process represents; others may have joined its virtual machine.
    id: String,
    pub(crate) tasks: Arc<TaskSet>,
    task_events: Arc<TaskEvents>,
    terminal: Option<OwnedFd>,
    pub(crate) notifiers: Notifiers,
    next_exec: AtomicU64,
}

impl ServerState {
    /// Creates these files if a container that has ended had an OOM kill.
    pub(crate) fn show_oom(&self, id: &str, files: &[PathBuf]) {
        if self.task_events.ooms(id) > 0 {
            oom::create(files);
        }
    }
}

pub(crate) fn serve() -> Outcome {
    let stream = long_lived::detach()?;
    let mut wire = Wire::new(stream.try_clone()?);
    let Some((boot, fds)) = wire.receive::<Boot>()? else {
        bail!("no request was received");
    };
    boot.log.start()?;
    std::env::set_current_dir("/")?;
    std::panic::set_hook(Box::new(|info| log::error!("{info}")));
    // No hooks of a container run here whose virtual machine is another process.
    let limited = |spec| give_up_privileges(boot.joins.is_none()).map(|()| spec);
    let entered = enter(&boot).and_then(limited);
    PidHolder::lend_first_thread("koya-owner", |first_thread| {
        let served = entered.and_then(|spec| match &boot.joins {
            Some(joins) => {
                member::run_member(&boot, joins, &spec, fds, &stream, &mut wire, &first_thread)
            }
            None => run(&boot, spec, fds, &stream, &mut wire, first_thread),
        });
        served.or_else(|error| {
            // Printed by the command.
            send(&stream, &Response::Failed(format!("{error:#}")), &[]).ok();
            state::stop_listening(&boot.directory);
            Ok(crate::FAILED)
        })
    })?
}

/// Reads a container's configuration, for the container that owns the virtual machine.
pub(crate) fn read_spec(
    source: &Source,
    bundle: &Path,
    id: &str,
    preserved: Count,
    notify: Option<&str>,
) -> Result<Spec> {
    let mut spec = source.read(bundle, id)?;
    spec.drop_hooks_of_others();
    spec.add_environment(preserved.environment());
    if let Some(path) = notify {
        spec.set_notify_socket(path);
    }
    Ok(spec)
}

/// Enters the container's control group and network while there is one thread, and mounts its overlays.
fn enter(boot: &Boot) -> Result<Spec> {
    let notify = boot.notify.as_deref();
    let mut spec = read_spec(&boot.source, &boot.bundle, &boot.id, boot.preserved, notify)?;
    let group = spec.cgroup();
    if let Some(group) = &group
        && let Err(error) = cgroup::enter(group)
    {
        log::warn!("cannot enter {}: {error}", group.display());
    }
    cgroup::have_all_cpus();
    let overlays = spec.take_overlays(&boot.directory);
    // The group is kept until the container is deleted, as with runc: callers read there how the container ended.
    match &boot.joins {
        Some(_) => {
            spec.enter_network_of_another()?;
            if !overlays.is_empty() {
                enter_own_mounts()?;
            }
        }
        None => {
            spec.enter_namespaces()?;
            koya::vmm::devices::fs::raise_descriptor_limit();
        }
    }
    overlays.iter().try_for_each(Overlay::mount)?;
    Ok(spec)
}

fn run(
    boot: &Boot,
    spec: Spec,
    mut fds: Vec<OwnedFd>,
    stream: &UnixStream,
    wire: &mut Wire,
    first_thread: PidHolder,
) -> Outcome {
    send(stream, &Response::Done, &[])?;
    if wire.receive::<Request>()?.is_none() {
        bail!("the creating command ended early");
    }
    let notifiers = Notifiers::default();
    let notify = notifiers.socket(&boot.id, boot.notify.as_deref(), &mut fds)?;
    let (fds, terminal) = streams(boot, &spec, fds)?;
    let stdio = descriptors(fds, boot.is_own_terminal, boot.preserved)?;
    if let Err(error) = koya::confinement::report_violations_in(&boot.directory) {
        log::warn!("a violation would not be the reason of the end: {error}");
    }
    let (sender, receiver) = channel();
    let config = TaskSetConfig {
        log_console: boot.log.is_debug(),
        first_thread: Some(first_thread),
        state: Some(boot.directory.clone()),
        ..TaskSetConfig::default()
    };
    let task_events = Arc::new(TaskEvents {
        id: boot.id.clone(),
        end: sender.into(),
        ooms: Mutex::default(),
        counted: Condvar::new(),
    });
    let settings = Settings::load()?;
    let tasks = TaskSet::new(config, task_events.clone());
    let listener = state::listen(&boot.directory)?;
    let watched = terminal.as_ref().map(OwnedFd::try_clone).transpose()?;
    pass_signals(&boot.id, &tasks, watched)?;
    let created = tasks.create(CreateTask {
        id: boot.id.clone(),
        bundle: boot.bundle.clone(),
        spec,
        mounts: Vec::new(),
        stdio,
        notify,
        joins: None,
        settings,
    });
    if let Err(error) = created {
        tasks.finish();
        return Err(error.into());
    }
    let served = Arc::new(ServerState {
        id: boot.id.clone(),
        tasks: tasks.clone(),
        task_events,
        terminal,
        notifiers,
        next_exec: AtomicU64::new(0),
    });
    listen(listener, served.clone())?;
    send(stream, &Response::Done, &[])?;
    if wire.receive::<Request>()?.is_none() {
        finish(&tasks, &boot.directory);
        bail!("the creating command ended early");
    }
    let exit = receiver
        .recv()
        .context("no exit of the container was reported")?;
    served.show_oom(&boot.id, &boot.oom_files);
    finish(&tasks, &boot.directory);
    Ok(exit.status as u8)
}

/// Ends the sandbox; the next command must not find an ending process.
fn finish(tasks: &TaskSet, directory: &Path) {
    state::stop_listening(directory);
    std::thread::sleep(LAST_ANSWER);
    tasks.finish();
}

/// The streams of the container's process: a new terminal, whose master is sent, or the received descriptors. Also returns
/// that terminal again.
pub(crate) fn streams(
    boot: &Boot,
    spec: &Spec,
    fds: Vec<OwnedFd>,
) -> Result<(Vec<OwnedFd>, Option<OwnedFd>)> {
    if !boot.is_terminal {
        return Ok((fds, None));
    }
    let mut fds = fds.into_iter();
    let to = fds.next().context("no console socket was received")?;
    let pty = Pty::open(spec.console_size())?;
    console::control(&pty.slave)?;
    pty.send_master(&to.into())?;
    let watched = pty.slave.try_clone()?;
    Ok((
        std::iter::once(pty.slave).chain(fds).collect(),
        Some(watched),
    ))
}

/// One descriptor is a terminal, three are the standard streams. As with runc, the user's own terminal adds carriage returns
/// itself, and streams that are not terminals get none. Inherited descriptors come last.
pub(crate) fn descriptors(
    mut fds: Vec<OwnedFd>,
    is_own_terminal: bool,
    count: Count,
) -> Result<StdioConfig> {
    let preserved = preserved::split(&mut fds, count)?;
    let mut fds = fds.into_iter();
    let open = match (fds.next(), fds.next(), fds.next()) {
        (Some(terminal), None, None) => StdioDescriptors {
            stdout: Some(terminal.try_clone()?),
            stdin: Some(terminal),
            stderr: None,
            terminal: true,
            keep_newlines: is_own_terminal,
            preserved,
        },
        (Some(stdin), stdout @ Some(_), stderr @ Some(_)) => StdioDescriptors {
            stdin: Some(stdin),
            stdout,
            stderr,
            terminal: false,
            keep_newlines: false,
            preserved,
        },
        _ => bail!("the standard streams were not received"),
    };
    Ok(StdioConfig::Descriptors(open))
}

/// Forwards signals of this process to the container, and new sizes of its terminal.
fn pass_signals(id: &str, tasks: &Arc<TaskSet>, terminal: Option<OwnedFd>) -> Result<()> {
    let mut caught = Signals::new(PASSED)?;
    let (id, tasks) = (id.to_owned(), tasks.clone());
    spawn("koya-signals", move || {
        for signal in caught.forever() {
            let sent = match (signal, &terminal) {
                (SIGWINCH, Some(terminal)) => resize(&tasks, &id, terminal),
                (SIGWINCH, None) => Ok(()),
                (signal, _) => tasks.kill(&id, "", signal as u32, false),
            };
            if let Err(error) = sent {
                log::debug!("signal {signal} is not passed on: {error}");
            }
        }
    })
}

fn resize(tasks: &TaskSet, id: &str, terminal: &OwnedFd) -> Result<(), koya_tasks::Error> {
    let (rows, columns) = console::size(terminal);
    if (rows, columns) == (0, 0) {
        return Ok(());
    }
    tasks.resize(id, "", rows, columns)
}

fn listen(listener: UnixListener, served: Arc<ServerState>) -> Result<()> {
    spawn("koya-control", move || {
        for stream in listener.incoming().flatten() {
            let served = served.clone();
            let spawned = spawn("koya-request", move || {
                let answer = carry_out(&stream, &served)
                    .unwrap_or_else(|error| Response::Failed(format!("{error:#}")));
                if let Err(error) = send(&stream, &answer, &[]) {
                    log::debug!("nobody waits for {answer:?}: {error:#}");
                }
            });
            if let Err(error) = spawned {
                log::warn!("{error:#}");
            }
        }
    })
}

fn carry_out(stream: &UnixStream, served: &Arc<ServerState>) -> Result<Response> {
    let mut wire = Wire::new(stream.try_clone()?);
    let Some((ContainerRequest { id, request }, fds)) = wire.receive()? else {
        bail!("no request was received");
    };
    let (tasks, id) = (&served.tasks, id.as_str());
    match request {
        Request::Status => {
            let status = match tasks.state(id, "")?.status {
                koya_tasks::Status::Created => Status::Created,
                koya_tasks::Status::Running => Status::Running,
                koya_tasks::Status::Paused => Status::Paused,
                koya_tasks::Status::Stopped => Status::Stopped,
            };
            return Ok(Response::Status(status));
        }
        Request::Start => {
            tasks.start(id, "")?;
            if let Some(terminal) = &served.terminal
                && id == served.id
            {
                // It may have changed since the container was created.
                resize(tasks, id, terminal)?;
            }
        }
        Request::Kill { signal, all } => tasks.kill(id, "", signal, all)?,
        Request::Pause => tasks.pause(id)?,
        Request::Resume => tasks.resume(id)?,
        Request::Update(resources) => {
            let resources = read_resources(resources.to_string().as_bytes())?;
            tasks.update(id, &resources)?;
        }
        Request::Stats => return Ok(Response::Stats(events::data(&tasks.stats(id)?))),
        Request::Ooms => return stream_oom_events(stream, &served.task_events, id),
        Request::Notify { until_ready } => {
            served.notifiers.follow(id, stream, until_ready, fds)?;
        }
        Request::Exec {
            process,
            is_own_terminal,
            preserved,
            cgroup,
        } => {
            let stdio = descriptors(fds, is_own_terminal, preserved)?;
            let process = read_process(process.to_string().as_bytes())?;
            let task = ExecTask {
                id: id.into(),
                exec_id: format!("exec-{}", served.next_exec.fetch_add(1, Ordering::SeqCst)),
                process,
                stdio,
                cgroup,
            };
            return exec(stream, wire, served, task);
        }
        Request::Create(create) => {
            return member::create(stream, wire, served, id.to_owned(), *create, fds);
        }
        Request::Resize(..) | Request::Signal(_) => bail!("this connection has no process"),
    }
    Ok(Response::Done)
}

/// Reports the OOM events of a container until the client disconnects.
fn stream_oom_events(stream: &UnixStream, events: &TaskEvents, id: &str) -> Result<Response> {
    let mut known = events.ooms(id);
    loop {
        let ooms = events.ooms_after(id, known);
        for _ in known..ooms {
            send(stream, &Response::Oom, &[])?;
        }
        known = ooms;
        let mut polled = [PollFd::new(stream, PollFlags::RDHUP)];
        if poll(&mut polled, Some(&Timespec::default()))? > 0 {
            return Ok(Response::Done);
        }
    }
}

/// Runs a process and waits for its end.
fn exec(
    stream: &UnixStream,
    wire: Wire,
    served: &Arc<ServerState>,
    task: ExecTask,
) -> Result<Response> {
    let (id, exec_id) = (task.id.clone(), task.exec_id.clone());
    let (tasks, id) = (&served.tasks, id.as_str());
    tasks.exec(task)?;
    let ran = tasks.start(id, &exec_id).map_err(anyhow::Error::from);
    let exit = ran.and_then(|_| {
        send(stream, &Response::Started, &[]).ok();
        follow(wire, served.clone(), id.to_owned(), exec_id.clone())?;
        tasks.wait(id, &exec_id).map_err(|error| anyhow!("{error}"))
    });
    tasks.delete(id, &exec_id).ok();
    Ok(Response::Ended(exit?.status))
}

/// Forwards sizes of a terminal and signals until the connection ends: the process that represents it on the host was
/// killed, or has been told of its end. An empty `exec_id` means the container's own process.
pub(crate) fn follow(
    mut wire: Wire,
    served: Arc<ServerState>,
    id: String,
    exec_id: String,
) -> Result<()> {
    spawn("koya-follow", move || {
        let (tasks, id) = (&served.tasks, id.as_str());
        let signal = |signal| tasks.kill(id, &exec_id, signal, false);
        loop {
            let passed = match wire.receive() {
                Ok(Some((Request::Resize(rows, columns), _))) => {
                    tasks.resize(id, &exec_id, rows, columns)
                }
                Ok(Some((Request::Signal(number), _))) => signal(number),
                _ => break,
            };
            if let Err(error) = passed {
                log::debug!("{exec_id}: {error}");
            }
        }
        if let Err(error) = signal(SIGKILL) {
            log::debug!("{exec_id}: {error}");
        }
    })
}
