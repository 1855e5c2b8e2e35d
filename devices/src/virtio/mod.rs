//! What every virtio device shares: the device trait, its interrupt, and its queues.
//!
//! A device does not know its transport. The transport ([`mmio`]) keeps the register file and
//! the status state machine, and calls the device from a vCPU thread. When the driver is ready
//! it has another thread, which may start others, give the device its queues ([`Activation`]); the
//! device answers with the [`Worker`] that serves them, on the event loop or on threads of its own.

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

/// Feature bit: the device follows virtio 1.0 or later (virtio 1.2, section 6).
pub const F_VERSION_1: u64 = 1 << 32;
/// Feature bit: descriptors may point to tables of descriptors (section 2.7.5.3).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// Feature bit: notifications are suppressed by index (section 2.7.7 and 2.7.8).
pub const F_EVENT_IDX: u64 = 1 << 29;

/// Features of the transport and the queues, offered by nearly every device.
pub const COMMON_FEATURES: u64 = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;

/// Which device it is: its virtio device ID (virtio 1.2, section 5). An embedder's device has one of its
/// own.
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

    /// As people name it; one name for all that are not in this crate.
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

/// How a device reaches its driver. Cheap, from any thread.
pub trait Interrupt: Send + Sync {
    /// The driver should look at queue `index`.
    fn queue(&self, index: u16);
    /// The device's configuration space changed.
    fn config(&self);
    /// The device met a fault of its driver and stopped (DEVICE_NEEDS_RESET, section 2.1.2).
    fn needs_reset(&self);
}

/// What a device gets when its driver has set DRIVER_OK.
pub struct Activation {
    /// Guest memory.
    pub memory: Arc<Memory>,
    /// The device's interrupt.
    pub interrupt: Arc<dyn Interrupt>,
    /// The queues that the driver enabled, in their order; `None` where it did not.
    pub queues: Vec<Option<ActiveQueue>>,
    /// The features that both sides agreed on.
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

/// What the event loop runs for a device.
pub type EventWorker = Box<dyn MutEventSubscriber + Send>;

/// Who serves an active device's queues.
pub enum Worker {
    /// The event loop.
    EventLoop(EventWorker),
    /// Threads that the device started and that [`VirtioDevice::reset`] joins.
    OwnThreads,
}

/// Why a device could not be activated.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ActivateError {
    /// The driver set DRIVER_OK without a queue that the device needs.
    #[error("the driver did not enable queue {0}")]
    MissingQueue(u16),
    /// The host refused a resource.
    #[error("cannot {operation}")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
}

/// A virtio device, whatever its transport.
///
/// What it must have is its kind, its queues, [`activate`](Self::activate) and [`reset`](Self::reset); the
/// rest is for configuration spaces, and for saving. Every method but those that read is called by one
/// thread at a time.
pub trait VirtioDevice: Send {
    /// Which device it is.
    fn kind(&self) -> DeviceKind;
    /// The largest size of each queue; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// The features that it offers: those of the transport and the queues ([`COMMON_FEATURES`], or fewer),
    /// and its own.
    fn features(&self) -> u64 {
        COMMON_FEATURES
    }
    /// The whole configuration space as it is, if a guest may have it as memory: the device need not know that
    /// it is read, and a field that changes lies within one aligned word, so that none is read half changed.
    fn config(&self) -> Option<Vec<u8>> {
        None
    }
    /// Says once, before there is a driver, where one reads the configuration space. A device puts it there,
    /// and again whenever it changes, before it raises the interrupt for that.
    fn publish_config(&mut self, space: ConfigSpace) {
        space.publish(&self.config().unwrap_or_default());
    }
    /// Reads the configuration space from `offset`; what lies beyond it reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config().unwrap_or_default(), offset, data);
    }
    /// The driver writes to the configuration space. Few devices have a field for that.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// Starts to serve the queues. Called by a thread that may start others, while the driver waits.
    ///
    /// # Errors
    /// The driver's faults and the host's; the transport reports both as DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<Worker, ActivateError>;
    /// What it has beyond its queues, while nobody serves them.
    ///
    /// # Errors
    /// [`StateError::Unsupported`] for kinds whose state is not kept.
    fn save(&self) -> Result<Payload, StateError> {
        Err(StateError::Unsupported(self.kind()))
    }
    /// Takes over what a device of its kind had, before it is activated.
    ///
    /// # Errors
    /// If that was another kind, or set up otherwise ([`StateError::Misfit`]).
    fn restore(&mut self, _state: &Payload) -> Result<(), StateError> {
        Err(StateError::Unsupported(self.kind()))
    }
    /// Stops to serve the queues, for a while: what is under way ends first and is answered. `worker`
    /// is what the event loop gave back.
    fn stop(&mut self, worker: Option<EventWorker>) {
        self.reset(worker);
    }
    /// Back to the state before [`activate`](Self::activate): no thread works on the queues when
    /// this returns. `worker` is what the event loop gave back.
    fn reset(&mut self, worker: Option<EventWorker>);
}

/// Copies the part of `space` that a configuration read asks for; zeroes beyond its end.
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
