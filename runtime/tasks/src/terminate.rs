//! Termination of containers.

use crate::Error;
use crate::machine::GuestContainer;
use crate::set::SIGKILL;
use crate::sync::spawn;
use koya::Container;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// Sends a signal to a container's init process. After SIGKILL, the host enforces the end ([`Container::kill`]).
///
/// # Errors
/// If it has ended.
pub fn send_signal(container: &Container, signal: i32) -> Result<(), koya::Error> {
    send(container, signal, false)
}

/// The same for the init process, or for all of a container's processes.
pub(crate) fn send(
    container: &dyn GuestContainer,
    signal: i32,
    all: bool,
) -> Result<(), koya::Error> {
    match (signal == SIGKILL as i32, all) {
        (true, _) => container.kill(all),
        (false, true) => container.signal_all(signal),
        (false, false) => container.signal(signal),
    }
}

/// Ends a container: sends `signal` (SIGTERM, or another one set by its image or user) to its init process, and SIGKILL
/// after `grace`. Returns when it has ended.
///
/// There is no time limit here: a guest that does not end the container loses its virtual machine ([`Container::kill`]),
/// after it has flushed its disks.
///
/// # Errors
/// If the host has no thread left.
pub fn terminate(container: &Arc<Container>, signal: i32, grace: Duration) -> Result<(), Error> {
    let container: Arc<dyn GuestContainer> = container.clone();
    end(&container, signal, grace)
}

pub(crate) fn end(
    container: &Arc<dyn GuestContainer>,
    signal: i32,
    grace: Duration,
) -> Result<(), Error> {
    let (sender, ended) = channel::<()>();
    let waiting = container.clone();
    spawn("koya-await", move || {
        waiting.wait().ok();
        drop(sender);
    })?;
    // A guest that does not reply uses up its grace period.
    let asked = container.clone();
    spawn("koya-term", move || {
        asked.signal(signal).ok();
    })?;
    if ended.recv_timeout(grace) == Err(RecvTimeoutError::Timeout) {
        // The guest may claim that it has ended without completing the wait, which is overdue then, too.
        container.kill(false).ok();
        ended.recv().ok();
    }
    Ok(())
}
