//! Work that may block.

use anyhow::Result;

/// Runs work that may wait for a disk, or for a container's own files, on another thread, so that other requests are served
/// meanwhile.
pub(crate) async fn run_blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await?
}
