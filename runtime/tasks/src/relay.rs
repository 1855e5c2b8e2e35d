//! Threads that copy between a process's streams in the guest and their ends on the host.
//!
//! The exit of a process is published only after its output has been read ([`Relay::finish`]): clients close their ends as
//! soon as they learn of it.

use crate::blocking::BlockingStream;
use crate::listener::Listener;
use crate::logger::Logger;
use crate::machine::Streams;
use crate::preserved::Preserved;
use crate::stdio::{Io, Output};
use crate::sync::{Guard, Level, Ordered, spawn};
use anyhow::Result;
use koya::Direction;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::time::Timespec;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

/// Time without progress after which the remaining output of an ended process is given up: by the thread of a FIFO, and by
/// the wait for all of them.
const SILENCE: Duration = Duration::from_secs(3);
const SILENCE_OF_ALL: Duration = Duration::from_millis(4500);
/// Time for which background processes of an ended process may continue to write to its streams.
const LEFT_BEHIND: Duration = Duration::from_secs(2);
/// Maximum amount of the process's own output in transit to a slow reader after that, in bytes: more than the capacity of
/// pipes and sockets; and the time limit for it.
const ON_THE_WAY: u64 = 1 << 20;
const SLOW_READER: Duration = Duration::from_secs(60);
/// Polling interval for a FIFO with a slow reader: there is no event for an empty FIFO.
const LOOK: Duration = Duration::from_millis(2);
const BUFFER: usize = 64 << 10;

/// The streams of a running process.
pub(crate) struct Relay(Arc<Shared>);

/// State shared by the threads and the wait for them.
struct Shared {
    state: Ordered<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Counts data that was forwarded, and data that was read by clients.
    progress: u64,
    /// Number of running output threads.
    writing: usize,
    /// Number of output threads that have not reached the end of their stream.
    reading: usize,
    /// Our own write end of the input FIFO.
    keep: Option<OwnedFd>,
    /// Closed to stop the reading of input.
    stop: Option<UnixStream>,
    /// The guest's ends of inputs, and what of each is shut down: an output may use it, too.
    inputs: Vec<(UnixStream, Shutdown)>,
    outputs: Vec<Source>,
    /// Listening sockets until the process is started.
    listeners: Vec<Listener>,
    /// Whether the process has ended.
    has_ended: bool,
    logger: Option<Logger>,
}

/// Source of an output.
struct Source {
    /// The guest's end, which may be shut down.
    guest: UnixStream,
    /// Whether its thread is not forwarding data.
    is_idle: bool,
    /// Number of bytes received since the process's end.
    since_end: u64,
}

impl State {
    /// Records that an output thread has received `count` bytes, or waits (0).
    fn record_received(&mut self, index: usize, count: usize) {
        if let Some(source) = self.outputs.get_mut(index) {
            source.is_idle = count == 0;
            if self.has_ended {
                source.since_end += count as u64;
            }
        }
    }

    /// Shuts down streams whose data can no longer come from the process itself.
    fn shut_down_orphaned_streams(&mut self, since_end: Duration) {
        for source in &self.outputs {
            let is_dry = || rustix::io::ioctl_fionread(&source.guest).unwrap_or(0) == 0;
            if source.is_idle && is_dry()
                || source.since_end > ON_THE_WAY
                || since_end > SLOW_READER
            {
                source.guest.shutdown(Shutdown::Both).ok();
            }
        }
    }
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            state: Ordered::new(Level::Relay, State::default()),
            changed: Condvar::new(),
        }
    }
}

impl Shared {
    fn lock(&self) -> Guard<'_, State> {
        self.state.lock()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }
}

