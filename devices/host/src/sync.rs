//! Locks that ignore poisoning, and counters of what exists at once.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Takes a lock. A poisoned lock means that a thread panicked, which is a bug in Koya; other threads
/// continue, so that the virtual machine can still be torn down.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a change of the data guarded by a lock.
pub fn wait<'g, T>(changed: &Condvar, guard: MutexGuard<'g, T>) -> MutexGuard<'g, T> {
    changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// The number of connections or threads, for example, that exist at once. Clones are the same counter.
#[derive(Clone, Debug, Default)]
pub struct Counter(Arc<AtomicUsize>);

impl Counter {
    /// Their number.
    pub fn get(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }

    /// Counts one more, until the result is dropped.
    pub fn add(&self) -> Counted {
        self.0.fetch_add(1, Ordering::SeqCst);
        Counted(self.0.clone())
    }

    /// Counts one more, until the result is dropped; `None` if there are `limit` already.
    pub fn add_below(&self, limit: usize) -> Option<Counted> {
        let is_below = self.0.fetch_add(1, Ordering::SeqCst) < limit;
        let counted = Counted(self.0.clone());
        is_below.then_some(counted)
    }
}

/// One that a [`Counter`] counts while this lives.
#[derive(Debug)]
#[must_use]
pub struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_are_counted_than_allowed() {
        let counter = Counter::default();
        let counted: Vec<_> = std::iter::from_fn(|| counter.add_below(3)).collect();
        assert_eq!(counted.len(), 3);
        assert!(counter.add_below(3).is_none());
        let more = counter.add();
        assert_eq!(counter.clone().get(), 4);
        drop((counted, more));
        assert!(counter.add_below(1).is_some());
        assert_eq!(counter.get(), 0);
    }
}
