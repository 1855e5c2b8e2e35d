//! A queue in use: what a device does with it, and nothing else.

use super::{Chain, ChainError, Interrupt, Memory};
use crate::fault::guest_fault;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use thiserror::Error;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
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
    /// The used index when the driver was last told, or last did not want to know.
    announced: u16,
    position: Arc<RingPosition>,
}

/// How far the device is in a queue: known once the [`ActiveQueue`] is given up.
#[derive(Debug, Default)]
pub struct RingPosition {
    next_available: AtomicU16,
    next_used: AtomicU16,
}

impl RingPosition {
    /// The next entries of the available and of the used ring.
    pub fn get(&self) -> (u16, u16) {
        let (available, used) = (&self.next_available, &self.next_used);
        (
            available.load(Ordering::SeqCst),
            used.load(Ordering::SeqCst),
        )
    }
}

impl Drop for ActiveQueue {
    fn drop(&mut self) {
        let RingPosition {
            next_available,
            next_used,
        } = &*self.position;
        next_available.store(self.queue.next_avail(), Ordering::SeqCst);
        next_used.store(self.queue.next_used(), Ordering::SeqCst);
    }
}

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (section 2.7.6).
const NO_INTERRUPT: u16 = 1;

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
            announced: queue.next_used(),
            position: Arc::default(),
            queue,
            memory,
            kick,
            interrupt,
        }
    }

    /// How far the device is, once this queue is dropped.
    pub fn position(&self) -> Arc<RingPosition> {
        self.position.clone()
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

    /// Hands several chains back at once: the driver sees all of them or none, as section 5.1.6.4
    /// asks for the buffers of one frame.
    ///
    /// # Errors
    /// As [`complete`](Self::complete).
    pub fn complete_together(&mut self, used: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some(((head, written), before)) = used.split_last() else {
            return Ok(());
        };
        // Entries behind the index are the device's to write; the index covers them at the end.
        for (head, written) in before {
            let slot = u64::from(self.queue.next_used() % self.queue.size());
            let entry = GuestAddress(self.queue.used_ring() + 4 + 8 * slot);
            let word = u64::from(*written) << 32 | u64::from(*head);
            self.memory
                .write_obj(word.to_le(), entry)
                .map_err(|error| self.rings(virtio_queue::Error::GuestMemory(error)))?;
            let next = self.queue.next_used().wrapping_add(1);
            self.queue.set_next_used(next);
        }
        self.complete(*head, *written)
    }

    /// Interrupts the driver if it wants to know of what was completed: section 2.7.7.
    ///
    /// # Errors
    /// Only if the rings are outside memory, which the transport checked.
    pub fn notify(&mut self) -> Result<(), QueueError> {
        let (old, new) = (self.announced, self.queue.next_used());
        if old == new {
            return Ok(());
        }
        self.announced = new;
        // What was completed must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        let wanted = if self.queue.event_idx_enabled() {
            // Behind the ring the driver says at which index it wants to know.
            let place = available + 4 + 2 * u64::from(self.queue.size());
            let event = self.read_ring(place)?;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.read_ring(available)? & NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt.queue(self.index);
        }
        Ok(())
    }

    fn read_ring(&self, place: u64) -> Result<u16, QueueError> {
        let word = self.memory.load(GuestAddress(place), Ordering::Relaxed);
        word.map(u16::from_le)
            .map_err(|error| self.rings(virtio_queue::Error::GuestMemory(error)))
    }

    /// Serves what the driver has in the queue, until it is empty and the driver will kick, or for a
    /// turn of `most` chains: then the queue kicks itself, and whoever waits for kicks comes back to it
    /// after others have had their turn. Each chain is given back with the number of bytes that `serve`
    /// says it wrote.
    ///
    /// # Errors
    /// The driver's faults; the queue can't be used any more.
    pub fn serve_turn(
        &mut self,
        most: usize,
        mut serve: impl FnMut(&Chain, &Memory) -> u32,
    ) -> Result<(), QueueError> {
        let memory = self.memory.clone();
        for _ in 0..most {
            if let Some(chain) = self.pop()? {
                let written = serve(&chain, &memory);
                self.complete(chain.head(), written)?;
                continue;
            }
            self.notify()?;
            if !self.arm()? {
                return Ok(());
            }
        }
        self.notify()?;
        self.kick_self();
        Ok(())
    }

    /// Has the kick come as if the driver had given it: there is more to do.
    pub fn kick_self(&self) {
        // It fails only where the counter is full, and then it is readable.
        self.kick.write(1).ok();
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
