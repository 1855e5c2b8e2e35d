//! The virtual machine of a task set, configured by its first task. Tasks access it through traits, which tests implement
//! without a guest.

use crate::Error;
use crate::listener::Connector;
use crate::namespaces::{current_interfaces, interfaces, is_in_user_namespace};
use crate::resize::bound_memory;
use crate::set::{State, Task, TaskSet};
use crate::size::{Limits, sum_of_limits};
use crate::sync::spawn;
use anyhow::anyhow;
use koya::oci_spec::runtime as oci;
use koya::vmm::devices::rate_limit::{Rate, RateLimiter};
use koya::vmm::{ExitReason, guest_text};
use koya::{
    Bundle, Container, ContainerStats, DnsForwarder, ExecOptions, GuestListener, HostEnd,
    InterfaceChanges, Loopback, NetworkConfig, Notifications, ProcessStreams, Sandbox,
    SandboxConfig, Size, Step, TimelineFile,
};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time without further queries after the guest has reported an OOM kill. It doubles for a guest that reports them all the
/// time: each is an event for the engine, which stores it.
const OOM_PAUSE: Duration = Duration::from_millis(100);
const OOM_PAUSE_MAX: Duration = Duration::from_secs(10);

/// Guest console lines in the log: more than those of a boot, then one a second.
const CONSOLE_LINES: Rate = Rate {
    per_second: 1,
    burst: Some(2000),
};

/// The virtual machine of a task set.
#[derive(Default)]
pub(crate) enum Machine {
    /// It was never started, or failed to start.
    #[default]
    Absent,
    /// A request is starting it, without holding a lock.
    Starting,
    /// It runs, or has ended.
    Running(Arc<dyn VirtualMachine>),
}

/// The host's ends of a process's streams in the guest.
#[derive(Default)]
pub(crate) struct Streams {
    pub(crate) stdin: Option<UnixStream>,
    pub(crate) stdout: Option<UnixStream>,
    pub(crate) stderr: Option<UnixStream>,
    pub(crate) extra_fds: Vec<UnixStream>,
    pub(crate) listeners: Vec<Connector>,
    pub(crate) notifications: Option<Notifications>,
}

impl Streams {
    fn take(process: &mut koya::Process) -> Self {
        Self {
            stdin: process.stdin.take(),
            stdout: process.stdout.take(),
            stderr: process.stderr.take(),
            extra_fds: std::mem::take(&mut process.extra_fds),
            listeners: connectors(std::mem::take(&mut process.listeners)),
            notifications: process.notifications.take(),
        }
    }
}

fn connectors(listeners: Vec<GuestListener>) -> Vec<Connector> {
    let listeners = listeners.into_iter();
    let connectors = listeners.map(|listener| Box::new(move || listener.connect()) as Connector);
    connectors.collect()
}

/// The operations of a [`Sandbox`] used by a task set.
pub(crate) trait VirtualMachine: Send + Sync {
    fn create(
        &self,
        id: &str,
        bundle: &Bundle,
        wanted: &ProcessStreams,
    ) -> Result<(Arc<dyn GuestContainer>, Streams), koya::Error>;
    /// Whether the guest has all interfaces of its network namespace.
    fn has_interfaces(&self) -> anyhow::Result<bool>;
    fn ended(&self) -> Option<ExitReason>;
    fn wait_ended(&self) -> ExitReason;
    fn next_oom(&self) -> Result<(String, u64), koya::Error>;
    fn steps(&self) -> Vec<Step>;
    fn keep_timeline(&self);
    fn size(&self) -> Result<Size, koya::Error>;
    fn max_size(&self) -> Size;
    fn granted_mib(&self) -> u64;
    fn kernel_mib(&self) -> u64;
    fn update(&self, size: Size) -> Result<Size, koya::Error>;
    /// Shuts it down after the guest has flushed its disks.
    fn stop(&self);
    /// Tears it down at once.
    fn kill(&self);
}

/// The operations of a [`koya::Process`] used here.
pub(crate) trait GuestProcess: Send + Sync {
    fn wait(&self) -> Result<i32, koya::Error>;
    fn signal(&self, signal: i32) -> Result<(), koya::Error>;
    fn resize(&self, rows: u16, columns: u16) -> Result<(), koya::Error>;
}

