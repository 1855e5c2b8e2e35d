//! A sandbox: a virtual machine with the agent in it.

use crate::Error;
use crate::agent::{Agent, Connection};
use crate::apparmor::confined;
use crate::clock::Clock;
use crate::common::{Common, Used};
use crate::config::SandboxConfig;
use crate::console::Console;
use crate::container::Container;
use crate::container_config::{ContainerConfig, Device};
use crate::ends::{Ends, Patience};
use crate::error::LAST_WORDS;
use crate::network::{Joined, NetworkConfig, Routing};
use crate::patience::{DiskWork, DiskWrites, SILENCE, WRITE_OUT_LIMIT, while_disks_work};
use crate::size::Limits;
use crate::streams::Streams;
use crate::sync::{lock, wait};
use crate::timeline::{Lane, Recorder, Timeline};
use koya_protocol::{CONTROL_PORT, SHARED_TAG};
use koya_vmm::devices::blk::BlockHandle;
use koya_vmm::devices::fs::passthrough::Options;
use koya_vmm::devices::fs::{Fs, FsMetrics, HostEvents, Shares};
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

/// How long the guest may take from its first instruction to the agent's call.
const AGENT_LIMIT: Duration = Duration::from_secs(60);
/// How long a guest may take to end in order before it is stopped, while it writes nothing to a disk.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// How long a guest may take to panic whose agent has ended.
const PANIC_LIMIT: Duration = Duration::from_secs(2);
/// The most request queues for files: the guest's kernel divides them among its CPUs, and each has
/// threads of its own here.
const FS_QUEUES: u32 = 4;
/// How often a wait looks whether the virtual machine is still there.
pub(crate) const LOOK: Duration = Duration::from_millis(50);

/// What guest and agent use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxStats {
    /// The guest kernel's release.
    pub kernel_release: String,
    /// From the guest kernel's start to now.
    pub uptime: Duration,
    /// The guest's memory, and what of it is available, in bytes.
    pub memory_total: u64,
    /// See `memory_total`.
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

/// A disk that a running sandbox got.
#[derive(Clone)]
pub struct Disk {
    pub(crate) device: Device,
    pub(crate) attached: AttachedDisk,
}

impl Disk {
    /// How a container gets it: by the guest's name, in `/dev`.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its counters, and its growing.
    pub fn handle(&self) -> &BlockHandle {
        &self.attached.disk
    }
}

/// What a sandbox's containers share with it.
pub(crate) struct Inner {
    pub(crate) agent: Agent,
    pub(crate) shares: Shares,
    files: Arc<FsMetrics>,
    pub(crate) streams: Streams,
    pub(crate) console: Console,
    pub(crate) handle: VmHandle,
    /// Containers that are to end.
    pub(crate) ends: Arc<Ends>,
    cpus: Mutex<()>,
    // Ends the agent's connection when the sandbox goes.
    _connection: Connection,
    /// Given back when the sandbox stops.
    joined: Mutex<Option<Joined>>,
    pub(crate) timeline: Arc<Recorder>,
    /// Disks that containers have in common, by what they are on the host.
    disks: Common<(PathBuf, bool), Disk>,
    end: Arc<End>,
}

/// The virtual machine's end: known once it is taken down.
#[derive(Default)]
struct End {
    reason: Mutex<Option<ExitReason>>,
    known: Condvar,
}

impl End {
    /// Takes the machine down as soon as it ends, by whatever reason: streams end then, and
    /// whoever waits for the agent's answer learns that none will come.
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
    ready_after: Duration,
    limits: Limits,
    clock: Option<Clock>,
}

impl Sandbox {
    /// Starts a virtual machine and waits for its agent.
    ///
    /// # Errors
    /// What is missing, what the host refused, or what the guest's console said last.
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
        let shares = Shares::default();
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
            .confined(config.confined);
        let vm = confined(config.apparmor_profile.as_deref(), || Ok(machine.start()?))?;
        timeline.machine_runs(vm.handle().boot_events());
        let running = timeline.next(Lane::Kernel, "kernel");
        let joined = Joined::of(&networks)?;
        for (network, device) in networks.iter().zip(vm.handle().networks()) {
            network.connect(device.tap_name())?;
        }
        let (vm, stream) = wait_for_agent(vm, &control, &console)?;
        let connected = timeline.next(Lane::Host, "settings");
        // Nobody but the agent can have connected: there is no container yet. The port closes.
        drop(control);
        let (agent, connection) =
            Agent::connect(stream).map_err(Error::host("talk to the agent"))?;
        tell(host_events, agent.clone()).map_err(Error::host("start a thread"))?;
        let handle = vm.handle();
        let disks = {
            let handle = handle.clone();
            move || all_disks(&handle)
        };
        let ends = Ends::new(agent.clone(), Patience::default(), disks, move |why| {
            if handle.ended().is_none() {
                log::error!("the virtual machine is ended: {why}");
                handle.stop();
            }
        });
        let mut sandbox = Self {
            inner: Arc::new(Inner {
                agent,
                ends,
                cpus: Mutex::default(),
                shares,
                files,
                streams,
                console,
                handle: vm.handle(),
                _connection: connection,
                joined: Mutex::new(joined),
                timeline,
                disks: Common::default(),
                end: End::watch(vm, sockets).map_err(Error::host("start a thread"))?,
            }),
            ready_after: connected.saturating_sub(called),
            limits: Limits::of(config, ram_mib),
            clock: None,
        };
        let told = sandbox.inner.agent.set_time()?;
        let clock = Clock::follow(sandbox.inner.agent.clone());
        sandbox.clock = Some(clock.map_err(Error::host("follow the clock"))?);
        let timeline = &sandbox.inner.timeline;
        timeline.agent_told(running, connected, &told);
        sandbox.set_up_networks(&networks, &routing)?;
        let sysctls = config.asked_sysctls();
        if !sysctls.is_empty() {
            sandbox.inner.agent.set_sysctls(&sysctls)?;
        }
        timeline.finish();
        log::info!("the agent was ready after {:.2?}", sandbox.ready_after);
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

