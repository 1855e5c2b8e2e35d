//! A sandbox: a virtual machine with the agent in it.

use crate::Error;
use crate::agent::{Agent, Connection, FORWARD_DNS};
use crate::apparmor::confined;
use crate::clock::Clock;
use crate::config::SandboxConfig;
use crate::console::Console;
use crate::container::Container;
use crate::container_config::{ContainerConfig, Device};
use crate::error::LAST_WORDS;
use crate::network::{NetworkConfig, Routing, Takeover};
use crate::patience::{DiskWork, DiskWrites, SILENCE, WRITE_OUT_LIMIT, while_disks_work};
use crate::ref_counted::{Ref, RefCountedMap};
use crate::size::Limits;
use crate::streams::Streams;
use crate::sync::{lock, wait};
use crate::termination::{Terminator, Timeouts};
use crate::timeline::{Lane, Recorder, Timeline};
use koya_protocol::{CONTROL_PORT, SHARED_TAG};
use koya_vmm::devices::blk::BlockHandle;
use koya_vmm::devices::fs::passthrough::Options;
use koya_vmm::devices::fs::{Fs, FsMetrics, HostEvents, Shares};
use koya_vmm::devices::net::NetHandle;
use koya_vmm::devices::vsock::{FIRST_GUEST_CID, Listener, Ports, UnixSockets, Vsock};
use koya_vmm::guest_text::{self, Warnings};
use koya_vmm::host::{threads, walls::confine_new_threads};
use koya_vmm::{AttachedDisk, DiskConfig, ExitReason, Vm, VmHandle};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Time limit for the guest from its first instruction to the agent's connection.
const AGENT_LIMIT: Duration = Duration::from_secs(60);
/// Time limit for an orderly shutdown of a guest that writes nothing to a disk; then it is stopped.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// Time limit for the kernel panic of a guest whose agent has ended.
const PANIC_LIMIT: Duration = Duration::from_secs(2);
/// Maximum number of virtio-fs request queues: the guest kernel divides them among its CPUs, and each has its own threads
/// here.
const FS_QUEUES: u32 = 4;
/// Interval at which a wait checks whether the virtual machine still runs.
pub(crate) const LOOK: Duration = Duration::from_millis(50);

/// Resource usage of guest and agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxStats {
    /// The guest kernel's release.
    pub kernel_release: String,
    /// Time since the guest kernel's start.
    pub uptime: Duration,
    /// Memory of the guest, in bytes.
    pub memory_total: u64,
    /// Available part of it, in bytes.
    pub memory_available: u64,
    /// CPUs that are online.
    pub cpus_online: u32,
    /// Processes in the guest.
    pub processes: u32,
    /// Descriptors that the agent has open.
    pub agent_descriptors: u32,
    /// Threads of the agent.
    pub agent_threads: u32,
}

/// A disk attached to a running sandbox.
#[derive(Clone)]
pub struct Disk {
    pub(crate) device: Device,
    pub(crate) attached: AttachedDisk,
}

impl Disk {
    /// The device for a container's configuration: the guest's name, at its path in `/dev`.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Handle of the disk, for metrics and resizing.
    pub fn handle(&self) -> &BlockHandle {
        &self.attached.disk
    }
}

/// State shared by a sandbox and its containers.
pub(crate) struct Inner {
    pub(crate) agent: Agent,
    pub(crate) shares: Shares,
    files: Arc<FsMetrics>,
    pub(crate) streams: Streams,
    pub(crate) console: Console,
    pub(crate) handle: VmHandle,
    /// Ends killed containers.
    pub(crate) terminator: Arc<Terminator>,
    /// Held while CPUs are turned on or off.
    cpus: Mutex<()>,
    // Ends the agent's connection when the sandbox is dropped.
    _connection: Connection,
    /// Given back when the sandbox stops.
    pub(crate) takeover: Mutex<Option<Takeover>>,
    /// The sysctls that the configuration requests.
    pub(crate) sysctls: std::collections::BTreeMap<String, String>,
    pub(crate) timeline: Arc<Recorder>,
    /// Disks shared by containers, by path and mode.
    disks: RefCountedMap<(PathBuf, bool), Disk>,
    end: Arc<End>,
}

/// The exit reason of the virtual machine, known after the teardown.
#[derive(Default)]
struct End {
    reason: Mutex<Option<ExitReason>>,
    known: Condvar,
}

