//! Threads: how each is started, and those that a device has for its queues.

use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Address space for a thread's stack, in bytes: enough for all that Koya's threads do, and less than a huge
/// page. Where the host makes huge pages for all, it makes one of a larger stack as soon as that is touched
/// (glibc asks it not to, musl does not): 2 MiB for each thread instead of some KiB.
pub const STACK: usize = 1 << 20;
const _: () = assert!(STACK < 2 << 20, "as large as a huge page");

/// Starts a thread with this name, of which Linux shows 15 bytes.
///
/// # Errors
/// The host has no thread left.
pub fn spawn<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    builder(name).spawn(work)
}

/// As [`spawn`], for a thread that ends before the scope does.
///
/// # Errors
/// The host has no thread left.
pub fn spawn_scoped<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    work: impl FnOnce() -> T + Send + 'scope,
) -> io::Result<ScopedJoinHandle<'scope, T>> {
    builder(name).spawn_scoped(scope, work)
}

fn builder(name: &str) -> Builder {
    Builder::new().name(name.into()).stack_size(STACK)
}

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
        self.running.push(spawn(self.name, work)?);
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

#[cfg(test)]
mod tests {
    use super::spawn;

    #[test]
    fn a_thread_has_its_name() {
        let name = || std::fs::read_to_string("/proc/thread-self/comm").unwrap();
        let name = spawn("koya-test", name).unwrap().join().unwrap();
        assert_eq!(name.trim(), "koya-test");
    }
}
