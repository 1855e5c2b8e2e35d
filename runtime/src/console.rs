//! The guest's console: the end of the output is kept for reports, and followers receive all of it.

use crate::sync::{lock, wait};
use koya_vmm::guest_text;
use koya_vmm::host::threads;
use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// Size of the kept output in bytes.
const KEPT: usize = 64 << 10;

#[derive(Default)]
struct State {
    last: VecDeque<u8>,
    followers: Vec<Follower>,
}

/// A writer with its own thread: a slow writer must not delay the guest, whose vCPU thread writes to the console.
struct Follower(Arc<Queue>);

#[derive(Default)]
struct Queue {
    pending: Mutex<Pending>,
    changed: Condvar,
}

#[derive(Default)]
struct Pending {
    bytes: VecDeque<u8>,
    /// The console or the writer is gone.
    closed: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        lock(&self.pending)
    }

    /// The next output; `None` after the end.
    fn next(&self) -> Option<Vec<u8>> {
        let mut pending = self.lock();
        while pending.bytes.is_empty() {
            if pending.closed {
                return None;
            }
            pending = wait(&self.changed, pending);
        }
        Some(pending.bytes.drain(..).collect())
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }
}

impl Follower {
    /// False if the writer is gone.
    fn push(&self, bytes: &[u8]) -> bool {
        let mut pending = self.0.lock();
        if pending.bytes.len() + bytes.len() <= KEPT {
            pending.bytes.extend(bytes);
            self.0.changed.notify_all();
        }
        !pending.closed
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Cheap to clone; all clones are one console.
#[derive(Clone, Default)]
pub(crate) struct Console(Arc<Mutex<State>>);

impl Console {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }

    /// The last `lines` lines, sanitized for a terminal.
    pub(crate) fn tail(&self, lines: usize) -> String {
        let state = self.lock();
        let bytes: Vec<u8> = state.last.iter().copied().collect();
        drop(state);
        last_lines(&guest_text::sanitize_lines(bytes), lines)
    }

    /// Sends the kept output and all further output to a writer until it fails.
    pub(crate) fn follow(&self, mut writer: impl Write + Send + 'static) {
        let queue = Arc::new(Queue::default());
        let shared = queue.clone();
        let spawned = threads::spawn("koya-console", move || {
            while let Some(bytes) = shared.next() {
                if writer
                    .write_all(&bytes)
                    .and_then(|()| writer.flush())
                    .is_err()
                {
                    break;
                }
            }
            shared.close();
        });
        if let Err(error) = spawned {
            log::warn!("nobody follows the console: {error}");
            return;
        }
        let mut state = self.lock();
        queue.lock().bytes.extend(&state.last);
        queue.changed.notify_all();
        state.followers.push(Follower(queue));
    }
}

/// The last `lines` non-blank lines of a text.
pub(crate) fn last_lines(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    if all.is_empty() {
        return "(nothing was printed)".into();
    }
    all[all.len().saturating_sub(lines)..].join("\n")
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.lock();
        state.last.extend(bytes);
        let excess = state.last.len().saturating_sub(KEPT);
        state.last.drain(..excess);
        state.followers.retain(|follower| follower.push(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_follower_that_hangs_does_not_hang_the_console() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut console = Console::default();
        console.write_all(b"before\n").unwrap();
        console.follow(writer);
        // Far more than a pipe and a queue can hold, without a reader.
        for _ in 0..1000 {
            console.write_all(&[b'x'; 1000]).unwrap();
        }
        let mut start = [0; 9];
        std::io::Read::read_exact(&mut reader, &mut start).unwrap();
        assert_eq!(&start, b"before\nxx");
        drop(reader);
        while !console.lock().followers.is_empty() {
            console.write_all(b"more").unwrap();
            std::thread::yield_now();
        }
    }

    #[test]
    fn the_last_lines_are_kept_and_the_rest_is_not() {
        let mut console = Console::default();
        for n in 0..20_000 {
            writeln!(console, "line {n}").unwrap();
        }
        assert_eq!(console.tail(2), "line 19998\nline 19999");
        write!(console, "\x1b[31mred\x1b[0m\r\n").unwrap();
        assert_eq!(console.tail(1), "red");
        assert!(console.lock().last.len() <= KEPT);
    }
}
