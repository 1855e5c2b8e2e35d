//! The sandbox of one shim, and the containers in it.

use crate::events::{Events, timestamp};
use crate::flags::Flags;
use crate::further::Further;
use crate::io::Paths;
use crate::mounts;
use crate::options::settings;
use crate::size::Limits;
use crate::spec::{HOST_NETWORK, Network, Role, Spec};
use crate::stand_in::StandIn;
use crate::sync::{lock, spawn};
use crate::task::{Exit, Handle, Proc, Refusal, Status, Wish};
use anyhow::{Result, anyhow};
use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExit, TaskIO, TaskOOM, TaskStart,
};
use containerd_shim_protos::topics;
use koya::vmm::guest_text::Warnings;
use koya::{Bundle, Container, Loopback, Sandbox, Settings, SharedPids, Size, Step};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant, SystemTime};

/// How long processes that were added to a container may take to be reported before its first one.
const FURTHER_FIRST: Duration = Duration::from_secs(2);
/// How long the virtual machine and the events may take when the shim ends.
const END_LIMIT: Duration = Duration::from_secs(2);
/// How long a guest may take to write out what it has not written yet, when the shim ends: the sandbox has
/// limits of its own, which end before this.
const STOP_LIMIT: Duration = Duration::from_secs(620);
/// How long a container that is deleted before it was started may take to end. If it does not, its virtual
/// machine ends before that or, where other containers live in it, with the removal that follows.
const KILL_LIMIT: Duration = Duration::from_secs(12);
/// How long the guest may hold a request about a container that has ended, and that is to be deleted; and how
/// long where another container runs, which may have asked for something that takes its time.
const HELD_LIMIT: Duration = Duration::from_secs(15);
const HELD_BESIDE_OTHERS: Duration = Duration::from_secs(90);
/// The status of a process whose virtual machine ended.
const LOST: u32 = 255;

pub(crate) const SIGKILL: u32 = 9;

/// A container of the sandbox.
pub(crate) struct Task {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) spec: Spec,
    pub(crate) role: Role,
    pub(crate) settings: Settings,
    /// What it may have now.
    pub(crate) limits: Mutex<Limits>,
    pub(crate) first: Proc,
    pub(crate) further: Mutex<HashMap<String, Arc<Further>>>,
    rootfs: PathBuf,
    is_mounted: AtomicBool,
    /// One request that changes it at a time.
    pub(crate) work: Mutex<()>,
    /// Its start is told before its end.
    order: Mutex<()>,
    stand_in: StandIn,
    /// How many of its processes were told to be killed for their memory.
    oom_kills: Mutex<u64>,
}

impl Task {
    /// One of its processes; the first has no name.
    pub(crate) fn proc(self: &Arc<Self>, name: &str) -> Result<ProcOf, Refusal> {
        if name.is_empty() {
            return Ok(ProcOf::First(self.clone()));
        }
        let further = lock(&self.further).get(name).cloned();
        let missing = || Refusal::NotFound(format!("process {name} of container {}", self.id));
        Ok(ProcOf::Further(further.ok_or_else(missing)?))
    }

    /// The process on the host that clients are told. A pod's own container is the shim's process, whose
    /// namespaces the pod's containers name; they have numbers of their own.
    pub(crate) fn pid(&self) -> u32 {
        match self.is_member() {
            true => self.stand_in.pid(),
            false => pid(),
        }
    }

    /// One of a pod's containers, and not the pod's own.
    pub(crate) fn is_member(&self) -> bool {
        matches!(self.role, Role::Member { .. })
    }

    pub(crate) fn is_virtual(&self) -> bool {
        self.role == Role::Sandbox
    }

    fn container(&self) -> Option<Arc<Container>> {
        match self.first.handle() {
            Some(Handle::First(container)) => Some(container),
            _ => None,
        }
    }

    pub(crate) fn running(&self) -> Result<Arc<Container>, Refusal> {
        self.container()
            .ok_or_else(|| Refusal::Precondition("the container does not run".into()))
    }
}

/// A process, with what keeps it.
pub(crate) enum ProcOf {
    First(Arc<Task>),
    Further(Arc<Further>),
}

impl std::ops::Deref for ProcOf {
    type Target = Proc;

    fn deref(&self) -> &Proc {
        match self {
            Self::First(task) => &task.first,
            Self::Further(further) => &further.proc,
        }
    }
}

