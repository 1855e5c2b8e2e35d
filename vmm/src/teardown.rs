//! Teardown of a virtual machine: the order in which its parts are ended, and the time limit for them.
//!
//! Nothing here depends on the guest: vCPUs are kicked out of it, and device threads check for a stop request
//! after each batch. They may hang in a system call of the host, so teardown runs on a thread of its own and
//! records the part that it waits for.

use crate::bus::Bus;
use crate::event_loop::LoopThread;
use crate::standard_devices::Handles;
use koya_devices::vsock::UnixSockets;
use koya_host::sync::lock;
use koya_host::threads::{self, Role};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

const ROLE: Role = Role::new("koya-end").without_signals();

/// Time limit for the threads of a machine to end: longer than a working disk takes for requests in flight.
const LIMIT: Duration = Duration::from_secs(30);

/// The parts of a machine to tear down.
pub(crate) struct Teardown {
    vcpus: Vec<(usize, JoinHandle<()>)>,
    sockets: Option<UnixSockets>,
    bus: Arc<Bus>,
    event_loop: Option<LoopThread>,
    handles: Arc<Handles>,
}

/// The part that is being waited for.
type Stage = Arc<Mutex<String>>;

impl Teardown {
    pub(crate) fn new(
        bus: Arc<Bus>,
        event_loop: Option<LoopThread>,
        handles: Arc<Handles>,
    ) -> Self {
        Self {
            vcpus: Vec::new(),
            sockets: None,
            bus,
            event_loop,
            handles,
        }
    }

    pub(crate) fn add_vcpu(&mut self, index: usize, thread: JoinHandle<()>) {
        self.vcpus.push((index, thread));
    }

    pub(crate) fn keep_sockets(&mut self, sockets: Option<UnixSockets>) {
        self.sockets = sockets;
    }

    /// Ends all parts, or logs the one that does not end.
    pub(crate) fn run(self) {
        if self.vcpus.is_empty() && self.event_loop.is_none() {
            // There is no thread that could hang, and no device: devices need the loop.
            return self.end(&Stage::default());
        }
        run_with_timeout(LIMIT, |stage| self.end(stage));
    }

    /// vCPUs first, since they call devices; then devices, whose workers run on the loop; then the loop.
    fn end(self, stage: &Stage) {
        for (index, thread) in self.vcpus {
            wait_for(stage, format!("the thread koya-vcpu{index}"));
            if thread.join().is_err() {
                log::error!("a vCPU thread panicked");
            }
        }
        wait_for(stage, "the threads of the vsock sockets".into());
        drop(self.sockets);
        if let Some(hotplug) = &self.handles.hotplug {
            wait_for(stage, "a disk that is attached or detached".into());
            hotplug.close();
        }
        self.bus.shut_down(|what| wait_for(stage, what.into()));
        wait_for(
            stage,
            "the event loop and the thread that starts devices".into(),
        );
        drop(self.event_loop);
    }
}

fn wait_for(stage: &Stage, what: String) {
    *lock(stage) = what;
}

/// Runs `work` on a thread of its own and waits for it up to `limit`. On timeout, logs an error and returns
/// false.
fn run_with_timeout(limit: Duration, work: impl FnOnce(&Stage) + Send + 'static) -> bool {
    let stage = Stage::default();
    let shared = stage.clone();
    let (done, ended) = channel::<()>();
    let cell = Arc::new(Mutex::new(Some(work)));
    let works = cell.clone();
    let spawned = threads::spawn(ROLE, move || {
        let _done = done;
        if let Some(work) = lock(&works).take() {
            work(&shared);
        }
    });
    match spawned {
        Ok(thread) => match ended.recv_timeout(limit) {
            Err(RecvTimeoutError::Timeout) => {
                let stage = lock(&stage);
                log::error!(
                    "a virtual machine has not ended after {limit:?}: {stage} did not return from the host"
                );
                return false;
            }
            _ => {
                if thread.join().is_err() {
                    log::error!("the end of a virtual machine panicked");
                }
            }
        },
        // No thread can be created: run it here, for as long as it takes.
        Err(error) => {
            log::warn!("cannot start a thread: {error}");
            if let Some(work) = lock(&cell).take() {
                work(&stage);
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_hanging_thread_is_waited_for_up_to_the_limit() {
        let (hold, held) = channel::<()>();
        let started = Instant::now();
        let ended = run_with_timeout(Duration::from_millis(50), move |stage| {
            wait_for(stage, "a call".into());
            held.recv().ok();
        });
        assert!(!ended && started.elapsed() < Duration::from_secs(10));
        drop(hold);
    }

    #[test]
    fn finished_work_ends_the_wait() {
        let did = Arc::new(Mutex::new(false));
        let does = did.clone();
        assert!(run_with_timeout(Duration::from_secs(20), move |_| *lock(
            &does
        ) = true));
        assert!(*lock(&did));
    }
}
