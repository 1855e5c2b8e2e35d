//! All streams of one guest, and the round-robin queue of packets for it.

use super::HOST_CID;
use super::connection::{Connection, MAX_BUFFER_SIZE, MIN_BUFFER_SIZE};
use super::packet::{HEADER_SIZE, Header, Op, TYPE_STREAM};
use super::ports::{Ports, Requested, VsockMetrics};
use crate::fault::guest_detail;
use crate::sys;
use crate::virtio::{Chain, ChainError, Memory};
use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use zerocopy::IntoBytes;

/// Maximum number of streams of a guest. Each takes a file descriptor, so the limit is lower if the process
/// may have few.
pub const MAX_CONNECTIONS: usize = 4096;

/// Total size of the receive buffers of all streams in bytes: a guest that fills them must not push its
/// sandbox over the memory limit of the process. The host kernel may hold as much again in socket buffers,
/// and at least 4 KiB per stream.
const TOTAL_BUFFER_SIZE: u32 = 14 << 20;

/// A new stream gets one part in this many of the remaining budget: the first gets 256 KiB, the hundredth 4
/// KiB. The budget of a closed stream is available again.
const SHARE_DIVISOR: u32 = 24;

/// Maximum number of refusals that wait for buffers in the receive queue. If a guest causes more without
/// supplying buffers, its transmit queue is not served until it does.
const MAX_REFUSALS: usize = 256;

/// Maximum data size of a packet to the guest.
const MAX_PACKET: u32 = 64 << 10;

/// First source port of connections from the host.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Identifies a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Port on the host.
    pub host: u32,
    /// Port in the guest.
    pub guest: u32,
}

/// A change of the descriptors watched by epoll, to be made by the device.
#[derive(Debug, PartialEq, Eq)]
pub enum Watch {
    /// Add the descriptor of a new stream.
    Add(i32, Key),
    /// Remove a descriptor that is about to be closed.
    Remove(i32),
}

/// All streams of a guest.
pub struct Muxer {
    cid: u64,
    ports: Ports,
    connections: HashMap<Key, Connection>,
    /// Streams that have a packet for the guest, each once.
    ready: VecDeque<Key>,
    queued: HashSet<Key>,
    refusals: VecDeque<Header>,
    watches: Vec<Watch>,
    /// Streams that have ended; their descriptors stay open until epoll has removed them.
    closing: Vec<Connection>,
    next_port: u32,
    limit: usize,
    /// Total size of the receive buffers of all streams.
    allocated: u32,
    /// Number of host ends closed while the guest's end was open, to find the one closed first.
    closed: u64,
}

/// Receive buffer size of a new stream, given the number of existing streams and their total. The minimum
/// that further streams need is kept in reserve.
fn buffer_size(streams: usize, allocated: u32) -> u32 {
    let to_come = MAX_CONNECTIONS.saturating_sub(streams) as u32;
    let free = TOTAL_BUFFER_SIZE
        .saturating_sub(allocated)
        .saturating_sub(to_come * MIN_BUFFER_SIZE);
    (free / SHARE_DIVISOR).clamp(MIN_BUFFER_SIZE, MAX_BUFFER_SIZE)
}

/// Limits the amount that the host kernel buffers for a slow reader of a stream (SO_SNDBUF). The default is 208 KiB.
fn limit_send_buffer(stream: &UnixStream, buffer_size: u32) {
    // The kernel doubles this value for its own overhead, and has a minimum.
    let bound = rustix::net::sockopt::set_socket_send_buffer_size(stream, buffer_size as usize / 2);
    if let Err(error) = bound {
        guest_detail!("vsock: cannot set the send buffer size of a stream: {error}");
    }
}

/// An eighth of the process's descriptor limit, up to [`MAX_CONNECTIONS`].
fn connection_limit() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let share = limit.map_or(MAX_CONNECTIONS as u64, |limit| limit / 8);
    share.clamp(16, MAX_CONNECTIONS as u64) as usize
}

