//! Reasons of refused requests, in the kinds that the host distinguishes.

use crate::messages::Refusal;
use crate::messages::refusal::Kind;
use protobuf::Message as _;
use serde::{Deserialize, Serialize};
use std::fmt;
use ttrpc::proto::Any;
use ttrpc::{Code, Status};

/// Type name of a [`Refusal`] in the details of a status.
const NAME: &str = "koya.Refusal";

/// A reason that the host acts on, with a human-readable message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorReason {
    /// The process has ended, or never existed.
    NoProcess(String),
    /// The container's program can't be found or executed.
    NotExecutable {
        /// Exit status of a shell.
        exit_status: i32,
        /// The program and the reason.
        reason: String,
    },
    /// No such container, disk or other object.
    NotFound(String),
    /// It already exists.
    AlreadyExists(String),
    /// The request is invalid.
    Invalid(String),
    /// It is in use.
    InUse(String),
    /// Not supported by the guest.
    Unsupported(String),
}

impl fmt::Display for ErrorReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason())
    }
}

impl std::error::Error for ErrorReason {}

impl ErrorReason {
    fn reason(&self) -> &str {
        match self {
            Self::NotExecutable { reason, .. }
            | Self::NoProcess(reason)
            | Self::NotFound(reason)
            | Self::AlreadyExists(reason)
            | Self::Invalid(reason)
            | Self::InUse(reason)
            | Self::Unsupported(reason) => reason,
        }
    }

    /// The status for a reply, with a text that may be more detailed.
    pub fn status(&self, text: &str) -> Status {
        let (kind, code) = match self {
            Self::NoProcess(_) => (Kind::NO_PROCESS, Code::NOT_FOUND),
            Self::NotExecutable { .. } => (Kind::NOT_EXECUTABLE, Code::FAILED_PRECONDITION),
            Self::NotFound(_) => (Kind::NOT_FOUND, Code::NOT_FOUND),
            Self::AlreadyExists(_) => (Kind::ALREADY_EXISTS, Code::ALREADY_EXISTS),
            Self::Invalid(_) => (Kind::INVALID, Code::INVALID_ARGUMENT),
            Self::InUse(_) => (Kind::IN_USE, Code::FAILED_PRECONDITION),
            Self::Unsupported(_) => (Kind::UNSUPPORTED, Code::UNIMPLEMENTED),
        };
        let refusal = Refusal {
            kind: kind.into(),
            reason: self.reason().into(),
            exit_status: match self {
                Self::NotExecutable { exit_status, .. } => *exit_status,
                _ => 0,
            },
            ..Default::default()
        };
        let mut status = ttrpc::get_status(code, text);
        // Encoding does not fail; in any case there is the text.
        if let Ok(value) = refusal.write_to_bytes() {
            status.details.push(Any {
                type_url: NAME.into(),
                value,
                ..Default::default()
            });
        }
        status
    }
}

/// The reason in a status, if it has a known one.
pub fn refused(status: &Status) -> Option<ErrorReason> {
    let detail = status.details.iter().find(|any| any.type_url == NAME)?;
    let refusal = Refusal::parse_from_bytes(&detail.value).ok()?;
    let reason = refusal.reason;
    Some(match refusal.kind.enum_value().ok()? {
        Kind::NO_PROCESS => ErrorReason::NoProcess(reason),
        Kind::NOT_EXECUTABLE => ErrorReason::NotExecutable {
            exit_status: refusal.exit_status,
            reason,
        },
        Kind::NOT_FOUND => ErrorReason::NotFound(reason),
        Kind::ALREADY_EXISTS => ErrorReason::AlreadyExists(reason),
        Kind::INVALID => ErrorReason::Invalid(reason),
        Kind::IN_USE => ErrorReason::InUse(reason),
        Kind::UNSUPPORTED => ErrorReason::Unsupported(reason),
        Kind::OTHER => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_survive_the_way_whatever_the_text_says() {
        let kinds = [
            ErrorReason::NoProcess("it has ended".into()),
            ErrorReason::NotExecutable {
                exit_status: 127,
                reason: "nope: not found".into(),
            },
            ErrorReason::NotFound("c".into()),
            ErrorReason::AlreadyExists("c".into()),
            ErrorReason::Invalid("x".into()),
            ErrorReason::InUse("vda".into()),
            ErrorReason::Unsupported("y".into()),
        ];
        for kind in kinds {
            assert_eq!(refused(&kind.status("any text")), Some(kind));
        }
        let text = "process not found: cannot execute 127: sh: not found;";
        assert_eq!(refused(&ttrpc::get_status(Code::UNKNOWN, text)), None);
        let mut broken = ErrorReason::NoProcess(String::new()).status("");
        broken.details[0].value = vec![0xff; 3];
        assert_eq!(refused(&broken), None);
    }
}
