//! The host's side of the control connection to the agent.

mod answer;
mod network;
mod times;

use crate::account::Accounts;
use crate::container_config::Device;
use crate::guest_resources::GuestResources;
use crate::oci::{SharedNamespaces, SharedPidNamespace};
use crate::patience::WRITE_OUT_LIMIT;
use crate::stats::ContainerStats;
use crate::sync::Turns;
use crate::{Error, ErrorKind};
use answer::failed;
use koya_protocol::AgentClient;
use koya_protocol::messages::{
    self, AdjustClockRequest, AttachDiskRequest, BlockDevice, ContainerDeviceRequest,
    ContainerRequest, CreateContainerRequest, DestroySandboxRequest, DetachDiskRequest,
    ExecProcessRequest, GetClockRequest, GetGuestDetailsRequest, GetOomEventRequest, GuestDetails,
    MountImageRequest, RemoveContainerRequest, ReportHostEventsRequest, SetGuestDateTimeRequest,
    SetOnlineCpusRequest, SignalProcessRequest, StartContainerRequest, Stdio, TtyWinResizeRequest,
    UpdateContainerRequest, WaitProcessRequest,
};
use koya_vmm::devices::fs::HostEvent;
use koya_vmm::guest_text;
pub(crate) use network::FORWARD_DNS;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::net::Shutdown;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
pub(crate) use times::AgentTimes;
use ttrpc::context::{Context, with_duration};

/// Time limit for calls that do not wait for a container.
const LIMIT: Duration = Duration::from_secs(60);

/// First and longest interval between repeated waits for a process without a time limit: a request that is in flight when
/// the agent hangs up is never answered.
const ASK_AGAIN: Duration = Duration::from_secs(2);
const ASK_AGAIN_MAX: Duration = Duration::from_secs(3600);

/// Time limit for user requests to a guest that may hang.
const SHORT_LIMIT: Duration = Duration::from_secs(5);

/// Time limit for queries of the agent's state.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Time limit for calls that delay the removal of a container.
const ORDER_LIMIT: Duration = Duration::from_secs(15);

/// Maximum number of processes being created at a time: the agent needs several helper processes for each.
const MAX_EXECS: usize = 16;

/// Maximum size of an OCI configuration or process as JSON, in bytes: the rest of ttrpc's message limit of 4 MiB is for the
/// other fields.
const MAX_JSON: usize = (4 << 20) - (64 << 10);

/// Maximum number of connections being made at a time: lower than the number that may wait for acceptance here.
const MAX_CONNECTS: usize = 64;

/// Client of the agent, for any thread. Each call blocks the calling thread.
#[derive(Clone)]
pub(crate) struct Agent {
    client: AgentClient,
    stream: Arc<UnixStream>,
    execs: Arc<Turns>,
    connects: Arc<Turns>,
}

/// Ends the connection when the sandbox ends.
pub(crate) struct Connection(Arc<UnixStream>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.shutdown(Shutdown::Both).ok();
    }
}

/// Validates the name of a disk, which becomes part of paths.
fn disk_name(name: String) -> Result<String, Error> {
    let proper = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    if name.is_empty() || name.len() > 16 || !name.bytes().all(proper) {
        return Err(Error::Agent {
            operation: "attach the disk in the guest",
            kind: ErrorKind::Guest,
            reason: "the agent returned an invalid name".into(),
        });
    }
    Ok(name)
}

pub(crate) fn block_device(device: &Device) -> BlockDevice {
    BlockDevice {
        guest_name: device.name.clone(),
        path: device.path.to_string_lossy().into(),
        read_only: device.read_only,
        ..Default::default()
    }
}

fn check_size(field: &'static str, json: &[u8]) -> Result<(), Error> {
    if json.len() <= MAX_JSON {
        return Ok(());
    }
    let reason = format!("{} bytes of JSON are more than {MAX_JSON}", json.len());
    Err(Error::invalid(field, reason))
}

