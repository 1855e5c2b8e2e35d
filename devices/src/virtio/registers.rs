//! Device registers as memory: if KVM maps the page read-only into the guest, reads do not exit. Writes do.

use super::mmio::MMIO_SLOT_SIZE;
use koya_host::sync::lock;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;
use vm_memory::VolatileMemory;
use vm_memory::mmap::MmapRegion;

const PAGE: usize = MMIO_SLOT_SIZE as usize;

/// Memory for the registers of consecutive MMIO slots, one page each. Initially zero.
#[derive(Clone)]
pub struct RegisterPages(Arc<MmapRegion>);

impl RegisterPages {
    /// Allocates memory for this many slots.
    ///
    /// # Errors
    /// If the host has no memory left.
    pub fn new(slots: usize) -> io::Result<Self> {
        let region = MmapRegion::new(slots * PAGE).map_err(io::Error::other)?;
        Ok(Self(Arc::new(region)))
    }

    /// The whole region, to be mapped by a hypervisor.
    pub fn region(&self) -> &Arc<MmapRegion> {
        &self.0
    }

    /// The page of one slot; `None` if there is no such slot.
    pub fn page(&self, index: usize) -> Option<RegisterPage> {
        let start = index.checked_mul(PAGE)?;
        (start < self.0.size()).then(|| RegisterPage {
            pages: self.0.clone(),
            start,
        })
    }
}

/// The registers of one slot, shared by all clones: each is a little-endian word at its offset.
#[derive(Clone)]
pub struct RegisterPage {
    pages: Arc<MmapRegion>,
    start: usize,
}

impl RegisterPage {
    fn word(&self, offset: u32) -> Option<&AtomicU32> {
        let offset = usize::try_from(offset).ok()?;
        let inside = offset < PAGE && offset.is_multiple_of(size_of::<u32>());
        let word = inside.then(|| self.pages.get_atomic_ref(self.start + offset));
        word?.ok()
    }

    /// Reads a register; zero if there is none: beyond the page, or unaligned.
    pub fn load(&self, offset: u32) -> u32 {
        let word = self.word(offset);
        word.map_or(0, |word| u32::from_le(word.load(Ordering::SeqCst)))
    }

    /// Writes a register, if there is one.
    pub fn store(&self, offset: u32, value: u32) {
        if let Some(word) = self.word(offset) {
            word.store(value.to_le(), Ordering::SeqCst);
        }
    }

    /// Sets bits of a register.
    pub fn set_bits(&self, offset: u32, bits: u32) {
        if let Some(word) = self.word(offset) {
            word.fetch_or(bits.to_le(), Ordering::SeqCst);
        }
    }

    /// Adds to a register, which wraps around.
    pub fn add(&self, offset: u32, count: u32) {
        if let Some(word) = self.word(offset) {
            let next = |value: u32| Some(u32::from_le(value).wrapping_add(count).to_le());
            word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next)
                .ok();
        }
    }

    /// Clears bits of a register.
    pub fn clear_bits(&self, offset: u32, bits: u32) {
        if let Some(word) = self.word(offset) {
            word.fetch_and(!bits.to_le(), Ordering::SeqCst);
        }
    }

    /// Writes bytes at an offset that is a multiple of 4, up to the end of the page.
    pub fn store_bytes(&self, offset: u32, bytes: &[u8]) {
        for (index, chunk) in (0..).zip(bytes.chunks(size_of::<u32>())) {
            let mut word = [0; size_of::<u32>()];
            word[..chunk.len()].copy_from_slice(chunk);
            self.store(offset + 4 * index, u32::from_le_bytes(word));
        }
    }
}

/// A device's configuration space as read by its driver.
pub struct ConfigSpace(RegisterPage);

impl ConfigSpace {
    /// The configuration space in this register page.
    pub(crate) fn of(page: &RegisterPage) -> Self {
        Self(page.clone())
    }

    /// Writes the whole space word by word; words that do not change may be read meanwhile.
    pub fn publish(&self, config: &[u8]) {
        self.0.store_bytes(VIRTIO_MMIO_CONFIG, config);
    }
}

/// A configuration that changes and, once its address is known, is published to the driver. A change and its
/// publication are under one lock, so that the last change is the one published.
#[derive(Default)]
pub(crate) struct PublishedConfig(Mutex<Option<ConfigSpace>>);

impl PublishedConfig {
    /// Sets the place where the configuration is published, and publishes it.
    pub(crate) fn publish_in(&self, space: ConfigSpace, config: impl FnOnce() -> Vec<u8>) {
        let mut shown = lock(&self.0);
        space.publish(&config());
        *shown = Some(space);
    }

    /// Changes the configuration and publishes the result.
    pub(crate) fn change<T>(
        &self,
        change: impl FnOnce() -> T,
        config: impl FnOnce() -> Vec<u8>,
    ) -> T {
        let shown = lock(&self.0);
        let changed = change();
        if let Some(space) = &*shown {
            space.publish(&config());
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn registers_lie_where_a_guest_reads_them() {
        let pages = RegisterPages::new(2).unwrap();
        assert!(pages.page(2).is_none());
        let page = pages.page(1).unwrap();
        page.store(0x70, 0x0403_0201);
        page.set_bits(0x60, 3);
        page.clear_bits(0x60, 1);
        page.store_bytes(0x100, b"fs-tag");
        let slice = pages.region().as_volatile_slice();
        let at = |offset: usize, count: usize| {
            let mut bytes = vec![0; count];
            slice.read_slice(&mut bytes, offset).unwrap();
            bytes
        };
        assert_eq!(at(0x1070, 4), [1, 2, 3, 4]);
        assert_eq!(page.load(0x60), 2);
        assert_eq!(at(0x1100, 8), b"fs-tag\0\0");
        assert_eq!(at(0, 0x1000), [0; 0x1000]);
    }

    #[test]
    fn accesses_beyond_a_page_or_between_words_are_ignored() {
        let pages = RegisterPages::new(1).unwrap();
        let page = pages.page(0).unwrap();
        for offset in [0x1000, 0x72, u32::MAX - 3] {
            page.store(offset, 1);
            assert_eq!(page.load(offset), 0, "{offset:#x}");
        }
        page.store_bytes(0xffc, &[1; 8]);
        assert_eq!(page.load(0xffc), 0x0101_0101);
    }
}
