//! containerd's task API, version 2, over ttrpc.
//!
//! Quick requests are answered at once, and must be: containerd gives State two seconds. Requests that call the guest or the
//! host run on a separate thread, so that they complete even if containerd goes away: the library then drops the reply.

use crate::events::{any, timestamp};
use crate::metrics;
use crate::options::settings;
use anyhow::{Context, Result, anyhow};
use async_trait::async_trait;
use containerd_shim_protos::api::{
    self, CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse,
    CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty,
    ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse, ProcessInfo,
    ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim_async::{Task, create_task};
use koya::vmm::guest_text;
use koya::vmm::host::threads;
use koya_tasks::{
    CreateTask, Error, ExecTask, Mount, Spec, Status, StdioConfig, StdioPaths, TaskSet,
    read_process, read_resources,
};
use std::collections::HashMap;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use tokio::sync::Semaphore;
use ttrpc::Code;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, Service as TtrpcService, TtrpcContext};

/// The service name used by containerd since 1.6; the crate uses the name of containerd 2. Both have the same messages.
pub(crate) const SERVED_AS: &str = "containerd.task.v2.Task";
const GENERATED_AS: &str = "containerd.task.v3.Task";

/// Serves until the process ends.
pub(crate) fn run(listener: UnixListener, service: Service) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .thread_name("koya-call")
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut server = Server::new()
            .add_listener(Listener::try_from(listener)?)
            .register_service(services(service)?);
        server.start().await?;
        std::future::pending::<()>().await;
        Ok(())
    })
}

fn services(service: Service) -> Result<HashMap<String, TtrpcService>> {
    let mut services = create_task(Arc::new(service));
    let service = services
        .remove(GENERATED_AS)
        .context("the task service has another name")?;
    services.insert(SERVED_AS.into(), service);
    Ok(services)
}

/// State of the service.
pub(crate) struct Service {
    pub(crate) tasks: Arc<TaskSet>,
    /// The operations that may still begin.
    pending: Arc<Semaphore>,
    /// Ends the shim.
    pub(crate) end: Sender<()>,
}

/// Maximum number of operations in progress, not counting those that end processes. Below the number of threads of tokio's
/// pool, for which further ones would wait in line.
const MAX_CALLS: usize = 256;

impl Service {
    /// A service of these tasks; `end` ends the shim.
    pub(crate) fn new(tasks: Arc<TaskSet>, end: Sender<()>) -> Self {
        Self {
            tasks,
            pending: Arc::new(Semaphore::new(MAX_CALLS)),
            end,
        }
    }
}

/// Converts an error to the codes of containerd's clients, which show its text on terminals: it may contain words of an image.
fn to_ttrpc_error(error: Error) -> ttrpc::Error {
    let code = match &error {
        Error::NotFound(_) | Error::Finished(_) => Code::NOT_FOUND,
        Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
        Error::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
        Error::Unsupported(_) => Code::UNIMPLEMENTED,
        Error::Failed(_) => Code::UNKNOWN,
    };
    let text = guest_text::sanitize(error.to_string());
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, text))
}

impl Service {
    /// Runs a blocking operation. Only so many are in progress: a guest that does not answer prolongs each of them, and
    /// clients that have gone away do not end theirs.
    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<TaskSet>) -> Result<T, Error> + Send + 'static,
    ) -> ttrpc::Result<T> {
        let (tasks, pending) = (self.tasks.clone(), self.pending.clone());
        let Ok(permit) = pending.try_acquire_owned() else {
            let error = anyhow!("{MAX_CALLS} requests are in progress already: try again later");
            return reply(Err(Error::Failed(error)));
        };
        let work = move || {
            let _permit = permit;
            work(&tasks)
        };
        let done = tokio::task::spawn_blocking(work).await;
        reply(done.unwrap_or_else(|error| Err(Error::Failed(error.into()))))
    }

    /// As [`work`](Self::work), on a thread of its own: what ends a container must not wait for what it is to end.
    async fn end_with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<TaskSet>) -> Result<T, Error> + Send + 'static,
    ) -> ttrpc::Result<T> {
        let tasks = self.tasks.clone();
        let (sender, answer) = tokio::sync::oneshot::channel();
        let started = threads::spawn("koya-call", move || {
            sender.send(work(&tasks)).ok();
        });
        if let Err(error) = started {
            return reply(Err(Error::Failed(error.into())));
        }
        let done = answer.await;
        reply(done.unwrap_or_else(|error| Err(Error::Failed(error.into()))))
    }
}

/// Converts the result of an operation.
fn reply<T>(done: Result<T, Error>) -> ttrpc::Result<T> {
    if let Err(error) = &done {
        log::debug!("{error}");
    }
    done.map_err(to_ttrpc_error)
}

