//! A queue in use: what a device does with it, and nothing else.

use super::{Chain, ChainError, Interrupt, Memory};
use crate::sync::guest_fault;
use std::sync::Arc;
use thiserror::Error;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

/// How a driver broke a queue. The device marks itself as needing reset and stops.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The rings lie outside memory, or an index in them is impossible.
    #[error("the rings of queue {index} are broken")]
    Rings {
        /// Which queue.
        index: u16,
        /// What is wrong with them.
        #[source]
        source: virtio_queue::Error,
    },
    /// A chain breaks the rules.
    #[error("a chain of queue {index} is broken")]
    Chain {
        /// Which queue.
        index: u16,
        /// What is wrong with it.
        #[source]
        source: ChainError,
    },
}

/// An enabled queue with the memory it lives in, the kick that the driver gives, and the
/// interrupt that answers.
pub struct ActiveQueue {
    index: u16,
    queue: Queue,
    memory: Arc<Memory>,
    kick: EventFd,
    interrupt: Arc<dyn Interrupt>,
}

impl ActiveQueue {
    /// Puts a queue to use; the transport checked that it is valid.
    pub fn new(
        index: u16,
        queue: Queue,
        memory: Arc<Memory>,
        kick: EventFd,
        interrupt: Arc<dyn Interrupt>,
    ) -> Self {
        Self {
            index,
            queue,
            memory,
            kick,
            interrupt,
        }
    }

    /// Guest memory.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// What the driver writes to when it has put something into the queue; non-blocking.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// How many descriptors it has.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Which queue of its device this is.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The next chain that the driver made available, checked.
    ///
    /// # Errors
    /// The driver's faults; the queue can't be used any more.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        // `iter` reports broken rings, which `pop_descriptor_chain` would hide.
        let next = self
            .queue
            .iter(self.memory.as_ref())
            .map_err(|source| QueueError::Rings {
                index: self.index,
                source,
            })?
            .next();
        let Some(chain) = next else {
            return Ok(None);
        };
        let chain = Chain::check(chain, &self.memory).map_err(|source| QueueError::Chain {
            index: self.index,
            source,
        })?;
        Ok(Some(chain))
    }

    /// Gives back the chain that was popped last; it will be popped again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Hands a chain back to the driver with `written` bytes in its writable part.
    ///
    /// # Errors
    /// Only if the used ring is outside memory, which the transport checked.
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.queue
            .add_used(self.memory.as_ref(), head, written)
            .map_err(|source| self.rings(source))
    }

    /// Interrupts the driver if it wants to know of what was completed.
    ///
    /// # Errors
    /// Only if the rings are outside memory, which the transport checked.
    pub fn notify(&mut self) -> Result<(), QueueError> {
        let wanted = self
            .queue
            .needs_notification(self.memory.as_ref())
            .map_err(|source| self.rings(source))?;
        if wanted {
            self.interrupt.queue(self.index);
        }
        Ok(())
    }

    /// Asks the driver to kick when it adds something. True if it did already: then pop again.
    ///
    /// # Errors
    /// Only if the rings are outside memory, which the transport checked.
    pub fn arm(&mut self) -> Result<bool, QueueError> {
        self.queue
            .enable_notification(self.memory.as_ref())
            .map_err(|source| self.rings(source))
    }

    /// Tells the driver that its device stopped because of what the driver did.
    pub fn fail(&self, error: &QueueError) {
        guest_fault!(
            "virtio queue {}: {error:?}; the device needs a reset",
            self.index
        );
        self.ask_for_reset();
    }

    /// Tells the driver that its device stopped.
    pub fn ask_for_reset(&self) {
        self.interrupt.needs_reset();
    }

    fn rings(&self, source: virtio_queue::Error) -> QueueError {
        QueueError::Rings {
            index: self.index,
            source,
        }
    }
}
