//! Locks that ignore poisoning.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Takes a lock. A poisoned lock means that a thread panicked, which is a bug in Koya; other threads
/// continue, so that the virtual machine can still be torn down.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a change of the data guarded by a lock.
pub fn wait<'g, T>(changed: &Condvar, guard: MutexGuard<'g, T>) -> MutexGuard<'g, T> {
    changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
}
