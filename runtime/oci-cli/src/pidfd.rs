//! `--pidfd-socket`: sends a pidfd of the process that represents a container's process to a listener, which can signal and
//! await it even if the PID is reused.

use crate::console::send_descriptor;
use anyhow::{Context, Result};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// The name that runc sends with it.
const NAME: &[u8] = b"pidfd";

/// A connection to such a socket.
pub(crate) struct Receiver(UnixStream);

impl Receiver {
    /// Connects, if requested.
    ///
    /// # Errors
    /// If nothing listens on the socket.
    pub(crate) fn connect(socket: Option<&Path>) -> Result<Option<Self>> {
        let connect = |socket: &Path| {
            let stream = UnixStream::connect(socket);
            stream
                .with_context(|| format!("cannot connect to the pidfd socket {}", socket.display()))
        };
        Ok(socket.map(connect).transpose()?.map(Self))
    }

    /// Sends a pidfd of a child process, or of this process.
    pub(crate) fn send(self, pid: u32) -> Result<()> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let process = pidfd_open(pid.context("no process")?, PidfdFlags::empty())?;
        send_descriptor(&self.0, NAME, process.as_fd())
            .context("cannot send a descriptor to the pidfd socket")
    }
}
