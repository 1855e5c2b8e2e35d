//! virtio-mem (virtio 1.2, section 5.15): adds memory to a running guest and removes it again.
//!
//! The device manages one region of guest physical addresses in blocks of [`BLOCK_SIZE`], none of which is
//! plugged at start. The owner sets a size ([`MemHandle::set_requested`]). The guest's driver reads it from
//! the configuration space, requests to plug or unplug blocks, and adds them to its kernel or removes them.
//! Memory that the guest cannot migrate stays plugged: a guest shrinks as far as it can, and
//! [`MemHandle::plugged`] returns the size reached.
//!
//! ```text
//! addr                       addr + usable_region_size      addr + region_size
//!  │ plugged │ free │ plugged │ ...          │   not usable yet     │
//!  └──────── plugged_size → requested_size ──┘
//! ```
//!
//! There is one queue, served on the event loop, one request at a time. A driver reset leaves plugged blocks
//! plugged (section 5.15.6): the memory may be in use by the guest's next driver.
//!
//! A guest that accesses blocks that it never plugged must not obtain host memory that way:
//! - The region is divided into memory slots ([`MemorySlots`]). A slot is registered while a block in it is
//!   plugged; accesses elsewhere in the region find no memory, as at any address without a device.
//! - A slot is added only if the total size of slots then stays within the requested size plus the slack,
//!   rounded up to slots: keeping one block in each of many slots gains a guest nothing.
//! - Devices reject addresses in unplugged blocks ([`crate::virtio::memory`]).
//! - Unplugged blocks are discarded at once. If the guest touches such a block in a slot that still exists,
//!   or a device had I/O to it in flight, the memory is discarded when the owner sets another size, when the
//!   owner asks for it ([`MemHandle::discard_unplugged`]), and once a second while the guest unplugs.

mod region;
mod slots;

use crate::fault::guest_fault;
use crate::virtio::loop_worker::LoopWorker;
use crate::virtio::{
    ActivateError, Activation, COMMON_FEATURES, Chain, DeviceKind, Interrupt, Memory, Payload,
    Schema, StateError, VirtioDevice, Worker, read_config_space,
};
use event_manager::MutEventSubscriber;
use koya_host::sync::lock;
use region::Region;
use serde::{Deserialize, Serialize};
use slots::Slots;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

pub use crate::virtio::memory::BLOCK_SIZE;
pub use slots::slot_size;

/// Feature bit: unplugged memory must not be read either (section 5.15.3).
const F_UNPLUGGED_INACCESSIBLE: u32 = 1;

/// `struct virtio_mem_req` (section 5.15.6).
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
struct Request {
    kind: U16,
    padding: [u8; 6],
    address: U64,
    count: U16,
    more_padding: [u8; 6],
}

const REQUEST_PLUG: u16 = 0;
const REQUEST_UNPLUG: u16 = 1;
const REQUEST_UNPLUG_ALL: u16 = 2;
const REQUEST_STATE: u16 = 3;

// Responses: type, padding to 8 bytes, state.
const RESPONSE_SIZE: u32 = 10;
const RESPONSE_ACK: u16 = 0;
const RESPONSE_NACK: u16 = 1;
const RESPONSE_BUSY: u16 = 2;
const RESPONSE_ERROR: u16 = 3;

const STATE_PLUGGED: u16 = 0;
const STATE_UNPLUGGED: u16 = 1;
const STATE_MIXED: u16 = 2;

const QUEUE_SIZES: &[u16] = &[64];

/// Interval at which all unplugged memory is discarded while the guest unplugs.
const SWEEP: Duration = Duration::from_secs(1);

/// Registers the region's memory with the hypervisor, in consecutive slots of one size; the last one may be
/// smaller.
pub trait MemorySlots: Send + Sync {
    /// Registers slot `index`, so that the guest can access it.
    ///
    /// # Errors
    /// The error from the host; the guest cannot access the slot.
    fn add(&self, index: usize) -> io::Result<()>;
    /// Removes slot `index`: when this returns, the guest can no longer access it.
    ///
    /// # Errors
    /// The error from the host; the guest may still access the slot.
    fn remove(&self, index: usize) -> io::Result<()>;
}

/// The slots and the memory behind them, which do not outlive the machine.
struct Backing {
    slots: Box<dyn MemorySlots>,
    memory: Weak<Memory>,
}

/// Metrics of the device.
#[derive(Debug, Default, Serialize)]
pub struct MemMetrics {
    /// Requests from the driver.
    pub requests: AtomicU64,
    /// Bytes plugged.
    pub plugged_bytes: AtomicU64,
    /// Bytes unplugged.
    pub unplugged_bytes: AtomicU64,
    /// Invalid requests that were rejected.
    pub faults: AtomicU64,
}

