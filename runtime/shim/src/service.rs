//! containerd's task API, version 2, over ttrpc.
//!
//! What is quick is answered at once, and must be: containerd gives State two seconds. What asks the guest
//! or the host runs on a thread of its own, so that it is finished even if containerd goes away: the
//! library drops an answer that nobody waits for any more.

use crate::events::{any, timestamp};
use crate::metrics;
use crate::pod::{Pod, pid};
use crate::task::{Refusal, Status};
use anyhow::{Context, Result};
use async_trait::async_trait;
use containerd_shim_protos::api::{
    self, CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse,
    CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty,
    ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse, ProcessInfo,
    ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim_async::{Task, create_task};
use std::collections::HashMap;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use ttrpc::Code;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, Service as TtrpcService, TtrpcContext};

/// The service as containerd from 1.6 on calls it, and as the crate names it, which follows containerd 2;
/// the two have the same messages.
pub(crate) const SERVED_AS: &str = "containerd.task.v2.Task";
const GENERATED_AS: &str = "containerd.task.v3.Task";

/// Serves until the process ends.
pub(crate) fn run(listener: UnixListener, pod: Arc<Pod>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut server = Server::new()
            .add_listener(Listener::try_from(listener)?)
            .register_service(services(pod)?);
        server.start().await?;
        std::future::pending::<()>().await;
        Ok(())
    })
}

fn services(pod: Arc<Pod>) -> Result<HashMap<String, TtrpcService>> {
    let mut services = create_task(Arc::new(Service { pod }));
    let service = services
        .remove(GENERATED_AS)
        .context("the task service has another name")?;
    services.insert(SERVED_AS.into(), service);
    Ok(services)
}

struct Service {
    pod: Arc<Pod>,
}

impl From<Refusal> for ttrpc::Error {
    fn from(refusal: Refusal) -> Self {
        let code = match &refusal {
            Refusal::NotFound(_) | Refusal::Finished(_) => Code::NOT_FOUND,
            Refusal::Exists(_) => Code::ALREADY_EXISTS,
            Refusal::Precondition(_) => Code::FAILED_PRECONDITION,
            Refusal::Unsupported(_) => Code::UNIMPLEMENTED,
            Refusal::Failed(_) => Code::UNKNOWN,
        };
        ttrpc::Error::RpcStatus(ttrpc::get_status(code, refusal.to_string()))
    }
}

impl Service {
    /// Does what may take its time.
    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<Pod>) -> Result<T, Refusal> + Send + 'static,
    ) -> ttrpc::Result<T> {
        let pod = self.pod.clone();
        let done = tokio::task::spawn_blocking(move || work(&pod)).await;
        let done = done.unwrap_or_else(|error| Err(Refusal::Failed(error.into())));
        if let Err(error) = &done {
            log::debug!("{error}");
        }
        Ok(done?)
    }
}

#[async_trait]
impl Task for Service {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let task = self.pod.task(&request.id)?;
        let proc = task.proc(&request.exec_id)?;
        let status = match proc.status() {
            Status::Created => api::Status::CREATED,
            Status::Running => api::Status::RUNNING,
            Status::Paused => api::Status::PAUSED,
            Status::Stopped => api::Status::STOPPED,
        };
        let exit = proc.exit();
        Ok(StateResponse {
            id: request.id,
            bundle: task.bundle.to_string_lossy().into_owned(),
            pid: task.pid(),
            status: status.into(),
            stdin: proc.paths.stdin.clone(),
            stdout: proc.paths.stdout.clone(),
            stderr: proc.paths.stderr.clone(),
            terminal: proc.paths.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| timestamp(exit.at)).into(),
            exec_id: request.exec_id,
            ..Default::default()
        })
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let pid = self.work(move |pod| pod.create(&request)).await?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let pid = self
            .work(move |pod| pod.start(&request.id, &request.exec_id))
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
            .work(move |pod| pod.delete(&request.id, &request.exec_id))
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
            pid: self.pod.task(&request.id)?.pid(),
            ..Default::default()
        };
        Ok(PidsResponse {
            processes: vec![process],
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.work(move |pod| pod.pause(&request.id)).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.work(move |pod| pod.resume(&request.id)).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(Refusal::Unsupported("checkpoints are not supported").into())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        self.work(move |pod| pod.kill(&request.id, &request.exec_id, request.signal, request.all))
            .await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        self.pod.exec(&request)?;
        Ok(Empty::new())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        self.work(move |pod| {
            pod.resize(&request.id, &request.exec_id, request.height, request.width)
        })
        .await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        if request.stdin {
            self.pod.close_stdin(&request.id, &request.exec_id)?;
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        self.work(move |pod| {
            let resources = request
                .resources
                .as_ref()
                .context("there are no resources")?;
            pod.update(&request.id, &resources.value)
        })
        .await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let task = self.pod.task(&request.id)?;
        let mut ended = task.proc(&request.exec_id)?.watch();
        let exit = match ended.wait_for(Option::is_some).await {
            Ok(exit) => *exit,
            Err(_) => None,
        };
        let gone = || Refusal::NotFound(format!("container {}", request.id));
        let exit = exit.ok_or_else(gone)?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.work(move |pod| pod.stats(&request.id)).await?;
        let stats = any(metrics::NAME, &metrics::metrics(&stats)).map_err(Refusal::Failed)?;
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
        let task_pid = self.pod.task(&request.id).map_or(0, |task| task.pid());
        Ok(ConnectResponse {
            shim_pid: pid(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.pod.shutdown();
        Ok(Empty::new())
    }
}
