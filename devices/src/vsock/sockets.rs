//! Connects a guest's vsock device to other processes on the host through Unix sockets, with the convention
//! known from Firecracker (docs/vsock.md there):
//!
//! - **To the guest**: connect to the socket `PATH`, write `CONNECT PORT` and a newline, and read the line
//!   `OK HOST_PORT`; then the stream is connected to the guest's port. If there is no listener in the guest,
//!   the stream ends without that line.
//! - **From the guest**: a connection to port N of the host is connected to the socket `PATH_N`. If no
//!   process listens on it, the connection is refused.

use super::Ports;
use koya_host::sockets::listen_privately;
use koya_host::sync::Counter;
use koya_host::threads::{self, Role};
use koya_host::walls::Filter;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Accepts clients. Each has its own thread, with the same filter, until it has sent its connection request.
const LISTENER: Role = Role::new("koya-vsock")
    .without_signals()
    .confined_by(Filter::VsockSockets);
const CLIENT: Role = Role::new("koya-vsock-line").guest_facing();

/// Time limit for a client to send its connection request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum length of a request: `CONNECT 4294967295` and a carriage return.
const MAX_LINE: usize = 19;

/// Maximum number of clients that have not sent their request; further ones wait to be accepted.
const MAX_CLIENTS: usize = 64;

/// The sockets of one guest. Dropping this closes `PATH` and removes it.
pub struct UnixSockets {
    path: PathBuf,
    /// Identity of the socket file, which may have been replaced.
    file: (u64, u64),
    listener: Arc<UnixListener>,
    ports: Ports,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl UnixSockets {
    /// Listens at `path`, and forwards the guest's connections to the sockets beside it. Only the user of the process may
    /// connect to `path`.
    ///
    /// # Errors
    /// If `path` exists (a socket without a listener is replaced), if every user may replace files in its directory, or the
    /// error from the host.
    pub fn listen(ports: &Ports, path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        check_directory(&path)?;
        let listener = Arc::new(bind(&path)?);
        let mut sockets = Self {
            file: identity(&path)?,
            path,
            listener: listener.clone(),
            ports: ports.clone(),
            ended: Arc::default(),
            thread: None,
        };
        // From here on, dropping `sockets` undoes what was done.
        let (ports, ended) = (ports.clone(), sockets.ended.clone());
        ports.set_fallback(sockets.path.clone())?;
        let work = move || serve(&listener, &ports, &ended);
        sockets.thread = Some(threads::spawn(LISTENER, work)?);
        Ok(sockets)
    }
}

/// Device and inode.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let data = path.symlink_metadata()?;
    Ok((data.dev(), data.ino()))
}

impl Drop for UnixSockets {
    fn drop(&mut self) {
        self.ports.clear_fallback();
        self.ended.store(true, Ordering::SeqCst);
        // Wakes the thread from accept(2), whatever the path refers to by now.
        rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both).ok();
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            std::fs::remove_file(&self.path).ok();
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of the vsock sockets panicked");
        }
    }
}

/// Rejects a directory in which every user may replace the sockets of the ports, to which the guest's connections go.
fn check_directory(path: &Path) -> io::Result<()> {
    const OF_GROUP: u32 = 0o020;
    const OF_ALL: u32 = 0o002;
    const STICKY: u32 = 0o1000;
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let directory = parent.unwrap_or(Path::new("."));
    let data = directory.metadata()?;
    if data.mode() & STICKY != 0 {
        return Ok(());
    }
    let shown = directory.display();
    if data.mode() & OF_ALL != 0 {
        let text = format!(
            "every user may replace files in {shown}: choose another directory, or set its sticky bit"
        );
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    // Many users have a group of their own.
    if data.mode() & OF_GROUP != 0 && data.gid() != rustix::process::getegid().as_raw() {
        log::warn!("vsock: members of the group of {shown} may replace the sockets in it");
    }
    Ok(())
}

/// Creates a socket at `path`, a private one, since a client gets a stream to any port of the guest; replaces one left behind
/// by a killed process.
fn bind(path: &Path) -> io::Result<UnixListener> {
    match listen_privately(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let is_socket = path.symlink_metadata()?.file_type().is_socket();
            let is_left = UnixStream::connect(path)
                .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
            if !is_socket || !is_left {
                return Err(error);
            }
            std::fs::remove_file(path)?;
            listen_privately(path)
        }
        bound => bound,
    }
}

fn serve(listener: &UnixListener, ports: &Ports, ended: &AtomicBool) {
    let clients = Counter::default();
    while !ended.load(Ordering::SeqCst) {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(_) if ended.load(Ordering::SeqCst) => return,
            Err(error) => {
                // Out of descriptors, for example: continue later, without spinning.
                log::warn!("vsock: cannot accept a connection: {error}");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        while clients.get() >= MAX_CLIENTS && !ended.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let (ports, counted) = (ports.clone(), clients.add());
        let spawned = threads::spawn(CLIENT, move || {
            let _counted = counted;
            if let Err(error) = connect(stream, &ports) {
                log::debug!("vsock: a client of the host's: {error}");
            }
        });
        if let Err(error) = spawned {
            log::warn!("vsock: cannot start a thread: {error}");
        }
    }
}

/// Reads a client's request and passes its stream to the device.
fn connect(mut stream: UnixStream, ports: &Ports) -> io::Result<()> {
    let port = read_line(&mut stream).and_then(|line| {
        parse(&line).ok_or_else(|| io::Error::other(format!("{line:?} is not CONNECT PORT")))
    });
    match port {
        Ok(port) => ports.connect_stream(port, stream),
        Err(error) => {
            stream.shutdown(Shutdown::Both).ok();
            Err(error)
        }
    }
}

/// Reads a line byte by byte, since what follows it is for the guest.
fn read_line(stream: &mut UnixStream) -> io::Result<String> {
    let deadline = Instant::now() + REQUEST_TIMEOUT;
    let mut line = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        if byte == *b"\n" {
            stream.set_read_timeout(None)?;
            return String::from_utf8(line).map_err(io::Error::other);
        }
        line.push(byte[0]);
        if line.len() > MAX_LINE {
            return Err(io::Error::other("the line is too long"));
        }
    }
}

