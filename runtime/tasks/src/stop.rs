//! The end of a task set's virtual machine, and of the task set.

use crate::machine::{Machine, VirtualMachine};
use crate::set::TaskSet;
use crate::sync;
use anyhow::Result;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// How a thread is started that nobody waits for.
pub(crate) type Start = fn(&'static str, Box<dyn FnOnce() + Send>) -> Result<()>;

fn spawn_thread(name: &'static str, work: Box<dyn FnOnce() + Send>) -> Result<()> {
    sync::spawn(name, work)
}

impl TaskSet {
    /// Whether the virtual machine ends, or has ended, because it was to: its containers are killed by that.
    pub(crate) fn was_stopped(&self) -> bool {
        let state = self.lock();
        state.is_stopping && !state.has_died
    }

    /// Wakes those who wait for a change, after one of a process.
    pub(crate) fn notify(&self) {
        self.change(|_| ());
    }

    /// Takes the virtual machine down on a thread of its own: nothing waits for it. One that starts is taken
    /// down once that is over.
    pub fn stop(&self) {
        self.stop_by(spawn_thread);
    }

    /// The same by threads that this starts. False if the host has none for it: then it goes on.
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

    /// The last thing that is asked of it: ends the virtual machine, once the guest has written out what it has,
    /// and takes away what was mounted.
    pub fn finish(&self) {
        self.finish_by(spawn_thread);
    }

    pub(crate) fn finish_by(&self, spawn: Start) {
        let is_ending = self.stop_by(spawn);
        let machine = self.wait_for(self.patience.start, |state| match &state.machine {
            Machine::Starting => None,
            Machine::Absent => Some(None),
            Machine::Running(machine) => Some(Some(machine.clone())),
        });
        if let Some(machine) = machine.flatten() {
            if !is_ending {
                // It has limits of its own.
                self.change(|state| state.is_stopping = true);
                machine.stop();
            }
            wait_ended(&machine, self.patience.stop, spawn);
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

/// Waits for a virtual machine's end, and no longer than `limit`.
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
    // Without a thread it is looked at again and again.
    let begun = Instant::now();
    while machine.ended().is_none() && begun.elapsed() < limit {
        std::thread::sleep(Duration::from_millis(10));
    }
}
