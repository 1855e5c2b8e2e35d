//! A queue pair and its thread, which moves frames between guest memory and the tap.

use super::{HEADER_SIZE, NUM_BUFFERS_OFFSET, Shared, Tap, count};
use crate::fault::guest_fault;
use crate::rate_limit::RateLimiter;
use crate::sys::{self, Iovecs};
use crate::virtio::{ActiveQueue, Chain, QueueError};
use koya_host::sync::lock;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use thiserror::Error;
use virtio_bindings::virtio_net::*;
use vmm_sys_util::eventfd::EventFd;

/// Maximum number of frames in one direction before the other is served.
const BATCH: usize = 64;
/// Maximum size of an unsegmented packet in bytes.
const LARGEST_PACKET: usize = 65_536;
/// Ethernet header and VLAN tag.
const LINK_HEADER: usize = 18;

#[derive(Debug, Error)]
enum QueuePairError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("a virtio-net thread cannot wait for events")]
    Host(#[from] io::Error),
}

/// The reason why a direction stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pause {
    /// There is no frame to move.
    Idle,
    /// It has moved a whole batch.
    BatchDone,
    /// The guest has supplied no buffers.
    Starved,
    /// The rate limit is reached; it may continue after this time.
    Limited(Duration),
    /// The tap no longer exists.
    Gone,
}

/// The tap queue and shared state that a pair works with.
pub(super) struct PairContext {
    /// Index of the tap's queue.
    pub(super) index: usize,
    pub(super) tap: Arc<Tap>,
    pub(super) shared: Arc<Shared>,
    pub(super) stop: EventFd,
}

/// Requirements on the buffers for a received frame.
#[derive(Clone, Copy)]
pub(super) struct BufferNeeds {
    /// Whether a frame may span several buffers.
    mergeable: bool,
    /// Maximum size of a frame in bytes.
    frame: usize,
}

impl BufferNeeds {
    /// The requirements for a driver with these features.
    pub(super) fn of(features: u64, mtu: Option<u16>) -> Self {
        let has = |bit: u32| features & (1 << bit) != 0;
        let segments = [
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_USO4,
            VIRTIO_NET_F_GUEST_USO6,
        ];
        let packet = match segments.into_iter().any(has) {
            true => LARGEST_PACKET,
            false => usize::from(mtu.unwrap_or(0)).max(1500),
        };
        Self {
            mergeable: has(VIRTIO_NET_F_MRG_RXBUF),
            frame: packet + LINK_HEADER + HEADER_SIZE,
        }
    }
}

pub(super) struct QueuePair {
    context: PairContext,
    receiver: Receiver,
    sender: Sender,
}

struct Receiver {
    queue: ActiveQueue,
    limiter: Arc<Mutex<RateLimiter>>,
    needs: BufferNeeds,
    /// Buffers taken from the queue and not yet returned, in order, each with its number of iovecs (0 if it
    /// is useless).
    chains: VecDeque<(Chain, usize)>,
    iovecs: Iovecs,
    /// Total size of the available buffers in bytes.
    available: usize,
}

struct Sender {
    queue: ActiveQueue,
    limiter: Arc<Mutex<RateLimiter>>,
}

impl QueuePair {
    pub(super) fn new(
        context: PairContext,
        receive: ActiveQueue,
        send: ActiveQueue,
        needs: BufferNeeds,
        [receive_limiter, send_limiter]: [Arc<Mutex<RateLimiter>>; 2],
    ) -> Self {
        Self {
            context,
            receiver: Receiver {
                iovecs: Iovecs::new(receive.memory().clone()),
                queue: receive,
                limiter: receive_limiter,
                needs,
                chains: VecDeque::new(),
                available: 0,
            },
            sender: Sender {
                queue: send,
                limiter: send_limiter,
            },
        }
    }

    pub(super) fn run(mut self) {
        if let Err(error) = self.serve() {
            guest_fault!("a network's queues: {error:?}; the device needs a reset");
            self.sender.queue.set_needs_reset();
        }
    }

