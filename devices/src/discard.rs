//! Discards guest memory for the balloon and virtio-mem: the pages go back to the host.

use crate::sys::{self, Advice};
use crate::virtio::Memory;
use std::io;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Discards the whole pages in `[start, start + len)`; they read as zero from then on. Reserved huge pages
/// are kept.
///
/// # Errors
/// `InvalidInput` if part of it is not guest memory, otherwise the error from madvise(2).
pub(crate) fn discard(memory: &Memory, start: GuestAddress, len: u64) -> io::Result<()> {
    let count = usize::try_from(len).map_err(|_| outside())?;
    match memory.check_range(start, count) {
        true => discard_mapped(memory, start, len),
        false => Err(outside()),
    }
}

/// The same for mapped memory that is not guest memory at present because it is unplugged.
///
/// # Errors
/// `InvalidInput` if part of it is not mapped, otherwise the error from madvise(2).
pub(crate) fn discard_mapped(memory: &Memory, start: GuestAddress, len: u64) -> io::Result<()> {
    let (mut at, mut left) = (start, len);
    while left > 0 {
        let region = memory.find_region(at).ok_or_else(outside)?;
        if region.is_hugetlbfs() == Some(true) {
            // Reserved for this guest: a page that is released might not be available later.
            return Ok(());
        }
        let offset = at.0 - region.start_addr().0;
        let part = left.min(region.len() - offset);
        let slice = region.mapped_slice(offset, part as usize);
        let advice = match region.file_offset() {
            Some(_) => Advice::PunchHole,
            None => Advice::DiscardPrivate,
        };
        sys::advise(&slice.map_err(|_| outside())?, advice)?;
        at = GuestAddress(at.0 + part);
        left -= part;
    }
    Ok(())
}

fn outside() -> io::Error {
    io::ErrorKind::InvalidInput.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use vm_memory::{Bytes, FileOffset};

    #[test]
    fn memory_of_a_file_becomes_a_hole_in_it() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let copy = file.try_clone().unwrap();
        let ranges = [(GuestAddress(0), 1 << 20, Some(FileOffset::new(file, 0)))];
        let memory = Memory::from_ranges_with_files(ranges).unwrap();
        memory
            .write_slice(&vec![7; 1 << 20], GuestAddress(0))
            .unwrap();
        let before = copy.metadata().unwrap().blocks();
        discard(&memory, GuestAddress(0), 1 << 19).unwrap();
        let after = copy.metadata().unwrap().blocks();
        assert!(after <= before / 2 + 16, "{before} blocks, then {after}");
        let byte: u8 = memory.read_obj(GuestAddress(77)).unwrap();
        assert_eq!(byte, 0);
    }

    #[test]
    fn ranges_outside_memory_are_refused() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        for (start, len) in [(1 << 20, 4096), (0, (1 << 20) + 4096), (u64::MAX - 5, 4096)] {
            let refused = discard(&memory, GuestAddress(start), len).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
