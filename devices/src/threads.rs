//! Threads that a device starts for its queues, and the event that ends them.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A device's threads. Dropping it does not end them: what they wait for besides is the device's.
pub(crate) struct Threads {
    name: &'static str,
    stop: Arc<EventFd>,
    running: Vec<JoinHandle<()>>,
}

impl Threads {
    /// None yet; each will have this name.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub(crate) fn new(name: &'static str) -> io::Result<Self> {
        Ok(Self {
            name,
            stop: Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?),
            running: Vec::new(),
        })
    }

    /// What becomes readable when they are to end. No thread reads it: it stays readable for all.
    pub(crate) fn stop_event(&self) -> &Arc<EventFd> {
        &self.stop
    }

    /// Starts one.
    ///
    /// # Errors
    /// The host has no thread left.
    pub(crate) fn spawn(&mut self, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let builder = std::thread::Builder::new().name(self.name.into());
        self.running.push(builder.spawn(work)?);
        Ok(())
    }

    /// Tells all of them to end and waits until they have.
    pub(crate) fn stop(&mut self) {
        self.stop.write(1).ok();
        for thread in self.running.drain(..) {
            if thread.join().is_err() {
                log::error!("a thread of {} panicked", self.name);
            }
        }
        self.stop.read().ok();
    }

    /// Whether there are none.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.running.is_empty()
    }
}
