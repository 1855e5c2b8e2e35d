//! The control queue: virtio 1.2, section 5.1.6.5. Of its commands this device knows the one that
//! says how many pairs of queues are in use.

use super::Tap;
use crate::sync::guest_fault;
use crate::virtio::{ActiveQueue, Chain, Memory, QueueError};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::sync::Arc;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

pub(super) struct Control {
    queue: ActiveQueue,
    tap: Arc<Tap>,
    pairs: u16,
}

impl Control {
    pub(super) fn new(queue: ActiveQueue, tap: Arc<Tap>, pairs: u16) -> Self {
        Self { queue, tap, pairs }
    }

    fn serve(&mut self) -> Result<(), QueueError> {
        let Self { queue, tap, pairs } = self;
        queue.drain(|chain, memory| {
            let ack = match obey(chain, memory, tap, *pairs) {
                true => VIRTIO_NET_OK,
                false => VIRTIO_NET_ERR,
            };
            u32::from(chain.write(memory, 0, &[ack as u8]).is_ok())
        })
    }
}

/// Class, command, and for the command that is known a number of pairs.
fn obey(chain: &Chain, memory: &Memory, tap: &Tap, most: u16) -> bool {
    let mut command = [0; 4];
    if chain.read(memory, 0, &mut command).is_err() {
        return false;
    }
    let [class, command, low, high] = command;
    let pairs = u16::from_le_bytes([low, high]);
    let known = u32::from(class) == VIRTIO_NET_CTRL_MQ
        && u32::from(command) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
    if !known || pairs == 0 || pairs > most {
        return false;
    }
    match tap.use_queues(pairs.into()) {
        Ok(()) => true,
        Err(error) => {
            guest_fault!("cannot use {pairs} queues of {}: {error}", tap.name());
            false
        }
    }
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(self.queue.kick(), EventSet::IN)) {
            log::error!("a network's control queue can't be watched: {error}");
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
