//! Unix sockets that only one user may connect to, and paths of sockets that are longer than an address may be.

use crate::descriptors;
use rustix::fs::{CWD, Mode, OFlags, fchmod, openat};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;

/// Maximum length of the path in a socket's address: unix(7).
const MAX_PATH: usize = 107;

/// Maximum number of clients that wait to be accepted: as many as the host permits (`net.core.somaxconn`).
const BACKLOG: i32 = i32::MAX;

/// Listens on a new socket at `path` that only the user of this process may connect to, whatever the umask is.
///
/// # Errors
/// If something exists at `path`, or the error from the host.
pub fn listen_privately(path: &Path) -> io::Result<UnixListener> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    // The file gets the socket's mode (and the umask) when it is created: there is no time at which others may connect, as
    // there would be with chmod(2), which could also follow a link put in its place.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Calls `act` with the path of a socket, or with another path to it if that one is too long for an address.
///
/// # Errors
/// If the directory of a long path can't be opened, or the error of `act`.
pub fn with_short_path<T>(path: &Path, act: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    if path.as_os_str().len() <= MAX_PATH {
        return act(path);
    }
    let parts = path.parent().zip(path.file_name());
    let (directory, name) = parts.ok_or(io::ErrorKind::InvalidFilename)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = openat(CWD, directory, flags, Mode::empty())?;
    act(&Path::new(&descriptors::path(directory.as_fd())).join(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_private_socket_is_its_users_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let _listener = listen_privately(&path).unwrap();
        let mode = fs::symlink_metadata(&path).unwrap().mode();
        assert_eq!(mode & 0o777 & !0o600, 0, "{mode:o}");
        UnixStream::connect(&path).unwrap();
        let again = listen_privately(&path).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn a_socket_may_lie_deep() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("x".repeat(200));
        fs::create_dir(&deep).unwrap();
        for path in [dir.path().join("socket"), deep.join("socket")] {
            let _listener = with_short_path(&path, listen_privately).unwrap();
            with_short_path(&path, |path| UnixStream::connect(path)).unwrap();
            assert!(path.exists());
        }
        let missing = dir.path().join("y".repeat(200)).join("socket");
        let error = with_short_path(&missing, listen_privately).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
