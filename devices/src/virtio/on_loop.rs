//! Devices with one queue that the event loop serves: entropy, memory, a network's control queue.

use super::{ActiveQueue, Chain, Memory, QueueError};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

/// A queue, and what answers a chain: how many bytes of it were written.
pub(crate) struct OnLoop<S> {
    queue: ActiveQueue,
    name: &'static str,
    answer: S,
}

impl<S: FnMut(&Chain, &Memory) -> u32 + Send> OnLoop<S> {
    /// `name` is the device's, for what is logged.
    pub(crate) fn new(name: &'static str, queue: ActiveQueue, answer: S) -> Self {
        Self {
            queue,
            name,
            answer,
        }
    }

    /// Answers all that the driver has in the queue.
    ///
    /// # Errors
    /// The driver's faults; the queue can't be used any more.
    pub(crate) fn serve(&mut self) -> Result<(), QueueError> {
        self.queue.drain(&mut self.answer)
    }
}

impl<S: FnMut(&Chain, &Memory) -> u32 + Send> MutEventSubscriber for OnLoop<S> {
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
