//! The MMIO transport: virtio 1.2, section 4.2, version 2 of the register layout.
//!
//! Each device has an MMIO slot of [`MMIO_SLOT_SIZE`] bytes. [`MmioTransport`] implements the registers and
//! the status state machine; it is called from vCPU threads, one at a time. Registers that the driver reads
//! are kept in a page of memory ([`RegisterPage`]) that can be mapped into the guest, so that reads do not
//! exit.
//!
//! ```text
//!            ACKNOWLEDGE      DRIVER        FEATURES_OK       DRIVER_OK
//!   reset ──────────────▶ ack ──────▶ driver ──────────▶ features ─────────▶ running
//!     ▲                                        (if the           (queues valid:
//!     │                                     features fit)          activate)
//!     └───────────────────────── status = 0 ──────────────────────────┘
//!   a fault while running sets DEVICE_NEEDS_RESET; only a reset leaves that state
//! ```

use super::queue::RingPosition;
use super::registers::{ConfigSpace, RegisterPage, RegisterPages};
use super::{
    ActivateError, Activation, ActiveQueue, DeviceKind, Interrupt, Memory, VirtioDevice, Worker,
};
use crate::fault::{guest_detail, guest_fault};
use crate::rate_limit::{Rate, RateLimiter};
use event_manager::MutEventSubscriber;
use koya_host::sync::lock;
use std::error::Error as _;
use std::io;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_bindings::virtio_mmio::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Size of a device's MMIO slot in bytes.
pub const MMIO_SLOT_SIZE: u64 = 0x1000;

/// Offset of QueueNotify, to which the driver writes a queue index to kick the queue.
pub const QUEUE_NOTIFY_OFFSET: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// Activations of a device by its driver: each creates threads and descriptors, and loads filters, which the whole host
/// notices. A driver that starts its device more often waits.
const ACTIVATIONS: Rate = Rate {
    per_second: 50,
    burst: Some(256),
};

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "KOYA", little-endian: section 4.2.2 leaves the vendor ID to the vendor.
const VENDOR: u32 = 0x4159_4f4b;
/// First queue register that the bindings do not define (QueueReset, section 4.2.2).
const QUEUE_RESET: u32 = 0x0c0;

// Values of the device status in the order in which a driver sets them (section 3.1.1).
const ACK: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = ACK | VIRTIO_CONFIG_S_DRIVER;
const FEATURES: u32 = DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
const RUNNING: u32 = FEATURES | VIRTIO_CONFIG_S_DRIVER_OK;

/// Reads the registers of an empty slot: magic value, version, and device ID 0, which drivers ignore (section
/// 4.2.3.1.1).
pub fn read_empty_slot(offset: u64, data: &mut [u8]) {
    let word = match u32::try_from(offset) {
        Ok(VIRTIO_MMIO_MAGIC_VALUE) => MAGIC,
        Ok(VIRTIO_MMIO_VERSION) => VERSION,
        _ => 0,
    };
    data.fill(0);
    if let Ok(bytes) = <&mut [u8; 4]>::try_from(data) {
        *bytes = word.to_le_bytes();
    }
}

/// Activates devices and runs the workers of active ones: the monitor's event loop, or that of a test.
pub trait EventLoop: Send + Sync {
    /// Runs `work`, which activates a device, on a thread that may create threads, and waits for it.
    ///
    /// # Errors
    /// If the thread has ended, or `work` panicked.
    fn start(&self, work: Box<dyn FnOnce() + Send>) -> io::Result<()>;
    /// Adds a worker and returns its ID.
    ///
    /// # Errors
    /// If the loop has ended.
    fn add(&self, worker: Box<dyn MutEventSubscriber + Send>) -> io::Result<u64>;
    /// Removes a worker and returns it; no call to it is in progress when this returns.
    fn remove(&self, id: u64) -> Option<Box<dyn MutEventSubscriber + Send>>;
}

/// A device's interrupt and its registers: other threads set interrupt reasons and parts of the status.
struct InterruptLine {
    event: EventFd,
    registers: RegisterPage,
}

