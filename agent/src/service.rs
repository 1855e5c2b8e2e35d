//! What the host asks for: `agent/protocol/proto/agent.proto`, served on the one connection that
//! the agent makes before any container exists.

use crate::console::{self, ConsoleSocket};
use crate::cpus;
use crate::details;
use crate::disks;
use crate::helper::{self, bundle};
use crate::images;
use crate::network;
use crate::reaper::{self, End, Reaper};
use crate::streams;
use crate::watches;
use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use futures::StreamExt as _;
use koya_protocol::messages::{
    Accounts, AttachDiskRequest, BlockDevice, ConnectPortRequest, ContainerDeviceRequest,
    ContainerRequest, CreateContainerRequest, DestroySandboxRequest, DetachDiskRequest, Disk,
    Empty, ExecProcessRequest, GetGuestDetailsRequest, GuestDetails, MountImageRequest, Process,
    RemoveContainerRequest, ReportHostEventsRequest, SetGuestDateTimeRequest, SetOnlineCpusRequest,
    SignalProcessRequest, StartContainerRequest, Stdio, TtyWinResizeRequest,
    UpdateInterfaceRequest, UpdateRoutesRequest, WaitProcessRequest, WaitProcessResponse,
};
use koya_protocol::{Agent, CONTROL_PORT, create_agent};
use oci_spec::runtime::Spec;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};
use ttrpc::Code;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, TtrpcContext};

/// A process of a container: container, and exec's name or nothing for the first process.
type Key = (String, String);

struct Tracked {
    pid: i32,
    end: End,
    terminal: Option<OwnedFd>,
}

/// The agent's state, for its one thread.
#[derive(Clone, Default)]
struct State {
    reaper: Reaper,
    processes: Rc<RefCell<HashMap<Key, Tracked>>>,
    /// Helpers that run, and how many there were: outcomes' names.
    helping: Rc<Cell<u32>>,
    helpers: Rc<Cell<u64>>,
}

/// A helper is at work; what it makes may end before its number is known, so ends are remembered
/// while there is one of these.
struct Helping(State);

