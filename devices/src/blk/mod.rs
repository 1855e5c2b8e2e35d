//! Disks: virtio 1.2, section 5.2.
//!
//! | part | what |
//! |---|---|
//! | [`Block`] | the device: features, configuration space, one thread per queue |
//! | [`Disk`] | its backing: a raw image or a block device of the host |
//! | `format` | recognizes files that are not raw images |
//! | `request` | a validated request and the steps that execute it |
//! | `engine` | submits steps to the host: by io_uring, otherwise by system calls |
//! | `worker` | the thread of a queue |
//!
//! Data is transferred directly between guest memory and the file. Each queue has one thread. With io_uring,
//! it has as many requests in flight as the queue has descriptors, and one system call submits new requests
//! and collects completions. Without io_uring it executes one request after the other.
//!
//! **Durability** (section 5.2.6.2): a write is completed when the host has accepted it. A flush is completed
//! after fdatasync(2), so that the data survives a crash of the host. For a driver that does not accept
//! `VIRTIO_BLK_F_FLUSH`, every write is durable (RWF_DSYNC). Errors on the host are returned to the guest as
//! `VIRTIO_BLK_S_IOERR`: a full file system, a truncated image, a failed medium.
//!
//! **Discard and write-zeroes** (section 5.2.6, types 11 and 13) punch holes or zero ranges by fallocate(2);
//! if the host's file system does not support that, the driver is told and writes zeroes itself.
//!
//! **Resizing**: [`BlockHandle::refresh`] updates the size of the image and notifies the driver (section
//! 5.2.5, configuration change).
//!
//! **Limits** for guests: 64 MiB per request, 64 MiB per range, sixteen ranges per request, 16 MiB in flight
//! per queue, and an optional [rate limit](crate::rate_limit). Requests outside the disk or of partial blocks
//! fail with an error; a request without space for its status is returned without one.

mod disk;
mod engine;
mod format;
mod request;
mod worker;

#[cfg(test)]
mod tests;

use crate::rate_limit::{RateLimiter, RateLimits};
use crate::virtio::{
    ActivateError, Activation, COMMON_FEATURES, DeviceKind, Interrupt, Payload, Schema, StateError,
    VirtioDevice, Worker, read_config_space,
};
use event_manager::MutEventSubscriber;
use koya_host::sync::lock;
use koya_host::threads::{Role, Threads};
use koya_host::walls::Filter;
use request::{Request, Status};
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use worker::{Shared, Worker as QueueWorker};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromZeros, Immutable, IntoBytes};

pub use disk::{Disk, DiskOptions};
pub use engine::IoEngine;
pub use format::foreign_format;

/// Unit of sector numbers in bytes, independent of the disk's block size.
pub const SECTOR_SIZE: u64 = 512;
/// Maximum number of queues of a disk.
pub const MAX_QUEUES: u16 = 16;
/// Length of a serial number in bytes.
pub const ID_SIZE: usize = 20;

const ROLE: Role = Role::new("koya-blk")
    .guest_facing()
    .confined_by(Filter::Block);

const QUEUE_SIZE: u16 = 256;
/// Maximum number of data segments of a request: all descriptors except header and status.
const MAX_PARTS: u32 = QUEUE_SIZE as u32 - 2;
/// Maximum number of ranges of a discard or write-zeroes request.
const MAX_SEGMENTS: u32 = 16;
/// Maximum size of such a range in sectors: 64 MiB.
const MAX_SEGMENT_SECTORS: u32 = 1 << 17;
/// Maximum data size of a request in bytes.
const MAX_REQUEST: u64 = 64 << 20;
/// Maximum number of bytes in flight per queue, beyond the first request: it bounds the duration of a stop.
const MAX_IN_FLIGHT: u64 = 16 << 20;

/// Metrics of a disk.
#[derive(Debug, Default, Serialize)]
pub struct BlockMetrics {
    /// Successful reads.
    pub reads: AtomicU64,
    /// Successful writes.
    pub writes: AtomicU64,
    /// Bytes read.
    pub read_bytes: AtomicU64,
    /// Bytes written.
    pub written_bytes: AtomicU64,
    /// Successful flushes.
    pub flushes: AtomicU64,
    /// Successful discards and write-zeroes requests.
    pub discards: AtomicU64,
    /// Requests that failed with an error.
    pub errors: AtomicU64,
    /// Chains without space for a status.
    pub faults: AtomicU64,
    /// Requests in flight on the host.
    pub in_flight: AtomicU64,
}

