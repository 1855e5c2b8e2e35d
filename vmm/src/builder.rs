//! From a validated [`Spec`] to a running [`Vm`] in named steps. All virtio devices are attached by
//! [`Parts::attach`].

use crate::arch::{self, ArchError, BootInfo, MmioSlot};
use crate::bus::Bus;
use crate::config::{Serial, Spec};
use crate::event_loop::{LoopHandle, LoopThread};
use crate::exit::ExitReason;
use crate::hotplug::{HotplugSlot, HotplugSlots};
use crate::kvm::{self, Kicker, KvmError, Machine, Vcpu};
use crate::memory::{self, MemoryError};
use crate::standard_devices::StandardDevices;
use crate::vcpu::RunControl;
use crate::virtio_slot::{VirtioSlot, addresses, connect, publish_registers};
use crate::vm::Vm;
use koya_devices::serial::SerialPort;
use koya_devices::virtio::mmio::MmioTransport;
use koya_devices::virtio::registers::RegisterPages;
use koya_devices::virtio::{Memory, VirtioDevice};
use koya_host::walls::landlock::Place;
use koya_host::walls::{self, ConfineNewThreads};
use kvm_ioctls::Kvm;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Errors when a virtual machine is started.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StartError {
    /// KVM is unavailable.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory could not be allocated.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM refused an operation, or the kernel cannot be loaded.
    #[error(transparent)]
    Arch(#[from] ArchError),
    /// More devices than interrupts.
    #[error("a guest can have {max} virtio devices, {asked} were asked for")]
    TooManyDevices {
        /// The number of devices requested.
        asked: usize,
        /// The maximum.
        max: usize,
    },
    /// More CPUs than this host's KVM supports.
    #[error(
        "guests on this host can have up to {max} CPUs{}, {asked} were asked for",
        arch::CPU_LIMIT
    )]
    TooManyCpus {
        /// The number of CPUs requested, with those that can be turned on later.
        asked: u32,
        /// The maximum.
        max: usize,
    },
    /// The host could not create a thread or a descriptor.
    #[error("cannot {operation}")]
    Host {
        /// The operation that failed.
        operation: &'static str,
        /// The error from the host.
        #[source]
        source: io::Error,
    },
}

pub(crate) fn host(operation: &'static str) -> impl FnOnce(io::Error) -> StartError {
    move |source| StartError::Host { operation, source }
}

/// Builds a virtual machine.
pub struct VmBuilder {
    spec: Spec,
    devices: Vec<Box<dyn VirtioDevice>>,
    console: Box<dyn Write + Send>,
    confined: bool,
    places: Option<Vec<Place>>,
}

/// A machine whose vCPU threads have not been started.
struct Built {
    vm: Vm,
    vcpus: Vec<BuiltVcpu>,
}

/// A vCPU that has no thread yet.
pub(crate) struct BuiltVcpu {
    pub(crate) index: usize,
    pub(crate) vcpu: Vcpu,
    /// The host CPU that it is pinned to.
    pub(crate) pin: Option<u32>,
}

impl VmBuilder {
    pub(crate) fn new(spec: Spec) -> Self {
        Self {
            spec,
            devices: Vec::new(),
            console: Box::new(io::sink()),
            confined: true,
            places: None,
        }
    }

    /// Adds a virtio device. The guest sees devices of one kind in the order in which they are added, before
    /// those of the configuration.
    #[must_use]
    pub fn device(mut self, device: impl VirtioDevice + 'static) -> Self {
        self.devices.push(Box::new(device));
        self
    }

    /// Sets the output of the serial console. Default: discarded. The writer is called by a vCPU thread:
    /// while it blocks, that vCPU does not run, and the machine can't be paused or stopped.
    #[must_use]
    pub fn console(mut self, output: impl Write + Send + 'static) -> Self {
        self.console = Box::new(output);
        self
    }

    /// Whether the threads that the machine creates are confined: seccomp filters by role, no new privileges,
    /// no capabilities but those that serving files takes. Default: they are. Threads of the caller are left
    /// alone, also the one that runs the first vCPU ([`run`](Self::run)). A violation kills the process, by
    /// SIGSYS: the program may handle that signal ([`host::sys::report_violations`](crate::host::sys::report_violations)).
    ///
    /// An embedder's console and devices run on these threads. If they open files or make other
    /// system calls than [`host::walls`](crate::host::walls) allows there, they need an unconfined machine, or
    /// threads of their own that were started before. setuid(3) and its like, by which a C library changes all
    /// threads of the process, are a violation while the machine runs.
    #[must_use]
    pub fn confined(mut self, on: bool) -> Self {
        self.confined = on;
        self
    }