/// The status of a process: eight bits (wait(2)), whatever number the guest reports.
fn exit_status(reported: i32) -> i32 {
    u8::try_from(reported).unwrap_or(u8::MAX).into()
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
        // The client does its own polling and requires a blocking socket.
        stream.set_nonblocking(false)?;
        let own = Arc::new(stream.try_clone()?);
        let connection = Connection(own.clone());
        let client = ttrpc::Client::new(OwnedFd::from(stream).into_raw_fd())
            .map_err(|e| io::Error::other(e.to_string()))?;
        let client = AgentClient::new(client);
        let agent = Self {
            client,
            stream: own,
            execs: Arc::default(),
            connects: Arc::default(),
        };
        Ok((agent, connection))
    }

    /// An agent that has closed its sending side has hung up, even if it still accepts requests: there will be no replies,
    /// so both directions are shut down and each request fails at once.
    fn check_hung_up(&self) {
        let mut polled = [PollFd::new(&*self.stream, PollFlags::RDHUP)];
        let now = Timespec::default();
        if poll(&mut polled, Some(&now)).is_ok_and(|count| count > 0) {
            self.stream.shutdown(Shutdown::Both).ok();
        }
    }

    /// Makes a call with a time limit; `Duration::MAX` means no limit.
    fn ask<T>(
        &self,
        operation: &'static str,
        limit: Duration,
        call: impl FnOnce(&AgentClient, Context) -> ttrpc::Result<T>,
    ) -> Result<T, Error> {
        // A connection with broken messages is not read any more, so only the time limit ends a call: a fuzzer cannot wait
        // for minutes.
        let limit = match cfg!(fuzzing) {
            true => limit.min(Duration::from_secs(2)),
            false => limit,
        };
        let context = match limit {
            Duration::MAX => Context::default(),
            limit => with_duration(limit),
        };
        self.check_hung_up();
        let started = Instant::now();
        call(&self.client, context).map_err(|error| {
            let waited = started.elapsed();
            failed(operation, error, (waited >= limit).then_some(waited))
        })
    }

    pub(crate) fn details(&self) -> Result<GuestDetails, Error> {
        self.ask("ask the agent for details", SHORT_LIMIT, |client, limit| {
            client.get_guest_details(limit, &GetGuestDetailsRequest::new())
        })
    }

    pub(crate) fn create(
        &self,
        id: &str,
        spec: Vec<u8>,
        needs: GuestResources,
        stdio: Stdio,
    ) -> Result<i32, Error> {
        check_size("configuration", &spec)?;
        // The journal of a disk that was not unmounted cleanly is replayed first.
        let limit = match needs.direct.is_empty() {
            true => LIMIT,
            false => WRITE_OUT_LIMIT,
        };
        let SharedNamespaces { pids, ipc, uts } = needs.namespaces;
        let sandbox_pidns = pids == SharedPidNamespace::Sandbox;
        let pidns_of = match pids {
            SharedPidNamespace::Container(id) => id,
            _ => String::new(),
        };
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec_json: spec,
            block_devices: needs.devices,
            stdio: Some(stdio).into(),
            sandbox_pidns,
            pidns_of,
            ipcns_of: ipc.unwrap_or_default(),
            utsns_of: uts.unwrap_or_default(),
            ephemeral_volumes: needs.volumes,
            disk_volumes: needs.direct,
            shared_volumes: needs.shared,
            guest_devices: needs.guest_devices,
            omit_terminals: needs.omit_terminals,
            files: needs.files,
            ..Default::default()
        };
        self.ask("create the container", limit, |client, limit| {
            client.create_container(limit, &request)
        })
        .map(|process| process.pid)
    }

    pub(crate) fn start(&self, id: &str) -> Result<(), Error> {
        let request = StartContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.ask("start the container", LIMIT, |client, limit| {
            client.start_container(limit, &request)
        })
        .map(drop)
    }

    pub(crate) fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: Vec<u8>,
        stdio: Stdio,
        cgroup: &str,
    ) -> Result<i32, Error> {
        check_size("process", &process)?;
        let request = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process_json: process,
            stdio: Some(stdio).into(),
            cgroup: cgroup.into(),
            ..Default::default()
        };
        // Time spent waiting for a turn does not count towards the limit.
        self.execs.take(MAX_EXECS, || {
            self.ask("run a process in the container", LIMIT, |client, limit| {
                client.exec_process(limit, &request)
            })
            .map(|process| process.pid)
        })
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
        self.ask("signal the process", SHORT_LIMIT, |client, limit| {
            client.signal_process(limit, &request)
        })
        .map(drop)
    }

    pub(crate) fn pause(&self, id: &str) -> Result<(), Error> {
        self.ask("pause the container", ORDER_LIMIT, |client, limit| {
            client.pause_container(limit, &container_request(id))
        })
        .map(drop)
    }

    pub(crate) fn resume(&self, id: &str) -> Result<(), Error> {
        self.ask("resume the container", ORDER_LIMIT, |client, limit| {
            client.resume_container(limit, &container_request(id))
        })
        .map(drop)
    }

    pub(crate) fn container_stats(&self, id: &str) -> Result<ContainerStats, Error> {
        self.ask(
            "ask for the container's figures",
            SHORT_LIMIT,
            |client, limit| client.stats_container(limit, &container_request(id)),
        )
        .map(ContainerStats::from)
    }

    pub(crate) fn update_container(&self, id: &str, resources: Vec<u8>) -> Result<(), Error> {
        let request = UpdateContainerRequest {
            container_id: id.into(),
            resources_json: resources,
            ..Default::default()
        };
        self.ask(
            "change the container's limits",
            ORDER_LIMIT,
            |client, limit| client.update_container(limit, &request),
        )
        .map(drop)
    }

    /// Waits without a time limit.
    pub(crate) fn wait(&self, id: &str, exec_id: &str) -> Result<i32, Error> {
        let request = WaitProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        // The exit status of an exec process is forgotten once it is reported, so there is only one request for it.
        let mut limit = match exec_id.is_empty() {
            true => ASK_AGAIN,
            false => Duration::MAX,
        };
        loop {
            let asked = Instant::now();
            let answer = self.ask("wait for the process", limit, |client, limit| {
                client.wait_process(limit, &request)
            });
            match answer {
                // Only an expired limit counts, not an immediate error from the agent.
                Err(Error::Timeout { .. }) if asked.elapsed() > limit / 2 => {
                    limit = ASK_AGAIN_MAX.min(limit * 2);
                }
                answer => return answer.map(|response| exit_status(response.status)),
            }
        }
    }

    /// Checks whether a container's first process has ended, with a short wait.
    ///
    /// # Errors
    /// If the agent does not confirm it.
    pub(crate) fn has_ended(&self, id: &str) -> Result<(), Error> {
        let request = WaitProcessRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.ask(
            "learn of the process's end",
            ANSWER_LIMIT,
            |client, limit| client.wait_process(limit, &request),
        )
        .map(drop)
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
        self.ask("resize the terminal", ORDER_LIMIT, |client, limit| {
            client.tty_win_resize(limit, &request)
        })
        .map(drop)
    }

    pub(crate) fn remove(&self, id: &str) -> Result<(), Error> {
        let request = RemoveContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.ask("remove the container", WRITE_OUT_LIMIT, |client, limit| {
            client.remove_container(limit, &request)
        })
        .map(drop)
    }

    /// Sets the guest's clock, which has no persistent time; returns the agent's start-up times.
    pub(crate) fn set_time(&self) -> Result<AgentTimes, Error> {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let request = SetGuestDateTimeRequest {
            seconds: now.as_secs() as i64,
            nanoseconds: now.subsec_nanos().into(),
            ..Default::default()
        };
        self.ask("set the guest's clock", LIMIT, |client, limit| {
            client.set_guest_date_time(limit, &request)
        })
        .map(AgentTimes::from)
    }

    /// The guest's clock, in nanoseconds since 1970.
    pub(crate) fn clock(&self) -> Result<i64, Error> {
        self.ask("read the guest's clock", SHORT_LIMIT, |client, limit| {
            client.get_clock(limit, &GetClockRequest::new())
        })
        .map(|clock| clock.now_ns)
    }

    /// Adjusts the guest's clock.
    pub(crate) fn adjust_clock(&self, by_ns: i64) -> Result<(), Error> {
        let request = AdjustClockRequest {
            by_ns,
            ..Default::default()
        };
        self.ask("set the guest's clock", SHORT_LIMIT, |client, limit| {
            client.adjust_clock(limit, &request)
        })
        .map(drop)
    }

    /// Mounts a disk's file system as a container's root.
    pub(crate) fn mount_image(&self, id: &str, disk: &str) -> Result<(), Error> {
        let request = MountImageRequest {
            container_id: id.into(),
            guest_name: disk.into(),
            ..Default::default()
        };
        self.ask("mount the image", LIMIT, |client, limit| {
            client.mount_image(limit, &request)
        })
        .map(drop)
    }

    /// Unmounts it.
    pub(crate) fn unmount_image(&self, id: &str) -> Result<(), Error> {
        self.ask("unmount the image", ORDER_LIMIT, |client, limit| {
            client.unmount_image(limit, &container_request(id))
        })
        .map(drop)
    }

    /// The user databases in it.
    pub(crate) fn accounts(&self, id: &str) -> Result<Accounts, Error> {
        let found = self.ask("read the image's users", LIMIT, |client, limit| {
            client.get_accounts(limit, &container_request(id))
        })?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Accounts {
            passwd: text(&found.passwd),
            groups: text(&found.group),
        })
    }

    /// Makes the guest kernel probe a hot-plug slot; returns the guest's name of the disk in it.
    pub(crate) fn attach_disk(&self, slot: usize) -> Result<String, Error> {
        let request = AttachDiskRequest {
            slot: slot as u32,
            ..Default::default()
        };
        self.ask("attach the disk in the guest", LIMIT, |client, limit| {
            client.attach_disk(limit, &request)
        })
        .and_then(|disk| disk_name(disk.guest_name))
    }

    /// Makes the guest kernel release the disk in a hot-plug slot.
    pub(crate) fn detach_disk(&self, slot: usize) -> Result<(), Error> {
        let request = DetachDiskRequest {
            slot: slot as u32,
            ..Default::default()
        };
        self.ask(
            "detach the disk in the guest",
            WRITE_OUT_LIMIT,
            |client, limit| client.detach_disk(limit, &request),
        )
        .map(drop)
    }

    /// Adds a disk to a running container.
    pub(crate) fn add_device(&self, id: &str, device: &Device) -> Result<(), Error> {
        self.ask("give the container a disk", LIMIT, |client, limit| {
            client.add_device(limit, &device_request(id, device))
        })
        .map(drop)
    }

    /// Removes a disk from a running container.
    pub(crate) fn remove_device(&self, id: &str, device: &Device) -> Result<(), Error> {
        self.ask(
            "take the disk from the container",
            LIMIT,
            |client, limit| client.remove_device(limit, &device_request(id, device)),
        )
        .map(drop)
    }

    /// Turns CPUs on or off until this number is online.
    pub(crate) fn set_online_cpus(&self, count: u32) -> Result<(), Error> {
        let request = SetOnlineCpusRequest {
            count,
            ..Default::default()
        };
        self.ask("turn CPUs on or off", LIMIT, |client, limit| {
            client.set_online_cpus(limit, &request)
        })
        .map(drop)
    }

    /// Waits for the next container with processes killed by the guest's OOM killer: returns its name and the number killed
    /// so far.
    pub(crate) fn next_oom(&self) -> Result<(String, u64), Error> {
        let event = self.ask(
            "wait for a lack of memory",
            Duration::MAX,
            |client, limit| client.get_oom_event(limit, &GetOomEventRequest::new()),
        )?;
        Ok((
            guest_text::sanitize_line(event.container_id),
            event.oom_kills,
        ))
    }

    /// Reports changes on the host to the guest's watches.
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
        self.ask(
            "tell the guest of changes on the host",
            LIMIT,
            |client, limit| client.report_host_events(limit, &request),
        )
        .map(drop)
    }

    pub(crate) fn destroy(&self) -> Result<(), Error> {
        self.ask("end the guest", SHORT_LIMIT, |client, limit| {
            client.destroy_sandbox(limit, &DestroySandboxRequest::new())
        })
        .map(drop)
    }
}

#[cfg(test)]
mod tests;
