//! Guest memory that is used again by the next input: to map 16 MiB and to fault its pages in takes longer than most inputs.
//!
//! All writes by the driver are known here, and a device writes only to its rings and to buffers of the driver. So memory is
//! reset by writing zeroes there. After an input whose device may have written anywhere else, it is not used again.

use koya_devices::test_utils::{Buffer, Driver, MEMORY_SIZE};
use koya_devices::virtio::memory::{BLOCK_SIZE, Memory, MemoryRegion};
use koya_vmm::internals::PANIC_LOG;
use std::cell::RefCell;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestRegionMmap};

/// Number of memories kept by a thread.
const KEPT: usize = 6;
/// Beyond this many written bytes, new memory is cheaper.
const MOST: u64 = 2 << 20;

/// Start and size of the second region, for a memory device.
pub(crate) const REGION: (u64, u64) = (1 << 32, 64 << 20);

/// Layout of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// [`MEMORY_SIZE`] bytes at zero.
    Plain,
    /// The same and a [`REGION`] that is memory from the start.
    Hotplug,
    /// The same and a [`REGION`] that is plugged block by block.
    Pluggable,
    /// [`MEMORY_SIZE`] bytes around a kernel's log.
    Log,
}

impl Layout {
    const COUNT: usize = 4;

    const fn base(self) -> u64 {
        match self {
            Self::Log => PANIC_LOG & !0xfff_ffff,
            _ => 0,
        }
    }

    fn memory(self) -> Memory {
        let map = |(start, len): (u64, u64)| {
            GuestRegionMmap::from_range(GuestAddress(start), len as usize, None).expect("memory")
        };
        let mut regions = vec![MemoryRegion::new(map((self.base(), MEMORY_SIZE as u64)))];
        match self {
            Self::Hotplug => regions.push(MemoryRegion::new(map(REGION))),
            Self::Pluggable => regions.push(MemoryRegion::pluggable(map(REGION))),
            Self::Plain | Self::Log => {}
        }
        Memory::from_regions(regions).expect("memory")
    }
}

thread_local! {
    static FREE: RefCell<[Vec<Arc<Memory>>; Layout::COUNT]> = const {
        RefCell::new([const { Vec::new() }; Layout::COUNT])
    };
}

/// Memory, all zero at first.
pub(crate) struct Lease {
    layout: Layout,
    memory: Arc<Memory>,
    written: Vec<Range<u64>>,
    reusable: bool,
}

impl Lease {
    pub(crate) fn new(layout: Layout) -> Self {
        let kept = FREE.with_borrow_mut(|free| free[layout as usize].pop());
        Self {
            layout,
            memory: kept.unwrap_or_else(|| Arc::new(layout.memory())),
            written: Vec::new(),
            reusable: true,
        }
    }

    /// Records that this range is written, by the driver or by the device.
    pub(crate) fn touch(&mut self, start: u64, len: u64) {
        let all = self.layout.base()..self.layout.base() + MEMORY_SIZE as u64;
        let end = start.saturating_add(len);
        if end > all.end && self.layout != Layout::Plain {
            self.reusable = false;
        }
        let end = end.min(all.end);
        if start >= end || start < all.start {
            return;
        }
        if let Some(last) = self.written.last_mut()
            && (last.start..=last.end).contains(&start)
        {
            last.end = last.end.max(end);
            return;
        }
        self.written.push(start..end);
    }

    /// Records that the rings of a queue of this size are written (virtio 1.2, section 2.7).
    pub(crate) fn touch_rings(&mut self, addresses: [u64; 3], size: u64) {
        let lens = [16 * size, 6 + 2 * size, 6 + 8 * size];
        for (start, len) in addresses.into_iter().zip(lens) {
            self.touch(start, len);
        }
    }

    /// Records that the device may write anywhere.
    pub(crate) fn discard(&mut self) {
        self.reusable = false;
    }
}

impl Deref for Lease {
    type Target = Arc<Memory>;

