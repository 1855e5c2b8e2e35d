//! The end of a task set's virtual machine, and of the task set.

use crate::machine::{Machine, VirtualMachine};
use crate::set::TaskSet;
use crate::sync;
use anyhow::Result;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// Function that starts a detached thread.
pub(crate) type Start = fn(&'static str, Box<dyn FnOnce() + Send>) -> Result<()>;

fn spawn_thread(name: &'static str, work: Box<dyn FnOnce() + Send>) -> Result<()> {
    sync::spawn(name, work)
}

impl TaskSet {
    /// Whether the virtual machine was stopped on purpose: its containers count as killed.
    pub(crate) fn was_stopped(&self) -> bool {
        let state = self.lock();
        state.is_stopping && !state.has_died
    }

    /// Wakes the threads that wait for a change, after a change of a process.
    pub(crate) fn notify(&self) {
        self.change(|_| ());
    }

    /// Shuts the virtual machine down on a separate thread, without waiting. A starting machine is shut down after its
    /// start.
    pub fn stop(&self) {
        self.stop_by(spawn_thread);
    }

    /// The same with threads started by `spawn`. False if the host can't create one: the machine continues then.
    fn stop_by(&self, spawn: Start) -> bool {
        let machine = self.change(|state| match &state.machine {
            Machine::Absent => None,
            Machine::Starting => {
                state.is_stopping = true;
                None
            }
            Machine::Running(machine) => {
                let machine = machine.clone();
                if std::mem::replace(&mut state.is_stopping, true) {
                    return None;
                }
                state.has_died = machine.ended().is_some();
                Some(machine)
            }
        });
        let Some(machine) = machine else {
            return true;
        };
        let started = spawn("koya-stop", Box::new(move || machine.stop()));
        if let Err(error) = &started {
            log::error!("the virtual machine is not stopped: {error:#}");
            self.change(|state| state.is_stopping = false);
        }
        started.is_ok()
    }

    /// Final call: ends the virtual machine after the guest has flushed its disks, and unmounts everything.
    pub fn finish(&self) {
        self.finish_by(spawn_thread);
    }

    pub(crate) fn finish_by(&self, spawn: Start) {
        let is_ending = self.stop_by(spawn);
        let machine = self.wait_for(self.timeouts.start, |state| match &state.machine {
            Machine::Starting => None,
            Machine::Absent => Some(None),
            Machine::Running(machine) => Some(Some(machine.clone())),
        });
        if let Some(machine) = machine.flatten() {
            if !is_ending {
                // It has its own time limits.
                self.change(|state| state.is_stopping = true);
                machine.stop();
            }
            wait_ended(&machine, self.timeouts.stop, spawn);
            machine.kill();
        }
        let tasks: Vec<_> = self.change(|state| {
            state.is_stopping = true;
            state.entries.values().map(|e| e.task.clone()).collect()
        });
        for task in tasks {
            self.unmount(&task);
        }
    }
}

/// Waits for a virtual machine's end, up to `limit`.
fn wait_ended(machine: &Arc<dyn VirtualMachine>, limit: Duration, spawn: Start) {
    if machine.ended().is_some() {
        return;
    }
    let (sender, ended) = channel::<()>();
    let waited = machine.clone();
    let work = move || {
        waited.wait_ended();
        drop(sender);
    };
    if spawn("koya-ended", Box::new(work)).is_ok() {
        ended.recv_timeout(limit).ok();
        return;
    }
    // Without a thread, its state is polled.
    let begun = Instant::now();
    while machine.ended().is_none() && begun.elapsed() < limit {
        std::thread::sleep(Duration::from_millis(10));
    }
}
