//! A worker for devices with one queue served on the event loop: entropy, virtio-mem, the control queue of a
//! network, or an embedder's device.

use super::{ActiveQueue, Chain, Memory, QueueError};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

/// Number of chains per batch: then the loop's other event sources are served, so that a driver that keeps
/// its queue full cannot occupy the loop.
pub const BATCH: usize = 32;

/// A queue and a function that handles a chain and returns the number of bytes written to it.
pub struct LoopWorker<S> {
    queue: ActiveQueue,
    name: &'static str,
    handler: S,
}

impl<S: FnMut(&Chain, &Memory) -> u32 + Send> LoopWorker<S> {
    /// Creates a worker; `name` is the device's name in log messages.
    pub fn new(name: &'static str, queue: ActiveQueue, handler: S) -> Self {
        Self {
            queue,
            name,
            handler,
        }
    }

    /// Handles the available chains, at most one batch.
    ///
    /// # Errors
    /// A fault of the driver; the queue can't be used any more.
    pub fn serve(&mut self) -> Result<(), QueueError> {
        self.queue.serve_batch(BATCH, &mut self.handler)
    }
}

impl<S: FnMut(&Chain, &Memory) -> u32 + Send> MutEventSubscriber for LoopWorker<S> {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(self.queue.kick(), EventSet::IN)) {
            log::error!("{}: cannot watch the queue: {error}", self.name);
        }
        self.process(Events::empty(self.queue.kick()), ops);
    }

    fn process(&mut self, _events: Events, ops: &mut EventOps) {
        self.queue.kick().read().ok();
        if let Err(error) = self.serve() {
            self.queue.fail(&error);
            ops.remove(Events::empty(self.queue.kick())).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_utils::{Buffer, Driver};

    #[test]
    fn a_full_queue_is_served_in_batches() {
        let mut driver = Driver::new(64);
        for _ in 0..2 * BATCH {
            driver.offer(&[Buffer::Readable(vec![0; 8])]);
        }
        let mut worker = LoopWorker::new("test", driver.queue(), |_, _| 0);
        worker.serve().unwrap();
        assert_eq!(driver.used().len(), BATCH);
        // It is called again without a kick from the driver.
        assert!(driver.take_kick());
    }

    #[test]
    fn an_empty_queue_waits_for_its_driver() {
        let mut driver = Driver::new(64);
        for _ in 0..BATCH - 1 {
            driver.offer(&[Buffer::Readable(vec![0; 8])]);
        }
        let mut worker = LoopWorker::new("test", driver.queue(), |_, _| 0);
        worker.serve().unwrap();
        assert_eq!(driver.used().len(), BATCH - 1);
        assert!(!driver.take_kick());
    }
}
