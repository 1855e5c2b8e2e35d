//! Standard streams from the guest: assignment of vsock streams.
//!
//! Any process in the guest can connect to the stream port, so a connection is accepted only if it begins with a one-time
//! token that was sent to the agent over the control connection.

use crate::sync::lock;
use koya_protocol::{STREAM_PORT, TOKEN_LEN};
use koya_vmm::devices::vsock::Ports;
use koya_vmm::host::threads;
use rustix::event::{PollFd, PollFlags, poll};
use std::collections::{HashMap, VecDeque};
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

/// Time limit for a requested stream to arrive.
const STREAM_LIMIT: Duration = Duration::from_secs(30);
/// Time limit for a connection to send its token, which follows at once.
const TOKEN_LIMIT: Duration = Duration::from_secs(10);
/// Maximum number of connections without a token; beyond that the oldest is closed.
const MAX_PENDING: usize = 256;
/// Interval at which new connections are looked for after one without a token has arrived.
const LOOK: Duration = Duration::from_millis(2);
/// Number of such intervals without an arrival after which pending connections are looked at less and less often.
const PROMPT: u32 = 8;
/// Number of doublings of the interval: at least every 64 ms.
const DOUBLINGS: u32 = 5;
/// Maximum number of connections accepted before the pending ones are served.
const BATCH: usize = 64;

type Waiting = Arc<Mutex<HashMap<String, SyncSender<UnixStream>>>>;

/// Expected streams.
#[derive(Clone)]
pub(crate) struct Streams {
    waiting: Waiting,
}

/// An expected stream.
pub(crate) struct Expected {
    pub(crate) token: String,
    stream: Receiver<UnixStream>,
    waiting: Waiting,
}

impl Streams {
    /// Listens for streams until the port is closed with the virtual machine.
    pub(crate) fn listen(ports: &Ports) -> io::Result<Self> {
        let listener = ports.listen(STREAM_PORT)?;
        let waiting = Waiting::default();
        let shared = Arc::downgrade(&waiting);
        threads::spawn("koya-streams", move || {
            serve(|limit| listener.accept_timeout(limit), &shared);
        })?;
        Ok(Self { waiting })
    }

    /// Creates a token and registers its stream as expected.
    pub(crate) fn expect(&self) -> io::Result<Expected> {
        let mut bytes = [0; TOKEN_LEN / 2];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        let token: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        let (sender, stream) = sync_channel(1);
        lock(&self.waiting).insert(token.clone(), sender);
        Ok(Expected {
            token,
            stream,
            waiting: self.waiting.clone(),
        })
    }
}

impl Expected {
    /// The stream; it has arrived before the agent's reply, or arrives with it.
    pub(crate) fn take(self) -> io::Result<UnixStream> {
        self.stream
            .recv_timeout(STREAM_LIMIT)
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the guest opened no stream"))
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        lock(&self.waiting).remove(&self.token);
    }
}

/// A connection without a complete token.
struct Pending {
    stream: UnixStream,
    since: Instant,
    token: [u8; TOKEN_LEN],
    got: usize,
}

/// State of a pending connection.
enum Look {
    /// The token may still arrive.
    Waits,
    Over,
    Token(String),
}

impl Pending {
    fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            since: Instant::now(),
            token: [0; TOKEN_LEN],
            got: 0,
        })
    }

    fn look(&mut self) -> Look {
        loop {
            match self.stream.read(&mut self.token[self.got..]) {
                Ok(0) => return Look::Over,
                Ok(count) => self.got += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return Look::Over,
            }
            if self.got == TOKEN_LEN {
                return Look::Token(String::from_utf8_lossy(&self.token).into_owned());
            }
        }
        Look::Waits
    }
}

/// Assigns connections to expected streams until none are expected any more. Connections that send nothing do not delay
/// others, and cost little: a guest may make any number of them.
fn serve(
    accept: impl Fn(Duration) -> io::Result<UnixStream>,
    expected: &Weak<Mutex<HashMap<String, SyncSender<UnixStream>>>>,
) {
    let mut pending: VecDeque<Pending> = VecDeque::new();
    // Turns since a connection or a part of a token has arrived.
    let mut quiet = 0;
    loop {
        // A new connection ends the wait.
        let mut limit = match pending.is_empty() {
            true => Duration::from_millis(500),
            false => wait_before(quiet),
        };
        let mut has_new = false;
        for _ in 0..BATCH {
            match accept(std::mem::take(&mut limit)) {
                Ok(stream) => {
                    pending.extend(Pending::new(stream));
                    has_new = true;
                }
                Err(e) if e.kind() == io::ErrorKind::TimedOut => break,
                Err(_) => return,
            }
        }
        // A token follows its connection at once.
        let limit = match has_new || quiet < PROMPT {
            true => LOOK,
            false => Duration::ZERO,
        };
        let ready = find_ready(&pending, limit);
        quiet = match has_new || ready.contains(&true) {
            true => 0,
            false => quiet.saturating_add(1),
        };
        let Some(waiting) = expected.upgrade() else {
            return;
        };
        let now = Instant::now();
        // Before any is closed: connections whose token has arrived by now are not affected.
        pending = pending
            .into_iter()
            .zip(ready)
            .filter_map(|(mut one, is_ready)| {
                let state = match is_ready {
                    true => one.look(),
                    false => Look::Waits,
                };
                match state {
                    Look::Waits => (now.duration_since(one.since) < TOKEN_LIMIT).then_some(one),
                    Look::Over => None,
                    Look::Token(token) => {
                        hand_over(one.stream, &token, &waiting);
                        None
                    }
                }
            })
            .collect();
        drop(waiting);
        let surplus = pending.len().saturating_sub(MAX_PENDING);
        pending.drain(..surplus);
    }
}

