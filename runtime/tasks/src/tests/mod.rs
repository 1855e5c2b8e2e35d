//! A task set with a mock guest.

mod hooks;
mod life;
mod stop;
mod terminate;

use crate::Error;
use crate::create::CreateTask;
use crate::event::{Event, EventSink};
use crate::exec::ExecTask;
use crate::machine::{GuestContainer, GuestProcess, Streams, VirtualMachine};
use crate::set::{TaskSet, TaskSetConfig, Timeouts};
use crate::spec::Spec;
use crate::stdio::StdioConfig;
use crate::sync::spawn;
use koya::oci_spec::runtime as oci;
use koya::vmm::ExitReason;
use koya::{Bundle, ContainerStats, ExecOptions, ProcessStreams, Settings, Size, Step};
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// Longer than any operation here takes on a loaded host.
const LIMIT: Duration = Duration::from_secs(20);

const TIMEOUTS: Timeouts = Timeouts {
    held: Duration::from_millis(300),
    held_beside_others: Duration::from_secs(60),
    execs: Duration::from_millis(300),
    kill: Duration::from_millis(300),
    start: Duration::from_millis(300),
    stop: Duration::from_secs(60),
};

/// A mock guest, and the state behind its handles.
#[derive(Default)]
struct Guest {
    state: Mutex<GuestState>,
    changed: Condvar,
}

#[derive(Default)]
struct GuestState {
    /// Calls in order: `start c`, `kill c`, ...
    calls: Vec<String>,
    /// Calls that do not return until they are removed from here, or the machine has ended.
    held: HashSet<&'static str>,
    /// Calls that fail.
    broken: HashSet<&'static str>,
    /// Processes that have ended: `c`, `c/e`.
    statuses: HashMap<String, i32>,
    ended: Option<ExitReason>,
    ignores_kills: bool,
    oom_kills: u64,
    size: Size,
}

fn ended() -> koya::Error {
    koya::Error::Ended {
        reason: ExitReason::Stopped,
        last_words: String::new(),
    }
}

impl Guest {
    fn lock(&self) -> MutexGuard<'_, GuestState> {
        self.state.lock().unwrap()
    }

    fn change(&self, change: impl FnOnce(&mut GuestState)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    fn hold(&self, call: &'static str) {
        self.change(|state| {
            state.held.insert(call);
        });
    }

    fn set_broken(&self, call: &'static str, is_broken: bool) {
        self.change(|state| match is_broken {
            true => _ = state.broken.insert(call),
            false => _ = state.broken.remove(call),
        });
    }

    fn release(&self, call: &'static str) {
        self.change(|state| {
            state.held.remove(call);
        });
    }

    fn ends(&self, process: &str, status: i32) {
        self.change(|state| {
            state.statuses.insert(process.into(), status);
        });
    }

    fn call(&self, call: &str) -> Result<(), koya::Error> {
        self.change(|state| state.calls.push(call.into()));
        let mut state = self.lock();
        while state.held.contains(call) && state.ended.is_none() {
            state = self.changed.wait(state).unwrap();
        }
        if state.ended.is_some() {
            return Err(ended());
        }
        match state.broken.contains(call) {
            true => Err(koya::Error::Agent {
                kind: koya::ErrorKind::Guest,
                operation: "do it",
                reason: "it is broken".into(),
            }),
            false => Ok(()),
        }
    }

    /// Waits until a call was made.
    fn await_call(&self, call: &str) {
        let state = self.lock();
        let missing = |state: &mut GuestState| !state.calls.iter().any(|made| made == call);
        let (_state, waited) = self
            .changed
            .wait_timeout_while(state, LIMIT, missing)
            .unwrap();
        assert!(!waited.timed_out(), "no {call}");
    }

    fn was_called(&self, call: &str) -> bool {
        self.lock().calls.iter().any(|made| made == call)
    }
}

struct FakeMachine(Arc<Guest>);

struct FakeProcess(Arc<Guest>, String);

impl FakeProcess {
    fn ask(&self, what: &str) -> Result<(), koya::Error> {
        self.0.call(&format!("{what} {}", self.1))
    }
}

impl VirtualMachine for FakeMachine {
    fn create(
        &self,
        id: &str,
        _: &Bundle,
        _: &ProcessStreams,
    ) -> Result<(Arc<dyn GuestContainer>, Streams), koya::Error> {
        let container = FakeProcess(self.0.clone(), id.into());
        container.ask("create")?;
        Ok((Arc::new(container), Streams::default()))
    }

