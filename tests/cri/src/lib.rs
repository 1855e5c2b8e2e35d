//! A client of Kubernetes' Container Runtime Interface (CRI) in place of the kubelet: typed calls over gRPC on a Unix
//! socket, and the streams of exec, attach and port forward over WebSocket.
//!
//! All calls block, and return the same data as the kubelet would receive.

use anyhow::{Context, Result, bail};
use hyper_util::rt::TokioIo;
pub use k8s_cri::v1;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

mod stream;
pub use stream::{Forward, Streamed};

/// Time limit for a call.
const LIMIT: Duration = Duration::from_secs(120);

/// A connection to a CRI server's runtime service.
pub struct Cri {
    runtime: tokio::runtime::Runtime,
    client: RuntimeServiceClient<Channel>,
}

impl Cri {
    /// Connects to the server behind a Unix socket.
    ///
    /// # Errors
    /// If there is no server on the socket.
    pub fn connect(socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let path: PathBuf = socket.into();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
        });
        let channel = runtime.block_on(async {
            // Only for the HTTP header; never resolved.
            let endpoint = Endpoint::try_from("http://cri.invalid")?.timeout(LIMIT);
            endpoint.connect_with_connector(connector).await
        });
        let channel = channel.with_context(|| format!("nobody serves {}", socket.display()))?;
        Ok(Self {
            runtime,
            client: RuntimeServiceClient::new(channel),
        })
    }

    /// One call: `cri.call(async |client| client.version(VersionRequest::default()).await)`.
    ///
    /// # Errors
    /// The error from the server.
    pub fn call<T, F>(&self, call: impl FnOnce(RuntimeServiceClient<Channel>) -> F) -> Result<T>
    where
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let answer = self.runtime.block_on(call(self.client.clone()));
        match answer {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) => bail!("{}: {}", status.code(), status.message()),
        }
    }

    /// Starts a pod and returns its ID.
    ///
    /// # Errors
    /// The error from the server.
    pub fn run_pod(&self, config: &v1::PodSandboxConfig, handler: &str) -> Result<String> {
        let request = v1::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.into(),
        };
        let answer = self.call(|mut c| async move { c.run_pod_sandbox(request).await })?;
        Ok(answer.pod_sandbox_id)
    }

    /// Returns the status of a pod.
    ///
    /// # Errors
    /// The error from the server.
    pub fn pod_status(&self, pod: &str) -> Result<v1::PodSandboxStatus> {
        let request = v1::PodSandboxStatusRequest {
            pod_sandbox_id: pod.into(),
            verbose: false,
        };
        let answer = self.call(|mut c| async move { c.pod_sandbox_status(request).await })?;
        answer.status.context("a status without a status")
    }

    /// Stops and removes a pod with its containers.
    ///
    /// # Errors
    /// The error from the server.
    pub fn remove_pod(&self, pod: &str) -> Result<()> {
        let pod_sandbox_id = pod.to_owned();
        let stop = v1::StopPodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
        };
        self.call(|mut c| async move { c.stop_pod_sandbox(stop).await })?;
        let remove = v1::RemovePodSandboxRequest { pod_sandbox_id };
        self.call(|mut c| async move { c.remove_pod_sandbox(remove).await })?;
        Ok(())
    }

    /// Creates a container in a pod and returns its ID.
    ///
    /// # Errors
    /// The error from the server.
    pub fn create(
        &self,
        pod: &str,
        pod_config: &v1::PodSandboxConfig,
        config: v1::ContainerConfig,
    ) -> Result<String> {
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: Some(config),
            sandbox_config: Some(pod_config.clone()),
        };
        let answer = self.call(|mut c| async move { c.create_container(request).await })?;
        Ok(answer.container_id)
    }

    /// Starts a container.
    ///
    /// # Errors
    /// The error from the server.
    pub fn start(&self, container: &str) -> Result<()> {
        let container_id = container.into();
        let request = v1::StartContainerRequest { container_id };
        self.call(|mut c| async move { c.start_container(request).await })
            .map(drop)
    }

    /// Stops a container: by its stop signal, and after `timeout` seconds by SIGKILL.
    ///
    /// # Errors
    /// The error from the server.
    pub fn stop(&self, container: &str, timeout: i64) -> Result<()> {
        let container_id = container.into();
        let request = v1::StopContainerRequest {
            container_id,
            timeout,
        };
        self.call(|mut c| async move { c.stop_container(request).await })
            .map(drop)
    }

    /// Removes a container.
    ///
    /// # Errors
    /// The error from the server.
    pub fn remove(&self, container: &str) -> Result<()> {
        let container_id = container.into();
        let request = v1::RemoveContainerRequest { container_id };
        self.call(|mut c| async move { c.remove_container(request).await })
            .map(drop)
    }

    /// Returns the status of a container.
    ///
    /// # Errors
    /// The error from the server.
    pub fn status(&self, container: &str) -> Result<v1::ContainerStatus> {
        let request = v1::ContainerStatusRequest {
            container_id: container.into(),
            verbose: false,
        };
        let answer = self.call(|mut c| async move { c.container_status(request).await })?;
        answer.status.context("a status without a status")
    }

    /// Returns the resource usage of a container.
    ///
    /// # Errors
    /// The error from the server.
    pub fn stats(&self, container: &str) -> Result<v1::ContainerStats> {
        let container_id = container.into();
        let request = v1::ContainerStatsRequest { container_id };
        let answer = self.call(|mut c| async move { c.container_stats(request).await })?;
        answer.stats.context("an answer without stats")
    }

    /// Changes the limits of a container.
    ///
    /// # Errors
    /// The error from the server.
    pub fn update(&self, container: &str, linux: v1::LinuxContainerResources) -> Result<()> {
        let request = v1::UpdateContainerResourcesRequest {
            container_id: container.into(),
            linux: Some(linux),
            ..Default::default()
        };
        self.call(|mut c| async move { c.update_container_resources(request).await })
            .map(drop)
    }

    /// Runs a command in a container, as a probe does; returns exit code and output.
    ///
    /// # Errors
    /// The error from the server.
    pub fn exec_sync(&self, container: &str, command: &[&str]) -> Result<v1::ExecSyncResponse> {
        let request = v1::ExecSyncRequest {
            container_id: container.into(),
            cmd: words(command),
            timeout: LIMIT.as_secs() as i64,
        };
        self.call(|mut c| async move { c.exec_sync(request).await })
    }

    /// Runs a command in a container with `input` as its standard input, over the server's streams.
    ///
    /// # Errors
    /// The error from the server, or a broken stream.
    pub fn exec(
        &self,
        container: &str,
        command: &[&str],
        tty: bool,
        input: &str,
    ) -> Result<Streamed> {
        let request = v1::ExecRequest {
            container_id: container.into(),
            cmd: words(command),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        let url = self.call(|mut c| async move { c.exec(request).await })?.url;
        let done = |streamed: &Streamed| streamed.status.is_some();
        self.runtime.block_on(stream::exchange(&url, input, done))
    }

    /// Attaches to the first process of a container, sends `input`, and reads until `done`.
    ///
    /// # Errors
    /// The error from the server, or a broken stream.
    pub fn attach(
        &self,
        container: &str,
        input: &str,
        done: impl Fn(&Streamed) -> bool,
    ) -> Result<Streamed> {
        let request = v1::AttachRequest {
            container_id: container.into(),
            stdin: true,
            tty: false,
            stdout: true,
            stderr: true,
        };
        let url = self
            .call(|mut c| async move { c.attach(request).await })?
            .url;
        self.runtime.block_on(stream::exchange(&url, input, done))
    }

    /// Opens a stream to a TCP port of a pod, sends `request`, and returns all data up to the end of the stream.
    ///
    /// # Errors
    /// The error from the server, or a broken stream.
    pub fn forward(&self, pod: &str, port: u16, request: &[u8]) -> Result<Forward> {
        let ask = v1::PortForwardRequest {
            pod_sandbox_id: pod.into(),
            port: vec![port.into()],
        };
        let url = self
            .call(|mut c| async move { c.port_forward(ask).await })?
            .url;
        self.runtime.block_on(stream::forward(&url, port, request))
    }
}

fn words(command: &[&str]) -> Vec<String> {
    command.iter().map(|word| (*word).to_owned()).collect()
}
