//! Errors of the library.

use crate::console::{Console, last_lines};
use koya_vmm::{AttachError, ConfigError, ExitReason, StartError};
use std::io;
use std::path::PathBuf;
use std::time::Duration;
use thiserror::Error;

/// Number of console lines of a dead guest that are shown.
pub(crate) const LAST_WORDS: usize = 80;

/// Errors of sandboxes and containers.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// Kernel or agent was not found in any of the searched places.
    #[error("no {what} found; looked in: {}; {remedy}",
        looked.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", "))]
    Missing {
        /// Guest kernel or agent.
        what: &'static str,
        /// A way to obtain it.
        remedy: &'static str,
        /// All searched places.
        looked: Vec<PathBuf>,
    },
    /// Invalid configuration of the virtual machine.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A disk could not be attached to or detached from a running sandbox.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// A size outside the limits of a sandbox.
    #[error("{asked} {what}: outside the range of this sandbox, {min} to {max}")]
    Size {
        /// CPUs or MiB of memory.
        what: &'static str,
        /// The requested value.
        asked: u64,
        /// The minimum.
        min: u64,
        /// The maximum.
        max: u64,
    },
    /// The virtual machine could not be started.
    #[error("cannot start the virtual machine")]
    Start(#[from] StartError),
    /// The agent did not connect.
    #[error(
        "the guest's agent did not connect within {waited:.1?}; the end of the guest's console:\n\
         {console}"
    )]
    AgentTimeout {
        /// Time spent waiting.
        waited: Duration,
        /// End of the guest's console output.
        console: String,
    },
    /// The virtual machine ended by itself.
    #[error("the virtual machine ended: {reason}; last output of the guest:\n{last_words}")]
    Ended {
        /// The reason.
        reason: ExitReason,
        /// Its kernel's panic log if there is one, else the end of its console.
        last_words: String,
    },
    /// The container's program can't be found or run.
    #[error("{reason}")]
    NotExecutable {
        /// Exit status as of a shell: 127 not found, 126 not executable.
        status: i32,
        /// The program and the reason.
        reason: String,
    },
    /// The agent reported an error.
    #[error("cannot {operation}: {reason}")]
    Agent {
        /// The requested operation.
        operation: &'static str,
        /// The kind of error reported; [`ErrorKind::Guest`] if unknown.
        kind: ErrorKind,
        /// The agent's message.
        reason: String,
    },
    /// The process has ended, or never existed.
    #[error("cannot {operation}: {reason}")]
    NoProcess {
        /// The requested operation.
        operation: &'static str,
        /// The agent's message.
        reason: String,
    },
    /// The agent's connection has ended.
    #[error("cannot {operation}: the guest's agent has hung up")]
    AgentDisconnected {
        /// The requested operation.
        operation: &'static str,
    },
    /// The agent did not reply in time.
    #[error("cannot {operation}: the guest's agent did not answer within {waited:.0?}")]
    Timeout {
        /// The requested operation.
        operation: &'static str,
        /// Time spent waiting.
        waited: Duration,
    },
    /// Invalid settings of sandboxes.
    #[error("{place}: {reason}")]
    Settings {
        /// The file or annotation.
        place: String,
        /// The problem.
        reason: String,
    },
    /// Invalid configuration of a sandbox or a container.
    #[error("{field}: {reason}")]
    Invalid {
        /// The invalid field.
        field: &'static str,
        /// The problem.
        reason: String,
        /// The underlying error, if any.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The configuration requests something that a guest does not support.
    #[error("{field}: {reason}")]
    Unsupported {
        /// The field.
        field: &'static str,
        /// The unsupported feature.
        reason: String,
    },
    /// An operation failed on the host.
    #[error("cannot {operation}")]
    Host {
        /// The operation that failed.
        operation: String,
        /// The error from the host.
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

    pub(crate) fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid {
            field,
            reason: reason.into(),
            source: None,
        }
    }

    /// As `invalid`, with the underlying error.
    pub(crate) fn invalid_by<E>(
        field: &'static str,
        reason: impl Into<String>,
    ) -> impl FnOnce(E) -> Self
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let reason = reason.into();
        move |source| Self::Invalid {
            field,
            reason,
            source: Some(source.into()),
        }
    }

    pub(crate) fn unsupported(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Unsupported {
            field,
            reason: reason.into(),
        }
    }

    /// The kind of error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Missing { .. } => ErrorKind::NotFound,
            Self::Config(_) | Self::Size { .. } | Self::Settings { .. } | Self::Invalid { .. } => {
                ErrorKind::InvalidConfiguration
            }
            Self::Attach(error) => match error {
                AttachError::Config(_) => ErrorKind::InvalidConfiguration,
                AttachError::NoSlot(_) => ErrorKind::InUse,
                AttachError::NoDisk(_) => ErrorKind::NotFound,
                AttachError::Ended => ErrorKind::GuestEnded,
                _ => ErrorKind::Host,
            },
            Self::Start(_) | Self::Host { .. } => ErrorKind::Host,
            Self::Ended { .. } | Self::AgentDisconnected { .. } => ErrorKind::GuestEnded,
            Self::AgentTimeout { .. } | Self::Timeout { .. } => ErrorKind::TimedOut,
            Self::NotExecutable { .. } => ErrorKind::NotExecutable,
            Self::NoProcess { .. } => ErrorKind::NoProcess,
            Self::Agent { kind, .. } => *kind,
            Self::Unsupported { .. } => ErrorKind::Unsupported,
        }
    }
}

