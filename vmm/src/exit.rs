//! The reasons why a virtual machine ended.

use std::fmt;

/// The reason why a virtual machine ended; only the first one counts.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExitReason {
    /// The guest reset its CPU (the shutdown of a guest without ACPI), or turned its machine off (PSCI).
    Reset,
    /// The guest kernel panicked.
    Panic {
        /// The text of the panic message.
        message: String,
        /// The end of the kernel log, oldest line first.
        log: String,
    },
    /// A vCPU faulted while handling a double fault.
    TripleFault {
        /// The vCPU's registers. On AMD processors these are the reset values: KVM clears the others before
        /// it reports the fault.
        details: String,
        /// Contents of the panic log at that time; mostly empty.
        log: String,
    },
    /// KVM could not emulate something.
    InternalError {
        /// KVM's details and the vCPU's registers.
        details: String,
    },
    /// A vCPU could not run.
    RunError {
        /// The error from the host and the vCPU's registers.
        details: String,
    },
    /// The owner stopped it.
    Stopped,
}

impl ExitReason {
    /// Whether the guest or its owner ended the virtual machine in an orderly way.
    pub fn is_orderly(&self) -> bool {
        matches!(self, Self::Reset | Self::Stopped)
    }

    /// The end of the guest kernel log, oldest line first, if there is one.
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
