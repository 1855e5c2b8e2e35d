//! Locks that a panic of another thread does not spoil.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Takes a lock. One that is poisoned means that a thread panicked, which is a bug of ours; the
/// others go on, so that the virtual machine can still be taken down.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a change of what a lock guards.
pub fn wait<'g, T>(changed: &Condvar, guard: MutexGuard<'g, T>) -> MutexGuard<'g, T> {
    changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
}
