//! What is asked of a container that is there: signals, pause, limits, figures, its terminal.

use crate::cgroup;
use crate::pod::{Pod, ProcOf, SIGKILL, Task};
use crate::size::Limits;
use crate::sync::lock;
use crate::task::{Handle, Refusal, Status, Wish};
use anyhow::{Context, anyhow};
use containerd_shim_protos::events::task::{TaskPaused, TaskResumed};
use containerd_shim_protos::topics;
use koya::oci_spec::runtime as oci;
use koya::{Container, ContainerStats};
use std::sync::Arc;
use std::time::SystemTime;

const SIGINT: u32 = 2;
const SIGTERM: u32 = 15;
/// The last real-time signal.
const LAST_SIGNAL: u32 = 64;

impl Pod {
    pub(crate) fn kill(&self, id: &str, name: &str, signal: u32, all: bool) -> Result<(), Refusal> {
        let task = self.task(id)?;
        let proc = task.proc(name)?;
        proc.status().allow(Wish::Kill)?;
        if signal > LAST_SIGNAL {
            return Err(anyhow!("there is no signal {signal}").into());
        }
        let Some(handle) = proc.handle() else {
            // Nothing of it is in the guest: a pod's own container, or one that was never started.
            if ![SIGINT, SIGKILL, SIGTERM].contains(&signal) {
                return Ok(());
            }
            let at = SystemTime::now();
            match proc {
                ProcOf::First(_) => self.end(&task, 128 + signal, at),
                ProcOf::Further(further) => drop(further.proc.ended(128 + signal, at)),
            }
            return Ok(());
        };
        let all = all && name.is_empty();
        let sent = match &handle {
            // The host sees to its end, whatever the guest says to it.
            Handle::First(container) if signal == SIGKILL && all => container.kill_all(),
            Handle::First(container) if signal == SIGKILL => container.kill(),
            Handle::First(container) if all => container.signal_all(signal as i32),
            _ => handle.process().signal(signal as i32),
        };
        match sent {
            Err(koya::Error::NoProcess { .. }) => {
                Err(Refusal::Finished("process already finished"))
            }
            sent => Ok(sent?),
        }
    }

    pub(crate) fn pause(&self, id: &str) -> Result<(), Refusal> {
        let event = TaskPaused {
            container_id: id.into(),
            ..Default::default()
        };
        self.freeze(id, Wish::Pause, Status::Paused, Container::pause)?;
        self.events.publish(topics::TASK_PAUSED_EVENT_TOPIC, &event);
        Ok(())
    }

    pub(crate) fn resume(&self, id: &str) -> Result<(), Refusal> {
        let event = TaskResumed {
            container_id: id.into(),
            ..Default::default()
        };
        self.freeze(id, Wish::Resume, Status::Running, Container::resume)?;
        self.events
            .publish(topics::TASK_RESUMED_EVENT_TOPIC, &event);
        Ok(())
    }

    fn freeze(
        &self,
        id: &str,
        wish: Wish,
        then: Status,
        change: fn(&Container) -> Result<(), koya::Error>,
    ) -> Result<(), Refusal> {
        let task = self.task(id)?;
        let _work = lock(&task.work);
        task.first.status().allow(wish)?;
        change(&*task.running()?)?;
        task.first.set_status(then);
        Ok(())
    }

    pub(crate) fn update(self: &Arc<Self>, id: &str, resources: &[u8]) -> Result<(), Refusal> {
        let task = self.task(id)?;
        let _work = lock(&task.work);
        if task.first.status() != Status::Paused {
            task.first.status().allow(Wish::Use)?;
        }
        let resources: oci::LinuxResources =
            serde_json::from_slice(resources).context("the resources are broken")?;
        let before = *lock(&task.limits);
        let wanted = Limits::default().or(Some(&resources));
        let after = Limits {
            memory: wanted.memory.or(before.memory),
            milli_cpus: wanted.milli_cpus.or(before.milli_cpus),
        };
        let changed = self.change(&task, &resources, before, after);
        if changed.is_err() {
            *lock(&task.limits) = before;
            self.fit_behind();
            return changed;
        }
        if let Some(folder) = task.spec.cgroup().filter(|folder| folder.exists()) {
            cgroup::apply(&folder, &cgroup::cpu(&resources));
        }
        Ok(())
    }

    /// Room first, then the limit; where it is less, the other way round.
    fn change(
        self: &Arc<Self>,
        task: &Task,
        resources: &oci::LinuxResources,
        before: Limits,
        after: Limits,
    ) -> Result<(), Refusal> {
        let limit = || match task.is_virtual() {
            true => Ok(()),
            false => Ok(task.running()?.update(resources)?),
        };
        let is_less = match (before.memory, after.memory) {
            (Some(before), Some(after)) => after < before,
            (None, after) => after.is_some(),
            _ => false,
        };
        if is_less {
            limit()?;
            *lock(&task.limits) = after;
            // What is given up takes its time, and is nobody's to wait for.
            self.fit_behind();
            return Ok(());
        }
        *lock(&task.limits) = after;
        self.fit()?;
        limit()
    }

    pub(crate) fn stats(&self, id: &str) -> Result<ContainerStats, Refusal> {
        let task = self.task(id)?;
        if task.is_virtual() {
            return Ok(ContainerStats::default());
        }
        Ok(task.running()?.stats()?)
    }

    pub(crate) fn resize(
        &self,
        id: &str,
        name: &str,
        rows: u32,
        columns: u32,
    ) -> Result<(), Refusal> {
        let proc = self.task(id)?.proc(name)?;
        let size = (
            u16::try_from(rows).unwrap_or(0),
            u16::try_from(columns).unwrap_or(0),
        );
        match proc.handle() {
            // Clients say sizes of what has no terminal, and of what has just ended.
            Some(handle) if proc.paths.terminal => match handle.process().resize(size.0, size.1) {
                Err(koya::Error::NoProcess { .. }) => Ok(()),
                resized => Ok(resized?),
            },
            _ => Ok(()),
        }
    }

    pub(crate) fn close_stdin(&self, id: &str, name: &str) -> Result<(), Refusal> {
        self.task(id)?.proc(name)?.close_stdin();
        Ok(())
    }
}
