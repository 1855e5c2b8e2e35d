//! The host's side of a sandbox's loopback: connections to `localhost` in the sandbox's network namespace on the host are
//! forwarded to the guest's loopback.
//!
//! Kubernetes port forwarding requires this: the CRI server enters a pod's network namespace and connects to
//! `localhost:PORT`, but the services are in the guest.

use crate::{Error, Sandbox};
use koya_vmm::host::sync::Counter;
use koya_vmm::host::sys::redirect_loopback;
use koya_vmm::host::threads;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Maximum number of concurrent connections; further ones wait for their turn.
const CONNECTIONS: usize = 256;
/// Polling interval of waiting connections.
const LOOK: Duration = Duration::from_millis(20);

/// While this lives, each TCP connection to 127.0.0.0/8 or ::1 in a network namespace, on any port, is forwarded to the same
/// port of a guest's loopback.
pub struct Loopback {
    // Dropped first, so that no more connections arrive.
    _steered: OwnedFd,
    listeners: Vec<Arc<TcpListener>>,
    is_over: Arc<AtomicBool>,
}

impl Loopback {
    /// Forwards the loopback of the calling thread's network namespace to a guest's. Nothing else may listen there.
    ///
    /// # Errors
    /// If the host kernel does not support it (Linux 5.9) or privileges are missing (CAP_BPF, CAP_NET_ADMIN).
    pub fn join(sandbox: &Arc<Sandbox>) -> Result<Self, Error> {
        let joined = || -> io::Result<Self> {
            let namespace = File::open("/proc/thread-self/ns/net")?;
            let four = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
            // The namespace may have no IPv6.
            let six = TcpListener::bind(SocketAddr::from((Ipv6Addr::LOCALHOST, 0))).ok();
            let steered = redirect_loopback(
                namespace.as_fd(),
                four.as_fd(),
                six.as_ref().map(AsFd::as_fd),
            )?;
            let listeners = [Some(four), six].into_iter().flatten().map(Arc::new);
            let own = Self {
                _steered: steered,
                listeners: listeners.collect(),
                is_over: Arc::default(),
            };
            let open = Counter::default();
            for listener in &own.listeners {
                let (listener, sandbox) = (listener.clone(), sandbox.clone());
                let (open, is_over) = (open.clone(), own.is_over.clone());
                thread(move || serve(&listener, &sandbox, &open, &is_over))?;
            }
            Ok(own)
        };
        joined().map_err(Error::host(
            "join the network namespace's loopback to the guest's",
        ))
    }
}

impl Drop for Loopback {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        for listener in &self.listeners {
            // Wakes its thread, which then ends.
            rustix::net::shutdown(listener, rustix::net::Shutdown::Both).ok();
        }
    }
}

fn thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    threads::spawn("koya-loopback", work)
}

fn serve(listener: &TcpListener, sandbox: &Arc<Sandbox>, open: &Counter, is_over: &AtomicBool) {
    while !is_over.load(Ordering::SeqCst) {
        let Ok((client, _)) = listener.accept() else {
            // At the end, or if the host temporarily lacks resources.
            std::thread::sleep(LOOK);
            continue;
        };
        while open.get() >= CONNECTIONS {
            std::thread::sleep(LOOK);
        }
        let counted = open.add();
        let sandbox = sandbox.clone();
        let spawned = thread(move || {
            let _counted = counted;
            if let Err(error) = relay(client, &sandbox) {
                log::debug!("a connection to the guest's loopback: {error}");
            }
        });
        if let Err(error) = spawned {
            log::warn!("a connection to the guest's loopback: {error}");
        }
    }
}

fn relay(client: TcpStream, sandbox: &Sandbox) -> io::Result<()> {
    // A connection to the listener's own port was not redirected.
    let port = client.local_addr()?.port();
    let guest = match sandbox.connect(port) {
        Ok(guest) => guest,
        Err(error) => {
            // Sends a reset, as if nothing listened: an orderly close would look like a reply.
            rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO))?;
            return Err(io::Error::other(error));
        }
    };
    client.set_nodelay(true)?;
    let (from, to) = (client.try_clone()?, guest.try_clone()?);
    let back = thread(move || copy_back(guest, client))?;
    let there = copy_there(from, to);
    back.join().unwrap_or(Ok(()))?;
    there
}

fn copy_there(mut from: TcpStream, mut to: UnixStream) -> io::Result<()> {
    let copied = io::copy(&mut from, &mut to);
    to.shutdown(Shutdown::Write).ok();
    copied.map(drop)
}

fn copy_back(mut from: UnixStream, mut to: TcpStream) -> io::Result<()> {
    let copied = io::copy(&mut from, &mut to);
    to.shutdown(Shutdown::Write).ok();
    copied.map(drop)
}
