//! State of containers and their processes, for the agent's main thread.

use crate::blocking::run_blocking;
use crate::checks::{check_id, invalid_json};
use crate::configuration;
use crate::console::{self, ConsoleSocket};
use crate::device_rules;
use crate::disks;
use crate::helper;
use crate::late_mounts;
use crate::mappings;
use crate::notify::{self, NotifySocket};
use crate::oom::Ooms;
use crate::places::{self, bundle};
use crate::reaper::{self, End, Reaper};
use crate::sockets::{self, Place};
use crate::start_hooks::StartHooks;
use crate::streams;
use crate::{cgroup, root_setup, sys, tmpfs, volumes};
use anyhow::{Context, Result, bail};
use koya_protocol::ErrorReason;
use koya_protocol::messages::{
    BlockDevice, ConnectSocketRequest, ContainerDeviceRequest, ContainerRequest,
    CreateContainerRequest, Empty, ExecProcessRequest, Process, SignalProcessRequest, Stdio,
};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use rustix::fs::{Uid, fchown};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::OnceCell;

/// Time within which all processes of a container end that are killed at once.
const KILLED_TOGETHER: Duration = Duration::from_millis(100);

/// Key of a process: container ID, and exec ID (empty for the first process).
pub(crate) type Key = (String, String);

pub(crate) struct Tracked {
    pub(crate) pid: i32,
    pub(crate) end: End,
    pub(crate) terminal: Option<OwnedFd>,
}

/// The agent's state, only for its main thread.
#[derive(Clone, Default)]
pub(crate) struct State {
    pub(crate) reaper: Reaper,
    pub(crate) processes: Rc<RefCell<HashMap<Key, Tracked>>>,
    pub(crate) ooms: Ooms,
    /// The first process of the pid namespace shared by the sandbox's containers, and its exit.
    pause: Rc<OnceCell<(i32, End)>>,
    /// Number of running helpers, and counter for the names of outcome files.
    helping: Rc<Cell<u32>>,
    helpers: Rc<Cell<u64>>,
    /// Counter for the names of console sockets.
    consoles: Rc<Cell<u64>>,
    /// Sockets for messages to the service managers of containers, by container.
    notify_sockets: Rc<RefCell<HashMap<String, NotifySocket>>>,
    /// Listening sockets of processes, by their names in requests.
    sockets: Rc<RefCell<HashMap<String, Place>>>,
}

/// Guard of a running helper. Its process may end before the PID is known, so exits are remembered while any helper runs.
struct Helping(State);

impl Helping {
    fn new(state: &State) -> Self {
        if state.helping.get() == 0 {
            // Exits of orphans: nothing will ask for them, and PIDs are reused.
            state.reaper.forget();
        }
        state.helping.set(state.helping.get() + 1);
        Self(state.clone())
    }
}

impl Drop for Helping {
    fn drop(&mut self) {
        self.0.helping.set(self.0.helping.get() - 1);
    }
}

/// The process created by a helper.
pub(crate) struct CreatedProcess {
    pub(crate) pid: i32,
    _helping: Helping,
}

/// Streams passed to a helper.
pub(crate) struct Streams {
    stdin: std::process::Stdio,
    stdout: std::process::Stdio,
    stderr: std::process::Stdio,
    /// Descriptors 3 and up, which the helper takes by their numbers in this process.
    extra_fds: Vec<OwnedFd>,
}

impl Streams {
    pub(crate) fn none() -> Self {
        Self {
            stdin: std::process::Stdio::null(),
            stdout: std::process::Stdio::null(),
            stderr: std::process::Stdio::null(),
            extra_fds: Vec::new(),
        }
    }

    fn open(stdio: &Stdio) -> Result<Self> {
        let open = || -> std::io::Result<Self> {
            Ok(Self {
                stdin: streams::input(&stdio.stdin)?,
                stdout: streams::output(&stdio.stdout)?,
                stderr: streams::output(&stdio.stderr)?,
                extra_fds: Vec::new(),
            })
        };
        open().context("cannot open a standard stream to the host")
    }

    fn numbers(&self) -> String {
        let numbers = self.extra_fds.iter().map(|fd| fd.as_raw_fd().to_string());
        numbers.collect::<Vec<_>>().join(",")
    }
}

