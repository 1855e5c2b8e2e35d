//! Locks of this crate.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes a lock. One that is poisoned means that a thread panicked, which is a bug of ours; the
/// others go on, since what they share is changed in single steps.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