fn parse(line: &str) -> Option<u32> {
    let port = line.strip_prefix("CONNECT ")?;
    port.trim_end_matches('\r').parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    /// A directory that only this user can write to: other tests in this process set the umask to 0.
    fn directory() -> tempfile::TempDir {
        let mut builder = tempfile::Builder::new();
        let private = std::fs::Permissions::from_mode(0o700);
        builder.permissions(private).tempdir().unwrap()
    }

    #[test]
    fn lines_are_parsed() {
        assert_eq!(parse("CONNECT 52"), Some(52));
        assert_eq!(parse("CONNECT 4294967295"), Some(u32::MAX));
        for bad in [
            "",
            "CONNECT",
            "CONNECT ",
            "connect 5",
            "CONNECT 4294967296",
            "CONNECT -1",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    fn requested(ports: &Ports) -> Vec<super::super::ports::Requested> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let requested = ports.take_requested();
            if !requested.is_empty() || Instant::now() > deadline {
                return requested;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn a_client_reaches_the_port_that_it_names_and_loses_nothing() {
        let dir = directory();
        let path = dir.path().join("v.sock");
        let ports = Ports::new().unwrap();
        let sockets = UnixSockets::listen(&ports, &path).unwrap();
        // A client that sends nothing does not delay others.
        let _silent = UnixStream::connect(&path).unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"CONNECT 7\nhello").unwrap();
        let mut requested = requested(&ports);
        let one = &mut requested[0];
        assert_eq!((one.port, one.wants_reply), (7, true));
        let mut bytes = [0; 5];
        one.stream.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hello");
        let mut wrong = UnixStream::connect(&path).unwrap();
        wrong.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let mut rest = Vec::new();
        // The end of the stream, or a reset if not all of the request was read.
        wrong.read_to_end(&mut rest).ok();
        assert_eq!(rest, b"");
        drop(sockets);
        assert!(!path.exists());
    }

    #[test]
    fn a_path_that_was_replaced_is_not_removed() {
        let dir = directory();
        let path = dir.path().join("v.sock");
        let first = UnixSockets::listen(&Ports::new().unwrap(), &path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _second = UnixSockets::listen(&Ports::new().unwrap(), &path).unwrap();
        drop(first);
        assert!(UnixStream::connect(&path).is_ok());
    }

    #[test]
    fn clients_of_a_guest_that_accepts_none_are_refused() {
        let ports = Ports::new().unwrap();
        let connect = || {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ports.connect_stream(1, theirs).map(|()| ours)
        };
        let taken: Vec<_> = std::iter::from_fn(|| connect().ok()).take(10_000).collect();
        assert!(!taken.is_empty() && taken.len() < 10_000);
    }

    #[test]
    fn a_guest_reaches_the_socket_of_its_port() {
        let dir = directory();
        let path = dir.path().join("v.sock");
        let ports = Ports::new().unwrap();
        let sockets = UnixSockets::listen(&ports, &path).unwrap();
        let _listener = UnixListener::bind(dir.path().join("v.sock_52")).unwrap();
        assert!(ports.accept(52).is_some());
        assert!(ports.accept(53).is_none());
        drop(sockets);
        assert!(ports.accept(52).is_none());
    }

    #[test]
    fn only_this_user_may_connect() {
        let dir = directory();
        let path = dir.path().join("v.sock");
        let _sockets = UnixSockets::listen(&Ports::new().unwrap(), &path).unwrap();
        let mode = path.symlink_metadata().unwrap().mode();
        assert_eq!(mode & 0o777 & !0o600, 0, "{mode:o}");
        assert!(UnixStream::connect(&path).is_ok());
    }

    #[test]
    fn a_directory_in_which_every_user_may_replace_files_is_refused() {
        let dir = directory();
        let path = dir.path().join("v.sock");
        let listen = |mode| {
            std::fs::set_permissions(dir.path(), Permissions::from_mode(mode)).unwrap();
            UnixSockets::listen(&Ports::new().unwrap(), &path).map(drop)
        };
        let error = listen(0o777).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert!(error.to_string().contains("every user may replace files"));
        assert!(!path.exists());
        for mode in [0o1777, 0o755, 0o770] {
            listen(mode).unwrap_or_else(|error| panic!("{mode:o}: {error}"));
        }
    }

    #[test]
    fn a_stale_socket_is_replaced_and_others_are_not() {
        let dir = directory();
        let path = dir.path().join("v.sock");
        let ports = Ports::new().unwrap();
        drop(UnixListener::bind(&path).unwrap());
        let used = UnixSockets::listen(&ports, &path).unwrap();
        assert!(UnixSockets::listen(&ports, &path).is_err());
        drop(used);
        std::fs::write(&path, "a file").unwrap();
        assert!(UnixSockets::listen(&ports, &path).is_err());
        assert!(path.exists());
    }
}