impl End {
    /// Tears the machine down as soon as it ends for any reason: streams end then, and pending calls to the agent fail.
    fn watch(vm: Vm, sockets: Option<UnixSockets>) -> io::Result<Arc<Self>> {
        let end = Arc::new(Self::default());
        let shared = end.clone();
        threads::spawn("koya-watch", move || {
            let reason = vm.wait();
            drop(sockets);
            *shared.lock() = Some(reason);
            shared.known.notify_all();
        })?;
        Ok(end)
    }

    fn lock(&self) -> MutexGuard<'_, Option<ExitReason>> {
        lock(&self.reason)
    }

    fn wait(&self) -> ExitReason {
        let mut reason = self.lock();
        loop {
            if let Some(reason) = &*reason {
                return reason.clone();
            }
            reason = wait(&self.known, reason);
        }
    }
}

/// A virtual machine in this process, with the agent as its init. Dropping it stops it.
pub struct Sandbox {
    pub(crate) inner: Arc<Inner>,
    boot_duration: Duration,
    limits: Limits,
    clock: Option<Clock>,
}

impl Sandbox {
    /// Starts a virtual machine and waits for its agent.
    ///
    /// # Errors
    /// The missing resource, the error from the host, or the last output on the guest's console.
    pub fn start(config: &SandboxConfig) -> Result<Self, Error> {
        let timeline = Arc::new(Recorder::new(config.timeline.as_ref()));
        let started = Self::try_start(config, timeline.clone());
        if let Err(error) = &started {
            timeline.fail_start(error);
        }
        started
    }

    fn try_start(config: &SandboxConfig, timeline: Arc<Recorder>) -> Result<Self, Error> {
        let called = timeline.next(Lane::Host, "devices");
        let networks = config.networks.iter().map(NetworkConfig::resolve);
        let networks = networks.collect::<Result<Vec<_>, _>>()?;
        let routing = Routing::of(&networks)?;
        let machine = config.machine(networks.iter().map(|n| n.device.clone()).collect())?;
        let ram_mib = machine.memory_mib;
        let spec = machine.check()?;
        let ports = Ports::new().map_err(Error::host("make the vsock device"))?;
        let control = ports
            .listen(CONTROL_PORT)
            .map_err(Error::host("listen for the agent"))?;
        let streams = Streams::listen(&ports).map_err(Error::host("listen for streams"))?;
        let sockets = match &config.vsock {
            Some(path) => {
                let sockets = confine_new_threads(config.confined)
                    .and_then(|_confinement| UnixSockets::listen(&ports, path));
                let what = || format!("listen on {}", path.display());
                Some(sockets.map_err(|e| Error::host(what())(e))?)
            }
            None => None,
        };
        let shares = Shares::within(config.places.clone());
        let options = Options {
            cache: config.cache,
            max_nodes: config.max_nodes(),
            ..Options::default()
        };
        let queues = config.cpus.min(FS_QUEUES);
        let fs = Fs::new(SHARED_TAG, shares.clone(), options, queues)
            .map_err(Error::host("make the virtio-fs device"))?;
        let files = fs.metrics();
        let host_events = fs.host_events();
        let console = Console::default();
        timeline.next(Lane::Host, "machine");
        let machine = Vm::builder(spec)
            .device(Vsock::new(FIRST_GUEST_CID, ports))
            .device(fs)
            .console(console.clone())
            .confined(config.confined)
            .places(config.places.clone());
        let vm = confined(config.apparmor_profile.as_deref(), || Ok(machine.start()?))?;
        timeline.set_boot_events(vm.handle().boot_events());
        let running = timeline.next(Lane::Kernel, "kernel");
        let handle = vm.handle();
        let taps = handle.networks().iter().map(NetHandle::tap_name);
        let takeover = Takeover::of(networks.iter().zip(taps.clone()), routing.clone())?;
        for (network, tap) in networks.iter().zip(taps) {
            network.connect(tap)?;
        }
        let (vm, stream) = wait_for_agent(vm, &control, &console)?;
        let connected = timeline.next(Lane::Host, "settings");
        // Only the agent can have connected: there is no container yet. The port closes.
        drop(control);
        let (agent, connection) =
            Agent::connect(stream).map_err(Error::host("talk to the agent"))?;
        spawn_event_forwarder(host_events, agent.clone()).map_err(Error::host("start a thread"))?;
        let disks = {
            let handle = handle.clone();
            move || all_disks(&handle)
        };
        let terminator = Terminator::new(agent.clone(), Timeouts::default(), disks, move |why| {
            if handle.ended().is_none() {
                log::error!("the virtual machine is ended: {why}");
                handle.stop();
            }
        });
        let mut sandbox = Self {
            inner: Arc::new(Inner {
                agent,
                terminator,
                cpus: Mutex::default(),
                shares,
                files,
                streams,
                console,
                handle: vm.handle(),
                _connection: connection,
                takeover: Mutex::new(Some(takeover)),
                sysctls: config.asked_sysctls(),
                timeline,
                disks: RefCountedMap::default(),
                end: End::watch(vm, sockets).map_err(Error::host("start a thread"))?,
            }),
            boot_duration: connected.saturating_sub(called),
            limits: Limits::of(config, ram_mib),
            clock: None,
        };
        let told = sandbox.inner.agent.set_time()?;
        let clock = Clock::follow(sandbox.inner.agent.clone());
        sandbox.clock = Some(clock.map_err(Error::host("follow the clock"))?);
        let timeline = &sandbox.inner.timeline;
        timeline.record_agent_times(running, connected, &told);
        sandbox.set_up_networks(&networks, &routing)?;
        // The kernel has set them at boot, for defaults of interfaces; what belongs to an interface exists only now.
        if !sandbox.inner.sysctls.is_empty() {
            sandbox.inner.agent.set_sysctls(&sandbox.inner.sysctls)?;
        }
        timeline.finish();
        log::info!("the agent was ready after {:.2?}", sandbox.boot_duration);
        Ok(sandbox)
    }

