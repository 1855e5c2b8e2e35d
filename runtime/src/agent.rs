//! The agent's end of the control connection, as the host sees it.

use crate::Error;
use crate::account::Accounts;
use crate::container::Needs;
use crate::oci::SharedPids;
use crate::spec::Device;
use crate::stats::ContainerStats;
use koya_protocol::messages::{
    self, AttachDiskRequest, BlockDevice, ConnectPortRequest, ContainerDeviceRequest,
    ContainerRequest, CreateContainerRequest, DestroySandboxRequest, DetachDiskRequest,
    ExecProcessRequest, GetGuestDetailsRequest, GetOomEventRequest, GuestDetails, GuestTimes,
    Interface, MountImageRequest, RemoveContainerRequest, ReportHostEventsRequest, Route,
    SetGuestDateTimeRequest, SetOnlineCpusRequest, SignalProcessRequest, StartContainerRequest,
    Stdio, TtyWinResizeRequest, UpdateContainerRequest, UpdateInterfaceRequest,
    UpdateRoutesRequest, WaitProcessRequest,
};
use koya_protocol::{AgentClient, NOT_EXECUTABLE};
use koya_vmm::devices::fs::HostEvent;
use std::io;
use std::net::Shutdown;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime};
use ttrpc::context::{Context, with_duration};

/// How long the agent may take for what does not wait for a container.
const LIMIT: Duration = Duration::from_secs(60);

/// How long it may take to write out what the guest has not written to a disk yet.
const WRITE_OUT_LIMIT: Duration = Duration::from_secs(600);

/// How long it may take for what people do to a guest that may hang.
const SHORT_LIMIT: Duration = Duration::from_secs(5);

/// How many marks of its start it may tell of.
const MAX_MARKS: usize = 16;

/// How long a mark's name may be, in bytes.
const MAX_MARK_NAME: usize = 32;

/// Calls to the agent, from any thread. Each call blocks its own.
#[derive(Clone)]
pub(crate) struct Agent {
    client: AgentClient,
}

/// Ends the connection when the sandbox ends.
pub(crate) struct Connection(UnixStream);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.shutdown(Shutdown::Both).ok();
    }
}

/// What the agent tells of its start: each time is how long before its connection that was.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct AgentTimes {
    /// Its first instruction.
    pub(crate) took: Duration,
    /// Parts of its start that were done then.
    pub(crate) marks: Vec<(String, Duration)>,
}

impl From<GuestTimes> for AgentTimes {
    fn from(times: GuestTimes) -> Self {
        let connected = times.agent_connected_ns;
        let before = |at_ns: u64| Duration::from_nanos(connected.saturating_sub(at_ns));
        // A guest may say anything: little of it is taken, and nothing that a terminal obeys.
        let proper = |name: &str| {
            let plain = |byte: u8| byte == b' ' || byte.is_ascii_graphic();
            name.len() <= MAX_MARK_NAME && name.bytes().all(plain)
        };
        let marks = times.marks.into_iter().take(MAX_MARKS);
        Self {
            took: before(times.agent_started_ns),
            marks: marks
                .filter(|mark| proper(&mark.name))
                .map(|mark| (mark.name, before(mark.at_ns)))
                .collect(),
        }
    }
}

fn limited() -> Context {
    with_duration(LIMIT)
}

/// What the agent answered, in the caller's terms.
fn failed(operation: &'static str) -> impl FnOnce(ttrpc::Error) -> Error {
    move |error| {
        let reason = match error {
            ttrpc::Error::RpcStatus(status) => status.message().to_owned(),
            ttrpc::Error::Socket(_) => "the virtual machine has ended".into(),
            other => other.to_string(),
        };
        not_executable(&reason).unwrap_or(Error::Agent { operation, reason })
    }
}

/// `... cannot execute 127: sh: not found;...`
fn not_executable(reason: &str) -> Option<Error> {
    let (_, rest) = reason.split_once(NOT_EXECUTABLE)?;
    let (status, why) = rest.trim_start().split_once(':')?;
    let why = why.split(';').next().unwrap_or(why);
    Some(Error::NotExecutable {
        status: status.trim().parse().ok()?,
        reason: why.trim().to_owned(),
    })
}

