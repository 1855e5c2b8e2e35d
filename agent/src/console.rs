//! Terminal of a container: the socket over which libcontainer sends the master.

use crate::sys;
use anyhow::{Context, Result};
use koya_protocol::messages::Stdio;
use rustix::cmsg_space;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::termios::{OptionalActions, OutputModes, Winsize, tcgetattr, tcsetattr, tcsetwinsize};
use serde::{Deserialize, Serialize};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// A socket that receives one terminal.
pub(crate) struct ConsoleSocket {
    path: PathBuf,
    listener: UnixListener,
}

impl ConsoleSocket {
    pub(crate) fn bind(path: PathBuf) -> Result<Self> {
        std::fs::remove_file(&path).ok();
        let listener = UnixListener::bind(&path).context("cannot bind the console socket")?;
        Ok(Self { path, listener })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Receives the master. libcontainer connected before it returned, so this does not block.
    pub(crate) fn receive(self) -> Result<OwnedFd> {
        self.listener.set_nonblocking(true)?;
        let (socket, _) = self
            .listener
            .accept()
            .context("the container sent no terminal")?;
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0; 64];
        sys::retried(|| {
            recvmsg(
                &socket,
                &mut [IoSliceMut::new(&mut byte)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            )
        })?;
        control
            .drain()
            .find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                _ => None,
            })
            .context("the container sent no terminal")
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        std::fs::remove_file(&self.path).ok();
    }
}

/// Settings of a terminal, applied before its program starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settings {
    rows: u32,
    columns: u32,
    keep_newlines: bool,
}

impl Settings {
    pub(crate) fn of(stdio: &Stdio) -> Self {
        Self {
            rows: stdio.rows,
            columns: stdio.columns,
            keep_newlines: stdio.keep_newlines,
        }
    }

    /// Applies them to either end of a terminal.
    pub(crate) fn apply(&self, terminal: impl AsFd) -> Result<()> {
        resize(&terminal, self.rows, self.columns)?;
        if self.keep_newlines {
            keep_newlines(&terminal)?;
        }
        Ok(())
    }
}

/// Sets the size of a terminal; a size of zero leaves it unchanged.
pub(crate) fn resize(master: impl AsFd, rows: u32, columns: u32) -> Result<()> {
    if rows == 0 || columns == 0 {
        return Ok(());
    }
    let size = Winsize {
        ws_row: u16::try_from(rows)?,
        ws_col: u16::try_from(columns)?,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(master, size)?;
    Ok(())
}

/// Makes a terminal output newlines unchanged (without ONLCR), as runc does in the foreground.
fn keep_newlines(master: impl AsFd) -> Result<()> {
    let mut attributes = tcgetattr(&master)?;
    attributes.output_modes -= OutputModes::ONLCR;
    tcsetattr(&master, OptionalActions::Now, &attributes)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
    use rustix::termios::tcgetwinsize;
    use std::fs::File;
    use std::io::{Read, Write};

    #[test]
    fn a_terminal_has_the_size_and_the_newlines_that_are_asked_for() -> Result<()> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        unlockpt(&master)?;
        let mut slave = File::from(ioctl_tiocgptpeer(&master, flags)?);
        let mut master = File::from(master);
        let mut read = [0; 3];
        slave.write_all(b"a\n")?;
        master.read_exact(&mut read)?;
        assert_eq!(&read, b"a\r\n");
        let settings = Settings {
            rows: 33,
            columns: 99,
            keep_newlines: true,
        };
        settings.apply(&slave)?;
        slave.write_all(b"b\nc")?;
        master.read_exact(&mut read)?;
        assert_eq!(&read, b"b\nc");
        let size = tcgetwinsize(&master)?;
        assert_eq!((size.ws_row, size.ws_col), (33, 99));
        Ok(())
    }
}
