//! Events of tasks.

use crate::mounts::Mount;
use crate::process::Exit;
use crate::stdio::StdioPaths;
use std::path::PathBuf;

/// An event of a task. `id` is the task's; `exec_id` identifies an exec process, and is empty for the init process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A task was created.
    Created {
        /// ID of the task.
        id: String,
        /// Its bundle.
        bundle: PathBuf,
        /// The mounts of its root file system.
        mounts: Vec<Mount>,
        /// Streams of its init process.
        stdio: StdioPaths,
        /// The PID on the host that represents it.
        pid: u32,
    },
    /// Its init process was started.
    Started {
        /// ID of the task.
        id: String,
        /// The PID on the host that represents it.
        pid: u32,
    },
    /// A process has ended.
    Exited {
        /// ID of the task.
        id: String,
        /// ID of the process.
        exec_id: String,
        /// The PID on the host that represents the task.
        pid: u32,
        /// Exit status and time.
        exit: Exit,
    },
    /// A task was deleted.
    Deleted {
        /// ID of the task.
        id: String,
        /// The PID on the host that represented it.
        pid: u32,
        /// Exit of its init process.
        exit: Exit,
    },
    /// The guest's OOM killer killed one of its processes.
    OutOfMemory {
        /// ID of the task.
        id: String,
    },
    /// Its processes were frozen.
    Paused {
        /// ID of the task.
        id: String,
    },
    /// They were thawed.
    Resumed {
        /// ID of the task.
        id: String,
    },
    /// An exec process was added.
    ExecAdded {
        /// ID of the task.
        id: String,
        /// ID of the process.
        exec_id: String,
    },
    /// An exec process was started.
    ExecStarted {
        /// ID of the task.
        id: String,
        /// ID of the process.
        exec_id: String,
        /// The PID on the host that represents the task.
        pid: u32,
    },
}

/// Receiver of events.
///
/// Events arrive in order: a start before the exit, exits of exec processes before that of the init process, and the
/// deletion last.
pub trait EventSink: Send + Sync {
    /// Receives an event. Called with a lock held, so it must neither block nor call the task set.
    fn send(&self, event: Event);
}
