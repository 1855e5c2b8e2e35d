//! What comes to pass with tasks, for whoever wants to know.

use crate::mounts::Mount;
use crate::process::Exit;
use crate::stdio::StdioPaths;
use std::path::PathBuf;

/// Something that came to pass. `id` is the task's; `exec_id` names a process that was added to it, and is empty
/// for the init process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A task was made.
    Created {
        /// Which.
        id: String,
        /// Its bundle.
        bundle: PathBuf,
        /// The mounts that its root file system was made of.
        mounts: Vec<Mount>,
        /// Where the streams of its init process go.
        stdio: StdioPaths,
        /// The process on the host that stands for it.
        pid: u32,
    },
    /// Its init process runs.
    Started {
        /// Which.
        id: String,
        /// The process on the host that stands for it.
        pid: u32,
    },
    /// A process has ended.
    Exited {
        /// Of which task.
        id: String,
        /// Which process.
        exec_id: String,
        /// The process on the host that stands for the task.
        pid: u32,
        /// How.
        exit: Exit,
    },
    /// A task is gone.
    Deleted {
        /// Which.
        id: String,
        /// The process on the host that stood for it.
        pid: u32,
        /// How its init process had ended.
        exit: Exit,
    },
    /// The guest's kernel killed one of its processes for its memory.
    OutOfMemory {
        /// Which task.
        id: String,
    },
    /// Its processes were stopped where they are.
    Paused {
        /// Which task.
        id: String,
    },
    /// They go on.
    Resumed {
        /// Which task.
        id: String,
    },
    /// A process is known that is to run in it.
    ExecAdded {
        /// Which task.
        id: String,
        /// Which process.
        exec_id: String,
    },
    /// That process runs.
    ExecStarted {
        /// Which task.
        id: String,
        /// Which process.
        exec_id: String,
        /// The process on the host that stands for the task.
        pid: u32,
    },
}

/// Where events go.
///
/// They come in order: a start before the exit, exits of added processes before that of the init process, and the
/// deletion last.
pub trait EventSink: Send + Sync {
    /// Takes one. It is called with a lock held: it may neither wait nor ask the task set.
    fn send(&self, event: Event);
}
