//! Memory that comes and goes: virtio 1.2, section 5.15 (virtio-mem). How a running guest gets more
//! memory than it started with, and gives it up again.
//!
//! The device manages one region of the guest's addresses, in blocks of [`BLOCK_SIZE`]. At the start
//! none of it is plugged. The owner asks for so much ([`MemHandle::set_requested`]); the guest's driver
//! sees the new number in the configuration space, asks to plug or unplug block after block, and adds
//! them to or takes them from its kernel. What can't be moved away stays plugged: a guest shrinks as
//! far as it can, and [`MemHandle::plugged`] says how far that was.
//!
//! ```text
//! addr                       addr + usable_region_size      addr + region_size
//!  │ plugged │ free │ plugged │ ...          │  not to be used yet  │
//!  └──────── plugged_size → requested_size ──┘
//! ```
//!
//! One queue with one request at a time, served on the event loop. Unplugged blocks go back to the
//! host at once. A guest that uses blocks that it never plugged harms nobody else: it can hold up to
//! the region's size, which is what its owner allowed it at most. A reset of the driver leaves plugged
//! what is plugged (section 5.15.6): the memory may be in use by the guest's next driver.

use crate::give_back::give_back;
use crate::sync::{guest_fault, lock};
use crate::virtio::on_loop::OnLoop;
use crate::virtio::{
    ActivateError, Activation, Chain, DeviceKind, DeviceState, Interrupt, Memory, StateError,
    VirtioDevice, Worker, read_config_space,
};
use event_manager::MutEventSubscriber;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vm_memory::GuestAddress;
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// What is plugged and unplugged at once, in bytes: a huge page of the host's.
pub const BLOCK_SIZE: u64 = 2 << 20;

/// Feature bit: memory that is not plugged is not to be read either (section 5.15.3).
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

/// What the device did so far.
#[derive(Debug, Default, Serialize)]
pub struct MemMetrics {
    /// Requests of the driver.
    pub requests: AtomicU64,
    /// Bytes that were plugged.
    pub plugged_bytes: AtomicU64,
    /// Bytes that were unplugged.
    pub unplugged_bytes: AtomicU64,
    /// Requests that the device refused as impossible.
    pub faults: AtomicU64,
}

/// A memory device's state beyond its queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemState {
    /// The region's first address.
    pub start: u64,
    /// Its size in bytes.
    pub size: u64,
    /// How much of it the driver may look at, in bytes.
    pub usable: u64,
    /// What the guest is asked to have, in bytes.
    pub requested: u64,
    /// What is plugged: the first block and how many, run by run.
    pub plugged: Vec<(u64, u64)>,
}

/// The region's state.
struct Region {
    start: u64,
    size: u64,
    usable: u64,
    requested: u64,
    plugged: u64,
    /// How far beyond what is requested the driver may look for blocks.
    slack: u64,
    /// One a block: whether it is plugged.
    blocks: Vec<bool>,
}

impl Region {
    /// The blocks that a request names, if it is one that a driver may make.
    fn range(&self, address: u64, count: u16) -> Option<std::ops::Range<usize>> {
        let offset = address.checked_sub(self.start)?;
        let len = u64::from(count) * BLOCK_SIZE;
        let fits = offset % BLOCK_SIZE == 0 && offset.checked_add(len)? <= self.usable;
        let first = (offset / BLOCK_SIZE) as usize;
        (fits && count > 0).then(|| first..first + usize::from(count))
    }

    fn set(&mut self, range: std::ops::Range<usize>, plugged: bool) {
        let len = range.len() as u64 * BLOCK_SIZE;
        self.blocks[range].fill(plugged);
        match plugged {
            true => self.plugged += len,
            false => self.plugged -= len,
        }
    }

    /// It grows with what is requested. A driver that asks for what was usable a moment ago must not be
    /// told that it never was, so it shrinks only when the driver has given all back (UNPLUG_ALL).
    fn grow_usable(&mut self) {
        let wanted = self.requested.saturating_add(self.slack).min(self.size);
        self.usable = self.usable.max(wanted);
    }

    /// `struct virtio_mem_config` (section 5.15.4).
    fn config(&self) -> Vec<u8> {
        let node_and_padding = 0;
        [
            BLOCK_SIZE,
            node_and_padding,
            self.start,
            self.size,
            self.usable,
            self.plugged,
            self.requested,
        ]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect()
    }
}

struct Shared {
    region: Mutex<Region>,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
    metrics: MemMetrics,
}

/// The memory device.
pub struct Mem {
    shared: Arc<Shared>,
}

