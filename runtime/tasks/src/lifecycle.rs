//! Start and end of a task's init process, and deletion of the task.

use crate::Error;
use crate::event::Event;
use crate::exec::Exec;
use crate::hooks::Kind;
use crate::process::{Action, Exit, Status};
use crate::set::{KILLED, LOST, ProcessOf, Task, TaskSet};
use koya::Step;
use koya::vmm::guest_text::Warnings;
use std::sync::Arc;
use std::time::SystemTime;

impl TaskSet {
    /// Starts a process: the init process, if `exec_id` is empty. Returns the PID on the host that represents its task.
    ///
    /// # Errors
    /// If it was already started, or the reason why it can't be started: it counts as ended then.
    pub fn start(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<u32, Error> {
        let task = self.task(id)?;
        let _turn = self.turn(&task)?;
        if !exec_id.is_empty() {
            self.start_exec(&task, exec_id)?;
            return Ok(task.pid());
        }
        task.init.status().allow(Action::Start)?;
        if task.is_pod() {
            task.init.start()?;
            self.show_files(&task);
            if let Err(error) = self.run_hooks(&task, &[Kind::Poststart]) {
                task.init.not_started();
                self.end(&task, Exit::now(LOST));
                return Err(error);
            }
            self.started(&task);
            let machine = self.lock().machine();
            if let Some(machine) = machine {
                // Its containers may be created late, or never.
                machine.keep_timeline();
            }
            return Ok(task.pid());
        }
        let started = self.start_init(&task);
        if let Err(error) = &started {
            // Clients delete only tasks that have ended.
            self.end(&task, Exit::now(failed_status(error)));
        }
        started.map(|()| task.pid())
    }

    fn start_init(self: &Arc<Self>, task: &Arc<Task>) -> Result<(), Error> {
        let container = self.ensure_created(task)?;
        // It may have been killed while it was being created.
        if let Err(error) = task.init.start() {
            container.kill(false).ok();
            return Err(error);
        }
        if let Err(error) = container.start() {
            task.init.not_started();
            return Err(error.into());
        }
        if !task.is_member() {
            // Not earlier: the guest would take long to create and start the container.
            task.limit_time_on_host();
        }
        // Its mount points exist now.
        self.show_files(task);
        if let Err(error) = self.run_hooks(task, &[Kind::Poststart]) {
            // As with runc, the container is killed if a hook fails.
            container.kill(true).ok();
            task.init.not_started();
            return Err(error);
        }
        self.started(task);
        self.log_steps(task);
        Ok(())
    }

    /// Publishes a start, and the end after it if that has already happened.
    fn started(&self, task: &Task) {
        let event = Event::Started {
            id: task.id.clone(),
            pid: task.pid(),
        };
        if let Some(relay) = task.init.relay() {
            relay.listen();
        }
        if let Some(exit) = task.init.started(|| self.publish(event)) {
            self.end(task, exit);
        }
    }

    /// Logs the durations of the steps in one line.
    fn log_steps(&self, task: &Task) {
        let (machine, is_start_logged) = self.change(|state| {
            let was_logged = std::mem::replace(&mut state.is_start_logged, true);
            (state.machine(), was_logged)
        });
        let Some(machine) = machine else {
            return;
        };
        let own = |step: &Step| step.container == task.id;
        let first = |step: &Step| step.container.is_empty() && !is_start_logged;
        let steps = machine.steps().into_iter();
        let steps: Vec<_> = steps.filter(|s| own(s) || first(s)).collect();
        if steps.is_empty() {
            return;
        }
        let steps: Vec<_> = steps.iter().map(Step::to_string).collect();
        log::info!("the start of {}: {}", task.id, steps.join(", "));
    }

    /// Waits for a container's init process, and publishes its end.
    pub(crate) fn follow(&self, task: &Arc<Task>) {
        let Some(container) = task.container() else {
            return;
        };
        let status = self.status_of(container.wait());
        let exit = Exit {
            status,
            at: SystemTime::now(),
        };
        if status == KILLED
            && let Ok(stats) = container.stats()
        {
            // Clients expect this event before the exit.
            let kills = stats.memory_events.get("oom_kill").copied();
            self.out_of_memory(task, kills.unwrap_or(0));
        }
        if let Some(relay) = task.init.relay() {
            relay.finish();
        }
        self.await_last_notifications(task);
        self.end_execs(task, exit.at);
        self.end(task, exit);
    }

    /// Exec processes end with the init process, and are reported before it.
    fn end_execs(&self, task: &Task, at: SystemTime) {
        let runs = |exec: &Arc<Exec>| exec.process.status() == Status::Running;
        self.wait_for(self.timeouts.execs, |state| {
            (!state.execs(task).iter().any(runs)).then_some(())
        });
        // The guest has not reported the others yet; their clients must not wait for that.
        let left = self.lock().execs(task);
        for exec in left.iter().filter(|exec| runs(exec)) {
            let exit = Exit { status: KILLED, at };
            self.end_exec(task, exec, exit);
        }
    }

    /// Publishes the total number of a container's processes killed by the guest's OOM killer, if it has grown.
    pub(crate) fn out_of_memory(&self, task: &Task, kills: u64) {
        let is_news = self.change(|state| {
            let entry = state.entry(task).filter(|entry| kills > entry.oom_kills);
            let is_news = entry.map(|entry| entry.oom_kills = kills).is_some();
            if is_news {
                // Published under the lock, so that the exit is not published before it.
                let id = task.id.clone();
                self.publish(Event::OutOfMemory { id });
            }
            is_news
        });
        if is_news {
            static LOGGED: Warnings = Warnings::new();
            LOGGED.warn(format_args!("{}: out of memory, {kills} killed", task.id));
        }
    }

    pub(crate) fn status_of(&self, waited: Result<i32, koya::Error>) -> u32 {
        match waited {
            Ok(status) => status as u32,
            Err(_) if self.was_stopped() => KILLED,
            Err(error) => {
                // The guest's console output does not belong in this log, except at debug level.
                log::debug!("{error}");
                log::error!("the virtual machine ended by itself");
                LOST
            }
        }
    }

    /// Handles the end of the init process. If its task owns the sandbox, the virtual machine ends too.
    pub(crate) fn end(&self, task: &Task, exit: Exit) {
        if !task
            .init
            .ended(exit, || self.publish_exit(task, String::new(), exit))
        {
            return;
        }
        self.notify();
        if !task.is_member() {
            self.stop();
        }
    }

    /// Handles the end of an exec process.
    pub(crate) fn end_exec(&self, task: &Task, exec: &Exec, exit: Exit) {
        let publish = || self.publish_exit(task, exec.id.clone(), exit);
        if exec.process.ended(exit, publish) {
            self.notify();
        }
    }

    fn publish_exit(&self, task: &Task, exec_id: String, exit: Exit) {
        self.publish(Event::Exited {
            id: task.id.clone(),
            exec_id,
            pid: task.pid(),
            exit,
        });
    }

    /// Waits until a process has ended: the init process, if `exec_id` is empty.
    ///
    /// # Errors
    /// If there is no such process, or it is deleted without having run.
    pub fn wait(&self, id: &str, exec_id: &str) -> Result<Exit, Error> {
        let task = self.task(id)?;
        let process = self.process(&task, exec_id)?;
        let mut state = self.lock();
        loop {
            if let Some(exit) = process.exit() {
                return Ok(exit);
            }
            if state.entry(&task).is_none() {
                return Err(Error::NotFound(format!("container {id}")));
            }
            if let ProcessOf::Exec(exec) = &process
                && !state.execs(&task).iter().any(|own| Arc::ptr_eq(own, exec))
            {
                return Err(Error::NotFound(format!(
                    "process {exec_id} of container {id}"
                )));
            }
            state = state.wait(&self.changed);
        }
    }

    /// Deletes a task or an exec process, which must have ended or never run. Returns the PID on the host that represented
    /// the task, and the exit of the process.
    ///
    /// # Errors
    /// If it runs.
    pub fn delete(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<(u32, Exit), Error> {
        let task = self.task(id)?;
        let _turn = self.turn_to_delete(&task)?;
        let process = self.process(&task, exec_id)?;
        process.status().allow(Action::Delete)?;
        if !exec_id.is_empty() {
            self.change(|state| {
                let entry = state.entry(&task);
                entry.and_then(|entry| entry.execs.remove(exec_id))
            });
            return Ok((task.pid(), process.exit().unwrap_or_else(never_started)));
        }
        if process.status() == Status::Created
            && let Some(container) = task.container()
        {
            container.kill(false).ok();
            self.wait_for(self.timeouts.kill, |_| process.exit());
        }
        let exit = process.exit().unwrap_or_else(never_started);
        // Wakes those who wait for a process that never ran.
        if process.ended(exit, || ()) {
            self.notify();
        }
        self.undo(&task);
        self.publish(Event::Deleted {
            id: task.id.clone(),
            pid: task.pid(),
            exit,
        });
        Ok((task.pid(), exit))
    }
}

/// The status of a process that could not be started: that of a shell if the program is at fault.
pub(crate) fn failed_status(error: &Error) -> u32 {
    match error {
        Error::Failed(error) => match error.downcast_ref() {
            Some(koya::Error::NotExecutable { status, .. }) => *status as u32,
            _ => LOST,
        },
        _ => LOST,
    }
}

fn never_started() -> Exit {
    Exit::now(KILLED)
}
