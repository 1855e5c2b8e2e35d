//! The control queue: virtio 1.2, section 5.1.6.5. The only supported command sets the number of queue pairs
//! in use.

use super::Tap;
use crate::fault::guest_fault;
use crate::virtio::loop_worker::LoopWorker;
use crate::virtio::{ActiveQueue, Chain, Memory};
use event_manager::MutEventSubscriber;
use std::sync::Arc;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

/// Creates the worker that serves the queue.
pub(super) fn worker(
    queue: ActiveQueue,
    tap: Arc<Tap>,
    pairs: u16,
) -> Box<dyn MutEventSubscriber + Send> {
    let name = "a network's control queue";
    Box::new(LoopWorker::new(name, queue, move |chain, memory| {
        handle(chain, memory, &tap, pairs)
    }))
}

/// Executes the command of a chain and writes its status; returns the number of bytes written.
fn handle(chain: &Chain, memory: &Memory, tap: &Tap, pairs: u16) -> u32 {
    let ack = match execute(chain, memory, tap, pairs) {
        true => VIRTIO_NET_OK,
        false => VIRTIO_NET_ERR,
    };
    u32::from(chain.write(memory, 0, &[ack as u8]).is_ok())
}

/// Class, command and, for the supported command, the number of pairs. False if it cannot be executed.
fn execute(chain: &Chain, memory: &Memory, tap: &Tap, max_pairs: u16) -> bool {
    let mut command = [0; 4];
    if chain.read(memory, 0, &mut command).is_err() {
        return false;
    }
    let [class, command, low, high] = command;
    let pairs = u16::from_le_bytes([low, high]);
    let known = u32::from(class) == VIRTIO_NET_CTRL_MQ
        && u32::from(command) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
    if !known || pairs == 0 || pairs > max_pairs {
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