/// The operations of a [`Container`] used here; those of a process apply to its init process.
pub(crate) trait GuestContainer: GuestProcess {
    fn start(&self) -> Result<(), koya::Error>;
    /// Sends SIGKILL to the init process, or to all: the host enforces the end.
    fn kill(&self, all: bool) -> Result<(), koya::Error>;
    fn signal_all(&self, signal: i32) -> Result<(), koya::Error>;
    fn pause(&self) -> Result<(), koya::Error>;
    fn resume(&self) -> Result<(), koya::Error>;
    fn update(&self, resources: &oci::LinuxResources) -> Result<(), koya::Error>;
    fn stats(&self) -> Result<ContainerStats, koya::Error>;
    fn exec(
        &self,
        name: &str,
        process: &oci::Process,
        options: &ExecOptions,
    ) -> Result<(Arc<dyn GuestProcess>, Streams), koya::Error>;
    fn remove(&self) -> Result<(), koya::Error>;
}

impl GuestProcess for koya::Process {
    fn wait(&self) -> Result<i32, koya::Error> {
        self.wait()
    }

    fn signal(&self, signal: i32) -> Result<(), koya::Error> {
        self.signal(signal)
    }

    fn resize(&self, rows: u16, columns: u16) -> Result<(), koya::Error> {
        self.resize(rows, columns)
    }
}

impl GuestProcess for Container {
    fn wait(&self) -> Result<i32, koya::Error> {
        self.wait()
    }

    fn signal(&self, signal: i32) -> Result<(), koya::Error> {
        self.process().signal(signal)
    }

    fn resize(&self, rows: u16, columns: u16) -> Result<(), koya::Error> {
        self.process().resize(rows, columns)
    }
}

impl GuestContainer for Container {
    fn start(&self) -> Result<(), koya::Error> {
        self.start()
    }

    fn kill(&self, all: bool) -> Result<(), koya::Error> {
        match all {
            true => self.kill_all(),
            false => self.kill(),
        }
    }

    fn signal_all(&self, signal: i32) -> Result<(), koya::Error> {
        self.signal_all(signal)
    }

    fn pause(&self) -> Result<(), koya::Error> {
        self.pause()
    }

    fn resume(&self) -> Result<(), koya::Error> {
        self.resume()
    }

    fn update(&self, resources: &oci::LinuxResources) -> Result<(), koya::Error> {
        self.update(resources)
    }

    fn stats(&self) -> Result<ContainerStats, koya::Error> {
        self.stats()
    }

    fn exec(
        &self,
        name: &str,
        process: &oci::Process,
        options: &ExecOptions,
    ) -> Result<(Arc<dyn GuestProcess>, Streams), koya::Error> {
        let mut process = self.exec_oci(name, process, options.clone())?;
        let streams = Streams::take(&mut process);
        Ok((Arc::new(process), streams))
    }

    fn remove(&self) -> Result<(), koya::Error> {
        self.remove()
    }
}

/// A real virtual machine.
struct SandboxMachine {
    sandbox: Arc<Sandbox>,
    _loopback: Option<Loopback>,
    _names: Option<DnsForwarder>,
    _changes: Option<InterfaceChanges>,
}

impl VirtualMachine for SandboxMachine {
    fn create(
        &self,
        id: &str,
        bundle: &Bundle,
        wanted: &ProcessStreams,
    ) -> Result<(Arc<dyn GuestContainer>, Streams), koya::Error> {
        let mut container = self.sandbox.create_oci(id, bundle, wanted.clone())?;
        let streams = Streams::take(container.process_mut());
        Ok((Arc::new(container), streams))
    }

    fn has_interfaces(&self) -> anyhow::Result<bool> {
        Ok(self.sandbox.has_interfaces(&current_interfaces()?))
    }

    fn ended(&self) -> Option<ExitReason> {
        self.sandbox.machine().ended()
    }

    fn wait_ended(&self) -> ExitReason {
        self.sandbox.machine().wait_exit()
    }

    fn next_oom(&self) -> Result<(String, u64), koya::Error> {
        self.sandbox.next_oom()
    }

    fn steps(&self) -> Vec<Step> {
        self.sandbox.timeline().steps
    }

    fn keep_timeline(&self) {
        self.sandbox.keep_timeline();
    }

    fn size(&self) -> Result<Size, koya::Error> {
        self.sandbox.size()
    }

    fn max_size(&self) -> Size {
        self.sandbox.max_size()
    }

    fn granted_mib(&self) -> u64 {
        self.sandbox.granted_mib()
    }

    fn kernel_mib(&self) -> u64 {
        self.sandbox.kernel_mib()
    }

    fn update(&self, size: Size) -> Result<Size, koya::Error> {
        self.sandbox.update(size)
    }

    fn stop(&self) {
        self.sandbox.stop();
    }

