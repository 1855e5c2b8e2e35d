//! The tasks of one sandbox, and their shared state.

use crate::Error;
use crate::create::SandboxMembership;
use crate::event::{Event, EventSink};
use crate::exec::Exec;
use crate::host_limits;
use crate::machine::{Boot, GuestContainer, Machine, VirtualMachine, boot_sandbox};
use crate::notify::NotifySocket;
use crate::pid_holder::PidHolder;
use crate::process::{Action, Exit, ExitWatch, Handle, Process, Status};
use crate::role::Role;
use crate::size::Limits;
use crate::spec::Spec;
use crate::stdio::StdioPaths;
use crate::sync::{Guard, Level, Ordered};
use koya::oci_spec::runtime::{Hooks, LinuxResources};
use koya::{Settings, Size};
use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Once};
use std::time::{Duration, Instant};

/// Time limits of a task set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timeouts {
    /// For a request about an ended container that holds up its deletion.
    pub(crate) held: Duration,
    /// The same while another container runs, whose requests may take long.
    pub(crate) held_beside_others: Duration,
    /// For exec processes to be reported before the init process.
    pub(crate) execs: Duration,
    /// For the end of a container that is deleted before it was started. If it does not end, its virtual machine is ended
    /// earlier or, if other containers are alive in it, by the removal that follows.
    pub(crate) kill: Duration,
    /// For the cancellation of a starting virtual machine at the end: it has not done anything yet.
    pub(crate) start: Duration,
    /// For a guest to flush its disks at the end: the sandbox's own limits are shorter.
    pub(crate) stop: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            held: Duration::from_secs(15),
            held_beside_others: Duration::from_secs(90),
            execs: Duration::from_secs(2),
            kill: Duration::from_secs(12),
            start: Duration::from_secs(2),
            stop: Duration::from_secs(620),
        }
    }
}

/// Status of a process whose virtual machine ended.
pub(crate) const LOST: u32 = 255;
pub(crate) const SIGKILL: u32 = 9;
/// Status of a killed process.
pub(crate) const KILLED: u32 = 128 + SIGKILL;

/// The constant part of a container of the sandbox. The variable parts are its [`Entry`] and its [`Process`].
pub(crate) struct Task {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) rootfs: PathBuf,
    pub(crate) spec: Spec,
    /// Its hooks on the host.
    pub(crate) hooks: Hooks,
    pub(crate) role: Role,
    pub(crate) joins: Option<SandboxMembership>,
    pub(crate) settings: Settings,
    pub(crate) init: Process,
    pub(crate) notify: Option<NotifySocket>,
    pub(crate) pid_holder: PidHolder,
    /// Limits of CPU time on the host that wait for its start.
    pub(crate) time_limits: Once,
}

impl Task {
    /// The PID on the host that clients get. That of a pod sandbox container is this process, whose namespaces the pod's
    /// containers refer to; they have PIDs of their own.
    pub(crate) fn pid(&self) -> u32 {
        self.pid_holder.pid()
    }

    /// Whether it is a member of a pod, and not the pod sandbox container.
    pub(crate) fn is_member(&self) -> bool {
        matches!(self.role, Role::Member { .. })
    }

    /// Whether it is a pod sandbox container: nothing of it runs in the guest.
    pub(crate) fn is_pod(&self) -> bool {
        self.role == Role::Sandbox
    }

    /// Sets those of its limits that apply to the sandbox's control group on the host, except for CPU time.
    pub(crate) fn limit_on_host(&self) -> Result<(), Error> {
        match self.spec.cgroup().zip(self.spec.resources()) {
            Some((group, resources)) => Ok(host_limits::apply_all_but_time(&group, resources)?),
            None => Ok(()),
        }
    }

    /// Sets those limits of CPU time there that do not slow down its start: engines read them before it.
    pub(crate) fn share_time_on_host(&self) {
        if let Some((group, resources)) = self.spec.cgroup().zip(self.spec.resources()) {
            host_limits::apply_shares(&group, resources);
        }
    }

