//! Listeners on ports of the host, and connections from the host to ports of the guest. Shared between the
//! device and any thread of the process.

use super::connector::Connector;
use koya_host::sync::lock;
use serde::Serialize;
use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Maximum number of connections that wait for a listener; each takes a file descriptor.
const BACKLOG: usize = 128;

/// The target of a port of the host.
enum Target {
    /// A listener in this process; each connection is one end of a socket pair.
    Process(SyncSender<UnixStream>),
    /// A listening Unix socket.
    Socket(PathBuf),
}

/// Metrics of a guest's vsock device.
#[derive(Debug, Default, Serialize)]
pub struct VsockMetrics {
    /// Streams opened by either side.
    pub streams: AtomicU64,
    /// Packets from the guest that were refused: no listener, too many streams, protocol error.
    pub refused: AtomicU64,
    /// Bytes from the guest.
    pub sent_bytes: AtomicU64,
    /// Bytes to the guest.
    pub received_bytes: AtomicU64,
}

pub(super) struct SharedPorts {
    metrics: VsockMetrics,
    targets: Mutex<HashMap<u32, Target>>,
    /// Prefix of the sockets for ports that are not in `targets`, to be followed by the port number.
    fallback: Mutex<Option<PathBuf>>,
    /// Connects to the sockets; started with the first one.
    connector: OnceLock<Connector>,
    requested: Mutex<Vec<Requested>>,
    wake: EventFd,
}

impl SharedPorts {
    /// The socket to which a port is forwarded.
    pub(super) fn socket(&self, port: u32) -> Option<PathBuf> {
        if let Some(target) = lock(&self.targets).get(&port) {
            return match target {
                Target::Socket(path) => Some(path.clone()),
                Target::Process(_) => None,
            };
        }
        let mut path = lock(&self.fallback).clone()?.into_os_string();
        path.push(format!("_{port}"));
        Some(path.into())
    }
}

/// A connection requested by the host that the device has not started yet.
pub(super) struct Requested {
    /// Port in the guest.
    pub(super) port: u32,
    /// The device's end of the stream.
    pub(super) stream: UnixStream,
    /// Whether to write a line to the other end once the guest has accepted.
    pub(super) wants_reply: bool,
}

/// The host side of a guest's vsock device. Cheap to clone.
#[derive(Clone)]
pub struct Ports(Arc<SharedPorts>);

/// Accepts the guest's connections to one port in order. Dropping it closes the port.
pub struct Listener {
    port: u32,
    ports: Ports,
    streams: Receiver<UnixStream>,
}

impl Ports {
    /// Ports without any listener.
    ///
    /// # Errors
    /// If the host has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(SharedPorts {
            metrics: VsockMetrics::default(),
            targets: Mutex::default(),
            fallback: Mutex::default(),
            connector: OnceLock::new(),
            requested: Mutex::default(),
            wake: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        })))
    }

    /// Metrics of the device.
    pub fn metrics(&self) -> &VsockMetrics {
        &self.0.metrics
    }

    /// Listens on a port of the host for connections from the guest.
    ///
    /// # Errors
    /// If the port is in use.
    pub fn listen(&self, port: u32) -> io::Result<Listener> {
        let (sender, streams) = sync_channel(BACKLOG);
        self.add(port, Target::Process(sender))?;
        Ok(Listener {
            port,
            ports: self.clone(),
            streams,
        })
    }

    /// Forwards connections to a port of the host to a Unix socket, which is opened when the guest
    /// connects. A thread does that; it is confined if the caller [confines] the threads that it creates.
    ///
    /// # Errors
    /// If the port is in use, or the host cannot create a thread.
    ///
    /// [confines]: koya_host::walls::confine_new_threads
    pub fn forward(&self, port: u32, socket: impl Into<PathBuf>) -> io::Result<()> {
        self.start_connector()?;
        self.add(port, Target::Socket(socket.into()))
    }

    /// Connects to a port of the guest. Returns the stream immediately; if there is no listener in the guest,
    /// the stream ends.
    ///
    /// # Errors
    /// If the host has no sockets left, or the guest does not accept connections.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        self.request(port, theirs, false)?;
        Ok(ours)
    }

    /// Connects an existing stream to a port of the guest; the line `OK PORT`, with the host's port, is
    /// written to its other end once the guest has accepted.
    pub(super) fn connect_stream(&self, port: u32, stream: UnixStream) -> io::Result<()> {
        self.request(port, stream, true)
    }

    fn request(&self, port: u32, stream: UnixStream, wants_reply: bool) -> io::Result<()> {
        let mut requested = lock(&self.0.requested);
        // A guest that does not accept connections must not make this process hold any number of them.
        if requested.len() >= BACKLOG {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        requested.push(Requested {
            port,
            stream,
            wants_reply,
        });
        self.0.wake.write(1)
    }

    /// Forwards all ports without another target to Unix sockets: port 52 to `path` followed by `_52`.
    ///
    /// # Errors
    /// If the host cannot create a thread.
    pub(super) fn set_fallback(&self, path: PathBuf) -> io::Result<()> {
        self.start_connector()?;
        *lock(&self.0.fallback) = Some(path);
        Ok(())
    }

    /// Ends the forwarding of ports without a target.
    pub(super) fn clear_fallback(&self) {
        // Clients that wait for the line see the end of their stream.
        lock(&self.0.requested).retain(|requested| !requested.wants_reply);
        *lock(&self.0.fallback) = None;
    }

    fn start_connector(&self) -> io::Result<()> {
        if self.0.connector.get().is_none() {
            // Of two that are started at once, one is dropped.
            let started = Connector::start(Arc::downgrade(&self.0))?;
            self.0.connector.set(started).ok();
        }
        Ok(())
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

    /// Connects to the listener on `port`; returns the device's end of the stream.
    pub(super) fn accept(&self, port: u32) -> Option<UnixStream> {
        let mut targets = lock(&self.0.targets);
        let Some(Target::Process(sender)) = targets.get(&port) else {
            drop(targets);
            return self.0.connector.get()?.connect(port);
        };
        let (ours, theirs) = UnixStream::pair().ok()?;
        match sender.try_send(theirs) {
            Ok(()) => Some(ours),
            // The listener is slower than the guest: refused, like a connection to a socket with a full
            // backlog.
            Err(TrySendError::Full(_)) => None,
            Err(TrySendError::Disconnected(_)) => {
                targets.remove(&port);
                None
            }
        }
    }

    /// The connections requested by the host since the last call.
    pub(super) fn take_requested(&self) -> Vec<Requested> {
        self.0.wake.read().ok();
        std::mem::take(&mut *lock(&self.0.requested))
    }

    /// Becomes readable when there are requested connections ([`take_requested`](Self::take_requested)).
    pub(super) fn wake(&self) -> &EventFd {
        &self.0.wake
    }
}

impl Listener {
    /// Waits for the next connection.
    ///
    /// # Errors
    /// None while the listener exists; the signature is that of other listeners.
    pub fn accept(&self) -> io::Result<UnixStream> {
        self.streams
            .recv()
            .map_err(|_| io::ErrorKind::NotConnected.into())
    }

    /// Waits for the next connection, up to `limit`.
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
