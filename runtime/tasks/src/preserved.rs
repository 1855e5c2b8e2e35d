//! `--preserve-fds`: descriptors that a process inherits from the caller, 3 and up. Descriptors can't be passed into a
//! guest: their data is forwarded, as for the standard streams. The process has a pipe in place of a pipe, a FIFO or a
//! file that is open in one direction, and a socket in place of a stream socket. `/dev/null` and similar devices are
//! replaced by those of the guest.

use anyhow::{Context, Result, bail};
use koya::{Direction, ExtraFd};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat, major, minor};
use rustix::net::{SocketType, sockopt};
use std::fs::File;
use std::os::fd::OwnedFd;

/// An inherited descriptor.
#[derive(Debug)]
pub struct Preserved {
    pub(crate) direction: Direction,
    pub(crate) file: File,
    /// Device of the guest that replaces it.
    device: Option<&'static str>,
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
        let device = device_of(&fd)?;
        let direction = match device {
            Some(_) => Ok(access_of(&fd)?),
            None => direction_of(&fd),
        };
        let direction = direction.with_context(|| {
            format!("descriptor {number} can't be passed into a virtual machine")
        })?;
        Ok(Self {
            direction,
            file: fd.into(),
            device,
        })
    }

    /// The descriptor that the process gets in its place.
    pub(crate) fn wanted(&self) -> ExtraFd {
        match self.device {
            Some(path) => ExtraFd::Device(path, self.direction),
            None => ExtraFd::Stream(self.direction),
        }
    }

    /// Whether its data is forwarded.
    pub(crate) fn is_stream(&self) -> bool {
        self.device.is_none()
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
        FileType::Socket if sockopt::socket_acceptconn(fd)? => {
            bail!("it is a socket that listens")
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
    use std::net::{TcpListener, UdpSocket};
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
        let others: [(OwnedFd, &str); 5] = [
            (file.into_file().into(), both),
            (File::open("/").unwrap().into(), "a directory"),
            (
                File::open("/dev/tty0")
                    .or_else(|_| File::open("/dev/ptmx"))
                    .unwrap()
                    .into(),
                "a device",
            ),
            (TcpListener::bind("127.0.0.1:0").unwrap().into(), "listens"),
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
}
