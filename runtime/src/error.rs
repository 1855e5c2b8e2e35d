//! What can go wrong, in terms of what was tried.

use crate::console::{Console, last_lines};
use koya_vmm::{AttachError, ConfigError, ExitReason, StartError};
use std::io;
use std::path::PathBuf;
use std::time::Duration;
use thiserror::Error;

/// How many lines of a guest that died are shown.
pub(crate) const LAST_WORDS: usize = 80;

/// Why a sandbox or container could not do what it was asked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// Kernel or agent are not where they are looked for.
    #[error("no {what} found; looked in: {}. Build it with `cargo xtask build`, or set {variable}",
        looked.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", "))]
    Missing {
        /// Guest kernel or agent.
        what: &'static str,
        /// The environment variable that names it.
        variable: &'static str,
        /// Every place.
        looked: Vec<PathBuf>,
    },
    /// The virtual machine's configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A disk of a running sandbox.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// A size that a running sandbox can't have.
    #[error("{asked} {what} are outside what this sandbox can have: {min} to {max}")]
    Size {
        /// CPUs or MiB of memory.
        what: &'static str,
        /// What was asked for.
        asked: u64,
        /// The least.
        min: u64,
        /// The most.
        max: u64,
    },
    /// The virtual machine.
    #[error("cannot start the virtual machine")]
    Start(#[from] StartError),
    /// The agent did not call.
    #[error(
        "the guest's agent did not connect within {waited:.1?}; the end of the guest's console:\n\
         {console}"
    )]
    AgentSilent {
        /// How long it was waited for.
        waited: Duration,
        /// What the guest printed last.
        console: String,
    },
    /// The virtual machine ended by itself.
    #[error("the virtual machine ended: {reason}; the guest's last words:\n{last_words}")]
    Ended {
        /// Why.
        reason: ExitReason,
        /// Its kernel's panic log if there is one, else the end of its console.
        last_words: String,
    },
    /// The container's program can't be found or run.
    #[error("{reason}")]
    NotExecutable {
        /// What a shell would exit with: 127 not found, 126 can't be run.
        status: i32,
        /// Which program, and why.
        reason: String,
    },
    /// The agent refused.
    #[error("cannot {operation}: {reason}")]
    Agent {
        /// What was asked.
        operation: &'static str,
        /// What it said.
        reason: String,
    },
    /// The process has ended, or there never was one.
    #[error("cannot {operation}: {reason}")]
    NoProcess {
        /// What was asked.
        operation: &'static str,
        /// What the agent said.
        reason: String,
    },
    /// The agent's connection has ended.
    #[error("cannot {operation}: the guest's agent has hung up")]
    HungUp {
        /// What was asked.
        operation: &'static str,
    },
    /// The agent did not answer.
    #[error("cannot {operation}: the guest's agent did not answer within {waited:.0?}")]
    Overdue {
        /// What was asked.
        operation: &'static str,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The settings of sandboxes.
    #[error("{place}: {reason}")]
    Settings {
        /// Which file or annotation.
        place: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A container's configuration.
    #[error("{field}: {reason}")]
    Container {
        /// Which field.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The host refused.
    #[error("cannot {operation}")]
    Host {
        /// What was tried.
        operation: String,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn ended(reason: ExitReason, console: &Console) -> Self {
        let last_words = match reason.log() {
            Some(log) => last_lines(log, LAST_WORDS),
            None => console.tail(LAST_WORDS),
        };
        Self::Ended { reason, last_words }
    }

    pub(crate) fn host(operation: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let operation = operation.into();
        move |source| Self::Host { operation, source }
    }

    pub(crate) fn container(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Container {
            field,
            reason: reason.into(),
        }
    }
}
