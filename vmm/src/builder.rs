//! From a checked [`Spec`] to a running [`Vm`]: a recipe of named steps. Every virtio device is
//! attached by the one path in [`connect`].

use crate::arch::{self, ArchError};
use crate::bus::Bus;
use crate::config::{Boot, DiskSpec, Serial, Spec};
use crate::event_loop::{LoopHandle, LoopThread};
use crate::exit::ExitReason;
use crate::hotplug::{HotPlug, Spare};
use crate::kvm::{self, Kicker, KvmError, Machine, Vcpu};
use crate::memory::{self, MemoryError};
use crate::panic_log;
use crate::vcpu::Gate;
use crate::vm::Vm;
use koya_devices::balloon::{Balloon, BalloonHandle};
use koya_devices::blk::{Block, BlockHandle};
use koya_devices::legacy::{ResetLine, SerialPort};
use koya_devices::mem::MemHandle;
use koya_devices::net::NetHandle;
use koya_devices::rng::{Rng, RngMetrics};
use koya_devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY_OFFSET};
use koya_devices::virtio::registers::RegisterPages;
use koya_devices::virtio::{Memory, VirtioDevice};
use koya_devices::vsock::{Ports, UnixSockets, Vsock};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd};
use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Why a virtual machine did not start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StartError {
    /// No KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM refused, or the kernel does not load.
    #[error(transparent)]
    Arch(#[from] ArchError),
    /// More devices than there are interrupts.
    #[error("a guest can have {max} virtio devices, {asked} were asked for")]
    TooManyDevices {
        /// How many there are.
        asked: usize,
        /// How many there can be.
        max: usize,
    },
    /// The host refused a thread or a descriptor.
    #[error("cannot {operation}")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// Memory that is plugged is used at once, and as far as the kernel can do without it in a form that
/// it can give up again (Documentation/admin-guide/mm/memory-hotplug.rst).
const HOTPLUG_CMDLINE: &str =
    " memhp_default_state=online memory_hotplug.online_policy=auto-movable";

fn host(operation: &'static str) -> impl FnOnce(io::Error) -> StartError {
    move |source| StartError::Host { operation, source }
}

/// What a virtual machine is built of.
pub struct VmBuilder {
    spec: Spec,
    devices: Vec<Box<dyn VirtioDevice>>,
    console: Box<dyn Write + Send>,
    handles: Handles,
    sockets: Option<UnixSockets>,
}

/// What the owner of a running machine keeps of its devices.
#[derive(Default)]
pub(crate) struct Handles {
    pub(crate) disks: Vec<BlockHandle>,
    pub(crate) networks: Vec<NetHandle>,
    pub(crate) balloon: Option<BalloonHandle>,
    pub(crate) mem: Option<MemHandle>,
    pub(crate) entropy: Option<Arc<RngMetrics>>,
    pub(crate) hotplug: Option<HotPlug>,
}

/// A machine whose vCPUs no thread runs yet.
struct Built {
    vm: Vm,
    vcpus: Vec<BuiltVcpu>,
}

/// A vCPU, and where it is to run.
pub(crate) struct BuiltVcpu {
    pub(crate) index: usize,
    pub(crate) vcpu: Vcpu,
    /// The host's CPU that it stays on.
    pub(crate) pin: Option<u32>,
}

impl VmBuilder {
    pub(crate) fn new(spec: Spec) -> Self {
        Self {
            spec,
            devices: Vec::new(),
            console: Box::new(io::sink()),
            handles: Handles::default(),
            sockets: None,
        }
    }

    /// Adds a virtio device; devices of a kind appear in the guest in the order in which they are added,
    /// before those of the configuration.
    #[must_use]
    pub fn device(mut self, device: impl VirtioDevice + 'static) -> Self {
        self.devices.push(Box::new(device));
        self
    }

    /// Where the serial console's output goes. Default: nowhere. The writer is called by a vCPU's
    /// thread: while it waits, that CPU stands still, and the machine can't be paused or stopped.
    #[must_use]
    pub fn console(mut self, output: impl Write + Send + 'static) -> Self {
        self.console = Box::new(output);
        self
    }

    /// Builds the virtual machine and lets it run.
    ///
    /// # Errors
    /// What was missing or refused; nothing is left behind.
    pub fn start(self) -> Result<Vm, StartError> {
        let vm = self.start_paused()?;
        vm.handle().resume();
        Ok(vm)
    }

    /// Builds the virtual machine; its vCPUs wait for [`VmHandle::resume`](crate::VmHandle::resume).
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_paused(self) -> Result<Vm, StartError> {
        let Built { mut vm, vcpus } = self.build()?;
        for vcpu in vcpus {
            vm.spawn(vcpu)?;
        }
        Ok(vm)
    }

    /// Builds the virtual machine, runs it to its end, and says why it ended. The first vCPU is the calling
    /// thread's, which saves a small guest the start of another (a tenth of a millisecond): for programs that have
    /// nothing else to do meanwhile. The thread gets the signals that it has not blocked; SIGRTMIN is.
    ///
    /// vCPUs that are to stay on CPUs of the host's have threads of their own here too.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn run(self) -> Result<ExitReason, StartError> {
        let Built { mut vm, vcpus } = self.build()?;
        let mut here = None;
        for vcpu in vcpus {
            match here {
                None if vcpu.pin.is_none() => here = Some(vcpu),
                _ => vm.spawn(vcpu)?,
            }
        }
        vm.handle().resume();
        Ok(vm.run(here))
    }

    fn build(self) -> Result<Built, StartError> {
        let kvm = kvm::open_device()?;
        let built = self.build_with(&kvm);
        built.map_err(|error| match kvm::missing(&kvm) {
            Some(name) => KvmError::Missing(name).into(),
            None => error,
        })
    }

    fn build_with(mut self, kvm: &Kvm) -> Result<Built, StartError> {
        let memory = Arc::new(memory::reserve(&self.spec.memory)?);
        let machine = Machine::new(kvm, memory.clone())
            .map_err(|(operation, source)| ArchError::Kvm { operation, source })?;
        let machine = Arc::new(machine);
        // Interrupt controllers come before vCPUs and before anything that raises interrupts.
        let features = arch::features(kvm)?;
        arch::prepare_vm(&features, machine.fd())?;
        let mut event_loop = None;

        let mut bus = Bus::default();
        let marks = bus.marks().clone();
        marks.built("memory and KVM");
        bus.set_reset(ResetLine::default());
        let serial = self.attach_serial(&machine, &mut bus)?;
        let mut words = self.attach_devices(kvm, &machine, &memory, &mut event_loop, &mut bus)?;
        let spares = self.add_spares(&mut bus, &mut words);

        marks.built("devices attached");

        let cmdline = self.cmdline(&words);
        let cpus = self.spec.cpus.count;
        let bytes = self.spec.memory.bytes;
        let entry = arch::load(&memory, bytes, &mut self.spec.boot, cpus, &cmdline)?;
        marks.built("kernel loaded");
        let vcpus = make_vcpus(&features, &machine, cpus)?;
        arch::set_entry(&vcpus[0], entry)?;

        let kickers: Vec<_> = vcpus.iter().map(|_| Kicker::default()).collect();
        let online = self.spec.cpus.online as usize;
        let gate = Arc::new(Gate::new(kickers.clone(), online));
        let bus = Arc::new(bus);
        if let Some(spare) = spares.first() {
            let interrupt = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK);
            let interrupt = interrupt.map_err(host("make an interrupt"))?;
            machine
                .fd()
                .register_irqfd(&interrupt, spare.place.irq)
                .map_err(ArchError::kvm("connect the spare windows' interrupt"))?;
            let looped = loop_of(&mut event_loop)?;
            let hotplug = HotPlug::new(spares, interrupt, cpus, &machine, &memory, looped);
            self.handles.hotplug = Some(hotplug);
        }
        let mut vm = Vm::new(
            machine,
            memory,
            event_loop,
            bus.clone(),
            gate.clone(),
            serial,
            self.handles,
        );
        vm.keep_sockets(self.sockets);
        let vcpus = vcpus.into_iter().zip(kickers).enumerate();
        let vcpus = vcpus.map(|(index, (fd, kicker))| BuiltVcpu {
            index,
            vcpu: Vcpu::new(fd, kicker),
            pin: self.spec.cpus.pins.get(index).copied(),
        });
        let vcpus = vcpus.collect();
        Ok(Built { vm, vcpus })
    }

    fn attach_serial(
        &mut self,
        machine: &Machine,
        bus: &mut Bus,
    ) -> Result<Option<Arc<Mutex<SerialPort>>>, StartError> {
        if self.spec.serial == Serial::None {
            return Ok(None);
        }
        let output = std::mem::replace(&mut self.console, Box::new(io::sink()));
        let port = SerialPort::new(output).map_err(host("make the serial port"))?;
        machine
            .fd()
            .register_irqfd(port.interrupt_event(), arch::layout::SERIAL_IRQ)
            .map_err(ArchError::kvm("connect the serial port's interrupt"))?;
        let port = Arc::new(Mutex::new(port));
        bus.set_serial(port.clone());
        Ok(Some(port))
    }

    fn attach_devices(
        &mut self,
        kvm: &Kvm,
        machine: &Arc<Machine>,
        memory: &Arc<Memory>,
        event_loop: &mut Option<LoopThread>,
        bus: &mut Bus,
    ) -> Result<Vec<String>, StartError> {
        let mut devices = std::mem::take(&mut self.devices);
        for spec in std::mem::take(&mut self.spec.disks) {
            let disk = make_disk(spec)?;
            self.handles.disks.push(disk.handle());
            devices.push(Box::new(disk));
        }
        for network in std::mem::take(&mut self.spec.networks) {
            self.handles.networks.push(network.handle());
            devices.push(Box::new(network));
        }
        if let Some(vsock) = &self.spec.vsock {
            let ports = Ports::new().map_err(host("make the vsock device"))?;
            let sockets = UnixSockets::listen(&ports, &vsock.socket);
            self.sockets = Some(sockets.map_err(host("listen on the vsock's socket"))?);
            devices.push(Box::new(Vsock::new(vsock.cid.into(), ports)));
        }
        if self.spec.balloon {
            let balloon = Balloon::new().map_err(host("make the balloon"))?;
            self.handles.balloon = Some(balloon.handle());
            devices.push(Box::new(balloon));
        }
        let mem = memory::device(&self.spec.memory, kvm, machine, memory);
        if let Some(mem) = mem.map_err(host("make the memory device"))? {
            self.handles.mem = Some(mem.handle());
            devices.push(Box::new(mem));
        }
        if self.spec.entropy {
            let entropy = Rng::default();
            self.handles.entropy = Some(entropy.metrics());
            devices.push(Box::new(entropy));
        }
        if devices.is_empty() {
            return Ok(Vec::new());
        }
        // Those whose registers the guest may read by itself come first: their windows are one slot of memory.
        let (readable, others): (Vec<_>, Vec<_>) = devices
            .into_iter()
            .partition(|device| device.config().is_some());
        let (count, asked) = (readable.len(), readable.len() + others.len());
        let pages = RegisterPages::new(asked).map_err(host("reserve memory for registers"))?;
        let mut words = Vec::new();
        for (index, device) in readable.into_iter().chain(others).enumerate() {
            let (Some(slot), Some(page)) = (arch::layout::device_slot(index), pages.page(index))
            else {
                let max = arch::layout::MAX_DEVICES;
                return Err(StartError::TooManyDevices { asked, max });
            };
            let looped = loop_of(event_loop)?.clone();
            let transport = MmioTransport::with_registers(device, memory.clone(), looped, page)
                .map_err(host("make a virtio device"))?;
            connect(machine, &transport, slot)?;
            words.push(window_word(slot));
            bus.add_window(slot.address, Some(transport));
        }
        show_registers(kvm, machine, &pages, count)?;
        Ok(words)
    }

    /// Windows without a device, after all others.
    fn add_spares(&self, bus: &mut Bus, words: &mut Vec<String>) -> Vec<Spare> {
        let slots = (0..self.spec.disk_slots).map(arch::layout::spare_slot);
        slots
            .map(|place| {
                words.push(window_word(place));
                Spare {
                    number: words.len() - 1,
                    place,
                    window: bus.add_window(place.address, None),
                }
            })
            .collect()
    }

    /// The kernel's command line: what every guest is told, a word for each device, what this guest's owner
    /// has to say, which may be against what stands before it.
    fn cmdline(&self, devices: &[String]) -> String {
        let own = match &self.spec.boot {
            Boot::Linux { cmdline, .. } => cmdline.as_str(),
            Boot::Flat(_) => "",
        };
        let console = match self.spec.serial {
            Serial::Console => "console=ttyS0",
            // The driver would probe for ports that are not there.
            Serial::None | Serial::Messages => "8250.nr_uarts=0",
        };
        let base = arch::BASE_CMDLINE;
        let mut line = format!("{base} {console} {}", panic_log::cmdline());
        let cpus = &self.spec.cpus;
        if cpus.online < cpus.count {
            line += &format!(" maxcpus={}", cpus.online);
        }
        if self.spec.memory.hotplug_bytes > 0 {
            line += HOTPLUG_CMDLINE;
        }
        for word in devices {
            line = line + " " + word;
        }
        match self.spec.serial {
            Serial::Messages => line + " " + &with_earlycon(own),
            Serial::None | Serial::Console => line + " " + own,
        }
    }
}

