//! Streams and terminal of the user, connected to those of a process.

use super::output::complain;
use koya::Process;
use koya::vmm::host::sync::lock;
use koya::vmm::host::threads::spawn;
use koya_tasks::BlockingStream;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const BUFFER: usize = 64 << 10;

/// Silence of a stream, after the end of its process, that ends the wait for its end: background processes may hold it open
/// forever.
const SILENCE: Duration = Duration::from_secs(2);

/// Silence of a stream after which an incomplete line, such as a prompt, is passed on by those who wait for whole ones.
const QUIET: Duration = Duration::from_millis(200);

/// Time for which a stream may continue in small pieces nevertheless, while the user's side accepts them: background
/// processes may write occasionally forever.
const LINGERING: Duration = Duration::from_secs(5);

/// More than the amount of data in transit between a process and this one, in bytes: data beyond that was not written by the
/// process that has ended.
const UNDER_WAY: usize = 64 << 20;

/// The user's three streams.
pub(super) struct UserStreams {
    /// `None` if the process gets no input.
    pub(super) stdin: Option<File>,
    pub(super) stdout: Box<dyn Write + Send>,
    pub(super) stderr: Box<dyn Write + Send>,
}

impl UserStreams {
    /// The streams of this process; input only if `interactive`.
    pub(super) fn own(interactive: bool) -> std::io::Result<Self> {
        let copy = |fd: BorrowedFd<'_>| -> std::io::Result<File> {
            Ok(File::from(fd.try_clone_to_owned()?))
        };
        let stdin = interactive.then(|| copy(std::io::stdin().as_fd()));
        Ok(Self {
            stdin: stdin.transpose()?,
            stdout: Box::new(BlockingStream(copy(std::io::stdout().as_fd())?)),
            stderr: Box::new(BlockingStream(copy(std::io::stderr().as_fd())?)),
        })
    }
}

/// The host's ends of a process's streams.
pub(super) enum ProcessStreams {
    /// One stream for both directions.
    Terminal(UnixStream),
    /// Up to three.
    Pipes {
        stdin: Option<UnixStream>,
        stdout: UnixStream,
        stderr: UnixStream,
    },
}

impl ProcessStreams {
    /// Takes the streams of a process; `None` if it has none.
    pub(super) fn take(process: &mut Process) -> Option<Self> {
        let stdin = process.stdin.take();
        match (process.stdout.take(), process.stderr.take()) {
            (Some(stdout), Some(stderr)) => Some(Self::Pipes {
                stdin,
                stdout,
                stderr,
            }),
            _ => stdin.map(Self::Terminal),
        }
    }

    /// Takes the input of a process without a terminal, whose end is then up to the caller.
    pub(super) fn take_stdin(&mut self) -> Option<UnixStream> {
        match self {
            Self::Terminal(_) => None,
            Self::Pipes { stdin, .. } => stdin.take(),
        }
    }

    /// The descriptors, in the order for [`from_fds`](Self::from_fds).
    pub(super) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::Terminal(stream) => vec![stream.as_fd()],
            Self::Pipes {
                stdin,
                stdout,
                stderr,
            } => {
                let both = [stdout.as_fd(), stderr.as_fd()];
                both.into_iter()
                    .chain(stdin.as_ref().map(AsFd::as_fd))
                    .collect()
            }
        }
    }

    /// Streams from descriptors sent by the sandbox's process: one, two or three.
    pub(super) fn from_fds(fds: Vec<OwnedFd>) -> Option<Self> {
        let mut fds = fds.into_iter().map(UnixStream::from);
        let first = fds.next()?;
        let Some(stderr) = fds.next() else {
            return Some(Self::Terminal(first));
        };
        Some(Self::Pipes {
            stdin: fds.next(),
            stdout: first,
            stderr,
        })
    }
}

/// Threads that copy a process's output.
pub(super) struct Pumps {
    /// Each returns whether all of its stream was written; a closed reader on the user's side does not count as a failure.
    threads: Vec<JoinHandle<bool>>,
    /// Closed when the process has ended.
    alive: std::io::PipeWriter,
}

