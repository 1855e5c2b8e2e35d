//! What every virtio device shares: the device trait, its interrupt, and its queues.
//!
//! A device does not know its transport. The transport ([`mmio`]) keeps the register file and
//! the status state machine, and calls the device from a vCPU thread. When the driver is ready
//! it gives the device its queues ([`Activation`]); the device answers with the [`Worker`] that
//! serves them, on the event loop or on threads of its own.

pub mod chain;
pub mod memory;
pub mod mmio;
pub(crate) mod on_loop;
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
pub use state::{DeviceState, StateError};

/// Feature bit: the device follows virtio 1.0 or later (virtio 1.2, section 6).
pub const F_VERSION_1: u64 = 1 << 32;
/// Feature bit: descriptors may point to tables of descriptors (section 2.7.5.3).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// Feature bit: notifications are suppressed by index (section 2.7.7 and 2.7.8).
pub const F_EVENT_IDX: u64 = 1 << 29;

/// Features of the transport and the queues, offered by nearly every device.
pub const COMMON_FEATURES: u64 = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;

/// Which device it is: the number of virtio 1.2, section 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceKind {
    /// Section 5.1
    Net = 1,
    /// Section 5.2
    Block = 2,
    /// Section 5.4
    Entropy = 4,
    /// Section 5.5
    Balloon = 5,
    /// Section 5.10
    Vsock = 19,
    /// Section 5.15
    Memory = 24,
    /// Section 5.11
    FileSystem = 26,
}

impl DeviceKind {
    /// As people name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Net => "virtio-net",
            Self::Block => "virtio-blk",
            Self::Entropy => "virtio-rng",
            Self::Balloon => "virtio-balloon",
            Self::Vsock => "virtio-vsock",
            Self::Memory => "virtio-mem",
            Self::FileSystem => "virtio-fs",
        }
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

/// Who serves an active device's queues.
pub enum Worker {
    /// The event loop.
    EventLoop(Box<dyn MutEventSubscriber + Send>),
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
pub trait VirtioDevice: Send {
    /// Which device it is.
    fn kind(&self) -> DeviceKind;
    /// The largest size of each queue; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// The features of this device beyond [`common_features`](Self::common_features).
    fn features(&self) -> u64 {
        0
    }
    /// The features of the transport and the queues that it offers.
    fn common_features(&self) -> u64 {
        COMMON_FEATURES
    }
    /// The whole configuration space as it is, if a guest may have it as memory: the device need not know that
    /// it is read, and a field that changes lies within one aligned word, so that none is read half changed.
    fn config(&self) -> Option<Vec<u8>> {
        None
    }
    /// Says once, before there is a driver, where one reads the configuration space. A device shows it there,
    /// and whenever it changes; before it raises the interrupt for that.
    fn show_config(&mut self, space: ConfigSpace) {
        space.show(&self.config().unwrap_or_default());
    }
    /// Reads the configuration space from `offset`; what lies beyond it reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config().unwrap_or_default(), offset, data);
    }
    /// The driver writes to the configuration space. Few devices have a field for that.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// Starts to serve the queues.
    ///
    /// # Errors
    /// The driver's faults and the host's; the transport reports both as DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<Worker, ActivateError>;
    /// What it has beyond its queues, while nobody serves them.
    ///
    /// # Errors
    /// [`StateError::Unsupported`] for kinds whose state is not kept.
    fn save(&self) -> Result<DeviceState, StateError> {
        Err(StateError::Unsupported(self.kind()))
    }
    /// Takes over what a device of its kind had, before it is activated.
    ///
    /// # Errors
    /// If that was another kind, or set up otherwise.
    fn restore(&mut self, _state: &DeviceState) -> Result<(), StateError> {
        Err(StateError::Unsupported(self.kind()))
    }
    /// Stops to serve the queues, for a while: what is under way ends first and is answered. `worker`
    /// is what the event loop gave back.
    fn stop(&mut self, worker: Option<Box<dyn MutEventSubscriber + Send>>) {
        self.reset(worker);
    }
    /// Back to the state before [`activate`](Self::activate): no thread works on the queues when
    /// this returns. `worker` is what the event loop gave back.
    fn reset(&mut self, worker: Option<Box<dyn MutEventSubscriber + Send>>);
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
