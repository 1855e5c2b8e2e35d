//! Terminals: a pty for a process; the master is sent to `--console-socket`, or connected to the user's own terminal.
//!
//! Programs use the guest's terminal; the pty's slave is its end on the host, in raw mode.

use anyhow::{Context, Result};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::termios::{
    OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize,
};
use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// Maximum length of a pty's name.
const MAX_NAME: usize = 4096;

pub(crate) struct Pty {
    pub(crate) master: OwnedFd,
    pub(crate) slave: OwnedFd,
    name: Vec<u8>,
}

impl Pty {
    /// Opens a pty with this number of rows and columns, if given.
    ///
    /// # Errors
    /// If the host has no pty left.
    pub(crate) fn open(size: Option<(u64, u64)>) -> Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).context("cannot make a terminal")?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let slave = ioctl_tiocgptpeer(&master, flags)?;
        let mut raw = tcgetattr(&slave)?;
        raw.make_raw();
        tcsetattr(&slave, OptionalActions::Now, &raw)?;
        if let Some((rows, columns)) = size {
            let mut wanted = tcgetwinsize(&slave)?;
            wanted.ws_row = u16::try_from(rows).unwrap_or(0);
            wanted.ws_col = u16::try_from(columns).unwrap_or(0);
            tcsetwinsize(&slave, wanted)?;
        }
        let name = ptsname(&master, Vec::new())?.into_bytes();
        Ok(Self {
            master,
            slave,
            name,
        })
    }

    /// Sends the master over a connection, attached to its name, as runc does.
    pub(crate) fn send_master(&self, to: &UnixStream) -> Result<()> {
        send_descriptor(to, &self.name, self.master.as_fd())
            .context("cannot send the terminal to the console socket")
    }
}

/// Sends a descriptor attached to its name.
pub(crate) fn send_descriptor(
    to: impl AsFd,
    name: &[u8],
    descriptor: BorrowedFd<'_>,
) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [descriptor];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let name = [IoSlice::new(name)];
    sendmsg(to, &name, &mut control, SendFlags::NOSIGNAL).map(drop)
}

/// Receives the descriptor sent by [`Pty::send_master`].
pub(crate) fn receive_master(from: &UnixStream) -> Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; MAX_NAME];
    recvmsg(
        from,
        &mut [IoSliceMut::new(&mut name)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut received = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fd = received.next().and_then(|mut fds| fds.next());
    fd.context("the container's process sent no terminal")
}

/// Makes a slave the controlling terminal of this process, a session leader: it gets SIGWINCH for new sizes.
pub(crate) fn control(slave: &OwnedFd) -> Result<()> {
    rustix::process::ioctl_tiocsctty(slave).context("cannot have the terminal")
}

/// Rows and columns.
pub(crate) fn size(of: impl AsFd) -> (u32, u32) {
    tcgetwinsize(of).map_or((0, 0), |size| (size.ws_row.into(), size.ws_col.into()))
}

/// Connects to a console socket.
pub(crate) fn connect(socket: &Path) -> Result<UnixStream> {
    let stream = UnixStream::connect(socket);
    stream.with_context(|| format!("cannot connect to the console socket {}", socket.display()))
}

/// The user's terminal, connected to a pty's master until this is dropped.
pub(crate) struct ConnectedTerminal {
    before: Option<Termios>,
    /// Disconnected when all output has been copied.
    copied: Receiver<()>,
}

/// Time limit for copying the last output.
const LAST_OUTPUT: Duration = Duration::from_secs(2);

impl ConnectedTerminal {
    /// # Errors
    /// If the host has no thread left.
    pub(crate) fn start(master: &OwnedFd) -> Result<Self> {
        let own = std::io::stdin();
        let mut before = None;
        if isatty(&own) {
            let found = tcgetattr(&own)?;
            let mut raw = found.clone();
            raw.make_raw();
            // The guest's terminal outputs newlines unchanged; this one adds carriage returns.
            raw.output_modes |= OutputModes::OPOST | OutputModes::ONLCR;
            tcsetattr(&own, OptionalActions::Now, &raw)?;
            before = Some(found);
        }
        let mut to: File = master.try_clone()?.into();
        let mut from: File = master.try_clone()?.into();
        spawn("koya-input", move || {
            copy(&mut std::io::stdin(), &mut to);
        })?;
        let (sender, copied) = channel();
        spawn("koya-output", move || {
            copy(&mut from, &mut std::io::stdout());
            drop(sender);
        })?;
        Ok(Self { before, copied })
    }

    /// Waits for the last output, after the process has ended and the slave is closed everywhere.
    pub(crate) fn finish(self) {
        self.copied.recv_timeout(LAST_OUTPUT).ok();
    }
}

impl Drop for ConnectedTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            tcsetattr(std::io::stdin(), OptionalActions::Now, before).ok();
        }
    }
}

/// Gives a pty the size of the user's terminal, if there is one.
pub(crate) fn copy_size(master: &OwnedFd) {
    if let Ok(size) = tcgetwinsize(std::io::stdin()) {
        tcsetwinsize(master, size).ok();
    }
}

fn copy(from: &mut impl Read, to: &mut impl Write) {
    let mut buffer = [0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to
            .write_all(&buffer[..count])
            .and_then(|()| to.flush())
            .is_err()
        {
            return;
        }
    }
}

pub(crate) fn spawn(name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    koya::vmm::host::threads::spawn(name, work).context("cannot start a thread")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_sent_and_has_a_size() {
        let pty = Pty::open(Some((24, 80))).unwrap();
        assert_eq!(size(&pty.slave), (24, 80));
        let (ours, theirs) = UnixStream::pair().unwrap();
        pty.send_master(&ours).unwrap();
        let master = receive_master(&theirs).unwrap();
        let mut wanted = tcgetwinsize(&master).unwrap();
        (wanted.ws_row, wanted.ws_col) = (40, 100);
        tcsetwinsize(&master, wanted).unwrap();
        assert_eq!(size(&pty.slave), (40, 100));
        File::from(master).write_all(b"\x03x").unwrap();
        let mut got = [0; 2];
        File::from(pty.slave).read_exact(&mut got).unwrap();
        assert_eq!(&got, b"\x03x", "it is raw");
    }
}
