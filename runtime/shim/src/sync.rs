//! Locks and threads.

use anyhow::{Context, Result};
use koya::vmm::devices::threads;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A lock that a panic of another thread does not spoil.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts a thread that nobody waits for.
///
/// # Errors
/// If the host has none left.
pub(crate) fn spawn(name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    threads::spawn(name, work).context("cannot start a thread")?;
    Ok(())
}
