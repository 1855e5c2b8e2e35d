//! A machine with a vsock device, and the state of both ends of each stream.

use crate::pool::Guest;
use crate::requests::{GUEST_CID, vsock_header};
use event_manager::{EventManager, MutEventSubscriber, SubscriberId, SubscriberOps};
use koya_devices::test_utils::Buffer;
use koya_devices::virtio::{Activation, VirtioDevice, Worker};
use koya_devices::vsock::{Listener, Ports, Vsock};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::net::UnixStream;
use std::time::Duration;

pub(super) const QUEUE: u16 = 64;
/// The port on which the host listens.
pub(super) const SERVED: u32 = 1;
/// Limit on guest memory for packets; beyond it, both ends pause.
pub(super) const ROOM: usize = 2 << 20;

pub(super) const REQUEST: u16 = 1;
pub(super) const RESPONSE: u16 = 2;
pub(super) const RESET: u16 = 3;
pub(super) const SHUTDOWN: u16 = 4;
pub(super) const DATA: u16 = 5;
pub(super) const CREDIT: u16 = 6;
pub(super) const CREDIT_REQUEST: u16 = 7;

pub(super) const NO_MORE_RECEIVED: u32 = 1;
pub(super) const NO_MORE_SENT: u32 = 2;

pub(super) type Loop = EventManager<Box<dyn MutEventSubscriber + Send>>;

/// A stream, with the state of both ends.
pub(super) struct Stream {
    /// The host's end.
    pub(super) host: Option<UnixStream>,
    pub(super) host_port: u32,
    pub(super) established: bool,
    /// This end has shut down sending.
    pub(super) guest_ended: bool,
    pub(super) host_ended: bool,
    /// No guarantees any more: an end was closed with data in transit.
    pub(super) over: bool,
    /// Bytes sent by the guest, and read by the host's end.
    pub(super) sent: u32,
    pub(super) read: u32,
    /// Bytes written by the host's end, received by the guest, and acknowledged to the device.
    pub(super) written: u32,
    pub(super) received: u32,
    pub(super) acknowledged: u32,
    /// The guest's buffer space, and that of the device as reported.
    pub(super) room: u32,
    pub(super) credit: u32,
    pub(super) forwarded: u32,
}

/// The byte at a position of a stream.
pub(super) fn pattern(guest_port: u32, at: u32) -> u8 {
    (guest_port.wrapping_mul(31) ^ at ^ at >> 8) as u8
}

pub(super) struct Packet {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) credit: u32,
    pub(super) forwarded: u32,
    pub(super) data: Vec<u8>,
}

pub(super) struct Machine {
    pub(super) device: Vsock,
    pub(super) ports: Ports,
    pub(super) listener: Listener,
    pub(super) events: Loop,
    pub(super) worker: Option<SubscriberId>,
    pub(super) sends: Guest,
    pub(super) receive: Guest,
    events_of_host: Guest,
    /// Number of buffers held by the device.
    pub(super) waiting: usize,
    /// Number of packets not processed by the device yet.
    pub(super) unsent: usize,
    /// Guest memory used by packets and buffers.
    pub(super) taken: usize,
    pub(super) streams: BTreeMap<u32, Stream>,
    /// Streams ended by the guest: packets may still be in transit.
    pub(super) forgotten: BTreeSet<u32>,
    /// Requests not accepted yet, in order.
    pub(super) asked: Vec<u32>,
    pub(super) next_port: u32,
}

impl Machine {
    pub(super) fn new() -> Self {
        let ports = Ports::new().expect("a descriptor");
        let listener = ports.listen(SERVED).expect("a port");
        let mut machine = Self {
            device: Vsock::new(GUEST_CID, ports.clone()),
            ports,
            listener,
            events: Loop::new().expect("epoll"),
            worker: None,
            sends: Guest::new(QUEUE),
            receive: Guest::new(QUEUE),
            events_of_host: Guest::new(16),
            waiting: 0,
            unsent: 0,
            taken: 0,
            streams: BTreeMap::new(),
            forgotten: BTreeSet::new(),
            asked: Vec::new(),
            next_port: 100,
        };
        machine.activate();
        machine
    }