/// The task to create, from a request.
fn task_of(request: CreateTaskRequest, namespace: &str) -> Result<CreateTask, Error> {
    if !request.checkpoint.is_empty() {
        return Err(Error::Unsupported("checkpoints are not supported"));
    }
    let bundle = PathBuf::from(request.bundle);
    let spec = Spec::read_of(&bundle, namespace)?;
    let settings = settings(request.options.as_ref())?;
    let mounts = request.rootfs.into_iter().map(|mount| Mount {
        kind: mount.type_,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    });
    Ok(CreateTask {
        id: request.id,
        bundle,
        spec,
        mounts: mounts.collect(),
        stdio: StdioConfig::Paths(StdioPaths {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        }),
        notify: None,
        joins: None,
        settings,
    })
}

/// The exec process to add, from a request.
fn exec_of(request: ExecProcessRequest) -> Result<ExecTask, Error> {
    let spec = request.spec.as_ref();
    let spec = spec.ok_or_else(|| anyhow!("the request has no process"))?;
    Ok(ExecTask {
        process: read_process(&spec.value)?,
        id: request.id,
        exec_id: request.exec_id,
        stdio: StdioConfig::Paths(StdioPaths {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        }),
        cgroup: None,
    })
}

#[async_trait]
impl Task for Service {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let state = self.tasks.state(&request.id, &request.exec_id);
        let state = state.map_err(to_ttrpc_error)?;
        let status = match state.status {
            Status::Created => api::Status::CREATED,
            Status::Running => api::Status::RUNNING,
            Status::Paused => api::Status::PAUSED,
            Status::Stopped => api::Status::STOPPED,
        };
        Ok(StateResponse {
            id: request.id,
            bundle: state.bundle.to_string_lossy().into_owned(),
            pid: state.pid,
            status: status.into(),
            stdin: state.stdio.stdin,
            stdout: state.stdio.stdout,
            stderr: state.stdio.stderr,
            terminal: state.stdio.terminal,
            exit_status: state.exit.map_or(0, |exit| exit.status),
            exited_at: state.exit.map(|exit| timestamp(exit.at)).into(),
            exec_id: request.exec_id,
            ..Default::default()
        })
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let pid = self
            .work(move |tasks| {
                let task = task_of(request, tasks.namespace())?;
                tasks.create(task)
            })
            .await?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let pid = self
            .work(move |tasks| tasks.start(&request.id, &request.exec_id))
            .await?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        let (pid, exit) = self
            .end_with(move |tasks| tasks.delete(&request.id, &request.exec_id))
            .await?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let process = ProcessInfo {
            pid: self.tasks.pid(&request.id).map_err(to_ttrpc_error)?,
            ..Default::default()
        };
        Ok(PidsResponse {
            processes: vec![process],
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.work(move |tasks| tasks.pause(&request.id)).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.work(move |tasks| tasks.resume(&request.id)).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(to_ttrpc_error(Error::Unsupported(
            "checkpoints are not supported",
        )))
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        self.end_with(move |tasks| {
            tasks.kill(&request.id, &request.exec_id, request.signal, request.all)
        })
        .await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let added = exec_of(request).and_then(|exec| self.tasks.exec(exec));
        added.map_err(to_ttrpc_error)?;
        Ok(Empty::new())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        self.work(move |tasks| {
            tasks.resize(&request.id, &request.exec_id, request.height, request.width)
        })
        .await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        if request.stdin {
            let closed = self.tasks.close_stdin(&request.id, &request.exec_id);
            closed.map_err(to_ttrpc_error)?;
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        self.work(move |tasks| {
            let resources = request
                .resources
                .as_ref()
                .context("there are no resources")?;
            let resources = read_resources(&resources.value)?;
            tasks.update(&request.id, &resources)
        })
        .await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let watch = self.tasks.watch(&request.id, &request.exec_id);
        let exit = watch.map_err(to_ttrpc_error)?.wait().await;
        let gone = || to_ttrpc_error(Error::NotFound(format!("container {}", request.id)));
        let exit = exit.ok_or_else(gone)?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.work(move |tasks| tasks.stats(&request.id)).await?;
        let stats = any(metrics::NAME, &metrics::metrics(&stats))
            .map_err(|error| to_ttrpc_error(error.into()))?;
        Ok(StatsResponse {
            stats: Some(stats).into(),
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        let task_pid = self.tasks.pid(&request.id).unwrap_or(0);
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        if self.tasks.is_empty() {
            self.end.send(()).ok();
        }
        Ok(Empty::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_no_control_characters() {
        let words = "no user a\x1b]0;title\x07b\u{9b}2J\u{202e}c";
        let ttrpc::Error::RpcStatus(status) = to_ttrpc_error(Error::NotFound(words.into())) else {
            panic!("another kind of error");
        };
        assert_eq!(status.code(), Code::NOT_FOUND);
        assert_eq!(status.message, "no user abc: not found");
    }
}
