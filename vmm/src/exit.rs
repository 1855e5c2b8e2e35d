//! Why a virtual machine ended.

use std::fmt;

/// The first reason to end is the one that counts.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExitReason {
    /// The guest reset its CPU: how a guest without ACPI shuts down.
    Reset,
    /// The guest's kernel panicked.
    Panic {
        /// The panic's own line.
        message: String,
        /// The kernel's last words, oldest first.
        log: String,
    },
    /// A CPU of the guest faulted while it handled a fault in handling a fault.
    TripleFault {
        /// The vCPU's registers. On AMD processors these are those of a CPU after reset: KVM
        /// clears the others before it tells.
        details: String,
        /// What the kernel had kept in its panic log by then; mostly nothing.
        log: String,
    },
    /// KVM met something it can't handle.
    InternalError {
        /// KVM's details and the vCPU's registers.
        details: String,
    },
    /// A vCPU could not run.
    RunError {
        /// The host's answer and the vCPU's registers.
        details: String,
    },
    /// The owner stopped it.
    Stopped,
}

impl ExitReason {
    /// Whether the guest or its owner ended the virtual machine in order.
    pub fn is_orderly(&self) -> bool {
        matches!(self, Self::Reset | Self::Stopped)
    }

    /// The guest kernel's last words, oldest first, if it left any.
    pub fn log(&self) -> Option<&str> {
        match self {
            Self::Panic { log, .. } | Self::TripleFault { log, .. } => {
                (!log.is_empty()).then_some(log)
            }
            _ => None,
        }
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset => write!(f, "reset by the guest"),
            Self::Panic { message, .. } => write!(f, "guest kernel panic: {message}"),
            Self::TripleFault { details, .. } => {
                write!(f, "triple fault of a guest CPU: {details}")
            }
            Self::InternalError { details } => write!(f, "KVM internal error: {details}"),
            Self::RunError { details } => write!(f, "a vCPU could not run: {details}"),
            Self::Stopped => write!(f, "stopped by its owner"),
        }
    }
}