    fn has_interfaces(&self) -> anyhow::Result<bool> {
        Ok(true)
    }

    fn ended(&self) -> Option<ExitReason> {
        self.0.lock().ended.clone()
    }

    fn wait_ended(&self) -> ExitReason {
        let lives = |state: &mut GuestState| state.ended.is_none();
        let state = self.0.changed.wait_while(self.0.lock(), lives).unwrap();
        state.ended.clone().unwrap()
    }

    fn next_oom(&self) -> Result<(String, u64), koya::Error> {
        self.wait_ended();
        Err(ended())
    }

    fn steps(&self) -> Vec<Step> {
        Vec::new()
    }

    fn keep_timeline(&self) {}

    fn size(&self) -> Result<Size, koya::Error> {
        self.0.call("size")?;
        Ok(self.0.lock().size)
    }

    fn max_size(&self) -> Size {
        Size {
            cpus: Some(4),
            memory_mib: Some(4096),
        }
    }

    fn granted_mib(&self) -> u64 {
        0
    }

    fn kernel_mib(&self) -> u64 {
        0
    }

    fn update(&self, size: Size) -> Result<Size, koya::Error> {
        self.0.call("resize")?;
        self.0.change(|state| state.size = size);
        Ok(size)
    }

    fn stop(&self) {
        if self.0.call("stop").is_ok() {
            self.kill();
        }
    }

    fn kill(&self) {
        self.0.change(|state| {
            state.calls.push("kill machine".into());
            state.ended.get_or_insert(ExitReason::Stopped);
        });
    }
}

impl GuestProcess for FakeProcess {
    fn wait(&self) -> Result<i32, koya::Error> {
        let Self(guest, name) = self;
        let runs =
            |state: &mut GuestState| state.ended.is_none() && !state.statuses.contains_key(name);
        let state = guest.changed.wait_while(guest.lock(), runs).unwrap();
        state.statuses.get(name).copied().ok_or_else(ended)
    }

    fn signal(&self, signal: i32) -> Result<(), koya::Error> {
        self.ask(&format!("signal {signal}"))
    }

    fn resize(&self, _: u16, _: u16) -> Result<(), koya::Error> {
        self.ask("resize")
    }
}

impl GuestContainer for FakeProcess {
    fn start(&self) -> Result<(), koya::Error> {
        self.ask("start")
    }

    fn kill(&self, _: bool) -> Result<(), koya::Error> {
        self.ask("kill")?;
        if !self.0.lock().ignores_kills {
            self.0.ends(&self.1, 137);
        }
        Ok(())
    }

    fn signal_all(&self, signal: i32) -> Result<(), koya::Error> {
        self.ask(&format!("signal {signal} all"))
    }

    fn pause(&self) -> Result<(), koya::Error> {
        self.ask("pause")
    }

    fn resume(&self) -> Result<(), koya::Error> {
        self.ask("resume")
    }

    fn update(&self, _: &oci::LinuxResources) -> Result<(), koya::Error> {
        self.ask("update")
    }

    fn stats(&self) -> Result<ContainerStats, koya::Error> {
        let mut stats = ContainerStats::default();
        let kills = self.0.lock().oom_kills;
        stats.memory_events.insert("oom_kill".into(), kills);
        Ok(stats)
    }

    fn exec(
        &self,
        name: &str,
        _: &oci::Process,
        _: &ExecOptions,
    ) -> Result<(Arc<dyn GuestProcess>, Streams), koya::Error> {
        let process = Self(self.0.clone(), format!("{}/{name}", self.1));
        process.ask("exec")?;
        Ok((Arc::new(process), Streams::default()))
    }

    fn remove(&self) -> Result<(), koya::Error> {
        self.ask("remove")
    }
}

/// Records events as text: `start c`, `exit c/e 3`, ...
#[derive(Default)]
struct Recorder {
    events: Mutex<Vec<String>>,
    changed: Condvar,
    /// Events whose delivery is delayed.
    slow: Mutex<Vec<String>>,
}

