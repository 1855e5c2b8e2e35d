//! A queue as used by a device.

use super::{Chain, ChainError, Interrupt, Memory};
use crate::fault::guest_fault;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use thiserror::Error;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

/// Errors of a driver in a queue. The device stops and sets DEVICE_NEEDS_RESET.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The rings are outside guest memory, or an index in them is invalid.
    #[error("the rings of queue {index} are broken")]
    Rings {
        /// Index of the queue.
        index: u16,
        /// The problem.
        #[source]
        source: virtio_queue::Error,
    },
    /// A chain is invalid.
    #[error("a chain of queue {index} is broken")]
    Chain {
        /// Index of the queue.
        index: u16,
        /// The problem.
        #[source]
        source: ChainError,
    },
    /// The driver made more chains available than the queue has descriptors, before the device returned any.
    #[error("more chains of queue {index} are in use than it has descriptors")]
    Overdrawn {
        /// Index of the queue.
        index: u16,
    },
}

/// An enabled queue with its guest memory, the eventfd of its kicks and the interrupt of its device.
pub struct ActiveQueue {
    index: u16,
    queue: Queue,
    memory: Arc<Memory>,
    kick: EventFd,
    interrupt: Arc<dyn Interrupt>,
    /// The used index when the driver was last notified, or last disabled notifications.
    announced: u16,
    position: Arc<RingPosition>,
}

/// The ring positions of a device; valid once the [`ActiveQueue`] has been dropped.
#[derive(Debug, Default)]
pub struct RingPosition {
    next_available: AtomicU16,
    next_used: AtomicU16,
}

impl RingPosition {
    /// The next entries of the available and the used ring.
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
    /// Wraps a queue that the transport has validated.
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

    /// The ring positions, to be read after this queue has been dropped.
    pub fn position(&self) -> Arc<RingPosition> {
        self.position.clone()
    }

    /// Guest memory.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The non-blocking eventfd that is written when the driver kicks the queue.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Index of the queue within its device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Number of chains taken and not returned yet.
    fn in_use(&self) -> u16 {
        self.queue.next_avail().wrapping_sub(self.queue.next_used())
    }

