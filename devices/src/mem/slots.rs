//! The memory slots to be registered for the plugged blocks: plain arithmetic.

use super::BLOCK_SIZE;
use std::ops::Range;

/// Minimum size of a slot in bytes: that of a Linux memory block, so that each is within one slot.
const MIN_SLOT_SIZE: u64 = 128 << 20;

/// Slot size of a region of `size` bytes with at most `max_slots` slots: the smallest power of two that is
/// sufficient.
pub fn slot_size(size: u64, max_slots: usize) -> u64 {
    let wanted = size.div_ceil(max_slots.max(1) as u64);
    wanted.max(MIN_SLOT_SIZE).next_power_of_two()
}

/// The slots of a region.
pub(super) struct Slots {
    /// Blocks per slot.
    blocks: usize,
    /// For each slot the number of plugged blocks, and whether it is registered.
    slots: Vec<(usize, bool)>,
}

impl Slots {
    pub(super) fn new(size: u64, slot_size: u64) -> Self {
        Self {
            blocks: (slot_size / BLOCK_SIZE) as usize,
            slots: vec![(0, false); size.div_ceil(slot_size.max(1)) as usize],
        }
    }

    /// Marks blocks as plugged or unplugged. They must all be in the opposite state, unless they are the
    /// whole region.
    pub(super) fn set(&mut self, blocks: &Range<usize>, is_plugged: bool) {
        for index in self.slots_of(blocks) {
            let first = blocks.start.max(index * self.blocks);
            let end = blocks.end.min((index + 1) * self.blocks);
            let count = &mut self.slots[index].0;
            *count = match is_plugged {
                true => *count + (end - first),
                false => count.saturating_sub(end - first),
            };
        }
    }

    pub(super) fn set_present(&mut self, index: usize, is_present: bool) {
        self.slots[index].1 = is_present;
    }

    /// The slots of these blocks that are not registered.
    pub(super) fn missing(&self, blocks: &Range<usize>) -> Vec<usize> {
        let all = self.slots_of(blocks);
        all.filter(|index| !self.slots[*index].1).collect()
    }

    /// The registered slots without plugged blocks.
    pub(super) fn empty(&self) -> Vec<usize> {
        let all = self.slots.iter().enumerate();
        let empty = all.filter(|(_, (plugged, is_present))| *plugged == 0 && *is_present);
        empty.map(|(index, _)| index).collect()
    }

    /// Number of registered slots.
    pub(super) fn present(&self) -> usize {
        self.slots.iter().filter(|slot| slot.1).count()
    }

    /// Total size of registered slots in bytes, the last one counted as if it were whole.
    pub(super) fn present_bytes(&self) -> u64 {
        (self.present() * self.blocks) as u64 * BLOCK_SIZE
    }

    /// Number of slots needed for this many bytes.
    pub(super) fn slots_for(&self, bytes: u64) -> usize {
        bytes.div_ceil(self.blocks as u64 * BLOCK_SIZE) as usize
    }

    fn slots_of(&self, blocks: &Range<usize>) -> Range<usize> {
        blocks.start / self.blocks..blocks.end.div_ceil(self.blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_few_and_hold_whole_memory_blocks() {
        const GIB: u64 = 1 << 30;
        for (size, max_slots, slot) in [
            (128 << 20, 256, 128 << 20),
            (32 * GIB, 256, 128 << 20),
            (33 * GIB, 256, 256 << 20),
            (512 * GIB, 256, 2 * GIB),
            (512 * GIB, 20, 32 * GIB),
            (512 * GIB, 0, 512 * GIB),
        ] {
            assert_eq!(slot_size(size, max_slots), slot, "{size:#x} in {max_slots}");
        }
    }

    /// Five blocks in slots of two, in every state, and every change of a run of blocks: a slot is registered
    /// if it has a plugged block.
    #[test]
    fn a_slot_is_there_while_a_block_in_it_is_plugged() {
        const BLOCKS: usize = 5;
        let holds = |state: u32, slot: usize| state >> (2 * slot) & 0b11 != 0;
        let make = |state: u32| {
            let mut slots = Slots::new(BLOCKS as u64 * BLOCK_SIZE, 2 * BLOCK_SIZE);
            for block in (0..BLOCKS).filter(|block| state >> block & 1 == 1) {
                let blocks = block..block + 1;
                for index in slots.missing(&blocks) {
                    slots.set_present(index, true);
                }
                slots.set(&blocks, true);
            }
            slots
        };
        for state in 0..1u32 << BLOCKS {
            for first in 0..BLOCKS {
                for end in first + 1..=BLOCKS {
                    let mask = (1u32 << end) - (1 << first);
                    let blocks = first..end;
                    let of_blocks = |slot: &usize| (first / 2..=(end - 1) / 2).contains(slot);
                    let mut slots = make(state);
                    let before = (0..3).filter(|slot| holds(state, *slot)).count();
                    assert_eq!(slots.present(), before);
                    assert!(slots.empty().is_empty());
                    let missing: Vec<usize> = (0..3)
                        .filter(|slot| !holds(state, *slot))
                        .filter(of_blocks)
                        .collect();
                    assert_eq!(slots.missing(&blocks), missing);
                    if state & mask == mask {
                        slots.set(&blocks, false);
                        let gone =
                            |slot: &usize| holds(state, *slot) && !holds(state & !mask, *slot);
                        let gone: Vec<usize> = (0..3).filter(gone).collect();
                        assert_eq!(slots.empty(), gone, "{state:#b} without {blocks:?}");
                    }
                    // All blocks at once, whatever their state.
                    slots.set(&(0..BLOCKS), false);
                    assert_eq!(slots.empty().len(), before);
                }
            }
        }
    }

    #[test]
    fn slots_for_some_bytes_are_rounded_up() {
        let slots = Slots::new(8 * BLOCK_SIZE, 4 * BLOCK_SIZE);
        let slots_for = |blocks: u64| slots.slots_for(blocks * BLOCK_SIZE);
        assert_eq!([0, 1, 4, 5, 9].map(slots_for), [0, 1, 1, 2, 3]);
    }
}
