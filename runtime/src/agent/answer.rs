//! Errors returned by the agent.

use crate::{Error, ErrorKind};
use koya_protocol::{ErrorReason, refused};
use koya_vmm::guest_text;
use std::time::Duration;

/// Converts an error from the agent to the caller's terms.
pub(super) fn failed(
    operation: &'static str,
    error: ttrpc::Error,
    overdue: Option<Duration>,
) -> Error {
    let agent = |kind, reason: &str| Error::Agent {
        operation,
        kind,
        reason: guest_text::sanitize_line(reason),
    };
    let status = match (error, overdue) {
        (ttrpc::Error::RpcStatus(status), _) => status,
        (ttrpc::Error::Socket(_), _) => return Error::AgentDisconnected { operation },
        (_, Some(waited)) => return Error::Timeout { operation, waited },
        (other, None) => return agent(ErrorKind::Guest, &other.to_string()),
    };
    let Some(refused) = refused(&status) else {
        return match status.code() {
            // The agent has the same limit, and may have noticed its expiry first.
            ttrpc::Code::DEADLINE_EXCEEDED => Error::Timeout {
                operation,
                waited: overdue.unwrap_or_default(),
            },
            _ => agent(ErrorKind::Guest, status.message()),
        };
    };
    // The text may contain more detail than the reason.
    let text = match status.message() {
        "" => refused.to_string(),
        text => text.to_owned(),
    };
    match refused {
        ErrorReason::NoProcess(reason) => Error::NoProcess {
            operation,
            reason: guest_text::sanitize_line(reason),
        },
        ErrorReason::NotExecutable {
            exit_status,
            reason,
        } => Error::NotExecutable {
            // Only the two statuses of a shell: a guest could report success.
            status: if exit_status == 126 { 126 } else { 127 },
            reason: guest_text::sanitize_line(reason),
        },
        ErrorReason::NotFound(_) => agent(ErrorKind::NotFound, &text),
        ErrorReason::AlreadyExists(_) => agent(ErrorKind::AlreadyExists, &text),
        ErrorReason::Invalid(_) => agent(ErrorKind::InvalidConfiguration, &text),
        ErrorReason::InUse(_) => agent(ErrorKind::InUse, &text),
        ErrorReason::Unsupported(_) => agent(ErrorKind::Unsupported, &text),
    }
}
