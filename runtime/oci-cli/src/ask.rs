//! What commands ask a sandbox's process, and its answers: lines of JSON over the socket in the container's
//! directory. A connection is one request.

use crate::logging;
use crate::preserved::Count;
use crate::state::{Container, Status};
use anyhow::{Context, Result, bail};
use koya_tasks::Joins;
use koya_tasks::wire::{Wire, send};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// How long a status may take, which waits for nothing.
const STATUS_LIMIT: Duration = Duration::from_secs(5);

/// The first line that a sandbox's process gets, from the command that made it. Beside it: the streams of the
/// container's process, or the connection that its terminal is sent to.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Boot {
    pub(crate) id: String,
    pub(crate) directory: PathBuf,
    pub(crate) bundle: PathBuf,
    pub(crate) is_terminal: bool,
    /// Whether the terminal is this user's own, in the foreground.
    pub(crate) is_own_terminal: bool,
    /// Further descriptors that came last.
    pub(crate) preserved: Count,
    /// The container whose virtual machine it joins.
    pub(crate) joins: Option<Joins>,
    pub(crate) log: logging::Config,
}

/// What a command asks, and of which of the virtual machine's containers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Asked {
    pub(crate) id: String,
    pub(crate) request: Request,
}

/// What a container is made of that joins the virtual machine. Its streams are beside it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Create {
    pub(crate) bundle: PathBuf,
    pub(crate) joins: Joins,
    pub(crate) is_own_terminal: bool,
    pub(crate) preserved: Count,
}

/// What a command asks.
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
    /// Say each time that processes were killed for lack of memory.
    Ooms,
    /// Make a container. Sizes of its terminal and signals follow; without who asked for it, it is killed.
    Create(Create),
    /// Run a process; its streams are beside this. Sizes of its terminal and signals follow; without who asked for
    /// it, it is killed.
    Exec {
        process: serde_json::Value,
        is_own_terminal: bool,
        preserved: Count,
        cgroup: Option<String>,
    },
    Resize(u32, u32),
    Signal(u32),
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    Status(Status),
    Stats(serde_json::Value),
    /// Processes were killed for lack of memory.
    Oom,
    /// An exec process runs; its end follows.
    Started,
    /// The end of an exec process, or of a container's.
    Ended(u32),
    /// It was done. Of a new sandbox: its process is where it belongs, and next it is ready.
    Done,
    Failed(String),
}

/// One request and its one answer.
///
/// # Errors
/// If there is no answer, or why it was not done.
pub(crate) fn ask(container: &Container, request: Request) -> Result<Answer> {
    let stream = container.connect()?;
    if matches!(request, Request::Status) {
        stream.set_read_timeout(Some(STATUS_LIMIT))?;
    }
    send(&stream, &container.asked(request), &[])?;
    hear(&mut Wire::new(stream))
}

/// The next answer.
///
/// # Errors
/// If there is none, or why it was not done.
pub(crate) fn hear(wire: &mut Wire) -> Result<Answer> {
    let answer = wire
        .receive()
        .context("the container's process does not answer")?;
    match answer.context("the container's process has ended")?.0 {
        Answer::Failed(reason) => bail!("{reason}"),
        answer => Ok(answer),
    }
}
