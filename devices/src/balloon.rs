//! The balloon: virtio 1.2, section 5.5. Returns memory that the guest does not need to the host.
//!
//! There are two ways. **Free page reporting** (section 5.5.6.7) is automatic: the guest kernel reports
//! larger ranges that have been free for a while, and the host discards them; if the guest uses them again,
//! they are new zeroed pages. **Inflation** is requested by the owner to reclaim memory that is in use:
//! [`BalloonHandle::set_target`] sets the number of pages, the guest gives up as many as it can, and takes them back rather
//! than run out of memory (`DEFLATE_ON_OOM`).
//!
//! Queues, in this order (queues of features that the driver does not accept are left out): inflate, deflate,
//! statistics, reporting. They are served on the event loop; discarding pages takes one madvise(2) per range.
//!
//! The driver passes page frame numbers and ranges; those outside guest memory are ignored. A page that a
//! guest gives up and continues to use reads as zero, which affects only that guest.

use crate::discard;
use crate::fault::guest_fault;
use crate::virtio::registers::{ConfigSpace, PublishedConfig};
use crate::virtio::{
    ActivateError, Activation, ActiveQueue, COMMON_FEATURES, Chain, DeviceKind, F_INDIRECT_DESC,
    Interrupt, Memory, Payload, QueueError, Schema, StateError, VirtioDevice, Worker,
};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use koya_host::sync::lock;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Page size of the device in bytes, independent of the guest's page size.
pub const PAGE_SIZE: u64 = 4096;

// Feature bits (section 5.5.3).
const F_STATS_VQ: u32 = 1;
const F_DEFLATE_ON_OOM: u32 = 2;
const F_PAGE_REPORTING: u32 = 5;

// Tags of statistics (section 5.5.6.4).
const S_SWAP_IN: u16 = 0;
const S_SWAP_OUT: u16 = 1;
const S_MAJFLT: u16 = 2;
const S_MINFLT: u16 = 3;
const S_MEMFREE: u16 = 4;
const S_MEMTOT: u16 = 5;
const S_AVAIL: u16 = 6;
const S_CACHES: u16 = 7;

const QUEUE_SIZES: &[u16] = &[128; 4];
/// Chains of one queue per batch, before other event sources are served: each may take thousands of
/// madvise(2) calls.
const BATCH: usize = 4;
/// Maximum number of page frame numbers in a chain. Linux sends 256.
const MAX_FRAMES: u32 = 16_384;
/// Maximum number of statistics in a chain. Linux has 16.
const MAX_STATISTICS: u32 = 64;
/// Size of `struct virtio_balloon_stat`: a tag and a value.
const STATISTIC_SIZE: u32 = 10;
/// Offset of the driver's count of pages given up (section 5.5.4).
const ACTUAL_OFFSET: u64 = 4;

/// Memory statistics reported by the guest; `None` for those that it did not report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MemoryStatistics {
    /// Bytes swapped in.
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    pub swap_out: Option<u64>,
    /// Major faults.
    pub major_faults: Option<u64>,
    /// Minor faults.
    pub minor_faults: Option<u64>,
    /// Free bytes.
    pub free: Option<u64>,
    /// Total bytes.
    pub total: Option<u64>,
    /// Bytes available to programs without swapping.
    pub available: Option<u64>,
    /// Bytes in the page cache.
    pub caches: Option<u64>,
}

/// Metrics of the balloon.
#[derive(Debug, Default, Serialize)]
pub struct BalloonMetrics {
    /// Bytes that the guest gave up by inflation.
    pub inflated_bytes: AtomicU64,
    /// Bytes that the guest took back.
    pub deflated_bytes: AtomicU64,
    /// Bytes that the guest reported as free.
    pub reported_bytes: AtomicU64,
    /// Requests with too many page frames, or with addresses outside guest memory.
    pub faults: AtomicU64,
}

/// State of a balloon apart from its queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// Number of pages that the guest should give up.
    pub target: u32,
    /// Number of pages that the guest reports as given up.
    pub actual: u32,
    /// Head of the statistics chain that is held until new statistics are requested.
    pub held: Option<u16>,
}

