//! A thread that provides a task's PID on the host.
//!
//! Kubernetes refers to namespaces by `/proc/PID/ns/...` of a container's process. All containers of a pod are one process
//! here, but each has a thread with a unique ID: `/proc` contains it, and signals to it go to the process.

use crate::sync::spawn;
use anyhow::{Context, Result};
use std::sync::mpsc::{Sender, channel};

type Work = Box<dyn FnOnce() + Send>;

/// Keeps the thread alive.
pub(crate) struct PidHolder {
    pid: u32,
    work: Sender<Work>,
}

impl PidHolder {
    /// # Errors
    /// If the host has no thread left.
    pub(crate) fn new() -> Result<Self> {
        let (work, queue) = channel::<Work>();
        let (sender, receiver) = channel();
        spawn("koya-container", move || {
            let own = rustix::thread::gettid().as_raw_nonzero().get();
            sender.send(own.unsigned_abs()).ok();
            for work in queue {
                work();
            }
        })?;
        Ok(Self {
            pid: receiver.recv().context("a thread ended")?,
            work,
        })
    }

    /// The thread ID.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Runs `work` on the thread, after its current work.
    ///
    /// # Errors
    /// If the thread has ended.
    pub(crate) fn run(&self, work: impl FnOnce() + Send + 'static) -> Result<()> {
        let sent = self.work.send(Box::new(work));
        sent.map_err(|_| anyhow::anyhow!("the container's thread is gone"))
    }
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
            let (sender, receiver) = channel();
            one.run(move || sender.send(7).unwrap()).unwrap();
            assert_eq!(receiver.recv(), Ok(7));
        }
    }
}