    /// Sets the others, unless that was done before: an update may have changed them since.
    pub(crate) fn limit_time_on_host(&self) {
        self.time_limits.call_once(|| {
            if let Some((group, resources)) = self.spec.cgroup().zip(self.spec.resources()) {
                host_limits::apply_slow(&group, resources);
            }
        });
    }

    pub(crate) fn container(&self) -> Option<Arc<dyn GuestContainer>> {
        match self.init.handle() {
            Some(Handle::Init(container)) => Some(container),
            _ => None,
        }
    }

    pub(crate) fn running(&self) -> Result<Arc<dyn GuestContainer>, Error> {
        self.container()
            .ok_or_else(|| Error::FailedPrecondition("the container does not run".into()))
    }
}

/// The variable state of a task, apart from its processes.
pub(crate) struct Entry {
    pub(crate) task: Arc<Task>,
    /// Its current limits.
    pub(crate) limits: Limits,
    /// Updates of its limits from before it was created in the guest.
    pub(crate) pending_limits: Vec<LinuxResources>,
    pub(crate) execs: HashMap<String, Arc<Exec>>,
    pub(crate) is_mounted: bool,
    /// Whether a request is changing it; one at a time may.
    pub(crate) is_busy: bool,
    /// Number of its processes killed by the guest's OOM killer, as published so far.
    pub(crate) oom_kills: u64,
    /// Whether its messages to a service manager are being passed on.
    pub(crate) is_notifying: bool,
}

/// The variable state of a task set. Every change wakes the threads that wait for one.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) entries: HashMap<String, Entry>,
    pub(crate) machine: Machine,
    /// Whether the virtual machine has been stopped or is being stopped.
    pub(crate) is_stopping: bool,
    /// Whether it had ended by itself before that.
    pub(crate) has_died: bool,
    /// Whether the guest is being resized; one thread at a time may.
    pub(crate) is_resizing: bool,
    /// The size of the guest at its start.
    pub(crate) first_size: Option<Size>,
    /// The size last requested of the guest.
    pub(crate) size: Option<Size>,
    /// Time of the last end of a container; `None` if the guest was resized since, or need not be.
    pub(crate) last_end: Option<Instant>,
    /// Whether the start of the sandbox has been logged.
    pub(crate) is_start_logged: bool,
}

impl State {
    /// The entry of a task, unless it was deleted: its name may have been reused.
    pub(crate) fn entry(&mut self, task: &Task) -> Option<&mut Entry> {
        let entry = self.entries.get_mut(&task.id)?;
        std::ptr::eq(Arc::as_ptr(&entry.task), task).then_some(entry)
    }

    pub(crate) fn execs(&mut self, task: &Task) -> Vec<Arc<Exec>> {
        let entry = self.entry(task);
        entry.map_or_else(Vec::new, |entry| entry.execs.values().cloned().collect())
    }

    pub(crate) fn machine(&self) -> Option<Arc<dyn VirtualMachine>> {
        match &self.machine {
            Machine::Running(machine) => Some(machine.clone()),
            Machine::Absent | Machine::Starting => None,
        }
    }

    /// Takes the turn; false if it is taken.
    fn take_turn(&mut self, task: &Task) -> Result<bool, Error> {
        let missing = || Error::NotFound(format!("container {}", task.id));
        let entry = self.entry(task).ok_or_else(missing)?;
        Ok(!std::mem::replace(&mut entry.is_busy, true))
    }

    /// Time for which a request about a task may hold up its deletion.
    fn held_limit(&self, task: &Task, timeouts: &Timeouts) -> Duration {
        let others = self.entries.values().map(|entry| &entry.task);
        let mut others = others.filter(|other| other.id != task.id && !other.is_pod());
        match others.any(|other| other.init.status() != Status::Stopped) {
            true => timeouts.held_beside_others,
            false => timeouts.held,
        }
    }
}