impl BlockMetrics {
    fn count(&self, request: &Request, status: Status) {
        if status != Status::Ok {
            return self.count_answer(status);
        }
        let (requests, bytes) = match request {
            _ if request.is_read() => (&self.reads, Some(&self.read_bytes)),
            _ if request.is_write() => (&self.writes, Some(&self.written_bytes)),
            _ if request.is_flush() => (&self.flushes, None),
            _ => (&self.discards, None),
        };
        requests.fetch_add(1, Ordering::Relaxed);
        if let Some(bytes) = bytes {
            bytes.fetch_add(request.bytes(), Ordering::Relaxed);
        }
    }

    fn count_answer(&self, status: Status) {
        if status != Status::Ok {
            self.errors.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// `struct virtio_blk_config` (section 5.2.4) up to the last field that the device offers.
#[derive(FromZeros, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    geometry: [u8; 4],
    blk_size: U32,
    topology: [u8; 8],
    writeback: u8,
    unused: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused_after: [u8; 3],
}

/// The block device.
pub struct Block {
    disk: Arc<Disk>,
    engine: IoEngine,
    /// Kept over a reset of the driver, which must not refill the buckets.
    limiter: Arc<Mutex<RateLimiter>>,
    queue_sizes: Vec<u16>,
    metrics: Arc<BlockMetrics>,
    interrupt: Arc<Mutex<Option<Arc<dyn Interrupt>>>>,
    /// The size that the driver last read, in sectors.
    told: AtomicU64,
    threads: Threads,
    /// Set while there are threads.
    serving: Option<Arc<Shared>>,
}

/// Controls a disk while the guest uses it. It does not keep the image open after the device is gone.
#[derive(Clone)]
pub struct BlockHandle {
    disk: Weak<Disk>,
    metrics: Arc<BlockMetrics>,
    interrupt: Arc<Mutex<Option<Arc<dyn Interrupt>>>>,
}

impl BlockHandle {
    /// Updates the size of the image, and notifies the guest if it changed.
    ///
    /// # Errors
    /// As [`Disk::refresh`].
    pub fn refresh(&self) -> io::Result<()> {
        if let Some(disk) = self.disk.upgrade()
            && disk.refresh()?
            && let Some(interrupt) = &*lock(&self.interrupt)
        {
            interrupt.config();
        }
        Ok(())
    }

    /// Size in sectors of [`SECTOR_SIZE`] bytes; zero after the device is gone.
    pub fn sectors(&self) -> u64 {
        self.disk.upgrade().map_or(0, |disk| disk.sectors())
    }

    /// Metrics of the disk.
    pub fn metrics(&self) -> &BlockMetrics {
        &self.metrics
    }
}

impl Block {
    /// A device for `disk` with 1 to [`MAX_QUEUES`] queues.
    ///
    /// # Errors
    /// If the host has no file descriptor left.
    pub fn new(disk: Disk, queues: u16) -> io::Result<Self> {
        let queues = queues.clamp(1, MAX_QUEUES);
        Ok(Self {
            disk: Arc::new(disk),
            engine: IoEngine::default(),
            limiter: Arc::new(Mutex::new(RateLimiter::new(RateLimits::default()))),
            told: AtomicU64::new(0),
            queue_sizes: vec![QUEUE_SIZE; queues.into()],
            metrics: Arc::default(),
            interrupt: Arc::default(),
            threads: Threads::new(ROLE)?,
            serving: None,
        })
    }

    /// Sets rate limits for the guest's requests.
    #[must_use]
    pub fn with_limits(mut self, limits: RateLimits) -> Self {
        self.limiter = Arc::new(Mutex::new(RateLimiter::new(limits)));
        self
    }

    /// Sets the engine. Default: [`IoEngine::Auto`].
    #[must_use]
    pub fn with_engine(mut self, engine: IoEngine) -> Self {
        self.engine = engine;
        self
    }

    /// A handle for the owner.
    pub fn handle(&self) -> BlockHandle {
        BlockHandle {
            disk: Arc::downgrade(&self.disk),
            metrics: self.metrics.clone(),
            interrupt: self.interrupt.clone(),
        }
    }

    fn config(&self) -> Config {
        Config {
            capacity: self.disk.sectors().into(),
            seg_max: MAX_PARTS.into(),
            blk_size: self.disk.block_size().into(),
            num_queues: (self.queue_sizes.len() as u16).into(),
            max_discard_sectors: MAX_SEGMENT_SECTORS.into(),
            max_discard_seg: MAX_SEGMENTS.into(),
            discard_sector_alignment: (self.disk.block_size() / SECTOR_SIZE as u32).into(),
            max_write_zeroes_sectors: MAX_SEGMENT_SECTORS.into(),
            max_write_zeroes_seg: MAX_SEGMENTS.into(),
            write_zeroes_may_unmap: 1,
            ..Config::new_zeroed()
        }
    }

    fn start(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let shared = Arc::new(Shared {
            disk: self.disk.clone(),
            metrics: self.metrics.clone(),
            limiter: self.limiter.clone(),
            engine: self.engine,
            durable: activation.features & (1 << VIRTIO_BLK_F_FLUSH) == 0,
            drain: AtomicBool::new(false),
        });
        self.serving = Some(shared.clone());
        let host = |source| ActivateError::Host {
            operation: "start a disk's thread",
            source,
        };
        // Without VIRTIO_BLK_F_MQ the driver enables only the first queue.
        let first = activation.take_queue(0)?;
        let others = activation.queues.into_iter().flatten();
        for queue in std::iter::once(first).chain(others) {
            let stop = self.threads.stop_event();
            let worker = QueueWorker::new(queue, stop, shared.clone()).map_err(host)?;
            self.threads.spawn(move || worker.run()).map_err(host)?;
        }
        let interrupt = activation.interrupt;
        *lock(&self.interrupt) = Some(interrupt.clone());
        if self.disk.sectors() != self.told.load(Ordering::SeqCst) {
            // The disk grew after the driver had read its size, when no notification was possible.
            interrupt.config();
        }
        Ok(())
    }

    fn stop_threads(&mut self) {
        lock(&self.interrupt).take();
        self.threads.stop();
        self.serving = None;
    }
}

/// State of a disk apart from its queues. The image is part of the configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Size in sectors.
    pub sectors: u64,
    /// The size that the driver last read, in sectors.
    pub told: u64,
    /// Block size in bytes.
    pub block_size: u32,
    /// Whether the disk is read-only.
    pub read_only: bool,
}

impl BlockState {
    /// Schema of the state.
    pub const SCHEMA: Schema = Schema::new("virtio-blk", 1);
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let access: &[u32] = match self.disk.is_read_only() {
            true => &[VIRTIO_BLK_F_RO],
            false => &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES],
        };
        let always = [
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
        ];
        let bits = always.iter().chain(access);
        bits.fold(COMMON_FEATURES, |features, bit| features | 1 << bit)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        if offset < size_of::<U64>() as u64 {
            self.told.store(config.capacity.get(), Ordering::SeqCst);
        }
        read_config_space(config.as_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<Worker, ActivateError> {
        self.start(activation)
            .inspect_err(|_| self.stop_threads())?;
        Ok(Worker::OwnThreads)
    }

    fn save(&self) -> Result<Payload, StateError> {
        BlockState::SCHEMA.encode(&BlockState {
            sectors: self.disk.sectors(),
            told: self.told.load(Ordering::SeqCst),
            block_size: self.disk.block_size(),
            read_only: self.disk.is_read_only(),
        })
    }

    fn restore(&mut self, state: &Payload) -> Result<(), StateError> {
        let state: BlockState = BlockState::SCHEMA.decode(state)?;
        if state.read_only != self.disk.is_read_only() {
            return Err(StateError::Mismatch("one may be written to, the other not"));
        }
        if state.block_size != self.disk.block_size() {
            return Err(StateError::Mismatch("the disk has blocks of another size"));
        }
        // The disk may have grown, which the driver is notified of, but not shrunk below what it knows.
        if self.disk.sectors() < state.sectors {
            return Err(StateError::Mismatch("the disk is smaller than it was"));
        }
        self.told.store(state.told, Ordering::SeqCst);
        Ok(())
    }

    fn stop(&mut self, _worker: Option<Box<dyn MutEventSubscriber + Send>>) {
        if let Some(serving) = &self.serving {
            serving.drain.store(true, Ordering::SeqCst);
        }
        self.stop_threads();
    }

    fn reset(&mut self, _worker: Option<Box<dyn MutEventSubscriber + Send>>) {
        self.stop_threads();
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.stop_threads();
    }
}
