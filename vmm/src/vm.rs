//! A running virtual machine: who owns what, and in which order it goes.

use crate::builder::{BuiltVcpu, Parts, StartError, VmBuilder};
use crate::bus::Bus;
use crate::config::{DiskConfig, Spec};
use crate::exit::ExitReason;
use crate::hotplug::{AttachError, AttachedDisk, HotPlug};
use crate::kvm::{Machine, Thread};
use crate::marks::Marks;
use crate::memory::{self, MemoryUsage};
use crate::panic_log;
use crate::standard_devices::Handles;
use crate::take_down::TakeDown;
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
use rustix::thread::{CpuSet, sched_setaffinity};
use std::io;
use std::sync::{Arc, Mutex, Weak};

/// Runs the guest: whatever a device needs started, another thread starts.
const VCPU: Role = Role::new("koya-vcpu").of_the_guest();

/// A virtual machine. Dropping it stops it; nothing of it is left then: no thread, no
/// descriptor, no mapping. The guest has no say in how long that takes. A call of the host's that
/// does not return (a disk on a file server that is gone) is waited for 30 s; then an error is logged
/// that says what was waited for, and the thread, with what it uses, stays until its call returns.
pub struct Vm {
    control: Arc<RunControl>,
    /// What has to be ended; none once it is.
    live: Option<TakeDown>,
    bus: Arc<Bus>,
    serial: Option<Arc<Mutex<SerialPort>>>,
    handles: Arc<Handles>,
    memory: Arc<Memory>,
    /// Whoever asks for memory slots finds it there until all of it is taken down; vCPUs have it by themselves.
    _machine: Arc<Machine>,
}

/// Controls a virtual machine from any thread; useless, but harmless, after its end.
#[derive(Clone)]
pub struct VmHandle {
    control: Arc<RunControl>,
    serial: Option<Arc<Mutex<SerialPort>>>,
    handles: Arc<Handles>,
    /// The guest's memory goes with its machine, whoever has a handle.
    memory: Weak<Memory>,
    marks: Arc<Marks>,
}

impl Vm {
    /// Starts to build one.
    pub fn builder(spec: Spec) -> VmBuilder {
        VmBuilder::new(spec)
    }