    /// From the call of [`start`](Self::start) to the agent's.
    pub fn ready_after(&self) -> Duration {
        self.ready_after
    }

    /// Where the time of its start went, and of its first containers'.
    pub fn timeline(&self) -> Timeline {
        self.inner.timeline.timeline()
    }

    /// Writes the timeline down as it is, if the configuration asks for that. It happens by itself when
    /// a container has started, when something fails, and when the sandbox ends in order.
    pub fn keep_timeline(&self) {
        self.inner.timeline.keep();
    }

    /// Makes and starts a container.
    ///
    /// # Errors
    /// As [`create`](Self::create) and [`Container::start`].
    pub fn run(&self, id: &str, config: &ContainerConfig) -> Result<Container, Error> {
        let container = self.create(id, config)?;
        container.start()?;
        Ok(container)
    }

    /// Makes a container that waits to be started. Its streams are as the configuration says;
    /// pipes are there at once.
    ///
    /// # Errors
    /// What is wrong with the configuration, or why the guest could not make it.
    pub fn create(&self, id: &str, config: &ContainerConfig) -> Result<Container, Error> {
        Container::create(self.inner.clone(), id, config)
    }

    /// What guest and agent use.
    ///
    /// # Errors
    /// If the agent does not answer.
    pub fn stats(&self) -> Result<SandboxStats, Error> {
        let details = self.inner.agent.details()?;
        Ok(SandboxStats {
            kernel_release: guest_text::line(details.kernel_release),
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

    /// Held by who changes how many CPUs are on.
    pub(crate) fn turn_cpus(&self) -> MutexGuard<'_, ()> {
        lock(&self.inner.cpus)
    }

    pub(crate) fn agent(&self) -> &Agent {
        &self.inner.agent
    }

    /// The virtual machine: its disks, networks, balloon, and what it holds of the host's memory.
    pub fn machine(&self) -> &VmHandle {
        &self.inner.handle
    }

    /// What the guest did with shared files so far.
    pub fn file_metrics(&self) -> &FsMetrics {
        &self.inner.files
    }

    /// Gives the running guest a further disk. It is the guest's, and a container's once it is given
    /// to one ([`Container::add_device`]).
    ///
    /// # Errors
    /// What is wrong with the disk, that no slot is left, or that the guest does not find it.
    pub fn attach_disk(&self, config: &DiskConfig) -> Result<Disk, Error> {
        self.inner.attach_disk(config)
    }

    /// Takes a disk from the running guest, once the guest's kernel has let go of it. Containers that
    /// it was given to must give it up before ([`Container::remove_device`]): the next disk may get its
    /// number. From a guest that neither answers nor writes to it for 30 s it is taken all the same.
    ///
    /// # Errors
    /// If the guest says that it uses it: then it stays.
    pub fn detach_disk(&self, disk: &Disk) -> Result<(), Error> {
        self.inner.detach_disk(disk)
    }

    /// The same, but a guest that still uses it after 10 s loses it all the same, with what it has not
    /// written.
    ///
    /// # Errors
    /// If it was not attached.
    pub fn force_detach_disk(&self, disk: &Disk) -> Result<(), Error> {
        self.inner.force_detach_disk(disk)
    }

    /// How much was written to its disks, also after the machine's end: a guest that ends has its time for that.
    pub fn disk_writes(&self) -> DiskWrites {
        DiskWrites::of(&all_disks(&self.inner.handle))
    }

    /// Connects to a TCP port of the guest's loopback. The guest needs no network for it.
    ///
    /// # Errors
    /// If nobody listens there.
    pub fn connect(&self, port: u16) -> Result<UnixStream, Error> {
        let expected = self.inner.streams.expect();
        let expected = expected.map_err(Error::host("make a token"))?;
        let asked = self.inner.agent.connect_port(port, &expected.token);
        asked.map_err(|error| self.inner.explain(error))?;
        let stream = expected.take();
        stream.map_err(Error::host("connect to a port of the guest's"))
    }

    /// The stream by which the guest sends what it is asked as a name server at this address, and who serves there.
    pub(crate) fn name_server(&self, address: IpAddr) -> Result<(UnixStream, Agent), Error> {
        let expected = self.inner.streams.expect();
        let expected = expected.map_err(Error::host("make a token"))?;
        let asked = self.inner.agent.serve_names(address, &expected.token);
        asked.map_err(|error| self.inner.explain(error))?;
        let stream = expected.take();
        let stream = stream.map_err(Error::host("lend the guest a name server"))?;
        Ok((stream, self.inner.agent.clone()))
    }

    /// Waits for the next container in which the guest's kernel killed processes for their memory: its
    /// name, and how many it killed there so far. One caller at a time hears of each.
    ///
    /// # Errors
    /// Why the virtual machine ended, if it did.
    pub fn next_oom(&self) -> Result<(String, u64), Error> {
        let next = self.inner.agent.next_oom();
        next.map_err(|error| self.inner.explain(error))
    }

    /// Sends the guest's console to a writer: what is kept of it (64 KiB), and all that comes. A
    /// writer that is slow misses what does not fit into 64 KiB; one that fails is dropped.
    pub fn follow_console(&self, writer: impl Write + Send + 'static) {
        self.inner.console.follow(writer);
    }

    /// Types on the guest's console; how many bytes were taken.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        self.inner.handle.console_input(bytes)
    }

    /// Ends the guest: its file systems are synced, then the machine is taken down. Returns why
    /// the machine ended.
    pub fn stop(&self) -> ExitReason {
        self.inner.stop()
    }
}

impl Sandbox {
    /// Takes the machine down at once, as pulling the plug would.
    pub fn kill(&self) {
        self.inner.handle.stop();
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.clock = None;
        // Containers may still hold the inner part; the machine goes all the same.
        self.inner.handle.stop();
        self.inner.end.wait();
        self.inner.timeline.keep();
    }
}

impl Inner {
    fn stop(&self) -> ExitReason {
        self.timeline.keep();
        drop(self.joined.lock().map(|mut joined| joined.take()));
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
                // A slot whose window the guest may still use stays taken until the end.
                if self.have_let_go(&attached).is_ok() {
                    self.handle.detach_disk(attached.slot).ok();
                }
                Err(self.explain(error))
            }
        }
    }

    /// As [`attach_disk`](Self::attach_disk), but one that is there already is not attached again.
    pub(crate) fn share_disk(&self, config: &DiskConfig) -> Result<Used<Disk>, Error> {
        let key = (config.path.clone(), config.read_only);
        self.disks.take(key, || self.attach_disk(config))
    }

    /// Detaches it with the last of those who have it.
    pub(crate) fn release_disk(&self, disk: Used<Disk>) -> Result<(), Error> {
        disk.give_back(|disk| self.force_detach_disk(disk))
    }

    /// Removes a container. A guest that does not do it is ended: what of the container's would still run there
    /// is nobody's.
    pub(crate) fn remove_container(&self, id: &str) -> Result<(), Error> {
        let (agent, asked) = (self.agent.clone(), id.to_owned());
        let disks = all_disks(&self.handle);
        let removed = while_disks_work("remove the container", &disks, SILENCE, move || {
            agent.remove(&asked)
        });
        if let Err(error @ Error::Overdue { .. }) = &removed {
            self.ends
                .give_up(&format!("container {id} is not removed: {error}"));
        }
        removed
    }

    /// Why the machine ended whose agent has hung up. Nobody is left who could do anything with it, so it does
    /// not go on without: an agent that dies takes it along with a panic, for which there is a moment.
    pub(crate) fn end_without_agent(&self, error: Error) -> Error {
        let started = Instant::now();
        while self.handle.ended().is_none() && started.elapsed() < PANIC_LIMIT {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.ends.give_up("its agent has hung up");
        self.explain(error)
    }

    /// If the machine has ended, why: what to say instead of "the agent does not answer".
    pub(crate) fn explain(&self, error: Error) -> Error {
        if self.handle.ended().is_none() || matches!(error, Error::NotExecutable { .. }) {
            return error;
        }
        Error::ended(self.end.wait(), &self.console)
    }
}

/// Those that the machine started with, and those that came later.
fn all_disks(machine: &VmHandle) -> Vec<BlockHandle> {
    let attached = machine.attached_disks().into_iter();
    let attached = attached.map(|attached| attached.disk);
    machine.disks().iter().cloned().chain(attached).collect()
}

/// Tells the guest of changes on the host to files that it watches, until the machine is taken down.
fn tell(host_events: HostEvents, agent: Agent) -> io::Result<()> {
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
                    log::warn!("the guest is told of no more changes on the host: {error}");
                    return;
                }
            }
        }
    };
    threads::spawn("koya-events", told).map(drop)
}

/// Gives the machine back with the agent's connection.
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
        if started.elapsed() > AGENT_LIMIT {
            return Err(Error::AgentSilent {
                waited: started.elapsed(),
                console: console.tail(LAST_WORDS),
            });
        }
    }
}
