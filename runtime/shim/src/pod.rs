//! The sandbox of one shim, and the containers in it.

use crate::cgroup;
use crate::events::{Events, timestamp};
use crate::flags::Flags;
use crate::io::Paths;
use crate::mounts;
use crate::options::Settings;
use crate::task::{Exit, Handle, Proc, Refusal, Status, Wish, lock};
use anyhow::{Context, Result, anyhow, bail};
use containerd_shim_protos::api::{CreateTaskRequest, ExecProcessRequest};
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::topics;
use koya::oci_spec::runtime::{self as oci, LinuxNamespaceType};
use koya::{Bundle, Container, ContainerStats, HostEnd, NetworkConfig, Sandbox};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

/// How long processes that were added to a container may take to be reported before its first one.
const FURTHER_FIRST: Duration = Duration::from_secs(2);
/// How long the virtual machine and the events may take when the shim ends.
const END_LIMIT: Duration = Duration::from_secs(2);
/// How long a guest may take to write out what it has not written yet, when the shim ends.
const STOP_LIMIT: Duration = Duration::from_secs(11);
/// How long a container that is deleted before it was started may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// The status of a process whose virtual machine ended.
const LOST: u32 = 255;

const SIGINT: u32 = 2;
const SIGKILL: u32 = 9;
const SIGTERM: u32 = 15;
/// The last real-time signal.
const LAST_SIGNAL: u32 = 64;

pub(crate) const HOST_NETWORK: &str = "the host's network can't be a virtual machine's: give the \
                                       container a network namespace of its own";

/// What a container is to its sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Its only one.
    Single,
    /// A pod's own, of which nothing runs: the sandbox is the virtual machine.
    Sandbox,
    /// One of a pod's.
    Member { sandbox: String },
}

/// A sandbox's network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Network {
    Host,
    New,
    Path(PathBuf),
}

/// A container's `config.json`.
pub(crate) struct Spec(oci::Spec);

impl Spec {
    pub(crate) fn read(bundle: &Path) -> Result<Self> {
        let path = bundle.join("config.json");
        let text =
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let spec = serde_json::from_slice(&text);
        Ok(Self(spec.with_context(|| path.display().to_string())?))
    }

    fn annotation(&self, names: &[&str]) -> Option<&str> {
        let annotations = self.0.annotations().as_ref()?;
        names
            .iter()
            .find_map(|name| annotations.get(*name))
            .map(String::as_str)
    }

    /// By the annotations of containerd's and CRI-O's Kubernetes interface.
    pub(crate) fn role(&self, id: &str) -> Role {
        let kind = [
            "io.kubernetes.cri.container-type",
            "io.kubernetes.cri-o.ContainerType",
        ];
        let sandbox = [
            "io.kubernetes.cri.sandbox-id",
            "io.kubernetes.cri-o.SandboxID",
        ];
        match (self.annotation(&kind), self.annotation(&sandbox)) {
            (Some("sandbox"), _) => Role::Sandbox,
            (Some("container"), Some(sandbox)) if sandbox != id => Role::Member {
                sandbox: sandbox.into(),
            },
            _ => Role::Single,
        }
    }

    pub(crate) fn network(&self) -> Network {
        let namespaces = self
            .0
            .linux()
            .as_ref()
            .and_then(|linux| linux.namespaces().as_ref());
        let mut namespaces = namespaces.into_iter().flatten();
        let network = namespaces.find(|n| n.typ() == LinuxNamespaceType::Network);
        match network.map(|network| network.path()) {
            None => Network::Host,
            Some(None) => Network::New,
            Some(Some(path)) if path.as_os_str().is_empty() => Network::New,
            Some(Some(path)) => Network::Path(path.clone()),
        }
    }

    /// Bytes of memory that it may have: a pod's as Kubernetes says it, else the container's.
    fn memory(&self) -> Option<u64> {
        let pod = self.annotation(&["io.kubernetes.cri.sandbox-memory"]);
        let pod = pod.and_then(|text| text.parse().ok());
        let own = || {
            self.resources()?
                .memory()
                .as_ref()?
                .limit()
                .map(|limit| limit.max(0) as u64)
        };
        pod.or_else(own).filter(|bytes| *bytes > 0)
    }