impl EventSink for Recorder {
    fn send(&self, event: Event) {
        let name = |id: String, exec_id: String| match exec_id.is_empty() {
            true => id,
            false => format!("{id}/{exec_id}"),
        };
        let text = match event {
            Event::Created { id, .. } => format!("create {id}"),
            Event::Started { id, .. } => format!("start {id}"),
            Event::Exited {
                id, exec_id, exit, ..
            } => format!("exit {} {}", name(id, exec_id), exit.status),
            Event::Deleted { id, .. } => format!("delete {id}"),
            Event::OutOfMemory { id } => format!("oom {id}"),
            Event::Paused { id } => format!("pause {id}"),
            Event::Resumed { id } => format!("resume {id}"),
            Event::ExecAdded { id, exec_id } => format!("add {}", name(id, exec_id)),
            Event::ExecStarted { id, exec_id, .. } => format!("start {}", name(id, exec_id)),
        };
        if self.slow.lock().unwrap().contains(&text) {
            std::thread::sleep(Duration::from_millis(200));
        }
        self.events.lock().unwrap().push(text);
        self.changed.notify_all();
    }
}

/// A task set, its guest, and the published events.
struct Rig {
    set: Arc<TaskSet>,
    guest: Arc<Guest>,
    events: Arc<Recorder>,
    dir: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let (guest, events) = (Arc::new(Guest::default()), Arc::<Recorder>::default());
        let of_boot = guest.clone();
        let boot = move |_: &_, _: &_| {
            of_boot.call("boot")?;
            Ok(Arc::new(FakeMachine(of_boot.clone())) as Arc<dyn VirtualMachine>)
        };
        let config = TaskSetConfig::default();
        Self {
            set: TaskSet::with(config, events.clone(), Box::new(boot), TIMEOUTS),
            guest,
            events,
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn request(&self, id: &str, namespace: &Value, annotations: &Value) -> CreateTask {
        let bundle = self.dir.path().join(id);
        std::fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let config = json!({
            "ociVersion": "1.0.2", "root": {"path": "rootfs"}, "annotations": annotations,
            "process": {"cwd": "/", "user": {"uid": 0, "gid": 0}, "args": ["sh"]},
            "linux": {"namespaces": [namespace, {"type": "mount"}]},
        });
        std::fs::write(bundle.join("config.json"), config.to_string()).unwrap();
        CreateTask {
            id: id.into(),
            spec: Spec::read(&bundle).unwrap(),
            bundle,
            mounts: Vec::new(),
            stdio: StdioConfig::default(),
            notify: None,
            joins: None,
            settings: Settings::default(),
        }
    }

    /// Creates a container in the guest at once, since its network exists.
    fn create(&self, id: &str) -> Result<u32, Error> {
        let network = json!({"type": "network", "path": "/proc/self/ns/net"});
        self.set.create(self.request(id, &network, &json!({})))
    }

    /// The same on a separate thread.
    fn create_behind(&self, id: &str) -> Receiver<Result<u32, Error>> {
        let network = json!({"type": "network", "path": "/proc/self/ns/net"});
        let request = self.request(id, &network, &json!({}));
        self.behind(move |set| set.create(request))
    }

    /// Creates a container that is created in the guest at its start.
    fn create_late(&self, id: &str) -> Result<u32, Error> {
        let network = json!({"type": "network"});
        self.set.create(self.request(id, &network, &json!({})))
    }

    /// Creates the pod sandbox container (`pod`), or another container of the pod.
    fn create_in_pod(&self, id: &str) -> Result<u32, Error> {
        let network = json!({"type": "network", "path": "/proc/self/ns/net"});
        let kind = if id == "pod" { "sandbox" } else { "container" };
        let annotations = json!({
            "io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": "pod",
        });
        self.set.create(self.request(id, &network, &annotations))
    }

    fn exec(&self, id: &str, exec_id: &str) -> Result<(), Error> {
        self.set.exec(ExecTask {
            id: id.into(),
            exec_id: exec_id.into(),
            process: oci::Process::default(),
            stdio: StdioConfig::default(),
            cgroup: None,
        })
    }

    fn events(&self) -> Vec<String> {
        self.events.events.lock().unwrap().clone()
    }

    /// Waits until an event was published.
    fn await_event(&self, event: &str) {
        let events = self.events.events.lock().unwrap();
        let missing = |events: &mut Vec<String>| !events.iter().any(|sent| sent == event);
        let (events, waited) = self
            .events
            .changed
            .wait_timeout_while(events, LIMIT, missing)
            .unwrap();
        assert!(!waited.timed_out(), "no {event:?} in {events:?}");
    }

    /// Runs `work` on a separate thread.
    fn behind<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<TaskSet>) -> T + Send + 'static,
    ) -> Receiver<T> {
        let (sender, receiver) = channel();
        let set = self.set.clone();
        spawn("koya-test", move || drop(sender.send(work(&set)))).unwrap();
        receiver
    }
}
