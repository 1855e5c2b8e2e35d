//! Creation of tasks.

use crate::Error;
use crate::event::Event;
use crate::launcher::launch;
use crate::machine::{GuestContainer, VirtualMachine};
use crate::mounts::{self, Mount};
use crate::namespaces::{HOST_NETWORK, Network, is_own_network, move_devices, own_pid};
use crate::notify::NotifySocket;
use crate::pid_holder::PidHolder;
use crate::process::{Exit, Handle, Process};
use crate::role::Role;
use crate::set::{Entry, KILLED, LOST, State, Task, TaskSet};
use crate::spec::{Files, Spec};
use crate::stdio::StdioConfig;
use crate::sync::spawn;
use anyhow::{Context, anyhow};
use koya::{Bundle, Settings, SharedNamespaces, SharedPidNamespace};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

/// Time limit for a guest to get the network devices of a container that joins a running sandbox, and interval of the check.
const DEVICES_LIMIT: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(20);

/// The container whose virtual machine a container joins, and those whose namespaces it shares: its configuration refers to
/// them by processes of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxMembership {
    /// The container that owns the virtual machine.
    pub sandbox: String,
    /// The container whose pid namespace it shares.
    pub pids: Option<String>,
    /// The container whose IPC namespace it shares.
    pub ipc: Option<String>,
    /// The container whose UTS namespace it shares.
    pub uts: Option<String>,
}

/// A request to create a task.
pub struct CreateTask {
    /// ID, unique in the set.
    pub id: String,
    /// The bundle: the directory of `config.json`.
    pub bundle: PathBuf,
    /// The bundle's configuration.
    pub spec: Spec,
    /// Mounts of its root file system, at `rootfs` in the bundle. If empty, the root is that of the configuration.
    pub mounts: Vec<Mount>,
    /// Streams of its init process.
    pub stdio: StdioConfig,
    /// Its socket for messages to a service manager, if it has one ([`Spec::set_notify_socket`]).
    pub notify: Option<NotifySocket>,
    /// The container of the set whose virtual machine it joins, if that does not follow from Kubernetes annotations.
    pub joins: Option<SandboxMembership>,
    /// The sandbox's settings, which the configuration's annotations may change. For a member of an existing pod, they only
    /// determine the allowed annotations.
    pub settings: Settings,
}

impl CreateTask {
    fn task(mut self, first_thread: Option<&PidHolder>) -> Result<(Task, Vec<Mount>), Error> {
        let hooks = self.spec.take_host_hooks();
        let root = self.spec.0.root().as_ref();
        let root = root.map(|root| root.path().clone()).unwrap_or_default();
        let rootfs = match self.mounts.is_empty() {
            true => self.bundle.join(root),
            false => self.bundle.join("rootfs"),
        };
        let role = match &self.joins {
            Some(joins) => Role::Member {
                sandbox: joins.sandbox.clone(),
            },
            None => self.spec.role(&self.id),
        };
        if role != Role::Sandbox {
            if self.mounts.is_empty() {
                self.spec.check_root()?;
            }
            self.spec.add_block_volumes(&self.settings)?;
        }
        let settings = match role {
            Role::Member { .. } => Settings::default(),
            Role::Single | Role::Sandbox => self
                .settings
                .with_annotations(self.spec.0.annotations().iter().flatten())?,
        };
        // After the annotations, which may change the settings.
        settings.prepare_process()?;
        let pid_holder = match (&role, first_thread) {
            (Role::Member { .. }, _) => PidHolder::new()?,
            (_, Some(first)) => first.clone(),
            (_, None) => PidHolder::process(),
        };
        let mut init = Process::new(self.stdio);
        init.wanted.notify_socket = self.notify.as_ref().map(|socket| socket.path.clone());
        let task = Task {
            id: self.id,
            bundle: self.bundle,
            rootfs,
            spec: self.spec,
            hooks,
            role,
            joins: self.joins,
            settings,
            init,
            notify: self.notify,
            pid_holder,
            time_limits: Once::new(),
        };
        Ok((task, self.mounts))
    }
}

/// Checks that a container which names a pod by its annotations is one of it. Users of engines may set annotations, too: they
/// could name the container of another user, and have their own one created in its virtual machine. The engine decides
/// about network namespaces.
fn check_pod(state: &State, task: &Task) -> Result<(), Error> {
    let (Role::Member { sandbox }, None) = (&task.role, &task.joins) else {
        return Ok(());
    };
    let pod = state.entries.get(sandbox).map(|entry| &entry.task);
    if !pod.is_some_and(|pod| pod.is_pod()) {
        let text = format!("the pod {sandbox} named by the annotations does not exist");
        return Err(Error::FailedPrecondition(text));
    }
    if let Network::Path(path) = task.spec.network()
        && !is_own_network(&path)
    {
        let text = format!(
            "the network namespace {} is not that of the pod {sandbox} named by the annotations",
            path.display()
        );
        return Err(Error::FailedPrecondition(text));
    }
    Ok(())
}

