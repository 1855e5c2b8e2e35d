//! Standard streams: vsock streams to the host, pipes or a terminal to the process, a thread for
//! each direction.
//!
//! A process gets pipes instead of sockets, since `/dev/stdout` can't be opened if it is a socket.

use crate::sys;
use koya_protocol::STREAM_PORT;
use koya_protocol::messages::ExtraStream;
use koya_protocol::messages::extra_stream::Direction;
use rustix::pipe::{PipeFlags, pipe_with};
use std::fs::{File, OpenOptions};
use std::io::{BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use vsock::VsockStream;

const BUFFER: usize = 64 << 10;

/// A stream to the host that begins with its token.
pub(crate) fn connect(token: &str) -> std::io::Result<VsockStream> {
    let mut stream = VsockStream::from(sys::connect_to_host(STREAM_PORT)?);
    stream.write_all(token.as_bytes())?;
    Ok(stream)
}

/// The process's end of its standard input.
pub(crate) fn input(token: &str) -> std::io::Result<Stdio> {
    match token.is_empty() {
        true => Ok(Stdio::null()),
        false => input_pipe(token).map(Stdio::from),
    }
}

/// The process's end of its standard output or error.
pub(crate) fn output(token: &str) -> std::io::Result<Stdio> {
    match token.is_empty() {
        true => Ok(Stdio::null()),
        false => output_pipe(token).map(Stdio::from),
    }
}

/// The process's end of another stream.
pub(crate) fn extra_fds(stream: &ExtraStream) -> std::io::Result<OwnedFd> {
    let direction = stream.direction.enum_value_or_default();
    if !stream.device.is_empty() {
        let device = OpenOptions::new()
            .read(direction != Direction::OUTPUT)
            .write(direction != Direction::INPUT)
            .open(&stream.device)?;
        return Ok(device.into());
    }
    match direction {
        Direction::INPUT => input_pipe(&stream.token),
        Direction::OUTPUT => output_pipe(&stream.token),
        Direction::BOTH => socket(&stream.token),
    }
}

fn input_pipe(token: &str) -> std::io::Result<OwnedFd> {
    let stream = connect(token)?;
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    spawn("stdin", move || {
        copy(&stream, &mut File::from(write));
        stream.shutdown(Shutdown::Both).ok();
    });
    Ok(read)
}

fn output_pipe(token: &str) -> std::io::Result<OwnedFd> {
    let mut stream = connect(token)?;
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    spawn("stdout", move || {
        copy(File::from(read), &mut stream);
        stream.shutdown(Shutdown::Both).ok();
    });
    Ok(write)
}

fn socket(token: &str) -> std::io::Result<OwnedFd> {
    let stream = connect(token)?;
    let (ours, theirs) = UnixStream::pair()?;
    let (from_host, to_process) = (stream.try_clone()?, ours.try_clone()?);
    spawn("socket-in", move || {
        copy(&from_host, &mut &to_process);
        to_process.shutdown(Shutdown::Write).ok();
    });
    spawn("socket-out", move || {
        copy(&ours, &mut &stream);
        stream.shutdown(Shutdown::Write).ok();
    });
    Ok(theirs.into())
}

/// Connects a terminal's master to the host, in both directions.
pub(crate) fn terminal(master: OwnedFd, token: &str) -> std::io::Result<()> {
    let stream = connect(token)?;
    let master = File::from(master);
    let mut keyboard = master.try_clone()?;
    let from_host = stream.try_clone()?;
    spawn("tty-in", move || copy(&from_host, &mut keyboard));
    spawn("tty-out", move || {
        let mut stream = stream;
        // Ends with EIO when the last process has closed the terminal.
        copy(&master, &mut stream);
        stream.shutdown(Shutdown::Both).ok();
    });
    Ok(())
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(128 << 10)
        .spawn(work);
    if let Err(error) = thread {
        sys::kernel_log(&format!("koya-agent: no thread for a stream: {error}"));
    }
}

/// Copies until either side ends. The reason does not matter here.
fn copy(from: impl Read, to: &mut impl Write) {
    let mut from = BufReader::with_capacity(BUFFER, from);
    std::io::copy(&mut from, to).ok();
}
