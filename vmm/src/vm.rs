//! A running virtual machine: ownership and the order of teardown.

use crate::boot_events::BootEvents;
use crate::builder::{BuiltVcpu, Parts, StartError, VmBuilder};
use crate::bus::Bus;
use crate::config::{DiskConfig, NetConfig, Spec};
use crate::exit::ExitReason;
use crate::hotplug::{AttachError, AttachedDisk, AttachedNetwork, HotplugSlots};
use crate::kvm::{Machine, Thread};
use crate::memory::{self, MemoryUsage};
use crate::panic_log;
use crate::standard_devices::Handles;
use crate::teardown::Teardown;
use crate::vcpu::{self, RunControl};
use koya_devices::balloon::BalloonHandle;
use koya_devices::blk::BlockHandle;
use koya_devices::mem::MemHandle;
use koya_devices::net::NetHandle;
use koya_devices::rng::RngMetrics;
use koya_devices::serial::SerialPort;
use koya_devices::virtio::Memory;
use koya_devices::vsock::UnixSockets;
use koya_host::sync::lock;
use koya_host::threads::{self, Role};
use koya_host::walls::Filter;
use rustix::thread::{CpuSet, sched_setaffinity};
use std::io;
use std::sync::{Arc, Mutex, Weak};

/// Runs the guest, so it must not create threads.
const VCPU: Role = Role::new("koya-vcpu")
    .guest_facing()
    .confined_by(Filter::Vcpu);

/// A virtual machine. Dropping it stops it and leaves nothing behind: no thread, descriptor or mapping. The
/// guest cannot delay that. If a host system call does not return (a disk on a file server that is gone), the drop waits for
/// up to 30 s and then logs an error with the part that it waited for; that thread and its resources remain until the call
/// returns.
pub struct Vm {
    control: Arc<RunControl>,
    /// The parts to tear down; `None` afterwards.
    live: Option<Teardown>,
    bus: Arc<Bus>,
    serial: Option<Arc<Mutex<SerialPort>>>,
    handles: Arc<Handles>,
    memory: Arc<Memory>,
    /// Keeps the machine for the memory slots of virtio-mem until teardown; vCPUs hold their own reference.
    _machine: Arc<Machine>,
}

/// Controls a virtual machine from any thread; does nothing after its end.
#[derive(Clone)]
pub struct VmHandle {
    control: Arc<RunControl>,
    serial: Option<Arc<Mutex<SerialPort>>>,
    handles: Arc<Handles>,
    /// Weak: guest memory must not outlive its machine.
    memory: Weak<Memory>,
    boot_events: Arc<BootEvents>,
}

impl Vm {
    /// Returns a builder for a virtual machine.
    pub fn builder(spec: Spec) -> VmBuilder {
        VmBuilder::new(spec)
    }

    /// A machine of these parts, with all devices attached.
    pub(crate) fn new(
        parts: Parts,
        control: Arc<RunControl>,
        serial: Option<Arc<Mutex<SerialPort>>>,
        handles: Handles,
    ) -> Self {
        let (bus, handles) = (Arc::new(parts.bus), Arc::new(handles));
        Self {
            control,
            live: Some(Teardown::new(
                bus.clone(),
                parts.event_loop,
                handles.clone(),
            )),
            bus,
            serial,
            handles,
            memory: parts.memory,
            _machine: parts.machine,
        }
    }

    /// Starts a thread for a vCPU; it is ended and joined when the machine is dropped.
    pub(crate) fn spawn(&mut self, built: BuiltVcpu) -> Result<(), StartError> {
        let BuiltVcpu { index, vcpu, pin } = built;
        let (control, bus) = (self.control.clone(), self.bus.clone());
        let thread = threads::spawn_numbered(VCPU, index, move || {
            if let Some(cpu) = pin {
                stay_on(cpu);
            }
            vcpu::run(index, vcpu, Thread::Dedicated, &control, &bus);
        });
        let host = |source| StartError::Host {
            operation: "start a vCPU's thread",
            source,
        };
        let thread = thread.map_err(host)?;
        if let Some(live) = &mut self.live {
            live.add_vcpu(index, thread);
        }
        Ok(())
    }

