//! Lines of JSON over a Unix socket, with descriptors attached: the protocol between commands and the processes of their
//! sandboxes.

use crate::preserved::Preserved;
use anyhow::{Context, Result, ensure};
use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// Maximum length of a line in bytes: an exec's arguments and environment, which the guest kernel limits to 2 MiB. JSON
/// takes more bytes for some characters.
const MAX_LINE: usize = 4 << 20;
/// Maximum number of descriptors attached to a line: the three streams of a process, a mount namespace, a socket of a
/// service manager, and the inherited descriptors of the process.
const MAX_FDS: usize = 5 + Preserved::MAX;

/// The receiving side of a connection.
pub struct Wire {
    stream: UnixStream,
    buffer: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Wire {
    /// Receives from this connection.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
            fds: Vec::new(),
        }
    }

    /// The next line, and the descriptors that arrived with it; `None` at the end of the stream.
    ///
    /// # Errors
    /// If the line is invalid or too long.
    pub fn receive<T: DeserializeOwned>(&mut self) -> Result<Option<(T, Vec<OwnedFd>)>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let message = serde_json::from_slice(&line).context("not understood")?;
                return Ok(Some((message, std::mem::take(&mut self.fds))));
            }
            ensure!(self.buffer.len() < MAX_LINE, "the line is too long");
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut bytes = [0; 16 << 10];
            let received = recvmsg(
                &self.stream,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            );
            let received = match received {
                Err(rustix::io::Errno::INTR) => continue,
                other => other?,
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(sent) = message {
                    self.fds.extend(sent);
                }
            }
            ensure!(self.fds.len() <= MAX_FDS, "too many descriptors");
            if received.bytes == 0 {
                ensure!(self.buffer.is_empty(), "the line is not whole");
                return Ok(None);
            }
            self.buffer.extend_from_slice(&bytes[..received.bytes]);
        }
    }
}

/// Sends a line, with descriptors attached to its first byte.
///
/// # Errors
/// If the other side has closed the connection.
pub fn send(
    mut stream: &UnixStream,
    message: &impl Serialize,
    fds: &[BorrowedFd<'_>],
) -> Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let (first, rest) = line.split_at(1);
    let first = [IoSlice::new(first)];
    while let Err(error) = sendmsg(stream, &first, &mut control, SendFlags::NOSIGNAL) {
        if error != rustix::io::Errno::INTR {
            return Err(error.into());
        }
    }
    stream.write_all(rest)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsFd;

    #[test]
    fn lines_that_come_together_are_told_apart() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"1\n2\n").unwrap();
        let mut wire = Wire::new(ours);
        assert_eq!(wire.receive::<u32>().unwrap().unwrap().0, 1);
        assert_eq!(wire.receive::<u32>().unwrap().unwrap().0, 2);
        theirs.write_all(b"3").unwrap();
        drop(theirs);
        assert!(wire.receive::<u32>().is_err(), "half a line");
    }

    #[test]
    fn a_line_has_room_for_what_a_kernel_takes_of_arguments() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let text = "x\n".repeat(1 << 20);
        let sent = text.clone();
        let sender = std::thread::spawn(move || send(&theirs, &sent, &[]));
        let received = Wire::new(ours).receive::<String>().unwrap().unwrap().0;
        assert!(received == text);
        sender.join().unwrap().unwrap();
    }

    #[test]
    fn descriptors_come_with_their_line() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut read, write) = std::io::pipe().unwrap();
        send(&theirs, &"take", &[write.as_fd()]).unwrap();
        drop((write, theirs));
        let mut wire = Wire::new(ours);
        let (text, fds) = wire.receive::<String>().unwrap().unwrap();
        assert_eq!((text.as_str(), fds.len()), ("take", 1));
        std::fs::File::from(fds.into_iter().next().unwrap())
            .write_all(b"x")
            .unwrap();
        let mut got = String::new();
        read.read_to_string(&mut got).unwrap();
        assert_eq!(got, "x");
        assert!(wire.receive::<String>().unwrap().is_none());
    }
}
