//! Requests to an existing task: signals, pause, limits, statistics, terminal size.

use crate::Error;
use crate::event::Event;
use crate::host_limits;
use crate::machine::GuestContainer;
use crate::process::{Action, Exit, Handle, Status};
use crate::set::{ProcessOf, SIGKILL, Task, TaskSet};
use crate::signal::terminates;
use crate::size::Limits;
use crate::terminate::send;
use anyhow::anyhow;
use koya::ContainerStats;
use koya::oci_spec::runtime as oci;
use std::sync::Arc;

const SIGINT: u32 = 2;
const SIGTERM: u32 = 15;
/// The last real-time signal.
const LAST_SIGNAL: u32 = 64;

impl TaskSet {
    /// Sends a signal to a process, or to all of a task's: the init process, if `exec_id` is empty. One that has not been
    /// started is ended by every signal that ends processes by default, and ignores the others.
    ///
    /// # Errors
    /// [`Error::Finished`] if it has ended.
    pub fn kill(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<(), Error> {
        let task = self.task(id)?;
        let process = self.process(&task, exec_id)?;
        process.status().allow(Action::Kill)?;
        if signal > LAST_SIGNAL {
            return Err(anyhow!("there is no signal {signal}").into());
        }
        let Some(handle) = process.handle() else {
            // It has no process in the guest: a pod sandbox container, or one that was never started.
            let ends = match task.is_pod() {
                true => [SIGINT, SIGKILL, SIGTERM].contains(&signal),
                false => terminates(signal),
            };
            if !ends {
                return Ok(());
            }
            let exit = Exit::now(128 + signal);
            match process {
                ProcessOf::Init(_) => self.end(&task, exit),
                ProcessOf::Exec(exec) => {
                    if exec.process.ended(exit, || ()) {
                        self.notify();
                    }
                }
            }
            return Ok(());
        };
        let all = all && exec_id.is_empty();
        let sent = match &handle {
            // The kernel keeps other signals from the first process of a pid namespace, which has no handlers yet.
            Handle::Init(container) if process.is_waiting() => match terminates(signal) {
                true => container.kill(all),
                false => Ok(()),
            },
            Handle::Init(container) => send(&**container, signal as i32, all),
            Handle::Exec(process) => process.signal(signal as i32),
        };
        match sent {
            Err(koya::Error::NoProcess { .. }) => Err(Error::Finished("process already finished")),
            sent => Ok(sent?),
        }
    }

    /// Freezes all processes of a task.
    ///
    /// # Errors
    /// If it does not run, or the guest fails.
    pub fn pause(&self, id: &str) -> Result<(), Error> {
        let event = Event::Paused { id: id.into() };
        self.freeze(id, Action::Pause, event, |container| container.pause())
    }

    /// Thaws them.
    ///
    /// # Errors
    /// If it is not paused, or the guest fails.
    pub fn resume(&self, id: &str) -> Result<(), Error> {
        let event = Event::Resumed { id: id.into() };
        self.freeze(id, Action::Resume, event, |container| container.resume())
    }

    fn freeze(
        &self,
        id: &str,
        action: Action,
        event: Event,
        change: impl FnOnce(&dyn GuestContainer) -> Result<(), koya::Error>,
    ) -> Result<(), Error> {
        let task = self.task(id)?;
        let _turn = self.turn(&task)?;
        task.init.status().allow(action)?;
        change(&*task.running()?)?;
        task.init.set_paused(action == Action::Pause);
        // During this turn, so that events of later changes follow.
        self.publish(event);
        Ok(())
    }

    /// Changes a task's limits to those in `linux.resources` of a configuration; absent limits keep their values. A container
    /// that the guest does not have yet gets them once it is created there.
    ///
    /// # Errors
    /// If a limit is invalid, the guest can't be enlarged accordingly, or can't set them.
    pub fn update(
        self: &Arc<Self>,
        id: &str,
        resources: &oci::LinuxResources,
    ) -> Result<(), Error> {
        let task = self.task(id)?;
        let _turn = self.turn(&task)?;
        if task.init.status() != Status::Paused {
            Self::check_usable(&task)?;
        }
        // Those of a pod sandbox container do not reach the guest, which would refuse them.
        koya::check_resources(resources)?;
        let before = self.limits(&task);
        let wanted = Limits::default().or(Some(resources));
        let after = Limits {
            memory: wanted.memory.or(before.memory),
            milli_cpus: wanted.milli_cpus.or(before.milli_cpus),
        };
        let changed = self.change_limits(&task, resources, before, after);
        if changed.is_err() {
            self.set_limits(&task, before);
            self.resize_in_background();
            return changed;
        }
        match task.is_pod() || task.container().is_some() {
            true => limit_on_host(&task, resources),
            false => Ok(()),
        }
    }

    /// Sets the limits of updates from before the container was created in the guest.
    ///
    /// # Errors
    /// If the guest or the host can't.
    pub(crate) fn set_pending_limits(
        &self,
        task: &Task,
        container: &dyn GuestContainer,
    ) -> Result<(), Error> {
        let pending = self.change(|state| {
            let entry = state.entry(task)?;
            Some(std::mem::take(&mut entry.pending_limits))
        });
        for resources in pending.unwrap_or_default() {
            container.update(&resources)?;
            limit_on_host(task, &resources)?;
        }
        Ok(())
    }

    /// Enlarges the guest before raising a limit, and shrinks it after lowering one.
    fn change_limits(
        self: &Arc<Self>,
        task: &Task,
        resources: &oci::LinuxResources,
        before: Limits,
        after: Limits,
    ) -> Result<(), Error> {
        let limit = || match task.container() {
            _ if task.is_pod() => Ok(()),
            Some(container) => Ok(container.update(resources)?),
            None => {
                self.change(|state| {
                    if let Some(entry) = state.entry(task) {
                        entry.pending_limits.push(resources.clone());
                    }
                });
                Ok(())
            }
        };
        let is_less = match (before.memory, after.memory) {
            (Some(before), Some(after)) => after < before,
            (None, after) => after.is_some(),
            _ => false,
        };
        if is_less {
            limit()?;
            self.set_limits(task, after);
            // Giving up memory takes time, so it is done in the background.
            self.resize_in_background();
            return Ok(());
        }
        self.set_limits(task, after);
        self.resize_guest()?;
        limit()
    }

    fn limits(&self, task: &Task) -> Limits {
        let mut state = self.lock();
        state.entry(task).map_or_else(Limits::default, |e| e.limits)
    }

    fn set_limits(&self, task: &Task, limits: Limits) {
        self.change(|state| {
            if let Some(entry) = state.entry(task) {
                entry.limits = limits;
            }
        });
    }

    /// Resource usage of a task; empty for a pod sandbox container.
    ///
    /// # Errors
    /// If it does not run, or the guest does not reply.
    pub fn stats(&self, id: &str) -> Result<ContainerStats, Error> {
        let task = self.task(id)?;
        if task.is_pod() {
            return Ok(ContainerStats::default());
        }
        Ok(task.running()?.stats()?)
    }

    /// Resizes the terminal of a process. Does nothing without a terminal, or after the end of the process.
    ///
    /// # Errors
    /// If there is no such process, or the guest fails.
    pub fn resize(&self, id: &str, exec_id: &str, rows: u32, columns: u32) -> Result<(), Error> {
        let task = self.task(id)?;
        let process = self.process(&task, exec_id)?;
        let size = (
            u16::try_from(rows).unwrap_or(0),
            u16::try_from(columns).unwrap_or(0),
        );
        match process.handle() {
            // Clients send sizes also for processes without a terminal, and for ones that have just ended.
            Some(handle) if process.paths.terminal => {
                match handle.process().resize(size.0, size.1) {
                    Err(koya::Error::NoProcess { .. }) => Ok(()),
                    resized => Ok(resized?),
                }
            }
            _ => Ok(()),
        }
    }

    /// Closes the standard input of a process.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn close_stdin(&self, id: &str, exec_id: &str) -> Result<(), Error> {
        let task = self.task(id)?;
        self.process(&task, exec_id)?.close_stdin();
        Ok(())
    }
}

/// Sets the limits of the sandbox's control group.
fn limit_on_host(task: &Task, resources: &oci::LinuxResources) -> Result<(), Error> {
    if let Some(group) = task.spec.cgroup().filter(|group| group.exists()) {
        task.limit_time_on_host();
        host_limits::apply(&group, resources)?;
    }
    Ok(())
}
