//! Listening sockets that a process inherits (sd_listen_fds(3)): clients of the one on the host are connected to that of the
//! process in the guest.
//!
//! A client is accepted only once the guest has a connection for it. If the process ends, or has too many, further clients wait
//! in the backlog on the host, as they would without a virtual machine: whoever starts the process again finds them.

use crate::blocking::BlockingStream;
use crate::sync::spawn;
use anyhow::Result;
use koya::ErrorKind;
use koya::vmm::host::sync::{Counted, Counter};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{Shutdown, SocketFlags, accept_with, shutdown};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

/// Maximum number of concurrent connections to a socket; further clients wait.
const CONNECTIONS: usize = 256;
/// Time before the next attempt for a client that has to wait.
const LOOK: Duration = Duration::from_millis(20);
const BUFFER: usize = 64 << 10;

/// Makes a connection to a listening socket of a process.
pub(crate) type Connector = Box<dyn Fn() -> Result<UnixStream, koya::Error> + Send>;

/// A listening socket of the host, and the way to the one that is in its place.
pub(crate) struct Listener {
    socket: OwnedFd,
    connect: Connector,
    /// Its other end is closed when the process has ended.
    stopped: UnixStream,
}

impl Listener {
    pub(crate) fn new(socket: OwnedFd, connect: Connector, stopped: UnixStream) -> Self {
        Self {
            socket,
            connect,
            stopped,
        }
    }

    /// Connects clients from now on.
    ///
    /// # Errors
    /// If the host has no thread left.
    pub(crate) fn start(self) -> Result<()> {
        spawn("koya-listen", move || self.serve())
    }

    fn serve(&self) {
        let open = Counter::default();
        while self.wait_for_client() {
            if open.get() >= CONNECTIONS {
                std::thread::sleep(LOOK);
                continue;
            }
            let guest = match (self.connect)() {
                Ok(guest) => guest,
                Err(error) if matches!(error.kind(), ErrorKind::InUse | ErrorKind::TimedOut) => {
                    std::thread::sleep(LOOK);
                    continue;
                }
                Err(error) => {
                    log::debug!("clients of an inherited socket are left to others: {error}");
                    return;
                }
            };
            let client = match accept_with(&self.socket, SocketFlags::CLOEXEC) {
                Ok(client) => client,
                // It does not listen any more.
                Err(Errno::INVAL) => return,
                // Another process has accepted it, or the host temporarily lacks resources.
                Err(_) => {
                    std::thread::sleep(LOOK);
                    continue;
                }
            };
            if let Err(error) = relay(client, guest, open.add()) {
                log::warn!("a connection to an inherited socket: {error:#}");
            }
        }
    }

    /// False at the end of the process, or if the socket does not listen any more.
    fn wait_for_client(&self) -> bool {
        loop {
            let mut watched = [
                PollFd::new(&self.socket, PollFlags::IN),
                PollFd::new(&self.stopped, PollFlags::IN),
            ];
            match poll(&mut watched, None) {
                Err(Errno::INTR) => {}
                Err(_) => return false,
                Ok(_) => {
                    let is_waiting = watched[0].revents().contains(PollFlags::IN);
                    return is_waiting && watched[1].revents().is_empty();
                }
            }
        }
    }
}

/// Copies between a client and the guest, with a thread for each direction.
fn relay(client: OwnedFd, guest: UnixStream, counted: Counted) -> Result<()> {
    let (client, guest) = (File::from(client), File::from(OwnedFd::from(guest)));
    let counted = Arc::new(counted);
    let (from, to, one) = (client.try_clone()?, guest.try_clone()?, counted.clone());
    spawn("koya-listen", move || {
        copy(&from, &to);
        drop(one);
    })?;
    spawn("koya-listen", move || {
        copy(&guest, &client);
        drop(counted);
    })
}

/// Copies until the end of one, or until the other one has gone in both directions: what follows would be lost.
fn copy(from: &File, to: &File) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let mut watched = [
            PollFd::new(from, PollFlags::IN),
            PollFd::new(to, PollFlags::empty()),
        ];
        match poll(&mut watched, None) {
            Err(Errno::INTR) => continue,
            Err(_) => break,
            Ok(_) if !watched[1].revents().is_empty() => break,
            Ok(_) => {}
        }
        let count = match BlockingStream(from).read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(count) => count,
        };
        if BlockingStream(to).write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    shutdown(to, Shutdown::Write).ok();
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::time::Instant;

    /// A socket of the host, connected to that of a process at this path until the other end of the stream is closed.
    fn listen(to: &Path) -> (TcpListener, UnixStream) {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let (stop, stopped) = UnixStream::pair().unwrap();
        let to = to.to_owned();
        let connect: Connector = Box::new(move || {
            UnixStream::connect(&to).map_err(|_| koya::Error::NoProcess {
                operation: "connect",
                reason: String::new(),
            })
        });
        let own = socket.try_clone().unwrap();
        let listener = Listener::new(own.into(), connect, stopped);
        listener.start().unwrap();
        (socket, stop)
    }

    #[test]
    fn a_client_reaches_the_process_and_hears_of_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("process");
        let process = UnixListener::bind(&path).unwrap();
        let (socket, stop) = listen(&path);
        let address = socket.local_addr().unwrap();
        for _ in 0..2 {
            let mut client = TcpStream::connect(address).unwrap();
            let (mut server, _) = process.accept().unwrap();
            client.write_all(b"there").unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
            let mut text = String::new();
            server.read_to_string(&mut text).unwrap();
            server.write_all(b" and back").unwrap();
            drop(server);
            client.read_to_string(&mut text).unwrap();
            assert_eq!(text, "there and back");
        }
        // One that says nothing is closed with the process's end.
        let mut silent = TcpStream::connect(address).unwrap();
        drop(process.accept().unwrap());
        assert_eq!(silent.read(&mut [0]).unwrap(), 0);
        drop(stop);
        // From now on clients are not accepted.
        std::thread::sleep(LOOK);
        let _waiting = TcpStream::connect(address).unwrap();
        process.set_nonblocking(true).unwrap();
        std::thread::sleep(LOOK * 5);
        assert!(process.accept().is_err());
        socket.accept().unwrap();
    }

    #[test]
    fn a_client_that_the_process_does_not_take_is_left_to_others() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, _stop) = listen(&dir.path().join("none"));
        let mut client = TcpStream::connect(socket.local_addr().unwrap()).unwrap();
        let started = Instant::now();
        let (mut accepted, _) = socket.accept().unwrap();
        accepted.write_all(b"other").unwrap();
        let mut text = [0; 5];
        client.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"other");
        assert!(started.elapsed() < Duration::from_secs(10));
    }
}
