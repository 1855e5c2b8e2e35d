//! Why the agent refused a request, in kinds that the host tells apart.

use crate::messages::Refusal;
use crate::messages::refusal::Kind;
use protobuf::Message as _;
use std::fmt;
use ttrpc::proto::Any;
use ttrpc::{Code, Status};

/// The name of a [`Refusal`] among a status's details.
const NAME: &str = "koya.Refusal";

/// A reason on which the host acts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The process has ended, or there never was one.
    NoProcess(String),
    /// The container's program can't be found or run.
    NotExecutable {
        /// What a shell would exit with.
        exit_status: i32,
        /// Which program, and why.
        reason: String,
    },
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoProcess(reason) | Self::NotExecutable { reason, .. } => f.write_str(reason),
        }
    }
}

impl std::error::Error for Refused {}

impl Refused {
    /// The status that answers a request, with a text that may say more.
    pub fn status(&self, text: &str) -> Status {
        let mut refusal = Refusal::new();
        let code = match self {
            Self::NoProcess(reason) => {
                refusal.kind = Kind::NO_PROCESS.into();
                refusal.reason.clone_from(reason);
                Code::NOT_FOUND
            }
            Self::NotExecutable {
                exit_status,
                reason,
            } => {
                refusal.kind = Kind::NOT_EXECUTABLE.into();
                refusal.reason.clone_from(reason);
                refusal.exit_status = *exit_status;
                Code::FAILED_PRECONDITION
            }
        };
        let mut status = ttrpc::get_status(code, text);
        // Nothing in it fails to be written; the text is there in any case.
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

/// The kind of a status, if it has one that is known.
pub fn refused(status: &Status) -> Option<Refused> {
    let detail = status.details.iter().find(|any| any.type_url == NAME)?;
    let refusal = Refusal::parse_from_bytes(&detail.value).ok()?;
    match refusal.kind.enum_value() {
        Ok(Kind::NO_PROCESS) => Some(Refused::NoProcess(refusal.reason)),
        Ok(Kind::NOT_EXECUTABLE) => Some(Refused::NotExecutable {
            exit_status: refusal.exit_status,
            reason: refusal.reason,
        }),
        Ok(Kind::OTHER) | Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_survive_the_way_whatever_the_text_says() {
        let kinds = [
            Refused::NoProcess("it has ended".into()),
            Refused::NotExecutable {
                exit_status: 127,
                reason: "nope: not found".into(),
            },
        ];
        for kind in kinds {
            assert_eq!(refused(&kind.status("any text")), Some(kind));
        }
        let text = "process not found: cannot execute 127: sh: not found;";
        assert_eq!(refused(&ttrpc::get_status(Code::UNKNOWN, text)), None);
        let mut broken = Refused::NoProcess(String::new()).status("");
        broken.details[0].value = vec![0xff; 3];
        assert_eq!(refused(&broken), None);
    }
}