impl TaskSet {
    /// Creates a task, whose init process waits to be started. Returns the PID on the host that represents it.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`], or the reason why it can't be created; nothing is left behind.
    pub fn create(self: &Arc<Self>, request: CreateTask) -> Result<u32, Error> {
        let (task, mounts) = request.task(self.config.first_thread.as_ref())?;
        let task = Arc::new(task);
        // A concurrent deletion waits until it has been created.
        let _turn = {
            let mut state = self.lock();
            if state.entries.contains_key(&task.id) {
                return Err(Error::AlreadyExists(format!("container {}", task.id)));
            }
            check_pod(&state, &task)?;
            let entry = Entry {
                task: task.clone(),
                limits: task.spec.limits(),
                pending_limits: Vec::new(),
                execs: HashMap::new(),
                is_mounted: false,
                is_busy: true,
                oom_kills: 0,
                is_notifying: false,
            };
            state.entries.insert(task.id.clone(), entry);
            drop(state);
            self.turn_of(&task)
        };
        if let Err(error) = self.prepare(&task, &mounts) {
            self.undo(&task);
            return Err(error);
        }
        self.publish(Event::Created {
            id: task.id.clone(),
            bundle: task.bundle.clone(),
            mounts,
            stdio: task.init.paths.clone(),
            pid: task.pid(),
        });
        // Not earlier: its end may have been reported already.
        let followed = match task.is_pod() || task.container().is_some() {
            true => self.spawn_exit_watcher(&task),
            false => Ok(()),
        };
        if let Err(error) = followed {
            let exit = Exit::now(LOST);
            self.undo(&task);
            let (id, pid) = (task.id.clone(), task.pid());
            self.publish(Event::Deleted { id, pid, exit });
            return Err(error);
        }
        Ok(task.pid())
    }

    /// Starts a thread that publishes the end of a task.
    pub(crate) fn spawn_exit_watcher(self: &Arc<Self>, task: &Arc<Task>) -> Result<(), Error> {
        let (set, own) = (self.clone(), task.clone());
        spawn("koya-wait", move || match own.is_pod() {
            true => set.follow_machine(&own),
            false => set.follow(&own),
        })?;
        Ok(())
    }

    /// Waits for the virtual machine's end, which is that of a pod sandbox container.
    fn follow_machine(&self, task: &Task) {
        let Some(machine) = self.lock().machine() else {
            return;
        };
        let reason = machine.wait_ended();
        let status = match self.was_stopped() {
            true => KILLED,
            false => {
                log::error!("the pod's virtual machine ended: {reason}");
                LOST
            }
        };
        self.end(task, Exit::now(status));
    }

    fn prepare(self: &Arc<Self>, task: &Arc<Task>, mounts: &[Mount]) -> Result<(), Error> {
        if let Some(why) = &self.config.unready {
            return Err(anyhow!("{why}").into());
        }
        if task.spec.network() == Network::Host {
            return Err(anyhow!(HOST_NETWORK).into());
        }
        if !task.is_member()
            && !task.is_pod()
            && let Some(kind) = task.spec.shared_namespace()
        {
            return Err(anyhow!(
                "the {kind} namespace of another container can't be shared: each has a virtual machine of its own"
            )
            .into());
        }
        if !task.is_member() {
            task.share_time_on_host();
        } else {
            self.move_devices(task)?;
        }
        if task.is_pod() {
            // The rest of its configuration is not used.
            task.spec
                .resources()
                .map_or(Ok(()), koya::check_resources)?;
            self.run_hooks_of_creation(task)?;
            self.boot(task)?;
            task.limit_on_host()?;
            task.limit_time_on_host();
            return Ok(());
        }
        koya::check_configuration(&task.spec.0)?;
        if !mounts.is_empty() {
            mounts::mount_all(mounts, &task.rootfs)?;
            self.change(|state| {
                if let Some(entry) = state.entry(task) {
                    entry.is_mounted = true;
                }
            });
        }
        task.init.open_streams(&task.id, &self.config.namespace)?;
        self.run_hooks_of_creation(task)?;
        if !task.is_member() {
            // Before a virtual machine is started for it. Hooks may have changed files that it names.
            self.bundle(task).check()?;
        }
        // Interfaces may still be added to a new network namespace before the start.
        if task.spec.network() != Network::New {
            self.create_in_guest(task)?;
        } else if !task.is_member() {
            // Limits that the host refuses are errors of the creation.
            task.limit_on_host()?;
        }
        Ok(())
    }

    /// Moves the network devices of a container to the network namespace of its sandbox, which runs already. If the container
    /// has a process of its own, that has done so.
    fn move_devices(&self, task: &Task) -> Result<(), Error> {
        let devices = koya::net_devices_of(&task.spec.0)?;
        if let Some(host) = self.config.host_network.as_ref()
            && !devices.is_empty()
        {
            let host = host.try_clone().context("the host's network namespace")?;
            launch(move || move_devices(&host, &devices))?;
        }
        Ok(())
    }

