//! State of the region: plugged blocks, the usable part, and memory to discard.

use super::slots::Slots;
use super::{BLOCK_SIZE, Backing, remove_empty};
use crate::discard::discard_mapped;
use crate::fault::guest_fault;
use crate::virtio::Memory;
use std::ops::Range;
use std::time::Instant;
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// State of the region.
pub(super) struct Region {
    pub(super) start: u64,
    pub(super) size: u64,
    pub(super) usable: u64,
    pub(super) requested: u64,
    pub(super) plugged: u64,
    /// Maximum excess of plugged blocks over the requested size.
    pub(super) slack: u64,
    /// Whether each block is plugged.
    pub(super) blocks: Vec<bool>,
    pub(super) slots: Slots,
    /// Time at which all unplugged memory was last discarded.
    pub(super) swept: Instant,
}

impl Region {
    /// The blocks of a request, if it is valid.
    pub(super) fn range(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.start)?;
        let len = u64::from(count) * BLOCK_SIZE;
        let fits = offset % BLOCK_SIZE == 0 && offset.checked_add(len)? <= self.usable;
        let first = (offset / BLOCK_SIZE) as usize;
        (fits && count > 0).then(|| first..first + usize::from(count))
    }

    pub(super) fn set(&mut self, memory: &Memory, range: Range<usize>, plugged: bool) {
        let len = range.len() as u64 * BLOCK_SIZE;
        self.blocks[range.clone()].fill(plugged);
        self.slots.set(&range, plugged);
        match plugged {
            true => self.plugged += len,
            false => self.plugged -= len,
        }
        self.set_visible(memory, range, plugged);
    }

    /// Marks blocks as plugged or unplugged for devices.
    pub(super) fn set_visible(&self, memory: &Memory, range: Range<usize>, plugged: bool) {
        if let Some(region) = memory.find_region(GuestAddress(self.start)) {
            region.set_plugged(range, plugged);
        }
    }

    /// Maximum number of registered slots.
    pub(super) fn max_slots(&self) -> usize {
        self.slots
            .slots_for(self.requested.saturating_add(self.slack))
    }

    pub(super) fn discard(&self, memory: &Memory, range: Range<usize>) {
        let start = GuestAddress(self.start + range.start as u64 * BLOCK_SIZE);
        if let Err(error) = discard_mapped(memory, start, range.len() as u64 * BLOCK_SIZE) {
            // The next sweep tries again.
            guest_fault!("cannot give unplugged memory back: {error}");
        }
    }

    /// Discards all unplugged memory.
    pub(super) fn sweep(&mut self, backing: Option<&Backing>, memory: &Memory) {
        self.swept = Instant::now();
        remove_empty(&mut self.slots, backing);
        for run in self.runs(false) {
            self.discard(memory, run);
        }
    }

    /// Unplugs all blocks; `memory` is `None` after the end of the machine.
    pub(super) fn unplug_all(&mut self, backing: Option<&Backing>, memory: Option<&Memory>) {
        let all = 0..self.blocks.len();
        self.blocks.fill(false);
        self.slots.set(&all, false);
        self.plugged = 0;
        if let Some(memory) = memory {
            // Made inaccessible first, then discarded, so that the guest cannot touch it in between.
            self.set_visible(memory, all, false);
            self.sweep(backing, memory);
        }
    }

    /// Runs of plugged or of unplugged blocks.
    pub(super) fn runs(&self, plugged: bool) -> Vec<Range<usize>> {
        let mut runs = Vec::new();
        let mut first = 0;
        for run in self.blocks.chunk_by(|one, next| one == next) {
            if run[0] == plugged {
                runs.push(first..first + run.len());
            }
            first += run.len();
        }
        runs
    }

    /// Grows the usable region with the requested size. It shrinks only when the driver has unplugged
    /// everything (UNPLUG_ALL), since usable blocks must not become unusable under a driver.
    pub(super) fn grow_usable(&mut self) {
        let wanted = self.requested.saturating_add(self.slack).min(self.size);
        self.usable = self.usable.max(wanted);
    }

    /// `struct virtio_mem_config` (section 5.15.4).
    pub(super) fn config(&self) -> Vec<u8> {
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