impl Muxer {
    /// A muxer for the guest with this CID.
    pub fn new(cid: u64, ports: Ports) -> Self {
        Self {
            cid,
            ports,
            connections: HashMap::new(),
            ready: VecDeque::new(),
            queued: HashSet::new(),
            refusals: VecDeque::new(),
            watches: Vec::new(),
            closing: Vec::new(),
            next_port: FIRST_HOST_PORT,
            limit: connection_limit(),
            allocated: 0,
            closed: 0,
        }
    }

    fn buffer_size(&self) -> u32 {
        buffer_size(self.connections.len(), self.allocated)
    }

    /// The changes for epoll since the last call, to be made before [`close_ended`](Self::close_ended).
    pub fn take_watches(&mut self) -> Vec<Watch> {
        std::mem::take(&mut self.watches)
    }

    /// Closes the descriptors of streams that have ended, after epoll has removed them.
    pub fn close_ended(&mut self) {
        self.closing.clear();
    }

    /// Whether the transmit queue may be served: the list of refusals is not full.
    pub fn may_receive(&self) -> bool {
        self.refusals.len() < MAX_REFUSALS
    }

    /// Handles a packet from the guest.
    ///
    /// # Errors
    /// If the chain is shorter than its header says.
    pub fn receive(&mut self, chain: &Chain, memory: &Memory) -> Result<(), ChainError> {
        let mut header = Header::default();
        chain.read(memory, 0, header.as_mut_bytes())?;
        let len = header.len.get();
        if len > chain.readable_len() - HEADER_SIZE {
            return Err(ChainError::TooShort);
        }
        let key = Key {
            host: header.dst_port.get(),
            guest: header.src_port.get(),
        };
        let op = Op::from_number(header.op.get());
        let proper = header.src_cid.get() == self.cid
            && header.dst_cid.get() == HOST_CID
            && header.kind.get() == TYPE_STREAM;
        let Some(op) = op.filter(|_| proper) else {
            self.refuse(&header);
            return Ok(());
        };
        if op == Op::Request {
            self.request(key, &header);
            return Ok(());
        }
        let Some(connection) = self.connections.get_mut(&key) else {
            if op != Op::Reset {
                self.refuse(&header);
            }
            return Ok(());
        };
        connection.take_credit(&header);
        if op == Op::ReadWrite {
            forward_data(connection, chain, memory, len)?;
            self.count(|metrics| &metrics.sent_bytes, len.into());
        } else {
            connection.receive_control(op, header.flags.get());
        }
        self.enqueue(key);
        Ok(())
    }

    fn request(&mut self, key: Key, header: &Header) {
        if self.connections.contains_key(&key) || !self.make_space() {
            self.refuse(header);
            return;
        }
        let Some(stream) = self.ports.accept(key.host) else {
            self.refuse(header);
            return;
        };
        if let Err(error) = stream.set_nonblocking(true) {
            log::warn!("vsock: {error}");
            self.refuse(header);
            return;
        }
        self.insert(
            key,
            Connection::accepted(stream, header, self.buffer_size()),
        );
    }

    /// Starts the streams requested by the host.
    pub fn connect_requested(&mut self) {
        for Requested {
            port: guest,
            stream,
            wants_reply,
        } in self.ports.take_requested()
        {
            if !self.make_space() || stream.set_nonblocking(true).is_err() {
                continue; // Dropped: the host's end sees the end of its stream.
            }
            let mut key = Key {
                host: self.next_port,
                guest,
            };
            while self.connections.contains_key(&key) {
                key.host = key.host.wrapping_add(1).max(FIRST_HOST_PORT);
            }
            self.next_port = key.host.wrapping_add(1).max(FIRST_HOST_PORT);
            let greeting = wants_reply.then(|| format!("OK {}\n", key.host));
            self.insert(
                key,
                Connection::requested(stream, self.buffer_size(), greeting),
            );
        }
    }

    fn count(&self, counter: impl Fn(&VsockMetrics) -> &AtomicU64, by: u64) {
        counter(self.ports.metrics()).fetch_add(by, Ordering::Relaxed);
    }