    fn set_up_networks(&self, networks: &[NetworkConfig], routing: &Routing) -> Result<(), Error> {
        for network in networks {
            self.inner.agent.update_interface(network.interface())?;
        }
        if routing.is_empty() {
            return Ok(());
        }
        self.inner.agent.update_routes(&routing.request())
    }

    /// Time from the call of [`start`](Self::start) to the agent's connection.
    pub fn boot_duration(&self) -> Duration {
        self.boot_duration
    }

    /// Timeline of its start, and of the starts of its first containers.
    pub fn timeline(&self) -> Timeline {
        self.inner.timeline.timeline()
    }

    /// Stores the current timeline, if the configuration requests that. This happens automatically when a container has
    /// started, when something fails, and at an orderly end of the sandbox.
    pub fn keep_timeline(&self) {
        self.inner.timeline.keep();
    }

    /// Creates and starts a container.
    ///
    /// # Errors
    /// As [`create`](Self::create) and [`Container::start`].
    pub fn run(&self, id: &str, config: &ContainerConfig) -> Result<Container, Error> {
        let container = self.create(id, config)?;
        container.start()?;
        Ok(container)
    }

    /// Creates a container that waits to be started. Its streams are as configured; pipes are available at once.
    ///
    /// # Errors
    /// The invalid field of the configuration, or the reason why the guest could not create the container.
    pub fn create(&self, id: &str, config: &ContainerConfig) -> Result<Container, Error> {
        Container::create(self.inner.clone(), id, config)
    }

    /// Resource usage of guest and agent.
    ///
    /// # Errors
    /// If the agent does not answer.
    pub fn stats(&self) -> Result<SandboxStats, Error> {
        let details = self.inner.agent.details()?;
        Ok(SandboxStats {
            kernel_release: guest_text::sanitize_line(details.kernel_release),
            uptime: Duration::from_nanos(details.uptime_ns),
            memory_total: details.mem_total_bytes,
            memory_available: details.mem_available_bytes,
            cpus_online: details.cpus_online,
            processes: details.processes,
            agent_descriptors: details.agent_fds,
            agent_threads: details.agent_threads,
        })
    }

    pub(crate) fn limits(&self) -> Limits {
        self.limits
    }

