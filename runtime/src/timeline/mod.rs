//! Timeline of a start: its steps and marks, on one clock.
//!
//! A [`Timeline`] is a snapshot of a start. The library does not draw it: `koya timeline` does, from files written by
//! [`TimelineFile`]; [`Sandbox::timeline`](crate::Sandbox::timeline) returns that of a running sandbox. Times are the host's; times
//! reported by the agent are relative to its connection as seen by the host.

mod recorder;
mod store;

use koya_vmm::Exits;
pub(crate) use recorder::Recorder;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::fmt;
use std::time::{Duration, Instant};
pub use store::{KEPT, all, directory};

/// Version of the file format.
pub const VERSION: u32 = 1;

/// The component that spends the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lane {
    /// Koya on the host.
    Host,
    /// The guest kernel.
    Kernel,
    /// The agent.
    Agent,
    /// A container; host, kernel and agent are all involved.
    Container,
}

/// A part of a start with a duration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Name: `prepare` (if the caller provides its start time), `devices`, `machine`, `kernel`, `agent`, `settings`; then
    /// `create` and `start` for each container.
    pub name: Cow<'static, str>,
    /// The component.
    pub lane: Lane,
    /// The container; empty for the sandbox itself.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub container: String,
    /// Start in microseconds.
    pub from_us: u64,
    /// End in microseconds; `None` while it is in progress.
    pub to_us: Option<u64>,
    /// The error, if it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Step {
    /// Duration; zero while it is in progress.
    pub fn took(&self) -> Duration {
        let to = self.to_us.unwrap_or(self.from_us);
        Duration::from_micros(to.saturating_sub(self.from_us))
    }
}

/// `kernel 1520.3 ms`
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:.1} ms", self.name, self.took().as_secs_f64() * 1e3)
    }
}

/// A point in time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineEvent {
    /// Name of the event.
    pub name: Cow<'static, str>,
    /// The component.
    pub lane: Lane,
    /// The container; empty for the sandbox itself.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub container: String,
    /// Time in microseconds.
    pub at_us: u64,
}

/// The start of a sandbox, and of its first containers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// [`VERSION`].
    pub version: u32,
    /// ID of the sandbox; empty without a [`TimelineFile`].
    pub id: String,
    /// Origin of all times: milliseconds since 1970.
    pub began_unix_ms: u64,
    /// Steps in order of their start.
    pub steps: Vec<Step>,
    /// Marks in order of time.
    pub marks: Vec<TimelineEvent>,
    /// Guest exits to this process until the agent had reported its start, if it did.
    pub exits: Option<ExitCounts>,
}

/// Number of exits from KVM_RUN to this process; exits that KVM handles itself are not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitCounts {
    /// For I/O ports.
    pub port: u64,
    /// For device memory.
    pub mmio: u64,
}

impl From<Exits> for ExitCounts {
    fn from(exits: Exits) -> Self {
        Self {
            port: exits.port,
            mmio: exits.mmio,
        }
    }
}

impl Timeline {
    /// The latest time in microseconds.
    pub fn total_us(&self) -> u64 {
        let steps = self.steps.iter().map(|s| s.to_us.unwrap_or(s.from_us));
        let marks = self.marks.iter().map(|mark| mark.at_us);
        steps.chain(marks).max().unwrap_or(0)
    }

    /// Time of the agent's connection in microseconds, if it has connected.
    pub fn ready_us(&self) -> Option<u64> {
        let agent = self.steps.iter().find(|s| s.lane == Lane::Agent);
        agent?.to_us
    }

    /// Time of the start of the first container's first process in microseconds, if one was started.
    pub fn started_us(&self) -> Option<u64> {
        let mut starts = self.steps.iter().filter(|s| s.name == "start");
        starts.find(|s| s.error.is_none())?.to_us
    }

    /// The last failed step, if any.
    pub fn failed(&self) -> Option<&Step> {
        self.steps.iter().rev().find(|step| step.error.is_some())
    }

    /// Whether it is the timeline of this sandbox, or has a container with this name.
    pub fn matches_id(&self, id: &str) -> bool {
        self.id == id || self.steps.iter().any(|step| step.container == id)
    }
}

/// Stores the timeline of a sandbox on the host, in one of at most [`KEPT`] files in [`directory`]: once its first container
/// has started, after each further one, at its end, and on a failure. Errors on storing it are ignored.
#[derive(Clone, Debug)]
pub struct TimelineFile {
    /// The file's name: letters, digits, `-`, `_` and `.`, at most 128, the first a letter or digit.
    /// An older timeline of this name is replaced.
    pub id: String,
    /// Start time of the caller, whose own work becomes the step `prepare`.
    pub began: Option<Instant>,
}
