//! The service for the host (`agent/protocol/proto/agent.proto`), on the one connection that the agent makes before any
//! container exists.

use crate::blocking::run_blocking;
use crate::cgroup;
use crate::checks::check_id;
use crate::clock;
use crate::console;
use crate::cpus;
use crate::details;
use crate::disks;
use crate::images;
use crate::names;
use crate::network;
use crate::reaper;
use crate::slots;
use crate::state::{State, Streams};
use crate::sysctl;
use crate::watches;
use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use futures::StreamExt as _;
use koya_protocol::messages::{
    Accounts, AdjustClockRequest, AskNameServerRequest, AttachDiskRequest, AttachNetworkRequest,
    ConnectPortRequest, ConnectSocketRequest, ContainerDeviceRequest, ContainerRequest,
    ContainerStats, CreateContainerRequest, DestroySandboxRequest, DetachDiskRequest,
    DetachNetworkRequest, Disk, Empty, ExecProcessRequest, GetClockRequest, GetGuestDetailsRequest,
    GetOomEventRequest, GuestClock, GuestDetails, GuestTimes, MountImageRequest, NameServerAnswer,
    OomEvent, Process, RemoveContainerRequest, ReportHostEventsRequest, ServeNamesRequest,
    SetGuestDateTimeRequest, SetOnlineCpusRequest, SetSysctlsRequest, SignalProcessRequest,
    StartContainerRequest, TtyWinResizeRequest, UpdateContainerRequest, UpdateInterfaceRequest,
    UpdateRoutesRequest, WaitProcessRequest, WaitProcessResponse,
};
use koya_protocol::{Agent, CONTROL_PORT, ErrorReason, create_agent};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};
use ttrpc::Code;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, TtrpcContext};

/// A request to be executed on the agent's main thread.
type Work = Box<dyn FnOnce(State) -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// ttrpc requires a service that can move between threads; the state can't. So the service sends work to the task that owns
/// the state, which runs each piece as a separate task.
struct Service {
    work: mpsc::UnboundedSender<Work>,
    /// Times of the start.
    times: GuestTimes,
}

impl Service {
    /// Does `what` on the agent's main thread, which has the state, and waits for its result.
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
            let text = format!("{error:#}");
            ttrpc::Error::RpcStatus(match error.downcast_ref::<ErrorReason>() {
                Some(refused) => refused.status(&text),
                None => ttrpc::get_status(Code::UNKNOWN, text),
            })
        })
    }
}