/// How a memory device's owner reaches it while the guest uses it.
#[derive(Clone)]
pub struct MemHandle {
    shared: Arc<Shared>,
}

impl MemHandle {
    /// Asks the guest to have this many bytes of the region, rounded up to blocks and down to the
    /// region's size. It does so in its own time; see [`plugged`](Self::plugged).
    pub fn set_requested(&self, bytes: u64) {
        let mut region = lock(&self.shared.region);
        region.requested = match bytes.checked_next_multiple_of(BLOCK_SIZE) {
            Some(bytes) => bytes.min(region.size),
            None => region.size,
        };
        region.grow_usable();
        drop(region);
        if let Some(interrupt) = &*lock(&self.shared.interrupt) {
            interrupt.config();
        }
    }

    /// What the guest is asked to have, in bytes.
    pub fn requested(&self) -> u64 {
        lock(&self.shared.region).requested
    }

    /// What it has, in bytes.
    pub fn plugged(&self) -> u64 {
        lock(&self.shared.region).plugged
    }

    /// The most that it can have, in bytes.
    pub fn size(&self) -> u64 {
        lock(&self.shared.region).size
    }

    /// What the device did so far.
    pub fn metrics(&self) -> &MemMetrics {
        &self.shared.metrics
    }
}

impl Mem {
    /// A device for the region of guest memory at `start`, of which nothing is plugged. `memory_block` is
    /// what the guest's kernel adds memory in: what it can't use of one has room in the next.
    ///
    /// # Errors
    /// `InvalidInput` if start or size is not a multiple of [`BLOCK_SIZE`].
    pub fn new(start: u64, size: u64, memory_block: u64) -> io::Result<Self> {
        let whole = start.is_multiple_of(BLOCK_SIZE) && size.is_multiple_of(BLOCK_SIZE);
        if !whole || size == 0 {
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
        };
        region.grow_usable();
        Ok(Self {
            shared: Arc::new(Shared {
                region: Mutex::new(region),
                interrupt: Mutex::new(None),
                metrics: MemMetrics::default(),
            }),
        })
    }

    /// What its owner keeps.
    pub fn handle(&self) -> MemHandle {
        MemHandle {
            shared: self.shared.clone(),
        }
    }
}

