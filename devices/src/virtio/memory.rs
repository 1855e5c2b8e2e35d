//! Guest memory as seen by devices: regions of host memory, some of which are plugged block by block.
//!
//! With memory hotplug ([`crate::mem`]), not everything mapped here is memory of the guest: the hot-pluggable
//! range is mapped from the start, but a block is memory only while it is plugged. All accesses by guest
//! address go through [`MemoryRegion::get_slice`], which rejects unplugged blocks. Otherwise a guest could
//! make a device write there and thus make the host allocate pages beyond the granted size.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::bitmap::BS;
use vm_memory::mmap::FromRangesError;
use vm_memory::region::{GuestMemoryRegionBytes, GuestRegionCollectionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    GuestRegionCollection, GuestRegionMmap, GuestUsize, MemoryRegionAddress, VolatileSlice,
};

/// Granularity of plugging in bytes: one huge page of the host.
pub const BLOCK_SIZE: u64 = 2 << 20;

/// Blocks per word of the bitmap.
const WORD: usize = u64::BITS as usize;

/// One region of guest memory.
#[derive(Debug)]
pub struct MemoryRegion {
    mapping: GuestRegionMmap<()>,
    /// One bit per block: whether it is plugged. `None`: all of the region is always memory.
    plugged: Option<Box<[AtomicU64]>>,
}

impl MemoryRegion {
    /// A region that is memory as a whole.
    pub fn new(mapping: GuestRegionMmap<()>) -> Self {
        Self {
            mapping,
            plugged: None,
        }
    }

    /// A pluggable region with nothing plugged.
    pub fn pluggable(mapping: GuestRegionMmap<()>) -> Self {
        let words = (mapping.len().div_ceil(BLOCK_SIZE) as usize).div_ceil(WORD);
        Self {
            mapping,
            plugged: Some((0..words).map(|_| AtomicU64::new(0)).collect()),
        }
    }

    /// Whether it is plugged block by block.
    pub fn is_pluggable(&self) -> bool {
        self.plugged.is_some()
    }

    /// Marks blocks as plugged or unplugged; block 0 is at the start of the region. Does nothing for a region
    /// that is not pluggable.
    ///
    /// # Panics
    /// If a block is outside the region.
    pub fn set_plugged(&self, blocks: Range<usize>, is_plugged: bool) {
        let Some(words) = &self.plugged else {
            return;
        };
        for (word, mask) in words_of(blocks) {
            match is_plugged {
                true => words[word].fetch_or(mask, Ordering::SeqCst),
                false => words[word].fetch_and(!mask, Ordering::SeqCst),
            };
        }
    }

    /// Whether all these bytes are memory now.
    fn is_memory(&self, offset: u64, count: usize) -> bool {
        let Some(words) = &self.plugged else {
            return true;
        };
        let Some(end) = offset.checked_add(count as u64) else {
            return false;
        };
        let blocks = (offset / BLOCK_SIZE) as usize..end.div_ceil(BLOCK_SIZE) as usize;
        words_of(blocks).all(|(word, mask)| {
            let plugged = words.get(word).map(|word| word.load(Ordering::SeqCst));
            plugged.is_some_and(|plugged| plugged & mask == mask)
        })
    }

    /// Part of the mapping, plugged or not, to discard its pages.
    ///
    /// # Errors
    /// If it is outside the region.
    pub(crate) fn mapped_slice(
        &self,
        offset: u64,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, ()>>, GuestMemoryError> {
        self.mapping.get_slice(MemoryRegionAddress(offset), count)
    }

    /// The whole mapping, plugged or not, to advise the host about it.
    ///
    /// # Errors
    /// None for a mapped region.
    pub fn mapping(&self) -> Result<VolatileSlice<'_, BS<'_, ()>>, GuestMemoryError> {
        self.mapping.as_volatile_slice()
    }
}

/// The words of the bitmap that cover these blocks, with a mask of their bits.
fn words_of(blocks: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    (blocks.start / WORD..blocks.end.div_ceil(WORD)).map(move |word| {
        let first = blocks.start.max(word * WORD) - word * WORD;
        let end = blocks.end.min((word + 1) * WORD) - word * WORD;
        let ones = u64::MAX.checked_shr((WORD - (end - first)) as u32);
        (word, ones.unwrap_or(0) << first)
    })
}

impl GuestMemoryRegion for MemoryRegion {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.mapping.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.mapping.start_addr()
    }

