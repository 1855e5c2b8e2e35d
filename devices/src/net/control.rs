//! The control queue: virtio 1.2, section 5.1.6.5. The only supported command sets the number of queue pairs
//! in use.
//!
//! Each change takes a lock of all networks of the host, and waits for all of its CPUs. So a guest has [`CHANGES`]: beyond
//! them the command fails.

use super::Tap;
use crate::fault::guest_fault;
use crate::rate_limit::{Rate, RateLimiter};
use crate::virtio::loop_worker::LoopWorker;
use crate::virtio::{ActiveQueue, Chain, Memory};
use event_manager::MutEventSubscriber;
use koya_host::sync::lock;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

/// Changes of the number of pairs that a guest may make: a Linux driver makes one.
const CHANGES: Rate = Rate {
    per_second: 2,
    burst: Some(16),
};

/// The limiter of a device's changes; kept over a reset of the driver, which must not refill the bucket.
pub(super) fn limiter() -> Arc<Mutex<RateLimiter>> {
    Arc::new(Mutex::new(RateLimiter::of_operations(CHANGES)))
}

/// The tap, the number of its pairs and the limiter of changes.
pub(super) struct Control {
    pub(super) tap: Arc<Tap>,
    pub(super) pairs: u16,
    pub(super) changes: Arc<Mutex<RateLimiter>>,
}

/// Creates the worker that serves the queue.
pub(super) fn worker(queue: ActiveQueue, control: Control) -> Box<dyn MutEventSubscriber + Send> {
    let name = "a network's control queue";
    Box::new(LoopWorker::new(name, queue, move |chain, memory| {
        handle(chain, memory, &control)
    }))
}

/// Executes the command of a chain and writes its status; returns the number of bytes written.
fn handle(chain: &Chain, memory: &Memory, control: &Control) -> u32 {
    let ack = match execute(chain, memory, control) {
        true => VIRTIO_NET_OK,
        false => VIRTIO_NET_ERR,
    };
    u32::from(chain.write(memory, 0, &[ack as u8]).is_ok())
}

/// Class, command and, for the supported command, the number of pairs. False if it cannot be executed.
fn execute(chain: &Chain, memory: &Memory, control: &Control) -> bool {
    let mut command = [0; 4];
    if chain.read(memory, 0, &mut command).is_err() {
        return false;
    }
    let [class, command, low, high] = command;
    let pairs = u16::from_le_bytes([low, high]);
    let known = u32::from(class) == VIRTIO_NET_CTRL_MQ
        && u32::from(command) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
    if !known || pairs == 0 || pairs > control.pairs {
        return false;
    }
    let tap = &control.tap;
    if usize::from(pairs) == tap.used_queues() {
        return true;
    }
    if lock(&control.changes).start(Instant::now()).is_some() {
        guest_fault!("the guest changes the queues of {} too often", tap.name());
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_utils::{Buffer, Driver};
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    /// A tap of sockets, which have no queues to attach: only the answers matter.
    fn control() -> Control {
        let socket = || {
            let (ours, _) = socketpair(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::CLOEXEC,
                None,
            )
            .unwrap();
            ours
        };
        Control {
            tap: Arc::new(Tap::from_queues("test", vec![socket(), socket()]).unwrap()),
            pairs: 2,
            changes: limiter(),
        }
    }

    #[test]
    fn the_queues_in_use_change_only_so_often() {
        let control = control();
        let mut driver = Driver::new(4);
        let mut queue = driver.queue();
        let mut set = |pairs: u8| {
            let command = vec![VIRTIO_NET_CTRL_MQ as u8, 0, pairs, 0];
            let head = driver.offer(&[Buffer::Readable(command), Buffer::Writable(1)]);
            let chain = queue.pop().unwrap().unwrap();
            let written = handle(&chain, &driver.memory().clone(), &control);
            queue.complete(head, written).unwrap();
            let ack = driver.written(head, 1)[0];
            driver.recycle();
            u32::from(ack) == VIRTIO_NET_OK
        };
        // Each is another number than the one in use.
        let made = (0..1000)
            .filter(|_| set(3 - control.tap.used_queues() as u8))
            .count();
        // A slow host refills the bucket meanwhile.
        assert!((16..200).contains(&made), "{made}");
        // Where nothing changes, nothing is refused.
        let now = control.tap.used_queues() as u8;
        assert!((0..1000).all(|_| set(now)));
    }
}