/// Configuration of a task set.
#[derive(Debug, Default)]
pub struct TaskSetConfig {
    /// Namespace passed to loggers.
    pub namespace: String,
    /// Whether the guest's console goes to the log, at its level `debug`.
    pub log_console: bool,
    /// Reason why a sandbox can't be created, if known: the reply to requests for one.
    pub unready: Option<String>,
    /// The network namespace in which hooks run: the host's, if this process is now in another one.
    pub host_network: Option<File>,
    /// The first thread of the process, which then shows the files of the container that owns the sandbox.
    pub first_thread: Option<PidHolder>,
    /// Directory for the record of the sandbox's confinement ([`koya::confinement`]), if there is to be one.
    pub state: Option<PathBuf>,
}

/// The tasks of one sandbox: a container, or a pod. The first one starts the virtual machine.
///
/// Requests may come from any thread, and block it while the guest or the host works. It exists until
/// [`finish`](Self::finish): its threads wait for containers.
pub struct TaskSet {
    pub(crate) config: TaskSetConfig,
    pub(crate) boot: Boot,
    pub(crate) timeouts: Timeouts,
    events: Arc<dyn EventSink>,
    state: Ordered<State>,
    pub(crate) changed: Condvar,
}

/// Current state of a task or one of its processes.
#[derive(Clone, Debug)]
pub struct TaskState {
    /// The PID on the host that represents the task.
    pub pid: u32,
    /// The task's bundle.
    pub bundle: PathBuf,
    /// Status of the process.
    pub status: Status,
    /// Its streams.
    pub stdio: StdioPaths,
    /// Its exit.
    pub exit: Option<Exit>,
}

/// The turn of a request that changes a task. Other requests wait for it, also during calls to the guest: it is not a lock,
/// and is taken before any lock.
pub(crate) struct Turn<'a> {
    set: &'a TaskSet,
    task: Arc<Task>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.set.change(|state| {
            if let Some(entry) = state.entry(&self.task) {
                entry.is_busy = false;
            }
        });
    }
}

/// A process, with its owner.
pub(crate) enum ProcessOf {
    Init(Arc<Task>),
    Exec(Arc<Exec>),
}

impl std::ops::Deref for ProcessOf {
    type Target = Process;

    fn deref(&self) -> &Process {
        match self {
            Self::Init(task) => &task.init,
            Self::Exec(exec) => &exec.process,
        }
    }
}

impl TaskSet {
    /// The namespace of its configuration.
    pub fn namespace(&self) -> &str {
        &self.config.namespace
    }

    /// A set without tasks and without a virtual machine.
    pub fn new(config: TaskSetConfig, events: Arc<dyn EventSink>) -> Arc<Self> {
        Self::with(config, events, Box::new(boot_sandbox), Timeouts::default())
    }

    pub(crate) fn with(
        config: TaskSetConfig,
        events: Arc<dyn EventSink>,
        boot: Boot,
        timeouts: Timeouts,
    ) -> Arc<Self> {
        Arc::new(Self {
            config,
            boot,
            timeouts,
            events,
            state: Ordered::new(Level::Set, State::default()),
            changed: Condvar::new(),
        })
    }

    /// Whether it has no tasks.
    pub fn is_empty(&self) -> bool {
        self.lock().entries.is_empty()
    }

    /// The PID on the host that represents a task.
    ///
    /// # Errors
    /// If there is no such task.
    pub fn pid(&self, id: &str) -> Result<u32, Error> {
        Ok(self.task(id)?.pid())
    }