    /// Runs a vCPU on this thread until the machine ends, tears it down and returns the reason.
    pub(crate) fn run(self, here: Option<BuiltVcpu>) -> ExitReason {
        if let Some(BuiltVcpu { index, vcpu, .. }) = here {
            vcpu::run(index, vcpu, Thread::Caller, &self.control, &self.bus);
        }
        self.wait()
    }

    #[cfg(test)]
    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Keeps the sockets until teardown.
    pub(crate) fn keep_sockets(&mut self, sockets: Option<UnixSockets>) {
        if let Some(live) = &mut self.live {
            live.keep_sockets(sockets);
        }
    }

    /// Returns a handle for other threads.
    pub fn handle(&self) -> VmHandle {
        VmHandle {
            control: self.control.clone(),
            serial: self.serial.clone(),
            handles: self.handles.clone(),
            memory: Arc::downgrade(&self.memory),
            boot_events: self.bus.boot_events().clone(),
        }
    }

    /// Waits until the virtual machine ends, tears it down and returns the reason.
    pub fn wait(mut self) -> ExitReason {
        let reason = self.control.wait();
        self.tear_down();
        panic_log::explain(reason, &self.memory)
    }

    /// Stops the virtual machine at once, as if powered off, and tears it down.
    pub fn stop(self) -> ExitReason {
        self.handle().stop();
        self.wait()
    }

    fn tear_down(&mut self) {
        if let Some(live) = self.live.take() {
            live.run();
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.control.end(ExitReason::Stopped);
        self.tear_down();
    }
}

impl VmHandle {
    /// Pauses all vCPUs and waits until they have left the guest. False if the virtual machine has ended.
    pub fn pause(&self) -> bool {
        self.control.pause()
    }

    /// Resumes a paused virtual machine. False if it has ended.
    pub fn resume(&self) -> bool {
        self.control.resume()
    }

    /// Lets the first `count` vCPUs run and holds the others, whatever the guest kernel does with them: to
    /// the guest they are CPUs that do not respond. So have the guest bring CPUs online after this call, and
    /// offline before it. At least one vCPU runs, and at most all of them.
    pub fn set_online_cpus(&self, count: u32) {
        self.control.set_online(count as usize);
    }

    /// Number of vCPUs that may run.
    pub fn online_cpus(&self) -> u32 {
        self.control.online() as u32
    }

    /// Ends the virtual machine; [`Vm::wait`] returns.
    pub fn stop(&self) {
        self.control.end(ExitReason::Stopped);
    }

    /// The reason why it ended, if it has. A kernel panic appears here as the reset that follows it; only [`Vm::wait`]
    /// reads the panic log.
    pub fn ended(&self) -> Option<ExitReason> {
        self.control.ended()
    }

    /// Waits until it ends, without tearing it down.
    pub fn wait_exit(&self) -> ExitReason {
        self.control.wait()
    }

    /// Boot events and exit counts; also available after the machine's end.
    pub fn boot_events(&self) -> &Arc<BootEvents> {
        &self.boot_events
    }

    /// Memory use of the machine and this process on the host; zero after the machine's end.
    ///
    /// # Errors
    /// If `/proc` cannot be read.
    pub fn memory_usage(&self) -> io::Result<MemoryUsage> {
        match self.memory.upgrade() {
            Some(memory) => memory::usage(&memory),
            None => Ok(MemoryUsage::default()),
        }
    }

    /// Size of guest memory in bytes, populated or not; zero after the machine's end.
    pub fn memory_size(&self) -> u64 {
        let memory = self.memory.upgrade();
        memory.map_or(0, |memory| memory::size(&memory))
    }

    /// The disks of the configuration, in order.
    pub fn disks(&self) -> &[BlockHandle] {
        &self.handles.disks
    }

