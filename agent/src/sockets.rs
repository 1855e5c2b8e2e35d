//! Listening sockets that a process inherits from its caller on the host (sd_listen_fds(3)): in the place of each, the process
//! has one of the guest with the same name. The host asks for a connection to it for each of its clients.

use crate::{network, sys};
use anyhow::{Context, Result, anyhow, bail};
use koya_protocol::ErrorReason;
use koya_protocol::messages::ListeningSocket;
use koya_rootfs::path_of;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
    sockopt,
};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

/// Maximum number of connections that wait for the process. Further ones wait on the host.
const BACKLOG: i32 = 128;
/// Time after which a port that does not answer has too many of them.
const CONNECT_LIMIT: Duration = Duration::from_secs(1);
/// Parent of the directories in which sockets get their paths.
const ROOTS: &str = "/run/koya/sockets";

/// Where a listening socket is reached.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    Port(SocketAddr),
    Abstract(Vec<u8>),
    /// Its file, which is in no directory any more.
    File(Rc<OwnedFd>),
}

/// Makes a listening socket.
///
/// # Errors
/// If the guest can't have one of this name.
pub(crate) fn make(wanted: &ListeningSocket) -> Result<(OwnedFd, Place)> {
    if !wanted.ip.is_empty() {
        let ip: IpAddr = wanted.ip.parse()?;
        let address = SocketAddr::new(ip, u16::try_from(wanted.port)?);
        let made = at_port(address).with_context(|| format!("cannot listen at {address}"))?;
        return Ok((made, Place::Port(address)));
    }
    match wanted.name.split_first() {
        Some((0, name)) => {
            let text = String::from_utf8_lossy(name);
            let made = SocketAddrUnix::new_abstract_name(name)
                .map_err(io::Error::from)
                .and_then(|address| at_name(&address));
            let made = made.with_context(|| format!("cannot listen at @{text}"))?;
            Ok((made, Place::Abstract(name.to_vec())))
        }
        Some(_) => {
            let path = Path::new(OsStr::from_bytes(&wanted.name));
            at_path(path).with_context(|| format!("cannot listen at {}", path.display()))
        }
        None => bail!(ErrorReason::Invalid(
            "a listening socket has no name".into()
        )),
    }
}

fn new_socket(family: AddressFamily, flags: SocketFlags) -> io::Result<OwnedFd> {
    let flags = flags | SocketFlags::CLOEXEC;
    Ok(socket_with(family, SocketType::STREAM, flags, None)?)
}

fn at_port(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = new_socket(family, SocketFlags::empty())?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &address)?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

fn at_name(address: &SocketAddrUnix) -> io::Result<OwnedFd> {
    let socket = new_socket(AddressFamily::UNIX, SocketFlags::empty())?;
    bind(&socket, address)?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// A socket with this path in a root directory of its own, which is removed again: no file of the guest has its path.
fn at_path(path: &Path) -> Result<(OwnedFd, Place)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    if path.components().any(|part| part == Component::ParentDir) {
        bail!(ErrorReason::Invalid(
            "the path of a listening socket has \"..\" in it".into()
        ));
    }
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let root = Path::new(ROOTS).join(number.to_string());
    let made = bind_below(&root, path);
    fs::remove_dir_all(&root).ok();
    let (socket, file) = made?;
    Ok((socket, Place::File(Rc::new(file))))
}

/// The socket, and its file.
fn bind_below(root: &Path, path: &Path) -> Result<(OwnedFd, OwnedFd)> {
    let address = SocketAddrUnix::new(path)?;
    let inside: PathBuf = root.join(path.strip_prefix("/").unwrap_or(path));
    fs::create_dir_all(inside.parent().unwrap_or(root))?;
    let chroot = root.to_owned();
    // Root and working directory are those of all threads, but for one with a mount namespace of its own.
    let thread = std::thread::spawn(move || -> io::Result<OwnedFd> {
        sys::new_mounts()?;
        rustix::process::chroot(&chroot)?;
        rustix::process::chdir("/")?;
        at_name(&address)
    });
    let joined = thread.join();
    let socket = joined.map_err(|_| anyhow!("its thread has panicked"))??;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok((socket, open(&inside, flags, Mode::empty())?))
}