/// The sandbox of this shim.
pub(crate) struct Pod {
    pub(crate) namespace: String,
    pub(crate) debug: bool,
    pub(crate) events: Events,
    /// Why its namespaces could not be entered.
    unready: Option<String>,
    end: Mutex<Sender<()>>,
    pub(crate) tasks: Mutex<HashMap<String, Arc<Task>>>,
    /// The size that was last asked of it.
    pub(crate) fitted: Mutex<Option<Size>>,
    /// When a container last ended; none if the pod has been fitted since, or need not be.
    pub(crate) last_end: Mutex<Option<Instant>>,
    pub(crate) sandbox: Mutex<Option<Arc<Sandbox>>>,
    pub(crate) loopback: Mutex<Option<Loopback>>,
    pub(crate) is_stopping: AtomicBool,
    /// Whether the log says how the sandbox started.
    is_told: AtomicBool,
}

/// This process, which is the sandbox.
pub(crate) fn pid() -> u32 {
    std::process::id()
}

impl Pod {
    pub(crate) fn new(flags: &Flags, events: Events, ready: Result<()>, end: Sender<()>) -> Self {
        Self {
            namespace: flags.namespace.clone(),
            debug: flags.debug,
            events,
            unready: ready.err().map(|error| format!("{error:#}")),
            end: Mutex::new(end),
            tasks: Mutex::default(),
            fitted: Mutex::default(),
            last_end: Mutex::default(),
            sandbox: Mutex::default(),
            loopback: Mutex::default(),
            is_stopping: AtomicBool::new(false),
            is_told: AtomicBool::new(false),
        }
    }

    pub(crate) fn task(&self, id: &str) -> Result<Arc<Task>, Refusal> {
        let task = lock(&self.tasks).get(id).cloned();
        task.ok_or_else(|| Refusal::NotFound(format!("container {id}")))
    }

