//! What can be wrong with an image.

use std::io;

/// Why an image can't be opened or unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The image contradicts itself or its format.
    #[error("image: {0}")]
    Invalid(String),
    /// What Koya does not support.
    #[error("image: {0}")]
    Unsupported(String),
    /// It holds several images, or none of the name that was asked for.
    #[error("image: {reason}; it holds: {}", .names.join(", "))]
    Choice {
        /// What was asked for, and why nothing was taken.
        reason: String,
        /// What there is.
        names: Vec<String>,
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
    pub(crate) fn invalid(reason: impl Into<String>) -> Self {
        Self::Invalid(reason.into())
    }

    pub(crate) fn host(operation: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let operation = operation.into();
        move |source| Self::Host { operation, source }
    }

    /// An error in a part of the image: what that holds is the image's fault, all else the host's.
    pub(crate) fn reading(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        Self::in_part("read", what.into())
    }

    /// As [`Self::reading`], of what is made of it.
    pub(crate) fn unpacking(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        Self::in_part("unpack", what.into())
    }

    fn in_part(verb: &'static str, what: String) -> impl FnOnce(io::Error) -> Self {
        use io::ErrorKind::{InvalidData, InvalidFilename, NotADirectory, UnexpectedEof};
        move |source| match source.kind() {
            InvalidData | InvalidFilename | NotADirectory | UnexpectedEof => {
                Self::Invalid(format!("{what}: {source}"))
            }
            _ => Self::Host {
                operation: format!("{verb} {what}"),
                source,
            },
        }
    }
}

/// An error of a reader or of an entry: the image's fault.
pub(crate) fn invalid(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.into())
}

/// The archive or stream ends where more must come.
pub(crate) fn cut_short() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "it ends too early")
}
