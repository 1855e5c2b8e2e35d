//! One stream between guest and host: the state machine and the credit accounting, on plain data. It owns the
//! host's end of the stream and is driven by the [`muxer`](super::muxer).
//!
//! ```text
//!            REQUEST from guest, host accepted          REQUEST to guest
//!                       │                                      │
//!                       ▼            RESPONSE from guest       ▼
//!                  Established ◀────────────────────────── Connecting
//!                       │
//!        │   guest SHUTDOWN(both) and our buffer is flushed, or RST, or host error
//!        │                                │
//!        │ RST after SHUTDOWN,            ▼
//!        │ with a buffer left    Dead: a RST is sent unless the guest sent one
//!        ▼                                ▲
//!     Draining ───────────────────────────┘ our buffer is flushed, or host error
//! ```
//! A Linux guest that closes a stream waits 8 s for a reset and then sends one. Draining is for a host end
//! that is slower than that. Half-closes are flags within Established: each direction ends independently.

use super::packet::{Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use std::collections::VecDeque;
use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

/// Maximum buffer of a stream on the host in bytes: the credit that the guest gets.
pub const MAX_BUFFER_SIZE: u32 = 256 << 10;

/// Minimum buffer, for streams opened when there are very many.
pub const MIN_BUFFER_SIZE: u32 = 2 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Requested by the host; the guest has not answered.
    Connecting,
    /// Data flows.
    Established,
    /// The guest has closed the stream; the host's end has not read everything yet.
    Draining,
    /// The stream has ended.
    Dead,
}

/// A stream between guest and host.
pub struct Connection {
    state: State,
    stream: UnixStream,
    /// Size of the receive buffer, which is the guest's credit, in bytes.
    buffer_size: u32,
    /// Data from the guest that the host's end has not taken yet.
    buffer: VecDeque<u8>,
    /// Bytes forwarded to the host's end (wrapping), and the value last reported to the guest.
    forwarded: u32,
    forwarded_reported: u32,
    /// Size of the guest's buffer, bytes that the guest has forwarded from it, and bytes sent to the guest.
    peer_buffer: u32,
    peer_forwarded: u32,
    sent: u32,
    /// Pending control packets.
    pending: VecDeque<(Op, u32)>,
    /// The host's end may be readable.
    readable: bool,
    /// The host's end sends no more.
    host_send_closed: bool,
    /// The guest sends no more; the guest receives no more.
    guest_send_closed: bool,
    guest_receive_closed: bool,
    reset_received: bool,
    /// Set when the host's end was closed in both directions: its position in the order of closing.
    closed: Option<u64>,
    /// Written to the host's end once the guest has accepted.
    greeting: Option<String>,
}

impl Connection {
    /// A stream that the guest opened with `request` and the host accepted.
    pub fn accepted(stream: UnixStream, request: &Header, buffer_size: u32) -> Self {
        let mut connection = Self::new(stream, State::Established, buffer_size);
        connection.take_credit(request);
        connection.pending.push_back((Op::Response, 0));
        connection
    }

    /// A stream opened by the host. If there is a `greeting`, it is written to the host's end once the guest
    /// has accepted.
    pub fn requested(stream: UnixStream, buffer_size: u32, greeting: Option<String>) -> Self {
        let mut connection = Self::new(stream, State::Connecting, buffer_size);
        connection.greeting = greeting;
        connection.pending.push_back((Op::Request, 0));
        connection
    }

    fn new(stream: UnixStream, state: State, buffer_size: u32) -> Self {
        Self {
            state,
            stream,
            buffer_size,
            buffer: VecDeque::new(),
            forwarded: 0,
            forwarded_reported: 0,
            peer_buffer: 0,
            peer_forwarded: 0,
            sent: 0,
            pending: VecDeque::new(),
            readable: true,
            host_send_closed: false,
            guest_send_closed: false,
            guest_receive_closed: false,
            reset_received: false,
            closed: None,
            greeting: None,
        }
    }