impl InterruptLine {
    fn raise(&self, reason: u32) {
        self.registers
            .set_bits(VIRTIO_MMIO_INTERRUPT_STATUS, reason);
        if let Err(error) = self.event.write(1) {
            // The counter overflows only if the guest never took 2^64 - 1 interrupts.
            log::error!("cannot raise a virtio interrupt: {error}");
        }
    }
}

impl Interrupt for InterruptLine {
    fn queue(&self, _index: u16) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    fn config(&self) {
        self.registers.add(VIRTIO_MMIO_CONFIG_GENERATION, 1);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    fn needs_reset(&self) {
        self.registers
            .set_bits(VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_NEEDS_RESET);
        if self.registers.load(VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.raise(VIRTIO_MMIO_INT_CONFIG);
        }
    }
}

/// A register page that is not mapped into the guest.
fn private_page() -> io::Result<RegisterPage> {
    let page = RegisterPages::new(1)?.page(0);
    page.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// A device and its MMIO registers.
pub struct MmioTransport {
    /// Shared with the thread that activates the device, only for as long as that takes.
    device: Arc<Mutex<Box<dyn VirtioDevice>>>,
    kind: DeviceKind,
    memory: Arc<Memory>,
    event_loop: Arc<dyn EventLoop>,
    line: Arc<InterruptLine>,
    kicks: Vec<EventFd>,
    queues: Vec<Queue>,
    queue_select: u32,
    features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    worker: Option<u64>,
    active: bool,
    /// The host's error that kept the device from being activated the last time.
    failure: Option<String>,
    activations: RateLimiter,
    /// Ring positions of each queue that the device was given.
    positions: Vec<Option<Arc<RingPosition>>>,
}

impl MmioTransport {
    /// Creates a transport for `device`.
    ///
    /// # Errors
    /// If the host has no event descriptors or memory left, or the device has a queue size that is not a
    /// power of two up to 32768.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<Memory>,
        event_loop: Arc<dyn EventLoop>,
    ) -> io::Result<Self> {
        Self::with_registers(device, memory, event_loop, private_page()?)
    }

    /// The same with a register page that can be mapped into the guest, if the device [provides its
    /// configuration space](VirtioDevice::config).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_registers(
        mut device: Box<dyn VirtioDevice>,
        memory: Arc<Memory>,
        event_loop: Arc<dyn EventLoop>,
        registers: RegisterPage,
    ) -> io::Result<Self> {
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK);
        let mut queues = Vec::new();
        let mut kicks = Vec::new();
        for size in device.queue_sizes() {
            let queue = Queue::new(*size);
            queues.push(queue.map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?);
            kicks.push(event()?);
        }
        device.publish_config(ConfigSpace::of(&registers));
        let transport = Self {
            kind: device.kind(),
            device: Arc::new(Mutex::new(device)),
            memory,
            event_loop,
            line: Arc::new(InterruptLine {
                event: event()?,
                registers,
            }),
            kicks,
            queues,
            queue_select: 0,
            features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            worker: None,
            active: false,
            failure: None,
            activations: RateLimiter::of_operations(ACTIVATIONS),
            positions: Vec::new(),
        };
        transport.write_fixed_registers();
        transport.write_selected_registers();
        Ok(transport)
    }

    /// The kind of device.
    pub fn kind(&self) -> DeviceKind {
        self.kind
    }

    /// Whether its driver has set DRIVER_OK and the device has been activated.
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// The host's error if it could not activate the device when its driver last set DRIVER_OK. Faults of the driver
    /// are not recorded.
    pub fn host_failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// The eventfd that raises the device's interrupt, for an irqfd.
    pub fn interrupt_event(&self) -> &EventFd {
        &self.line.event
    }

    /// Makes the device raise a different interrupt, which several devices may share. Must be called before
    /// its driver probes it.
    ///
    /// # Errors
    /// If the host has no event descriptor left.
    pub fn share_interrupt(&mut self, event: &EventFd) -> io::Result<()> {
        self.line = Arc::new(InterruptLine {
            event: event.try_clone()?,
            registers: self.line.registers.clone(),
        });
        Ok(())
    }

    /// The eventfds of the queues' kicks, for ioeventfds at [`QUEUE_NOTIFY_OFFSET`] that match the queue
    /// index.
    pub fn kick_events(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Handles a register read by the driver.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset >= u64::from(VIRTIO_MMIO_CONFIG) {
            lock(&self.device).read_config(offset - u64::from(VIRTIO_MMIO_CONFIG), data);
            return;
        }
        data.fill(0);
        // Section 4.2.2.2: registers are read by aligned 32-bit accesses; anything else is a fault of the
        // driver and reads as zero.
        let Ok(word) = <&mut [u8; 4]>::try_from(data) else {
            return;
        };
        *word = self.line.registers.load(offset as u32).to_le_bytes();
    }

    /// Handles a register write by the driver.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= u64::from(VIRTIO_MMIO_CONFIG) {
            lock(&self.device).write_config(offset - u64::from(VIRTIO_MMIO_CONFIG), data);
            return;
        }
        let Ok(word) = <[u8; 4]>::try_from(data) else {
            return;
        };
        self.write_register(offset as u32, u32::from_le_bytes(word));
    }

    /// Stops the device like a reset by its driver, when the virtual machine ends.
    pub fn shutdown(&mut self) {
        self.reset();
    }

    fn status(&self) -> u32 {
        self.line.registers.load(VIRTIO_MMIO_STATUS)
    }

    /// Writes the registers that never change.
    fn write_fixed_registers(&self) {
        let fixed = [
            (VIRTIO_MMIO_MAGIC_VALUE, MAGIC),
            (VIRTIO_MMIO_VERSION, VERSION),
            (VIRTIO_MMIO_DEVICE_ID, self.kind.0),
            (VIRTIO_MMIO_VENDOR_ID, VENDOR),
            // No shared memory regions: section 4.2.2 requires a length of -1.
            (VIRTIO_MMIO_SHM_LEN_LOW, u32::MAX),
            (VIRTIO_MMIO_SHM_LEN_HIGH, u32::MAX),
            (VIRTIO_MMIO_SHM_BASE_LOW, u32::MAX),
            (VIRTIO_MMIO_SHM_BASE_HIGH, u32::MAX),
        ];
        for (register, value) in fixed {
            self.line.registers.store(register, value);
        }
    }

    /// Writes the registers that depend on the driver's selection.
    fn write_selected_registers(&self) {
        let features = self.offered_features();
        let features = match self.features_select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let queue = self.queues.get(self.queue_select as usize);
        let registers = &self.line.registers;
        registers.store(VIRTIO_MMIO_DEVICE_FEATURES, features);
        let size = queue.map_or(0, |queue| queue.max_size().into());
        registers.store(VIRTIO_MMIO_QUEUE_NUM_MAX, size);
        let ready = queue.map_or(0, |queue| queue.ready().into());
        registers.store(VIRTIO_MMIO_QUEUE_READY, ready);
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => {
                self.features_select = value;
                self.write_selected_registers();
            }
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            VIRTIO_MMIO_QUEUE_SEL => {
                self.queue_select = value;
                self.write_selected_registers();
            }
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                // Reached only if no ioeventfd handles the write.
                if let Some(kick) = self.kicks.get(value as usize) {
                    kick.write(1).ok();
                }
            }
            VIRTIO_MMIO_INTERRUPT_ACK => {
                let registers = &self.line.registers;
                registers.clear_bits(VIRTIO_MMIO_INTERRUPT_STATUS, value);
            }
            VIRTIO_MMIO_STATUS => self.set_status(value),
            _ => self.write_queue_register(offset, value),
        }
    }

    /// Section 3.1.1, step 4: features are accepted between DRIVER and FEATURES_OK.
    fn accept_features(&mut self, value: u32) {
        let status = self.status();
        let negotiating =
            status & VIRTIO_CONFIG_S_DRIVER != 0 && status & VIRTIO_CONFIG_S_FEATURES_OK == 0;
        if !negotiating {
            return;
        }
        let value = u64::from(value);
        match self.driver_features_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    /// Queues are configured between FEATURES_OK and DRIVER_OK, each until it is ready.
    fn write_queue_register(&mut self, offset: u32, value: u32) {
        let status = self.status();
        let setting_up = status & VIRTIO_CONFIG_S_FEATURES_OK != 0
            && status & (VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_FAILED) == 0;
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else {
            return;
        };
        if !setting_up || (queue.ready() && offset != VIRTIO_MMIO_QUEUE_READY) {
            return;
        }
        // `try_` functions, because the others log each refused value, without a limit.
        let address = |old: u64, low: Option<u32>, high: Option<u32>| {
            let high = high.unwrap_or((old >> 32) as u32);
            GuestAddress(u64::from(high) << 32 | u64::from(low.unwrap_or(old as u32)))
        };
        let (table, available, used) = (queue.desc_table(), queue.avail_ring(), queue.used_ring());
        let low = Some(value);
        let set = match offset {
            VIRTIO_MMIO_QUEUE_NUM => queue.try_set_size(u16::try_from(value).unwrap_or(0)),
            VIRTIO_MMIO_QUEUE_READY => {
                queue.set_ready(value == 1);
                return self.write_selected_registers();
            }
            VIRTIO_MMIO_QUEUE_DESC_LOW => {
                queue.try_set_desc_table_address(address(table, low, None))
            }
            VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                queue.try_set_desc_table_address(address(table, None, low))
            }
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => {
                queue.try_set_avail_ring_address(address(available, low, None))
            }
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                queue.try_set_avail_ring_address(address(available, None, low))
            }
            VIRTIO_MMIO_QUEUE_USED_LOW => queue.try_set_used_ring_address(address(used, low, None)),
            VIRTIO_MMIO_QUEUE_USED_HIGH => {
                queue.try_set_used_ring_address(address(used, None, low))
            }
            // VIRTIO_F_RING_RESET is not offered.
            QUEUE_RESET => Ok(()),
            _ => {
                guest_detail!("a driver wrote {value:#x} to register {offset:#x}");
                Ok(())
            }
        };
        if let Err(error) = set {
            guest_fault!("a driver wrote {value:#x} to queue register {offset:#x}: {error}");
        }
    }

    /// The status state machine (section 2.1): every transition that a driver can request.
    fn set_status(&mut self, value: u32) {
        let old = self.status();
        let known = old & !VIRTIO_CONFIG_S_NEEDS_RESET;
        match (known, value & !VIRTIO_CONFIG_S_NEEDS_RESET) {
            (_, 0) => self.reset(),
            (_, new) if new & VIRTIO_CONFIG_S_FAILED != 0 => {
                let registers = &self.line.registers;
                registers.set_bits(VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_FAILED);
            }
            (0, ACK) | (ACK, DRIVER) | (0, DRIVER) => {
                self.line.registers.store(VIRTIO_MMIO_STATUS, value);
            }
            (DRIVER, FEATURES) if self.are_features_valid() => {
                self.line.registers.store(VIRTIO_MMIO_STATUS, value);
            }
            // The driver reads the status back and sees that FEATURES_OK is not set.
            (DRIVER, FEATURES) => guest_fault!(
                "a driver accepted features {:#x}, which were not offered",
                self.driver_features
            ),
            (FEATURES, RUNNING) => {
                self.line.registers.store(VIRTIO_MMIO_STATUS, value);
                self.activate();
            }
            (old, new) if old == new => {}
            (old, new) => guest_fault!("a driver tried to go from status {old:#x} to {new:#x}"),
        }
    }

    fn offered_features(&self) -> u64 {
        lock(&self.device).features()
    }

    fn are_features_valid(&self) -> bool {
        let offered = self.offered_features();
        self.driver_features & !offered == 0 && self.driver_features & super::F_VERSION_1 != 0
    }

    fn activate(&mut self) {
        while let Some(wait) = self.activations.start(Instant::now()) {
            std::thread::sleep(wait);
        }
        self.failure = None;
        if let Err(error) = self.try_activate() {
            match error.source() {
                Some(source) => {
                    guest_fault!("cannot start a {}: {error}: {source}", self.kind);
                    self.failure = Some(format!("{error}: {source}"));
                }
                None => guest_fault!("cannot start a {}: {error}", self.kind),
            }
            self.line.needs_reset();
        }
    }

    fn try_activate(&mut self) -> Result<(), ActivateError> {
        let interrupt: Arc<dyn Interrupt> = self.line.clone();
        let mut queues = Vec::new();
        for (index, queue) in self.queues.iter_mut().enumerate() {
            let index = index as u16;
            if !queue.ready() {
                queues.push(None);
                continue;
            }
            queue.set_event_idx(self.driver_features & super::F_EVENT_IDX != 0);
            if !rings_in_memory(queue, &self.memory) {
                return Err(ActivateError::MissingQueue(index));
            }
            let state = queue.state();
            let owned = Queue::try_from(state).map_err(|_| ActivateError::MissingQueue(index))?;
            let kick = self.kicks[usize::from(index)].try_clone();
            let kick = kick.map_err(|source| ActivateError::Host {
                operation: "duplicate an event descriptor",
                source,
            })?;
            let memory = self.memory.clone();
            let queue = ActiveQueue::new(index, owned, memory, kick, interrupt.clone());
            queues.push(Some(queue));
        }
        let positions = queues.iter().map(|q| q.as_ref().map(ActiveQueue::position));
        self.positions = positions.collect();
        let worker = self.start_device(Activation {
            memory: self.memory.clone(),
            interrupt,
            queues,
            features: self.driver_features,
        })?;
        self.active = true;
        if let Worker::EventLoop(worker) = worker {
            let id = self
                .event_loop
                .add(worker)
                .map_err(|source| ActivateError::Host {
                    operation: "reach the event loop",
                    source,
                })?;
            self.worker = Some(id);
        }
        Ok(())
    }

    /// Activates the device on a thread that may create threads, which a vCPU thread may not.
    fn start_device(&self, activation: Activation) -> Result<Worker, ActivateError> {
        let (device, (sender, answer)) = (self.device.clone(), channel());
        let work = move || {
            let activated = lock(&device).activate(activation);
            sender.send(activated).ok();
        };
        let done = self.event_loop.start(Box::new(work));
        let answer = done.and_then(|()| answer.try_recv().map_err(io::Error::other));
        answer.map_err(|source| ActivateError::Host {
            operation: "reach the thread that starts devices",
            source,
        })?
    }

    fn reset(&mut self) {
        let worker = self.worker.take().and_then(|id| self.event_loop.remove(id));
        self.active = false;
        // Also for a stopped device: state that it kept belongs to the previous driver.
        lock(&self.device).reset(worker);
        for queue in &mut self.queues {
            queue.reset();
        }
        for kick in &self.kicks {
            // A stale kick must not wake the next driver's worker.
            kick.read().ok();
        }
        self.queue_select = 0;
        self.features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        let registers = &self.line.registers;
        registers.store(VIRTIO_MMIO_INTERRUPT_STATUS, 0);
        registers.store(VIRTIO_MMIO_STATUS, 0);
        self.write_selected_registers();
    }
}

/// Whether all three parts of a queue are in guest memory and aligned.
fn rings_in_memory(queue: &Queue, memory: &Memory) -> bool {
    use vm_memory::GuestMemoryBackend;
    let size = u64::from(queue.size());
    // Section 2.7: 16 bytes per descriptor; flags, index and event index around each ring.
    let parts = [
        (queue.desc_table(), 16 * size, 16),
        (queue.avail_ring(), 6 + 2 * size, 2),
        (queue.used_ring(), 6 + 8 * size, 4),
    ];
    size > 0
        && parts.iter().all(|(address, len, align)| {
            address % align == 0 && memory.check_range(GuestAddress(*address), *len as usize)
        })
}

mod saved;

#[cfg(test)]
mod tests;