    fn kill(&self) {
        self.sandbox.kill();
    }
}

/// Properties of a sandbox beyond its configuration.
pub(crate) struct BootOptions {
    pub(crate) log_console: bool,
    /// Whether connections to the loopback of its network namespace are forwarded to the guest.
    pub(crate) joins_loopback: bool,
    /// A name server on that loopback, made available on the guest's loopback.
    pub(crate) name_server: Option<IpAddr>,
}

/// Function that starts a virtual machine.
pub(crate) type Boot = Box<
    dyn Fn(&SandboxConfig, &BootOptions) -> Result<Arc<dyn VirtualMachine>, koya::Error>
        + Send
        + Sync,
>;

pub(crate) fn boot_sandbox(
    config: &SandboxConfig,
    options: &BootOptions,
) -> Result<Arc<dyn VirtualMachine>, koya::Error> {
    let sandbox = Arc::new(Sandbox::start(config)?);
    if options.log_console {
        sandbox.follow_console(ConsoleLog::default());
    }
    let loopback = match options.joins_loopback {
        true => Loopback::join(&sandbox)
            .map_err(|error| log::warn!("no port forward: {:#}", anyhow::Error::from(error)))
            .ok(),
        false => None,
    };
    // Without it, the guest keeps the networks of its start.
    let changes = InterfaceChanges::follow(&sandbox, || current_interfaces().map(takeovers))
        .map_err(|error| log::warn!("{:#}", anyhow::Error::from(error)))
        .ok();
    let names = options.name_server;
    let names = names.map(|address| DnsForwarder::start(&sandbox, address));
    Ok(Arc::new(SandboxMachine {
        _names: names.transpose()?,
        _changes: changes,
        sandbox,
        _loopback: loopback,
    }))
}

/// A start in progress, which other requests wait for.
struct Starting<'a>(&'a TaskSet);

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        self.0.change(|state| {
            if matches!(state.machine, Machine::Starting) {
                state.machine = Machine::Absent;
            }
        });
    }
}

impl Starting<'_> {
    /// Marks the machine as running, unless it was stopped meanwhile.
    fn finish(&self, machine: &Arc<dyn VirtualMachine>, size: Size) -> Result<(), Error> {
        let is_stopping = self.0.change(|state| {
            if !state.is_stopping {
                state.machine = Machine::Running(machine.clone());
                state.first_size = Some(size);
                state.size = Some(size);
            }
            state.is_stopping
        });
        if is_stopping {
            // It has not done anything yet.
            machine.kill();
            return Err(anyhow!("the sandbox was stopped while it started").into());
        }
        Ok(())
    }
}

impl TaskSet {
    /// The virtual machine, started if necessary. No lock is held meanwhile, so that a stop meets its time limits.
    pub(crate) fn boot(self: &Arc<Self>, task: &Task) -> Result<Arc<dyn VirtualMachine>, Error> {
        let limits = {
            let mut state = self.lock();
            loop {
                match &state.machine {
                    Machine::Running(machine) => {
                        return match machine.ended() {
                            None => Ok(machine.clone()),
                            Some(reason) => Err(anyhow!("the sandbox has ended: {reason}").into()),
                        };
                    }
                    Machine::Starting => state = state.wait(&self.changed),
                    Machine::Absent if state.is_stopping => {
                        return Err(anyhow!("the sandbox is being stopped").into());
                    }
                    Machine::Absent if task.is_member() => {
                        return Err(Error::FailedPrecondition(
                            "the container whose virtual machine is to be joined has not started"
                                .into(),
                        ));
                    }
                    Machine::Absent => break,
                }
            }
            state.machine = Machine::Starting;
            state.entry(task).map_or_else(Limits::default, |e| e.limits)
        };
        let starting = Starting(self);
        let size = sum_of_limits(&task.settings, &[limits]);
        let config = sandbox_config(task, size)?;
        let machine = (self.boot)(
            &config,
            &BootOptions {
                log_console: self.config.log_console,
                joins_loopback: task.is_pod(),
                name_server: task.spec.name_server(),
            },
        )?;
        bound_memory(task, &*machine, None);
        if let Some(state) = &self.config.state
            && let Err(error) = koya::confinement::record(state, config.confined)
        {
            log::warn!("cannot record what confines the sandbox: {error}");
        }
        if let Err(error) = self.publish_ooms(machine.clone()) {
            machine.kill();
            return Err(error.into());
        }
        starting.finish(&machine, size)?;
        Ok(machine)
    }

