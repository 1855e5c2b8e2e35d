//! `--preserve-fds`: descriptors that a process inherits from the caller, 3 and up. Descriptors can't be passed into a
//! guest: their data is forwarded, as for the standard streams. The process has a pipe in place of a pipe, a FIFO or a
//! file that is open in one direction, and a socket in place of a stream socket. `/dev/null` and similar devices are
//! replaced by those of the guest, and the process has a listening socket of the guest in place of one of the host.

use anyhow::{Context, Result, bail};
use koya::{Direction, ExtraFd, SocketName};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat, major, minor};
use rustix::net::{AddressFamily, SocketType, sockopt};
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixListener;

/// An inherited descriptor.
#[derive(Debug)]
pub struct Preserved {
    pub(crate) direction: Direction,
    pub(crate) file: File,
    replacement: Replacement,
}

/// What the process has in its place.
#[derive(Debug)]
enum Replacement {
    /// A pipe or socket whose data is forwarded.
    Stream,
    /// A device of the guest.
    Device(&'static str),
    /// A listening socket of the guest whose connections are forwarded.
    Listener(SocketName),
}

/// Devices that are the same in every kernel, by their minor numbers.
const DEVICES: [(u32, &str); 5] = [
    (3, "/dev/null"),
    (5, "/dev/zero"),
    (7, "/dev/full"),
    (8, "/dev/random"),
    (9, "/dev/urandom"),
];
/// Major number of these devices.
const MEMORY: u32 = 1;

impl Preserved {
    /// Maximum number for a process: more than any known caller passes.
    pub const MAX: usize = 64;

    /// Takes over the caller's descriptor with this number.
    ///
    /// # Errors
    /// If its data can't be forwarded.
    pub fn new(number: usize, fd: OwnedFd) -> Result<Self> {
        let refused = || format!("descriptor {number} can't be passed into a virtual machine");
        let (replacement, direction) = if let Some(device) = device_of(&fd)? {
            (Replacement::Device(device), access_of(&fd)?)
        } else if is_listening(&fd)? {
            let name = guests_name(&fd).with_context(refused)?;
            (Replacement::Listener(name), Direction::Both)
        } else {
            (
                Replacement::Stream,
                direction_of(&fd).with_context(refused)?,
            )
        };
        Ok(Self {
            direction,
            file: fd.into(),
            replacement,
        })
    }

    /// The descriptor that the process gets in its place.
    pub(crate) fn wanted(&self) -> ExtraFd {
        match &self.replacement {
            Replacement::Stream => ExtraFd::Stream(self.direction),
            Replacement::Device(path) => ExtraFd::Device(path, self.direction),
            Replacement::Listener(name) => ExtraFd::Listener(name.clone()),
        }
    }

    /// Whether its data is forwarded.
    pub(crate) fn is_stream(&self) -> bool {
        matches!(self.replacement, Replacement::Stream)
    }

    /// Whether its connections are forwarded.
    pub(crate) fn is_listener(&self) -> bool {
        matches!(self.replacement, Replacement::Listener(_))
    }
}

/// Whether this is a stream socket that listens.
fn is_listening(fd: &OwnedFd) -> Result<bool> {
    Ok(
        FileType::from_raw_mode(fstat(fd)?.st_mode) == FileType::Socket
            && sockopt::socket_type(fd)? == SocketType::STREAM
            && sockopt::socket_acceptconn(fd)?,
    )
}

/// The name of the guest's socket in place of a listening one: the same port of its loopback, or the same path.
fn guests_name(fd: &OwnedFd) -> Result<SocketName> {
    let own = fd.try_clone()?;
    match sockopt::socket_domain(fd)? {
        AddressFamily::UNIX => {
            let address = UnixListener::from(own).local_addr()?;
            let path = address
                .as_pathname()
                .map(|path| path.as_os_str().as_bytes());
            match (path, address.as_abstract_name()) {
                (Some(path), _) => Ok(SocketName::Unix(path.to_vec())),
                (None, Some(name)) => Ok(SocketName::Unix([&[0][..], name].concat())),
                (None, None) => bail!("it is a socket that listens without a name"),
            }
        }
        AddressFamily::INET | AddressFamily::INET6 => {
            let address = TcpListener::from(own).local_addr()?;
            let loopback: IpAddr = match address {
                SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            };
            let guests = SocketAddr::new(loopback, address.port());
            Ok(SocketName::Tcp(guests))
        }
        _ => bail!("it is a socket that listens, and neither of TCP nor of the Unix domain"),
    }
}

fn device_of(fd: &OwnedFd) -> Result<Option<&'static str>> {
    let found = fstat(fd)?;
    let (kind, number) = (FileType::from_raw_mode(found.st_mode), found.st_rdev);
    if kind != FileType::CharacterDevice || major(number) != MEMORY {
        return Ok(None);
    }
    let mut all = DEVICES.iter();
    Ok(all.find_map(|(own, path)| (*own == minor(number)).then_some(*path)))
}

