//! The thread that connects to Unix sockets of the host. The event loop, which is driven by a guest, can create no sockets
//! and use no file names. It passes only the port number; the owner of the device has configured the socket for it.

use super::ports::SharedPorts;
use koya_host::threads::{self, Role};
use koya_host::walls::Filter;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Weak;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

const ROLE: Role = Role::new("koya-vsock-out")
    .guest_facing()
    .confined_by(Filter::VsockConnector);

/// A port, and the channel for the stream.
type Request = (u32, Sender<Option<UnixStream>>);

/// The thread. Dropping this ends it.
pub(super) struct Connector(Option<(Sender<Request>, JoinHandle<()>)>);

impl Connector {
    pub(super) fn start(ports: Weak<SharedPorts>) -> io::Result<Self> {
        let (sender, requests) = channel();
        let thread = threads::spawn(ROLE, move || serve(&requests, &ports))?;
        Ok(Self(Some((sender, thread))))
    }

    /// Connects to the socket of a port. `None` without a socket, or if nothing listens on it.
    pub(super) fn connect(&self, port: u32) -> Option<UnixStream> {
        let (sender, _) = self.0.as_ref()?;
        let (answer, answered) = channel();
        sender.send((port, answer)).ok()?;
        answered.recv().ok()?
    }
}

impl Drop for Connector {
    fn drop(&mut self) {
        if let Some((sender, thread)) = self.0.take() {
            drop(sender);
            if thread.join().is_err() {
                log::error!("the thread that connects vsock ports panicked");
            }
        }
    }
}

fn serve(requests: &Receiver<Request>, ports: &Weak<SharedPorts>) {
    for (port, answer) in requests {
        // Dropped before the reply: otherwise this thread could drop the last reference to the ports, and join itself.
        let path = ports.upgrade().and_then(|ports| ports.socket(port));
        let stream = path.and_then(|path| connect_at_once(&path).ok());
        answer.send(stream).ok();
    }
}

/// Connects without blocking, because the event loop waits. A listener with a full backlog refuses.
fn connect_at_once(path: &Path) -> io::Result<UnixStream> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}
