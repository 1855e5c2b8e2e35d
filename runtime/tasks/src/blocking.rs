//! Streams that other programs may have set to non-blocking mode.

use rustix::event::{PollFd, PollFlags, poll};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;

/// A stream of the user. Blocking mode is a property of the open file description, which is shared with other programs, and
/// some of them (Node.js, ssh) leave it non-blocking. This waits where a blocking stream would.
#[derive(Debug)]
pub struct BlockingStream<S>(pub S);

impl<S: AsFd> BlockingStream<S> {
    fn wait<T>(
        &mut self,
        flags: PollFlags,
        mut act: impl FnMut(&mut S) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            match act(&mut self.0) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                other => return other,
            }
            match poll(&mut [PollFd::new(&self.0, flags)], None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl<S: Read + AsFd> Read for BlockingStream<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.wait(PollFlags::IN, |stream| stream.read(buffer))
    }
}

impl<S: Write + AsFd> Write for BlockingStream<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wait(PollFlags::OUT, |stream| stream.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.wait(PollFlags::OUT, S::flush)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn what_does_not_wait_by_itself_is_waited_for() {
        let (mut reader, writer) = UnixStream::pair().unwrap();
        writer.set_nonblocking(true).unwrap();
        let reading = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all.len()
        });
        let mut writer = BlockingStream(writer);
        writer.write_all(&vec![7; 4 << 20]).unwrap();
        drop(writer);
        assert_eq!(reading.join().unwrap(), 4 << 20);
    }
}