impl VirtioDevice for Mem {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Memory
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << F_UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&lock(&self.shared.region).config(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Worker, ActivateError> {
        let queue = activation.take_queue(0)?;
        *lock(&self.shared.interrupt) = Some(activation.interrupt);
        let shared = self.shared.clone();
        Ok(Worker::EventLoop(Box::new(OnLoop::new(
            "memory",
            queue,
            move |chain, memory| serve(&shared, chain, memory),
        ))))
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        let region = lock(&self.shared.region);
        let mut plugged: Vec<(u64, u64)> = Vec::new();
        for (index, _) in region.blocks.iter().enumerate().filter(|(_, on)| **on) {
            match plugged.last_mut() {
                Some((first, count)) if *first + *count == index as u64 => *count += 1,
                _ => plugged.push((index as u64, 1)),
            }
        }
        Ok(DeviceState::Memory(MemState {
            start: region.start,
            size: region.size,
            usable: region.usable,
            requested: region.requested,
            plugged,
        }))
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Memory(state) = state else {
            return Err(StateError::Misfit("it is not a memory device's"));
        };
        let mut region = lock(&self.shared.region);
        let bounds = state.usable.max(state.requested);
        if (state.start, state.size) != (region.start, region.size) || bounds > region.size {
            return Err(StateError::Misfit("the region is another one"));
        }
        let mut blocks = vec![false; region.blocks.len()];
        for (first, count) in &state.plugged {
            let end = first.checked_add(*count).unwrap_or(u64::MAX);
            let run = blocks.get_mut(*first as usize..end as usize);
            run.ok_or(StateError::Misfit("a block lies outside the region"))?
                .fill(true);
        }
        region.plugged = blocks.iter().filter(|on| **on).count() as u64 * BLOCK_SIZE;
        region.blocks = blocks;
        region.usable = state.usable;
        region.requested = state.requested;
        Ok(())
    }

    fn reset(&mut self, _worker: Option<Box<dyn MutEventSubscriber + Send>>) {
        lock(&self.shared.interrupt).take();
    }
}

/// The answer to one request: type and state.
fn answer(shared: &Shared, memory: &Memory, chain: &Chain) -> (u16, u16) {
    shared.metrics.requests.fetch_add(1, Ordering::Relaxed);
    let mut request = Request::new_zeroed();
    let whole = chain.read(memory, 0, request.as_mut_bytes()).is_ok();
    let (address, count) = (request.address.get(), request.count.get());
    let mut region = lock(&shared.region);
    let before = region.plugged;
    let answered = match request.kind.get() {
        _ if !whole => None,
        REQUEST_PLUG => plug(&mut region, address, count),
        REQUEST_UNPLUG => unplug(&mut region, memory, address, count),
        REQUEST_UNPLUG_ALL => Some(unplug_all(&mut region, memory)),
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

fn plug(region: &mut Region, address: u64, count: u16) -> Option<(u16, u16)> {
    let range = region.range(address, count)?;
    if region.blocks[range.clone()].contains(&true) {
        return None;
    }
    if region.plugged + range.len() as u64 * BLOCK_SIZE > region.requested {
        return Some((RESPONSE_NACK, 0));
    }
    region.set(range, true);
    Some((RESPONSE_ACK, 0))
}

fn unplug(region: &mut Region, memory: &Memory, address: u64, count: u16) -> Option<(u16, u16)> {
    let range = region.range(address, count)?;
    if region.blocks[range.clone()].contains(&false) {
        return None;
    }
    let len = range.len() as u64 * BLOCK_SIZE;
    if let Err(error) = give_back(memory, GuestAddress(address), len) {
        guest_fault!("cannot give unplugged memory back: {error}");
        return Some((RESPONSE_BUSY, 0));
    }
    region.set(range, false);
    Some((RESPONSE_ACK, 0))
}

fn unplug_all(region: &mut Region, memory: &Memory) -> (u16, u16) {
    if let Err(error) = give_back(memory, GuestAddress(region.start), region.size) {
        guest_fault!("cannot give unplugged memory back: {error}");
        return (RESPONSE_BUSY, 0);
    }
    region.blocks.fill(false);
    region.plugged = 0;
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

/// Answers one request; how many bytes that took.
fn serve(shared: &Shared, chain: &Chain, memory: &Memory) -> u32 {
    let (kind, state) = answer(shared, memory, chain);
    let mut response = [0; RESPONSE_SIZE as usize];
    response[..2].copy_from_slice(&kind.to_le_bytes());
    response[8..].copy_from_slice(&state.to_le_bytes());
    match chain.write(memory, 0, &response) {
        Ok(()) => RESPONSE_SIZE,
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_utils::{Buffer, Driver, MEMORY_SIZE};
    use crate::virtio::ActiveQueue;
    use vm_memory::Bytes;

    const START: u64 = 1 << 32;
    const SIZE: u64 = 512 << 20;
    const MEMORY_BLOCK: u64 = 128 << 20;

    struct Setup {
        handle: MemHandle,
        driver: Driver,
        queue: ActiveQueue,
    }

    fn setup(requested: u64) -> Setup {
        let ranges = [
            (GuestAddress(0), MEMORY_SIZE),
            (GuestAddress(START), SIZE as usize),
        ];
        let driver = Driver::with_memory(Arc::new(Memory::from_ranges(&ranges).unwrap()), 16);
        let device = Mem::new(START, SIZE, MEMORY_BLOCK).unwrap();
        let handle = device.handle();
        handle.set_requested(requested);
        Setup {
            handle,
            queue: driver.queue(),
            driver,
        }
    }

    impl Setup {
        /// Type and state of the answer.
        fn ask(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
            let mut request = [0; size_of::<Request>()];
            request[..2].copy_from_slice(&kind.to_le_bytes());
            request[8..16].copy_from_slice(&address.to_le_bytes());
            request[16..18].copy_from_slice(&count.to_le_bytes());
            self.send(&request)
        }

        fn send(&mut self, request: &[u8]) -> (u16, u16) {
            let parts = [
                Buffer::Readable(request.to_vec()),
                Buffer::Writable(RESPONSE_SIZE),
            ];
            let head = self.driver.offer(&parts);
            let shared = self.handle.shared.clone();
            let answered = self
                .queue
                .drain(|chain, memory| serve(&shared, chain, memory));
            answered.unwrap();
            assert_eq!(self.driver.used(), [(head, RESPONSE_SIZE)]);
            let bytes = self.driver.written(head, RESPONSE_SIZE as usize);
            let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
            (word(0), word(8))
        }
    }

    #[test]
    fn blocks_are_plugged_up_to_what_is_requested() {
        let mut setup = setup(8 << 20);
        assert_eq!(setup.ask(REQUEST_PLUG, START, 3), (RESPONSE_ACK, 0));
        assert_eq!(
            setup.ask(REQUEST_PLUG, START + (6 << 20), 2).0,
            RESPONSE_NACK
        );
        assert_eq!(
            setup.ask(REQUEST_PLUG, START + (6 << 20), 1).0,
            RESPONSE_ACK
        );
        assert_eq!(setup.handle.plugged(), 8 << 20);
        assert_eq!(
            setup.ask(REQUEST_STATE, START, 4),
            (RESPONSE_ACK, STATE_PLUGGED)
        );
        assert_eq!(
            setup.ask(REQUEST_STATE, START, 5),
            (RESPONSE_ACK, STATE_MIXED)
        );
        let beyond = START + (8 << 20);
        assert_eq!(
            setup.ask(REQUEST_STATE, beyond, 1),
            (RESPONSE_ACK, STATE_UNPLUGGED)
        );
    }

    #[test]
    fn unplugged_memory_goes_back() {
        let mut setup = setup(8 << 20);
        setup.ask(REQUEST_PLUG, START, 4);
        let memory = setup.driver.memory().clone();
        let last = GuestAddress(START + (6 << 20));
        for address in [GuestAddress(START), last] {
            memory.write_obj(7u8, address).unwrap();
        }
        assert_eq!(setup.ask(REQUEST_UNPLUG, START, 3).0, RESPONSE_ACK);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(START)).unwrap(), 0);
        assert_eq!(memory.read_obj::<u8>(last).unwrap(), 7);
        assert_eq!(setup.ask(REQUEST_UNPLUG_ALL, 0, 0).0, RESPONSE_ACK);
        assert_eq!(memory.read_obj::<u8>(last).unwrap(), 0);
        assert_eq!(setup.handle.plugged(), 0);
        let metrics = setup.handle.metrics();
        assert_eq!(metrics.unplugged_bytes.load(Ordering::Relaxed), 8 << 20);
    }

    #[test]
    fn impossible_requests_are_errors_and_change_nothing() {
        let mut setup = setup(8 << 20);
        setup.ask(REQUEST_PLUG, START, 1);
        let usable = START + (264 << 20);
        for (kind, address, count) in [
            (REQUEST_PLUG, START, 1),
            (REQUEST_UNPLUG, START, 2),
            (REQUEST_UNPLUG, START + BLOCK_SIZE, 1),
            (REQUEST_PLUG, START + 4096, 1),
            (REQUEST_PLUG, START - BLOCK_SIZE, 1),
            (REQUEST_PLUG, START + BLOCK_SIZE, 0),
            (REQUEST_PLUG, usable, 1),
            (REQUEST_PLUG, u64::MAX - BLOCK_SIZE + 1, u16::MAX),
            (REQUEST_STATE, 0, 1),
            (99, START, 1),
        ] {
            let answer = setup.ask(kind, address, count);
            assert_eq!(answer.0, RESPONSE_ERROR, "{kind} {address:#x} {count}");
        }
        assert_eq!(setup.send(&[0; 7]).0, RESPONSE_ERROR);
        assert_eq!(setup.handle.plugged(), BLOCK_SIZE);
        let faults = setup.handle.metrics().faults.load(Ordering::Relaxed);
        assert_eq!(faults, 11);
    }

    #[test]
    fn a_new_size_is_announced_and_bounded() {
        let setup = setup(0);
        let interrupt = setup.driver.recorder();
        *lock(&setup.handle.shared.interrupt) = Some(interrupt.clone());
        setup.handle.set_requested(u64::MAX);
        assert!(interrupt.config_changed());
        assert_eq!(setup.handle.requested(), SIZE);
        setup.handle.set_requested(1);
        assert_eq!(setup.handle.requested(), BLOCK_SIZE);
        // What was usable stays so.
        let device = Mem {
            shared: setup.handle.shared.clone(),
        };
        let field = |at: u64| {
            let mut word = [0; 8];
            device.read_config(at, &mut word);
            u64::from_le_bytes(word)
        };
        let all: Vec<u64> = (0..8).map(|n| field(8 * n)).collect();
        assert_eq!(all, [BLOCK_SIZE, 0, START, SIZE, SIZE, 0, BLOCK_SIZE, 0]);
    }

    #[test]
    fn a_region_that_is_no_blocks_is_refused() {
        for (start, size) in [(1, BLOCK_SIZE), (0, BLOCK_SIZE + 1), (0, 0)] {
            assert!(Mem::new(start, size, MEMORY_BLOCK).is_err());
        }
    }
}
