//! A guest becomes larger and smaller as its containers come and go.

use crate::Error;
use crate::cgroup;
use crate::machine::{Machine, VirtualMachine};
use crate::set::{Entry, State, Task, TaskSet};
use crate::size::{Limits, at_most, sum_of_limits, target};
use crate::sync::spawn;
use anyhow::anyhow;
use koya::Size;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a pod keeps the room of a container that has ended: longer than kubelet's first two restarts
/// of one that crashes take (at once, then after 10 s), since to plug memory again costs more than to keep it.
const SETTLED: Duration = Duration::from_secs(15);

/// The turn of who resizes the guest, which nobody holds a lock for.
struct Resizing<'a>(&'a TaskSet);

impl Drop for Resizing<'_> {
    fn drop(&mut self) {
        self.0.change(|state| state.is_resizing = false);
    }
}

/// What is to be done to the guest.
struct Resize {
    machine: Arc<dyn VirtualMachine>,
    /// The task that brought it.
    first: Arc<Task>,
    size: Size,
}

impl State {
    /// How large the guest is to be, if it is not.
    fn resize(&self) -> Option<Resize> {
        let Machine::Running(machine) = &self.machine else {
            return None;
        };
        let (members, own): (Vec<&Entry>, Vec<_>) = self
            .entries
            .values()
            .partition(|entry| entry.task.is_member());
        let first = own.first()?;
        let members: Vec<Limits> = members.iter().map(|entry| entry.limits).collect();
        let settings = &first.task.settings;
        let own = sum_of_limits(settings, &[first.limits]);
        let most = machine.max_size();
        let mut size = target(own, sum_of_limits(settings, &members), most);
        if !first.task.is_pod() {
            // A machine that others join was not told of them: its memory is all that there is.
            size = at_most(size, most);
        }
        (self.size != Some(size)).then(|| Resize {
            machine: machine.clone(),
            first: first.task.clone(),
            size,
        })
    }
}

impl TaskSet {
    /// Makes the guest as large as its containers' limits, where they are not what they were.
    ///
    /// # Errors
    /// If it can't be made as large.
    pub(crate) fn resize_guest(&self) -> Result<(), Error> {
        let resize = {
            let mut state = self.lock();
            while state.is_resizing {
                state = state.wait(&self.changed);
            }
            if state.is_stopping {
                return Ok(());
            }
            let Some(resize) = state.resize() else {
                return Ok(());
            };
            state.is_resizing = true;
            state.size = None;
            resize
        };
        let _resizing = Resizing(self);
        carry_out(&resize)?;
        self.change(|state| state.size = Some(resize.size));
        Ok(())
    }

    /// The same behind whoever made room.
    pub(crate) fn resize_behind(self: &Arc<Self>) {
        let set = self.clone();
        spawn("koya-resize", move || set.resize_or_log()).ok();
    }

    /// The same when a container has ended that may be started again soon.
    pub(crate) fn resize_later(self: &Arc<Self>) {
        let is_awaited = self.change(|state| state.last_end.replace(Instant::now()).is_some());
        if is_awaited {
            return;
        }
        let set = Arc::downgrade(self);
        let resize = move || {
            while let Some(set) = set.upgrade() {
                let Some(left) = set.unsettled() else {
                    return set.resize_or_log();
                };
                drop(set);
                // Only a later end changes anything, and that makes it longer.
                std::thread::sleep(left);
            }
        };
        if spawn("koya-settle", resize).is_err() {
            self.change(|state| state.last_end = None);
            self.resize_behind();
        }
    }

    /// How long the room of the container that ended last is still kept. None: no longer, and whoever asked
    /// is to resize the guest.
    fn unsettled(&self) -> Option<Duration> {
        self.change(|state| {
            let left = SETTLED.checked_sub(state.last_end?.elapsed());
            if left.is_none() {
                state.last_end = None;
            }
            left
        })
    }

    fn resize_or_log(&self) {
        if let Err(error) = self.resize_guest() {
            log::warn!("{error}");
        }
    }
}

fn carry_out(resize: &Resize) -> Result<(), Error> {
    let Resize {
        machine,
        first,
        size,
    } = resize;
    let now = machine.size()?;
    let grows = size.memory_mib > now.memory_mib;
    // Before the guest has more, and after it has less.
    if grows {
        bound_memory(first, &**machine, size.memory_mib);
    }
    let got = machine.update(*size);
    bound_memory(first, &**machine, None);
    let got = got?;
    log::info!("the guest has {got:?}; wished was {size:?}");
    if grows && got.memory_mib < size.memory_mib {
        let text = format!(
            "the guest has {} MiB, and did not take the {} that its containers may have",
            got.memory_mib.unwrap_or(0),
            size.memory_mib.unwrap_or(0)
        );
        return Err(anyhow!(text).into());
    }
    Ok(())
}

/// Sets the host's limit for a sandbox whose guest may have so much memory, but never less than it was granted:
/// what it is slow to give back, or to take, it may still use.
pub(crate) fn bound_memory(task: &Task, machine: &dyn VirtualMachine, mib: Option<u64>) {
    match task.spec.cgroup() {
        Some(group) => {
            let mib = mib.unwrap_or(0).max(machine.granted_mib());
            cgroup::bound(&group, mib, machine.kernel_mib());
        }
        None => log::debug!("no limit of memory: no control group of version 2"),
    }
}
