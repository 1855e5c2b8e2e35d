//! Processes that are added to a container that runs.

use crate::io::{Paths, Pumps};
use crate::pod::{Pod, ProcOf, SIGKILL, Task, failed_status};
use crate::sync::{lock, spawn};
use crate::task::{Handle, Proc, Refusal, Status, Wish};
use anyhow::Context;
use containerd_shim_protos::api::ExecProcessRequest;
use containerd_shim_protos::events::task::{TaskExecAdded, TaskExecStarted};
use containerd_shim_protos::topics;
use koya::oci_spec::runtime as oci;
use std::sync::Arc;
use std::time::SystemTime;

/// A process that was added to a container.
pub(crate) struct Further {
    pub(crate) proc: Proc,
    process: oci::Process,
}

impl Pod {
    pub(crate) fn exec(&self, request: &ExecProcessRequest) -> Result<(), Refusal> {
        let task = self.task(&request.id)?;
        task.first.status().allow(Wish::Use)?;
        let spec = request
            .spec
            .as_ref()
            .context("the request has no process")?;
        let process: oci::Process =
            serde_json::from_slice(&spec.value).context("the process is broken")?;
        let further = Further {
            proc: Proc::new(Paths {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
            }),
            process,
        };
        let name = request.exec_id.clone();
        {
            let mut all = lock(&task.further);
            if name.is_empty() || name == task.id || all.contains_key(&name) {
                return Err(Refusal::Exists(format!("process {name:?}")));
            }
            all.insert(name.clone(), Arc::new(further));
        }
        let event = TaskExecAdded {
            container_id: task.id.clone(),
            exec_id: name,
            ..Default::default()
        };
        self.events
            .publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        Ok(())
    }

    pub(crate) fn start_further(
        self: &Arc<Self>,
        task: &Arc<Task>,
        name: &str,
    ) -> Result<(), Refusal> {
        let ProcOf::Further(further) = task.proc(name)? else {
            return Ok(());
        };
        further.proc.status().allow(Wish::Start)?;
        // In one that is paused it would never come to its start.
        task.first.status().allow(Wish::Use)?;
        let launched = self.launch(task, name, &further);
        let (process, pumps) = match launched {
            Ok(launched) => launched,
            Err(error) => {
                // Who waits for it already hears of it.
                further.proc.ended(failed_status(&error), SystemTime::now());
                return Err(error);
            }
        };
        further
            .proc
            .made(Handle::Further(process.clone()), pumps.clone());
        if let Err(error) = further.proc.status().allow(Wish::Start) {
            // It was killed while it was made.
            process.signal(SIGKILL as i32).ok();
            spawn("koya-wait", move || drop(process.wait()))?;
            return Err(error);
        }
        further.proc.set_status(Status::Running);
        let event = TaskExecStarted {
            container_id: task.id.clone(),
            exec_id: name.into(),
            pid: task.pid(),
            ..Default::default()
        };
        self.events
            .publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
        let (pod, task, name) = (self.clone(), task.clone(), name.to_owned());
        spawn("koya-wait", move || {
            let status = pod.status_of(process.wait());
            let at = SystemTime::now();
            pumps.finish();
            if further.proc.ended(status, at) {
                pod.publish_exit(&task, &name, status, at);
            }
        })?;
        Ok(())
    }

    fn launch(
        &self,
        task: &Task,
        name: &str,
        further: &Further,
    ) -> Result<(Arc<koya::Process>, Arc<Pumps>), Refusal> {
        let container = task.running()?;
        let paths = &further.proc.paths;
        let io = paths.open(name, &self.namespace)?;
        let mut process = further.process.clone();
        process.set_terminal(Some(paths.terminal));
        let mut process = container.exec_oci(name, &process, paths.stdio())?;
        let pumps = io.connect(&mut process)?;
        Ok((Arc::new(process), Arc::new(pumps)))
    }
}
