//! Exec processes: processes added to a running container.

use crate::Error;
use crate::event::Event;
use crate::lifecycle::failed_status;
use crate::machine::GuestProcess;
use crate::process::{Action, Exit, Handle, Process, Status};
use crate::relay::Relay;
use crate::set::{SIGKILL, Task, TaskSet};
use crate::stdio::StdioConfig;
use crate::sync::spawn;
use koya::oci_spec::runtime as oci;
use koya::{ErrorKind, ExecOptions};
use std::sync::Arc;
use std::time::Duration;

/// Time between the moment when the guest takes no more processes for a container that was killed, and the report of its end.
const ENDING: Duration = Duration::from_secs(1);

/// A request to add a process to a task.
pub struct ExecTask {
    /// The task.
    pub id: String,
    /// ID of the process, unique in the task.
    pub exec_id: String,
    /// The process in OCI form.
    pub process: oci::Process,
    /// Its streams.
    pub stdio: StdioConfig,
    /// Its control group, as a path below the container's (see [`koya::ExecOptions`]).
    pub cgroup: Option<String>,
}

/// An exec process of a task.
pub(crate) struct Exec {
    pub(crate) id: String,
    pub(crate) process: Process,
    spec: oci::Process,
    cgroup: Option<String>,
}

impl TaskSet {
    /// Adds a process to a task, which [`start`](Self::start) runs.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`], or if the task has ended.
    pub fn exec(&self, request: ExecTask) -> Result<(), Error> {
        let task = self.task(&request.id)?;
        Self::check_usable(&task)?;
        let id = request.exec_id;
        let exec = Exec {
            id: id.clone(),
            process: Process::new(request.stdio),
            spec: request.process,
            cgroup: request.cgroup,
        };
        self.change(|state| {
            let missing = || Error::NotFound(format!("container {}", task.id));
            let execs = &mut state.entry(&task).ok_or_else(missing)?.execs;
            if id.is_empty() || id == task.id || execs.contains_key(&id) {
                return Err(Error::AlreadyExists(format!("process {id:?}")));
            }
            execs.insert(id.clone(), Arc::new(exec));
            // Published under the lock, so that the start of the process is not published first.
            self.publish(Event::ExecAdded {
                id: task.id.clone(),
                exec_id: id,
            });
            Ok(())
        })?;
        Ok(())
    }

    pub(crate) fn start_exec(
        self: &Arc<Self>,
        task: &Arc<Task>,
        exec_id: &str,
    ) -> Result<(), Error> {
        let exec = self.exec_process(task, exec_id)?;
        exec.process.status().allow(Action::Start)?;
        // In a paused container it would never start.
        Self::check_usable(task)?;
        let (process, relay) = match self.launch(task, &exec) {
            Ok(launched) => launched,
            Err(error) => {
                let error = self.unless_ended(task, error);
                // Waiting clients get this status with the reply.
                if exec.process.ended(Exit::now(failed_status(&error)), || ()) {
                    self.notify();
                }
                return Err(error);
            }
        };
        let handle = Handle::Exec(process.clone());
        exec.process.mark_created(handle, relay.clone());
        if let Err(error) = exec.process.start() {
            // It was killed while it was being created.
            process.signal(SIGKILL as i32).ok();
            spawn("koya-wait", move || {
                process.wait().ok();
                relay.finish();
            })?;
            return Err(error);
        }
        let event = Event::ExecStarted {
            id: task.id.clone(),
            exec_id: exec_id.into(),
            pid: task.pid(),
        };
        relay.listen();
        if let Some(exit) = exec.process.started(|| self.publish(event)) {
            self.end_exec(task, &exec, exit);
        }
        let (set, task) = (self.clone(), task.clone());
        spawn("koya-wait", move || {
            let exit = Exit::now(set.status_of(process.wait()));
            relay.finish();
            set.end_exec(&task, &exec, exit);
        })?;
        Ok(())
    }

    fn launch(
        self: &Arc<Self>,
        task: &Arc<Task>,
        exec: &Exec,
    ) -> Result<(Arc<dyn GuestProcess>, Arc<Relay>), Error> {
        let container = match task.is_pod() {
            true => task.running()?,
            // It may be the first process in the container.
            false => self.ensure_created(task)?,
        };
        exec.process
            .open_streams(&exec.id, &self.config.namespace)?;
        let mut spec = exec.spec.clone();
        spec.set_terminal(Some(exec.process.paths.terminal));
        let options = ExecOptions {
            streams: exec.process.wanted.clone(),
            cgroup: exec.cgroup.clone(),
        };
        let (process, streams) = container.exec(&exec.id, &spec, &options)?;
        let relay = exec.process.take_io().connect(streams)?;
        Ok((process, Arc::new(relay)))
    }

    /// The error for a process that could not be added: if the container has ended meanwhile, that is the reason. The guest
    /// says that it has, or is gone, before the end is known here.
    fn unless_ended(&self, task: &Task, error: Error) -> Error {
        let Error::Failed(cause) = &error else {
            return error;
        };
        let kind = cause.downcast_ref().map(koya::Error::kind);
        if !matches!(kind, Some(ErrorKind::GuestEnded | ErrorKind::NoProcess)) {
            return error;
        }
        let has_ended = || task.init.status() == Status::Stopped;
        match self.wait_for(ENDING, |_| has_ended().then_some(())) {
            Some(()) => Error::FailedPrecondition("cannot exec in a stopped container".into()),
            None => error,
        }
    }
}
