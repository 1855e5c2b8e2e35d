//! How a container is told to end, and seen to do it.

use crate::Error;
use crate::machine::GuestContainer;
use crate::set::SIGKILL;
use crate::sync::spawn;
use koya::Container;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// Sends a signal to a container's init process. With SIGKILL the host sees to its end, whatever the guest says
/// to it ([`Container::kill`]).
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

/// Ends a container: `signal` (SIGTERM, unless its image or its user wants another) for its init process, and SIGKILL
/// after `grace`. Returns when it has ended.
///
/// That has no limit here: a guest that does not end it loses its virtual machine ([`Container::kill`]), once it
/// has nothing left to write to its disks.
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
    // A guest that does not answer uses up its own time.
    let asked = container.clone();
    spawn("koya-term", move || {
        asked.signal(signal).ok();
    })?;
    if ended.recv_timeout(grace) == Err(RecvTimeoutError::Timeout) {
        // It may have ended by the guest's word, but not by that of its wait: that is overdue then, too.
        container.kill(false).ok();
        ended.recv().ok();
    }
    Ok(())
}