    /// Lock for changes of the number of online CPUs.
    pub(crate) fn turn_cpus(&self) -> MutexGuard<'_, ()> {
        lock(&self.inner.cpus)
    }

    pub(crate) fn agent(&self) -> &Agent {
        &self.inner.agent
    }

    /// The virtual machine: disks, networks, balloon, and memory use on the host.
    pub fn machine(&self) -> &VmHandle {
        &self.inner.handle
    }

    /// Metrics of shared files.
    pub fn file_metrics(&self) -> &FsMetrics {
        &self.inner.files
    }

    /// Attaches a disk to the running guest. A container gets it by [`Container::add_device`].
    ///
    /// # Errors
    /// The problem with the disk, the lack of a free slot, or a failure of the guest to find it.
    pub fn attach_disk(&self, config: &DiskConfig) -> Result<Disk, Error> {
        self.inner.attach_disk(config)
    }

    /// Detaches a disk from the running guest, once the guest kernel has released it. It must be removed from containers
    /// first ([`Container::remove_device`]), since the next disk may get its number. If a guest neither replies nor writes
    /// to it for 30 s, it is detached nevertheless.
    ///
    /// # Errors
    /// If the guest reports that it is in use; it stays attached.
    pub fn detach_disk(&self, disk: &Disk) -> Result<(), Error> {
        self.inner.detach_disk(disk)
    }

    /// As [`detach_disk`](Self::detach_disk), but a guest that still uses it after 10 s loses it, with its unwritten data.
    ///
    /// # Errors
    /// If it is not attached.
    pub fn force_detach_disk(&self, disk: &Disk) -> Result<(), Error> {
        self.inner.force_detach_disk(disk)
    }

    /// Write activity of its disks, also after the machine's end: an ending guest gets time to flush them.
    pub fn disk_writes(&self) -> DiskWrites {
        DiskWrites::of(&all_disks(&self.inner.handle))
    }

    /// Connects to a TCP port on the guest's loopback. This requires no network.
    ///
    /// # Errors
    /// If nothing listens on it.
    pub fn connect(&self, port: u16) -> Result<UnixStream, Error> {
        let expected = self.inner.streams.expect();
        let expected = expected.map_err(Error::host("make a token"))?;
        let asked = self.inner.agent.connect_port(port, &expected.token);
        asked.map_err(|error| self.inner.explain(error))?;
        let stream = expected.take();
        stream.map_err(Error::host("connect to a port of the guest's"))
    }

    /// Makes the guest a name server at this address; returns the stream of its queries, and the agent.
    pub(crate) fn name_server(&self, address: IpAddr) -> Result<(UnixStream, Agent), Error> {
        let expected = self.inner.streams.expect();
        let expected = expected.map_err(Error::host("make a token"))?;
        let asked = self.inner.agent.serve_names(address, &expected.token);
        asked.map_err(|error| self.inner.explain(error))?;
        let stream = expected.take();
        let stream = stream.map_err(Error::host(FORWARD_DNS))?;
        Ok((stream, self.inner.agent.clone()))
    }

    /// Waits for the next container with processes killed by the guest's OOM killer: returns its name and the number killed
    /// so far. Each event is delivered to one caller.
    ///
    /// # Errors
    /// The reason why the virtual machine ended, if it did.
    pub fn next_oom(&self) -> Result<(String, u64), Error> {
        let next = self.inner.agent.next_oom();
        next.map_err(|error| self.inner.explain(error))
    }

    /// Sends the guest's console to a writer: the kept output (64 KiB), and all further output. A slow writer loses output
    /// that does not fit into 64 KiB; a writer that fails is dropped.
    pub fn follow_console(&self, writer: impl Write + Send + 'static) {
        self.inner.console.follow(writer);
    }

    /// Sends input to the guest's console; returns the number of bytes taken.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        self.inner.handle.console_input(bytes)
    }

    /// Shuts the guest down: its file systems are synced, then the machine is torn down. Returns the reason why the machine
    /// ended.
    pub fn stop(&self) -> ExitReason {
        self.inner.stop()
    }

    /// Tears the machine down at once, as if powered off.
    pub fn kill(&self) {
        self.inner.handle.stop();
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.clock = None;
        // Containers may still hold the inner part; the machine is stopped nevertheless.
        self.inner.handle.stop();
        self.inner.end.wait();
        self.inner.timeline.keep();
    }
}

impl Inner {
    fn stop(&self) -> ExitReason {
        self.timeline.keep();
        let takeover = lock(&self.takeover).take();
        drop(takeover);
        if self.handle.ended().is_none() && self.agent.destroy().is_ok() {
            let mut work = DiskWork::new(all_disks(&self.handle));
            let began = Instant::now();
            let mut silent = Instant::now();
            while self.handle.ended().is_none()
                && silent.elapsed() < STOP_LIMIT
                && began.elapsed() < WRITE_OUT_LIMIT
            {
                std::thread::sleep(Duration::from_millis(1));
                if work.goes_on() {
                    silent = Instant::now();
                }
            }
        }
        self.handle.stop();
        self.end.wait()
    }

