//! Errors returned by the agent.

use crate::{Error, ErrorKind};
use koya_protocol::{Refused, refused};
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
        reason: guest_text::line(reason),
    };
    let status = match (error, overdue) {
        (ttrpc::Error::RpcStatus(status), _) => status,
        (ttrpc::Error::Socket(_), _) => return Error::HungUp { operation },
        (_, Some(waited)) => return Error::Overdue { operation, waited },
        (other, None) => return agent(ErrorKind::Guest, &other.to_string()),
    };
    let Some(refused) = refused(&status) else {
        return match status.code() {
            // The agent has the same limit, and may have noticed its expiry first.
            ttrpc::Code::DEADLINE_EXCEEDED => Error::Overdue {
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
        Refused::NoProcess(reason) => Error::NoProcess {
            operation,
            reason: guest_text::line(reason),
        },
        Refused::NotExecutable {
            exit_status,
            reason,
        } => Error::NotExecutable {
            // Only the two statuses of a shell: a guest could report success.
            status: if exit_status == 126 { 126 } else { 127 },
            reason: guest_text::line(reason),
        },
        Refused::NotFound(_) => agent(ErrorKind::NotFound, &text),
        Refused::AlreadyExists(_) => agent(ErrorKind::AlreadyExists, &text),
        Refused::Invalid(_) => agent(ErrorKind::InvalidConfiguration, &text),
        Refused::InUse(_) => agent(ErrorKind::InUse, &text),
        Refused::Unsupported(_) => agent(ErrorKind::Unsupported, &text),
    }
}
