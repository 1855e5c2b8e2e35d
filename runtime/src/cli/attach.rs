//! The user's streams and terminal, and a process's.

use koya::Process;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::thread::JoinHandle;

const BUFFER: usize = 64 << 10;

/// The user's three streams.
pub(super) struct UserStreams {
    pub(super) stdin: File,
    pub(super) stdout: File,
    pub(super) stderr: File,
}

impl UserStreams {
    /// This process's own.
    pub(super) fn own() -> std::io::Result<Self> {
        let copy = |fd: std::os::fd::BorrowedFd<'_>| -> std::io::Result<File> {
            Ok(File::from(fd.try_clone_to_owned()?))
        };
        Ok(Self {
            stdin: copy(std::io::stdin().as_fd())?,
            stdout: copy(std::io::stdout().as_fd())?,
            stderr: copy(std::io::stderr().as_fd())?,
        })
    }

    /// Three that somebody sent.
    pub(super) fn from_fds(fds: Vec<OwnedFd>) -> Option<Self> {
        let [stdin, stdout, stderr]: [OwnedFd; 3] = fds.try_into().ok()?;
        Some(Self {
            stdin: stdin.into(),
            stdout: stdout.into(),
            stderr: stderr.into(),
        })
    }
}

/// Threads that carry a process's output; [`finish`](Self::finish) waits for the last byte.
pub(super) struct Pumps(Vec<JoinHandle<()>>);

impl Pumps {
    /// Connects a process to the user. Input is carried by a thread that nobody waits for: it may
    /// hang in a read for ever.
    pub(super) fn start(process: &mut Process, user: UserStreams) -> Self {
        let mut pumps = Vec::new();
        let UserStreams {
            stdin,
            mut stdout,
            mut stderr,
        } = user;
        let terminal = process.stdout.is_none() && process.stderr.is_none();
        if let Some(stream) = process.stdin.take() {
            if terminal && let Ok(from) = stream.try_clone() {
                pumps.push(std::thread::spawn(move || {
                    copy(from, &mut stdout);
                }));
                std::thread::spawn(move || copy(stdin, &mut &stream));
                return Self(pumps);
            }
            std::thread::spawn(move || {
                copy(stdin, &mut &stream);
                stream.shutdown(Shutdown::Write).ok();
            });
        }
        let mut output = |stream: Option<UnixStream>, mut to: File| {
            if let Some(stream) = stream {
                pumps.push(std::thread::spawn(move || {
                    copy(&stream, &mut to);
                    // If the user's end broke, the process is told so by its own.
                    stream.shutdown(Shutdown::Both).ok();
                }));
            }
        };
        if let Ok(stdout) = stdout.try_clone() {
            output(process.stdout.take(), stdout);
        }
        if let Ok(stderr) = stderr.try_clone() {
            output(process.stderr.take(), stderr);
        }
        stdout.flush().ok();
        stderr.flush().ok();
        Self(pumps)
    }

    /// Waits until all output has arrived.
    pub(super) fn finish(self) {
        for pump in self.0 {
            pump.join().ok();
        }
    }
}

/// Until the end of either; why it ended is the other side's business.
fn copy(from: impl Read, to: &mut impl Write) {
    let mut from = BufReader::with_capacity(BUFFER, from);
    std::io::copy(&mut from, to).ok();
}

/// The user's terminal in raw mode; as it was when this is dropped.
pub(super) struct RawTerminal;

/// What the terminal was; also for the panic hook, which no drop can be relied on for.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

impl RawTerminal {
    /// Takes over the terminal that is standard input, if it is one.
    pub(super) fn enter() -> std::io::Result<Self> {
        let stdin = std::io::stdin();
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        *SAVED
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = Some(before);
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

fn restore() {
    let saved = SAVED.try_lock().ok().and_then(|mut s| s.take());
    if let Some(saved) = saved {
        tcsetattr(std::io::stdin(), OptionalActions::Now, &saved).ok();
    }
}

/// The size of the terminal that is standard input: rows and columns.
pub(super) fn terminal_size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(std::io::stdin()).ok()?;
    Some((size.ws_row, size.ws_col))
}
