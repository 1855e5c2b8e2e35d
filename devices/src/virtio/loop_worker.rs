//! Devices with one queue that the event loop serves: entropy, memory, a network's control queue, or an
//! embedder's own.

use super::{ActiveQueue, Chain, Memory, QueueError};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

/// How many chains of a queue are answered before the loop's other sources have their turn: a driver that
/// keeps its queue full must not have the loop for itself.
pub const TURN: usize = 32;

/// A queue, and what answers a chain: it says how many bytes it wrote into it.
pub struct LoopWorker<S> {
    queue: ActiveQueue,
    name: &'static str,
    answer: S,
}

impl<S: FnMut(&Chain, &Memory) -> u32 + Send> LoopWorker<S> {
    /// `name` is the device's, for what is logged.
    pub fn new(name: &'static str, queue: ActiveQueue, answer: S) -> Self {
        Self {
            queue,
            name,
            answer,
        }
    }

    /// Answers what the driver has in the queue, a turn of it at most.
    ///
    /// # Errors
    /// The driver's faults; the queue can't be used any more.
    pub fn serve(&mut self) -> Result<(), QueueError> {
        self.queue.serve_turn(TURN, &mut self.answer)
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
    fn a_driver_that_keeps_its_queue_full_gets_turns_and_no_more() {
        let mut driver = Driver::new(64);
        for _ in 0..2 * TURN {
            driver.offer(&[Buffer::Readable(vec![0; 8])]);
        }
        let mut worker = LoopWorker::new("test", driver.queue(), |_, _| 0);
        worker.serve().unwrap();
        assert_eq!(driver.used().len(), TURN);
        // It comes back without its driver.
        assert!(driver.take_kick());
    }

    #[test]
    fn a_queue_that_is_empty_is_left_to_its_driver() {
        let mut driver = Driver::new(64);
        for _ in 0..TURN - 1 {
            driver.offer(&[Buffer::Readable(vec![0; 8])]);
        }
        let mut worker = LoopWorker::new("test", driver.queue(), |_, _| 0);
        worker.serve().unwrap();
        assert_eq!(driver.used().len(), TURN - 1);
        assert!(!driver.take_kick());
    }
}
