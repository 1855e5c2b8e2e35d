use super::*;
use crate::test_utils::{Buffer, Driver, MEMORY_SIZE};
use crate::virtio::{ActiveQueue, MemoryRegion};
use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestRegionMmap};

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
    /// Type and state of the response.
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
            .serve_batch(64, |chain, memory| serve(&shared, chain, memory));
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
fn unplugged_memory_is_discarded() {
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
fn invalid_requests_are_errors_and_change_nothing() {
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
    // The usable region does not shrink.
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
fn a_region_of_partial_blocks_is_refused() {
    for (start, size) in [(1, BLOCK_SIZE), (0, BLOCK_SIZE + 1), (0, 0)] {
        assert!(Mem::new(start, size, MEMORY_BLOCK).is_err());
    }
}

/// The hypervisor side: the registered slots.
#[derive(Clone, Default)]
struct Recorder {
    present: Arc<Mutex<BTreeSet<usize>>>,
    refuses: Arc<AtomicBool>,
    /// A single slot that is refused.
    refused_slot: Arc<Mutex<Option<usize>>>,
}

impl Recorder {
    fn change(
        &self,
        index: usize,
        change: fn(&mut BTreeSet<usize>, usize) -> bool,
    ) -> io::Result<()> {
        let is_refused = *lock(&self.refused_slot) == Some(index);
        if is_refused || self.refuses.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        assert!(
            change(&mut lock(&self.present), index),
            "slot {index} twice"
        );
        Ok(())
    }

    fn present(&self) -> Vec<usize> {
        lock(&self.present).iter().copied().collect()
    }
}

impl MemorySlots for Recorder {
    fn add(&self, index: usize) -> io::Result<()> {
        self.change(index, BTreeSet::insert)
    }

    fn remove(&self, index: usize) -> io::Result<()> {
        self.change(index, |present, index| present.remove(&index))
    }
}

const SLOT: u64 = 128 << 20;

fn pluggable() -> Arc<Memory> {
    let region = |start, size| {
        let mapping = GuestRegionMmap::from_range(GuestAddress(start), size, None);
        mapping.unwrap()
    };
    let regions = vec![
        MemoryRegion::new(region(0, MEMORY_SIZE)),
        MemoryRegion::pluggable(region(START, SIZE as usize)),
    ];
    Arc::new(Memory::from_regions(regions).unwrap())
}

fn with_slots(memory: &Arc<Memory>, slack: u64) -> (Mem, Recorder) {
    let slots = Recorder::default();
    let region = SlottedRegion {
        start: START,
        size: SIZE,
        memory_block: slack,
        slot_size: SLOT,
    };
    let device = Mem::with_slots(region, memory, slots.clone());
    (device.unwrap(), slots)
}

fn setup_with_slots(requested: u64, slack: u64) -> (Setup, Recorder) {
    let memory = pluggable();
    let (device, slots) = with_slots(&memory, slack);
    let driver = Driver::with_memory(memory, 16);
    let handle = device.handle();
    handle.set_requested(requested);
    let queue = driver.queue();
    let setup = Setup {
        handle,
        queue,
        driver,
    };
    (setup, slots)
}

#[test]
fn the_guest_and_devices_access_plugged_blocks() {
    let (mut setup, slots) = setup_with_slots(SIZE, MEMORY_BLOCK);
    let memory = setup.driver.memory().clone();
    let writes = |address: u64| memory.write_obj(1u8, GuestAddress(address)).is_ok();
    assert!(!writes(START));
    // Across the border of two slots.
    let edge = START + SLOT - BLOCK_SIZE;
    assert_eq!(setup.ask(REQUEST_PLUG, edge, 2).0, RESPONSE_ACK);
    assert_eq!(slots.present(), [0, 1]);
    assert_eq!(setup.handle.reachable(), 2 * SLOT);
    assert!(writes(edge) && writes(edge + BLOCK_SIZE));
    assert!(!writes(edge - 1) && !writes(edge + 2 * BLOCK_SIZE));
    assert_eq!(setup.ask(REQUEST_UNPLUG, edge, 1).0, RESPONSE_ACK);
    assert_eq!(slots.present(), [1]);
    assert!(!writes(edge) && writes(edge + BLOCK_SIZE));
    assert_eq!(setup.ask(REQUEST_PLUG, edge, 1).0, RESPONSE_ACK);
    assert_eq!(setup.ask(REQUEST_UNPLUG_ALL, 0, 0).0, RESPONSE_ACK);
    assert!(slots.present().is_empty());
    assert!(!writes(edge + BLOCK_SIZE));
}

#[test]
fn a_chain_into_unplugged_memory_is_a_guest_fault() {
    let (mut setup, _slots) = setup_with_slots(SIZE, MEMORY_BLOCK);
    setup.ask(REQUEST_PLUG, START, 1);
    // The last plugged byte and the first unplugged one.
    let edge = START + BLOCK_SIZE - 1;
    for (len, is_refused) in [(1, false), (2, true)] {
        setup.driver.set_descriptor(15, edge, len, 0, 0);
        setup.driver.make_available(15);
        let popped = setup.queue.pop();
        assert_eq!(popped.is_err(), is_refused, "{popped:?}");
    }
}

/// Memory that the guest touched in unplugged blocks of a registered slot is discarded.
#[test]
fn unplugged_blocks_are_discarded_again() {
    let (mut setup, _slots) = setup_with_slots(SIZE, MEMORY_BLOCK);
    setup.ask(REQUEST_PLUG, START, 2);
    setup.ask(REQUEST_UNPLUG, START, 1);
    let memory = setup.driver.memory().clone();
    let region = memory.find_region(GuestAddress(START)).unwrap();
    // Access as by the guest, without checks.
    let touch = |offset: u64| {
        let slice = region.mapped_slice(offset, 1).unwrap();
        slice.copy_from(&[7u8]);
    };
    let look = |offset: u64| {
        let mut byte = [0u8];
        region.mapped_slice(offset, 1).unwrap().copy_to(&mut byte);
        byte[0]
    };
    touch(0);
    touch(BLOCK_SIZE);
    touch(2 * BLOCK_SIZE);
    setup.handle.discard_unplugged();
    assert_eq!([0, 1, 2].map(|n| look(n * BLOCK_SIZE)), [0, 7, 0]);
    touch(0);
    setup.handle.set_requested(4 << 20);
    assert_eq!([0, 1].map(|n| look(n * BLOCK_SIZE)), [0, 7]);
}

#[test]
fn a_block_in_each_of_many_slots_gains_nothing() {
    let (mut setup, slots) = setup_with_slots(SIZE, 0);
    for slot in 0..4 {
        let address = START + slot * SLOT;
        assert_eq!(setup.ask(REQUEST_PLUG, address, 1).0, RESPONSE_ACK);
    }
    for slot in 1..4 {
        setup.ask(REQUEST_UNPLUG, START + slot * SLOT, 1);
    }
    setup.handle.set_requested(2 * SLOT);
    assert_eq!(setup.ask(REQUEST_PLUG, START + SLOT, 1).0, RESPONSE_ACK);
    let third = START + 2 * SLOT;
    assert_eq!(setup.ask(REQUEST_PLUG, third, 1).0, RESPONSE_BUSY);
    assert_eq!(slots.present(), [0, 1]);
    // The rest of a registered slot needs no new slot.
    assert_eq!(
        setup.ask(REQUEST_PLUG, START + BLOCK_SIZE, 1).0,
        RESPONSE_ACK
    );
}

#[test]
fn refused_slots_leave_nothing_half_plugged() {
    let (mut setup, slots) = setup_with_slots(SIZE, MEMORY_BLOCK);
    slots.refuses.store(true, Ordering::SeqCst);
    assert_eq!(setup.ask(REQUEST_PLUG, START, 1).0, RESPONSE_BUSY);
    assert_eq!((setup.handle.plugged(), setup.handle.reachable()), (0, 0));
    slots.refuses.store(false, Ordering::SeqCst);
    setup.ask(REQUEST_PLUG, START, 1);
    // A slot that could not be removed remains listed, and is tried again.
    slots.refuses.store(true, Ordering::SeqCst);
    assert_eq!(setup.ask(REQUEST_UNPLUG, START, 1).0, RESPONSE_ACK);
    assert_eq!(
        (setup.handle.plugged(), setup.handle.reachable()),
        (0, SLOT)
    );
    slots.refuses.store(false, Ordering::SeqCst);
    setup.handle.discard_unplugged();
    assert!(slots.present().is_empty());
}

/// Saved state of a device with these blocks: first address and count.
fn saved_with(plugged: [(u64, u16); 2]) -> Payload {
    let (mut setup, _slots) = setup_with_slots(SIZE, MEMORY_BLOCK);
    for (address, count) in plugged {
        setup.ask(REQUEST_PLUG, address, count);
    }
    let saved = Mem {
        shared: setup.handle.shared.clone(),
    };
    saved.save().unwrap()
}

#[test]
fn a_restored_device_has_its_slots() {
    let state = saved_with([(START + BLOCK_SIZE, 3), (START + 2 * SLOT, 1)]);
    let memory = pluggable();
    let (mut device, slots) = with_slots(&memory, MEMORY_BLOCK);
    device.restore(&state).unwrap();
    assert_eq!(device.save().unwrap(), state);
    assert_eq!(slots.present(), [0, 2]);
    let is_memory = |address: u64| memory.check_range(GuestAddress(address), 1);
    assert!(is_memory(START + 3 * BLOCK_SIZE) && is_memory(START + 2 * SLOT));
    assert!(!is_memory(START) && !is_memory(START + SLOT));
}

#[test]
fn a_restore_that_fails_half_way_leaves_nothing_plugged() {
    let state = saved_with([(START, 1), (START + 2 * SLOT, 1)]);
    let memory = pluggable();
    let (mut device, slots) = with_slots(&memory, MEMORY_BLOCK);
    let empty = device.save().unwrap();
    *lock(&slots.refused_slot) = Some(2);
    assert!(device.restore(&state).is_err());
    assert_eq!(device.save().unwrap(), empty);
    assert!(slots.present().is_empty());
    let handle = device.handle();
    assert_eq!((handle.plugged(), handle.reachable()), (0, 0));
    assert!(!memory.check_range(GuestAddress(START), 1));
    // A slot that the host refused may succeed later.
    *lock(&slots.refused_slot) = None;
    device.restore(&state).unwrap();
    assert_eq!(device.save().unwrap(), state);
}

/// Six blocks in every state, with every size requested, and every request for a run of them.
#[test]
fn every_request_has_its_answer_in_every_state() {
    const BLOCKS: usize = 6;
    let mut setup = setup(0);
    let shared = setup.handle.shared.clone();
    let mut cases = 0;
    for (before, requested) in (0..1usize << BLOCKS).flat_map(|b| (0..=BLOCKS).map(move |r| (b, r)))
    {
        let mut requests = vec![(REQUEST_UNPLUG_ALL, 0, 0)];
        for kind in [REQUEST_PLUG, REQUEST_UNPLUG, REQUEST_STATE] {
            for first in 0..=BLOCKS {
                requests.extend((0..=BLOCKS + 1).map(|count| (kind, first, count)));
            }
        }
        for (kind, first, count) in requests {
            let mut region = lock(&shared.region);
            region.blocks.fill(false);
            let all = 0..region.blocks.len();
            region.slots.set(&all, false);
            (region.plugged, region.slack) = (0, 0);
            region.usable = BLOCKS as u64 * BLOCK_SIZE;
            region.requested = requested as u64 * BLOCK_SIZE;
            for block in (0..BLOCKS).filter(|block| before >> block & 1 == 1) {
                region.set(setup.driver.memory(), block..block + 1, true);
            }
            drop(region);
            let run = ((1 << count) - 1) << first;
            let inside = count > 0 && first + count <= BLOCKS;
            let (answer, after) = match kind {
                REQUEST_UNPLUG_ALL => ((RESPONSE_ACK, 0), 0),
                _ if !inside => ((RESPONSE_ERROR, 0), before),
                REQUEST_STATE if before & run == run => ((RESPONSE_ACK, STATE_PLUGGED), before),
                REQUEST_STATE if before & run == 0 => ((RESPONSE_ACK, STATE_UNPLUGGED), before),
                REQUEST_STATE => ((RESPONSE_ACK, STATE_MIXED), before),
                REQUEST_PLUG if before & run != 0 => ((RESPONSE_ERROR, 0), before),
                REQUEST_PLUG if before.count_ones() as usize + count > requested => {
                    ((RESPONSE_NACK, 0), before)
                }
                REQUEST_PLUG => ((RESPONSE_ACK, 0), before | run),
                _ if before & run != run => ((RESPONSE_ERROR, 0), before),
                _ => ((RESPONSE_ACK, 0), before & !run),
            };
            let address = START + first as u64 * BLOCK_SIZE;
            let case = format!("{kind} of {count} at {first}, {before:#b}, {requested} requested");
            assert_eq!(setup.ask(kind, address, count as u16), answer, "{case}");
            setup.driver.recycle();
            let region = lock(&shared.region);
            let there = region.blocks.iter().enumerate().filter(|(_, on)| **on);
            assert_eq!(there.map(|(at, _)| 1 << at).sum::<usize>(), after, "{case}");
            assert_eq!(
                region.plugged,
                u64::from(after.count_ones()) * BLOCK_SIZE,
                "{case}"
            );
            cases += 1;
        }
    }
    println!("{cases} requests");
}