impl State {
    pub(crate) fn with<T>(&self, key: &Key, look: impl FnOnce(&Tracked) -> T) -> Result<T> {
        let processes = self.processes.borrow();
        let process = processes.get(key).ok_or_else(|| {
            ErrorReason::NoProcess(format!("no process {:?} of container {:?}", key.1, key.0))
        })?;
        Ok(look(process))
    }

    pub(crate) async fn create(&self, request: CreateContainerRequest) -> Result<Process> {
        let id = check_id(&request.container_id)?;
        let mut spec: Spec = serde_json::from_slice(&request.spec_json)
            .map_err(|error| invalid_json("configuration", &error))?;
        let dir = bundle(id);
        if dir.exists() {
            bail!(ErrorReason::AlreadyExists(format!("container {id} exists")));
        }
        configuration::adapt(&mut spec, id)?;
        fs::create_dir_all(&dir)?;
        let made = self.try_create(id, spec, &request).await;
        if made.is_err() {
            // Removes a partially created container.
            self.remove(id).await.ok();
        }
        made
    }

    /// Removes a container, with all of its state.
    ///
    /// # Errors
    /// If something could not be removed; everything else was.
    pub(crate) async fn remove(&self, id: &str) -> Result<()> {
        let deleted = self.help(&["delete", id], Streams::none()).await;
        self.close_notify_socket(id).await;
        self.processes.borrow_mut().retain(|key, _| key.0 != id);
        self.ooms.forget(id);
        device_rules::forget(id);
        let unmounted = volumes::unmount_aside(id).await;
        fs::remove_dir_all(bundle(id)).ok();
        deleted?;
        unmounted
    }

    /// Closes the container's socket for messages to its service manager, once those sent so far are on their way.
    pub(crate) async fn close_notify_socket(&self, id: &str) {
        let socket = self.notify_sockets.borrow_mut().remove(id);
        if let Some(socket) = socket {
            socket.close().await;
        }
    }

    /// Creates a container; after a failure, parts of it may be left.
    async fn try_create(
        &self,
        id: &str,
        mut spec: Spec,
        request: &CreateContainerRequest,
    ) -> Result<Process> {
        // Open until the container has joined them: a PID could have been reused by then.
        let joined = self.namespaces_to_join(request).await?;
        for (kind, namespace) in &joined {
            configuration::join(&mut spec, *kind, namespace.as_raw_fd());
        }
        mount_volumes(id, request).await?;
        for device in &request.block_devices {
            configuration::add_disk(&mut spec, device)?;
        }
        if request.guest_devices {
            let dev = Path::new("/dev");
            configuration::add_guest_devices(&mut spec, dev, !request.omit_terminals)?;
        }
        if !request.stdio.notify_path.is_empty() {
            let socket = notify::make(id, &mut spec, &request.stdio).await?;
            self.notify_sockets
                .borrow_mut()
                .insert(id.to_owned(), socket);
        }
        let mut spec = prepare_root(id, spec, request).await?;
        if let Some(hooks) = StartHooks::take(&mut spec, id, &bundle(id)) {
            hooks.save(&bundle(id))?;
        }
        let late = configuration::take_late_limits(&mut spec);
        helper::save(id, &spec)?;
        let uid = spec
            .process()
            .as_ref()
            .map_or(0, |process| configuration::guest_uid(&spec, process));
        let made = self
            .launch(&["create", id], id, "", &request.stdio, &uid.to_string())
            .await?;
        // libcontainer accepts device rules but, without its BPF feature, ignores them.
        device_rules::apply(id, &spec)?;
        if let Some(limits) = &late {
            cgroup::set(id, limits)?;
        }
        self.set_up_terminal(id, &request.stdio, uid)?;
        if let Err(error) = self.ooms.watch(id) {
            // A guest kernel without that controller.
            sys::kernel_log(&format!("koya-agent: {error:#}"));
        }
        let joins_pids = joined
            .iter()
            .any(|(kind, _)| *kind == LinuxNamespaceType::Pid);
        if joins_pids || !configuration::has_pids(&spec) {
            self.end_all_with_the_first(id)?;
        }
        Ok(made)
    }