    pub(crate) fn attach_disk(&self, config: &DiskConfig) -> Result<Disk, Error> {
        let attached = self.handle.attach_disk(config)?;
        match self.agent.attach_disk(attached.mmio_slot) {
            Ok(name) => Ok(Disk {
                device: Device::named(name, config.read_only),
                attached,
            }),
            Err(error) => {
                // A slot that the guest may still use stays taken until the end.
                if self.unplug_in_guest(&attached).is_ok() {
                    self.handle.detach_disk(attached.slot).ok();
                }
                Err(self.explain(error))
            }
        }
    }

    /// As [`attach_disk`](Self::attach_disk), but reuses a disk that is already attached.
    pub(crate) fn share_disk(&self, config: &DiskConfig) -> Result<Ref<Disk>, Error> {
        let key = (config.path.clone(), config.read_only);
        self.disks.take(key, || self.attach_disk(config))
    }

    /// Drops a reference to a disk, and detaches it with the last one.
    pub(crate) fn release_disk(&self, disk: Ref<Disk>) -> Result<(), Error> {
        disk.release(|disk| self.force_detach_disk(disk))
    }

    /// Removes a container. A guest that fails to do so is ended: processes of the container might still be running in it.
    pub(crate) fn remove_container(&self, id: &str) -> Result<(), Error> {
        let (agent, asked) = (self.agent.clone(), id.to_owned());
        let disks = all_disks(&self.handle);
        let removed = while_disks_work("remove the container", &disks, SILENCE, move || {
            agent.remove(&asked)
        });
        if let Err(error @ Error::Timeout { .. }) = &removed {
            self.terminator
                .give_up(&format!("container {id} is not removed: {error}"));
        }
        removed
    }

    /// The error for a machine whose agent has hung up. Such a machine is unusable, so it is ended; when the agent dies, the
    /// kernel panics, which gets a moment to appear as the reason.
    pub(crate) fn end_without_agent(&self, error: Error) -> Error {
        let started = Instant::now();
        while self.handle.ended().is_none() && started.elapsed() < PANIC_LIMIT {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.terminator.give_up("its agent has hung up");
        self.explain(error)
    }

    /// Replaces an error by the reason why the machine ended, if it has.
    pub(crate) fn explain(&self, error: Error) -> Error {
        if self.handle.ended().is_none() || matches!(error, Error::NotExecutable { .. }) {
            return error;
        }
        Error::ended(self.end.wait(), &self.console)
    }
}

/// The disks of the configuration and those attached later.
fn all_disks(machine: &VmHandle) -> Vec<BlockHandle> {
    let attached = machine.attached_disks().into_iter();
    let attached = attached.map(|attached| attached.disk);
    machine.disks().iter().cloned().chain(attached).collect()
}

/// Reports changes on the host to files that the guest watches, until the machine is torn down.
fn spawn_event_forwarder(host_events: HostEvents, agent: Agent) -> io::Result<()> {
    let told = move || {
        let missed = Warnings::new();
        loop {
            match host_events.next() {
                Ok(Some(events)) => {
                    if let Err(error) = agent.report_host_events(events) {
                        missed.warn(format_args!(
                            "the guest misses changes on the host: {error}"
                        ));
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    log::warn!("changes on the host are no longer reported to the guest: {error}");
                    return;
                }
            }
        }
    };
    threads::spawn("koya-events", told).map(drop)
}

/// Waits for the agent; returns the machine with the agent's connection.
fn wait_for_agent(
    vm: Vm,
    control: &Listener,
    console: &Console,
) -> Result<(Vm, UnixStream), Error> {
    let started = Instant::now();
    loop {
        match control.accept_timeout(LOOK) {
            Ok(stream) => return Ok((vm, stream)),
            Err(e) if e.kind() == io::ErrorKind::TimedOut => {}
            Err(source) => return Err(Error::host("listen for the agent")(source)),
        }
        if vm.handle().ended().is_some() {
            return Err(Error::ended(vm.wait(), console));
        }
        // The guest continues without the device, and its agent may never connect.
        if let Some(failure) = vm.handle().boot_events().device_failure() {
            let start = Error::host(format!("start the guest's {} device", failure.device));
            return Err(start(io::Error::other(failure.reason.clone())));
        }
        if started.elapsed() > AGENT_LIMIT {
            return Err(Error::AgentTimeout {
                waited: started.elapsed(),
                console: console.tail(LAST_WORDS),
            });
        }
    }
}
