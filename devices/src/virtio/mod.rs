//! Common parts of virtio devices: the device trait, interrupts and queues.
//!
//! A device does not know its transport. The transport ([`mmio`]) implements the registers and the status
//! state machine, and calls the device from a vCPU thread. When the driver sets DRIVER_OK, another thread,
//! which may create threads, passes the queues to the device ([`Activation`]). The device returns the
//! [`Worker`] that serves them, on the event loop or on its own threads.

pub mod chain;
pub mod loop_worker;
pub mod memory;
pub mod mmio;
pub mod queue;
pub mod registers;
pub mod state;

use event_manager::MutEventSubscriber;
use registers::ConfigSpace;
use std::sync::Arc;
use thiserror::Error;

pub use chain::{Chain, ChainError};
pub use memory::{Memory, MemoryRegion};
pub use queue::{ActiveQueue, QueueError};
pub use state::{Payload, Schema, StateError};

/// Feature bit: the device complies with virtio 1.0 or later (virtio 1.2, section 6).
pub const F_VERSION_1: u64 = 1 << 32;
/// Feature bit: indirect descriptors (section 2.7.5.3).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// Feature bit: notifications are suppressed by index (sections 2.7.7 and 2.7.8).
pub const F_EVENT_IDX: u64 = 1 << 29;

/// Features of the transport and the queues, offered by nearly every device.
pub const COMMON_FEATURES: u64 = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;

/// The kind of a device: its virtio device ID (virtio 1.2, section 5). A custom device has an ID of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceKind(pub u32);

impl DeviceKind {
    /// Section 5.1
    pub const NET: Self = Self(1);
    /// Section 5.2
    pub const BLOCK: Self = Self(2);
    /// Section 5.4
    pub const ENTROPY: Self = Self(4);
    /// Section 5.5
    pub const BALLOON: Self = Self(5);
    /// Section 5.10
    pub const VSOCK: Self = Self(19);
    /// Section 5.15
    pub const MEMORY: Self = Self(24);
    /// Section 5.11
    pub const FILE_SYSTEM: Self = Self(26);

    /// A readable name; all kinds that are not in this crate share one.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NET => "virtio-net",
            Self::BLOCK => "virtio-blk",
            Self::ENTROPY => "virtio-rng",
            Self::BALLOON => "virtio-balloon",
            Self::VSOCK => "virtio-vsock",
            Self::MEMORY => "virtio-mem",
            Self::FILE_SYSTEM => "virtio-fs",
            _ => "virtio device",
        }
    }
}

impl std::fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.name(), self.0)
    }
}

/// Notifies the driver of a device. Cheap; may be called from any thread.
pub trait Interrupt: Send + Sync {
    /// Queue `index` has used buffers.
    fn queue(&self, index: u16);
    /// The configuration space has changed.
    fn config(&self);
    /// The device has stopped because of a fault (DEVICE_NEEDS_RESET, section 2.1.2).
    fn needs_reset(&self);
}

/// Resources passed to a device when its driver has set DRIVER_OK.
pub struct Activation {
    /// Guest memory.
    pub memory: Arc<Memory>,
    /// The device's interrupt.
    pub interrupt: Arc<dyn Interrupt>,
    /// The queues in order; `None` for those that the driver did not enable.
    pub queues: Vec<Option<ActiveQueue>>,
    /// The negotiated features.
    pub features: u64,
}

impl Activation {
    /// Takes queue `index`.
    ///
    /// # Errors
    /// [`ActivateError::MissingQueue`] if the driver did not enable it.
    pub fn take_queue(&mut self, index: u16) -> Result<ActiveQueue, ActivateError> {
        self.queues
            .get_mut(usize::from(index))
            .and_then(Option::take)
            .ok_or(ActivateError::MissingQueue(index))
    }
}

/// A worker on the event loop.
pub type EventWorker = Box<dyn MutEventSubscriber + Send>;

/// The way in which an active device's queues are served.
pub enum Worker {
    /// On the event loop.
    EventLoop(EventWorker),
    /// By threads of the device, which [`VirtioDevice::reset`] joins.
    OwnThreads,
}

/// Errors when a device is activated.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ActivateError {
    /// The driver set DRIVER_OK without a queue that the device needs.
    #[error("the driver did not enable queue {0}")]
    MissingQueue(u16),
    /// The host refused a resource.
    #[error("cannot {operation}")]
    Host {
        /// The operation that failed.
        operation: &'static str,
        /// The error from the host.
        #[source]
        source: std::io::Error,
    },
}

/// A virtio device, independent of its transport.
///
/// Only its kind, its queues, [`activate`](Self::activate) and [`reset`](Self::reset) are required; the rest
/// is for configuration spaces and for saving. Methods that take `&mut self` are called by one thread at a
/// time.
pub trait VirtioDevice: Send {
    /// The kind of device.
    fn kind(&self) -> DeviceKind;
    /// The maximum size of each queue; the length is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// The features offered: those of the transport and the queues ([`COMMON_FEATURES`], or fewer), and its
    /// own.
    fn features(&self) -> u64 {
        COMMON_FEATURES
    }
    /// The whole configuration space, if the guest may read it from mapped memory: reads then have no side
    /// effects, and each field that changes is within one aligned word, so that it is never read
    /// half-updated.
    fn config(&self) -> Option<Vec<u8>> {
        None
    }
    /// Sets the memory from which the driver reads the configuration space; called once, before a driver exists. The device
    /// writes it there, and again on each change, before it raises the interrupt for the change.
    fn publish_config(&mut self, space: ConfigSpace) {
        space.publish(&self.config().unwrap_or_default());
    }
    /// Reads the configuration space from `offset` on; bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config().unwrap_or_default(), offset, data);
    }
    /// Handles a write to the configuration space. Few devices have writable fields.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// Starts serving the queues. Called on a thread that may create threads, while the driver waits.
    ///
    /// # Errors
    /// Faults of the driver and errors of the host; the transport reports both as DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<Worker, ActivateError>;
    /// Returns the state apart from the queues. Called while the queues are not served.
    ///
    /// # Errors
    /// [`StateError::Unsupported`] for kinds whose state cannot be saved.
    fn save(&self) -> Result<Payload, StateError> {
        Err(StateError::Unsupported(self.kind()))
    }
    /// Restores the state of a device of the same kind, before activation.
    ///
    /// # Errors
    /// If the state is of another kind or does not fit the configuration ([`StateError::Mismatch`]).
    fn restore(&mut self, _state: &Payload) -> Result<(), StateError> {
        Err(StateError::Unsupported(self.kind()))
    }
    /// Stops serving the queues temporarily: requests in flight are completed first. `worker` is the one that
    /// the event loop returned.
    fn stop(&mut self, worker: Option<EventWorker>) {
        self.reset(worker);
    }
    /// Returns to the state before [`activate`](Self::activate): no thread uses the queues when this returns.
    /// `worker` is the one that the event loop returned.
    fn reset(&mut self, worker: Option<EventWorker>);
}

/// Reads part of a configuration space; bytes beyond its end read as zero.
pub fn read_config_space(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Ok(start) = usize::try_from(offset) else {
        return;
    };
    let Some(rest) = space.get(start..) else {
        return;
    };
    let count = rest.len().min(data.len());
    data[..count].copy_from_slice(&rest[..count]);
}