/// State of a memory device apart from its queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemState {
    /// Start address of the region.
    pub start: u64,
    /// Size of the region in bytes.
    pub size: u64,
    /// Size of the part that the driver may use, in bytes.
    pub usable: u64,
    /// Requested size in bytes.
    pub requested: u64,
    /// Plugged blocks as runs: first block and count.
    pub plugged: Vec<(u64, u64)>,
}

struct Shared {
    region: Mutex<Region>,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
    metrics: MemMetrics,
    /// Without slots the whole region is memory from the start.
    backing: Option<Backing>,
}

/// The memory device.
pub struct Mem {
    shared: Arc<Shared>,
}

/// Controls a memory device while the guest uses it.
#[derive(Clone)]
pub struct MemHandle {
    shared: Arc<Shared>,
}

impl MemHandle {
    /// Sets the requested size in bytes, rounded up to blocks and down to the region's size. The guest
    /// follows in its own time; see [`plugged`](Self::plugged).
    pub fn set_requested(&self, bytes: u64) {
        let mut region = lock(&self.shared.region);
        region.requested = match bytes.checked_next_multiple_of(BLOCK_SIZE) {
            Some(bytes) => bytes.min(region.size),
            None => region.size,
        };
        region.grow_usable();
        drop(region);
        self.discard_unplugged();
        if let Some(interrupt) = &*lock(&self.shared.interrupt) {
            interrupt.config();
        }
    }

    /// Requested size in bytes.
    pub fn requested(&self) -> u64 {
        lock(&self.shared.region).requested
    }

    /// Plugged size in bytes.
    pub fn plugged(&self) -> u64 {
        lock(&self.shared.region).plugged
    }

    /// Maximum size in bytes.
    pub fn size(&self) -> u64 {
        lock(&self.shared.region).size
    }

    /// Total size of registered slots, which is the memory accessible to the guest, in bytes.
    pub fn reachable(&self) -> u64 {
        let region = lock(&self.shared.region);
        region.slots.present_bytes().min(region.size)
    }

    /// Discards all memory that the guest has obtained in unplugged blocks.
    pub fn discard_unplugged(&self) {
        let backing = self.shared.backing.as_ref();
        if let Some(memory) = backing.and_then(|backing| backing.memory.upgrade()) {
            lock(&self.shared.region).sweep(backing, &memory);
        }
    }

    /// Metrics of the device.
    pub fn metrics(&self) -> &MemMetrics {
        &self.shared.metrics
    }
}

/// A region of guest memory that is registered slot by slot; see [`Mem::with_slots`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlottedRegion {
    /// Start address.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
    /// Granularity in which the guest kernel adds memory, in bytes.
    pub memory_block: u64,
    /// Size of a slot in bytes, a multiple of [`BLOCK_SIZE`].
    pub slot_size: u64,
}

impl Mem {
    /// A device for the region of guest memory at `start`, with nothing plugged. `memory_block` is the
    /// granularity in which the guest kernel adds memory; the slack lets it use the next block if it cannot
    /// use all of one.
    ///
    /// # Errors
    /// `InvalidInput` if start or size is not a multiple of [`BLOCK_SIZE`].
    pub fn new(start: u64, size: u64, memory_block: u64) -> io::Result<Self> {
        Self::make(start, size, memory_block, size, None)
    }

    /// The same for a region of `memory` that is registered slot by slot.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_slots(
        region: SlottedRegion,
        memory: &Arc<Memory>,
        slots: impl MemorySlots + 'static,
    ) -> io::Result<Self> {
        let backing = Backing {
            slots: Box::new(slots),
            memory: Arc::downgrade(memory),
        };
        let SlottedRegion {
            start,
            size,
            memory_block,
            slot_size,
        } = region;
        Self::make(start, size, memory_block, slot_size, Some(backing))
    }

    fn make(
        start: u64,
        size: u64,
        memory_block: u64,
        slot_size: u64,
        backing: Option<Backing>,
    ) -> io::Result<Self> {
        let whole = start.is_multiple_of(BLOCK_SIZE) && size.is_multiple_of(BLOCK_SIZE);
        let whole = whole && slot_size.is_multiple_of(BLOCK_SIZE);
        if !whole || size == 0 || slot_size == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{size:#x} bytes at {start:#x} are not whole blocks of {BLOCK_SIZE:#x}"),
            ));
        }
        let mut region = Region {
            start,
            size,
            usable: 0,
            requested: 0,
            plugged: 0,
            slack: memory_block.saturating_mul(2),
            blocks: vec![false; (size / BLOCK_SIZE) as usize],
            slots: Slots::new(size, slot_size),
            swept: Instant::now(),
        };
        region.grow_usable();
        Ok(Self {
            shared: Arc::new(Shared {
                region: Mutex::new(region),
                interrupt: Mutex::new(None),
                metrics: MemMetrics::default(),
                backing,
            }),
        })
    }

    /// A handle for the owner.
    pub fn handle(&self) -> MemHandle {
        MemHandle {
            shared: self.shared.clone(),
        }
    }
}