pub(crate) fn block_device(device: &Device) -> BlockDevice {
    BlockDevice {
        guest_name: device.name.clone(),
        path: device.path.to_string_lossy().into(),
        read_only: device.read_only,
        ..Default::default()
    }
}

fn container_request(id: &str) -> ContainerRequest {
    ContainerRequest {
        container_id: id.into(),
        ..Default::default()
    }
}

fn device_request(id: &str, device: &Device) -> ContainerDeviceRequest {
    ContainerDeviceRequest {
        container_id: id.into(),
        device: Some(block_device(device)).into(),
        ..Default::default()
    }
}

impl Agent {
    pub(crate) fn connect(stream: UnixStream) -> io::Result<(Self, Connection)> {
        // The client polls by itself and wants a socket that blocks.
        stream.set_nonblocking(false)?;
        let connection = Connection(stream.try_clone()?);
        let client = ttrpc::Client::new(OwnedFd::from(stream).into_raw_fd())
            .map_err(|e| io::Error::other(e.to_string()))?;
        let client = AgentClient::new(client);
        Ok((Self { client }, connection))
    }

    pub(crate) fn details(&self) -> Result<GuestDetails, Error> {
        self.client
            .get_guest_details(limited(), &GetGuestDetailsRequest::new())
            .map_err(failed("ask the agent for details"))
    }