/// These words, then those for messages alone, which the kernel shows by what it has read so far of how much
/// to show; and last what is init's.
fn with_earlycon(own: &str) -> String {
    let (own, init) = own.split_at(words_for_init(own));
    format!("{own} {} {init}", arch::EARLYCON_CMDLINE)
}

/// Where in a command line the word is that all behind is init's, else its end: words as the kernel
/// divides them (`next_arg` in lib/cmdline.c), which may have blanks in quotes.
fn words_for_init(line: &str) -> usize {
    let mut is_quoted = false;
    let words = line.split(|c: char| {
        is_quoted ^= c == '"';
        c.is_ascii_whitespace() && !is_quoted
    });
    let mut at = 0;
    for word in words {
        if word == "--" {
            return at;
        }
        at += word.len() + 1;
    }
    line.len()
}

/// The event loop, which starts with the first that needs it: a machine without devices has none.
fn loop_of(event_loop: &mut Option<LoopThread>) -> Result<&Arc<LoopHandle>, StartError> {
    let started = match event_loop.take() {
        Some(started) => started,
        None => LoopThread::start().map_err(host("start the event loop"))?,
    };
    Ok(&event_loop.insert(started).handle)
}

/// Lets the guest read the registers of the first devices by itself, where it can.
fn show_registers(
    kvm: &Kvm,
    machine: &Machine,
    pages: &RegisterPages,
    count: usize,
) -> Result<(), ArchError> {
    let first = arch::layout::device_slot(0).filter(|_| count > 0);
    let Some(first) = first.filter(|_| arch::READS_MEMORY_OF_DEVICES) else {
        return Ok(());
    };
    if !kvm.check_extension(Cap::ReadonlyMem) {
        return Ok(());
    }
    machine
        .map_registers(pages, first.address, count)
        .map_err(ArchError::kvm("map devices' registers"))
}