    /// Sets the files of the host that virtio-fs devices share, if they are all known now. Where confined threads that serve
    /// files have no root directory of their own, since the process lacks the privileges, they may then open no other files
    /// (Landlock, Linux 5.19). Give the same to [`Shares::within`](crate::devices::fs::Shares::within). Default: unknown.
    #[must_use]
    pub fn places(mut self, places: Option<Vec<Place>>) -> Self {
        self.places = places;
        self
    }

    /// Builds and starts the virtual machine.
    ///
    /// # Errors
    /// The missing or refused resource; nothing is left behind.
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
        let _confinement = self.confine_new_threads()?;
        let Built { mut vm, vcpus } = self.build()?;
        for vcpu in vcpus {
            vm.spawn(vcpu)?;
        }
        Ok(vm)
    }

    /// Builds the virtual machine, runs it to its end and returns the reason. The first vCPU runs on the
    /// calling thread, which saves the creation of a thread (a tenth of a millisecond): for programs that
    /// have nothing else to do meanwhile. The thread still receives the signals that it has not blocked,
    /// except SIGRTMIN, which is blocked.
    ///
    /// Pinned vCPUs always have threads of their own.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn run(self) -> Result<ExitReason, StartError> {
        let confinement = self.confine_new_threads()?;
        let Built { mut vm, vcpus } = self.build()?;
        let mut here = None;
        for vcpu in vcpus {
            match here {
                None if vcpu.pin.is_none() => here = Some(vcpu),
                _ => vm.spawn(vcpu)?,
            }
        }
        drop(confinement);
        vm.handle().resume();
        Ok(vm.run(here))
    }

    fn confine_new_threads(&self) -> Result<ConfineNewThreads, StartError> {
        let confined = walls::confine_new_threads_to(self.confined, self.places.as_deref());
        confined.map_err(host("confine the machine's threads"))
    }

    fn build(self) -> Result<Built, StartError> {
        let kvm = kvm::open_device()?;
        let asked = self.spec.cpus.count;
        let built = self.build_with(&kvm);
        // Limits of the host are looked at only now: each costs a call.
        built.map_err(|error| {
            if let Some(name) = kvm::missing(&kvm) {
                return KvmError::Missing(name).into();
            }
            let max = kvm.get_max_vcpus();
            match asked as usize > max {
                true => StartError::TooManyCpus { asked, max },
                false => error,
            }
        })
    }

    fn build_with(mut self, kvm: &Kvm) -> Result<Built, StartError> {
        let memory = Arc::new(memory::reserve(&self.spec.memory)?);
        let machine = Machine::new(kvm, memory.clone())?;
        let machine = Arc::new(machine);
        let mut features = arch::features(kvm)?;
        if self.spec.cpus.sve {
            arch::add_sve(&mut features, kvm)?;
        }
        arch::prepare_vm(&mut features, machine.fd())?;
        let cpus = self.spec.cpus.count;
        let kickers: Vec<_> = (0..cpus).map(|_| Kicker::default()).collect();
        let vcpus = make_vcpus(&features, &machine, &kickers)?;
        // Some interrupt controllers are complete only when all vCPUs exist. Interrupt sources are connected after that.
        let interrupts = arch::finish_vm(machine.fd())?;
        let mut parts = Parts {
            machine,
            memory,
            event_loop: None,
            bus: Bus::default(),
        };
        let boot_events = parts.bus.boot_events().clone();
        boot_events.built("memory and KVM");

        let serial = self.make_serial()?;
        arch::attach_platform(parts.machine.fd(), &mut parts.bus, serial.as_ref())?;
        let StandardDevices {
            devices,
            mut handles,
            sockets,
        } = StandardDevices::make(&mut self.spec, kvm, &parts.machine, &parts.memory)?;
        self.devices.extend(devices);
        let slots = parts.attach(kvm, self.devices)?;
        let hotplug = parts.add_hotplug_slots(slots.len(), self.spec.disk_slots)?;
        boot_events.built("devices attached");

        let hotplug_slots: Vec<_> = hotplug.iter().map(|slot| slot.place).collect();
        let info = BootInfo {
            boot: &mut self.spec.boot,
            memory: self.spec.memory,
            cpus: &self.spec.cpus,
            serial: self.spec.serial,
            slots: &slots,
            hotplug_slots: &hotplug_slots,
            interrupts,
        };
        let entry = arch::load(&parts.memory, info)?;
        boot_events.built("kernel loaded");
        let cpus = &self.spec.cpus;
        arch::set_entry(vcpus[0].fd(), entry)?;

        handles.hotplug = parts.make_hotplug(hotplug, cpus.count)?;
        let control = Arc::new(RunControl::new(kickers, cpus.online as usize));
        let mut vm = Vm::new(parts, control, serial, handles);
        vm.keep_sockets(sockets);
        let vcpus = vcpus
            .into_iter()
            .enumerate()
            .map(|(index, vcpu)| BuiltVcpu {
                index,
                vcpu,
                pin: cpus.pins.get(index).copied(),
            });
        let vcpus = vcpus.collect();
        Ok(Built { vm, vcpus })
    }

    fn make_serial(&mut self) -> Result<Option<Arc<Mutex<SerialPort>>>, StartError> {
        if self.spec.serial == Serial::None {
            return Ok(None);
        }
        let output = std::mem::replace(&mut self.console, Box::new(io::sink()));
        let port = SerialPort::new(output).map_err(host("make the serial port"))?;
        Ok(Some(Arc::new(Mutex::new(port))))
    }
}

