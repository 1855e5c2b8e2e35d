//! Who listens on the host's ports, and how host code reaches ports of the guest. Shared between
//! the device and any thread of the process.

use koya_host::sync::lock;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::Serialize;
use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// How many connections wait for a listener; each is a descriptor.
const BACKLOG: usize = 128;

/// What a port of the host leads to.
enum Target {
    /// Code in this process; each connection is the far end of a socket pair.
    Process(SyncSender<UnixStream>),
    /// A Unix socket that somebody listens on.
    Socket(PathBuf),
}

/// What a guest's vsock did so far.
#[derive(Debug, Default, Serialize)]
pub struct VsockMetrics {
    /// Streams that were made, by either side.
    pub streams: AtomicU64,
    /// Packets of the guest that were refused: nobody listens, too many streams, out of turn.
    pub refused: AtomicU64,
    /// Bytes from the guest.
    pub sent_bytes: AtomicU64,
    /// Bytes to the guest.
    pub received_bytes: AtomicU64,
}

struct Inner {
    metrics: VsockMetrics,
    targets: Mutex<HashMap<u32, Target>>,
    /// Where ports lead that are not in `targets`: to sockets with this path and the port's number.
    fallback: Mutex<Option<PathBuf>>,
    wanted: Mutex<Vec<Wanted>>,
    wake: EventFd,
}

/// A connection that the host asked for and the device has not taken up.
pub(super) struct Wanted {
    /// The guest's port.
    pub(super) port: u32,
    /// The device's end.
    pub(super) stream: UnixStream,
    /// Whether the other end is told when the guest has accepted.
    pub(super) is_line_wanted: bool,
}

/// The host's side of a guest's vsock. Cheap to clone.
#[derive(Clone)]
pub struct Ports(Arc<Inner>);

/// Connections to one port, in the order in which the guest made them. Dropping it closes the
/// port.
pub struct Listener {
    port: u32,
    ports: Ports,
    streams: Receiver<UnixStream>,
}