struct Shared {
    target: AtomicU32,
    actual: AtomicU32,
    published: PublishedConfig,
    statistics: Mutex<MemoryStatistics>,
    /// Wakes the worker when new statistics are requested.
    statistics_requested: EventFd,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
    metrics: BalloonMetrics,
    /// Head of the statistics buffer, which the guest refills after its return (section 5.5.6.3). Used by
    /// the worker, but outlives it.
    held: Mutex<Option<u16>>,
}

impl Shared {
    /// `struct virtio_balloon_config` (section 5.5.4).
    fn config(&self) -> Vec<u8> {
        let fields = [&self.target, &self.actual];
        fields
            .map(|field| field.load(Ordering::SeqCst).to_le_bytes())
            .concat()
    }

    /// Changes a field of the configuration space.
    fn change(&self, field: &AtomicU32, value: u32) {
        let change = || field.store(value, Ordering::SeqCst);
        self.published.change(change, || self.config());
    }
}

/// The balloon device.
pub struct Balloon {
    shared: Arc<Shared>,
}

/// Controls a balloon while the guest uses it.
#[derive(Clone)]
pub struct BalloonHandle {
    shared: Arc<Shared>,
}

impl BalloonHandle {
    /// Sets the amount of memory that the guest should give up in total, in bytes, rounded down to pages.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE_SIZE).unwrap_or(u32::MAX);
        self.shared.change(&self.shared.target, pages);
        if let Some(interrupt) = &*lock(&self.shared.interrupt) {
            interrupt.config();
        }
    }

    /// Amount of memory that the guest should give up, in bytes.
    pub fn target(&self) -> u64 {
        u64::from(self.shared.target.load(Ordering::SeqCst)) * PAGE_SIZE
    }

    /// Amount of memory that the guest reports as given up, in bytes.
    pub fn actual(&self) -> u64 {
        u64::from(self.shared.actual.load(Ordering::SeqCst)) * PAGE_SIZE
    }

    /// The latest statistics from the guest.
    pub fn statistics(&self) -> MemoryStatistics {
        *lock(&self.shared.statistics)
    }

    /// Requests new statistics from the guest.
    pub fn request_statistics(&self) {
        self.shared.statistics_requested.write(1).ok();
    }

    /// Metrics of the balloon.
    pub fn metrics(&self) -> &BalloonMetrics {
        &self.shared.metrics
    }
}

impl Balloon {
    /// An empty balloon.
    ///
    /// # Errors
    /// If the host has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared {
                target: AtomicU32::new(0),
                actual: AtomicU32::new(0),
                published: PublishedConfig::default(),
                statistics: Mutex::default(),
                statistics_requested: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
                interrupt: Mutex::new(None),
                metrics: BalloonMetrics::default(),
                held: Mutex::default(),
            }),
        })
    }

    /// A handle for the owner.
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle {
            shared: self.shared.clone(),
        }
    }
}

