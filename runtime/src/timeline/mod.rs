//! Where the time of a start goes: its steps and marks, on one clock.
//!
//! A [`Timeline`] is a picture of a start so far. The library draws none by itself: `koya timeline`
//! does, of what [`Keep`] has had written down, and [`Sandbox::timeline`](crate::Sandbox::timeline)
//! has a living sandbox's. Times are the host's; what the agent tells of itself is put where the host
//! saw the agent connect.

mod recorder;
mod store;

use koya_vmm::Exits;
pub(crate) use recorder::Recorder;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::fmt;
use std::time::{Duration, Instant};
pub use store::{KEPT, all, directory};

/// The version of the format that timelines are written down in.
pub const VERSION: u32 = 1;

/// Who takes the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lane {
    /// Koya on the host.
    Host,
    /// The guest's kernel.
    Kernel,
    /// The agent.
    Agent,
    /// A container: host, kernel and agent all work for it.
    Container,
}

/// A part of a start that takes time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What was done: `prepare` (if the caller says when it began), `devices`, `machine`, `kernel`,
    /// `agent`, `settings`; then of each container `create` and `start`.
    pub name: Cow<'static, str>,
    /// Who did it.
    pub lane: Lane,
    /// Which container; empty for the sandbox itself.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub container: String,
    /// Its begin, in microseconds.
    pub from_us: u64,
    /// Its end, in microseconds; none while it is under way.
    pub to_us: Option<u64>,
    /// Why it failed, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Step {
    /// How long it took; nothing while it is under way.
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
pub struct Mark {
    /// What came to pass.
    pub name: Cow<'static, str>,
    /// By whom.
    pub lane: Lane,
    /// Which container; empty for the sandbox itself.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub container: String,
    /// When, in microseconds.
    pub at_us: u64,
}

/// The start of a sandbox, and of its first containers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// [`VERSION`].
    pub version: u32,
    /// Whose; empty if [`Keep`] did not say.
    pub id: String,
    /// Where all times count from: milliseconds since 1970.
    pub began_unix_ms: u64,
    /// In the order of their begins.
    pub steps: Vec<Step>,
    /// In the order of their times.
    pub marks: Vec<Mark>,
    /// How often the guest left for this process until the agent had told of its start, if it did.
    pub exits: Option<ExitCounts>,
}

/// How often the guest left KVM_RUN for this process: what KVM answers by itself is not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitCounts {
    /// For a port.
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
    /// The last time of all, in microseconds.
    pub fn total_us(&self) -> u64 {
        let steps = self.steps.iter().map(|s| s.to_us.unwrap_or(s.from_us));
        let marks = self.marks.iter().map(|mark| mark.at_us);
        steps.chain(marks).max().unwrap_or(0)
    }

    /// When the agent had connected, in microseconds, if it did.
    pub fn ready_us(&self) -> Option<u64> {
        let agent = self.steps.iter().find(|s| s.lane == Lane::Agent);
        agent?.to_us
    }

    /// When the first container's first process was let run, in microseconds, if one was.
    pub fn started_us(&self) -> Option<u64> {
        let mut starts = self.steps.iter().filter(|s| s.name == "start");
        starts.find(|s| s.error.is_none())?.to_us
    }

    /// The step that failed last, if one did.
    pub fn failed(&self) -> Option<&Step> {
        self.steps.iter().rev().find(|step| step.error.is_some())
    }

    /// Whether it is this sandbox's, or has a container of this name.
    pub fn is_of(&self, id: &str) -> bool {
        self.id == id || self.steps.iter().any(|step| step.container == id)
    }
}

/// Has a sandbox's timeline written down on the host, in the newest of [`KEPT`] files in [`directory`]:
/// once its first container has started, after each further one, at its end, and where something
/// fails. Where that can't be done it is not, and nothing else fails for it.
#[derive(Clone, Debug)]
pub struct Keep {
    /// The file's name: letters, digits, `-`, `_` and `.`, at most 128, the first a letter or digit.
    /// An older timeline of this name is replaced.
    pub id: String,
    /// When the caller began; its own work is the step `prepare` then.
    pub began: Option<Instant>,
}
