//! The guest's console: the last of it is kept for reports, and all of it goes to whoever asks.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How much is kept, in bytes.
const KEPT: usize = 64 << 10;

#[derive(Default)]
struct State {
    last: VecDeque<u8>,
    followers: Vec<Box<dyn Write + Send>>,
}

/// Cheap to clone; all clones are one console.
#[derive(Clone, Default)]
pub(crate) struct Console(Arc<Mutex<State>>);

impl Console {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last `lines` lines.
    pub(crate) fn tail(&self, lines: usize) -> String {
        let state = self.lock();
        let bytes: Vec<u8> = state.last.iter().copied().collect();
        drop(state);
        last_lines(&String::from_utf8_lossy(&bytes), lines)
    }

    /// Sends what was kept, and all that comes, to a writer until it fails.
    pub(crate) fn follow(&self, mut writer: impl Write + Send + 'static) {
        let mut state = self.lock();
        let bytes: Vec<u8> = state.last.iter().copied().collect();
        if writer.write_all(&bytes).is_ok() {
            state.followers.push(Box::new(writer));
        }
    }
}

/// The last `lines` lines of a text that are not blank.
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
        state
            .followers
            .retain_mut(|follower| follower.write_all(bytes).is_ok());
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
    fn the_last_lines_are_kept_and_the_rest_is_not() {
        let mut console = Console::default();
        for n in 0..20_000 {
            writeln!(console, "line {n}").unwrap();
        }
        assert_eq!(console.tail(2), "line 19998\nline 19999");
        assert!(console.lock().last.len() <= KEPT);
    }
}
