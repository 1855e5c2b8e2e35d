//! Recording what confines the sandbox of a container in the foreground.

use super::state::Directory;
use anyhow::Result;
use koya::vmm::host::threads;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

/// The thread that records what confines the sandbox. To read that from /proc costs a percent or more of the time of a
/// short run, so this waits until the run is not short.
pub(super) struct Recorder {
    /// Closed at the end.
    ended: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Recorder {
    const DELAY: Duration = Duration::from_millis(200);

    pub(super) fn start(directory: Directory, is_confined: bool) -> Result<Self> {
        let (ended, end) = mpsc::channel();
        let thread = threads::spawn("koya-record", move || {
            if end.recv_timeout(Self::DELAY) == Err(RecvTimeoutError::Timeout) {
                directory.record_confinement(is_confined);
            }
        })?;
        Ok(Self {
            ended: Some(ended),
            thread: Some(thread),
        })
    }
}

impl Drop for Recorder {
    /// The directory may be removed afterwards.
    fn drop(&mut self) {
        drop(self.ended.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}