    fn serve(&mut self) -> Result<(), QueuePairError> {
        let (shared, all) = (self.context.shared.clone(), self.context.tap.clone());
        let Some(tap) = all.queues().get(self.context.index) else {
            return Ok(());
        };
        loop {
            // Served first, since a sent frame may be answered at once: one interrupt covers both.
            let sent = self.sender.run(tap, &shared)?;
            let received = self.receiver.run(tap, &shared)?;
            self.receiver.queue.notify()?;
            self.sender.queue.notify()?;
            let mut limit = None;
            for pause in [received, sent] {
                let wait = match pause {
                    Pause::BatchDone => Duration::ZERO,
                    Pause::Limited(wait) => wait,
                    _ => continue,
                };
                limit = Some(limit.map_or(wait, |limit: Duration| limit.min(wait)));
            }
            let send_kick = self.sender.queue.kick();
            let receive_kick = self.receiver.queue.kick();
            let starved = received == Pause::Starved;
            let waits_for_frames = received == Pause::Idle;
            let limited = matches!(sent, Pause::Limited(_));
            let [stop, send, receive, _] = sys::wait_readable(
                [
                    Some(&self.context.stop as &dyn AsRawFd),
                    (!limited).then_some(send_kick as &dyn AsRawFd),
                    starved.then_some(receive_kick as &dyn AsRawFd),
                    waits_for_frames.then_some(tap as &dyn AsRawFd),
                ],
                limit,
            )?;
            if stop {
                self.receiver.put_back();
                return Ok(());
            }
            if send {
                send_kick.read().ok();
            }
            if receive {
                receive_kick.read().ok();
            }
        }
    }
}

/// Calls `move_frame` until it returns a reason to stop, or a batch is complete.
fn run_batch(
    mut move_frame: impl FnMut() -> Result<Option<Pause>, QueueError>,
) -> Result<Pause, QueueError> {
    for _ in 0..BATCH {
        if let Some(pause) = move_frame()? {
            return Ok(pause);
        }
    }
    Ok(Pause::BatchDone)
}

impl Receiver {
    /// Moves frames from the tap to the guest, without notifying the guest yet.
    fn run(&mut self, tap: &File, shared: &Shared) -> Result<Pause, QueueError> {
        run_batch(|| self.move_frame(tap, shared))
    }

    fn move_frame(&mut self, tap: &File, shared: &Shared) -> Result<Option<Pause>, QueueError> {
        if let Some(wait) = lock(&self.limiter).wait(Instant::now()) {
            return Ok(Some(Pause::Limited(wait)));
        }
        if let Some(pause) = self.refill(shared)? {
            return Ok(Some(pause));
        }
        let first = self.chains.front().map_or(0, |(_, iovecs)| *iovecs);
        let most = if self.needs.mergeable {
            usize::MAX
        } else {
            first
        };
        let bytes = match self.iovecs.read(tap, most) {
            Ok(bytes) => bytes,
            Err(error) => return Ok(Some(handle_refusal(&error, shared))),
        };
        if bytes == 0 {
            // The peer of a socket has closed it.
            shared.set_link(false);
            return Ok(Some(Pause::Gone));
        }
        if bytes < HEADER_SIZE || !shared.link() {
            // The data is overwritten by the next frame.
            count(&shared.metrics.received_drops, 1);
            return Ok(None);
        }
        lock(&self.limiter).charge((bytes - HEADER_SIZE) as u64);
        count(&shared.metrics.received_frames, 1);
        count(&shared.metrics.received_bytes, (bytes - HEADER_SIZE) as u64);
        self.deliver(bytes)?;
        Ok(None)
    }