impl Io {
    /// Connects them to the process's streams, with a thread for each.
    ///
    /// # Errors
    /// If the host has no thread left.
    pub(crate) fn connect(self, streams: Streams) -> Result<Relay> {
        let shared = Arc::new(Shared::default());
        let (stop, stopped) = UnixStream::pair()?;
        shared.change(|state| {
            state.stop = Some(stop);
            state.logger = self.logger;
        });
        let (to_guest, stdout, stderr) = match (self.terminal, streams.stdin) {
            (true, Some(stream)) => (Some(stream.try_clone()?), Some(stream), None),
            (_, stdin) => (stdin, streams.stdout, streams.stderr),
        };
        let mut outputs = vec![(stdout, self.stdout), (stderr, self.stderr)];
        let mut inputs = Vec::new();
        let mut ends = Vec::new();
        let (listening, others): (Vec<_>, Vec<_>) =
            self.preserved.into_iter().partition(Preserved::is_listener);
        let mut listeners = Vec::new();
        for (preserved, connect) in listening.into_iter().zip(streams.listeners) {
            let socket = preserved.file.into();
            listeners.push(Listener::new(socket, connect, stopped.try_clone()?));
        }
        shared.change(|state| state.listeners = listeners);
        let preserved = others.into_iter().filter(Preserved::is_stream);
        for (preserved, stream) in preserved.zip(streams.extra_fds) {
            if preserved.direction != Direction::Output {
                inputs.push((preserved.file.try_clone()?, stream.try_clone()?));
                let how = match preserved.direction {
                    Direction::Both => Shutdown::Write,
                    _ => Shutdown::Both,
                };
                ends.push((stream.try_clone()?, how));
            }
            if preserved.direction != Direction::Input {
                outputs.push((Some(stream), Some(Output::Preserved(preserved))));
            }
        }
        for (from, output) in outputs {
            let Some(from) = from else { continue };
            let source = Source {
                guest: from.try_clone()?,
                is_idle: false,
                since_end: 0,
            };
            let mut state = shared.lock();
            let index = state.outputs.len();
            state.outputs.push(source);
            state.writing += 1;
            state.reading += 1;
            drop(state);
            let shared = shared.clone();
            spawn("koya-out", move || {
                relay_output(from, index, output, &shared);
                shared.change(|state| state.writing -= 1);
            })?;
        }
        if let (Some(input), Some(to_guest)) = (self.stdin, to_guest) {
            let how = match self.terminal {
                true => Shutdown::Write,
                false => Shutdown::Both,
            };
            ends.push((to_guest.try_clone()?, how));
            shared.change(|state| state.keep = input.keep);
            let (terminal, stopped) = (self.terminal, stopped.try_clone()?);
            spawn("koya-in", move || {
                relay_input(input.from, to_guest, &stopped, terminal);
            })?;
        }
        shared.change(|state| state.inputs = ends);
        for (from, to_guest) in inputs {
            let stopped = stopped.try_clone()?;
            spawn("koya-in", move || {
                relay_input(from, to_guest, &stopped, false);
            })?;
        }
        Ok(Relay(shared))
    }
}

impl Relay {
    /// Closes the input: data already written is still forwarded.
    pub(crate) fn close_stdin(&self) {
        self.0.lock().keep.take();
    }

    /// Connects clients to its listening sockets, now that the process runs.
    pub(crate) fn listen(&self) {
        let listeners = std::mem::take(&mut self.0.lock().listeners);
        for listener in listeners {
            if let Err(error) = listener.start() {
                log::warn!("nobody accepts the clients of an inherited socket: {error:#}");
            }
        }
    }