impl Pumps {
    /// Connects a process to the user. Input is copied by a detached thread, since it may block in a read forever.
    ///
    /// # Errors
    /// If the host has no more threads or descriptors.
    pub(super) fn start(streams: ProcessStreams, user: UserStreams) -> std::io::Result<Self> {
        let (ended, alive) = std::io::pipe()?;
        let ended = Arc::new(ended);
        let mut threads = Vec::new();
        let mut output = |from: UnixStream, mut to: Box<dyn Write + Send>| {
            let ended = ended.clone();
            threads.push(spawn("koya-output", move || {
                let pumped = pump(&from, &mut to, ended.as_fd());
                // If the user's end is broken, the process's end is closed as well.
                from.shutdown(Shutdown::Both).ok();
                match pumped {
                    // A reader that closes its end is not an error.
                    Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                        complain!("koya: cannot write the container's output: {error}");
                        false
                    }
                    _ => true,
                }
            })?);
            std::io::Result::Ok(())
        };
        let input = match streams {
            ProcessStreams::Terminal(stream) => {
                output(stream.try_clone()?, user.stdout)?;
                user.stdin.map(|stdin| (stdin, stream, false))
            }
            ProcessStreams::Pipes {
                stdin,
                stdout,
                stderr,
            } => {
                output(stdout, user.stdout)?;
                output(stderr, user.stderr)?;
                // Without input from the user, the stream is closed here: end of file.
                stdin.and_then(|stream| Some((user.stdin?, stream, true)))
            }
        };
        if let Some((from, to, ends)) = input {
            spawn("koya-input", move || {
                std::io::copy(&mut BlockingStream(from), &mut &to).ok();
                if ends {
                    to.shutdown(Shutdown::Write).ok();
                }
            })?;
        }
        Ok(Self { threads, alive })
    }

    /// Waits after the end of the process until all of its output has arrived. False if some of it could not be
    /// written, on a full disk, say.
    pub(super) fn finish(self) -> bool {
        drop(self.alive);
        let threads = self.threads.into_iter();
        let written: Vec<bool> = threads.map(|t| t.join().unwrap_or(false)).collect();
        written.into_iter().all(|written| written)
    }
}

/// Copies until the end of `from`, or until `ended` is closed and the data in transit has arrived. `to` is flushed whenever
/// `from` pauses.
///
/// # Errors
/// The error from `to`.
fn pump(mut from: &UnixStream, to: &mut impl Write, ended: BorrowedFd<'_>) -> std::io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    let mut over = false;
    // Since the end: bytes, and time spent waiting for `from` and not for the user.
    let (mut after, mut waited) = (0, Duration::ZERO);
    // Whether `to` may hold an incomplete line.
    let mut holds = false;
    loop {
        let began = Instant::now();
        let limit = match (over, holds) {
            (true, _) => Some(SILENCE),
            (false, true) => Some(QUIET),
            (false, false) => None,
        };
        let timeout = limit.map(|limit| Timespec {
            tv_sec: limit.as_secs() as i64,
            tv_nsec: limit.subsec_nanos().into(),
        });
        let mut fds = [
            PollFd::new(from, PollFlags::IN),
            PollFd::from_borrowed_fd(ended, PollFlags::empty()),
        ];
        let watched = if over { &mut fds[..1] } else { &mut fds[..] };
        match poll(watched, timeout.as_ref()) {
            Ok(0) if over => return Ok(()),
            Ok(0) => {
                to.flush()?;
                holds = false;
                continue;
            }
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return Ok(()),
        }
        over |= !fds[1].revents().is_empty();
        if fds[0].revents().is_empty() {
            continue;
        }
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                if over {
                    waited += began.elapsed();
                    after += count;
                }
                to.write_all(&buffer[..count])?;
                holds = true;
                // A full buffer means that more data was waiting.
                let is_late = waited > LINGERING && count < BUFFER;
                if is_late || after > UNDER_WAY {
                    return Ok(());
                }
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => return Ok(()),
        }
    }
}

/// The user's terminal in raw mode; restored on drop.
pub(super) struct RawTerminal;

/// The original settings of the terminal; also for the panic hook, since a drop is not guaranteed.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

impl RawTerminal {
    /// Switches the terminal on standard input to raw mode, if it is one.
    pub(super) fn enter() -> std::io::Result<Self> {
        let stdin = std::io::stdin();
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        *lock(&SAVED) = Some(before);
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            previous(info);
        }));
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Self)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Restores the terminal.
pub(super) fn restore() {
    let saved = SAVED.try_lock().ok().and_then(|mut s| s.take());
    if let Some(saved) = saved {
        tcsetattr(std::io::stdin(), OptionalActions::Now, &saved).ok();
    }
}

/// Width of the terminal on standard output, if it is one.
pub(super) fn output_columns() -> Option<usize> {
    let columns = tcgetwinsize(std::io::stdout()).ok()?.ws_col;
    (columns > 0).then_some(columns.into())
}