    fn sysctls(&self) -> BTreeMap<String, String> {
        let sysctls = self
            .0
            .linux()
            .as_ref()
            .and_then(|linux| linux.sysctl().as_ref());
        sysctls
            .into_iter()
            .flatten()
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect()
    }

    /// Whole CPUs that it may use.
    fn cpus(&self) -> Option<u32> {
        let number = |name: &str| self.annotation(&[name])?.parse::<i64>().ok();
        let cpu = self
            .resources()
            .and_then(|resources| resources.cpu().as_ref());
        let quota = number("io.kubernetes.cri.sandbox-cpu-quota")
            .or_else(|| cpu.and_then(|cpu| cpu.quota()))?;
        let period = number("io.kubernetes.cri.sandbox-cpu-period")
            .or_else(|| cpu.and_then(|cpu| Some(cpu.period()? as i64)))
            .unwrap_or(100_000);
        if quota <= 0 || period <= 0 {
            return None;
        }
        u32::try_from((quota as u64).div_ceil(period as u64)).ok()
    }

    /// The sandbox's control group on the host.
    pub(crate) fn cgroup(&self) -> Option<PathBuf> {
        let path = self.0.linux().as_ref()?.cgroups_path().as_ref()?;
        cgroup::folder(path)
    }

    fn resources(&self) -> Option<&oci::LinuxResources> {
        self.0.linux().as_ref()?.resources().as_ref()
    }
}

/// A container of the sandbox.
pub(crate) struct Task {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    spec: Spec,
    settings: Settings,
    pub(crate) first: Proc,
    further: Mutex<HashMap<String, Arc<Further>>>,
    rootfs: PathBuf,
    is_mounted: AtomicBool,
    /// One request that changes it at a time.
    work: Mutex<()>,
    /// Its start is told before its end.
    order: Mutex<()>,
}

/// A process that was added to a container.
pub(crate) struct Further {
    pub(crate) proc: Proc,
    process: oci::Process,
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

    fn is_virtual(&self) -> bool {
        self.spec.role(&self.id) == Role::Sandbox
    }

    fn container(&self) -> Option<Arc<Container>> {
        match self.first.handle() {
            Some(Handle::First(container)) => Some(container),
            _ => None,
        }
    }