    /// Attaches a disk to a hot-plug slot. The guest kernel does not see it until it probes the slot again.
    ///
    /// # Errors
    /// The reason why the disk cannot be used, or the lack of a free slot.
    pub fn attach_disk(&self, config: &DiskConfig) -> Result<AttachedDisk, AttachError> {
        let hotplug = self.handles.hotplug.as_ref();
        hotplug.ok_or(AttachError::NoSlot(0))?.attach_disk(config)
    }

    /// Detaches the disk in a slot after the guest kernel has released it. The slot can be used again.
    ///
    /// # Errors
    /// If the slot is empty.
    pub fn detach_disk(&self, slot: usize) -> Result<(), AttachError> {
        let hotplug = self.handles.hotplug.as_ref();
        hotplug
            .ok_or(AttachError::NoDisk(slot))?
            .detach_disk(slot, true)
    }

    /// Removes the disk in a slot before the guest has released it, as if a cable were pulled: unwritten data
    /// is lost and requests are not answered. The file is closed and unlocked. The slot is not used again,
    /// since the guest's driver may still access it.
    ///
    /// # Errors
    /// If the slot is empty.
    pub fn force_detach_disk(&self, slot: usize) -> Result<(), AttachError> {
        let hotplug = self.handles.hotplug.as_ref();
        hotplug
            .ok_or(AttachError::NoDisk(slot))?
            .detach_disk(slot, false)
    }

    /// The disks attached at run time.
    pub fn attached_disks(&self) -> Vec<AttachedDisk> {
        let hotplug = self.handles.hotplug.as_ref();
        hotplug.map(HotplugSlots::disks).unwrap_or_default()
    }

    /// Attaches a network to a hot-plug slot, as [`attach_disk`](Self::attach_disk) does with a disk. Its tap is in the network
    /// namespace of the calling thread.
    ///
    /// # Errors
    /// The reason why the network cannot be used, or the lack of a free slot.
    pub fn attach_network(&self, config: &NetConfig) -> Result<AttachedNetwork, AttachError> {
        let hotplug = self.handles.hotplug.as_ref();
        hotplug
            .ok_or(AttachError::NoSlot(0))?
            .attach_network(config)
    }

    /// Detaches the network in a slot. The slot can be used again if the guest kernel has released it: otherwise its driver may
    /// still access it.
    ///
    /// # Errors
    /// If there is no network in the slot.
    pub fn detach_network(&self, slot: usize, is_released: bool) -> Result<(), AttachError> {
        let hotplug = self.handles.hotplug.as_ref();
        hotplug
            .ok_or(AttachError::NoNetwork(slot))?
            .detach_network(slot, is_released)
    }

    /// The networks attached at run time.
    pub fn attached_networks(&self) -> Vec<AttachedNetwork> {
        let hotplug = self.handles.hotplug.as_ref();
        hotplug.map(HotplugSlots::networks).unwrap_or_default()
    }

    /// The networks of the configuration, in order.
    pub fn networks(&self) -> &[NetHandle] {
        &self.handles.networks
    }

    /// The balloon, if the configuration has one.
    pub fn balloon(&self) -> Option<&BalloonHandle> {
        self.handles.balloon.as_ref()
    }

    /// The virtio-mem device, if the memory can grow.
    pub fn mem(&self) -> Option<&MemHandle> {
        self.handles.mem.as_ref()
    }

    /// Metrics of the entropy device, if the configuration has one.
    pub fn entropy(&self) -> Option<&RngMetrics> {
        self.handles.entropy.as_deref()
    }

    /// Sends bytes to the serial console; returns how many fitted into the FIFO.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        self.serial.as_ref().map_or(0, |s| lock(s).input(bytes))
    }
}

/// Pins this thread to a host CPU.
fn stay_on(cpu: u32) {
    let mut set = CpuSet::new();
    set.set(cpu as usize);
    if let Err(error) = sched_setaffinity(None, &set) {
        // The CPU existed when the configuration was checked.
        log::warn!("cannot keep a vCPU on CPU {cpu}: {error}");
    }
}