/// How Linux learns of a window (drivers/virtio/virtio_mmio.c).
fn window_word(slot: arch::MmioSlot) -> String {
    format!("virtio_mmio.device=4K@{:#x}:{}", slot.address, slot.irq)
}

/// A disk as its configuration has it.
pub(crate) fn make_disk(spec: DiskSpec) -> Result<Block, StartError> {
    let disk = Block::new(spec.disk, spec.queues).map_err(host("make a disk"))?;
    Ok(disk.with_engine(spec.engine).with_limits(spec.limits))
}

/// Connects one device: its interrupt, and a kick for each queue that never leaves the kernel's
/// side of KVM_RUN for longer than an eventfd write.
fn connect(
    machine: &Machine,
    transport: &MmioTransport,
    slot: arch::MmioSlot,
) -> Result<(), ArchError> {
    machine
        .fd()
        .register_irqfd(transport.interrupt_event(), slot.irq)
        .map_err(ArchError::kvm("connect a device's interrupt"))?;
    connect_kicks(machine, transport, slot)
}

/// Connects a kick for each queue.
pub(crate) fn connect_kicks(
    machine: &Machine,
    transport: &MmioTransport,
    slot: arch::MmioSlot,
) -> Result<(), ArchError> {
    let notify = IoEventAddress::Mmio(slot.address + QUEUE_NOTIFY_OFFSET);
    for (queue, kick) in transport.kick_events().iter().enumerate() {
        machine
            .fd()
            .register_ioevent(kick, &notify, queue as u32)
            .map_err(ArchError::kvm("connect a queue's kick"))?;
    }
    Ok(())
}