impl Helping {
    fn new(state: &State) -> Self {
        if state.helping.get() == 0 {
            // Orphans that ended since: nobody asks for them, and their numbers are used again.
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

/// The process that a helper made.
struct Made {
    pid: i32,
    _helping: Helping,
}

/// An answer in the making, on the agent's thread.
type Work = Box<dyn FnOnce(State) -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// ttrpc wants a service that can move between threads; the state can't. So the service sends
/// work to the task that has the state, which runs each piece as a task of its own.
struct Service {
    work: mpsc::UnboundedSender<Work>,
}

impl Service {
    async fn ask<T, F, R>(&self, what: F) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        F: FnOnce(State) -> R + Send + 'static,
        R: Future<Output = Result<T>> + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let work: Work = Box::new(move |state| {
            Box::pin(async move {
                sender.send(what(state).await).ok();
            })
        });
        let gone = || ttrpc::Error::Others("the agent is ending".into());
        self.work.send(work).map_err(|_| gone())?;
        let answer = receiver.await.map_err(|_| gone())?;
        answer.map_err(|error| {
            ttrpc::Error::RpcStatus(ttrpc::get_status(Code::UNKNOWN, format!("{error:#}")))
        })
    }
}

/// Connects to the host and serves it until the guest ends.
pub(crate) async fn serve() -> Result<()> {
    let address = VsockAddr::new(VMADDR_CID_HOST, CONTROL_PORT);
    let control = VsockStream::connect(address)
        .await
        .context("cannot reach the host over vsock")?;
    let (work, mut pieces) = mpsc::unbounded_channel::<Work>();
    // The stream of connections yields one and never ends: a server whose listener ends stops.
    let one = futures::stream::iter([std::io::Result::Ok(control)]);
    let listener = Listener::new(one.chain(futures::stream::pending()));
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(create_agent(Arc::new(Service { work })));
    server.start().await.context("cannot serve the host")?;

    let state = State::default();
    let local = tokio::task::LocalSet::new();
    local
        .run_until(async move {
            let reaper = tokio::task::spawn_local(state.reaper.clone().run());
            while let Some(piece) = pieces.recv().await {
                tokio::task::spawn_local(piece(state.clone()));
            }
            reaper.abort();
            bail!("the host's connection ended")
        })
        .await
}

#[async_trait]
impl Agent for Service {
    async fn get_guest_details(
        &self,
        _: &TtrpcContext,
        _: GetGuestDetailsRequest,
    ) -> ttrpc::Result<GuestDetails> {
        self.ask(async |_: State| details::read()).await
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<Process> {
        self.ask(async move |state: State| state.create(request).await)
            .await
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: StartContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |state: State| {
            let id = &request.container_id;
            state.help(&["start", id], Streams::none()).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> ttrpc::Result<Process> {
        self.ask(async move |state: State| state.exec(request).await)
            .await
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |state: State| {
            state.signal(&request)?;
            Ok(Empty::new())
        })
        .await
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: WaitProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        self.ask(async move |state: State| {
            let key = (request.container_id, request.exec_id);
            let end = state.with(&key, |p| p.end.clone())?;
            let status = reaper::wait(end).await;
            // An added process is forgotten once somebody knows its end; a container's first
            // process with the container.
            if !key.1.is_empty() {
                state.processes.borrow_mut().remove(&key);
            }
            Ok(WaitProcessResponse {
                status,
                ..Default::default()
            })
        })
        .await
    }

    async fn tty_win_resize(
        &self,
        _: &TtrpcContext,
        request: TtyWinResizeRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |state: State| {
            let key = (request.container_id, request.exec_id);
            state.with(&key, |process| match &process.terminal {
                Some(master) => console::resize(master, request.rows, request.columns),
                None => bail!("the process has no terminal"),
            })??;
            Ok(Empty::new())
        })
        .await
    }

    async fn remove_container(
        &self,
        _: &TtrpcContext,
        request: RemoveContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |state: State| {
            let id = &request.container_id;
            state.help(&["delete", id], Streams::none()).await?;
            state.processes.borrow_mut().retain(|key, _| key.0 != *id);
            fs::remove_dir_all(bundle(id)).ok();
            Ok(Empty::new())
        })
        .await
    }

    async fn set_guest_date_time(
        &self,
        _: &TtrpcContext,
        request: SetGuestDateTimeRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |_: State| {
            let time = rustix::time::Timespec {
                tv_sec: request.seconds,
                tv_nsec: request.nanoseconds,
            };
            rustix::time::clock_settime(rustix::time::ClockId::Realtime, time)?;
            Ok(Empty::new())
        })
        .await
    }

    async fn connect_port(
        &self,
        _: &TtrpcContext,
        request: ConnectPortRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |_: State| {
            let port = u16::try_from(request.port)?;
            network::connect_port(port, &request.token).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn update_interface(
        &self,
        _: &TtrpcContext,
        request: UpdateInterfaceRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |_: State| {
            let interface = request.interface.into_option().context("no interface")?;
            network::update_interface(&interface).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn update_routes(
        &self,
        _: &TtrpcContext,
        request: UpdateRoutesRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |_: State| {
            network::update_routes(&request.routes).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn mount_image(
        &self,
        _: &TtrpcContext,
        request: MountImageRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |_: State| {
            let id = check_id(&request.container_id)?.to_owned();
            let disk = check_id(&request.guest_name)?.to_owned();
            aside(move || images::mount_image(&id, &disk)).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn unmount_image(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |_: State| {
            let id = check_id(&request.container_id)?.to_owned();
            aside(move || images::unmount_image(&id)).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn get_accounts(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Accounts> {
        self.ask(async move |_: State| {
            let id = check_id(&request.container_id)?.to_owned();
            aside(move || {
                Ok(Accounts {
                    passwd: images::read(&id, "etc/passwd")?,
                    group: images::read(&id, "etc/group")?,
                    ..Default::default()
                })
            })
            .await
        })
        .await
    }

    async fn attach_disk(
        &self,
        _: &TtrpcContext,
        request: AttachDiskRequest,
    ) -> ttrpc::Result<Disk> {
        self.ask(async move |_: State| {
            Ok(Disk {
                guest_name: aside(move || disks::attach(request.window)).await?,
                ..Default::default()
            })
        })
        .await
    }

    async fn detach_disk(
        &self,
        _: &TtrpcContext,
        request: DetachDiskRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |_: State| {
            aside(move || disks::detach(request.window)).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn add_device(
        &self,
        _: &TtrpcContext,
        request: ContainerDeviceRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |state: State| state.change_device(request, disks::give).await)
            .await
    }

    async fn remove_device(
        &self,
        _: &TtrpcContext,
        request: ContainerDeviceRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |state: State| state.change_device(request, disks::take).await)
            .await
    }

    async fn set_online_cpus(
        &self,
        _: &TtrpcContext,
        request: SetOnlineCpusRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |_: State| {
            cpus::set_online(request.count)?;
            Ok(Empty::new())
        })
        .await
    }

    async fn report_host_events(
        &self,
        _: &TtrpcContext,
        request: ReportHostEventsRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |_: State| {
            watches::fire(&request.events)?;
            Ok(Empty::new())
        })
        .await
    }

    async fn destroy_sandbox(
        &self,
        _: &TtrpcContext,
        _: DestroySandboxRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async |_: State| {
            tokio::task::spawn_local(async {
                // The answer goes first.
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                rustix::fs::sync();
                if let Err(error) = rustix::system::reboot(rustix::system::RebootCommand::Restart) {
                    crate::sys::kernel_log(&format!("koya-agent: cannot end the guest: {error}"));
                }
            });
            Ok(Empty::new())
        })
        .await
    }
}

/// Does what may wait for a disk, or for a container's own files, on another thread: meanwhile others
/// are served.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await?
}

/// What a helper is started with.
struct Streams {
    stdin: std::process::Stdio,
    stdout: std::process::Stdio,
    stderr: std::process::Stdio,
}

impl Streams {
    fn none() -> Self {
        Self {
            stdin: std::process::Stdio::null(),
            stdout: std::process::Stdio::null(),
            stderr: std::process::Stdio::null(),
        }
    }

    fn open(stdio: &Stdio) -> Result<Self> {
        let open = || -> std::io::Result<Self> {
            Ok(Self {
                stdin: streams::input(&stdio.stdin)?,
                stdout: streams::output(&stdio.stdout)?,
                stderr: streams::output(&stdio.stderr)?,
            })
        };
        open().context("cannot open a standard stream to the host")
    }
}

impl State {
    fn with<T>(&self, key: &Key, look: impl FnOnce(&Tracked) -> T) -> Result<T> {
        let processes = self.processes.borrow();
        let process = processes
            .get(key)
            .with_context(|| format!("no process {:?} in container {:?}", key.1, key.0))?;
        Ok(look(process))
    }

    async fn create(&self, request: CreateContainerRequest) -> Result<Process> {
        let id = check_id(&request.container_id)?;
        let mut spec: Spec =
            serde_json::from_slice(&request.spec_json).context("the configuration is broken")?;
        let dir = bundle(id);
        if dir.exists() {
            bail!("container {id} exists");
        }
        fs::create_dir_all(&dir)?;
        adapt(&mut spec, id);
        for device in &request.block_devices {
            disks::add(&mut spec, device)?;
        }
        spec.save(dir.join("config.json"))?;
        let made = self
            .launch(&["create", id], id, "", &request.stdio, None)
            .await;
        if made.is_err() {
            // As far as it was made.
            self.help(&["delete", id], Streams::none()).await.ok();
            fs::remove_dir_all(&dir).ok();
        }
        made
    }

    async fn exec(&self, request: ExecProcessRequest) -> Result<Process> {
        let id = check_id(&request.container_id)?;
        let exec_id = check_id(&request.exec_id)?;
        let key = (id.to_owned(), exec_id.to_owned());
        if self.processes.borrow().contains_key(&key) {
            bail!("container {id} has a process {exec_id}");
        }
        // Its number may be another's by now.
        if self.with(&(id.to_owned(), String::new()), |p| {
            p.end.borrow().is_some()
        })? {
            bail!("container {id} has ended");
        }
        let path = bundle(id).join(format!("process-{exec_id}.json"));
        fs::write(&path, &request.process_json).with_context(|| format!("no container {id}"))?;
        let made = self
            .launch(&["exec", id], id, exec_id, &request.stdio, Some(&path))
            .await;
        fs::remove_file(&path).ok();
        made
    }

    /// Starts a helper that makes a process, with its streams or terminal, and follows what it
    /// made.
    async fn launch(
        &self,
        operation: &[&str],
        id: &str,
        exec_id: &str,
        stdio: &Stdio,
        process: Option<&Path>,
    ) -> Result<Process> {
        let console = if stdio.terminal {
            let name = format!("console-{exec_id}.sock");
            Some(ConsoleSocket::bind(bundle(id).join(name))?)
        } else {
            None
        };
        let streams = match &console {
            Some(_) => Streams::none(),
            None => Streams::open(stdio)?,
        };
        let socket = console
            .as_ref()
            .map_or("-".into(), |c| c.path().to_string_lossy());
        let mut args = operation.to_vec();
        args.push(&socket);
        let process = process.map(|p| p.to_string_lossy());
        args.extend(process.as_deref());
        let made = self.help(&args, streams).await?;
        let pid = made.pid;
        let end = self.reaper.follow(pid);
        drop(made);
        drop(socket);
        let terminal = match console.map(|c| connect_terminal(c, stdio)).transpose() {
            Ok(terminal) => terminal,
            Err(error) => {
                kill(pid, rustix::process::Signal::KILL).ok();
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

    /// Runs a helper to its end and returns what it made.
    async fn help(&self, args: &[&str], streams: Streams) -> Result<Made> {
        let _helping = Helping::new(self);
        fs::create_dir_all("/run/koya/outcomes")?;
        let number = self.helpers.replace(self.helpers.get() + 1);
        let outcome = PathBuf::from(format!("/run/koya/outcomes/{number}"));
        let outcome_text = outcome.to_string_lossy();
        let mut all = vec![helper::ARGUMENT, args[0], args[1], &outcome_text];
        all.extend(&args[2..]);
        let child = Command::new("/proc/self/exe")
            .args(all)
            .stdin(streams.stdin)
            .stdout(streams.stdout)
            .stderr(streams.stderr)
            .spawn()
            .context("cannot start a helper")?;
        let status = reaper::wait(self.reaper.follow(child.id() as i32)).await;
        let text = fs::read_to_string(&outcome)
            .with_context(|| format!("the helper for {} ended with status {status}", args[0]))?;
        fs::remove_file(&outcome).ok();
        match text.split_once(' ') {
            Some(("pid", pid)) => Ok(Made {
                pid: pid.parse()?,
                _helping,
            }),
            Some(("error", why)) => bail!("{why}"),
            _ => bail!("the helper for {} said {text:?}", args[0]),
        }
    }

    /// Changes the devices of a running container.
    async fn change_device(
        &self,
        request: ContainerDeviceRequest,
        change: fn(&disks::Running<'_>, &BlockDevice) -> Result<()>,
    ) -> Result<Empty> {
        let id = check_id(&request.container_id)?.to_owned();
        let device = request.device.into_option().context("no device")?;
        let key = (id.clone(), String::new());
        let (pid, ended) = self.with(&key, |p| (p.pid, p.end.borrow().is_some()))?;
        if ended {
            bail!("container {id} has ended");
        }
        aside(move || change(&disks::Running { id: &id, pid }, &device)).await?;
        Ok(Empty::new())
    }

    fn signal(&self, request: &SignalProcessRequest) -> Result<()> {
        let key = (request.container_id.clone(), request.exec_id.clone());
        let (pid, ended) = self.with(&key, |p| (p.pid, p.end.borrow().is_some()))?;
        if ended {
            bail!("process not found: it has ended");
        }
        let number = i32::try_from(request.signal)?;
        let signal = rustix::process::Signal::from_named_raw(number)
            .with_context(|| format!("signal {number} is not supported"))?;
        kill(pid, signal)
    }
}

fn kill(pid: i32, signal: rustix::process::Signal) -> Result<()> {
    let pid = rustix::process::Pid::from_raw(pid).context("no process number")?;
    Ok(rustix::process::kill_process(pid, signal)?)
}

/// Takes the terminal that a helper made, and connects it to the host.
fn connect_terminal(console: ConsoleSocket, stdio: &Stdio) -> Result<OwnedFd> {
    let master = console.receive()?;
    console::resize(&master, stdio.rows, stdio.columns)?;
    let copy = rustix::io::fcntl_dupfd_cloexec(&master, 0)?;
    streams::terminal(copy, &stdio.stdin).context("cannot open a terminal's stream")?;
    Ok(master)
}

/// A name that is one component of a path.
pub(crate) fn check_id(id: &str) -> Result<&str> {
    let proper = !id.is_empty()
        && id.len() <= 128
        && !id.starts_with('.')
        && id
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    if !proper {
        bail!("{id:?} is no name for a container or process");
    }
    Ok(id)
}

/// What must be as the guest has it, whatever the configuration says.
fn adapt(spec: &mut Spec, id: &str) {
    if let Some(linux) = spec.linux_mut() {
        linux.set_cgroups_path(Some(PathBuf::from(helper::cgroup(id))));
        // A label for the host's security module, which means nothing here.
        linux.set_mount_label(None);
    }
    if let Some(process) = spec.process_mut() {
        process.set_apparmor_profile(None);
        process.set_selinux_label(None);
        // libcontainer takes "false" as a reason to load the seccomp filter too late.
        if process.no_new_privileges() == Some(false) {
            process.set_no_new_privileges(None);
        }
    }
}