/// The parts of a machine while devices are attached to it.
pub(crate) struct Parts {
    pub(crate) machine: Arc<Machine>,
    pub(crate) memory: Arc<Memory>,
    /// Created with the first device: a machine without devices has no event loop.
    pub(crate) event_loop: Option<LoopThread>,
    pub(crate) bus: Bus,
}

impl Parts {
    /// Attaches each device to a slot of its own and returns the slots in order.
    fn attach(
        &mut self,
        kvm: &Kvm,
        devices: Vec<Box<dyn VirtioDevice>>,
    ) -> Result<Vec<MmioSlot>, StartError> {
        if devices.is_empty() {
            return Ok(Vec::new());
        }
        // Devices whose registers the guest may read without an exit come first, so that one memory slot
        // holds them all.
        let (readable, others): (Vec<_>, Vec<_>) = devices
            .into_iter()
            .partition(|device| device.config().is_some());
        let (count, asked) = (readable.len(), readable.len() + others.len());
        let pages = RegisterPages::new(asked).map_err(host("reserve memory for registers"))?;
        let mut slots = Vec::new();
        for (index, device) in readable.into_iter().chain(others).enumerate() {
            let (Some(slot), Some(page)) = (arch::layout::device_slot(index), pages.page(index))
            else {
                let max = arch::layout::MAX_DEVICES;
                return Err(StartError::TooManyDevices { asked, max });
            };
            let (memory, looped) = (self.memory.clone(), self.event_loop()?.clone());
            let transport = MmioTransport::with_registers(device, memory, looped, page)
                .map_err(host("make a virtio device"))?;
            connect(&self.machine, &transport, slot)?;
            let device = VirtioSlot::new(Some(transport), self.bus.boot_events());
            let added = self.bus.add_memory(addresses(slot), device);
            added.map_err(ArchError::from)?;
            slots.push(slot);
        }
        publish_registers(kvm, &self.machine, &pages, count)?;
        Ok(slots)
    }

    /// Adds empty slots after those that hold a device.
    fn add_hotplug_slots(
        &mut self,
        taken: usize,
        count: usize,
    ) -> Result<Vec<HotplugSlot>, StartError> {
        let mut slots = Vec::new();
        for index in 0..count {
            let place = arch::layout::hotplug_slot(index);
            let device = VirtioSlot::new(None, self.bus.boot_events());
            let added = self.bus.add_memory(addresses(place), device.clone());
            added.map_err(ArchError::from)?;
            slots.push(HotplugSlot {
                number: taken + index,
                place,
                device,
            });
        }
        Ok(slots)
    }

    fn make_hotplug(
        &mut self,
        slots: Vec<HotplugSlot>,
        cpus: u32,
    ) -> Result<Option<HotplugSlots>, StartError> {
        let Some(first) = slots.first() else {
            return Ok(None);
        };
        let interrupt = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK);
        let interrupt = interrupt.map_err(host("make an interrupt"))?;
        self.machine
            .fd()
            .register_irqfd(&interrupt, first.place.irq)
            .map_err(ArchError::kvm("connect the hot-plug slots' interrupt"))?;
        self.event_loop()?;
        Ok(Some(HotplugSlots::new(slots, interrupt, cpus, self)))
    }

    fn event_loop(&mut self) -> Result<&Arc<LoopHandle>, StartError> {
        let started = match self.event_loop.take() {
            Some(started) => started,
            None => LoopThread::start().map_err(host("start the event loop"))?,
        };
        Ok(&self.event_loop.insert(started).handle)
    }
}

fn make_vcpus(
    features: &arch::Features,
    machine: &Arc<Machine>,
    kickers: &[Kicker],
) -> Result<Vec<Vcpu>, ArchError> {
    let cpus = kickers.len() as u32;
    (0..cpus)
        .zip(kickers)
        .map(|(index, kicker)| {
            let vcpu = Vcpu::new(machine, index, kicker.clone());
            let vcpu = vcpu.map_err(ArchError::kvm("make a vCPU"))?;
            arch::prepare_vcpu(features, vcpu.fd(), index, cpus)?;
            Ok(vcpu)
        })
        .collect()
}