impl MemState {
    /// Schema of the state.
    pub const SCHEMA: Schema = Schema::new("virtio-mem", 1);
}

impl VirtioDevice for Mem {
    fn kind(&self) -> DeviceKind {
        DeviceKind::MEMORY
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        COMMON_FEATURES | 1 << F_UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&lock(&self.shared.region).config(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Worker, ActivateError> {
        let queue = activation.take_queue(0)?;
        *lock(&self.shared.interrupt) = Some(activation.interrupt);
        let shared = self.shared.clone();
        Ok(Worker::EventLoop(Box::new(LoopWorker::new(
            "memory",
            queue,
            move |chain, memory| serve(&shared, chain, memory),
        ))))
    }

    fn save(&self) -> Result<Payload, StateError> {
        let region = lock(&self.shared.region);
        let runs = region.runs(true).into_iter();
        let plugged = runs.map(|run| (run.start as u64, run.len() as u64));
        MemState::SCHEMA.encode(&MemState {
            start: region.start,
            size: region.size,
            usable: region.usable,
            requested: region.requested,
            plugged: plugged.collect(),
        })
    }

    fn restore(&mut self, state: &Payload) -> Result<(), StateError> {
        let state: MemState = MemState::SCHEMA.decode(state)?;
        let mut region = lock(&self.shared.region);
        let bounds = state.usable.max(state.requested);
        if (state.start, state.size) != (region.start, region.size) || bounds > region.size {
            return Err(StateError::Mismatch("the region is another one"));
        }
        let mut blocks = vec![false; region.blocks.len()];
        for (first, count) in &state.plugged {
            let end = first.checked_add(*count).unwrap_or(u64::MAX);
            let run = blocks.get_mut(*first as usize..end as usize);
            run.ok_or(StateError::Mismatch("a block lies outside the region"))?
                .fill(true);
        }
        let before = (region.usable, region.requested);
        region.plugged = blocks.iter().filter(|on| **on).count() as u64 * BLOCK_SIZE;
        region.blocks = blocks;
        region.usable = state.usable;
        region.requested = state.requested;
        let restored = self.restore_slots(&mut region);
        if restored.is_err() {
            // On failure nothing is plugged, and no driver has used any block.
            (region.usable, region.requested) = before;
            let backing = self.shared.backing.as_ref();
            let memory = backing.and_then(|backing| backing.memory.upgrade());
            region.unplug_all(backing, memory.as_deref());
        }
        restored
    }

    fn reset(&mut self, _worker: Option<Box<dyn MutEventSubscriber + Send>>) {
        lock(&self.shared.interrupt).take();
    }
}

impl Mem {
    /// Registers exactly the slots that have plugged blocks.
    fn restore_slots(&self, region: &mut Region) -> Result<(), StateError> {
        let all = 0..region.blocks.len();
        region.slots.set(&all, false);
        let runs = region.runs(true);
        for run in &runs {
            region.slots.set(run, true);
        }
        let Some(backing) = &self.shared.backing else {
            return Ok(());
        };
        let memory = backing.memory.upgrade();
        let memory = memory.ok_or(StateError::Mismatch("its machine has ended"))?;
        region.set_visible(&memory, all, false);
        for run in runs {
            add_missing(&mut region.slots, Some(backing), &run).map_err(StateError::resume)?;
            region.set_visible(&memory, run, true);
        }
        region.sweep(Some(backing), &memory);
        Ok(())
    }
}

/// Adds the missing slots of these blocks.
fn add_missing(
    slots: &mut Slots,
    backing: Option<&Backing>,
    blocks: &Range<usize>,
) -> io::Result<()> {
    for index in slots.missing(blocks) {
        if let Some(backing) = backing {
            backing.slots.add(index)?;
        }
        slots.set_present(index, true);
    }
    Ok(())
}

/// Removes slots without plugged blocks; those that the host fails to remove remain listed.
fn remove_empty(slots: &mut Slots, backing: Option<&Backing>) {
    for index in slots.empty() {
        let removed = backing.map_or(Ok(()), |backing| backing.slots.remove(index));
        match removed {
            Ok(()) => slots.set_present(index, false),
            Err(error) => guest_fault!("cannot take unplugged memory from the guest: {error}"),
        }
    }
}

/// Handles a request; returns response type and state.
fn handle_request(shared: &Shared, memory: &Memory, chain: &Chain) -> (u16, u16) {
    shared.metrics.requests.fetch_add(1, Ordering::Relaxed);
    let mut request = Request::new_zeroed();
    let whole = chain.read(memory, 0, request.as_mut_bytes()).is_ok();
    let (address, count) = (request.address.get(), request.count.get());
    let backing = shared.backing.as_ref();
    let mut region = lock(&shared.region);
    let before = region.plugged;
    let answered = match request.kind.get() {
        _ if !whole => None,
        REQUEST_PLUG => plug(&mut region, backing, memory, address, count),
        REQUEST_UNPLUG => unplug(&mut region, backing, memory, address, count),
        REQUEST_UNPLUG_ALL => Some(unplug_all(&mut region, backing, memory)),
        REQUEST_STATE => state(&region, address, count),
        _ => None,
    };
    let metrics = &shared.metrics;
    let (counter, change) = match region.plugged.checked_sub(before) {
        Some(more) => (&metrics.plugged_bytes, more),
        None => (&metrics.unplugged_bytes, before - region.plugged),
    };
    counter.fetch_add(change, Ordering::Relaxed);
    answered.unwrap_or_else(|| {
        guest_fault!("a memory request names what the guest does not have");
        shared.metrics.faults.fetch_add(1, Ordering::Relaxed);
        (RESPONSE_ERROR, 0)
    })
}

fn plug(
    region: &mut Region,
    backing: Option<&Backing>,
    memory: &Memory,
    address: u64,
    count: u16,
) -> Option<(u16, u16)> {
    let range = region.range(address, count)?;
    if region.blocks[range.clone()].contains(&true) {
        return None;
    }
    if region.plugged + range.len() as u64 * BLOCK_SIZE > region.requested {
        return Some((RESPONSE_NACK, 0));
    }
    let slots = &mut region.slots;
    let missing = slots.missing(&range).len();
    if missing > 0 && slots.present() + missing > region.max_slots() {
        guest_fault!("the guest keeps blocks in more memory slots than its memory needs");
        return Some((RESPONSE_BUSY, 0));
    }
    if let Err(error) = add_missing(&mut region.slots, backing, &range) {
        guest_fault!("cannot plug memory: {error}");
        remove_empty(&mut region.slots, backing);
        return Some((RESPONSE_BUSY, 0));
    }
    region.set(memory, range, true);
    Some((RESPONSE_ACK, 0))
}

fn unplug(
    region: &mut Region,
    backing: Option<&Backing>,
    memory: &Memory,
    address: u64,
    count: u16,
) -> Option<(u16, u16)> {
    let range = region.range(address, count)?;
    if region.blocks[range.clone()].contains(&false) {
        return None;
    }
    // Made inaccessible first, then discarded, so that the guest cannot touch it in between.
    region.set(memory, range.clone(), false);
    remove_empty(&mut region.slots, backing);
    match region.swept.elapsed() > SWEEP {
        true => region.sweep(backing, memory),
        false => region.discard(memory, range),
    }
    Some((RESPONSE_ACK, 0))
}

fn unplug_all(region: &mut Region, backing: Option<&Backing>, memory: &Memory) -> (u16, u16) {
    region.unplug_all(backing, Some(memory));
    region.usable = 0;
    region.grow_usable();
    (RESPONSE_ACK, 0)
}

fn state(region: &Region, address: u64, count: u16) -> Option<(u16, u16)> {
    let blocks = &region.blocks[region.range(address, count)?];
    let state = match (blocks.contains(&true), blocks.contains(&false)) {
        (true, false) => STATE_PLUGGED,
        (false, true) => STATE_UNPLUGGED,
        _ => STATE_MIXED,
    };
    Some((RESPONSE_ACK, state))
}

/// Serves one request; returns the number of bytes written.
fn serve(shared: &Shared, chain: &Chain, memory: &Memory) -> u32 {
    let (kind, state) = handle_request(shared, memory, chain);
    let mut response = [0; RESPONSE_SIZE as usize];
    response[..2].copy_from_slice(&kind.to_le_bytes());
    response[8..].copy_from_slice(&state.to_le_bytes());
    match chain.write(memory, 0, &response) {
        Ok(()) => RESPONSE_SIZE,
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests;
