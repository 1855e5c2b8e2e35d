//! Requests of commands to a sandbox's process, and its replies: lines of JSON over the socket in the container's
//! directory. Each connection carries one request.

use crate::logging;
use crate::preserved::Count;
use crate::source::Source;
use crate::state::{Container, Status};
use anyhow::{Context, Result, bail};
use koya_tasks::SandboxMembership;
use koya_tasks::wire::{Wire, send};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// Time limit for a status request, which does not block.
const STATUS_LIMIT: Duration = Duration::from_secs(5);

/// The first line to a sandbox's process, from the command that created it. Attached: the streams of the container's
/// process, or the connection for its terminal.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Boot {
    pub(crate) id: String,
    pub(crate) directory: PathBuf,
    pub(crate) bundle: PathBuf,
    pub(crate) source: Source,
    pub(crate) is_terminal: bool,
    /// Whether the terminal is the user's own, in the foreground.
    pub(crate) is_own_terminal: bool,
    /// Inherited descriptors, attached last.
    pub(crate) preserved: Count,
    /// Path in the container of its socket for notifications. The service manager's is attached after everything else.
    pub(crate) notify: Option<String>,
    /// The container whose virtual machine it joins.
    pub(crate) joins: Option<SandboxMembership>,
    /// Files to create if the container has an OOM kill.
    #[serde(default)]
    pub(crate) oom_files: Vec<PathBuf>,
    pub(crate) log: logging::Config,
}

/// A request of a command, and the container that it applies to.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ContainerRequest {
    pub(crate) id: String,
    pub(crate) request: Request,
}

/// A container that joins the virtual machine. Its streams are attached.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Create {
    /// The directory of its state, where its overlays are mounted.
    #[serde(default)]
    pub(crate) directory: PathBuf,
    pub(crate) bundle: PathBuf,
    #[serde(default)]
    pub(crate) source: Source,
    pub(crate) joins: SandboxMembership,
    pub(crate) is_own_terminal: bool,
    pub(crate) preserved: Count,
    /// As in [`Boot`].
    #[serde(default)]
    pub(crate) notify: Option<String>,
    /// Files to create if the container has an OOM kill.
    #[serde(default)]
    pub(crate) oom_files: Vec<PathBuf>,
}

/// A request of a command.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    Status,
    Start,
    Kill {
        signal: u32,
        all: bool,
    },
    Pause,
    Resume,
    Update(serde_json::Value),
    Stats,
    /// Report each OOM kill.
    Ooms,
    /// Report the container's messages to its service manager (whose socket is attached) until it is ready, or to its end.
    Notify {
        until_ready: bool,
    },
    /// Create a container. Sizes of its terminal and signals follow; if the connection breaks, it is killed.
    Create(Box<Create>),
    /// Run a process; its streams are attached. Sizes of its terminal and signals follow; if the connection breaks, it is
    /// killed.
    Exec {
        process: serde_json::Value,
        is_own_terminal: bool,
        preserved: Count,
        cgroup: Option<String>,
    },
    Resize(u32, u32),
    Signal(u32),
}

/// A reply.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Response {
    Status(Status),
    Stats(serde_json::Value),
    /// The OOM killer has killed processes.
    Oom,
    /// A message to the service manager.
    Notified(String),
    /// An exec process runs; its end follows.
    Started,
    /// Exit status of an exec process, or of a container's process.
    Ended(u32),
    /// Success. From a new sandbox: first its process is in its namespaces, then it is ready.
    Done,
    Failed(String),
}

/// Sends one request and returns its reply.
///
/// # Errors
/// If there is no reply, or the reason of a failure.
pub(crate) fn send_request(container: &Container, request: Request) -> Result<Response> {
    let stream = container.connect()?;
    if matches!(request, Request::Status) {
        stream.set_read_timeout(Some(STATUS_LIMIT))?;
    }
    send(&stream, &container.asked(request), &[])?;
    receive_response(&mut Wire::new(stream))
}

/// Receives the next reply.
///
/// # Errors
/// If there is none, or the reason of a failure.
pub(crate) fn receive_response(wire: &mut Wire) -> Result<Response> {
    let answer = wire
        .receive()
        .context("the container's process does not answer")?;
    match answer.context("the container's process has ended")?.0 {
        Response::Failed(reason) => bail!("{reason}"),
        answer => Ok(answer),
    }
}