    /// Takes buffers from the queue until any frame fits; returns the reason if that is impossible. Takes no
    /// more buffers than the queue holds at once, and limits the number of useless ones: a guest may supply
    /// new ones as fast as they are returned.
    fn refill(&mut self, shared: &Shared) -> Result<Option<Pause>, QueueError> {
        let mut useless = 0;
        for _ in 0..=self.queue.size() {
            let enough = match self.needs.mergeable {
                true => self.available >= self.needs.frame,
                false => self.available > 0,
            };
            if enough {
                return Ok(None);
            }
            let Some(chain) = self.queue.pop()? else {
                if self.queue.arm()? {
                    continue;
                }
                return Ok(Some(Pause::Starved));
            };
            let len = chain.writable_len() as usize;
            let iovecs = match len >= HEADER_SIZE {
                true => self.iovecs.push(&chain).unwrap_or(0),
                false => 0,
            };
            if iovecs == 0 {
                guest_fault!("a network's buffer has {len} bytes, less than a header");
                count(&shared.metrics.faults, 1);
                match self.chains.is_empty() {
                    true => self.queue.complete(chain.head(), 0)?,
                    // Earlier buffers may still be put back into the queue, and this one with them.
                    false => self.chains.push_back((chain, 0)),
                }
                useless += 1;
                if useless == BATCH {
                    break;
                }
                continue;
            }
            self.available += len;
            self.chains.push_back((chain, iovecs));
        }
        Ok(Some(Pause::BatchDone))
    }

    /// Puts unused buffers back into the queue.
    fn put_back(&mut self) {
        for _ in self.chains.drain(..) {
            self.queue.unpop();
        }
        self.available = 0;
    }

    /// Returns the buffers that hold a frame of `bytes`.
    fn deliver(&mut self, bytes: usize) -> Result<(), QueueError> {
        let mut left = bytes;
        let (mut filled, mut useless) = (Vec::new(), Vec::new());
        // The first remaining buffer must have space for a header.
        while left > 0 || self.chains.front().is_some_and(|(_, iovecs)| *iovecs == 0) {
            let Some((chain, iovecs)) = self.chains.pop_front() else {
                break;
            };
            if iovecs == 0 {
                useless.push((chain.head(), 0));
                continue;
            }
            let len = chain.writable_len() as usize;
            self.iovecs.drop_front(iovecs);
            self.available -= len;
            let used = left.min(len);
            left -= used;
            filled.push((chain, used as u32));
        }
        let buffers = (filled.len() as u16).to_le_bytes();
        if let Some((first, _)) = filled.first() {
            // It has space for a header.
            first
                .write(self.queue.memory(), NUM_BUFFERS_OFFSET, &buffers)
                .ok();
        }
        let filled = filled.iter().map(|(c, n)| (c.head(), *n));
        // The buffers of a frame are consecutive.
        let used: Vec<(u16, u32)> = filled.chain(useless).collect();
        self.queue.complete_all(&used)
    }
}

impl Sender {
    /// Moves frames from the guest to the tap, without notifying the guest yet.
    fn run(&mut self, tap: &File, shared: &Shared) -> Result<Pause, QueueError> {
        run_batch(|| self.move_frame(tap, shared))
    }

    fn move_frame(&mut self, tap: &File, shared: &Shared) -> Result<Option<Pause>, QueueError> {
        if let Some(wait) = lock(&self.limiter).wait(Instant::now()) {
            return Ok(Some(Pause::Limited(wait)));
        }
        let Some(chain) = self.queue.pop()? else {
            let more = self.queue.arm()?;
            return Ok((!more).then_some(Pause::Idle));
        };
        let len = chain.readable_len() as usize;
        if len <= HEADER_SIZE {
            guest_fault!("a network's frame has {len} bytes, no more than a header");
            count(&shared.metrics.faults, 1);
            self.queue.complete(chain.head(), 0)?;
            return Ok(None);
        }
        lock(&self.limiter).charge((len - HEADER_SIZE) as u64);
        let slices = chain.readable_slices(self.queue.memory(), 0, len);
        let sent = match slices {
            Ok(slices) if shared.link() => sys::write(tap, &slices),
            _ => Err(ErrorKind::NetworkDown.into()),
        };
        match sent {
            Ok(_) => {
                count(&shared.metrics.sent_frames, 1);
                count(&shared.metrics.sent_bytes, (len - HEADER_SIZE) as u64);
            }
            Err(error) => {
                count(&shared.metrics.sent_drops, 1);
                handle_refusal(&error, shared);
            }
        }
        self.queue.complete(chain.head(), 0)?;
        Ok(None)
    }
}

