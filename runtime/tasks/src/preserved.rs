//! `--preserve-fds`: descriptors that a process inherits from the caller, 3 and up. Descriptors can't be passed into a
//! guest: their data is forwarded, as for the standard streams. The process has a pipe in place of a pipe, a FIFO or a file
//! that is open in one direction, and a socket in place of a stream socket.

use anyhow::{Context, Result, bail};
use koya::Direction;
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::net::{SocketType, sockopt};
use std::fs::File;
use std::os::fd::OwnedFd;

/// An inherited descriptor.
#[derive(Debug)]
pub struct Preserved {
    pub(crate) direction: Direction,
    pub(crate) file: File,
}

impl Preserved {
    /// Maximum number for a process: more than any known caller passes.
    pub const MAX: usize = 64;

    /// Takes over the caller's descriptor with this number.
    ///
    /// # Errors
    /// If its data can't be forwarded.
    pub fn new(number: usize, fd: OwnedFd) -> Result<Self> {
        let direction = direction_of(&fd).with_context(|| {
            format!("descriptor {number} can't be passed into a virtual machine")
        })?;
        let file = fd.into();
        Ok(Self { direction, file })
    }
}

fn direction_of(fd: &OwnedFd) -> Result<Direction> {
    match FileType::from_raw_mode(fstat(fd)?.st_mode) {
        kind @ (FileType::Fifo | FileType::RegularFile) => {
            match (fcntl_getfl(fd)? & OFlags::RWMODE, kind) {
                (OFlags::RDONLY, _) => Ok(Direction::Input),
                (OFlags::WRONLY, _) => Ok(Direction::Output),
                (_, FileType::Fifo) => bail!("it is a FIFO that is open both ways"),
                _ => bail!("it is a regular file that is open both ways"),
            }
        }
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
            (File::open("/dev/null").unwrap().into(), "a device"),
            (TcpListener::bind("127.0.0.1:0").unwrap().into(), "listens"),
            (UdpSocket::bind("127.0.0.1:0").unwrap().into(), "no stream"),
        ];
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
