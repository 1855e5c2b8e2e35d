//! What a driver reads of a device's window, as memory: where KVM has it in the guest, read-only, a read is
//! no exit. A write is one either way.

use super::mmio::WINDOW_SIZE;
use koya_host::sync::lock;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;
use vm_memory::VolatileMemory;
use vm_memory::mmap::MmapRegion;

const PAGE: usize = WINDOW_SIZE as usize;

/// Memory for the registers of windows that follow each other, a page each. All zero at first.
#[derive(Clone)]
pub struct RegisterPages(Arc<MmapRegion>);

impl RegisterPages {
    /// Memory for so many windows.
    ///
    /// # Errors
    /// If the host has none.
    pub fn new(windows: usize) -> io::Result<Self> {
        let region = MmapRegion::new(windows * PAGE).map_err(io::Error::other)?;
        Ok(Self(Arc::new(region)))
    }

    /// All of it, as a hypervisor maps it.
    pub fn region(&self) -> &Arc<MmapRegion> {
        &self.0
    }

    /// That of one window; None if there are not so many.
    pub fn page(&self, index: usize) -> Option<RegisterPage> {
        let start = index.checked_mul(PAGE)?;
        (start < self.0.size()).then(|| RegisterPage {
            pages: self.0.clone(),
            start,
        })
    }
}

/// The registers of one window, all copies of it the same ones: each a little-endian word at its offset, whoever reads it.
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

    /// What a register holds; zero where there is none: beyond the page, or not aligned.
    pub fn load(&self, offset: u32) -> u32 {
        let word = self.word(offset);
        word.map_or(0, |word| u32::from_le(word.load(Ordering::SeqCst)))
    }

    /// Sets a register, where there is one.
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

    /// Adds to a register, which begins anew after its largest value.
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

    /// Sets what lies at an offset, a multiple of 4, up to the page's end.
    pub fn store_bytes(&self, offset: u32, bytes: &[u8]) {
        for (index, chunk) in (0..).zip(bytes.chunks(size_of::<u32>())) {
            let mut word = [0; size_of::<u32>()];
            word[..chunk.len()].copy_from_slice(chunk);
            self.store(offset + 4 * index, u32::from_le_bytes(word));
        }
    }
}

/// A device's configuration space, where its driver reads it.
pub struct ConfigSpace(RegisterPage);

impl ConfigSpace {
    /// That of the window with these registers.
    pub(crate) fn of(page: &RegisterPage) -> Self {
        Self(page.clone())
    }

    /// Puts the whole of it there, a word after the other: what did not change may be read meanwhile.
    pub fn publish(&self, config: &[u8]) {
        self.0.store_bytes(VIRTIO_MMIO_CONFIG, config);
    }
}

/// A configuration that changes, shown where the driver reads it once that is said: a change and what is shown of it
/// are under one lock, so that the last change is the one that is seen.
#[derive(Default)]
pub(crate) struct PublishedConfig(Mutex<Option<ConfigSpace>>);

impl PublishedConfig {
    /// Shows it there from now on.
    pub(crate) fn publish_in(&self, space: ConfigSpace, config: impl FnOnce() -> Vec<u8>) {
        let mut shown = lock(&self.0);
        space.publish(&config());
        *shown = Some(space);
    }

    /// Changes something of it, and shows what it is then.
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
    fn there_is_nothing_beyond_a_page_or_between_words() {
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
