//! Resizes a guest as its containers are created and deleted.

use crate::Error;
use crate::cgroup;
use crate::machine::{Machine, VirtualMachine};
use crate::set::{Entry, State, Task, TaskSet};
use crate::size::{Limits, at_most, larger, sum_of_limits, target};
use crate::sync::spawn;
use anyhow::anyhow;
use koya::Size;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time for which a pod keeps the resources of an ended container: longer than the kubelet's first two restarts of a
/// crashing container (immediately, then after 10 s), since plugging memory again costs more than keeping it.
const SETTLED: Duration = Duration::from_secs(15);

/// The turn of a thread that resizes the guest, without holding a lock.
struct Resizing<'a>(&'a TaskSet);

impl Drop for Resizing<'_> {
    fn drop(&mut self) {
        self.0.change(|state| state.is_resizing = false);
    }
}

/// A pending resize of the guest.
struct Resize {
    machine: Arc<dyn VirtualMachine>,
    /// The task that started the machine.
    first: Arc<Task>,
    size: Size,
}

impl State {
    /// The required size of the guest, if it differs.
    fn resize(&self) -> Option<Resize> {
        let Machine::Running(machine) = &self.machine else {
            return None;
        };
        let (members, own): (Vec<&Entry>, Vec<_>) = self
            .entries
            .values()
            .partition(|entry| entry.task.is_member());
        let first = own.first()?;
        let mut limits: Vec<Limits> = members.iter().map(|entry| entry.limits).collect();
        let is_pod = first.task.is_pod();
        if !is_pod && first.limits.memory.is_some() {
            // It has processes of its own, with this limit.
            limits.push(first.limits);
        }
        let settings = &first.task.settings;
        let own = sum_of_limits(settings, &[first.limits]);
        let all = larger(own, sum_of_limits(settings, &limits));
        let most = machine.max_size();
        let mut size = target(self.first_size.unwrap_or(own), all, most);
        if !is_pod {
            // A limit may exceed the memory of the host, and then there is no more.
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
    /// Resizes the guest to its containers' limits, if they have changed.
    ///
    /// # Errors
    /// If it can't be enlarged accordingly.
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

    /// The same in the background.
    pub(crate) fn resize_in_background(self: &Arc<Self>) {
        let set = self.clone();
        spawn("koya-resize", move || set.resize_or_log()).ok();
    }

    /// The same with a delay, after the end of a container that may be restarted soon.
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
                // Only another end could change the delay, and only prolong it.
                std::thread::sleep(left);
            }
        };
        if spawn("koya-settle", resize).is_err() {
            self.change(|state| state.last_end = None);
            self.resize_in_background();
        }
    }

    /// Remaining time for which the resources of the container that ended last are kept. `None`: expired, and the caller
    /// must resize the guest.
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
    // Before the guest grows, and after it has shrunk.
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

/// Sets the host's limit for a sandbox whose guest may have this much memory, but never less than was granted: memory that
/// it is slow to give back, or to take, may still be used.
pub(crate) fn bound_memory(task: &Task, machine: &dyn VirtualMachine, mib: Option<u64>) {
    match task.spec.cgroup() {
        Some(group) => {
            let mib = mib.unwrap_or(0).max(machine.granted_mib());
            cgroup::bound(&group, mib, machine.kernel_mib());
        }
        None => log::debug!("no limit of memory: no control group of version 2"),
    }
}
