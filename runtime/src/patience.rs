//! Waits for a guest that flushes unwritten data to its disks.

use crate::Error;
use koya_vmm::devices::blk::BlockHandle;
use koya_vmm::host::threads;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

/// Maximum time for that: a guest that writes forever is not waited for.
pub(crate) const WRITE_OUT_LIMIT: Duration = Duration::from_secs(600);

/// Time limit for a guest without visible activity.
pub(crate) const SILENCE: Duration = Duration::from_secs(15);

/// Interval at which the disks are checked.
const LOOK: Duration = Duration::from_millis(100);

/// Makes an agent call that ends with the disks flushed, on a separate thread. Waits for it as long as the disks are being
/// written to or the host is processing a request, which may be slow, and beyond that for `silence`.
///
/// # Errors
/// The error from `call`, or [`Error::Timeout`]; the call continues in the background, until its own limit.
pub(crate) fn while_disks_work<T: Send + 'static>(
    operation: &'static str,
    disks: &[BlockHandle],
    silence: Duration,
    call: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let (sender, answer) = sync_channel(1);
    let asked = threads::spawn("koya-ask", move || {
        sender.send(call()).ok();
    });
    asked.map_err(Error::host("start a thread"))?;
    let mut work = DiskWork::new(disks.to_vec());
    let mut last = Instant::now();
    loop {
        match answer.recv_timeout(LOOK.min(silence)) {
            Ok(answer) => return answer,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                let source = std::io::Error::other("a thread ended");
                return Err(Error::host(operation)(source));
            }
        }
        if work.goes_on() {
            last = Instant::now();
        } else if last.elapsed() >= silence {
            return Err(Error::Timeout {
                operation,
                waited: last.elapsed(),
            });
        }
    }
}

/// Write activity of a sandbox's disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskWrites {
    /// Number of completed requests that write: writes, flushes and discards.
    pub done: u64,
    /// Whether the host is processing a request.
    pub in_flight: bool,
}

impl DiskWrites {
    pub(crate) fn of(disks: &[BlockHandle]) -> Self {
        Self {
            done: written(disks),
            in_flight: in_flight(disks),
        }
    }
}

/// Detects write activity of disks.
pub(crate) struct DiskWork {
    disks: Vec<BlockHandle>,
    written: u64,
}

impl DiskWork {
    pub(crate) fn new(disks: Vec<BlockHandle>) -> Self {
        let written = written(&disks);
        Self { disks, written }
    }

    /// Whether there was a write since the last call, or the host is processing a request.
    pub(crate) fn goes_on(&mut self) -> bool {
        let before = std::mem::replace(&mut self.written, written(&self.disks));
        self.written != before || in_flight(&self.disks)
    }
}

/// Number of completed requests that write.
fn written(disks: &[BlockHandle]) -> u64 {
    let of = |disk: &BlockHandle| {
        let metrics = disk.metrics();
        let all = [&metrics.writes, &metrics.flushes, &metrics.discards];
        all.map(|count| count.load(Ordering::Relaxed))
            .iter()
            .sum::<u64>()
    };
    disks.iter().map(of).sum()
}

fn in_flight(disks: &[BlockHandle]) -> bool {
    let in_flight = |disk: &BlockHandle| disk.metrics().in_flight.load(Ordering::Relaxed);
    disks.iter().any(|disk| in_flight(disk) > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use koya_vmm::devices::blk::{Block, Disk, DiskOptions};
    use std::sync::mpsc::channel;

    #[test]
    fn a_disk_that_is_written_to_is_waited_for_and_silence_is_not() {
        let silence = Duration::from_millis(200);
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let block = Block::new(Disk::from_file(file, DiskOptions::default()).unwrap(), 1).unwrap();
        let disk = block.handle();

        let (hold, held) = channel::<()>();
        let ended = while_disks_work("x", std::slice::from_ref(&disk), silence, move || {
            held.recv().ok();
            Ok(())
        });
        assert!(matches!(ended, Err(Error::Timeout { .. })), "{ended:?}");
        drop(hold);

        let busy = disk.clone();
        let ended = while_disks_work("x", std::slice::from_ref(&disk), silence, move || {
            for _ in 0..8 {
                busy.metrics().writes.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(silence / 2);
            }
            Ok(7)
        });
        assert_eq!(ended.unwrap(), 7);

        // A request that the host does not finish.
        disk.metrics().in_flight.fetch_add(1, Ordering::Relaxed);
        let ended = while_disks_work("x", &[disk], silence, move || {
            std::thread::sleep(silence * 3);
            Ok(8)
        });
        assert_eq!(ended.unwrap(), 8);
    }
}