    fn insert(&mut self, key: Key, connection: Connection) {
        self.allocated += connection.buffer_size();
        limit_send_buffer(connection.stream(), connection.buffer_size());
        self.count(|metrics| &metrics.streams, 1);
        let fd = connection.stream().as_raw_fd();
        self.watches.push(Watch::Add(fd, key));
        self.connections.insert(key, connection);
        self.enqueue(key);
    }

    /// Whether another stream can be added. If there are too many, the stream whose host end was closed first
    /// is removed: a guest that keeps its own ends open must not block new streams.
    fn make_space(&mut self) -> bool {
        if self.connections.len() < self.limit {
            return true;
        }
        // The guest is notified by a refusal, whose number is limited.
        if !self.may_receive() {
            return false;
        }
        let closed = self.connections.iter();
        let closed = closed.filter_map(|(key, one)| Some((one.closed()?, *key)));
        let Some((_, key)) = closed.min_by_key(|(number, _)| *number) else {
            return false;
        };
        if let Some(mut connection) = self.connections.remove(&key) {
            connection.kill();
            self.refusals.push_back(Header {
                src_cid: HOST_CID.into(),
                dst_cid: self.cid.into(),
                src_port: key.host.into(),
                dst_port: key.guest.into(),
                kind: TYPE_STREAM.into(),
                op: (Op::Reset as u16).into(),
                ..Header::default()
            });
            self.close(connection);
        }
        true
    }

    /// The host's end of a stream was closed in both directions.
    pub fn host_closed(&mut self, key: Key) {
        if let Some(connection) = self.connections.get_mut(&key) {
            connection.set_closed(self.closed);
            self.closed += 1;
        }
    }

    /// The host's end of a stream is readable or writable.
    pub fn host_ready(&mut self, key: Key, readable: bool, writable: bool) {
        let Some(connection) = self.connections.get_mut(&key) else {
            return;
        };
        if readable {
            connection.set_readable();
        }
        if writable {
            connection.flush();
        }
        self.enqueue(key);
    }

    fn enqueue(&mut self, key: Key) {
        let Some(connection) = self.connections.get(&key) else {
            return;
        };
        if (connection.has_packet() || connection.is_finished()) && self.queued.insert(key) {
            self.ready.push_back(key);
        }
    }

    /// Whether there may be a packet for the guest.
    pub fn has_packet(&self) -> bool {
        !self.refusals.is_empty() || !self.ready.is_empty()
    }

    /// Writes the next packet to `chain`; returns its length, or `None` if there is no packet after all.
    ///
    /// # Errors
    /// If the chain has no space for a header, or for no data when data is next. The packet waits for the
    /// next chain.
    pub fn send(&mut self, chain: &Chain, memory: &Memory) -> Result<Option<u32>, ChainError> {
        if chain.writable_len() < HEADER_SIZE {
            return Err(ChainError::TooShort);
        }
        if let Some(refusal) = self.refusals.pop_front() {
            chain.write(memory, 0, refusal.as_bytes())?;
            return Ok(Some(HEADER_SIZE));
        }
        while let Some(key) = self.ready.pop_front() {
            self.queued.remove(&key);
            let sent = self.send_from(key, chain, memory);
            self.enqueue(key);
            self.sweep(key);
            if !matches!(sent, Ok(None)) {
                return sent;
            }
        }
        Ok(None)
    }