/// Connects to the host and serves it until the guest ends.
pub(crate) async fn serve(mut times: GuestTimes) -> Result<()> {
    let address = VsockAddr::new(VMADDR_CID_HOST, CONTROL_PORT);
    let control = VsockStream::connect(address)
        .await
        .context("cannot reach the host over vsock")?;
    times.agent_connected_ns = details::uptime_ns();
    let (work, mut pieces) = mpsc::unbounded_channel::<Work>();
    // The stream of connections yields one and never ends, since a server stops at the end of its listener.
    let one = futures::stream::iter([std::io::Result::Ok(control)]);
    let listener = Listener::new(one.chain(futures::stream::pending()));
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(create_agent(Arc::new(Service { work, times })));
    server.start().await.context("cannot serve the host")?;

    let state = State::default();
    let local = tokio::task::LocalSet::new();
    local
        .run_until(async move {
            let reaper = tokio::task::spawn_local(state.reaper.clone().run());
            let ooms = tokio::task::spawn_local(state.ooms.clone().run());
            while let Some(piece) = pieces.recv().await {
                tokio::task::spawn_local(piece(state.clone()));
            }
            reaper.abort();
            ooms.abort();
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
            if key.1.is_empty() {
                // The host expects no more of its messages after this reply. It is forgotten with the container.
                state.close_notify_socket(&key.0).await;
            } else {
                // An exec process is forgotten once its exit has been reported.
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
                None => bail!(ErrorReason::Invalid("the process has no terminal".into())),
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
            state.remove(&request.container_id).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn set_guest_date_time(
        &self,
        _: &TtrpcContext,
        request: SetGuestDateTimeRequest,
    ) -> ttrpc::Result<GuestTimes> {
        let times = self.times.clone();
        self.ask(async move |_: State| {
            let time = rustix::time::Timespec {
                tv_sec: request.seconds,
                tv_nsec: request.nanoseconds,
            };
            rustix::time::clock_settime(rustix::time::ClockId::Realtime, time)?;
            Ok(times)
        })
        .await
    }

    async fn get_clock(&self, _: &TtrpcContext, _: GetClockRequest) -> ttrpc::Result<GuestClock> {
        self.ask(async move |_: State| Ok(clock::read())).await
    }

    async fn adjust_clock(
        &self,
        _: &TtrpcContext,
        request: AdjustClockRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |_: State| {
            clock::adjust(request.by_ns)?;
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

    async fn connect_socket(
        &self,
        _: &TtrpcContext,
        request: ConnectSocketRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |state: State| {
            state.connect_socket(&request).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn serve_names(
        &self,
        _: &TtrpcContext,
        request: ServeNamesRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |_: State| {
            names::serve(request.address.parse()?, &request.token).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn ask_name_server(
        &self,
        _: &TtrpcContext,
        request: AskNameServerRequest,
    ) -> ttrpc::Result<NameServerAnswer> {
        self.ask(async move |_: State| {
            let address = request.address.parse()?;
            let answer = names::ask(address, &request.question, request.over_tcp).await?;
            Ok(NameServerAnswer {
                answer,
                ..Default::default()
            })
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

    async fn attach_network(
        &self,
        _: &TtrpcContext,
        request: AttachNetworkRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |_: State| {
            run_blocking(move || network::attach(request.slot)).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn detach_network(
        &self,
        _: &TtrpcContext,
        request: DetachNetworkRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |_: State| {
            match request.slot {
                Some(slot) => run_blocking(move || slots::release(slot)).await?,
                None => {
                    let interface = request.interface.into_option().context("no interface")?;
                    network::detach(&interface).await?;
                }
            }
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
            network::routes::update(&request).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn set_sysctls(
        &self,
        _: &TtrpcContext,
        request: SetSysctlsRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |_: State| {
            sysctl::set_all(&request.values)?;
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
            run_blocking(move || images::mount_image(&id, &disk)).await?;
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
            run_blocking(move || images::unmount_image(&id)).await?;
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
            run_blocking(move || {
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
                guest_name: run_blocking(move || disks::attach(request.slot)).await?,
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
            run_blocking(move || disks::detach(request.slot)).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn add_device(
        &self,
        _: &TtrpcContext,
        request: ContainerDeviceRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |state: State| state.change_device(request, disks::add_device).await)
            .await
    }

    async fn remove_device(
        &self,
        _: &TtrpcContext,
        request: ContainerDeviceRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |state: State| state.change_device(request, disks::remove_device).await)
            .await
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |state: State| state.freeze(request, true).await)
            .await
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |state: State| state.freeze(request, false).await)
            .await
    }

    async fn stats_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ContainerStats> {
        self.ask(async move |_: State| {
            let id = check_id(&request.container_id)?.to_owned();
            run_blocking(move || cgroup::stats(&id)).await
        })
        .await
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |_: State| {
            let id = check_id(&request.container_id)?.to_owned();
            run_blocking(move || cgroup::update(&id, &request.resources_json)).await?;
            Ok(Empty::new())
        })
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

    async fn get_oom_event(
        &self,
        _: &TtrpcContext,
        _: GetOomEventRequest,
    ) -> ttrpc::Result<OomEvent> {
        self.ask(async |state: State| {
            let (container_id, oom_kills) = state.ooms.next().await;
            Ok(OomEvent {
                container_id,
                oom_kills,
                ..Default::default()
            })
        })
        .await
    }

    async fn report_host_events(
        &self,
        _: &TtrpcContext,
        request: ReportHostEventsRequest,
    ) -> ttrpc::Result<Empty> {
        self.ask(async move |_: State| {
            run_blocking(move || watches::fire(&request.events)).await?;
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
                // The reply is sent first.
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