    /// The host's end.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Size of the receive buffer in bytes.
    pub fn buffer_size(&self) -> u32 {
        self.buffer_size
    }

    /// Whether the stream has ended and no packet is pending, so that it can be removed.
    pub fn is_finished(&self) -> bool {
        self.state == State::Dead && self.pending.is_empty()
    }

    /// Whether there is a packet for the guest: a control packet, or possibly data for which the guest has
    /// credit.
    pub fn has_packet(&self) -> bool {
        !self.pending.is_empty() || self.can_send()
    }

    fn can_send(&self) -> bool {
        self.state == State::Established
            && self.readable
            && !self.host_send_closed
            && !self.guest_receive_closed
            && self.peer_free() > 0
    }

    /// The guest's free buffer space in bytes.
    pub fn peer_free(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_buffer.saturating_sub(in_flight)
    }

    /// Bytes buffered for the host's end.
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// The next pending control packet, with its flags.
    pub fn take_control(&mut self) -> Option<(Op, u32)> {
        let pending = self.pending.pop_front();
        if matches!(pending, Some((op, _)) if op != Op::Reset) {
            self.forwarded_reported = self.forwarded;
        }
        pending
    }

    /// Sets this side's credit fields in a header for the guest.
    pub fn put_credit(&mut self, header: &mut Header) {
        header.buf_alloc = self.buffer_size.into();
        header.fwd_cnt = self.forwarded.into();
        self.forwarded_reported = self.forwarded;
    }

    /// Reads the guest's credit fields from any of its packets.
    pub fn take_credit(&mut self, header: &Header) {
        self.peer_buffer = header.buf_alloc.get();
        self.peer_forwarded = header.fwd_cnt.get();
    }

    /// Handles a packet from the guest other than data or a request.
    pub fn receive_control(&mut self, op: Op, flags: u32) {
        match (self.state, op) {
            (State::Connecting, Op::Response) => self.accepted_by_guest(),
            (State::Draining | State::Dead, _) => {}
            (State::Established, Op::Reset)
                if self.guest_send_closed && !self.buffer.is_empty() =>
            {
                self.reset_received = true;
                self.state = State::Draining;
                self.pending.clear();
            }
            (_, Op::Reset) => {
                self.reset_received = true;
                self.kill();
            }
            (State::Established, Op::Shutdown) => self.receive_shutdown(flags),
            (State::Established, Op::CreditRequest) => self.queue_control(Op::CreditUpdate, 0),
            (State::Established, Op::CreditUpdate) => {}
            // Anything else is a protocol error.
            _ => self.kill(),
        }
    }

    fn accepted_by_guest(&mut self) {
        self.state = State::Established;
        if let Some(greeting) = self.greeting.take()
            // Nothing was written before, so the line fits into the socket buffer.
            && self.stream.write_all(greeting.as_bytes()).is_err()
        {
            self.host_receive_closed();
        }
    }

    fn receive_shutdown(&mut self, flags: u32) {
        self.guest_send_closed |= flags & SHUTDOWN_SEND != 0;
        self.guest_receive_closed |= flags & SHUTDOWN_RECEIVE != 0;
        if self.guest_receive_closed {
            // The host's end gets an error on its next write.
            self.stream.shutdown(Shutdown::Read).ok();
        }
        self.after_flush();
    }

    /// Buffers data from the guest that could not be forwarded at once. Returns false, and the stream is
    /// dead, if the guest exceeded its credit or had announced that it would send no more.
    pub fn receive(&mut self, data: &[u8]) -> bool {
        let allowed = self.state == State::Established
            && !self.guest_send_closed
            && self.buffer.len() + data.len() <= self.buffer_size as usize;
        if !allowed {
            self.kill();
            return false;
        }
        let (len, capacity) = (self.buffer.len() + data.len(), self.buffer.capacity());
        if len > capacity {
            // Grows as a VecDeque would, but never beyond the receive buffer size.
            let wanted = len.max(2 * capacity).min(self.buffer_size as usize);
            self.buffer.reserve_exact(wanted - self.buffer.len());
        }
        self.buffer.extend(data);
        true
    }

