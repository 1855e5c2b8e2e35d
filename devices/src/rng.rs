//! Entropy: virtio 1.2, section 5.4. One queue, whose buffers the device fills with random bytes from the
//! host.
//!
//! Runs on the event loop. A request gets at most [`MAX_REQUEST`] bytes, so that no guest occupies the loop
//! for long; the driver requests more if it needs them.

use crate::virtio::loop_worker::LoopWorker;
use crate::virtio::{
    ActivateError, Activation, Chain, DeviceKind, Memory, Payload, Schema, StateError,
    VirtioDevice, Worker,
};
use event_manager::MutEventSubscriber;
use rustix::rand::{GetRandomFlags, getrandom};
use serde::Serialize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Maximum number of random bytes per request. Linux requests 64, or a page.
pub const MAX_REQUEST: u32 = 4096;

const QUEUE_SIZES: &[u16] = &[64];

const SCHEMA: Schema = Schema::new("virtio-rng", 1);

/// Metrics of the entropy device.
#[derive(Debug, Default, Serialize)]
pub struct RngMetrics {
    /// Requests from the driver.
    pub requests: AtomicU64,
    /// Random bytes supplied.
    pub bytes: AtomicU64,
    /// Failed requests.
    pub errors: AtomicU64,
}

/// The entropy device.
#[derive(Default)]
pub struct Rng {
    metrics: Arc<RngMetrics>,
}

impl Rng {
    /// Metrics, also while the device is in use.
    pub fn metrics(&self) -> Arc<RngMetrics> {
        self.metrics.clone()
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::ENTROPY
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn config(&self) -> Option<Vec<u8>> {
        Some(Vec::new())
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Worker, ActivateError> {
        let queue = activation.take_queue(0)?;
        let metrics = self.metrics.clone();
        Ok(Worker::EventLoop(Box::new(LoopWorker::new(
            "entropy",
            queue,
            move |chain, memory| fill(&metrics, chain, memory),
        ))))
    }

    /// The device has no state apart from its queue.
    fn save(&self) -> Result<Payload, StateError> {
        SCHEMA.encode(&())
    }

    fn restore(&mut self, state: &Payload) -> Result<(), StateError> {
        SCHEMA.decode(state)
    }

    fn reset(&mut self, _worker: Option<Box<dyn MutEventSubscriber + Send>>) {}
}

/// Fills a chain with random bytes; returns their number.
fn fill(metrics: &RngMetrics, chain: &Chain, memory: &Memory) -> u32 {
    metrics.requests.fetch_add(1, Ordering::Relaxed);
    let mut bytes = [0; MAX_REQUEST as usize];
    let wanted = chain.writable_len().min(MAX_REQUEST) as usize;
    let got = getrandom(&mut bytes[..wanted], GetRandomFlags::empty()).unwrap_or(0);
    match chain.write(memory, 0, &bytes[..got]) {
        Ok(()) if got > 0 => {
            metrics.bytes.fetch_add(got as u64, Ordering::Relaxed);
            got as u32
        }
        _ => {
            metrics.errors.fetch_add(1, Ordering::Relaxed);
            0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_utils::{Buffer, Driver};

    #[test]
    fn random_bytes_fill_what_is_offered_up_to_the_limit() {
        let mut driver = Driver::new(64);
        let small = driver.offer(&[Buffer::Writable(16)]);
        let large = driver.offer(&[Buffer::Writable(8192)]);
        let metrics = RngMetrics::default();
        let fill = |chain: &Chain, memory: &Memory| fill(&metrics, chain, memory);
        let mut worker = LoopWorker::new("entropy", driver.queue(), fill);

        worker.serve().unwrap();

        let bytes = metrics.bytes.load(Ordering::Relaxed);
        assert_eq!(bytes, 16 + u64::from(MAX_REQUEST));
        assert_eq!(driver.used(), [(small, 16), (large, MAX_REQUEST)]);
        assert_ne!(driver.written(large, 4096), vec![0; 4096]);
        assert!(driver.interrupted());
    }

    #[test]
    fn a_chain_without_room_is_given_back_empty() {
        let mut driver = Driver::new(64);
        let head = driver.offer(&[Buffer::Readable(b"x".to_vec())]);
        let metrics = RngMetrics::default();
        let fill = |chain: &Chain, memory: &Memory| fill(&metrics, chain, memory);
        let mut worker = LoopWorker::new("entropy", driver.queue(), fill);

        worker.serve().unwrap();

        assert_eq!(driver.used(), [(head, 0)]);
    }
}
