//! Checks of what the host requests.

use anyhow::{Result, bail};
use koya_protocol::ErrorReason;

/// The error for an invalid part of a request.
pub(crate) fn invalid_json(what: &str, error: &serde_json::Error) -> ErrorReason {
    ErrorReason::Invalid(format!("the {what} is broken: {error}"))
}

/// Checks that an ID is a single path component.
pub(crate) fn check_id(id: &str) -> Result<&str> {
    if !koya_protocol::is_id(id) {
        let reason = format!("{id:?} is not a valid ID of a container or process");
        bail!(ErrorReason::Invalid(reason));
    }
    Ok(id)
}
