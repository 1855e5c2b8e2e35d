//! Errors in images.

use std::io;

/// Errors when an image is opened or unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The image contradicts itself or its format.
    #[error("image: {0}")]
    Invalid(String),
    /// A feature that Koya does not support.
    #[error("image: {0}")]
    Unsupported(String),
    /// It contains several images, or none with the requested name.
    #[error("image: {reason}; it holds: {}", .names.join(", "))]
    Choice {
        /// The request, and the reason why nothing was selected.
        reason: String,
        /// Names of the images.
        names: Vec<String>,
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
    pub(crate) fn invalid(reason: impl Into<String>) -> Self {
        Self::Invalid(reason.into())
    }

    pub(crate) fn host(operation: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let operation = operation.into();
        move |source| Self::Host { operation, source }
    }

    /// An error on reading a part of the image: invalid data is the image's fault, everything else the host's.
    pub(crate) fn reading(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        Self::in_part("read", what.into())
    }

    /// As [`Self::reading`], on unpacking.
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

/// An error in the data or in an entry: the image's fault.
pub(crate) fn invalid(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.into())
}

/// The archive or stream is truncated.
pub(crate) fn cut_short() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "it ends too early")
}