    /// State of a process: the init process, if `exec_id` is empty.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn state(&self, id: &str, exec_id: &str) -> Result<TaskState, Error> {
        let task = self.task(id)?;
        let process = self.process(&task, exec_id)?;
        Ok(TaskState {
            pid: task.pid(),
            bundle: task.bundle.clone(),
            status: process.status(),
            stdio: process.paths.clone(),
            exit: process.exit(),
        })
    }

    /// Watches for the exit of a process, past or future.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn watch(&self, id: &str, exec_id: &str) -> Result<ExitWatch, Error> {
        let task = self.task(id)?;
        Ok(self.process(&task, exec_id)?.watch())
    }

    pub(crate) fn lock(&self) -> Guard<'_, State> {
        self.state.lock()
    }

    /// Changes the state, and wakes the threads that wait for a change.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let changed = change(&mut self.lock());
        self.changed.notify_all();
        changed
    }

    /// Waits until `ready`, called at each change, returns a value; no longer than `limit`.
    pub(crate) fn wait_for<T>(
        &self,
        limit: Duration,
        mut ready: impl FnMut(&mut State) -> Option<T>,
    ) -> Option<T> {
        let started = Instant::now();
        let mut state = self.lock();
        loop {
            if let Some(found) = ready(&mut state) {
                return Some(found);
            }
            let left = limit.saturating_sub(started.elapsed());
            if left.is_zero() {
                return None;
            }
            state = state.wait_timeout(&self.changed, left);
        }
    }

    pub(crate) fn publish(&self, event: Event) {
        self.events.send(event);
    }

    pub(crate) fn task(&self, id: &str) -> Result<Arc<Task>, Error> {
        let task = self.lock().entries.get(id).map(|entry| entry.task.clone());
        task.ok_or_else(|| Error::NotFound(format!("container {id}")))
    }

    /// A process of a task; the ID of the init process is empty.
    pub(crate) fn process(&self, task: &Arc<Task>, exec_id: &str) -> Result<ProcessOf, Error> {
        if exec_id.is_empty() {
            return Ok(ProcessOf::Init(task.clone()));
        }
        Ok(ProcessOf::Exec(self.exec_process(task, exec_id)?))
    }

    pub(crate) fn exec_process(&self, task: &Task, exec_id: &str) -> Result<Arc<Exec>, Error> {
        let mut state = self.lock();
        let entry = state.entry(task);
        let exec = entry.and_then(|entry| entry.execs.get(exec_id).cloned());
        let missing = || Error::NotFound(format!("process {exec_id} of container {}", task.id));
        exec.ok_or_else(missing)
    }

    /// Waits for the turn to change a task.
    pub(crate) fn turn(&self, task: &Arc<Task>) -> Result<Turn<'_>, Error> {
        let mut state = self.lock();
        while !state.take_turn(task)? {
            state = state.wait(&self.changed);
        }
        Ok(self.turn_of(task))
    }

    /// The guard of a turn that was taken for the caller.
    pub(crate) fn turn_of(&self, task: &Arc<Task>) -> Turn<'_> {
        let task = task.clone();
        Turn { set: self, task }
    }

    /// Waits for the turn to delete a task. Pending calls to the guest end first, by themselves or with the guest.
    pub(crate) fn turn_to_delete(&self, task: &Arc<Task>) -> Result<Turn<'_>, Error> {
        let started = Instant::now();
        let machine = {
            let mut state = self.lock();
            loop {
                if state.take_turn(task)? {
                    return Ok(self.turn_of(task));
                }
                let held = state.held_limit(task, &self.timeouts);
                let left = held.saturating_sub(started.elapsed());
                if left.is_zero() {
                    break state.machine();
                }
                state = state.wait_timeout(&self.changed, left);
            }
        };
        let has_ended = task.init.status() == Status::Stopped && task.container().is_some();
        if let Some(machine) = machine.filter(|_| has_ended) {
            log::error!(
                "the virtual machine is ended: it holds a request about {}, which has ended",
                task.id
            );
            machine.kill();
        }
        self.turn(task)
    }

    /// Checks that a process may be added to a task's container, or that it may be queried.
    pub(crate) fn check_usable(task: &Task) -> Result<(), Error> {
        task.init.status().allow(Action::Use)
    }
}
