//! The device: connects the muxer to its three queues and, for each stream, a file descriptor, on the event
//! loop.

use super::muxer::{Key, Muxer, Watch};
use super::{FIRST_GUEST_CID, Ports};
use crate::fault::guest_fault;
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, DeviceKind, QueueError, VirtioDevice, Worker,
};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::collections::HashMap;
use std::os::fd::{AsRawFd, RawFd};

/// Receive, transmit, event (section 5.10.2).
const QUEUE_SIZES: &[u16] = &[256, 256, 16];
const RX: u16 = 0;
const TX: u16 = 1;
const EVENT: u16 = 2;

/// Maximum number of packets per direction in a batch, after which the event loop's other sources are served.
const BATCH: usize = 64;

/// The vsock device.
pub struct Vsock {
    cid: u64,
    ports: Ports,
}

impl Vsock {
    /// A device for the guest with this CID, at least [`FIRST_GUEST_CID`].
    pub fn new(cid: u64, ports: Ports) -> Self {
        Self {
            cid: cid.max(FIRST_GUEST_CID),
            ports,
        }
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn config(&self) -> Option<Vec<u8>> {
        Some(self.cid.to_le_bytes().to_vec())
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Worker, ActivateError> {
        Ok(Worker::EventLoop(Box::new(VsockWorker {
            rx: activation.take_queue(RX)?,
            tx: activation.take_queue(TX)?,
            _event: activation.take_queue(EVENT)?,
            muxer: Muxer::new(self.cid, self.ports.clone()),
            watched: HashMap::new(),
            wake: self.ports.wake().as_raw_fd(),
            broken: false,
        })))
    }

    // Streams are closed when the worker is dropped.
    fn reset(&mut self, worker: Option<Box<dyn MutEventSubscriber + Send>>) {
        drop(worker);
    }
}

struct VsockWorker {
    rx: ActiveQueue,
    tx: ActiveQueue,
    /// Transport events (section 5.10.6.7) are for live migration, which is not supported.
    _event: ActiveQueue,
    muxer: Muxer,
    watched: HashMap<RawFd, Key>,
    wake: RawFd,
    broken: bool,
}

impl VsockWorker {
    /// Moves packets in both directions until both queues are idle or the batch is complete; in the latter
    /// case the queue kicks itself, so that the loop returns after its other sources.
    fn serve(&mut self) -> Result<(), QueueError> {
        let (mut tx_left, mut rx_left) = (BATCH, BATCH);
        // Each round except the last moves a packet, or finds that an available packet has become obsolete,
        // which also counts towards the limit.
        for _ in 0..BATCH {
            let more_tx = self.serve_tx(&mut tx_left)?;
            let at_rest = !self.muxer.may_receive();
            let more_rx = self.serve_rx(&mut rx_left)?;
            // Progress on the receive queue may allow the transmit queue to continue.
            let woken = at_rest && self.muxer.may_receive();
            if !more_tx && !more_rx && !woken {
                return Ok(());
            }
            if tx_left == 0 || rx_left == 0 {
                break;
            }
        }
        self.tx.kick_self();
        Ok(())
    }

    /// True if the driver added a packet meanwhile, or more are available than `left` in the batch.
    fn serve_tx(&mut self, left: &mut usize) -> Result<bool, QueueError> {
        let mut any = false;
        while *left > 0
            && self.muxer.may_receive()
            && let Some(chain) = self.tx.pop()?
        {
            *left -= 1;
            if let Err(error) = self.muxer.receive(&chain, self.tx.memory()) {
                // An invalid packet is dropped; its stream notices by its credit.
                guest_fault!("vsock: a packet of the guest's is broken: {error}");
            }
            self.tx.complete(chain.head(), 0)?;
            any = true;
        }
        if any {
            self.tx.notify()?;
        }
        // Stopped because of pending refusals: space in the receive queue resumes it.
        Ok(self.muxer.may_receive() && self.tx.arm()?)
    }

    /// True if the driver added buffers meanwhile and there is a packet for them, or more are available than
    /// `left` in the batch.
    fn serve_rx(&mut self, left: &mut usize) -> Result<bool, QueueError> {
        let mut any = false;
        while *left > 0
            && self.muxer.has_packet()
            && let Some(chain) = self.rx.pop()?
        {
            *left -= 1;
            match self.muxer.send(&chain, self.rx.memory()) {
                Ok(Some(written)) => self.rx.complete(chain.head(), written)?,
                Ok(None) => {
                    self.rx.unpop();
                    break;
                }
                Err(error) => {
                    guest_fault!("vsock: a buffer of the guest's is no use: {error}");
                    self.rx.complete(chain.head(), 0)?;
                }
            }
            any = true;
        }
        if any {
            self.rx.notify()?;
        }
        Ok(self.rx.arm()? && self.muxer.has_packet())
    }

    fn update_watches(&mut self, ops: &mut EventOps) {
        for watch in self.muxer.take_watches() {
            match watch {
                Watch::Add(fd, key) => {
                    let set = EventSet::IN
                        | EventSet::OUT
                        | EventSet::READ_HANG_UP
                        | EventSet::EDGE_TRIGGERED;
                    if let Err(error) = ops.add(Events::new_raw(fd, set)) {
                        log::error!("vsock: cannot watch a stream: {error}");
                    }
                    self.watched.insert(fd, key);
                }
                Watch::Remove(fd) => {
                    self.watched.remove(&fd);
                    ops.remove(Events::empty_raw(fd)).ok();
                }
            }
        }
        self.muxer.close_ended();
    }

    fn stop(&mut self, ops: &mut EventOps, error: &QueueError) {
        self.tx.fail(error);
        self.broken = true;
        let ours = [
            self.rx.kick().as_raw_fd(),
            self.tx.kick().as_raw_fd(),
            self.wake,
        ];
        for fd in ours.into_iter().chain(self.watched.drain().map(|w| w.0)) {
            ops.remove(Events::empty_raw(fd)).ok();
        }
    }
}

impl MutEventSubscriber for VsockWorker {
    fn init(&mut self, ops: &mut EventOps) {
        let kicks = [
            self.rx.kick().as_raw_fd(),
            self.tx.kick().as_raw_fd(),
            self.wake,
        ];
        for fd in kicks {
            if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                log::error!("vsock: cannot watch a queue: {error}");
            }
        }
        // For entries that were added to the queues before they were registered with epoll.
        self.process(Events::empty(self.tx.kick()), ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if self.broken {
            return;
        }
        let fd = events.fd();
        if fd == self.rx.kick().as_raw_fd() {
            self.rx.kick().read().ok();
        } else if fd == self.tx.kick().as_raw_fd() {
            self.tx.kick().read().ok();
        } else if fd == self.wake {
            self.muxer.connect_requested();
        } else if let Some(key) = self.watched.get(&fd) {
            let set = events.event_set();
            // Closed in both directions: an end that only stops sending is not a hang-up.
            if set.intersects(EventSet::HANG_UP | EventSet::ERROR) {
                self.muxer.host_closed(*key);
            }
            let ended = EventSet::HANG_UP | EventSet::READ_HANG_UP | EventSet::ERROR;
            self.muxer.host_ready(
                *key,
                set.intersects(EventSet::IN | ended),
                set.intersects(EventSet::OUT | ended),
            );
        }
        let served = self.serve();
        self.update_watches(ops);
        if let Err(error) = served {
            self.stop(ops, &error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_utils::{Buffer, Driver, MEMORY_SIZE};
    use crate::virtio::Memory;
    use crate::vsock::packet::{HEADER_SIZE, Header, Op, TYPE_STREAM};
    use std::io::{Read, Write};
    use std::sync::Arc;
    use vm_memory::GuestAddress;
    use zerocopy::{FromBytes, IntoBytes};

    /// Both queues of a guest with CID 3; each driver has its own memory.
    struct Guest {
        rx: Driver,
        tx: Driver,
        worker: VsockWorker,
        ports: Ports,
    }

    impl Guest {
        fn new() -> Self {
            let memory = || {
                let ranges = [(GuestAddress(0), MEMORY_SIZE)];
                Arc::new(Memory::from_ranges(&ranges).unwrap())
            };
            let rx = Driver::with_memory(memory(), 256);
            let tx = Driver::with_memory(memory(), 256);
            let ports = Ports::new().unwrap();
            let worker = VsockWorker {
                rx: rx.queue(),
                tx: tx.queue(),
                _event: Driver::new(16).queue(),
                muxer: Muxer::new(3, ports.clone()),
                watched: HashMap::new(),
                wake: ports.wake().as_raw_fd(),
                broken: false,
            };
            Self {
                rx,
                tx,
                worker,
                ports,
            }
        }

        /// Puts a packet into the transmit queue.
        fn offer(&mut self, header: &Header, data: &[u8]) {
            let bytes = [header.as_bytes(), data].concat();
            self.tx.offer(&[Buffer::Readable(bytes)]);
        }

        fn send(&mut self, op: Op, port: u32, data: &[u8]) {
            let header = Header {
                len: (data.len() as u32).into(),
                ..packet(op, port)
            };
            self.offer(&header, data);
            self.worker.serve().unwrap();
        }

        /// Offers a buffer; returns the data written by the device, if any.
        fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
            self.rx.offer(&[Buffer::Writable(4096)]);
            self.worker.serve().unwrap();
            let (head, len) = *self.rx.used().first()?;
            let bytes = self.rx.written(head, len as usize);
            let (header, data) = Header::read_from_prefix(&bytes).unwrap();
            Some((header, data.to_vec()))
        }
    }

    /// A packet without data from port 77 of the guest.
    fn packet(op: Op, port: u32) -> Header {
        Header {
            src_cid: 3.into(),
            dst_cid: 2.into(),
            src_port: 77.into(),
            dst_port: port.into(),
            kind: TYPE_STREAM.into(),
            op: (op as u16).into(),
            buf_alloc: 65536.into(),
            ..Header::default()
        }
    }

    fn op(packet: &(Header, Vec<u8>)) -> Option<Op> {
        Op::from_number(packet.0.op.get())
    }

    #[test]
    fn a_request_to_a_port_without_listener_is_reset() {
        let mut guest = Guest::new();
        guest.send(Op::Request, 1000, &[]);
        let answer = guest.receive().unwrap();
        assert_eq!(op(&answer), Some(Op::Reset));
        assert_eq!(answer.0.dst_port.get(), 77);
    }

    #[test]
    fn data_flows_both_ways_until_the_end() {
        let mut guest = Guest::new();
        let listener = guest.ports.listen(1000).unwrap();
        guest.send(Op::Request, 1000, &[]);
        assert_eq!(op(&guest.receive().unwrap()), Some(Op::Response));
        let mut host = listener.accept().unwrap();

        guest.send(Op::ReadWrite, 1000, b"hello host");
        let mut got = [0; 10];
        host.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello host");

        host.write_all(b"hello guest").unwrap();
        let key = *guest.worker.muxer.connection_keys().first().unwrap();
        guest.worker.muxer.host_ready(key, true, false);
        let answer = guest.receive().unwrap();
        assert_eq!(
            (op(&answer), answer.1.as_slice()),
            (Some(Op::ReadWrite), &b"hello guest"[..])
        );

        drop(host);
        guest.worker.muxer.host_ready(key, true, true);
        assert_eq!(op(&guest.receive().unwrap()), Some(Op::Shutdown));
        guest.send(Op::Reset, 1000, &[]);
        // The stream is removed when it is next served.
        guest.receive();
        assert!(guest.worker.muxer.connection_keys().is_empty());
    }

    #[test]
    fn a_packet_with_a_wrong_sender_is_refused() {
        let mut guest = Guest::new();
        let listener = guest.ports.listen(1).unwrap();
        let header = Header {
            src_cid: 9.into(),
            ..packet(Op::Request, 1)
        };
        guest.offer(&header, &[]);
        guest.worker.serve().unwrap();
        assert_eq!(op(&guest.receive().unwrap()), Some(Op::Reset));
        assert!(listener.accept_timeout(std::time::Duration::ZERO).is_err());
    }

    #[test]
    fn a_header_that_lies_about_its_length_is_dropped() {
        let mut guest = Guest::new();
        let header = Header {
            len: u32::MAX.into(),
            ..Header::default()
        };
        guest.offer(&header, &[]);
        guest.tx.offer(&[Buffer::Readable(vec![0; 3])]);
        guest.worker.serve().unwrap();
        assert_eq!(guest.tx.used().len(), 2);
    }

    #[test]
    fn a_new_stream_replaces_one_that_the_host_has_closed() {
        let mut guest = Guest::new();
        let listener = guest.ports.listen(1000).unwrap();
        guest.worker.muxer.set_limit(16);
        let request = |from: u32| Header {
            src_port: from.into(),
            ..packet(Op::Request, 1000)
        };
        let ask = |guest: &mut Guest, from: u32| {
            guest.offer(&request(from), &[]);
            guest.worker.serve().unwrap();
            listener.accept_timeout(std::time::Duration::ZERO).ok()
        };
        let mut hosts: Vec<_> = (0..16).map(|from| ask(&mut guest, from)).collect();
        assert!(hosts.iter().all(Option::is_some));
        assert!(
            ask(&mut guest, 100).is_none(),
            "there are as many as may be"
        );
        // The guest keeps its ends open and receives no packet.
        for from in [5, 3] {
            hosts[from as usize] = None;
            guest.worker.muxer.host_closed(Key {
                host: 1000,
                guest: from,
            });
        }
        assert!(ask(&mut guest, 101).is_some());
        let left = |guest: &Guest| {
            let keys = guest.worker.muxer.connection_keys().into_iter();
            let mut ports: Vec<u32> = keys.map(|key| key.guest).collect();
            ports.sort_unstable();
            ports
        };
        let ports = left(&guest);
        assert!(!ports.contains(&5) && ports.contains(&3), "{ports:?}");
        let own = guest.ports.connect(7).unwrap();
        guest.worker.muxer.connect_requested();
        let ports = left(&guest);
        assert!(!ports.contains(&3) && ports.contains(&7), "{ports:?}");
        assert_eq!(ports.len(), 16);
        drop(own);
        assert!(ask(&mut guest, 102).is_none());
    }

    #[test]
    fn a_buffer_for_a_header_only_does_not_block_streams() {
        let mut guest = Guest::new();
        let listener = guest.ports.listen(1000).unwrap();
        guest.send(Op::Request, 1000, &[]);
        assert_eq!(op(&guest.receive().unwrap()), Some(Op::Response));
        let mut host = listener.accept().unwrap();
        host.write_all(b"data").unwrap();
        let key = *guest.worker.muxer.connection_keys().first().unwrap();
        guest.worker.muxer.host_ready(key, true, false);
        let short = guest.rx.offer(&[Buffer::Writable(HEADER_SIZE)]);
        let mut guest = crate::test_utils::finishes(move || {
            guest.worker.serve().unwrap();
            guest
        });
        // It is returned empty, and the data goes to the next one.
        assert_eq!(guest.rx.used(), [(short, 0)]);
        let answer = guest.receive().unwrap();
        assert_eq!(
            (op(&answer), answer.1.as_slice()),
            (Some(Op::ReadWrite), &b"data"[..])
        );
    }

    #[test]
    fn a_full_queue_is_served_in_batches() {
        let mut guest = Guest::new();
        let _listener = guest.ports.listen(1000).unwrap();
        guest.send(Op::Request, 1000, &[]);
        guest.receive();
        guest.tx.used();
        let header = packet(Op::CreditUpdate, 1000);
        let flood = guest
            .tx
            .flood(&[Buffer::Readable(header.as_bytes().to_vec())]);
        let mut guest = crate::test_utils::finishes(move || {
            guest.worker.serve().unwrap();
            guest
        });
        drop(flood);
        assert_eq!(guest.tx.used().len(), BATCH);
        assert!(guest.tx.take_kick());
    }

    #[test]
    fn refusals_are_bounded_without_receive_buffers() {
        let mut guest = Guest::new();
        for _ in 0..5 {
            for _ in 0..BATCH {
                guest.offer(&packet(Op::Request, 5), &[]);
            }
            guest.worker.serve().unwrap();
        }
        assert!(guest.tx.used().len() <= 256 + HEADER_SIZE as usize);
        assert!(!guest.worker.muxer.may_receive());
    }
}
