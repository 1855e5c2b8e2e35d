//! Threads that provide the PIDs of tasks on the host.
//!
//! Kubernetes refers to namespaces by `/proc/PID/ns/...` of a container's process. All containers of a pod are one process
//! here, but each has a thread with a unique ID: `/proc` contains it, and signals to it go to the process. The PID of a
//! container that owns the sandbox is the process's, which is the ID of its first thread.
//!
//! Tools such as `nerdctl cp` and `podman cp` find a container's files by its PID. Therefore these threads have the
//! container's root directory ([`koya::HostView`]) while it exists, and no other work: paths mean something else to them.

use crate::namespaces::own_pid;
use crate::spec::Files;
use crate::sync::spawn;
use anyhow::{Context, Result};
use koya::vmm::host::threads::spawn_scoped;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;
use std::{io, panic, thread};

/// A request to such a thread; the sender is dropped once it has been carried out.
#[derive(Debug)]
enum Request {
    Show(Box<Files>, Sender<()>),
    Hide(Sender<()>),
    /// The thread is needed for something else again.
    Return,
}

/// Time limit of a request: a volume may be on a file server that has gone.
const LIMIT: Duration = Duration::from_secs(10);

/// A thread whose ID is the PID of a task on the host. It ends when this is dropped, unless it is the process's first.
#[derive(Clone, Debug)]
pub struct PidHolder {
    pid: u32,
    requests: Option<Sender<Request>>,
}

impl PidHolder {
    /// Runs `work` on a new thread with this name. Meanwhile the calling one, which has to be the first thread of the process,
    /// shows files.
    ///
    /// # Errors
    /// If the host cannot create a thread.
    pub fn lend_first_thread<T: Send>(
        name: &'static str,
        work: impl FnOnce(Self) -> T + Send,
    ) -> io::Result<T> {
        let (requests, queue) = channel();
        let first = Self {
            pid: own_pid(),
            requests: Some(requests.clone()),
        };
        thread::scope(|scope| {
            let worker = spawn_scoped(scope, name, move || {
                let _end = ReturnOnDrop(requests);
                work(first)
            })?;
            serve(&queue);
            Ok(worker.join().unwrap_or_else(|e| panic::resume_unwind(e)))
        })
    }

    /// A new thread.
    ///
    /// # Errors
    /// If the host has no thread left.
    pub(crate) fn new() -> Result<Self> {
        let (requests, queue) = channel();
        let (sender, receiver) = channel();
        spawn("koya-container", move || {
            let own = rustix::thread::gettid().as_raw_nonzero().get();
            sender.send(own.unsigned_abs()).ok();
            serve(&queue);
        })?;
        Ok(Self {
            pid: receiver.recv().context("a thread ended")?,
            requests: Some(requests),
        })
    }

    /// This process, whose first thread does something else: no files are shown.
    pub(crate) fn process() -> Self {
        Self {
            pid: own_pid(),
            requests: None,
        }
    }

    /// The PID.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Shows the files of a container, whose mount points must exist.
    pub fn show(&self, files: Files) {
        self.request(|done| Request::Show(files.into(), done));
    }

    /// Shows them no longer: their file systems can be unmounted then.
    pub(crate) fn hide(&self) {
        self.request(Request::Hide);
    }

    fn request(&self, make: impl FnOnce(Sender<()>) -> Request) {
        if let Some(requests) = &self.requests {
            let (done, waiting) = channel();
            requests.send(make(done)).ok();
            // Nothing is ever received.
            if waiting.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                log::warn!(
                    "a file system of the host does not respond to the mounts for tools of the host"
                );
            }
        }
    }
}

/// Ends [`serve`], also if the work panics.
struct ReturnOnDrop(Sender<Request>);

impl Drop for ReturnOnDrop {
    fn drop(&mut self) {
        self.0.send(Request::Return).ok();
    }
}

fn serve(queue: &Receiver<Request>) {
    let mut view = None;
    for request in queue {
        match request {
            Request::Show(files, _done) => view = files.show(),
            Request::Hide(_done) => view = None,
            Request::Return => break,
        }
    }
    drop(view);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_a_pid_that_proc_knows() {
        let both = [PidHolder::new().unwrap(), PidHolder::new().unwrap()];
        assert_ne!(both[0].pid(), both[1].pid());
        for one in both {
            let text = std::fs::read_to_string(format!("/proc/{}/status", one.pid())).unwrap();
            let own = format!("Tgid:\t{}\n", std::process::id());
            assert!(text.contains(&own), "{text}");
            one.hide();
        }
    }

    #[test]
    fn the_first_thread_is_lent_until_the_work_ends() {
        let lent = PidHolder::lend_first_thread("koya-owner", |first| {
            let kept = first.clone();
            first.hide();
            (kept, thread::current().id())
        });
        let (kept, worker) = lent.unwrap();
        assert_eq!(kept.pid(), std::process::id());
        assert_ne!(worker, thread::current().id());
        // Requests after the end are not carried out, but end.
        kept.hide();
    }
}