    /// Waits, after the end of the process, until its output has been read, as long as there is progress.
    pub(crate) fn finish(&self) {
        let ended = Instant::now();
        let mut state = self.0.lock();
        state.keep.take();
        state.stop.take();
        state.listeners.clear();
        // A guest that neither reads nor closes one would keep its thread forever.
        for (input, how) in state.inputs.drain(..) {
            input.shutdown(how).ok();
        }
        state.has_ended = true;
        // The process's own output is in transit; background processes that hold its streams may write forever.
        let mut last = (state.progress, ended);
        while state.writing > 0 {
            let left_behind = LEFT_BEHIND.saturating_sub(ended.elapsed());
            if state.reading > 0 && left_behind.is_zero() {
                state.shut_down_orphaned_streams(ended.elapsed());
            }
            if state.progress != last.0 {
                last = (state.progress, Instant::now());
            }
            let mut wait = SILENCE_OF_ALL.saturating_sub(last.1.elapsed());
            if wait.is_zero() {
                log::warn!("some of a process's output was not read");
                for source in &state.outputs {
                    source.guest.shutdown(Shutdown::Both).ok();
                }
                break;
            }
            if !left_behind.is_zero() {
                wait = wait.min(left_behind);
            }
            state = state.wait_timeout(&self.0.changed, wait);
        }
        state.outputs.clear();
        let logger = state.logger.take();
        drop(state);
        drop(logger);
    }
}

/// Forwards all output, then waits until it has been read, as long as there is progress. Of a FIFO without a reader it is
/// discarded: the process must not block.
fn relay_output(mut from: UnixStream, index: usize, output: Option<Output>, shared: &Shared) {
    let mut buffer = vec![0; BUFFER];
    let (writer, is_needed) = match &output {
        Some(Output::Fifo(file, _) | Output::Open(file)) => (Some(file), false),
        Some(Output::Preserved(Preserved { file, .. })) => (Some(file), true),
        None => (None, false),
    };
    loop {
        shared.change(|state| state.record_received(index, 0));
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                shared.lock().record_received(index, count);
                let Some(writer) = writer else { continue };
                match BlockingStream(writer).write_all(&buffer[..count]) {
                    Ok(()) => shared.change(|state| state.progress += 1),
                    // A pipe or socket whose reader is gone: as on the host, the process gets SIGPIPE.
                    Err(error) if is_needed || error.kind() == ErrorKind::BrokenPipe => {
                        from.shutdown(Shutdown::Both).ok();
                        break;
                    }
                    // A process continues even if its standard output can't be written.
                    Err(_) => {}
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    shared.change(|state| state.reading -= 1);
    match output {
        Some(Output::Fifo(writer, reader)) => {
            drop(reader);
            wait_until_read(&writer, shared);
        }
        // The other direction of a socket may continue.
        Some(Output::Preserved(preserved)) if preserved.direction == Direction::Both => {
            rustix::net::shutdown(&preserved.file, rustix::net::Shutdown::Write).ok();
        }
        Some(Output::Open(_) | Output::Preserved(_)) | None => {}
    }
}

/// Waits until a FIFO is empty, has no reader, or its reader makes no progress.
fn wait_until_read(writer: &File, shared: &Shared) {
    let mut last = (u64::MAX, Instant::now());
    loop {
        let Ok(waiting) = rustix::io::ioctl_fionread(writer) else {
            return;
        };
        let mut polled = [PollFd::new(writer, PollFlags::empty())];
        let now = Timespec::default();
        let gone =
            poll(&mut polled, Some(&now)).is_ok() && polled[0].revents().contains(PollFlags::ERR);
        if waiting == 0 || gone {
            return;
        }
        if waiting != last.0 {
            last = (waiting, Instant::now());
            shared.change(|state| state.progress += 1);
        } else if last.1.elapsed() > SILENCE {
            return;
        }
        std::thread::sleep(LOOK);
    }
}

fn relay_input(mut from: File, mut to: UnixStream, stop: &UnixStream, terminal: bool) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let mut watched = [
            PollFd::new(&from, PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
        ];
        match poll(&mut watched, None) {
            Err(Errno::INTR) => continue,
            Err(_) => return,
            Ok(_) if !watched[1].revents().is_empty() => return,
            Ok(_) => {}
        }
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                if to.write_all(&buffer[..count]).is_err() {
                    return;
                }
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
            Err(_) => break,
        }
    }
    // On a terminal, end of file is a typed character.
    if !terminal {
        to.shutdown(Shutdown::Write).ok();
    }
}

#[cfg(test)]
mod tests;