/// Handles a frame that the tap refused.
fn handle_refusal(error: &io::Error, shared: &Shared) -> Pause {
    match error.raw_os_error() {
        Some(libc::EBADFD | libc::ENODEV | libc::ENXIO) => {
            if shared.link() {
                log::warn!("the tap {} is gone", shared.tap_name);
            }
            shared.set_link(false);
            Pause::Gone
        }
        _ => Pause::Idle,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::{MacAddr, Net, NetOptions};
    use crate::rate_limit::RateLimits;
    use crate::test_utils::{Buffer, Driver};
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use std::sync::atomic::Ordering;

    /// A receiver for this driver, with one end of a socket pair as its tap, and the other end.
    fn receiver(driver: &Driver) -> (Receiver, Arc<Shared>, File) {
        let flags = SocketFlags::CLOEXEC;
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let (ours, host) = pair.unwrap();
        let options = NetOptions {
            mac: MacAddr([2; 6]),
            mtu: None,
            send_limits: RateLimits::default(),
            receive_limits: RateLimits::default(),
        };
        let tap = Tap::from_queues("test", vec![ours]).unwrap();
        let shared = Net::new(tap, options).unwrap().shared.clone();
        let limits = RateLimiter::new(RateLimits::default());
        let receiver = Receiver {
            iovecs: Iovecs::new(driver.memory().clone()),
            queue: driver.queue(),
            limiter: Arc::new(Mutex::new(limits)),
            needs: BufferNeeds::of(1 << VIRTIO_NET_F_MRG_RXBUF, None),
            chains: VecDeque::new(),
            available: 0,
        };
        (receiver, shared, host.into())
    }

    #[test]
    fn useless_buffers_are_returned_in_batches() {
        let mut driver = Driver::new(256);
        for _ in 0..256 {
            driver.offer(&[Buffer::Writable(HEADER_SIZE as u32 - 1)]);
        }
        let (mut receiver, shared, _host) = receiver(&driver);
        for run_batch in 1..=4 {
            assert_eq!(receiver.refill(&shared).unwrap(), Some(Pause::BatchDone));
            assert_eq!(driver.used().len(), BATCH);
            let faults = shared.metrics.faults.load(Ordering::Relaxed);
            assert_eq!(faults, (run_batch * BATCH) as u64);
        }
        assert_eq!(receiver.refill(&shared).unwrap(), Some(Pause::Starved));
    }

    /// Buffers are put back in the order in which they were taken, so none in between may have been returned.
    #[test]
    fn buffers_that_go_back_are_those_that_were_taken() {
        let mut driver = Driver::new(16);
        let sizes = [1000, 5, 600, 5, 1000, 1000];
        let heads = sizes.map(|size| driver.offer(&[Buffer::Writable(size)]));
        let (mut receiver, shared, _host) = receiver(&driver);
        assert_eq!(receiver.refill(&shared).unwrap(), None);
        assert!(
            driver.used().is_empty(),
            "a frame may need the buffers around a useless one"
        );
        receiver.deliver(1200).unwrap();
        let expected = [(heads[0], 1000), (heads[2], 200), (heads[1], 0)];
        assert_eq!(driver.used(), expected);
        // All earlier buffers have been returned, so this one is returned at once.
        assert_eq!(receiver.refill(&shared).unwrap(), None);
        assert_eq!(driver.used(), [(heads[3], 0)]);
        receiver.put_back();
        let popped = [4, 5].map(|_| receiver.queue.pop().unwrap().unwrap().head());
        assert_eq!(popped, [heads[4], heads[5]]);
    }
}
