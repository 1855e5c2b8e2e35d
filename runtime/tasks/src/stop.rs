//! The end of a task set's virtual machine, and of the task set.

use crate::machine::{Machine, VirtualMachine};
use crate::set::TaskSet;
use crate::sync::spawn;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

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
            return;
        };
        if let Err(error) = spawn("koya-stop", move || machine.stop()) {
            log::error!("the virtual machine is not stopped: {error:#}");
            self.change(|state| state.is_stopping = false);
        }
    }

    /// The last thing that is asked of it: ends the virtual machine, once the guest has written out what it has,
    /// and takes away what was mounted.
    pub fn finish(&self) {
        self.stop();
        let machine = self.wait_for(self.patience.start, |state| match &state.machine {
            Machine::Starting => None,
            Machine::Absent => Some(None),
            Machine::Running(machine) => Some(Some(machine.clone())),
        });
        if let Some(machine) = machine.flatten() {
            wait_ended(&machine, self.patience.stop);
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
fn wait_ended(machine: &Arc<dyn VirtualMachine>, limit: Duration) {
    let (sender, ended) = channel::<()>();
    let waited = machine.clone();
    let spawned = spawn("koya-ended", move || {
        waited.wait_ended();
        drop(sender);
    });
    match spawned {
        Ok(()) => drop(ended.recv_timeout(limit)),
        // Without a thread there is no limit but the sandbox's own.
        Err(_) => drop(machine.wait_ended()),
    }
}