/// Kinds of errors, for callers to act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Not found: a container, a disk, the guest kernel.
    NotFound,
    /// Already exists.
    AlreadyExists,
    /// Invalid configuration; a retry will fail again.
    InvalidConfiguration,
    /// The container's program can't be found or executed.
    NotExecutable,
    /// The process has ended, or never existed.
    NoProcess,
    /// In use.
    InUse,
    /// The virtual machine has ended.
    GuestEnded,
    /// The guest did not reply in time.
    TimedOut,
    /// Not supported by guests.
    Unsupported,
    /// The guest failed for a reason of its own.
    Guest,
    /// An operation failed on the host.
    Host,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn every_error_has_its_kind() {
        let host = Error::host("open x")(io::ErrorKind::NotFound.into());
        let overdue = Error::Timeout {
            operation: "x",
            waited: Duration::from_secs(1),
        };
        let size = Error::Size {
            what: "CPUs",
            asked: 9,
            min: 1,
            max: 2,
        };
        let settings = Error::Settings {
            place: "/etc/x".into(),
            reason: "y".into(),
        };
        let ended = Error::Ended {
            reason: ExitReason::Reset,
            last_words: String::new(),
        };
        let silent = Error::AgentTimeout {
            waited: Duration::from_secs(60),
            console: String::new(),
        };
        let missing = Error::Missing {
            what: "guest kernel",
            remedy: "",
            looked: Vec::new(),
        };
        let not_executable = Error::NotExecutable {
            status: 127,
            reason: String::new(),
        };
        let no_process = Error::NoProcess {
            operation: "x",
            reason: String::new(),
        };
        let kinds = [
            (host, ErrorKind::Host),
            (overdue, ErrorKind::TimedOut),
            (silent, ErrorKind::TimedOut),
            (ended, ErrorKind::GuestEnded),
            (
                Error::AgentDisconnected { operation: "x" },
                ErrorKind::GuestEnded,
            ),
            (size, ErrorKind::InvalidConfiguration),
            (settings, ErrorKind::InvalidConfiguration),
            (Error::invalid("x", "y"), ErrorKind::InvalidConfiguration),
            (Error::unsupported("x", "y"), ErrorKind::Unsupported),
            (missing, ErrorKind::NotFound),
            (AttachError::NoSlot(4).into(), ErrorKind::InUse),
            (AttachError::NoDisk(1).into(), ErrorKind::NotFound),
            (AttachError::Ended.into(), ErrorKind::GuestEnded),
            (not_executable, ErrorKind::NotExecutable),
            (no_process, ErrorKind::NoProcess),
        ];
        for (error, kind) in kinds {
            assert_eq!(error.kind(), kind, "{error}");
        }
    }

    #[test]
    fn errors_keep_their_source() {
        let refused = || io::Error::from(io::ErrorKind::PermissionDenied);
        let host = Error::host("open x")(refused());
        let invalid = Error::invalid_by("rootfs", "/x can't be read")(refused());
        for error in [host, invalid] {
            let source = error
                .source()
                .and_then(|source| source.downcast_ref::<io::Error>());
            let kind = source.map(io::Error::kind);
            assert_eq!(kind, Some(io::ErrorKind::PermissionDenied), "{error}");
        }
        assert!(Error::invalid("x", "y").source().is_none());
    }
}