    pub(crate) fn create(
        &self,
        id: &str,
        spec: Vec<u8>,
        needs: Needs,
        stdio: Stdio,
    ) -> Result<i32, Error> {
        // Of a disk that was not taken out in order, the journal comes first.
        let limit = match needs.direct.is_empty() {
            true => limited(),
            false => with_duration(WRITE_OUT_LIMIT),
        };
        let sandbox_pidns = needs.pids == SharedPids::Sandbox;
        let pidns_of = match needs.pids {
            SharedPids::Container(id) => id,
            _ => String::new(),
        };
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec_json: spec,
            block_devices: needs.devices,
            stdio: Some(stdio).into(),
            sandbox_pidns,
            pidns_of,
            ephemeral_volumes: needs.volumes,
            disk_volumes: needs.direct,
            shared_volumes: needs.shared,
            ..Default::default()
        };
        self.client
            .create_container(limit, &request)
            .map(|process| process.pid)
            .map_err(failed("create the container"))
    }

    pub(crate) fn start(&self, id: &str) -> Result<(), Error> {
        let request = StartContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.client
            .start_container(limited(), &request)
            .map(drop)
            .map_err(failed("start the container"))
    }

    pub(crate) fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: Vec<u8>,
        stdio: Stdio,
    ) -> Result<i32, Error> {
        let request = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process_json: process,
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        self.client
            .exec_process(limited(), &request)
            .map(|process| process.pid)
            .map_err(failed("run a process in the container"))
    }

    pub(crate) fn signal(
        &self,
        id: &str,
        exec_id: &str,
        signal: i32,
        all: bool,
    ) -> Result<(), Error> {
        let request = SignalProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            signal: signal as u32,
            all,
            ..Default::default()
        };
        self.client
            .signal_process(with_duration(SHORT_LIMIT), &request)
            .map(drop)
            .map_err(failed("signal the process"))
    }

    pub(crate) fn pause(&self, id: &str) -> Result<(), Error> {
        self.client
            .pause_container(limited(), &container_request(id))
            .map(drop)
            .map_err(failed("pause the container"))
    }

    pub(crate) fn resume(&self, id: &str) -> Result<(), Error> {
        self.client
            .resume_container(limited(), &container_request(id))
            .map(drop)
            .map_err(failed("resume the container"))
    }

    pub(crate) fn container_stats(&self, id: &str) -> Result<ContainerStats, Error> {
        self.client
            .stats_container(with_duration(SHORT_LIMIT), &container_request(id))
            .map(ContainerStats::from)
            .map_err(failed("ask for the container's figures"))
    }

    pub(crate) fn update_container(&self, id: &str, resources: Vec<u8>) -> Result<(), Error> {
        let request = UpdateContainerRequest {
            container_id: id.into(),
            resources_json: resources,
            ..Default::default()
        };
        self.client
            .update_container(limited(), &request)
            .map(drop)
            .map_err(failed("change the container's limits"))
    }

    /// Waits as long as it takes.
    pub(crate) fn wait(&self, id: &str, exec_id: &str) -> Result<i32, Error> {
        let request = WaitProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.client
            .wait_process(Context::default(), &request)
            .map(|response| response.status)
            .map_err(failed("wait for the process"))
    }

    pub(crate) fn resize(
        &self,
        id: &str,
        exec_id: &str,
        rows: u32,
        columns: u32,
    ) -> Result<(), Error> {
        let request = TtyWinResizeRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            rows,
            columns,
            ..Default::default()
        };
        self.client
            .tty_win_resize(limited(), &request)
            .map(drop)
            .map_err(failed("resize the terminal"))
    }

    pub(crate) fn remove(&self, id: &str) -> Result<(), Error> {
        let request = RemoveContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.client
            .remove_container(with_duration(WRITE_OUT_LIMIT), &request)
            .map(drop)
            .map_err(failed("remove the container"))
    }

    /// Sets the guest's clock, which has none of its own that survives; returns what the agent tells of
    /// its start.
    pub(crate) fn set_time(&self) -> Result<AgentTimes, Error> {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let request = SetGuestDateTimeRequest {
            seconds: now.as_secs() as i64,
            nanoseconds: now.subsec_nanos().into(),
            ..Default::default()
        };
        self.client
            .set_guest_date_time(limited(), &request)
            .map(AgentTimes::from)
            .map_err(failed("set the guest's clock"))
    }

    /// Joins a TCP port of the guest's loopback to the stream with this token.
    pub(crate) fn connect_port(&self, port: u16, token: &str) -> Result<(), Error> {
        let request = ConnectPortRequest {
            port: port.into(),
            token: token.into(),
            ..Default::default()
        };
        self.client
            .connect_port(limited(), &request)
            .map(drop)
            .map_err(failed("connect to a port of the guest's"))
    }

    /// Sets up an interface of the guest's.
    pub(crate) fn update_interface(&self, interface: Interface) -> Result<(), Error> {
        let request = UpdateInterfaceRequest {
            interface: Some(interface).into(),
            ..Default::default()
        };
        self.client
            .update_interface(limited(), &request)
            .map(drop)
            .map_err(failed("set up the guest's network"))
    }

    /// Adds routes to the guest's.
    pub(crate) fn update_routes(&self, routes: Vec<Route>) -> Result<(), Error> {
        let request = UpdateRoutesRequest {
            routes,
            ..Default::default()
        };
        self.client
            .update_routes(limited(), &request)
            .map(drop)
            .map_err(failed("set up the guest's routes"))
    }

    /// Mounts a disk's file system as a container's root.
    pub(crate) fn mount_image(&self, id: &str, disk: &str) -> Result<(), Error> {
        let request = MountImageRequest {
            container_id: id.into(),
            guest_name: disk.into(),
            ..Default::default()
        };
        self.client
            .mount_image(limited(), &request)
            .map(drop)
            .map_err(failed("mount the image"))
    }

    /// Takes it away.
    pub(crate) fn unmount_image(&self, id: &str) -> Result<(), Error> {
        self.client
            .unmount_image(limited(), &container_request(id))
            .map(drop)
            .map_err(failed("unmount the image"))
    }

    /// Who the users in it are.
    pub(crate) fn accounts(&self, id: &str) -> Result<Accounts, Error> {
        let found = self
            .client
            .get_accounts(limited(), &container_request(id))
            .map_err(failed("read the image's users"))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Accounts {
            passwd: text(&found.passwd),
            groups: text(&found.group),
        })
    }

    /// Has the guest's kernel look at a window that was empty, and returns its name of the disk there.
    pub(crate) fn attach_disk(&self, window: usize) -> Result<String, Error> {
        let request = AttachDiskRequest {
            window: window as u32,
            ..Default::default()
        };
        self.client
            .attach_disk(limited(), &request)
            .map(|disk| disk.guest_name)
            .map_err(failed("attach the disk in the guest"))
    }

    /// Has the guest's kernel let go of the disk behind a window.
    pub(crate) fn detach_disk(&self, window: usize) -> Result<(), Error> {
        let request = DetachDiskRequest {
            window: window as u32,
            ..Default::default()
        };
        self.client
            .detach_disk(with_duration(WRITE_OUT_LIMIT), &request)
            .map(drop)
            .map_err(failed("detach the disk in the guest"))
    }

    /// Gives a running container a disk.
    pub(crate) fn add_device(&self, id: &str, device: &Device) -> Result<(), Error> {
        self.client
            .add_device(limited(), &device_request(id, device))
            .map(drop)
            .map_err(failed("give the container a disk"))
    }

    /// Takes it away.
    pub(crate) fn remove_device(&self, id: &str, device: &Device) -> Result<(), Error> {
        self.client
            .remove_device(limited(), &device_request(id, device))
            .map(drop)
            .map_err(failed("take the disk from the container"))
    }

    /// Turns CPUs on or off until so many are on.
    pub(crate) fn set_online_cpus(&self, count: u32) -> Result<(), Error> {
        let request = SetOnlineCpusRequest {
            count,
            ..Default::default()
        };
        self.client
            .set_online_cpus(limited(), &request)
            .map(drop)
            .map_err(failed("turn CPUs on or off"))
    }

    /// Waits for the next container in which the guest's kernel killed processes for their memory: its
    /// name, and how many it killed there so far.
    pub(crate) fn next_oom(&self) -> Result<(String, u64), Error> {
        let event = self
            .client
            .get_oom_event(Context::default(), &GetOomEventRequest::new())
            .map_err(failed("wait for a lack of memory"))?;
        Ok((event.container_id, event.oom_kills))
    }

    /// Tells the guest's watches of changes on the host.
    pub(crate) fn report_host_events(&self, events: Vec<HostEvent>) -> Result<(), Error> {
        let told = |event: HostEvent| messages::HostEvent {
            nodeid: event.nodeid,
            mask: event.mask,
            cookie: event.cookie,
            name: event.name,
            ..Default::default()
        };
        let request = ReportHostEventsRequest {
            events: events.into_iter().map(told).collect(),
            ..Default::default()
        };
        self.client
            .report_host_events(limited(), &request)
            .map(drop)
            .map_err(failed("tell the guest of changes on the host"))
    }

    pub(crate) fn destroy(&self) -> Result<(), Error> {
        self.client
            .destroy_sandbox(with_duration(SHORT_LIMIT), &DestroySandboxRequest::new())
            .map(drop)
            .map_err(failed("end the guest"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_is_taken_of_what_an_agent_says_of_its_start() {
        let mark = |name: &str, at_ns| messages::GuestMark {
            name: name.into(),
            at_ns,
            ..Default::default()
        };
        let mut times = GuestTimes {
            agent_started_ns: 70,
            agent_connected_ns: 100,
            marks: vec![mark("mounts", 90), mark("\x1b[2J", 91), mark("later", 200)],
            ..Default::default()
        };
        let told = AgentTimes::from(times.clone());
        let nanos = Duration::from_nanos;
        assert_eq!(told.took, nanos(30));
        let expected = [("mounts".to_owned(), nanos(10)), ("later".into(), nanos(0))];
        assert_eq!(told.marks, expected);
        times.marks = vec![mark(&"x".repeat(MAX_MARK_NAME + 1), 1)];
        assert_eq!(AgentTimes::from(times.clone()).marks, []);
        times.marks = vec![mark("again", 1); 1000];
        assert_eq!(AgentTimes::from(times).marks.len(), MAX_MARKS);
    }

    #[test]
    fn a_program_that_is_not_there_has_a_shells_status() {
        let text = "failed to create container: error in executing process : cannot execute 127: \
                    nope: not found in PATH (/bin);";
        let Some(Error::NotExecutable { status, reason }) = not_executable(text) else {
            panic!()
        };
        assert_eq!(
            (status, reason.as_str()),
            (127, "nope: not found in PATH (/bin)")
        );
        assert!(not_executable("something else").is_none());
    }
}