impl BalloonState {
    /// Schema of the state.
    pub const SCHEMA: Schema = Schema::new("virtio-balloon", 1);
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind::BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let bits = [F_STATS_VQ, F_DEFLATE_ON_OOM, F_PAGE_REPORTING];
        // Without indirect descriptors: Linux refuses them here (`virtballoon_validate`), and would write all
        // features a second time to clear them.
        let common = COMMON_FEATURES & !F_INDIRECT_DESC;
        bits.iter()
            .fold(common, |features, bit| features | 1 << bit)
    }

    fn config(&self) -> Option<Vec<u8>> {
        Some(self.shared.config())
    }

    fn publish_config(&mut self, space: ConfigSpace) {
        self.shared
            .published
            .publish_in(space, || self.shared.config());
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if offset == ACTUAL_OFFSET
            && let Ok(bytes) = data.try_into()
        {
            let actual = u32::from_le_bytes(bytes);
            self.shared.change(&self.shared.actual, actual);
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Worker, ActivateError> {
        let has = |bit: u32| activation.features & (1 << bit) != 0;
        let (statistics, reporting) = (has(F_STATS_VQ), has(F_PAGE_REPORTING));
        let inflate = activation.take_queue(0)?;
        let deflate = activation.take_queue(1)?;
        let mut next = 2;
        let mut optional = |wanted: bool| {
            if !wanted {
                return Ok(None);
            }
            next += 1;
            activation.take_queue(next - 1).map(Some)
        };
        let statistics = optional(statistics)?;
        let reporting = optional(reporting)?;
        *lock(&self.shared.interrupt) = Some(activation.interrupt);
        Ok(Worker::EventLoop(Box::new(BalloonWorker {
            shared: self.shared.clone(),
            inflate,
            deflate,
            statistics,
            reporting,
        })))
    }

    fn save(&self) -> Result<Payload, StateError> {
        let shared = &self.shared;
        BalloonState::SCHEMA.encode(&BalloonState {
            target: shared.target.load(Ordering::SeqCst),
            actual: shared.actual.load(Ordering::SeqCst),
            held: *lock(&shared.held),
        })
    }

    fn restore(&mut self, state: &Payload) -> Result<(), StateError> {
        let state: BalloonState = BalloonState::SCHEMA.decode(state)?;
        self.shared.change(&self.shared.target, state.target);
        self.shared.change(&self.shared.actual, state.actual);
        *lock(&self.shared.held) = state.held;
        Ok(())
    }

    fn stop(&mut self, _worker: Option<Box<dyn MutEventSubscriber + Send>>) {
        lock(&self.shared.interrupt).take();
    }

    fn reset(&mut self, _worker: Option<Box<dyn MutEventSubscriber + Send>>) {
        lock(&self.shared.interrupt).take();
        self.shared.change(&self.shared.actual, 0);
        *lock(&self.shared.held) = None;
    }
}

struct BalloonWorker {
    shared: Arc<Shared>,
    inflate: ActiveQueue,
    deflate: ActiveQueue,
    statistics: Option<ActiveQueue>,
    reporting: Option<ActiveQueue>,
}

/// Converts the page frames of a chain to byte ranges; `None` if there are too many.
fn ranges(chain: &Chain, memory: &Memory) -> Option<Vec<(u64, u64)>> {
    let count = chain.readable_len() / 4;
    if count > MAX_FRAMES {
        return None;
    }
    let mut bytes = vec![0; 4 * count as usize];
    chain.read(memory, 0, &mut bytes).ok()?;
    let mut frames: Vec<u32> = bytes
        .chunks_exact(4)
        .filter_map(|word| Some(u32::from_le_bytes(word.try_into().ok()?)))
        .collect();
    // Linux allocates pages from the top down: sorted, they form few ranges.
    frames.sort_unstable();
    frames.dedup();
    let mut all: Vec<(u64, u64)> = Vec::new();
    for frame in frames {
        let start = u64::from(frame) * PAGE_SIZE;
        match all.last_mut() {
            Some((first, len)) if *first + *len == start => *len += PAGE_SIZE,
            _ => all.push((start, PAGE_SIZE)),
        }
    }
    Some(all)
}

fn discard_inflated(chain: &Chain, memory: &Memory, shared: &Shared) {
    let metrics = &shared.metrics;
    let fault = || {
        guest_fault!("a balloon's request names what is not the guest's memory, or too much");
        metrics.faults.fetch_add(1, Ordering::Relaxed);
    };
    let Some(ranges) = ranges(chain, memory) else {
        return fault();
    };
    for (start, len) in ranges {
        match discard::discard(memory, GuestAddress(start), len) {
            Ok(()) => {
                metrics.inflated_bytes.fetch_add(len, Ordering::Relaxed);
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => fault(),
            Err(error) => guest_fault!("cannot give memory back: {error}"),
        }
    }
}

fn discard_reported(chain: &Chain, memory: &Memory, shared: &Shared) {
    for (start, len) in chain.writable_ranges() {
        match discard::discard(memory, start, len) {
            Ok(()) => {
                let reported = &shared.metrics.reported_bytes;
                reported.fetch_add(len, Ordering::Relaxed);
            }
            Err(error) => guest_fault!("cannot give memory back: {error}"),
        }
    }
}

/// Reads `struct virtio_balloon_stat`s (section 5.5.6.4).
fn read_statistics(chain: &Chain, memory: &Memory) -> MemoryStatistics {
    let mut all = MemoryStatistics::default();
    let count = (chain.readable_len() / STATISTIC_SIZE).min(MAX_STATISTICS);
    for index in 0..count {
        let mut bytes = [0; STATISTIC_SIZE as usize];
        if chain
            .read(memory, index * STATISTIC_SIZE, &mut bytes)
            .is_err()
        {
            break;
        }
        let [t0, t1, value @ ..] = bytes;
        let place = match u16::from_le_bytes([t0, t1]) {
            S_SWAP_IN => &mut all.swap_in,
            S_SWAP_OUT => &mut all.swap_out,
            S_MAJFLT => &mut all.major_faults,
            S_MINFLT => &mut all.minor_faults,
            S_MEMFREE => &mut all.free,
            S_MEMTOT => &mut all.total,
            S_AVAIL => &mut all.available,
            S_CACHES => &mut all.caches,
            _ => continue,
        };
        *place = Some(u64::from_le_bytes(value));
    }
    all
}

/// Takes the statistics buffers that the guest offers, at most one batch.
fn take_statistics(queue: &mut ActiveQueue, shared: &Shared) -> Result<(), QueueError> {
    for _ in 0..BATCH {
        if let Some(chain) = queue.pop()? {
            *lock(&shared.statistics) = read_statistics(&chain, queue.memory());
            // One at a time: if a driver offers several, the previous one goes back.
            let before = lock(&shared.held).replace(chain.head());
            if let Some(before) = before {
                queue.complete(before, 0)?;
            }
        } else if !queue.arm()? {
            return Ok(());
        }
    }
    queue.kick_self();
    Ok(())
}

impl BalloonWorker {
    fn serve(&mut self) -> Result<(), QueueError> {
        let shared = &self.shared;
        self.inflate.serve_batch(BATCH, |chain, memory| {
            discard_inflated(chain, memory, shared);
            0
        })?;
        self.deflate.serve_batch(BATCH, |chain, _| {
            let bytes = u64::from(chain.readable_len() / 4) * PAGE_SIZE;
            let deflated = &shared.metrics.deflated_bytes;
            deflated.fetch_add(bytes, Ordering::Relaxed);
            0
        })?;
        if let Some(queue) = &mut self.reporting {
            queue.serve_batch(BATCH, |chain, memory| {
                discard_reported(chain, memory, shared);
                0
            })?;
        }
        if let Some(queue) = &mut self.statistics {
            take_statistics(queue, shared)?;
        }
        Ok(())
    }

    /// Returns the statistics buffer to the guest, which refills it.
    fn return_statistics_buffer(&mut self) -> Result<(), QueueError> {
        let held = lock(&self.shared.held).take();
        if let (Some(queue), Some(head)) = (&mut self.statistics, held) {
            queue.complete(head, 0)?;
            queue.notify()?;
        }
        Ok(())
    }

    fn queues(&self) -> impl Iterator<Item = &ActiveQueue> {
        let optional = self.statistics.iter().chain(&self.reporting);
        [&self.inflate, &self.deflate].into_iter().chain(optional)
    }
}

impl MutEventSubscriber for BalloonWorker {
    fn init(&mut self, ops: &mut EventOps) {
        let kicks = self.queues().map(ActiveQueue::kick);
        for event in kicks.chain([&self.shared.statistics_requested]) {
            if let Err(error) = ops.add(Events::new(event, EventSet::IN)) {
                log::error!("a balloon's queue can't be watched: {error}");
            }
        }
        self.process(Events::empty(self.inflate.kick()), ops);
    }

    fn process(&mut self, _events: Events, ops: &mut EventOps) {
        for queue in self.queues() {
            queue.kick().read().ok();
        }
        let asked = self.shared.statistics_requested.read().is_ok();
        let served = match asked {
            true => self.return_statistics_buffer().and_then(|()| self.serve()),
            false => self.serve(),
        };
        if let Err(error) = served {
            self.inflate.fail(&error);
            for event in self
                .queues()
                .map(ActiveQueue::kick)
                .chain([&self.shared.statistics_requested])
            {
                ops.remove(Events::empty(event)).ok();
            }
        }
    }
}

#[cfg(test)]
mod tests;