    /// Whether data may be forwarded directly to the host's end: nothing is buffered before it.
    pub fn can_forward_directly(&self, len: u32) -> bool {
        self.state == State::Established
            && !self.guest_send_closed
            && self.buffer.is_empty()
            && len <= self.buffer_size
    }

    /// Accounts for `count` bytes forwarded directly to the host's end.
    pub fn add_forwarded(&mut self, count: u32) {
        self.forwarded = self.forwarded.wrapping_add(count);
        if self.state == State::Established
            && self.forwarded.wrapping_sub(self.forwarded_reported) > self.buffer_size / 2
        {
            self.queue_control(Op::CreditUpdate, 0);
        }
    }

    /// Writes as much buffered data to the host's end as it accepts.
    pub fn flush(&mut self) {
        while !self.buffer.is_empty() {
            let (front, _) = self.buffer.as_slices();
            match self.stream.write(front) {
                Ok(0) => return self.kill(),
                Ok(count) => {
                    self.buffer.drain(..count);
                    self.add_forwarded(count as u32);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return self.host_receive_closed(),
            }
        }
        // Frees the memory of a burst.
        self.buffer = VecDeque::new();
        self.after_flush();
    }

    /// Closes the directions that were waiting for the buffer to be flushed.
    fn after_flush(&mut self) {
        if !self.buffer.is_empty() {
            return;
        }
        if self.state == State::Draining {
            self.kill();
        } else if self.state == State::Established && self.guest_send_closed {
            self.stream.shutdown(Shutdown::Write).ok();
            if self.guest_receive_closed {
                self.kill();
            }
        }
    }

    /// The host's end accepts no more data.
    pub fn host_receive_closed(&mut self) {
        self.kill();
    }

    /// Accounts for `count` bytes sent to the guest.
    pub fn sent(&mut self, count: u32) {
        self.sent = self.sent.wrapping_add(count);
    }

    /// The host's end is not readable at present.
    pub fn drained(&mut self) {
        self.readable = false;
    }

    /// Records that the host's end was closed, as the `number`th.
    pub fn set_closed(&mut self, number: u64) {
        self.closed.get_or_insert(number);
    }

    /// The position of the host's end in the order of closing, if it was closed.
    pub fn closed(&self) -> Option<u64> {
        self.closed
    }

    /// The host's end may be readable.
    pub fn set_readable(&mut self) {
        self.readable = true;
    }

    /// The host's end sends no more.
    pub fn host_send_closed(&mut self) {
        if !std::mem::replace(&mut self.host_send_closed, true) && self.state == State::Established
        {
            self.queue_control(Op::Shutdown, SHUTDOWN_SEND);
        }
    }

    /// Ends the stream at once; a reset is sent unless the guest sent one.
    pub fn kill(&mut self) {
        if self.state == State::Dead {
            return;
        }
        self.state = State::Dead;
        self.buffer.clear();
        self.pending.clear();
        self.stream.shutdown(Shutdown::Both).ok();
        if !self.reset_received {
            self.pending.push_back((Op::Reset, 0));
        }
    }

    fn queue_control(&mut self, op: Op, flags: u32) {
        if !self.pending.iter().any(|(pending, _)| *pending == op) {
            self.pending.push_back((op, flags));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_process_gets_a_line_when_the_guest_has_accepted() {
        use std::io::Read;
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut connection = Connection::requested(ours, MAX_BUFFER_SIZE, Some("OK 5\n".into()));
        theirs.set_nonblocking(true).unwrap();
        let mut line = [0; 16];
        assert!(theirs.read(&mut line).is_err(), "nothing yet");
        connection.receive_control(Op::Response, 0);
        let count = theirs.read(&mut line).unwrap();
        assert_eq!(&line[..count], b"OK 5\n");
    }
    use std::io::Read;

    fn established() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let request = Header {
            buf_alloc: 1000.into(),
            ..Header::default()
        };
        let mut connection = Connection::accepted(ours, &request, MAX_BUFFER_SIZE);
        assert_eq!(connection.take_control(), Some((Op::Response, 0)));
        (connection, theirs)
    }

    #[test]
    fn the_guest_is_never_sent_more_than_its_credit() {
        let (mut connection, _host) = established();
        connection.sent(900);
        assert_eq!(connection.peer_free(), 100);
        connection.sent(100);
        assert!(!connection.has_packet());
        let update = Header {
            buf_alloc: 1000.into(),
            fwd_cnt: 600.into(),
            ..Header::default()
        };
        connection.take_credit(&update);
        assert_eq!(connection.peer_free(), 600);
    }

    #[test]
    fn a_guest_that_shrinks_its_buffer_below_what_is_in_flight_gets_nothing() {
        let (mut connection, _host) = established();
        connection.sent(900);
        connection.take_credit(&Header {
            buf_alloc: 10.into(),
            ..Header::default()
        });
        assert_eq!(connection.peer_free(), 0);
    }

    #[test]
    fn a_guest_that_sends_beyond_its_credit_is_reset() {
        let (mut connection, _host) = established();
        assert!(connection.receive(&vec![0; MAX_BUFFER_SIZE as usize]));
        assert!(!connection.receive(&[0]));
        assert_eq!(connection.take_control(), Some((Op::Reset, 0)));
        assert!(connection.is_finished());
    }

    #[test]
    fn a_buffer_takes_no_more_memory_than_its_limit() {
        let (mut connection, _host) = established();
        let buffer_size = connection.buffer_size() as usize;
        for _ in 0..buffer_size / 1000 {
            assert!(connection.receive(&[7; 1000]));
            assert!(connection.buffer.capacity() <= buffer_size);
        }
    }

    #[test]
    fn a_half_close_of_the_guest_reaches_the_host_after_the_data() {
        let (mut connection, mut host) = established();
        assert!(connection.receive(b"last words"));
        connection.receive_control(Op::Shutdown, SHUTDOWN_SEND);
        connection.flush();
        let mut got = String::new();
        host.read_to_string(&mut got).unwrap();
        assert_eq!(got, "last words");
        // The other direction still works.
        assert!(connection.has_packet());
        assert!(!connection.is_finished());
    }

    #[test]
    fn what_a_guest_sent_before_it_closed_reaches_a_slow_host() {
        let (mut connection, mut host) = established();
        let sent: Vec<u8> = (0..MAX_BUFFER_SIZE).map(|n| n as u8).collect();
        assert!(connection.receive(&sent));
        connection.receive_control(Op::Shutdown, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
        // The guest gives up waiting.
        connection.receive_control(Op::Reset, 0);
        assert!(!connection.has_packet() && !connection.is_finished());
        let reader = std::thread::spawn(move || {
            let mut got = Vec::new();
            host.read_to_end(&mut got).map(|_| got)
        });
        while !connection.is_finished() {
            connection.flush();
            assert!(!connection.has_packet(), "nobody is there to hear");
            std::thread::yield_now();
        }
        assert!(reader.join().unwrap().unwrap() == sent);
    }

    #[test]
    fn a_full_close_of_the_guest_is_answered_by_a_reset() {
        let (mut connection, _host) = established();
        connection.receive_control(Op::Shutdown, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
        assert_eq!(connection.take_control(), Some((Op::Reset, 0)));
    }

    #[test]
    fn a_half_close_of_the_host_is_sent_once() {
        let (mut connection, _host) = established();
        connection.host_send_closed();
        connection.host_send_closed();
        assert_eq!(
            connection.take_control(),
            Some((Op::Shutdown, SHUTDOWN_SEND))
        );
        assert_eq!(connection.take_control(), None);
        assert!(connection.receive(b"still fine"));
    }

    #[test]
    fn credit_is_sent_when_half_the_buffer_was_forwarded() {
        let (mut connection, _host) = established();
        connection.add_forwarded(MAX_BUFFER_SIZE / 2);
        assert_eq!(connection.take_control(), None);
        connection.add_forwarded(1);
        assert_eq!(connection.take_control(), Some((Op::CreditUpdate, 0)));
    }

    #[test]
    fn a_reset_from_the_guest_is_not_answered() {
        let (mut connection, _host) = established();
        connection.receive_control(Op::Reset, 0);
        assert!(connection.is_finished());
    }

    /// Possible next actions of either side in a small model: a guest with room for two bytes, a device with room for four.
    #[derive(Clone, Copy, Debug)]
    enum Act {
        GuestSends(u32),
        HostTakes(u32),
        /// The device sends its next control packet.
        Tells,
        DeviceSends,
        GuestReads,
        GuestTells,
    }

    /// Every order of a few actions, with counters that wrap around: neither side exceeds the other's room, and a guest that
    /// waits for room gets an update.
    #[test]
    fn credit_is_kept_in_every_order() {
        const ACTS: [Act; 8] = [
            Act::GuestSends(1),
            Act::GuestSends(3),
            Act::HostTakes(1),
            Act::HostTakes(4),
            Act::Tells,
            Act::DeviceSends,
            Act::GuestReads,
            Act::GuestTells,
        ];
        const LENGTH: u32 = 6;
        const FIRST: u32 = u32::MAX - 1;
        const GUEST_ROOM: u32 = 2;
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut connection = Connection::accepted(ours, &Header::default(), 4);
        let mut orders = 0;
        for number in 0..(ACTS.len() as u32).pow(LENGTH) {
            connection.buffer.clear();
            connection.pending.clear();
            (connection.forwarded, connection.forwarded_reported) = (FIRST, FIRST);
            (connection.sent, connection.peer_forwarded) = (FIRST, FIRST);
            connection.peer_buffer = GUEST_ROOM;
            // Counters of the guest: bytes sent, last known count of the device's end, bytes received, bytes read.
            let (mut sent, mut known, mut received, mut read) = (FIRST, FIRST, FIRST, FIRST);
            let mut left = number;
            for _ in 0..LENGTH {
                let act = ACTS[left as usize % ACTS.len()];
                left /= ACTS.len() as u32;
                let mut header = Header::default();
                match act {
                    Act::GuestSends(most) => {
                        let count = most.min(4 - sent.wrapping_sub(known));
                        sent = sent.wrapping_add(count);
                        assert!(connection.receive(&vec![0; count as usize]), "{number}");
                    }
                    Act::HostTakes(most) => {
                        let count = most.min(connection.buffered() as u32);
                        connection.buffer.drain(..count as usize);
                        connection.add_forwarded(count);
                    }
                    Act::Tells => {
                        if connection.take_control().is_some() {
                            connection.put_credit(&mut header);
                            known = header.fwd_cnt.get();
                        }
                    }
                    Act::DeviceSends => {
                        let count = connection.peer_free().min(1);
                        connection.sent(count);
                        received = received.wrapping_add(count);
                        if count > 0 {
                            connection.put_credit(&mut header);
                            known = header.fwd_cnt.get();
                        }
                    }
                    Act::GuestReads => read = received,
                    Act::GuestTells => {
                        header.buf_alloc = GUEST_ROOM.into();
                        header.fwd_cnt = read.into();
                        connection.take_credit(&header);
                    }
                }
                assert_eq!(connection.state, State::Established);
                assert!(connection.buffered() <= 4);
                assert!(
                    received.wrapping_sub(read) <= GUEST_ROOM,
                    "{number}: {act:?}"
                );
                let waits = sent.wrapping_sub(known) == 4;
                let told = !connection.pending.is_empty();
                assert!(!waits || told || connection.buffered() > 0, "{number}");
            }
            orders += 1;
        }
        println!("{orders} orders of {LENGTH} acts");
    }
}