impl Ports {
    /// No port leads anywhere yet.
    ///
    /// # Errors
    /// If the host gives no event descriptor.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Inner {
            metrics: VsockMetrics::default(),
            targets: Mutex::default(),
            fallback: Mutex::default(),
            wanted: Mutex::default(),
            wake: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        })))
    }

    /// What the guest's vsock did so far.
    pub fn metrics(&self) -> &VsockMetrics {
        &self.0.metrics
    }

    /// Listens on a port of the host, for connections from the guest.
    ///
    /// # Errors
    /// If somebody listens there already.
    pub fn listen(&self, port: u32) -> io::Result<Listener> {
        let (sender, streams) = sync_channel(BACKLOG);
        self.add(port, Target::Process(sender))?;
        Ok(Listener {
            port,
            ports: self.clone(),
            streams,
        })
    }

    /// Leads a port of the host to a Unix socket; it is connected to when the guest connects.
    ///
    /// # Errors
    /// If somebody listens there already.
    pub fn forward(&self, port: u32, socket: impl Into<PathBuf>) -> io::Result<()> {
        self.add(port, Target::Socket(socket.into()))
    }

    /// Connects to a port of the guest. The stream is there at once; if nobody listens in the
    /// guest, it ends at once.
    ///
    /// # Errors
    /// If the host gives no sockets, or the guest takes no connections up.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        self.want(port, theirs, false)?;
        Ok(ours)
    }

    /// Connects a stream that is there to a port of the guest; its other end gets a line `OK PORT`,
    /// with the host's port, once the guest has accepted.
    pub(super) fn connect_stream(&self, port: u32, stream: UnixStream) -> io::Result<()> {
        self.want(port, stream, true)
    }

    fn want(&self, port: u32, stream: UnixStream, is_line_wanted: bool) -> io::Result<()> {
        let mut wanted = lock(&self.0.wanted);
        // A guest that takes none up must not make this process hold them all.
        if wanted.len() >= BACKLOG {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        wanted.push(Wanted {
            port,
            stream,
            is_line_wanted,
        });
        self.0.wake.write(1)
    }

    /// Leads all ports that lead nowhere else to Unix sockets: port 52 to `path` and `_52`.
    pub(super) fn set_fallback(&self, path: Option<PathBuf>) {
        if path.is_none() {
            // Whoever waits sees the end.
            lock(&self.0.wanted).retain(|wanted| !wanted.is_line_wanted);
        }
        *lock(&self.0.fallback) = path;
    }

    fn add(&self, port: u32, target: Target) -> io::Result<()> {
        let mut targets = lock(&self.0.targets);
        if targets.contains_key(&port) {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                format!("vsock port {port} of the host has a listener"),
            ));
        }
        targets.insert(port, target);
        Ok(())
    }

    /// The device's end of a stream to whoever listens on `port`.
    pub(super) fn accept(&self, port: u32) -> Option<UnixStream> {
        let mut targets = lock(&self.0.targets);
        let Some(target) = targets.get(&port) else {
            drop(targets);
            let mut path = lock(&self.0.fallback).clone()?.into_os_string();
            path.push(format!("_{port}"));
            return connect_at_once(path.as_ref()).ok();
        };
        let stream = match target {
            Target::Process(sender) => {
                let (ours, theirs) = UnixStream::pair().ok()?;
                match sender.try_send(theirs) {
                    Ok(()) => ours,
                    // Slower than its guest: refused, as a full backlog of a socket is.
                    Err(TrySendError::Full(_)) => return None,
                    Err(TrySendError::Disconnected(_)) => {
                        targets.remove(&port);
                        return None;
                    }
                }
            }
            Target::Socket(path) => connect_at_once(path).ok()?,
        };
        Some(stream)
    }

    /// Connections that the host asked for since the last call.
    pub(super) fn take_wanted(&self) -> Vec<Wanted> {
        self.0.wake.read().ok();
        std::mem::take(&mut *lock(&self.0.wanted))
    }

    /// Becomes readable when [`take_wanted`](Self::take_wanted) has something to give.
    pub(super) fn wake(&self) -> &EventFd {
        &self.0.wake
    }
}

/// Connects without waiting: this is the event loop's thread. A listener whose backlog is full
/// refuses.
fn connect_at_once(path: &std::path::Path) -> io::Result<UnixStream> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

impl Listener {
    /// The next connection, waiting for it.
    ///
    /// # Errors
    /// None while the listener lives; the form is the one of other listeners.
    pub fn accept(&self) -> io::Result<UnixStream> {
        self.streams
            .recv()
            .map_err(|_| io::ErrorKind::NotConnected.into())
    }

    /// The next connection, waiting no longer than `limit`.
    ///
    /// # Errors
    /// `TimedOut`
    pub fn accept_timeout(&self, limit: Duration) -> io::Result<UnixStream> {
        self.streams.recv_timeout(limit).map_err(|e| match e {
            RecvTimeoutError::Timeout => io::ErrorKind::TimedOut.into(),
            RecvTimeoutError::Disconnected => io::ErrorKind::NotConnected.into(),
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        lock(&self.ports.0.targets).remove(&self.port);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_socket_whose_backlog_is_full_refuses_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        let ports = Ports::new().unwrap();
        ports.forward(1, &path).unwrap();
        let taken: Vec<_> = std::iter::from_fn(|| ports.accept(1))
            .take(100_000)
            .collect();
        assert!(!taken.is_empty() && taken.len() < 100_000);
    }

    #[test]
    fn a_listener_that_is_slower_than_its_guest_refuses() {
        let ports = Ports::new().unwrap();
        let listener = ports.listen(1).unwrap();
        let taken: Vec<_> = std::iter::from_fn(|| ports.accept(1)).collect();
        assert_eq!(taken.len(), BACKLOG);
        listener.accept().unwrap();
        assert!(ports.accept(1).is_some());
        drop(listener);
        assert!(ports.accept(1).is_none());
    }
}