    /// The next available chain, validated. No more chains are in use at a time than the queue has descriptors: a driver may
    /// offer descriptors again that have not been returned, and a device would keep any number of chains.
    ///
    /// # Errors
    /// A fault of the driver; the queue can't be used any more.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let is_drawn = self.in_use() >= self.queue.size();
        // An entry in memory that was unplugged meanwhile would look like an empty queue, while `arm` finds more entries: a
        // thread that continues until both agree would never end.
        let ring = GuestAddress(self.queue.avail_ring());
        let ring_size = 6 + 2 * usize::from(self.queue.size());
        if !self.memory.check_range(ring, ring_size) {
            let gone = vm_memory::GuestMemoryError::InvalidGuestAddress(ring);
            return Err(self.rings(virtio_queue::Error::GuestMemory(gone)));
        }
        // `iter` reports invalid rings, which `pop_descriptor_chain` would hide.
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
        if is_drawn {
            return Err(QueueError::Overdrawn { index: self.index });
        }
        let chain = Chain::check(chain, &self.memory).map_err(|source| QueueError::Chain {
            index: self.index,
            source,
        })?;
        Ok(Some(chain))
    }

    /// Returns the chain that was popped last; it will be popped again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain to the driver, with `written` bytes in its writable part.
    ///
    /// # Errors
    /// Only if the used ring is outside guest memory, which the transport has checked.
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.queue
            .add_used(self.memory.as_ref(), head, written)
            .map_err(|source| self.rings(source))
    }

    /// Returns several chains at once: the driver sees all of them or none, as section 5.1.6.4 requires for
    /// the buffers of one frame.
    ///
    /// # Errors
    /// As [`complete`](Self::complete).
    pub fn complete_all(&mut self, used: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some(((head, written), before)) = used.split_last() else {
            return Ok(());
        };
        // The device may write entries beyond the index; updating the index at the end publishes them.
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

    /// Interrupts the driver if it wants to be notified of the completed chains: section 2.7.7.
    ///
    /// # Errors
    /// Only if the rings are outside guest memory, which the transport has checked.
    pub fn notify(&mut self) -> Result<(), QueueError> {
        let (old, new) = (self.announced, self.queue.next_used());
        if old == new {
            return Ok(());
        }
        self.announced = new;
        // Completed chains must be visible before the driver's notification setting is read.
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        let wanted = if self.queue.event_idx_enabled() {
            // After the ring, the driver writes the index at which it wants to be notified.
            let address = available + 4 + 2 * u64::from(self.queue.size());
            let event = self.read_ring(address)?;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.read_ring(available)? & NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt.queue(self.index);
        }
        Ok(())
    }

    fn read_ring(&self, address: u64) -> Result<u16, QueueError> {
        let word = self.memory.load(GuestAddress(address), Ordering::Relaxed);
        word.map(u16::from_le)
            .map_err(|error| self.rings(virtio_queue::Error::GuestMemory(error)))
    }

    /// Serves the available chains until the queue is empty and kicks are enabled, or up to `max` chains. In
    /// the latter case the queue kicks itself, so that the thread waiting for kicks returns to it after serving
    /// other event sources. `serve` returns the number of bytes that it wrote to a chain.
    ///
    /// # Errors
    /// A fault of the driver; the queue can't be used any more.
    pub fn serve_batch(
        &mut self,
        max: usize,
        mut serve: impl FnMut(&Chain, &Memory) -> u32,
    ) -> Result<(), QueueError> {
        let memory = self.memory.clone();
        for _ in 0..max {
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

    /// Signals the kick as if the driver had done so, because more work is left.
    pub fn kick_self(&self) {
        // It fails only if the counter is at its maximum, and then it is readable.
        self.kick.write(1).ok();
    }

    /// Asks the driver to kick when it adds a chain. True if it already has added one: then pop again.
    ///
    /// # Errors
    /// Only if the rings are outside guest memory, which the transport has checked.
    pub fn arm(&mut self) -> Result<bool, QueueError> {
        self.queue
            .enable_notification(self.memory.as_ref())
            .map_err(|source| self.rings(source))
    }

    /// Marks the device as needing reset because of a fault of the driver.
    pub fn fail(&self, error: &QueueError) {
        guest_fault!(
            "virtio queue {}: {error:?}; the device needs a reset",
            self.index
        );
        self.set_needs_reset();
    }

    /// Marks the device as needing reset.
    pub fn set_needs_reset(&self) {
        self.interrupt.needs_reset();
    }

    fn rings(&self, source: virtio_queue::Error) -> QueueError {
        QueueError::Rings {
            index: self.index,
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_utils::{Buffer, Driver, Recorder};
    use crate::virtio::MemoryRegion;
    use crate::virtio::memory::BLOCK_SIZE;
    use std::collections::VecDeque;
    use vm_memory::GuestRegionMmap;
    use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK};

    const SIZE: u16 = 4;

    #[test]
    fn a_ring_whose_memory_was_unplugged_is_broken_and_not_empty() {
        const START: u64 = 1 << 32;
        let size = 2 * BLOCK_SIZE as usize;
        let mapping = GuestRegionMmap::from_range(GuestAddress(START), size, None).unwrap();
        let memory = Memory::from_regions(vec![MemoryRegion::pluggable(mapping)]).unwrap();
        let plug = |blocks, plugged| {
            let region = memory.find_region(GuestAddress(START)).unwrap();
            region.set_plugged(blocks, plugged);
        };
        plug(0..2, true);
        let memory = Arc::new(memory);
        // Flags and index are in the first block, entries in the second.
        let available = START + BLOCK_SIZE - 4;
        let mut ring = Queue::new(16).unwrap();
        ring.set_size(16);
        ring.set_desc_table_address(Some(0x1000), Some(1));
        ring.set_avail_ring_address(Some(available as u32), Some(1));
        ring.set_used_ring_address(Some(0x2000), Some(1));
        ring.set_ready(true);
        let kick = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).unwrap();
        let mut queue = ActiveQueue::new(0, ring, memory.clone(), kick, Arc::<Recorder>::default());
        assert!(queue.pop().unwrap().is_none());
        memory.write_obj(1u16, GuestAddress(available + 2)).unwrap();
        let region = memory.find_region(GuestAddress(START)).unwrap();
        region.set_plugged(1..2, false);
        assert!(queue.arm().unwrap());
        assert!(matches!(
            queue.pop(),
            Err(QueueError::Rings { index: 0, .. })
        ));
    }

    /// A driver may offer a descriptor again before it gets it back, any number of times.
    #[test]
    fn no_more_chains_are_taken_than_the_queue_has_descriptors() {
        for first in [0, 65_534] {
            let mut driver = Driver::new(SIZE);
            driver.begin_at(first);
            let mut queue = driver.queue_at((first, first));
            let head = driver.offer(&[Buffer::Writable(8)]);
            for _ in 1..SIZE {
                driver.make_available(head);
            }
            for _ in 0..SIZE {
                assert_eq!(queue.pop().unwrap().unwrap().head(), head);
            }
            // The driver may wait for as long as it likes.
            assert!(queue.pop().unwrap().is_none());
            queue.complete(head, 0).unwrap();
            driver.make_available(head);
            assert!(queue.pop().unwrap().is_some());
            driver.make_available(head);
            let refused = queue.pop();
            assert!(matches!(refused, Err(QueueError::Overdrawn { index: 0 })));
        }
    }

    /// With any event index of the driver, it is interrupted if the entry after that index was among the last ones: section
    /// 2.7.10.1.
    #[test]
    fn interrupts_come_where_they_were_asked_for() {
        let mut cases = 0;
        let driver = Driver::new(SIZE);
        let mut queue = driver.queue();
        queue.queue.set_event_idx(true);
        let [_, available, _] = driver.ring_addresses();
        let asked = GuestAddress(available + 4 + 2 * u64::from(SIZE));
        for old in (0..12).chain(65_524..=u16::MAX) {
            for (count, distance) in (0..=SIZE).flat_map(|c| (0..16u16).map(move |d| (c, d))) {
                let event = old.wrapping_add(distance).wrapping_sub(8);
                driver.memory().write_obj(event, asked).unwrap();
                queue.announced = old;
                queue.queue.set_next_used(old.wrapping_add(count));
                queue.notify().unwrap();
                let wanted = (0..count).any(|entry| old.wrapping_add(entry) == event);
                assert_eq!(
                    driver.interrupted(),
                    wanted,
                    "{old} + {count}, after {event}"
                );
                cases += 1;
            }
        }
        println!("{cases} pairs of indices");
    }

    /// Every order of a few steps, from indices close to the wrap-around: chains come once and in order, a chain that was
    /// put back comes again, and the driver sees the chains that the device has used.
    #[test]
    fn chains_come_once_in_every_order_of_steps() {
        const STEPS: u32 = 7;
        let mut orders = 0;
        for (first, number) in [0, 65_534, 65_535]
            .into_iter()
            .flat_map(|first| (0..4u32.pow(STEPS)).map(move |number| (first, number)))
        {
            let mut driver = Driver::new(2);
            driver.begin_at(first);
            let mut queue = driver.queue_at((first, first));
            let (mut waiting, mut taken) = (VecDeque::new(), Vec::new());
            let mut used = Vec::new();
            let mut may_put_back = false;
            for step in 0..STEPS {
                match number >> (2 * step) & 3 {
                    0 if waiting.len() + taken.len() < 2 => {
                        waiting.push_back(driver.offer(&[Buffer::Writable(8)]));
                    }
                    1 => {
                        let popped = queue.pop().unwrap().map(|chain| chain.head());
                        assert_eq!(popped, waiting.pop_front(), "{number:#x} from {first}");
                        may_put_back = popped.is_some();
                        taken.extend(popped);
                    }
                    // Only the chain taken last.
                    2 if std::mem::take(&mut may_put_back) => {
                        queue.unpop();
                        waiting.extend(taken.pop());
                        waiting.rotate_right(1);
                    }
                    3 if !taken.is_empty() => {
                        let head = taken.remove(0);
                        may_put_back &= !taken.is_empty();
                        queue.complete(head, step).unwrap();
                        used.push((head, step));
                    }
                    _ => continue,
                }
            }
            assert_eq!(driver.used(), used, "{number:#x} from {first}");
            let position = queue.position();
            drop(queue);
            let moved = |count: usize| first.wrapping_add(count as u16);
            let expected = (moved(used.len() + taken.len()), moved(used.len()));
            assert_eq!(position.get(), expected, "{number:#x} from {first}");
            orders += 1;
        }
        println!("{orders} orders of {STEPS} steps");
    }
}
