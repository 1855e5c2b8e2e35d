//! Requests that find no space just after the guest has removed a file.
//!
//! The host frees a removed file once the guest has closed and forgotten it. The guest does both by requests of their own,
//! which it does not wait for: a write that follows may be served before them.

use rustix::io::Errno;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Time for which a removed file may explain that there is no space.
const RECENT: Duration = Duration::from_secs(1);
/// Delays before further attempts, in milliseconds.
const DELAYS: [u64; 4] = [1, 4, 16, 64];

/// The time of the last removal.
pub(super) struct Removals {
    started: Instant,
    /// Milliseconds after `started`, plus 1; 0 if nothing was removed.
    last: AtomicU64,
}

impl Default for Removals {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            last: AtomicU64::new(0),
        }
    }
}

impl Removals {
    fn now(&self) -> u64 {
        self.started.elapsed().as_millis() as u64 + 1
    }

    /// A name was removed, or taken over by another file.
    pub(super) fn note(&self) {
        self.last.store(self.now(), Ordering::Relaxed);
    }

    fn is_recent(&self) -> bool {
        match self.last.load(Ordering::Relaxed) {
            0 => false,
            last => self.now().saturating_sub(last) < RECENT.as_millis() as u64,
        }
    }

    /// Makes further attempts if there is no space and a file was removed just before.
    pub(super) fn retry<T>(
        &self,
        mut attempt: impl FnMut() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        for delay in DELAYS {
            match attempt() {
                Err(Errno::NOSPC | Errno::DQUOT) if self.is_recent() => {
                    std::thread::sleep(Duration::from_millis(delay));
                }
                other => return other,
            }
        }
        attempt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_of_a_removed_file_is_waited_for() {
        let removals = Removals::default();
        let attempts = |error: Errno, failures: usize| {
            let mut count = 0;
            let result = removals.retry(|| {
                count += 1;
                match count > failures {
                    true => Ok(()),
                    false => Err(error),
                }
            });
            (result.is_ok(), count)
        };
        assert_eq!(attempts(Errno::NOSPC, 1), (false, 1));
        removals.note();
        assert_eq!(attempts(Errno::NOSPC, 2), (true, 3));
        assert_eq!(attempts(Errno::DQUOT, 1), (true, 2));
        assert_eq!(attempts(Errno::NOSPC, 9), (false, 5));
        assert_eq!(attempts(Errno::IO, 1), (false, 1));
    }
}