/// Access mode of an open descriptor.
fn access_of(fd: &OwnedFd) -> Result<Direction> {
    Ok(match fcntl_getfl(fd)? & OFlags::RWMODE {
        OFlags::RDONLY => Direction::Input,
        OFlags::WRONLY => Direction::Output,
        _ => Direction::Both,
    })
}

fn direction_of(fd: &OwnedFd) -> Result<Direction> {
    match FileType::from_raw_mode(fstat(fd)?.st_mode) {
        kind @ (FileType::Fifo | FileType::RegularFile) => match (access_of(fd)?, kind) {
            (Direction::Both, FileType::Fifo) => bail!("it is a FIFO that is open both ways"),
            (Direction::Both, _) => bail!("it is a regular file that is open both ways"),
            (one_way, _) => Ok(one_way),
        },
        FileType::Socket if sockopt::socket_type(fd)? != SocketType::STREAM => {
            bail!("it is a socket, but no stream")
        }
        FileType::Socket => Ok(Direction::Both),
        FileType::Directory => bail!("it is a directory"),
        FileType::CharacterDevice | FileType::BlockDevice => bail!("it is a device"),
        _ => bail!("it is no pipe, FIFO or stream socket"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::os::unix::net::UnixStream;

    fn of(fd: impl Into<OwnedFd>) -> Result<Direction, String> {
        let preserved = Preserved::new(5, fd.into());
        preserved
            .map(|preserved| preserved.direction)
            .map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn what_can_be_passed_on_is_told_from_what_cannot() {
        let (read, write) = std::io::pipe().unwrap();
        assert_eq!(of(read), Ok(Direction::Input));
        assert_eq!(of(write), Ok(Direction::Output));
        assert_eq!(of(UnixStream::pair().unwrap().0), Ok(Direction::Both));
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(of(File::open(&file).unwrap()), Ok(Direction::Input));
        assert_eq!(of(File::create(&file).unwrap()), Ok(Direction::Output));
        let both = "a regular file that is open both ways";
        let others: [(OwnedFd, &str); 4] = [
            (file.into_file().into(), both),
            (File::open("/").unwrap().into(), "a directory"),
            (
                File::open("/dev/tty0")
                    .or_else(|_| File::open("/dev/ptmx"))
                    .unwrap()
                    .into(),
                "a device",
            ),
            (UdpSocket::bind("127.0.0.1:0").unwrap().into(), "no stream"),
        ];
        let (out, both) = (
            File::options().write(true).open("/dev/null"),
            File::options().read(true).write(true).open("/dev/zero"),
        );
        for (file, wanted) in [
            (
                File::open("/dev/null"),
                ExtraFd::Device("/dev/null", Direction::Input),
            ),
            (out, ExtraFd::Device("/dev/null", Direction::Output)),
            (both, ExtraFd::Device("/dev/zero", Direction::Both)),
        ] {
            let preserved = Preserved::new(3, file.unwrap().into()).unwrap();
            assert_eq!(preserved.wanted(), wanted);
            assert!(!preserved.is_stream());
        }
        for (fd, what) in others {
            let refused = of(fd).unwrap_err();
            assert!(
                refused.starts_with("descriptor 5 can't be passed"),
                "{refused}"
            );
            assert!(refused.contains(what), "{refused}");
        }
    }

    #[test]
    fn a_listening_socket_has_the_name_of_the_hosts() {
        let wanted = |fd: OwnedFd| {
            let preserved = Preserved::new(3, fd).unwrap();
            assert!(preserved.is_listener() && !preserved.is_stream());
            preserved.wanted()
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let unix = UnixListener::bind(&path).unwrap();
        let name = path.as_os_str().as_bytes().to_vec();
        assert_eq!(
            wanted(unix.into()),
            ExtraFd::Listener(SocketName::Unix(name))
        );
        let own = format!("koya-preserved-{}", std::process::id());
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&own).unwrap();
        let abstract_one = UnixListener::bind_addr(&address).unwrap();
        let name = [&[0][..], own.as_bytes()].concat();
        assert_eq!(
            wanted(abstract_one.into()),
            ExtraFd::Listener(SocketName::Unix(name))
        );
        // The guest's is one of its loopback, where it is not reached from elsewhere.
        let all = TcpListener::bind("0.0.0.0:0").unwrap();
        let port = all.local_addr().unwrap().port();
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        assert_eq!(
            wanted(all.into()),
            ExtraFd::Listener(SocketName::Tcp(loopback))
        );
    }
}