/// Takes back what [`connect_kicks`] did, as far as it got.
pub(crate) fn disconnect_kicks(machine: &Machine, transport: &MmioTransport, slot: arch::MmioSlot) {
    let fd = machine.fd();
    let notify = IoEventAddress::Mmio(slot.address + QUEUE_NOTIFY_OFFSET);
    for (queue, kick) in transport.kick_events().iter().enumerate() {
        fd.unregister_ioevent(kick, &notify, queue as u32).ok();
    }
}

fn make_vcpus(
    features: &arch::Features,
    machine: &Machine,
    cpus: u32,
) -> Result<Vec<VcpuFd>, ArchError> {
    (0..cpus)
        .map(|index| {
            let vcpu = machine
                .fd()
                .create_vcpu(index.into())
                .map_err(ArchError::kvm("make a vCPU"))?;
            arch::prepare_vcpu(features, &vcpu, index, cpus)?;
            Ok(vcpu)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_asked_for_when_it_is_known_how_many() {
        let own = |words: &str| with_earlycon(words).replace(arch::EARLYCON_CMDLINE, "EARLY");
        for (words, line) in [
            ("", " EARLY "),
            ("quiet", "quiet EARLY "),
            ("quiet -- single", "quiet  EARLY -- single"),
            ("-- single", " EARLY -- single"),
            ("quiet --", "quiet  EARLY --"),
            ("a=b-- c -- d", "a=b-- c  EARLY -- d"),
            ("a=\"b -- c\" d", "a=\"b -- c\" d EARLY "),
        ] {
            assert_eq!(own(words), line);
        }
    }
}
