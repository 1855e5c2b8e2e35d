//! A thread that gives a task a pid on the host.
//!
//! Kubernetes names namespaces by `/proc/PID/ns/...` of a container's process. All containers of a pod are
//! one process here, but each has a thread, whose id no other has: `/proc` knows it, and signals to it
//! are the process's.

use crate::sync::spawn;
use anyhow::{Context, Result};
use std::sync::mpsc::{Sender, channel};

type Work = Box<dyn FnOnce() + Send>;

/// The thread lives as long as this does.
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

    /// The thread's id.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Has it do something, after what it does now.
    ///
    /// # Errors
    /// If the thread is gone.
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