    /// Reverts a partially created task.
    pub(crate) fn undo(self: &Arc<Self>, task: &Task) {
        if let Some(container) = task.container() {
            container.remove().ok();
        }
        // Shares keep the mount busy, as do the files shown on the host.
        task.pid_holder.hide();
        self.unmount(task);
        self.run_poststop_hooks(task);
        let is_last = self.change(|state| {
            if state.entry(task).is_some() {
                state.entries.remove(&task.id);
            }
            state.entries.is_empty()
        });
        if is_last {
            self.stop();
        } else if task.is_member() {
            self.resize_later();
        }
    }

    /// Unmounts the task's file systems.
    pub(crate) fn unmount(&self, task: &Task) {
        let mut state = self.lock();
        let is_mounted = state.entry(task).map(|entry| &mut entry.is_mounted);
        let was_mounted = is_mounted.is_some_and(std::mem::take);
        drop(state);
        if was_mounted {
            mounts::unmount_all(&task.rootfs);
        }
    }

    /// Creates the container in the guest; its init process waits to be started, and its end is not awaited yet
    /// ([`spawn_exit_watcher`](Self::spawn_exit_watcher)).
    fn create_in_guest(
        self: &Arc<Self>,
        task: &Arc<Task>,
    ) -> Result<Arc<dyn GuestContainer>, Error> {
        let machine = self.boot(task)?;
        if task.is_member() && !koya::net_devices_of(&task.spec.0)?.is_empty() {
            wait_for_devices(&*machine)?;
        }
        self.resize_guest()?;
        let bundle = self.bundle(task);
        let (container, mut streams) = machine.create(&task.id, &bundle, &task.init.wanted)?;
        let relayed = self.relay_notifications(task, streams.notifications.take());
        let connected = relayed.and_then(|()| task.init.take_io().connect(streams));
        let connected = connected.map_err(Error::from);
        let limited = match task.is_member() {
            true => Ok(()),
            false => task.limit_on_host(),
        };
        let relay = match connected.and_then(|relay| limited.map(|()| Arc::new(relay))) {
            Ok(relay) => relay,
            Err(error) => {
                container.remove().ok();
                return Err(error);
            }
        };
        task.init
            .mark_created(Handle::Init(container.clone()), relay);
        Ok(container)
    }

    /// Shows the container's files by the PID that represents it on the host.
    pub(crate) fn show_files(&self, task: &Task) {
        // A container that joined from another process has its PID.
        if task.joins.is_none() {
            task.pid_holder.show(Files(self.bundle(task)));
        }
    }

    fn bundle(&self, task: &Task) -> Bundle {
        Bundle {
            spec: match task.role {
                Role::Single => task.spec.without_network_sysctls(),
                Role::Sandbox | Role::Member { .. } => task.spec.0.clone(),
            },
            directory: task.bundle.clone(),
            rootfs: task.rootfs.clone(),
            shared: self.shared_namespaces(task),
        }
    }

    /// The container in the guest, created now if it waited for interfaces. The caller has the task's turn.
    pub(crate) fn ensure_created(
        self: &Arc<Self>,
        task: &Arc<Task>,
    ) -> Result<Arc<dyn GuestContainer>, Error> {
        if let Some(container) = task.container() {
            return Ok(container);
        }
        let container = self.create_in_guest(task)?;
        self.spawn_exit_watcher(task)?;
        self.set_pending_limits(task, &*container)?;
        Ok(container)
    }

    /// The containers whose namespaces a container shares.
    fn shared_namespaces(&self, task: &Task) -> SharedNamespaces {
        let Some(joins) = task.joins.clone() else {
            return SharedNamespaces {
                pids: self.shared_pids(task),
                ..SharedNamespaces::default()
            };
        };
        SharedNamespaces {
            pids: joins
                .pids
                .map_or(SharedPidNamespace::Unknown, SharedPidNamespace::Container),
            ipc: joins.ipc,
            uts: joins.uts,
        }
    }

    /// The container whose pid namespace a Kubernetes container shares.
    fn shared_pids(&self, task: &Task) -> SharedPidNamespace {
        let Some(wanted) = task.spec.pids_of() else {
            return SharedPidNamespace::Unknown;
        };
        if wanted == own_pid() {
            return SharedPidNamespace::Sandbox;
        }
        let state = self.lock();
        let mut others = state.entries.values().map(|entry| &entry.task);
        let found = others.find(|other| other.id != task.id && other.pid() == wanted);
        found.map_or(SharedPidNamespace::Unknown, |other| {
            SharedPidNamespace::Container(other.id.clone())
        })
    }
}

/// Waits until a running guest has the interfaces of its network namespace, among them network devices that have just been
/// moved there.
fn wait_for_devices(machine: &dyn VirtualMachine) -> Result<(), Error> {
    let started = Instant::now();
    while !machine.has_interfaces()? {
        if started.elapsed() > DEVICES_LIMIT {
            let text =
                "linux.netDevices: the guest did not get them in time; the log has the reason";
            return Err(anyhow!(text).into());
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}