    /// The pid that clients are told.
    pub(crate) fn create(self: &Arc<Self>, request: &CreateTaskRequest) -> Result<u32, Refusal> {
        let id = &request.id;
        if !request.checkpoint.is_empty() {
            return Err(Refusal::Unsupported("checkpoints are not supported"));
        }
        let bundle = PathBuf::from(&request.bundle);
        let spec = Spec::read(&bundle)?;
        let root = spec
            .0
            .root()
            .as_ref()
            .map(|root| root.path().clone())
            .unwrap_or_default();
        let rootfs = match request.rootfs.is_empty() {
            true => bundle.join(root),
            false => bundle.join("rootfs"),
        };
        let role = spec.role(id);
        // A pod's are its own container's to have, and what changed since is for later pods.
        let settings = match role {
            Role::Member { .. } => Settings::default(),
            _ => {
                let settings = settings(request.options.as_ref())?;
                settings.annotated(spec.0.annotations().iter().flatten())?
            }
        };
        let task = Arc::new(Task {
            id: id.clone(),
            role,
            limits: Mutex::new(spec.limits()),
            stand_in: StandIn::new()?,
            oom_kills: Mutex::default(),
            settings,
            spec,
            first: Proc::new(Paths {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
            }),
            further: Mutex::default(),
            rootfs,
            is_mounted: AtomicBool::new(false),
            bundle,
            work: Mutex::default(),
            order: Mutex::default(),
        });
        // Who deletes it meanwhile waits until it is made.
        let made = task.clone();
        let _work = lock(&made.work);
        {
            let mut tasks = lock(&self.tasks);
            if tasks.contains_key(id) {
                return Err(Refusal::Exists(format!("container {id}")));
            }
            tasks.insert(id.clone(), task.clone());
        }
        if let Err(error) = self.prepare(&task, request) {
            self.undo(&task);
            return Err(error);
        }
        let io = TaskIO {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
            ..Default::default()
        };
        let event = TaskCreate {
            container_id: id.clone(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            io: Some(io).into(),
            pid: task.pid(),
            ..Default::default()
        };
        self.events.publish(topics::TASK_CREATE_EVENT_TOPIC, &event);
        Ok(task.pid())
    }

    fn prepare(
        self: &Arc<Self>,
        task: &Arc<Task>,
        request: &CreateTaskRequest,
    ) -> Result<(), Refusal> {
        if let Some(why) = &self.unready {
            return Err(anyhow!("{why}").into());
        }
        if task.spec.network() == Network::Host {
            return Err(anyhow!(HOST_NETWORK).into());
        }
        if task.is_virtual() {
            let sandbox = self.boot(task)?;
            let (pod, own) = (self.clone(), task.clone());
            task.stand_in.run(move || {
                let reason = sandbox.machine().wait_ended();
                let status = match pod.is_stopping.load(Ordering::SeqCst) {
                    true => 128 + SIGKILL,
                    false => {
                        log::error!("the pod's virtual machine ended: {reason}");
                        LOST
                    }
                };
                pod.end(&own, status, SystemTime::now());
            })?;
            return Ok(());
        }
        if !request.rootfs.is_empty() {
            mounts::mount_all(&request.rootfs, &task.rootfs)?;
            task.is_mounted.store(true, Ordering::SeqCst);
        }
        task.first
            .set_io(task.first.paths.open(&task.id, &self.namespace)?);
        // Into a new network namespace somebody may put an interface before the start.
        if task.spec.network() != Network::New {
            self.make(task)?;
        }
        Ok(())
    }

    /// Takes back a container as far as it was made.
    fn undo(self: &Arc<Self>, task: &Task) {
        if let Some(container) = task.container() {
            container.remove().ok();
        }
        // What is shared holds the mount.
        if task.is_mounted.swap(false, Ordering::SeqCst) {
            mounts::unmount_all(&task.rootfs);
        }
        let mut tasks = lock(&self.tasks);
        // Its name may be another's by now.
        let is_own = |other: &Arc<Task>| std::ptr::eq(Arc::as_ptr(other), task);
        if tasks.get(&task.id).is_some_and(is_own) {
            tasks.remove(&task.id);
        }
        let is_last = tasks.is_empty();
        drop(tasks);
        if is_last {
            self.stop_behind();
        } else if task.is_member() {
            self.fit_later();
        }
    }

    /// Makes the container in the guest; its first process waits to be started.
    fn make(self: &Arc<Self>, task: &Arc<Task>) -> Result<Arc<Container>, Refusal> {
        let sandbox = self.boot(task)?;
        self.fit()?;
        let bundle = Bundle {
            spec: task.spec.0.clone(),
            folder: task.bundle.clone(),
            rootfs: task.rootfs.clone(),
            pids: self.shared_pids(task),
        };
        let mut container = sandbox.create_oci(&task.id, &bundle, task.first.paths.stdio())?;
        let pumps = task.first.take_io().connect(container.process_mut());
        let pumps = match pumps {
            Ok(pumps) => Arc::new(pumps),
            Err(error) => {
                container.remove().ok();
                return Err(error.into());
            }
        };
        let container = Arc::new(container);
        task.first.made(Handle::First(container.clone()), pumps);
        let (pod, followed) = (self.clone(), task.clone());
        task.stand_in.run(move || pod.follow(&followed))?;
        Ok(container)
    }

    /// Whose pid namespace a container is to have.
    fn shared_pids(&self, task: &Task) -> SharedPids {
        let Some(wanted) = task.spec.pids_of() else {
            return SharedPids::Unknown;
        };
        if wanted == pid() {
            return SharedPids::Sandbox;
        }
        let tasks = lock(&self.tasks);
        let mut others = tasks.values().filter(|other| other.id != task.id);
        let found = others.find(|other| other.pid() == wanted);
        found.map_or(SharedPids::Unknown, |other| {
            SharedPids::Container(other.id.clone())
        })
    }

    /// Waits for a container's first process, and tells of its end.
    fn follow(&self, task: &Arc<Task>) {
        let Some(container) = task.container() else {
            return;
        };
        let status = self.status_of(container.wait());
        let at = SystemTime::now();
        if status == 128 + SIGKILL
            && let Ok(stats) = container.stats()
        {
            // Clients want to hear of it before its end.
            let kills = stats.memory_events.get("oom_kill").copied();
            self.out_of_memory(task, kills.unwrap_or(0));
        }
        if let Some(pumps) = task.first.pumps() {
            pumps.finish();
        }
        // Those that were added end with it, and are told first.
        let started = Instant::now();
        let runs = |further: &Arc<Further>| further.proc.status() == Status::Running;
        while started.elapsed() < FURTHER_FIRST && lock(&task.further).values().any(runs) {
            std::thread::sleep(Duration::from_millis(2));
        }
        // The guest owes the word for the others, and nobody is to wait for it.
        let left = lock(&task.further).clone();
        for (name, further) in left.iter().filter(|(_, further)| runs(further)) {
            if further.proc.ended(128 + SIGKILL, at) {
                self.publish_exit(task, name, 128 + SIGKILL, at);
            }
        }
        self.end(task, status, at);
    }

    /// Tells that the guest's kernel has killed so many of a container's processes for their memory.
    pub(crate) fn out_of_memory(&self, task: &Task, kills: u64) {
        let mut told = lock(&task.oom_kills);
        if kills <= *told {
            return;
        }
        *told = kills;
        static TOLD: Warnings = Warnings::new();
        TOLD.warn(format_args!("{}: out of memory, {kills} killed", task.id));
        let event = TaskOOM {
            container_id: task.id.clone(),
            ..Default::default()
        };
        self.events.publish(topics::TASK_OOM_EVENT_TOPIC, &event);
    }

    pub(crate) fn status_of(&self, waited: Result<i32, koya::Error>) -> u32 {
        match waited {
            Ok(status) => status as u32,
            Err(_) if self.is_stopping.load(Ordering::SeqCst) => 128 + SIGKILL,
            Err(error) => {
                // A guest's last words are its own: they are not this log's, but where one asks.
                log::debug!("{error}");
                log::error!("the virtual machine ended by itself");
                LOST
            }
        }
    }

    pub(crate) fn end(&self, task: &Task, status: u32, at: SystemTime) {
        let _order = lock(&task.order);
        if !task.first.ended(status, at) {
            return;
        }
        self.publish_exit(task, &task.id, status, at);
        if !task.is_member() {
            self.stop_behind();
        }
    }

    pub(crate) fn publish_exit(&self, task: &Task, name: &str, status: u32, at: SystemTime) {
        let event = TaskExit {
            container_id: task.id.clone(),
            id: name.into(),
            pid: task.pid(),
            exit_status: status,
            exited_at: Some(timestamp(at)).into(),
            ..Default::default()
        };
        self.events.publish(topics::TASK_EXIT_EVENT_TOPIC, &event);
    }

    /// The pid that clients are told.
    pub(crate) fn start(self: &Arc<Self>, id: &str, name: &str) -> Result<u32, Refusal> {
        let task = self.task(id)?;
        let _work = lock(&task.work);
        if !name.is_empty() {
            self.start_further(&task, name)?;
            return Ok(task.pid());
        }
        task.first.status().allow(Wish::Start)?;
        if task.is_virtual() {
            self.started(&task);
            if let Some(sandbox) = &*lock(&self.sandbox) {
                // Its containers may come late, or never.
                sandbox.keep_timeline();
            }
            return Ok(task.pid());
        }
        let started = self.start_first(&task);
        if let Err(error) = &started {
            // Clients delete only what has ended.
            self.end(&task, failed_status(error), SystemTime::now());
        }
        started.map(|()| task.pid())
    }

    fn start_first(self: &Arc<Self>, task: &Arc<Task>) -> Result<(), Refusal> {
        let container = match task.container() {
            Some(container) => container,
            None => self.make(task)?,
        };
        let _order = lock(&task.order);
        // It may have been killed while it was made.
        if let Err(error) = task.first.status().allow(Wish::Start) {
            container.kill().ok();
            return Err(error);
        }
        container.start()?;
        self.started(task);
        self.tell_of_steps(task);
        Ok(())
    }

    /// Where the time went, in one line.
    fn tell_of_steps(&self, task: &Task) {
        let Some(sandbox) = lock(&self.sandbox).clone() else {
            return;
        };
        let own = |step: &Step| step.container == task.id;
        let first = |step: &Step| step.container.is_empty() && !self.is_told.load(Ordering::SeqCst);
        let steps = sandbox.timeline().steps.into_iter();
        let steps: Vec<_> = steps.filter(|s| own(s) || first(s)).collect();
        self.is_told.store(true, Ordering::SeqCst);
        if steps.is_empty() {
            return;
        }
        let steps: Vec<_> = steps.iter().map(Step::to_string).collect();
        log::info!("the start of {}: {}", task.id, steps.join(", "));
    }

    fn started(&self, task: &Task) {
        task.first.set_status(Status::Running);
        let event = TaskStart {
            container_id: task.id.clone(),
            pid: task.pid(),
            ..Default::default()
        };
        self.events.publish(topics::TASK_START_EVENT_TOPIC, &event);
    }

    /// The pid that the process had, and how it ended.
    pub(crate) fn delete(self: &Arc<Self>, id: &str, name: &str) -> Result<(u32, Exit), Refusal> {
        let task = self.task(id)?;
        let _work = self.lock_to_delete(&task);
        let proc = task.proc(name)?;
        proc.status().allow(Wish::Delete)?;
        if !name.is_empty() {
            lock(&task.further).remove(name);
            return Ok((task.pid(), proc.exit().unwrap_or(never_started())));
        }
        if proc.status() == Status::Created
            && let Some(container) = task.container()
        {
            container.kill().ok();
            let started = Instant::now();
            while proc.exit().is_none() && started.elapsed() < KILL_LIMIT {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        let exit = proc.exit().unwrap_or(never_started());
        // Whoever still waits for one that never ran.
        proc.ended(exit.status, exit.at);
        self.undo(&task);
        let event = TaskDelete {
            container_id: task.id.clone(),
            pid: task.pid(),
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        };
        self.events.publish(topics::TASK_DELETE_EVENT_TOPIC, &event);
        Ok((task.pid(), exit))
    }

    /// What is asked of the guest meanwhile ends first, by itself or with the guest.
    fn lock_to_delete<'a>(&self, task: &'a Task) -> MutexGuard<'a, ()> {
        let started = Instant::now();
        while started.elapsed() < self.held_limit(task) {
            match task.work.try_lock() {
                Ok(work) => return work,
                Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
        let has_ended = task.first.status() == Status::Stopped && task.container().is_some();
        if has_ended && let Some(sandbox) = lock(&self.sandbox).clone() {
            log::error!(
                "the virtual machine is ended: it holds a request about {}, which has ended",
                task.id
            );
            sandbox.kill();
        }
        lock(&task.work)
    }

    fn held_limit(&self, task: &Task) -> Duration {
        let tasks = lock(&self.tasks);
        let mut others = tasks
            .values()
            .filter(|o| o.id != task.id && !o.is_virtual());
        match others.any(|other| other.first.status() != Status::Stopped) {
            true => HELD_BESIDE_OTHERS,
            false => HELD_LIMIT,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        lock(&self.tasks).is_empty()
    }

    /// Ends the shim if it has no container.
    pub(crate) fn shutdown(&self) {
        if self.is_empty() {
            lock(&self.end).send(()).ok();
        }
    }

    /// Takes the virtual machine down on a thread of its own: nothing waits for it.
    pub(crate) fn stop_behind(&self) {
        let sandbox = lock(&self.sandbox).clone();
        if let Some(sandbox) = sandbox
            && !self.is_stopping.swap(true, Ordering::SeqCst)
        {
            spawn("koya-stop", move || drop(sandbox.stop())).ok();
        }
    }

    /// Takes it down at once.
    pub(crate) fn stop(&self) {
        self.is_stopping.store(true, Ordering::SeqCst);
        if let Some(sandbox) = &*lock(&self.sandbox) {
            sandbox.kill();
        }
    }

    /// The last things before the shim's end.
    pub(crate) fn finish(&self) {
        self.stop_behind();
        let started = Instant::now();
        while started.elapsed() < STOP_LIMIT {
            let sandbox = lock(&self.sandbox);
            if sandbox
                .as_ref()
                .is_none_or(|sandbox| sandbox.machine().ended().is_some())
            {
                break;
            }
            drop(sandbox);
            std::thread::sleep(Duration::from_millis(2));
        }
        self.stop();
        for task in lock(&self.tasks).values() {
            if task.is_mounted.swap(false, Ordering::SeqCst) {
                mounts::unmount_all(&task.rootfs);
            }
        }
        self.events.finish(END_LIMIT);
    }
}

/// The status of a process that could not be started: a shell's, where it is the program's fault.
pub(crate) fn failed_status(error: &Refusal) -> u32 {
    match error {
        Refusal::Failed(error) => match error.downcast_ref() {
            Some(koya::Error::NotExecutable { status, .. }) => *status as u32,
            _ => LOST,
        },
        _ => LOST,
    }
}

fn never_started() -> Exit {
    Exit {
        status: 128 + SIGKILL,
        at: SystemTime::now(),
    }
}
