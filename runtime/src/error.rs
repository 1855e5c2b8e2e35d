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
    #[error("no {what} found; looked in: {}; {remedy}",
        looked.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", "))]
    Missing {
        /// Guest kernel or agent.
        what: &'static str,
        /// How one comes by it.
        remedy: &'static str,
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
        /// What it says that the reason is: [`ErrorKind::Guest`] if nothing that is known.
        kind: ErrorKind,
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
    /// A configuration, of a sandbox or a container.
    #[error("{field}: {reason}")]
    Invalid {
        /// Which part of it.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
        /// What was found out, if that was another's to say.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// What a configuration asks for and a virtual machine's guest can't have.
    #[error("{field}: {reason}")]
    Unsupported {
        /// Which part of it.
        field: &'static str,
        /// What it is.
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

    pub(crate) fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid {
            field,
            reason: reason.into(),
            source: None,
        }
    }

    /// The same, and what says so.
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

    /// What kind of error it is.
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
            Self::Ended { .. } | Self::HungUp { .. } => ErrorKind::GuestEnded,
            Self::AgentSilent { .. } | Self::Overdue { .. } => ErrorKind::TimedOut,
            Self::NotExecutable { .. } => ErrorKind::NotExecutable,
            Self::NoProcess { .. } => ErrorKind::NoProcess,
            Self::Agent { kind, .. } => *kind,
            Self::Unsupported { .. } => ErrorKind::Unsupported,
        }
    }
}

/// What callers act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no such thing: a container, a disk, the guest's kernel.
    NotFound,
    /// There is one already.
    AlreadyExists,
    /// What was asked for is wrong, and will be the next time.
    InvalidConfiguration,
    /// The container's program can't be found or run.
    NotExecutable,
    /// The process has ended, or there never was one.
    NoProcess,
    /// Somebody uses it.
    InUse,
    /// The virtual machine has ended.
    GuestEnded,
    /// The guest did not answer in time.
    TimedOut,
    /// A guest can't have it.
    Unsupported,
    /// The guest failed to do it, for a reason of its own.
    Guest,
    /// The host refused.
    Host,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn every_error_has_its_kind() {
        let host = Error::host("open x")(io::ErrorKind::NotFound.into());
        let overdue = Error::Overdue {
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
        let silent = Error::AgentSilent {
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
            (Error::HungUp { operation: "x" }, ErrorKind::GuestEnded),
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
