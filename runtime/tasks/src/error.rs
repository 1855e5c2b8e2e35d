//! Errors of task operations, in the kinds that clients of runtimes distinguish.

/// Errors of requests.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such task or process.
    #[error("{0}: not found")]
    NotFound(String),
    /// The process has ended.
    #[error("{0}")]
    Finished(&'static str),
    /// A task or process with this name exists.
    #[error("{0} already exists")]
    AlreadyExists(String),
    /// Not possible in the current state of the task or process.
    #[error("{0}")]
    FailedPrecondition(String),
    /// Not supported.
    #[error("{0}")]
    Unsupported(&'static str),
    /// The operation failed. The text includes all causes, so there is no separate source.
    #[error("{0:#}")]
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for Error {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

impl From<koya::Error> for Error {
    fn from(error: koya::Error) -> Self {
        Self::Failed(error.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cause_is_named_once() {
        let error = anyhow::anyhow!("the cause").context("what failed");
        let error = anyhow::Error::from(Error::from(error));
        assert_eq!(format!("{error:#}"), "what failed: the cause");
    }
}
