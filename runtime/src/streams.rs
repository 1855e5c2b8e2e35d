//! Standard streams from the guest: which vsock stream is which.
//!
//! Any process of the guest can connect to the stream port, so a connection counts only if it
//! begins with a token that was given to the agent over the control connection, once.

use crate::sync::lock;
use koya_protocol::{STREAM_PORT, TOKEN_LEN};
use koya_vmm::devices::threads;
use koya_vmm::devices::vsock::Ports;
use std::collections::HashMap;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long a connection may take to say its token.
const TOKEN_LIMIT: Duration = Duration::from_secs(5);
/// How many connections may be in that state.
const MAX_PENDING: usize = 64;
/// How often it is looked whether there is room for one more.
const ROOM: Duration = Duration::from_millis(1);

type Waiting = Arc<Mutex<HashMap<String, SyncSender<UnixStream>>>>;

/// Streams that are expected.
#[derive(Clone)]
pub(crate) struct Streams {
    waiting: Waiting,
}

/// One stream that is expected.
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
            let pending = Arc::new(AtomicUsize::new(0));
            loop {
                let next = listener.accept_timeout(Duration::from_millis(500));
                let Some(waiting) = shared.upgrade() else {
                    return;
                };
                match next {
                    Ok(stream) => {
                        // Many processes may start at once. None waits here for longer than the limit.
                        while pending.load(Ordering::SeqCst) >= MAX_PENDING {
                            std::thread::sleep(ROOM);
                        }
                        take(stream, waiting, &pending);
                    }
                    Err(e) if e.kind() == io::ErrorKind::TimedOut => {}
                    Err(_) => return,
                }
            }
        })?;
        Ok(Self { waiting })
    }

    /// Makes a token and expects its stream.
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
    /// The stream; it has come before the agent's answer, or comes with it.
    pub(crate) fn take(self) -> io::Result<UnixStream> {
        self.stream
            .recv_timeout(TOKEN_LIMIT)
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the guest opened no stream"))
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        lock(&self.waiting).remove(&self.token);
    }
}

fn take(mut stream: UnixStream, waiting: Waiting, pending: &Arc<AtomicUsize>) {
    pending.fetch_add(1, Ordering::SeqCst);
    let count = pending.clone();
    let spawned = threads::spawn("koya-token", move || {
        let mut token = [0; TOKEN_LEN];
        let read = stream
            .set_read_timeout(Some(TOKEN_LIMIT))
            .and_then(|()| stream.read_exact(&mut token))
            .and_then(|()| stream.set_read_timeout(None));
        count.fetch_sub(1, Ordering::SeqCst);
        let token = String::from_utf8_lossy(&token);
        if read.is_ok()
            && let Some(sender) = lock(&waiting).remove(token.as_ref())
        {
            sender.send(stream).ok();
        }
    });
    if spawned.is_err() {
        pending.fetch_sub(1, Ordering::SeqCst);
    }
}