    fn running(&self) -> Result<Arc<Container>, Refusal> {
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
    namespace: String,
    debug: bool,
    events: Events,
    /// Why its namespaces could not be entered.
    unready: Option<String>,
    end: Mutex<Sender<()>>,
    tasks: Mutex<HashMap<String, Arc<Task>>>,
    sandbox: Mutex<Option<Arc<Sandbox>>>,
    is_stopping: AtomicBool,
}

/// The process that containerd is told for all of them: there are no others on the host.
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
            sandbox: Mutex::default(),
            is_stopping: AtomicBool::new(false),
        }
    }

    pub(crate) fn task(&self, id: &str) -> Result<Arc<Task>, Refusal> {
        let task = lock(&self.tasks).get(id).cloned();
        task.ok_or_else(|| Refusal::NotFound(format!("container {id}")))
    }

    pub(crate) fn create(self: &Arc<Self>, request: &CreateTaskRequest) -> Result<(), Refusal> {
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
        let task = Arc::new(Task {
            id: id.clone(),
            settings: Settings::load(request.options.as_ref())?,
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
            pid: pid(),
            ..Default::default()
        };
        self.events.publish(topics::TASK_CREATE_EVENT_TOPIC, &event);
        Ok(())
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
            let (pod, task) = (self.clone(), task.clone());
            spawn("koya-pod", move || {
                let reason = sandbox.machine().wait_ended();
                let status = match pod.is_stopping.load(Ordering::SeqCst) {
                    true => 128 + SIGKILL,
                    false => {
                        log::error!("the pod's virtual machine ended: {reason}");
                        LOST
                    }
                };
                pod.end(&task, status, SystemTime::now());
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
    fn undo(&self, task: &Task) {
        if let Some(container) = task.container() {
            container.remove().ok();
        }
        // What is shared holds the mount.
        if task.is_mounted.swap(false, Ordering::SeqCst) {
            mounts::unmount_all(&task.rootfs);
        }
        let mut tasks = lock(&self.tasks);
        tasks.remove(&task.id);
        if tasks.is_empty() {
            drop(tasks);
            self.stop_behind();
        }
    }

    /// The virtual machine, started if it is not there.
    fn boot(&self, task: &Task) -> Result<Arc<Sandbox>, Refusal> {
        let mut sandbox = lock(&self.sandbox);
        if let Some(sandbox) = &*sandbox {
            return match sandbox.machine().ended() {
                None => Ok(sandbox.clone()),
                Some(reason) => Err(anyhow!("the sandbox has ended: {reason}").into()),
            };
        }
        let mut config = task.settings.sandbox(task.spec.memory(), task.spec.cpus());
        if task.is_virtual() {
            // Its containers have the guest's own namespaces, which nothing else sets up.
            config.hostname = task.spec.0.hostname().clone();
            config.sysctls = task.spec.sysctls();
        }
        config.networks = interfaces()?
            .into_iter()
            .map(|interface| NetworkConfig {
                name: interface.clone(),
                ..NetworkConfig::new(HostEnd::Join { interface })
            })
            .collect();
        let started = Arc::new(Sandbox::start(&config)?);
        log::info!(
            "the virtual machine's agent was ready after {:.2?}",
            started.ready_after()
        );
        if self.debug {
            started.follow_console(ConsoleLog::default());
        }
        if let Some((folder, resources)) = task.spec.cgroup().zip(task.spec.resources()) {
            match started.machine().memory_usage() {
                Ok(usage) => cgroup::apply(&folder, &cgroup::limits(resources, usage.size >> 20)),
                Err(error) => log::warn!("the size of the guest is not known: {error}"),
            }
        }
        *sandbox = Some(started.clone());
        Ok(started)
    }

    /// Makes the container in the guest; its first process waits to be started.
    fn make(self: &Arc<Self>, task: &Arc<Task>) -> Result<Arc<Container>, Refusal> {
        let sandbox = self.boot(task)?;
        let bundle = Bundle {
            spec: task.spec.0.clone(),
            folder: task.bundle.clone(),
            rootfs: task.rootfs.clone(),
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
        spawn("koya-wait", move || pod.follow(&followed))?;
        Ok(container)
    }

    /// Waits for a container's first process, and tells of its end.
    fn follow(&self, task: &Arc<Task>) {
        let Some(container) = task.container() else {
            return;
        };
        let status = self.status_of(container.wait());
        let at = SystemTime::now();
        if let Some(pumps) = task.first.pumps() {
            pumps.finish();
        }
        // Those that were added end with it, and are told first.
        let started = Instant::now();
        let runs = |further: &Arc<Further>| further.proc.status() == Status::Running;
        while started.elapsed() < FURTHER_FIRST && lock(&task.further).values().any(runs) {
            std::thread::sleep(Duration::from_millis(2));
        }
        self.end(task, status, at);
    }

    fn status_of(&self, waited: Result<i32, koya::Error>) -> u32 {
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

    fn end(&self, task: &Task, status: u32, at: SystemTime) {
        let _order = lock(&task.order);
        if !task.first.ended(status, at) {
            return;
        }
        self.publish_exit(task, &task.id, status, at);
        let role = task.spec.role(&task.id);
        if !matches!(role, Role::Member { .. }) {
            self.stop_behind();
        }
    }

    fn publish_exit(&self, task: &Task, name: &str, status: u32, at: SystemTime) {
        let event = TaskExit {
            container_id: task.id.clone(),
            id: name.into(),
            pid: pid(),
            exit_status: status,
            exited_at: Some(timestamp(at)).into(),
            ..Default::default()
        };
        self.events.publish(topics::TASK_EXIT_EVENT_TOPIC, &event);
    }

    pub(crate) fn start(self: &Arc<Self>, id: &str, name: &str) -> Result<(), Refusal> {
        let task = self.task(id)?;
        let _work = lock(&task.work);
        if !name.is_empty() {
            return self.start_further(&task, name);
        }
        task.first.status().allow(Wish::Start)?;
        if task.is_virtual() {
            self.started(&task);
            return Ok(());
        }
        let started = self.start_first(&task);
        if let Err(error) = &started {
            // Clients delete only what has ended.
            self.end(&task, failed_status(error), SystemTime::now());
        }
        started
    }

    fn start_first(self: &Arc<Self>, task: &Arc<Task>) -> Result<(), Refusal> {
        let container = match task.container() {
            Some(container) => container,
            None => self.make(task)?,
        };
        let _order = lock(&task.order);
        // It may have been killed while it was made.
        if let Err(error) = task.first.status().allow(Wish::Start) {
            container.process().signal(SIGKILL as i32).ok();
            return Err(error);
        }
        container.start()?;
        self.started(task);
        Ok(())
    }

    fn started(&self, task: &Task) {
        task.first.set_status(Status::Running);
        let event = TaskStart {
            container_id: task.id.clone(),
            pid: pid(),
            ..Default::default()
        };
        self.events.publish(topics::TASK_START_EVENT_TOPIC, &event);
    }

    pub(crate) fn exec(&self, request: &ExecProcessRequest) -> Result<(), Refusal> {
        let task = self.task(&request.id)?;
        task.first.status().allow(Wish::Use)?;
        let spec = request
            .spec
            .as_ref()
            .context("the request has no process")?;
        let process: oci::Process =
            serde_json::from_slice(&spec.value).context("the process is broken")?;
        let further = Further {
            proc: Proc::new(Paths {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
            }),
            process,
        };
        let name = request.exec_id.clone();
        {
            let mut all = lock(&task.further);
            if name.is_empty() || name == task.id || all.contains_key(&name) {
                return Err(Refusal::Exists(format!("process {name:?}")));
            }
            all.insert(name.clone(), Arc::new(further));
        }
        let event = TaskExecAdded {
            container_id: task.id.clone(),
            exec_id: name,
            ..Default::default()
        };
        self.events
            .publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        Ok(())
    }

    fn start_further(self: &Arc<Self>, task: &Arc<Task>, name: &str) -> Result<(), Refusal> {
        let ProcOf::Further(further) = task.proc(name)? else {
            return Ok(());
        };
        further.proc.status().allow(Wish::Start)?;
        // In one that is paused it would never come to its start.
        task.first.status().allow(Wish::Use)?;
        let launched = self.launch(task, name, &further);
        let (process, pumps) = match launched {
            Ok(launched) => launched,
            Err(error) => {
                // Who waits for it already hears of it.
                further.proc.ended(failed_status(&error), SystemTime::now());
                return Err(error);
            }
        };
        further
            .proc
            .made(Handle::Further(process.clone()), pumps.clone());
        if let Err(error) = further.proc.status().allow(Wish::Start) {
            // It was killed while it was made.
            process.signal(SIGKILL as i32).ok();
            spawn("koya-wait", move || drop(process.wait()))?;
            return Err(error);
        }
        further.proc.set_status(Status::Running);
        let event = TaskExecStarted {
            container_id: task.id.clone(),
            exec_id: name.into(),
            pid: pid(),
            ..Default::default()
        };
        self.events
            .publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
        let (pod, task, name) = (self.clone(), task.clone(), name.to_owned());
        spawn("koya-wait", move || {
            let status = pod.status_of(process.wait());
            let at = SystemTime::now();
            pumps.finish();
            if further.proc.ended(status, at) {
                pod.publish_exit(&task, &name, status, at);
            }
        })?;
        Ok(())
    }

    fn launch(
        &self,
        task: &Task,
        name: &str,
        further: &Further,
    ) -> Result<(Arc<koya::Process>, Arc<crate::io::Pumps>), Refusal> {
        let container = task.running()?;
        let paths = &further.proc.paths;
        let io = paths.open(name, &self.namespace)?;
        let mut process = further.process.clone();
        process.set_terminal(Some(paths.terminal));
        let mut process = container.exec_oci(name, &process, paths.stdio())?;
        let pumps = io.connect(&mut process)?;
        Ok((Arc::new(process), Arc::new(pumps)))
    }

    pub(crate) fn kill(&self, id: &str, name: &str, signal: u32, all: bool) -> Result<(), Refusal> {
        let task = self.task(id)?;
        let proc = task.proc(name)?;
        proc.status().allow(Wish::Kill)?;
        if signal > LAST_SIGNAL {
            return Err(anyhow!("there is no signal {signal}").into());
        }
        let Some(handle) = proc.handle() else {
            // Nothing of it is in the guest: a pod's own container, or one that was never started.
            if ![SIGINT, SIGKILL, SIGTERM].contains(&signal) {
                return Ok(());
            }
            let at = SystemTime::now();
            match proc {
                ProcOf::First(_) => self.end(&task, 128 + signal, at),
                ProcOf::Further(further) => drop(further.proc.ended(128 + signal, at)),
            }
            return Ok(());
        };
        let sent = match (all && name.is_empty(), &handle) {
            (true, Handle::First(container)) => container.signal_all(signal as i32),
            _ => handle.process().signal(signal as i32),
        };
        match sent {
            Ok(()) => Ok(()),
            Err(error) if error.to_string().contains("process not found") => {
                Err(Refusal::Finished("process already finished"))
            }
            // A guest that does not answer is ended with its last container.
            Err(error) if signal == SIGKILL && name.is_empty() && self.is_last(&task) => {
                log::error!("the guest does not answer, so it is ended: {error}");
                self.is_stopping.store(true, Ordering::SeqCst);
                if let Some(sandbox) = &*lock(&self.sandbox) {
                    sandbox.kill();
                }
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn is_last(&self, task: &Task) -> bool {
        lock(&self.tasks)
            .values()
            .filter(|other| other.id != task.id && !other.is_virtual())
            .all(|other| other.first.status() == Status::Stopped)
    }

    pub(crate) fn delete(&self, id: &str, name: &str) -> Result<Exit, Refusal> {
        let task = self.task(id)?;
        let _work = lock(&task.work);
        let proc = task.proc(name)?;
        proc.status().allow(Wish::Delete)?;
        if !name.is_empty() {
            lock(&task.further).remove(name);
            return Ok(proc.exit().unwrap_or(never_started()));
        }
        if proc.status() == Status::Created
            && let Some(handle) = proc.handle()
        {
            handle.process().signal(SIGKILL as i32).ok();
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
            pid: pid(),
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        };
        self.events.publish(topics::TASK_DELETE_EVENT_TOPIC, &event);
        Ok(exit)
    }

    pub(crate) fn pause(&self, id: &str) -> Result<(), Refusal> {
        let task = self.task(id)?;
        let _work = lock(&task.work);
        task.first.status().allow(Wish::Pause)?;
        task.running()?.pause()?;
        task.first.set_status(Status::Paused);
        let event = TaskPaused {
            container_id: task.id.clone(),
            ..Default::default()
        };
        self.events.publish(topics::TASK_PAUSED_EVENT_TOPIC, &event);
        Ok(())
    }

    pub(crate) fn resume(&self, id: &str) -> Result<(), Refusal> {
        let task = self.task(id)?;
        let _work = lock(&task.work);
        task.first.status().allow(Wish::Resume)?;
        task.running()?.resume()?;
        task.first.set_status(Status::Running);
        let event = TaskResumed {
            container_id: task.id.clone(),
            ..Default::default()
        };
        self.events
            .publish(topics::TASK_RESUMED_EVENT_TOPIC, &event);
        Ok(())
    }

    pub(crate) fn update(&self, id: &str, resources: &[u8]) -> Result<(), Refusal> {
        let task = self.task(id)?;
        let _work = lock(&task.work);
        let resources: oci::LinuxResources =
            serde_json::from_slice(resources).context("the resources are broken")?;
        let sandbox = lock(&self.sandbox).clone();
        let machine = sandbox.context("there is no virtual machine")?;
        let size = machine
            .machine()
            .memory_usage()
            .context("the size of the guest")?
            .size;
        let limit = resources
            .memory()
            .as_ref()
            .and_then(|memory| memory.limit());
        if let Some(limit) = limit.filter(|limit| *limit > 0 && *limit as u64 > size) {
            let text = format!("a memory limit of {limit} bytes is more than the guest's {size}");
            return Err(anyhow!(text).into());
        }
        task.running()?.update(&resources)?;
        // The guest keeps its size, so its own limit stays.
        if let Some(folder) = task.spec.cgroup().filter(|folder| folder.exists()) {
            let limits = cgroup::limits(&resources, size >> 20);
            let cpus: Vec<_> = limits.into_iter().filter(|l| l.0 != "memory.max").collect();
            cgroup::apply(&folder, &cpus);
        }
        Ok(())
    }

    pub(crate) fn stats(&self, id: &str) -> Result<ContainerStats, Refusal> {
        let task = self.task(id)?;
        if task.is_virtual() {
            return Ok(ContainerStats::default());
        }
        Ok(task.running()?.stats()?)
    }

    pub(crate) fn resize(
        &self,
        id: &str,
        name: &str,
        rows: u32,
        columns: u32,
    ) -> Result<(), Refusal> {
        let proc = self.task(id)?.proc(name)?;
        let size = (
            u16::try_from(rows).unwrap_or(0),
            u16::try_from(columns).unwrap_or(0),
        );
        match proc.handle() {
            Some(handle) if proc.paths.terminal => Ok(handle.process().resize(size.0, size.1)?),
            // Clients say sizes of what has no terminal, and of what has just ended.
            _ => Ok(()),
        }
    }

    pub(crate) fn close_stdin(&self, id: &str, name: &str) -> Result<(), Refusal> {
        self.task(id)?.proc(name)?.close_stdin();
        Ok(())
    }

    /// Ends the shim if it has no container.
    pub(crate) fn shutdown(&self) {
        if lock(&self.tasks).is_empty() {
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
fn failed_status(error: &Refusal) -> u32 {
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

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let builder = std::thread::Builder::new().name(name.into());
    builder.spawn(work).context("cannot start a thread")?;
    Ok(())
}

/// The interfaces of this process's network namespace, but for the loopback.
fn interfaces() -> Result<Vec<String>> {
    let text = std::fs::read_to_string("/proc/net/dev").context("cannot read /proc/net/dev")?;
    let names = text.lines().skip(2).filter_map(|line| line.split_once(':'));
    let names: Vec<String> = names.map(|(name, _)| name.trim().to_owned()).collect();
    // What the kernel makes by itself in each namespace carries nothing.
    let own = [
        "lo", "tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0",
        "ip6gre0",
    ];
    let names: Vec<String> = names
        .into_iter()
        .filter(|n| !own.contains(&n.as_str()))
        .collect();
    if names.len() > 8 {
        bail!(
            "{} network interfaces are more than a sandbox takes",
            names.len()
        );
    }
    Ok(names)
}

/// The guest's console, line by line, in the log.
#[derive(Default)]
struct ConsoleLog(Vec<u8>);

impl std::io::Write for ConsoleLog {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        for byte in bytes {
            match byte {
                b'\n' => {
                    let line: String = String::from_utf8_lossy(&self.0)
                        .chars()
                        .filter(|c| !c.is_control())
                        .collect();
                    log::debug!("guest: {line}");
                    self.0.clear();
                }
                _ if self.0.len() < 1024 => self.0.push(*byte),
                _ => {}
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(value: Value) -> Spec {
        let mut all = json!({"ociVersion": "1.0.2", "root": {"path": "rootfs"}});
        all.as_object_mut()
            .unwrap()
            .extend(value.as_object().unwrap().clone());
        Spec(serde_json::from_value(all).unwrap())
    }

    #[test]
    fn annotations_say_what_a_container_is() {
        assert_eq!(spec(json!({})).role("a"), Role::Single);
        let pod = json!({"annotations": {"io.kubernetes.cri.container-type": "sandbox",
            "io.kubernetes.cri.sandbox-id": "a", "io.kubernetes.cri.sandbox-memory": "1048576",
            "io.kubernetes.cri.sandbox-cpu-quota": "150000"}});
        let pod = spec(pod);
        assert_eq!(pod.role("a"), Role::Sandbox);
        assert_eq!((pod.memory(), pod.cpus()), (Some(1 << 20), Some(2)));
        let member = json!({"annotations": {"io.kubernetes.cri-o.ContainerType": "container",
            "io.kubernetes.cri-o.SandboxID": "p"}});
        assert_eq!(
            spec(member).role("a"),
            Role::Member {
                sandbox: "p".into()
            }
        );
    }

    #[test]
    fn limits_and_networks_are_the_configurations() {
        let limited = spec(json!({"linux": {
            "resources": {"memory": {"limit": 4096}, "cpu": {"quota": 250_000, "period": 100_000}},
            "namespaces": [{"type": "network"}]}}));
        assert_eq!((limited.memory(), limited.cpus()), (Some(4096), Some(3)));
        assert_eq!(limited.network(), Network::New);
        assert_eq!(spec(json!({"linux": {}})).network(), Network::Host);
        let path = json!({"linux": {"namespaces": [{"type": "network", "path": "/n"}]}});
        assert_eq!(spec(path).network(), Network::Path("/n".into()));
        let endless = json!({"linux": {"resources": {"memory": {"limit": -1},
            "cpu": {"quota": -1, "period": 100_000}}}});
        assert_eq!(
            (spec(endless.clone()).memory(), spec(endless).cpus()),
            (None, None)
        );
    }
}
