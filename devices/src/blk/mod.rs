//! Disks: virtio 1.2, section 5.2.
//!
//! | part | what |
//! |---|---|
//! | [`Block`] | the device: features, configuration space, one thread a queue |
//! | [`Disk`] | what is behind it: a raw image or a block device of the host |
//! | `format` | what is in a file that is no raw image |
//! | `request` | a chain as a checked request, and the steps that serve it |
//! | `engine` | how steps reach the host: io_uring, else plain calls |
//! | `worker` | the thread of a queue: queue to engine and back |
//!
//! Data goes straight between guest memory and the file. Each queue has one thread; by io_uring it
//! has as many requests under way as the queue has descriptors, and one system call takes new
//! requests to the host and brings back what ended. Without io_uring it serves one after the other.
//!
//! **Stable writes** (section 5.2.6.2): a write is answered when the host has it; a flush is answered
//! after fdatasync(2), so after it the data outlives the host's own crash. A driver that does not
//! accept `VIRTIO_BLK_F_FLUSH` gets every write stable (RWF_DSYNC). An error of the host is the
//! guest's (`VIRTIO_BLK_S_IOERR`): a full file system, a truncated image, a broken medium.
//!
//! **Discard and write-zeroes** (section 5.2.6, types 11 and 13) punch holes or zero ranges by
//! fallocate(2); where the host's file system can't, the driver is told so and writes zeroes itself.
//!
//! **Growing**: [`BlockHandle::refresh`] looks how large the image is now and tells the driver
//! (section 5.2.5, change of configuration).
//!
//! **Limits** on what a guest asks: a request of at most 64 MiB, ranges of at most 64 MiB, sixteen
//! of them a request, 16 MiB under way a queue; a [rate limit](crate::rate_limit) if wanted. What lies outside the disk or is not
//! whole blocks is refused with an error, a request without room for its answer comes back unanswered.

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

/// The unit of the device's numbers, in bytes, whatever the disk's block size.
pub const SECTOR_SIZE: u64 = 512;
/// The most queues of one disk.
pub const MAX_QUEUES: u16 = 16;
/// Bytes of a serial number.
pub const ID_SIZE: usize = 20;

const ROLE: Role = Role::new("koya-blk").of_the_guest();

const QUEUE_SIZE: u16 = 256;
/// Parts of one request: all descriptors but header and status.
const MAX_PARTS: u32 = QUEUE_SIZE as u32 - 2;
/// Ranges of one discard or write-zeroes request.
const MAX_SEGMENTS: u32 = 16;
/// Sectors of one such range: 64 MiB.
const MAX_SEGMENT_SECTORS: u32 = 1 << 17;
/// Bytes that one request may move.
const MAX_REQUEST: u64 = 64 << 20;
/// Bytes that the requests of one queue may move at once, beyond the first: so a stop waits for little.
const MAX_UNDER_WAY: u64 = 16 << 20;

/// What a disk did so far.
#[derive(Debug, Default, Serialize)]
pub struct BlockMetrics {
    /// Reads that succeeded.
    pub reads: AtomicU64,
    /// Writes that succeeded.
    pub writes: AtomicU64,
    /// Bytes that reads moved.
    pub read_bytes: AtomicU64,
    /// Bytes that writes moved.
    pub written_bytes: AtomicU64,
    /// Flushes that succeeded.
    pub flushes: AtomicU64,
    /// Discards and write-zeroes that succeeded.
    pub discards: AtomicU64,
    /// Requests that were answered with an error.
    pub errors: AtomicU64,
    /// Chains that no answer fitted into.
    pub faults: AtomicU64,
    /// Requests that the host is at work on.
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

/// `struct virtio_blk_config` (section 5.2.4) up to what this device announces.
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
    /// A driver that starts anew does not get full buckets.
    limiter: Arc<Mutex<RateLimiter>>,
    queue_sizes: Vec<u16>,
    metrics: Arc<BlockMetrics>,
    interrupt: Arc<Mutex<Option<Arc<dyn Interrupt>>>>,
    /// The size that the driver last read, in sectors.
    told: AtomicU64,
    threads: Threads,
    /// While there are threads.
    serving: Option<Arc<Shared>>,
}

/// How a disk's owner reaches it while the guest uses it. The image is closed with the device, whoever
/// has a handle.
#[derive(Clone)]
pub struct BlockHandle {
    disk: Weak<Disk>,
    metrics: Arc<BlockMetrics>,
    interrupt: Arc<Mutex<Option<Arc<dyn Interrupt>>>>,
}

impl BlockHandle {
    /// Looks how large the image is now, and tells the guest if that changed.
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

    /// Size in sectors of [`SECTOR_SIZE`] bytes; none after the device's end.
    pub fn sectors(&self) -> u64 {
        self.disk.upgrade().map_or(0, |disk| disk.sectors())
    }

    /// What the disk did so far.
    pub fn metrics(&self) -> &BlockMetrics {
        &self.metrics
    }
}

impl Block {
    /// A device over `disk` with 1 to [`MAX_QUEUES`] queues.
    ///
    /// # Errors
    /// The host has no descriptor left.
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

    /// Limits what the guest may do with it.
    #[must_use]
    pub fn with_limits(mut self, limits: RateLimits) -> Self {
        self.limiter = Arc::new(Mutex::new(RateLimiter::new(limits)));
        self
    }

    /// Takes another way to the host than [`IoEngine::Auto`].
    #[must_use]
    pub fn with_engine(mut self, engine: IoEngine) -> Self {
        self.engine = engine;
        self
    }

    /// What its owner keeps.
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
        // Without VIRTIO_BLK_F_MQ the driver enables the first alone.
        let first = activation.take_queue(0)?;
        let others = activation.queues.into_iter().flatten();
        for queue in std::iter::once(first).chain(others) {
            let worker = QueueWorker {
                queue,
                stop: self.threads.stop_event().try_clone().map_err(host)?,
                shared: shared.clone(),
            };
            self.threads.spawn(move || worker.run()).map_err(host)?;
        }
        let interrupt = activation.interrupt;
        *lock(&self.interrupt) = Some(interrupt.clone());
        if self.disk.sectors() != self.told.load(Ordering::SeqCst) {
            // It grew after the driver had read its size, when nobody could be told.
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

/// A disk's state beyond its queues. The image is the configuration's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Its size, in sectors.
    pub sectors: u64,
    /// The size that the driver read last, in sectors.
    pub told: u64,
    /// Bytes of a block.
    pub block_size: u32,
    /// Whether writes are refused.
    pub read_only: bool,
}

impl BlockState {
    /// A disk's.
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
            return Err(StateError::Misfit("one may be written to, the other not"));
        }
        if state.block_size != self.disk.block_size() {
            return Err(StateError::Misfit("the disk has blocks of another size"));
        }
        // It may have grown meanwhile, of which the driver is told; what it knows of must be there.
        if self.disk.sectors() < state.sectors {
            return Err(StateError::Misfit("the disk is smaller than it was"));
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