    /// The namespaces of other containers, or of the sandbox, that a container joins.
    async fn namespaces_to_join(
        &self,
        request: &CreateContainerRequest,
    ) -> Result<Vec<(LinuxNamespaceType, File)>> {
        let mut found = Vec::new();
        if request.sandbox_pidns {
            found.push((LinuxNamespaceType::Pid, self.pause().await?));
        }
        let others = [
            (LinuxNamespaceType::Pid, "pid", &request.pidns_of),
            (LinuxNamespaceType::Ipc, "ipc", &request.ipcns_of),
            (LinuxNamespaceType::Uts, "uts", &request.utsns_of),
        ];
        for (kind, name, of) in others {
            if !of.is_empty() {
                found.push((kind, namespace_of(self.running(of)?, name)?));
            }
        }
        Ok(found)
    }

    /// Sets up the terminal of a container's first process, which waits for its start. An exec process sets up its own.
    fn set_up_terminal(&self, id: &str, stdio: &Stdio, uid: u32) -> Result<()> {
        let key = (id.to_owned(), String::new());
        let settings = console::Settings::of(stdio);
        self.with(&key, |tracked| {
            let terminal = tracked.terminal.as_ref();
            terminal.map_or(Ok(()), |terminal| settings.apply(terminal))
        })??;
        if let Err(error) = self.with(&key, |tracked| give_terminal(tracked, uid))? {
            sys::kernel_log(&format!("koya-agent: a terminal stays root's: {error:#}"));
        }
        Ok(())
    }

    /// The pid namespace shared by the sandbox's containers, created on first use.
    async fn pause(&self) -> Result<File> {
        let made = self.pause.get_or_try_init(async || {
            let made = self.help(&["pause", "-"], Streams::none()).await?;
            Ok::<_, anyhow::Error>((made.pid, self.reaper.follow(made.pid)))
        });
        let (pid, end) = made.await?;
        if end.borrow().is_some() {
            bail!("the pid namespace that the containers share has ended");
        }
        namespace_of(*pid, "pid")
    }

    /// The PID of a container's first process while it is alive: it may be reused later.
    fn running(&self, id: &str) -> Result<i32> {
        let key = (id.to_owned(), String::new());
        let (pid, ended) = self.with(&key, |p| (p.pid, p.end.borrow().is_some()))?;
        if ended {
            bail!(ErrorReason::NoProcess(format!("container {id} has ended")));
        }
        Ok(pid)
    }

    /// In its own pid namespace, a container's processes end with the first one; in a shared one they are killed here.
    fn end_all_with_the_first(&self, id: &str) -> Result<()> {
        let key = (id.to_owned(), String::new());
        let end = self.with(&key, |p| p.end.clone())?;
        tokio::task::spawn_local(async move {
            reaper::wait(end).await;
            cgroup::signal_all(&key.0, libc::SIGKILL).ok();
        });
        Ok(())
    }

    pub(crate) async fn exec(&self, request: ExecProcessRequest) -> Result<Process> {
        let id = check_id(&request.container_id)?;
        let exec_id = check_id(&request.exec_id)?;
        let key = (id.to_owned(), exec_id.to_owned());
        if self.processes.borrow().contains_key(&key) {
            let reason = format!("container {id} has a process {exec_id}");
            bail!(ErrorReason::AlreadyExists(reason));
        }
        self.running(id)?;
        let path = bundle(id).join(format!("process-{exec_id}.json"));
        fs::write(&path, &request.process_json).with_context(|| format!("no container {id}"))?;
        let terminal = serde_json::to_string(&console::Settings::of(&request.stdio))?;
        let made = self
            .launch(
                &["exec", id, &request.cgroup, &terminal],
                id,
                exec_id,
                &request.stdio,
                &path.to_string_lossy(),
            )
            .await;
        fs::remove_file(&path).ok();
        // A container is killed as a whole: the new process may be the first of it that is gone.
        if made.is_err()
            && let Ok(end) = self.with(&(id.to_owned(), String::new()), |p| p.end.clone())
        {
            tokio::time::timeout(KILLED_TOGETHER, reaper::wait(end))
                .await
                .ok();
        }
        // The first process may have ended meanwhile, after the others were killed.
        match self.running(id) {
            Ok(_) => made,
            Err(ended) => {
                cgroup::signal_all(id, libc::SIGKILL).ok();
                made.map_err(|_| ended)
            }
        }
    }