/// Size of the user's terminal on any of the streams: rows and columns.
pub(super) fn terminal_size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(std::io::stdin())
        .or_else(|_| tcgetwinsize(std::io::stdout()))
        .or_else(|_| tcgetwinsize(std::io::stderr()));
    let size = size.ok()?;
    Some((size.ws_row, size.ws_col))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pumps from a process's standard output to `stdout`, and the process's end.
    fn output_to(stdout: Box<dyn Write + Send>) -> (Pumps, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let streams = ProcessStreams::Pipes {
            stdin: None,
            stdout: ours,
            stderr: UnixStream::pair().unwrap().0,
        };
        let user = UserStreams {
            stdin: None,
            stdout,
            stderr: Box::new(std::io::sink()),
        };
        (Pumps::start(streams, user).unwrap(), theirs)
    }

    #[test]
    fn output_that_nobody_ends_is_not_waited_for() {
        let (mut read, write) = std::io::pipe().unwrap();
        let (pumps, mut theirs) = output_to(Box::new(write));
        theirs.write_all(b"last words").unwrap();
        // A background process still has the other end.
        assert!(pumps.finish());
        let mut got = String::new();
        read.read_to_string(&mut got).unwrap();
        assert_eq!(got, "last words");
    }

    /// moby/moby 18497.
    #[test]
    fn a_prompt_is_flushed_while_its_process_waits() {
        struct Told(std::sync::mpsc::Sender<Option<Vec<u8>>>);
        impl Write for Told {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.send(Some(bytes.to_vec())).ok();
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                self.0.send(None).ok();
                Ok(())
            }
        }
        let (tell, told) = std::sync::mpsc::channel();
        let (pumps, mut theirs) = output_to(Box::new(Told(tell)));
        theirs.write_all(b"prompt> ").unwrap();
        assert_eq!(told.recv().unwrap(), Some(b"prompt> ".to_vec()));
        assert_eq!(told.recv().unwrap(), None);
        drop(theirs);
        assert!(pumps.finish());
    }

    /// moby/moby 33039, ddev/ddev 732.
    #[test]
    fn output_that_goes_on_for_ever_is_not_waited_for() {
        struct Counted(std::sync::mpsc::Sender<usize>);
        impl Write for Counted {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.send(bytes.len()).ok();
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        for (piece, pause) in [(1 << 20, Duration::ZERO), (2, Duration::from_millis(200))] {
            let (count, counts) = std::sync::mpsc::channel();
            let (pumps, mut theirs) = output_to(Box::new(Counted(count)));
            let writer = std::thread::spawn(move || {
                let piece = vec![b'y'; piece];
                while theirs.write_all(&piece).is_ok() {
                    std::thread::sleep(pause);
                }
            });
            counts.recv().unwrap();
            assert!(pumps.finish());
            // Its stream is shut down, so that it notices.
            writer.join().unwrap();
        }
    }

    #[test]
    fn output_that_is_lost_is_told_unless_its_reader_went() {
        let finish = |stdout: Box<dyn Write + Send>| {
            let (pumps, mut theirs) = output_to(stdout);
            theirs.write_all(b"words").unwrap();
            drop(theirs);
            pumps.finish()
        };
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert!(!finish(Box::new(full)));
        let (read, write) = std::io::pipe().unwrap();
        drop(read);
        assert!(finish(Box::new(write)));
    }

    /// containers/buildah 785, travis-ci/travis-ci 4704; containerd/rust-extensions 353.
    #[test]
    fn streams_that_do_not_block_lose_nothing() {
        let bytes: Vec<u8> = (0..600_000u32).map(|n| (n % 251) as u8).collect();
        let (input, mut typed) = std::io::pipe().unwrap();
        let (mut shown, output) = std::io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&input, true).unwrap();
        rustix::io::ioctl_fionbio(&output, true).unwrap();
        let [(stdin, mut read), (stdout, mut wrote)] =
            [(); 2].map(|()| UnixStream::pair().unwrap());
        let streams = ProcessStreams::Pipes {
            stdin: Some(stdin),
            stdout,
            stderr: UnixStream::pair().unwrap().0,
        };
        let user = UserStreams {
            stdin: Some(OwnedFd::from(input).into()),
            stdout: Box::new(BlockingStream(output)),
            stderr: Box::new(std::io::sink()),
        };
        let pumps = Pumps::start(streams, user).unwrap();
        let slow = std::time::Duration::from_millis(50);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(slow);
                typed.write_all(&bytes).unwrap();
                drop(typed);
            });
            scope.spawn(|| {
                wrote.write_all(&bytes).unwrap();
                drop(wrote);
            });
            let shown = scope.spawn(move || {
                std::thread::sleep(slow);
                let mut got = Vec::new();
                shown.read_to_end(&mut got).unwrap();
                got
            });
            let mut got = Vec::new();
            read.read_to_end(&mut got).unwrap();
            assert!(got == bytes, "{} bytes of input", got.len());
            assert!(pumps.finish());
            let got = shown.join().unwrap();
            assert!(got == bytes, "{} bytes of output", got.len());
        });
    }
}