    /// Publishes OOM kills in the guest's containers.
    fn publish_ooms(
        self: &Arc<Self>,
        machine: Arc<dyn VirtualMachine>,
    ) -> Result<(), anyhow::Error> {
        let set = self.clone();
        spawn("koya-oom", move || {
            let mut pause = OOM_PAUSE;
            let mut asked = Instant::now();
            while let Ok((id, kills)) = machine.next_oom() {
                if let Ok(task) = set.task(&id) {
                    set.out_of_memory(&task, kills);
                }
                pause = next_pause(pause, asked.elapsed());
                let stops = |state: &mut State| state.is_stopping.then_some(());
                if set.wait_for(pause, stops).is_some() {
                    return;
                }
                asked = Instant::now();
            }
        })
    }
}

/// The pause after a report that came this time after the last pause.
fn next_pause(last: Duration, waited: Duration) -> Duration {
    match waited < last {
        true => OOM_PAUSE_MAX.min(last * 2),
        false => OOM_PAUSE,
    }
}

fn sandbox_config(task: &Task, size: Size) -> Result<SandboxConfig, Error> {
    let mut config = task.settings.sandbox(size, task.is_pod());
    if task.settings.apparmor {
        config.apparmor_profile = task.spec.apparmor_profile();
    }
    if task.is_pod() {
        // Its containers use the guest's own namespaces, which nothing else sets up.
        config.hostname = task.spec.0.hostname().clone();
        config.sysctls = task.spec.sysctls();
    } else {
        config.sysctls = task.spec.network_sysctls();
    }
    config.networks = takeovers(interfaces()?);
    config.timeline = Some(TimelineFile {
        id: task.id.clone(),
        began: None,
    });
    Ok(config)
}

/// The networks of a guest that takes over these interfaces.
fn takeovers(interfaces: Vec<String>) -> Vec<NetworkConfig> {
    // Without root, ports are published by a process in the namespace (rootlessport), which connects to the container's
    // address there; with root, connections come from outside, unless the interface is a tap.
    let host_access = is_in_user_namespace().then_some(true);
    let networks = interfaces.into_iter().map(|interface| NetworkConfig {
        name: interface.clone(),
        host_access,
        ..NetworkConfig::new(HostEnd::Join { interface })
    });
    networks.collect()
}

/// The guest's console in the log, line by line; of a guest that writes all the time, [`CONSOLE_LINES`] of them.
struct ConsoleLog {
    line: Vec<u8>,
    limiter: RateLimiter,
    left_out: u64,
}

impl Default for ConsoleLog {
    fn default() -> Self {
        Self {
            line: Vec::new(),
            limiter: RateLimiter::of_operations(CONSOLE_LINES),
            left_out: 0,
        }
    }
}

impl ConsoleLog {
    /// Whether a line that ends at `now` is logged.
    fn is_logged(&mut self, now: Instant) -> bool {
        let is_logged = self.limiter.start(now).is_none();
        self.left_out += u64::from(!is_logged);
        is_logged
    }
}

impl std::io::Write for ConsoleLog {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        for byte in bytes {
            match byte {
                b'\n' => {
                    if self.is_logged(Instant::now()) {
                        if self.left_out > 0 {
                            log::debug!("guest: {} lines are left out", self.left_out);
                            self.left_out = 0;
                        }
                        log::debug!("guest: {}", guest_text::sanitize_line(&self.line));
                    }
                    self.line.clear();
                }
                _ if self.line.len() < 1024 => self.line.push(*byte),
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

    #[test]
    fn a_guest_that_reports_a_lack_of_memory_all_the_time_is_asked_less_and_less() {
        let mut pauses = Vec::new();
        let mut pause = next_pause(OOM_PAUSE, Duration::from_secs(60));
        while pauses.len() < 10 {
            pauses.push(pause.as_millis());
            pause = next_pause(pause, Duration::ZERO);
        }
        let expected = [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000, 10_000];
        assert_eq!(pauses, expected);
        assert_eq!(next_pause(pause, pause), OOM_PAUSE);
    }

    #[test]
    fn a_console_does_not_fill_the_log() {
        let mut console = ConsoleLog::default();
        let began = Instant::now();
        let mut logged = |after: u64| {
            let now = began + Duration::from_secs(after);
            (0..10_000).filter(|_| console.is_logged(now)).count()
        };
        let (at_once, later) = (logged(1), logged(101));
        assert_eq!(at_once, 2000);
        assert!((99..=101).contains(&later), "{later}");
        assert_eq!(console.left_out, 20_000 - (at_once + later) as u64);
    }
}