    pub(super) fn activate(&mut self) {
        let queues = [
            self.receive.queue(),
            self.sends.queue(),
            self.events_of_host.queue(),
        ];
        let activated = self.device.activate(Activation {
            memory: self.sends.memory().clone(),
            interrupt: self.sends.recorder().clone(),
            queues: queues.into_iter().map(Some).collect(),
            features: self.device.features(),
        });
        if let Ok(Worker::EventLoop(worker)) = activated {
            self.worker = Some(self.events.add_subscriber(worker));
        }
    }

    /// Starts the driver again: the host's ends of all streams are closed.
    pub(super) fn reset(&mut self) {
        let worker = self.worker.take();
        let worker = worker.and_then(|id| self.events.remove_subscriber(id).ok());
        self.device.reset(worker);
        self.forgotten.extend(self.streams.keys());
        self.streams.clear();
        self.asked.clear();
        // Connections not accepted yet are closed too.
        while self.listener.accept_timeout(Duration::ZERO).is_ok() {}
        self.sends = Guest::new(QUEUE);
        self.receive = Guest::new(QUEUE);
        (self.waiting, self.unsent, self.taken) = (0, 0, 0);
        self.activate();
    }

    /// Runs the event loop until it is idle, at most 16 times.
    pub(super) fn run(&mut self) {
        for _ in 0..16 {
            if self.events.run_with_timeout(0).unwrap_or(0) == 0 {
                break;
            }
        }
        self.unsent -= self.sends.used().len().min(self.unsent);
    }

    pub(super) fn offer(&mut self, len: u32) {
        if self.waiting < usize::from(QUEUE) / 2 && self.taken < ROOM {
            self.receive.offer(&[Buffer::Writable(len)]);
            self.receive.kick();
            self.waiting += 1;
            self.taken += len.next_multiple_of(16) as usize;
        }
    }

    /// Sends a packet as bytes; with `split`, the data is in a separate buffer.
    pub(super) fn send_raw(&mut self, header: Vec<u8>, data: Vec<u8>, split: bool) {
        if !data.is_empty() && self.taken + data.len() > ROOM {
            return;
        }
        if self.unsent >= usize::from(QUEUE) / 2 - 1 {
            self.run();
        }
        self.unsent += 1;
        self.taken += 64 + data.len();
        match split {
            true => self
                .sends
                .offer(&[Buffer::Readable(header), Buffer::Readable(data)]),
            false => self
                .sends
                .offer(&[Buffer::Readable([header, data].concat())]),
        };
        self.sends.kick();
    }

    pub(super) fn send(&mut self, guest_port: u32, op: u16, flags: u32, data: Vec<u8>) {
        let Some(stream) = self.streams.get_mut(&guest_port) else {
            return;
        };
        stream.acknowledged = stream.received;
        let ports = (guest_port, stream.host_port);
        let header = vsock_header(
            ports,
            op,
            flags,
            data.len() as u32,
            (stream.room, stream.received),
        );
        self.send_raw(header, data, op % 2 == 1);
    }

    /// Packets written by the device since the last call.
    pub(super) fn packets(&mut self) -> Vec<Packet> {
        let used = self.receive.used();
        self.waiting -= used.len().min(self.waiting);
        let read = |(head, len): (u16, u32)| {
            let bytes = self.receive.written(head, len as usize);
            let number = |at: usize| {
                let part = bytes.get(at..at + 4)?;
                part.try_into().ok().map(u32::from_le_bytes)
            };
            Some(Packet {
                host_port: number(16)?,
                guest_port: number(20)?,
                op: (number(28)? >> 16) as u16,
                flags: number(32)?,
                credit: number(36)?,
                forwarded: number(40)?,
                data: bytes.get(44..)?.to_vec(),
            })
        };
        used.into_iter().filter_map(read).collect()
    }
}
