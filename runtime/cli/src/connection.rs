//! Connections to the process of a container.

use super::state::Directory;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Time limit for a container that is starting. An image may have to be unpacked first.
pub(super) const START_LIMIT: Duration = Duration::from_secs(30);

impl Directory {
    /// Connects to the control socket. If a process accepts no connections, its backlog fills up: waits for a free place, up
    /// to `limit`. If the container is still starting, waits up to `start_limit`.
    ///
    /// # Errors
    /// `TimedOut`, or `NotFound` if the container has not been started in time.
    pub(super) fn connect(
        &self,
        limit: Duration,
        start_limit: Duration,
    ) -> std::io::Result<UnixStream> {
        let started = Instant::now();
        self.socket(|path| {
            let address = SocketAddrUnix::new(path)?;
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            loop {
                let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
                match connect(&socket, &address) {
                    Ok(()) => {
                        let stream = UnixStream::from(socket);
                        stream.set_nonblocking(false)?;
                        return Ok(stream);
                    }
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) if started.elapsed() < limit => {
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    // The container is still starting.
                    Err(Errno::NOENT | Errno::CONNREFUSED)
                        if started.elapsed() < start_limit && self.is_running() =>
                    {
                        std::thread::sleep(Duration::from_millis(50));
                    }
                    Err(Errno::AGAIN) => return Err(std::io::ErrorKind::TimedOut.into()),
                    Err(error) => return Err(error.into()),
                }
            }
        })
    }
}

/// A container's socket is created when it has been started.
pub(super) fn is_starting(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::NotFound
}

pub(super) fn no_connection(name: &str, error: std::io::Error) -> anyhow::Error {
    match is_starting(&error) {
        true => {
            anyhow::anyhow!("container {name} is still starting; `koya rm --force {name}` ends it")
        }
        false => anyhow::Error::from(error).context(format!("container {name} does not answer")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::state::tests::hanging;
    use super::*;

    #[test]
    fn a_container_that_is_starting_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (directory, mut child) = hanging(dir.path(), true);
        let (short, long) = (Duration::from_millis(50), Duration::from_secs(60));
        let soon = directory.connect(long, short).unwrap_err();
        let said = no_connection("c", soon).to_string();
        assert!(said.starts_with("container c is still starting"), "{said}");
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| directory.connect(short, long).is_ok());
            std::thread::sleep(2 * short);
            let _listener = directory.listen().unwrap();
            assert!(waits.join().unwrap());
        });
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_container_that_ended_before_its_start_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (directory, mut child) = hanging(dir.path(), true);
        child.kill().unwrap();
        child.wait().unwrap();
        let started = Instant::now();
        let limit = Duration::from_secs(60);
        assert!(directory.connect(limit, limit).is_err());
        assert!(started.elapsed() < Duration::from_secs(30));
    }
}