    fn send_from(
        &mut self,
        key: Key,
        chain: &Chain,
        memory: &Memory,
    ) -> Result<Option<u32>, ChainError> {
        let Some(connection) = self.connections.get_mut(&key) else {
            return Ok(None);
        };
        let mut header = Header {
            src_cid: HOST_CID.into(),
            dst_cid: self.cid.into(),
            src_port: key.host.into(),
            dst_port: key.guest.into(),
            kind: TYPE_STREAM.into(),
            ..Header::default()
        };
        if let Some((op, flags)) = connection.take_control() {
            header.op = (op as u16).into();
            header.flags = flags.into();
            connection.put_credit(&mut header);
            chain.write(memory, 0, header.as_bytes())?;
            return Ok(Some(HEADER_SIZE));
        }
        if !connection.has_packet() {
            return Ok(None);
        }
        let room = chain.writable_len() - HEADER_SIZE;
        if room == 0 {
            // A retry with the same chain would end here again, forever.
            return Err(ChainError::TooShort);
        }
        let count = room.min(connection.peer_free()).min(MAX_PACKET);
        let slices = chain.writable_slices(memory, HEADER_SIZE, count as usize)?;
        match sys::receive(connection.stream(), &slices) {
            Ok(0) => {
                connection.host_send_closed();
                return self.send_from(key, chain, memory);
            }
            Ok(got) => {
                connection.sent(got as u32);
                header.op = (Op::ReadWrite as u16).into();
                header.len = (got as u32).into();
                connection.put_credit(&mut header);
                chain.write(memory, 0, header.as_bytes())?;
                self.count(|metrics| &metrics.received_bytes, got as u64);
                return Ok(Some(HEADER_SIZE + got as u32));
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => connection.drained(),
            Err(_) => {
                connection.host_receive_closed();
                return self.send_from(key, chain, memory);
            }
        }
        Ok(None)
    }

    /// Removes a stream that has ended.
    fn sweep(&mut self, key: Key) {
        if self
            .connections
            .get(&key)
            .is_some_and(Connection::is_finished)
            && let Some(connection) = self.connections.remove(&key)
        {
            self.close(connection);
        }
    }

    fn close(&mut self, connection: Connection) {
        self.allocated -= connection.buffer_size();
        self.watches
            .push(Watch::Remove(connection.stream().as_raw_fd()));
        self.closing.push(connection);
    }

    #[cfg(test)]
    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    #[cfg(test)]
    pub(super) fn connection_keys(&self) -> Vec<Key> {
        self.connections.keys().copied().collect()
    }

    fn refuse(&mut self, header: &Header) {
        self.count(|metrics| &metrics.refused, 1);
        self.refusals.push_back(Header {
            src_cid: header.dst_cid,
            dst_cid: header.src_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            kind: header.kind,
            op: (Op::Reset as u16).into(),
            ..Header::default()
        });
    }
}

/// Forwards data from the guest to the host's end: directly as much as it accepts, the rest through the
/// buffer.
fn forward_data(
    connection: &mut Connection,
    chain: &Chain,
    memory: &Memory,
    len: u32,
) -> Result<(), ChainError> {
    let mut passed = 0;
    if connection.can_forward_directly(len) && len > 0 {
        let slices = chain.readable_slices(memory, HEADER_SIZE, len as usize)?;
        match sys::send(connection.stream(), &slices) {
            Ok(count) => {
                passed = count as u32;
                connection.add_forwarded(passed);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => {
                connection.host_receive_closed();
                return Ok(());
            }
        }
    }
    if passed < len {
        let mut rest = vec![0; (len - passed).min(MAX_BUFFER_SIZE + 1) as usize];
        chain.read(memory, HEADER_SIZE + passed, &mut rest)?;
        connection.receive(&rest);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_buffers_together_are_bounded() {
        let mut allocated = 0;
        let sizes: Vec<u32> = (0..MAX_CONNECTIONS)
            .map(|streams| {
                let buffer_size = buffer_size(streams, allocated);
                allocated += buffer_size;
                buffer_size
            })
            .collect();
        assert!(allocated <= TOTAL_BUFFER_SIZE, "{allocated}");
        assert!(sizes.is_sorted_by(|one, next| one >= next));
        assert!(sizes[0] >= 250 << 10 && sizes[50] >= 24 << 10, "{sizes:?}");
        assert_eq!(sizes[MAX_CONNECTIONS - 1], MIN_BUFFER_SIZE);
        // Whatever the order in which streams end and start.
        let mut left = sizes;
        for n in 0..10_000 {
            allocated -= left.swap_remove(n * 7919 % left.len());
            let new = buffer_size(left.len(), allocated);
            allocated += new;
            left.push(new);
            assert!(allocated <= TOTAL_BUFFER_SIZE, "{allocated}");
        }
        assert!((16..=MAX_CONNECTIONS).contains(&connection_limit()));
    }
}