    fn deref(&self) -> &Arc<Memory> {
        &self.memory
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        const ZEROES: [u8; 4096] = [0; 4096];
        let sum: u64 = self
            .written
            .iter()
            .map(|range| range.end - range.start)
            .sum();
        // A device that still has a reference may write later.
        if !self.reusable || sum > MOST || Arc::strong_count(&self.memory) != 1 {
            return;
        }
        for range in &self.written {
            let mut at = range.start;
            while at < range.end {
                let len = (range.end - at).min(ZEROES.len() as u64);
                let zeroes = &ZEROES[..len as usize];
                self.memory
                    .write_slice(zeroes, GuestAddress(at))
                    .expect("memory");
                at += len;
            }
        }
        if self.layout == Layout::Pluggable
            && let Some(region) = self.memory.find_region(GuestAddress(REGION.0))
        {
            region.set_plugged(0..(REGION.1 / BLOCK_SIZE) as usize, false);
        }
        FREE.with_borrow_mut(|free| {
            let free = &mut free[self.layout as usize];
            if free.len() < KEPT {
                free.push(self.memory.clone());
            }
        });
    }
}

/// A driver in memory that is used again.
pub(crate) struct Guest {
    driver: Driver,
    memory: Lease,
    /// End of the data.
    next: u64,
}

/// Where a [`Driver`] puts the buffers.
const DATA: u64 = 0x10_0000;

impl Guest {
    pub(crate) fn new(size: u16) -> Self {
        Self::with(Layout::Plain, size)
    }

    pub(crate) fn with(layout: Layout, size: u16) -> Self {
        let mut memory = Lease::new(layout);
        let driver = Driver::with_memory(memory.memory.clone(), size);
        memory.touch_rings(driver.ring_addresses(), size.into());
        Self {
            driver,
            memory,
            next: DATA,
        }
    }

    /// As [`Driver::offer`].
    pub(crate) fn offer(&mut self, buffers: &[Buffer]) -> u16 {
        for buffer in buffers {
            let len = match buffer {
                Buffer::Readable(bytes) => bytes.len() as u64,
                Buffer::Writable(len) => u64::from(*len),
            };
            self.memory.touch(self.next, len);
            self.next += len.next_multiple_of(16);
        }
        self.driver.offer(buffers)
    }

    /// As [`Driver::recycle`].
    pub(crate) fn recycle(&mut self) {
        self.next = DATA;
        self.driver.recycle();
    }

    /// The memory, to record writes other than those of [`offer`](Self::offer).
    pub(crate) fn lease(&mut self) -> &mut Lease {
        &mut self.memory
    }
}

impl Deref for Guest {
    type Target = Driver;

    fn deref(&self) -> &Driver {
        &self.driver
    }
}

impl DerefMut for Guest {
    fn deref_mut(&mut self) -> &mut Driver {
        &mut self.driver
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zero_again() {
        let sum = |guest: &Guest| {
            let mut all = vec![0u8; MEMORY_SIZE];
            guest
                .memory()
                .read_slice(&mut all, GuestAddress(0))
                .expect("memory");
            all.iter().map(|byte| u64::from(*byte)).sum::<u64>()
        };
        for round in 0..3 {
            let mut guest = Guest::new(16);
            assert_eq!(sum(&guest), 0, "in round {round}");
            guest.offer(&[Buffer::Readable(vec![7; 5000]), Buffer::Writable(70_000)]);
            let chain = guest.queue().pop().expect("a ring").expect("a chain");
            let memory = guest.memory().clone();
            chain.write(&memory, 0, &vec![8; 70_000]).expect("its room");
            guest
                .queue()
                .complete(chain.head(), 70_000)
                .expect("a ring");
            assert!(sum(&guest) >= 7 * 5000 + 8 * 70_000);
        }
        assert_eq!(
            FREE.with_borrow(|free| free[Layout::Plain as usize].len()),
            1
        );
    }

    #[test]
    fn memory_that_may_be_written_anywhere_is_not_used_again() {
        let kept = || FREE.with_borrow(|free| free.iter().map(Vec::len).sum::<usize>());
        let mut lease = Lease::new(Layout::Plain);
        lease.discard();
        drop(lease);
        assert_eq!(kept(), 0);
        let lease = Lease::new(Layout::Plain);
        let device = lease.clone();
        drop(lease);
        assert_eq!(kept(), 0, "a device still uses it");
        drop(device);
        // Nor memory outside the part that is reset.
        let mut lease = Lease::new(Layout::Hotplug);
        lease.touch(REGION.0, 1);
        drop(lease);
        assert_eq!(kept(), 0);
    }
}