    /// A machine of these parts, all of whose devices are attached.
    pub(crate) fn new(
        parts: Parts,
        control: Arc<RunControl>,
        serial: Option<Arc<Mutex<SerialPort>>>,
        handles: Handles,
    ) -> Self {
        let (bus, handles) = (Arc::new(parts.bus), Arc::new(handles));
        Self {
            control,
            live: Some(TakeDown::new(
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

    /// Gives a vCPU a thread of its own; dropping the machine ends and joins it.
    pub(crate) fn spawn(&mut self, built: BuiltVcpu) -> Result<(), StartError> {
        let BuiltVcpu { index, vcpu, pin } = built;
        let (control, bus) = (self.control.clone(), self.bus.clone());
        let thread = threads::spawn_numbered(VCPU, index, move || {
            if let Some(cpu) = pin {
                stay_on(cpu);
            }
            vcpu::run(index, vcpu, Thread::Own, &control, &bus);
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

    /// Runs a vCPU on this thread until the machine ends, takes it down, and says why it ended.
    pub(crate) fn run(self, here: Option<BuiltVcpu>) -> ExitReason {
        if let Some(BuiltVcpu { index, vcpu, .. }) = here {
            vcpu::run(index, vcpu, Thread::Callers, &self.control, &self.bus);
        }
        self.wait()
    }

    #[cfg(test)]
    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Keeps them until it is taken down.
    pub(crate) fn keep_sockets(&mut self, sockets: Option<UnixSockets>) {
        if let Some(live) = &mut self.live {
            live.keep_sockets(sockets);
        }
    }

    /// A handle for other threads.
    pub fn handle(&self) -> VmHandle {
        VmHandle {
            control: self.control.clone(),
            serial: self.serial.clone(),
            handles: self.handles.clone(),
            memory: Arc::downgrade(&self.memory),
            marks: self.bus.marks().clone(),
        }
    }

    /// Waits until the virtual machine ends, takes it down, and says why it ended.
    pub fn wait(mut self) -> ExitReason {
        let reason = self.control.wait();
        self.take_down();
        panic_log::explain(reason, &self.memory)
    }

    /// Stops the virtual machine at once, as pulling the plug would, and takes it down.
    pub fn stop(self) -> ExitReason {
        self.handle().stop();
        self.wait()
    }

    fn take_down(&mut self) {
        if let Some(live) = self.live.take() {
            live.run();
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.control.end(ExitReason::Stopped);
        self.take_down();
    }
}

impl VmHandle {
    /// Stops every vCPU outside the guest; returns when all have stopped. False if the virtual
    /// machine has ended.
    pub fn pause(&self) -> bool {
        self.control.pause()
    }

    /// Lets a paused virtual machine go on. False if it has ended.
    pub fn resume(&self) -> bool {
        self.control.resume()
    }

    /// Lets the first `count` of the machine's CPUs run and holds the others, whatever the guest's kernel does
    /// with them: to it they are CPUs that do not answer. So ask it to turn CPUs on after this, and to turn
    /// them off before. At least one runs, and at most as many as there are.
    pub fn set_online_cpus(&self, count: u32) {
        self.control.set_online(count as usize);
    }

    /// How many CPUs may run.
    pub fn online_cpus(&self) -> u32 {
        self.control.online() as u32
    }

    /// Ends the virtual machine; [`Vm::wait`] returns.
    pub fn stop(&self) {
        self.control.end(ExitReason::Stopped);
    }

    /// Why it ended, if it has. A kernel's panic shows here as the reset that it ends with; only
    /// [`Vm::wait`] reads its last words.
    pub fn ended(&self) -> Option<ExitReason> {
        self.control.ended()
    }

    /// Waits until it ends, without taking it down.
    pub fn wait_ended(&self) -> ExitReason {
        self.control.wait()
    }

    /// What came to pass while it was built and since, also after its end.
    pub fn marks(&self) -> &Arc<Marks> {
        &self.marks
    }

    /// What the machine and this process hold of the host's memory; nothing after its end.
    ///
    /// # Errors
    /// If `/proc` is not there.
    pub fn memory_usage(&self) -> io::Result<MemoryUsage> {
        match self.memory.upgrade() {
            Some(memory) => memory::usage(&memory),
            None => Ok(MemoryUsage::default()),
        }
    }

    /// Guest memory in bytes, whether it exists on the host or not; none after the machine's end.
    pub fn memory_size(&self) -> u64 {
        let memory = self.memory.upgrade();
        memory.map_or(0, |memory| memory::size(&memory))
    }

    /// The disks of the configuration, in its order.
    pub fn disks(&self) -> &[BlockHandle] {
        &self.handles.disks
    }

    /// Puts a further disk into one of the hot-plug slots. The guest's kernel does not know of it until
    /// it looks at the slot again.
    ///
    /// # Errors
    /// What is wrong with the disk, or that no slot is left.
    pub fn attach_disk(&self, config: &DiskConfig) -> Result<AttachedDisk, AttachError> {
        let hotplug = self.handles.hotplug.as_ref();
        hotplug.ok_or(AttachError::NoSlot(0))?.attach(config)
    }

    /// Takes the disk in a slot away, of which the guest's kernel has let go. The slot is free for another.
    ///
    /// # Errors
    /// If there is none.
    pub fn detach_disk(&self, slot: usize) -> Result<(), AttachError> {
        let hotplug = self.handles.hotplug.as_ref();
        hotplug.ok_or(AttachError::NoDisk(slot))?.detach(slot, true)
    }

    /// Takes the disk in a slot away from a guest that has not let go of it, as if a cable was pulled: what it
    /// has not written is lost, and its requests have no answer. The file is closed, and its lock is free.
    /// The slot is not used again, since the guest's driver may still use it.
    ///
    /// # Errors
    /// If there is none.
    pub fn pull_disk(&self, slot: usize) -> Result<(), AttachError> {
        let hotplug = self.handles.hotplug.as_ref();
        hotplug
            .ok_or(AttachError::NoDisk(slot))?
            .detach(slot, false)
    }

    /// The disks that were attached and not detached.
    pub fn attached_disks(&self) -> Vec<AttachedDisk> {
        let hotplug = self.handles.hotplug.as_ref();
        hotplug.map(HotPlug::disks).unwrap_or_default()
    }

    /// The networks of the configuration, in its order.
    pub fn networks(&self) -> &[NetHandle] {
        &self.handles.networks
    }

    /// The balloon, if the configuration has one.
    pub fn balloon(&self) -> Option<&BalloonHandle> {
        self.handles.balloon.as_ref()
    }

    /// The device by which memory grows and shrinks, if the configuration has room for it.
    pub fn mem(&self) -> Option<&MemHandle> {
        self.handles.mem.as_ref()
    }

    /// What the entropy device did so far, if the configuration has one.
    pub fn entropy(&self) -> Option<&RngMetrics> {
        self.handles.entropy.as_deref()
    }

    /// Offers bytes to the serial console; how many the guest's FIFO had room for.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        self.serial.as_ref().map_or(0, |s| lock(s).input(bytes))
    }
}

/// Keeps this thread on one CPU of the host.
fn stay_on(cpu: u32) {
    let mut set = CpuSet::new();
    set.set(cpu as usize);
    if let Err(error) = sched_setaffinity(None, &set) {
        // It was there when the configuration was checked.
        log::warn!("cannot keep a vCPU on CPU {cpu}: {error}");
    }
}