    fn bitmap(&self) -> BS<'_, Self::B> {
        self.mapping.bitmap()
    }

    /// Always fails: an address without a length cannot be checked against plugged blocks, nor does it stay
    /// valid when they are unplugged.
    fn get_host_address(&self, _: MemoryRegionAddress) -> Result<*mut u8, GuestMemoryError> {
        Err(GuestMemoryError::HostAddressNotAvailable)
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        self.mapping.file_offset()
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, Self::B>>, GuestMemoryError> {
        if !self.is_memory(offset.0, count) {
            let address = GuestAddress(self.start_addr().0.wrapping_add(offset.0));
            return Err(GuestMemoryError::InvalidGuestAddress(address));
        }
        self.mapping.get_slice(offset, count)
    }

    fn is_hugetlbfs(&self) -> Option<bool> {
        self.mapping.is_hugetlbfs()
    }
}

impl GuestMemoryRegionBytes for MemoryRegion {}

/// Guest memory as seen by devices.
#[derive(Debug)]
pub struct Memory(GuestRegionCollection<MemoryRegion>);

impl Memory {
    /// Memory of these regions, which must be sorted and must not overlap.
    ///
    /// # Errors
    /// If the regions are not sorted, overlap, or there is none.
    pub fn from_regions(regions: Vec<MemoryRegion>) -> Result<Self, GuestRegionCollectionError> {
        GuestRegionCollection::from_regions(regions).map(Self)
    }

    /// Anonymous memory with these addresses and sizes.
    ///
    /// # Errors
    /// As [`from_regions`](Self::from_regions), and the error from mmap(2).
    pub fn from_ranges(ranges: &[(GuestAddress, usize)]) -> Result<Self, FromRangesError> {
        Self::from_ranges_with_files(ranges.iter().map(|range| (range.0, range.1, None)))
    }

    /// Memory with these addresses and sizes, backed by these files.
    ///
    /// # Errors
    /// As [`from_ranges`](Self::from_ranges).
    pub fn from_ranges_with_files(
        ranges: impl IntoIterator<Item = (GuestAddress, usize, Option<FileOffset>)>,
    ) -> Result<Self, FromRangesError> {
        let regions = ranges.into_iter().map(|(start, len, file)| {
            GuestRegionMmap::from_range(start, len, file).map(MemoryRegion::new)
        });
        Ok(Self::from_regions(regions.collect::<Result<_, _>>()?)?)
    }
}

impl GuestMemoryBackend for Memory {
    type R = MemoryRegion;

    fn num_regions(&self) -> usize {
        self.0.num_regions()
    }

    fn find_region(&self, address: GuestAddress) -> Option<&MemoryRegion> {
        self.0.find_region(address)
    }

    fn iter(&self) -> impl Iterator<Item = &MemoryRegion> {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    const START: u64 = 1 << 32;

    fn pluggable(blocks: u64) -> Memory {
        let start = GuestAddress(START);
        let size = (blocks * BLOCK_SIZE) as usize;
        let mapping = GuestRegionMmap::from_range(start, size, None).unwrap();
        Memory::from_regions(vec![MemoryRegion::pluggable(mapping)]).unwrap()
    }

    #[test]
    fn a_range_is_memory_if_each_of_its_blocks_is_plugged() {
        // All sets of five blocks that span two words, and all ranges of them.
        const FIRST: usize = WORD - 2;
        let memory = pluggable(FIRST as u64 + 5);
        let region = memory.find_region(GuestAddress(START)).unwrap();
        for plugged in 0..1u32 << 5 {
            let is_plugged = |block: usize| plugged >> (block - FIRST) & 1 == 1;
            for block in FIRST..FIRST + 5 {
                region.set_plugged(block..block + 1, is_plugged(block));
            }
            for first in FIRST..FIRST + 5 {
                for last in first..FIRST + 5 {
                    let start = GuestAddress(START + first as u64 * BLOCK_SIZE + 77);
                    let len = (last - first) * BLOCK_SIZE as usize + 1;
                    assert_eq!(
                        memory.check_range(start, len),
                        (first..=last).all(is_plugged),
                        "{plugged:#b}: {first} to {last}"
                    );
                }
            }
        }
    }

    #[test]
    fn unplugged_blocks_are_neither_read_nor_written() {
        let memory = pluggable(4);
        let region = memory.find_region(GuestAddress(START)).unwrap();
        let edge = GuestAddress(START + 2 * BLOCK_SIZE - 4);
        region.set_plugged(0..2, true);
        memory.write_obj(7u32, edge).unwrap();
        assert!(memory.write_obj(7u64, edge).is_err());
        assert!(memory.write_slice(&[0; 8], edge).is_err());
        assert!(memory.read_obj::<u64>(edge).is_err());
        region.set_plugged(2..3, true);
        memory.write_obj(7u64, edge).unwrap();
        region.set_plugged(0..4, false);
        assert!(memory.read_obj::<u8>(edge).is_err());
        assert!(memory.get_host_address(GuestAddress(START)).is_err());
        assert!(!memory.check_range(GuestAddress(START), 1));
        assert!(memory.check_range(GuestAddress(START), 0));
    }
}
