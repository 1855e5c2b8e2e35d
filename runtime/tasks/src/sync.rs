//! Locks with an order, and threads.

use anyhow::{Context, Result};
use koya::vmm::host::threads;
use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The locks of this crate, in the order in which a thread takes them. None is held during a call to the guest, to the
/// host's file system, or to anything else that may block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// The task set: [`crate::set::State`].
    Set = 1,
    /// One process: its status, and its object in the guest.
    Process = 2,
    /// The streams of one process.
    Relay = 3,
}

/// A lock with a level. Debug builds panic if a thread takes it while holding the same or a later level.
pub(crate) struct Ordered<T> {
    level: Level,
    mutex: Mutex<T>,
}

impl<T> Ordered<T> {
    pub(crate) fn new(level: Level, value: T) -> Self {
        let mutex = Mutex::new(value);
        Self { level, mutex }
    }

    /// Takes the lock, ignoring poisoning.
    pub(crate) fn lock(&self) -> Guard<'_, T> {
        let held = HeldLevel::new(self.level);
        let inner = self.mutex.lock().unwrap_or_else(PoisonError::into_inner);
        Guard { inner, held }
    }
}

/// A held lock.
pub(crate) struct Guard<'a, T> {
    inner: MutexGuard<'a, T>,
    held: HeldLevel,
}

impl<T> Guard<'_, T> {
    /// Waits for a change of the guarded data.
    pub(crate) fn wait(self, changed: &Condvar) -> Self {
        let Self { inner, held } = self;
        held.check_alone();
        let inner = changed.wait(inner);
        let inner = inner.unwrap_or_else(PoisonError::into_inner);
        Self { inner, held }
    }

    /// The same, up to `limit`.
    pub(crate) fn wait_timeout(self, changed: &Condvar, limit: Duration) -> Self {
        let Self { inner, held } = self;
        held.check_alone();
        let inner = changed.wait_timeout(inner, limit);
        let (inner, _) = inner.unwrap_or_else(PoisonError::into_inner);
        Self { inner, held }
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

#[cfg(debug_assertions)]
thread_local! {
    /// The levels of the locks held by this thread, one bit each.
    static HELD: std::cell::Cell<u8> = const { std::cell::Cell::new(0) };
}

/// A level held by this thread.
struct HeldLevel {
    #[cfg(debug_assertions)]
    bit: u8,
}

impl HeldLevel {
    #[cfg(debug_assertions)]
    fn new(level: Level) -> Self {
        let bit = 1 << level as u8;
        HELD.with(|held| {
            let now = held.get();
            assert!(now < bit, "{level:?} is taken while {now:#b} are held");
            held.set(now | bit);
        });
        Self { bit }
    }

    #[cfg(not(debug_assertions))]
    fn new(_: Level) -> Self {
        Self {}
    }

    /// A waiting thread must hold no other lock.
    fn check_alone(&self) {
        #[cfg(debug_assertions)]
        HELD.with(|held| assert_eq!(held.get(), self.bit, "a wait with other locks held"));
    }
}

#[cfg(debug_assertions)]
impl Drop for HeldLevel {
    fn drop(&mut self) {
        HELD.with(|held| held.set(held.get() & !self.bit));
    }
}

/// Starts a detached thread.
///
/// # Errors
/// If the host can't create one.
pub(crate) fn spawn(name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    threads::spawn(name, work).context("cannot start a thread")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_taken_in_their_order() {
        let (set, process) = (Ordered::new(Level::Set, 1), Ordered::new(Level::Process, 2));
        {
            let (_set, process) = (set.lock(), process.lock());
            assert_eq!(*process, 2);
        }
        let changed = Condvar::new();
        let waited = set.lock().wait_timeout(&changed, Duration::from_millis(1));
        assert_eq!(*waited, 1);
    }

    #[cfg(debug_assertions)]
    #[test]
    #[should_panic(expected = "Set is taken")]
    fn another_order_is_a_panic() {
        let (set, process) = (
            Ordered::new(Level::Set, ()),
            Ordered::new(Level::Process, ()),
        );
        let _process = process.lock();
        let _set = set.lock();
    }
}