/// Time to wait for a new connection before the pending ones are looked at, after a number of quiet turns.
fn wait_before(quiet: u32) -> Duration {
    match quiet.checked_sub(PROMPT) {
        Some(turns) => LOOK * (1 << turns.min(DOUBLINGS)),
        None => Duration::ZERO,
    }
}

/// Whether each of them is readable, or closed; waits up to `limit` until one is.
fn find_ready(pending: &VecDeque<Pending>, limit: Duration) -> Vec<bool> {
    let streams = pending.iter().map(|one| &one.stream);
    let mut polled: Vec<_> = streams
        .map(|stream| PollFd::new(stream, PollFlags::IN))
        .collect();
    let limit = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: limit.as_nanos() as i64,
    };
    let found = match polled.is_empty() {
        true => Ok(0),
        false => poll(&mut polled, Some(&limit)),
    };
    let is_ready = |one: &PollFd<'_>| !one.revents().is_empty();
    match found {
        Ok(1..) => polled.iter().map(is_ready).collect(),
        _ => vec![false; pending.len()],
    }
}

fn hand_over(stream: UnixStream, token: &str, waiting: &Waiting) {
    if let Some(sender) = lock(waiting).remove(token)
        && stream.set_nonblocking(false).is_ok()
    {
        sender.send(stream).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::mpsc::{RecvTimeoutError, Sender, channel};

    /// Streams without a guest: streams sent to the channel count as connections.
    fn streams() -> (Streams, Sender<UnixStream>) {
        let (guest, connections) = channel();
        let waiting = Waiting::default();
        let shared = Arc::downgrade(&waiting);
        std::thread::spawn(move || {
            let accept = |limit| {
                let next = connections.recv_timeout(limit);
                next.map_err(|error| match error {
                    RecvTimeoutError::Timeout => io::ErrorKind::TimedOut.into(),
                    RecvTimeoutError::Disconnected => io::ErrorKind::NotConnected.into(),
                })
            };
            serve(accept, &shared);
        });
        (Streams { waiting }, guest)
    }

    fn connect(guest: &Sender<UnixStream>) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        guest.send(theirs).unwrap();
        ours
    }

    #[test]
    fn connections_that_say_nothing_keep_no_stream_from_who_expects_it() {
        let (streams, guest) = streams();
        let mut idle: Vec<_> = (0..1000).map(|_| connect(&guest)).collect();
        let expected = streams.expect().unwrap();
        let mut own = connect(&guest);
        own.write_all(expected.token.as_bytes()).unwrap();
        idle.extend((0..100).map(|_| connect(&guest)));
        let mut stream = expected.take().unwrap();
        own.write_all(b"hello").unwrap();
        let mut got = [0; 5];
        stream.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello");
        // The others are closed, the oldest first.
        for one in &mut idle {
            one.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            assert_eq!(one.read(&mut [0]).unwrap(), 0);
        }
    }

    #[test]
    fn a_token_that_comes_in_parts_counts_once() {
        let (streams, guest) = streams();
        let expected = streams.expect().unwrap();
        let token = expected.token.clone();
        let mut own = connect(&guest);
        for part in token.as_bytes().chunks(7) {
            own.write_all(part).unwrap();
            std::thread::sleep(LOOK);
        }
        expected.take().unwrap();
        let mut again = connect(&guest);
        again.write_all(token.as_bytes()).unwrap();
        again
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        assert_eq!(again.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn idle_connections_are_looked_at_less_and_less_often() {
        assert_eq!(wait_before(0), Duration::ZERO);
        assert_eq!(wait_before(PROMPT), LOOK);
        assert_eq!(wait_before(u32::MAX), LOOK * 32);
        let waiting = Waiting::default();
        let (ours, theirs): (Vec<_>, VecDeque<_>) = (0..MAX_PENDING)
            .map(|_| UnixStream::pair().unwrap())
            .unzip();
        let (connections, turns) = (Mutex::new(theirs), Mutex::new(0));
        let began = Instant::now();
        let accept = |limit| match lock(&connections).pop_front() {
            Some(stream) => Ok(stream),
            None if began.elapsed() > Duration::from_secs(1) => {
                Err(io::ErrorKind::NotConnected.into())
            }
            None => {
                *lock(&turns) += 1;
                std::thread::sleep(limit);
                Err(io::ErrorKind::TimedOut.into())
            }
        };
        serve(accept, &Arc::downgrade(&waiting));
        let turns = *lock(&turns);
        assert!(turns < 100, "{turns} turns in a second");
        drop(ours);
    }

    #[test]
    fn a_token_that_comes_late_counts() {
        let (streams, guest) = streams();
        let expected = streams.expect().unwrap();
        let mut own = connect(&guest);
        std::thread::sleep(Duration::from_millis(300));
        own.write_all(expected.token.as_bytes()).unwrap();
        expected.take().unwrap();
    }

    #[test]
    fn the_thread_ends_with_its_sandbox() {
        let (streams, guest) = streams();
        let mut idle = connect(&guest);
        drop(streams);
        idle.set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        assert_eq!(idle.read(&mut [0]).unwrap(), 0);
    }
}
