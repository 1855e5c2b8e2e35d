//! The thread that activates devices. A driver activates its device by a register write, which is handled on
//! a vCPU thread. Threads of the device must not be created there, because they would inherit the
//! restrictions of a thread that runs the guest. So the vCPU has this thread do it and waits: for the guest
//! the write stays synchronous, and the device's lock is held meanwhile.
//!
//! This thread never waits for a vCPU, the event loop or the teardown. A machine that ends while a device is
//! being activated is torn down as soon as the activation is complete, vCPUs first.

use koya_host::sync::lock;
use koya_host::threads::{self, Role};
use koya_host::walls::Filter;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// Handles no guest data.
const ROLE: Role = Role::new("koya-starter")
    .without_signals()
    .confined_by(Filter::Starter);

type Work = Box<dyn FnOnce() + Send>;

/// The work, and the channel for its completion.
type Job = (Work, Sender<()>);

/// The starter thread; joined by [`stop`](Self::stop).
pub(crate) struct Starter(Mutex<Option<(Sender<Job>, JoinHandle<()>)>>);

impl Starter {
    pub(crate) fn start() -> io::Result<Self> {
        let (sender, jobs) = channel();
        let thread = threads::spawn(ROLE, move || serve(&jobs))?;
        Ok(Self(Mutex::new(Some((sender, thread)))))
    }

    /// Runs `work` on the thread and waits for it.
    ///
    /// # Errors
    /// If the work panicked, or the thread has ended.
    pub(crate) fn run(&self, work: Work) -> io::Result<()> {
        let (done, is_done) = channel();
        let sender = lock(&self.0).as_ref().map(|(sender, _)| sender.clone());
        let sent = sender.and_then(|sender| sender.send((work, done)).ok());
        let answer = sent.and_then(|()| is_done.recv().ok());
        answer.ok_or_else(|| io::Error::other("the thread that starts devices did not do it"))
    }

    /// Stops the thread after its current job.
    pub(crate) fn stop(&self) {
        let running = lock(&self.0).take();
        if let Some((sender, thread)) = running {
            drop(sender);
            if thread.join().is_err() {
                log::error!("the thread that starts devices panicked");
            }
        }
    }
}

impl Drop for Starter {
    fn drop(&mut self) {
        self.stop();
    }
}

fn serve(jobs: &Receiver<Job>) {
    for (work, done) in jobs {
        // A panic must not prevent the activation of other devices.
        match catch_unwind(AssertUnwindSafe(work)) {
            Ok(()) => drop(done.send(())),
            Err(_) => log::error!("a device panicked while it was started"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn work_is_done_by_a_thread_that_may_start_others() {
        let starter = Starter::start().unwrap();
        let seen = Arc::new(Mutex::new(None));
        let sees = seen.clone();
        let work = move || {
            let started = threads::spawn("koya-test", || ()).is_ok();
            *lock(&sees) = Some((threads::current_role(), started));
        };
        starter.run(Box::new(work)).unwrap();
        assert_eq!(*lock(&seen), Some((Some(ROLE), true)));
        starter.stop();
        assert!(starter.run(Box::new(|| ())).is_err());
    }

    #[test]
    fn work_that_panics_is_an_error_for_those_who_wait() {
        let starter = Starter::start().unwrap();
        assert!(starter.run(Box::new(|| panic!("on purpose"))).is_err());
        starter.run(Box::new(|| ())).unwrap();
    }
}