    /// Runs a helper that creates a process, with its streams or terminal and its last argument, and follows the process.
    async fn launch(
        &self,
        operation: &[&str],
        id: &str,
        exec_id: &str,
        stdio: &Stdio,
        last: &str,
    ) -> Result<Process> {
        let console = if stdio.terminal {
            // IDs may exceed the length of a socket path: 64 characters each under Kubernetes.
            fs::create_dir_all("/run/koya/consoles")?;
            let number = self.consoles.replace(self.consoles.get() + 1);
            let path = format!("/run/koya/consoles/{number}.sock");
            Some(ConsoleSocket::bind(path.into())?)
        } else {
            None
        };
        let mut streams = match &console {
            Some(_) => Streams::none(),
            None => Streams::open(stdio)?,
        };
        let mut places = HashMap::new();
        for wanted in &stdio.extra_fds {
            let own = match wanted.socket.as_ref() {
                Some(socket) => {
                    let (socket, place) = sockets::make(socket)?;
                    places.insert(wanted.token.clone(), place);
                    socket
                }
                None => streams::extra_fds(wanted).context("cannot open a stream to the host")?,
            };
            streams.extra_fds.push(own);
        }
        let socket = console
            .as_ref()
            .map_or("-".into(), |c| c.path().to_string_lossy());
        let mut args = operation.to_vec();
        let numbers = streams.numbers();
        args.extend([&*socket, &numbers, last]);
        let made = self.help(&args, streams).await?;
        let pid = made.pid;
        let end = self.reaper.follow(pid);
        self.keep_sockets(places, end.clone());
        drop(made);
        drop(socket);
        let terminal = match console.map(|c| connect_terminal(c, stdio)).transpose() {
            Ok(terminal) => terminal,
            Err(error) => {
                sys::kill(pid, libc::SIGKILL).ok();
                return Err(error);
            }
        };
        let key = (id.to_owned(), exec_id.to_owned());
        self.processes
            .borrow_mut()
            .insert(key, Tracked { pid, end, terminal });
        Ok(Process {
            pid,
            ..Default::default()
        })
    }

    /// Accepts requests for connections to the sockets of a process until its end.
    fn keep_sockets(&self, places: HashMap<String, Place>, end: End) {
        if places.is_empty() {
            return;
        }
        let names: Vec<String> = places.keys().cloned().collect();
        self.sockets.borrow_mut().extend(places);
        let sockets = self.sockets.clone();
        tokio::task::spawn_local(async move {
            reaper::wait(end).await;
            sockets.borrow_mut().retain(|name, _| !names.contains(name));
        });
    }

    /// Connects a listening socket of a process to a stream of the host.
    pub(crate) async fn connect_socket(&self, request: &ConnectSocketRequest) -> Result<()> {
        let place = self.sockets.borrow().get(&request.socket).cloned();
        let ended = || ErrorReason::NotFound("the process with this socket has ended".into());
        sockets::connect_to_host(place.ok_or_else(ended)?, &request.token).await
    }

    /// Runs a helper to its end and returns the created process.
    pub(crate) async fn help(&self, args: &[&str], streams: Streams) -> Result<CreatedProcess> {
        let _helping = Helping::new(self);
        fs::create_dir_all("/run/koya/outcomes")?;
        let number = self.helpers.replace(self.helpers.get() + 1);
        let outcome = PathBuf::from(format!("/run/koya/outcomes/{number}"));
        let outcome_text = outcome.to_string_lossy();
        let mut all = vec![places::ARGUMENT, args[0], args[1], &outcome_text];
        all.extend(&args[2..]);
        let child = Command::new("/proc/self/exe")
            .args(all)
            .env("PATH", mappings::PROGRAMS)
            .stdin(streams.stdin)
            .stdout(streams.stdout)
            .stderr(streams.stderr)
            .spawn()
            .context("cannot start a helper")?;
        let status = reaper::wait(self.reaper.follow(child.id() as i32)).await;
        let text = fs::read(&outcome)
            .with_context(|| format!("the helper for {} ended with status {status}", args[0]))?;
        fs::remove_file(&outcome).ok();
        let outcome: helper::Outcome = serde_json::from_slice(&text)?;
        Ok(CreatedProcess {
            pid: outcome.made()?,
            _helping,
        })
    }

