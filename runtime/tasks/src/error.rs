//! Why something could not be done to a task, in the kinds that clients of runtimes tell apart.

/// Why a request was refused, or what failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such task or process.
    #[error("{0}: not found")]
    NotFound(String),
    /// The process has ended.
    #[error("{0}")]
    Finished(&'static str),
    /// A task or process of this name is there.
    #[error("{0} already exists")]
    AlreadyExists(String),
    /// Not in the state that the task or process is in.
    #[error("{0}")]
    FailedPrecondition(String),
    /// Not here at all.
    #[error("{0}")]
    Unsupported(&'static str),
    /// It was tried. The text has every cause, so none of them is named as this one's source.
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