/// Connects a listening socket to a stream of the host.
///
/// # Errors
/// [`ErrorReason::InUse`] if too many connections wait for its process, [`ErrorReason::NotFound`] if that has closed it.
pub(crate) async fn connect_to_host(place: Place, token: &str) -> Result<()> {
    match place {
        Place::Port(address) => {
            let connected = timeout(CONNECT_LIMIT, TcpStream::connect(address)).await;
            let socket = connected.map_err(|_| busy())?.map_err(|_| closed())?;
            socket.set_nodelay(true)?;
            network::forward(socket, token).await
        }
        Place::Abstract(name) => {
            let address = SocketAddrUnix::new_abstract_name(&name)?;
            network::forward(connect_unix(&address)?, token).await
        }
        Place::File(file) => {
            let address = SocketAddrUnix::new(path_of(&file))?;
            network::forward(connect_unix(&address)?, token).await
        }
    }
}

fn busy() -> ErrorReason {
    ErrorReason::InUse("too many connections wait for the process".into())
}

fn closed() -> ErrorReason {
    ErrorReason::NotFound("the process has closed its socket".into())
}

/// A connection to a Unix socket, without a wait.
fn connect_unix(address: &SocketAddrUnix) -> Result<UnixStream> {
    let socket = new_socket(AddressFamily::UNIX, SocketFlags::NONBLOCK)?;
    match connect(&socket, address) {
        Ok(()) => {}
        Err(Errno::AGAIN) => bail!(busy()),
        Err(_) => bail!(closed()),
    }
    let socket = std::os::unix::net::UnixStream::from(socket);
    Ok(UnixStream::from_std(socket)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;

    fn runtime() -> tokio::runtime::Runtime {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_all().build().unwrap()
    }

    fn named(name: &[u8]) -> ListeningSocket {
        ListeningSocket {
            name: name.into(),
            ..Default::default()
        }
    }

    /// Connects by an address, and says something to the one who accepts.
    fn reach(listener: &UnixListener, address: &SocketAddrUnix) {
        let connected = runtime().block_on(async {
            let stream = connect_unix(address).unwrap().into_std().unwrap();
            stream.set_nonblocking(false).unwrap();
            stream
        });
        let (mut accepted, _) = listener.accept().unwrap();
        accepted.write_all(b"there").unwrap();
        let mut text = [0; 5];
        (&connected).read_exact(&mut text).unwrap();
        assert_eq!(&text, b"there");
    }

    #[test]
    fn a_socket_without_a_path_is_reached_by_its_name() {
        let name = format!("koya-sockets-{}", std::process::id());
        let full = [&[0][..], name.as_bytes()].concat();
        let (socket, place) = make(&named(&full)).unwrap();
        assert!(matches!(place, Place::Abstract(own) if own == name.as_bytes()));
        let address = SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap();
        let listener = UnixListener::from(socket);
        reach(&listener, &address);
        // Those that nobody accepts fill its backlog.
        let (_waiting, refused) = runtime().block_on(async {
            let mut waiting = Vec::new();
            loop {
                match connect_unix(&address) {
                    Ok(stream) => waiting.push(stream),
                    Err(error) => return (waiting, error),
                }
            }
        });
        let reason = refused.downcast_ref::<ErrorReason>();
        assert!(matches!(reason, Some(ErrorReason::InUse(_))), "{refused}");
        drop(listener);
        let refused = runtime().block_on(async { connect_unix(&address).unwrap_err() });
        let reason = refused.downcast_ref::<ErrorReason>();
        assert!(
            matches!(reason, Some(ErrorReason::NotFound(_))),
            "{refused}"
        );
    }

    #[test]
    fn a_port_is_one_of_the_loopback() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        let wanted = ListeningSocket {
            ip: "127.0.0.1".into(),
            port: port.into(),
            ..Default::default()
        };
        let refused = make(&wanted).unwrap_err().to_string();
        assert!(refused.contains("cannot listen at 127.0.0.1:"), "{refused}");
        drop(free);
        let (socket, _) = make(&wanted).unwrap();
        let own = TcpListener::from(socket).local_addr().unwrap();
        assert_eq!(own.port(), port);
        assert!(make(&named(b"")).is_err());
        assert!(make(&named(b"/run/../x")).is_err());
    }

    #[test]
    fn a_socket_has_the_path_of_the_callers() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let path = Path::new("/run/some/where.sock");
        let (socket, file) = bind_below(root.path(), path).unwrap();
        let listener = UnixListener::from(socket);
        let own = listener.local_addr().unwrap();
        assert_eq!(own.as_pathname(), Some(path));
        drop(root);
        reach(&listener, &SocketAddrUnix::new(path_of(&file)).unwrap());
    }
}