    /// Changes the devices of a running container.
    pub(crate) async fn change_device(
        &self,
        request: ContainerDeviceRequest,
        change: fn(&disks::Running<'_>, &BlockDevice) -> Result<()>,
    ) -> Result<Empty> {
        let id = check_id(&request.container_id)?.to_owned();
        let device = request.device.into_option().context("no device")?;
        let pid = self.running(&id)?;
        run_blocking(move || change(&disks::Running { id: &id, pid }, &device)).await?;
        Ok(Empty::new())
    }

    /// Freezes or thaws a container.
    pub(crate) async fn freeze(&self, request: ContainerRequest, frozen: bool) -> Result<Empty> {
        let id = check_id(&request.container_id)?.to_owned();
        self.running(&id)?;
        run_blocking(move || cgroup::freeze(&id, frozen)).await?;
        Ok(Empty::new())
    }

    pub(crate) fn signal(&self, request: &SignalProcessRequest) -> Result<()> {
        let key = (request.container_id.clone(), request.exec_id.clone());
        let (pid, ended) = self.with(&key, |p| (p.pid, p.end.borrow().is_some()))?;
        if ended {
            bail!(ErrorReason::NoProcess("the process has ended".into()));
        }
        let number = i32::try_from(request.signal)?;
        let sent = match request.all {
            true => cgroup::signal_all(&key.0, number),
            false => match sys::kill(pid, number) {
                // It has ended, and its exit will be reported.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                    bail!(ErrorReason::NoProcess("the process has ended".into()));
                }
                sent => sent.map_err(Into::into),
            },
        };
        sent.with_context(|| format!("signal {number}"))
    }
}

/// Mounts the volumes of a container. Most containers have none, and need no additional thread.
async fn mount_volumes(id: &str, request: &CreateContainerRequest) -> Result<()> {
    let (memory, disks) = (&request.ephemeral_volumes, &request.disk_volumes);
    let shared = &request.shared_volumes;
    if memory.is_empty() && disks.is_empty() && shared.is_empty() {
        return Ok(());
    }
    let (id, memory) = (id.to_owned(), memory.clone());
    let (disks, shared) = (disks.clone(), shared.clone());
    run_blocking(move || {
        volumes::mount_all(&id, &memory, &disks)?;
        volumes::mount_shared(&id, &shared)
    })
    .await
}

/// Prepares the root of a container, and mounts that libcontainer could not make; returns the configuration for
/// libcontainer.
async fn prepare_root(id: &str, mut spec: Spec, request: &CreateContainerRequest) -> Result<Spec> {
    if tmpfs::concerns(&spec, root_setup::is_image(id, &spec)) {
        let of = id.to_owned();
        spec = run_blocking(move || tmpfs::prepare(&of, spec)).await?;
    }
    late_mounts::take(&mut spec)?;
    if root_setup::is_complete(id, &spec, &request.files) {
        return Ok(spec);
    }
    // Access to its root may be slow.
    let (of, files) = (id.to_owned(), request.files.clone());
    run_blocking(move || root_setup::complete_root(&of, spec, &files)).await
}

/// Receives the terminal created by a helper, and connects it to the host.
fn connect_terminal(console: ConsoleSocket, stdio: &Stdio) -> Result<OwnedFd> {
    let master = console.receive()?;
    let copy = rustix::io::fcntl_dupfd_cloexec(&master, 0)?;
    streams::terminal(copy, &stdio.stdin).context("cannot open a terminal's stream")?;
    Ok(master)
}

/// Gives the terminal to the user of a container's first process, who may open it by other names (/dev/stdout).
fn give_terminal(process: &Tracked, uid: u32) -> Result<()> {
    if let Some(master) = &process.terminal {
        let terminal = ioctl_tiocgptpeer(master, OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        fchown(terminal, Some(Uid::from_raw(uid)), None)?;
    }
    Ok(())
}

fn namespace_of(pid: i32, kind: &str) -> Result<File> {
    File::open(format!("/proc/{pid}/ns/{kind}"))
        .with_context(|| format!("there is no {kind} namespace to share"))
}
