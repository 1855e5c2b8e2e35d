//! Guest memory that goes back to the host, for the devices through which it does: the balloon and
//! virtio-mem.

use crate::sys::{self, Advice};
use crate::virtio::Memory;
use std::io;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Gives the whole pages in `[start, start + len)` back; they read as zero from then on. Pages that the
/// host has set aside for the guest stay as they are.
///
/// # Errors
/// `InvalidInput` if a part of it is not guest memory, else what madvise(2) says.
pub(crate) fn give_back(memory: &Memory, start: GuestAddress, len: u64) -> io::Result<()> {
    let outside = || io::Error::from(io::ErrorKind::InvalidInput);
    let count = usize::try_from(len).map_err(|_| outside())?;
    if !memory.check_range(start, count) {
        return Err(outside());
    }
    let mut at = start;
    for slice in memory.get_slices(start, count) {
        let slice = slice.map_err(|_| outside())?;
        let region = memory.find_region(at).ok_or_else(outside)?;
        if region.is_hugetlbfs() == Some(true) {
            // Set aside for this guest: a page that went back might not be there when it is wanted.
            return Ok(());
        }
        let advice = match region.file_offset() {
            Some(_) => Advice::GiveBackShared,
            None => Advice::GiveBackPrivate,
        };
        sys::advise(&slice, advice)?;
        at = GuestAddress(at.0 + slice.len() as u64);
    }
    Ok(())
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
        give_back(&memory, GuestAddress(0), 1 << 19).unwrap();
        let after = copy.metadata().unwrap().blocks();
        assert!(after <= before / 2 + 16, "{before} blocks, then {after}");
        let byte: u8 = memory.read_obj(GuestAddress(77)).unwrap();
        assert_eq!(byte, 0);
    }

    #[test]
    fn what_is_no_memory_is_refused() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        for (start, len) in [(1 << 20, 4096), (0, (1 << 20) + 4096), (u64::MAX - 5, 4096)] {
            let refused = give_back(&memory, GuestAddress(start), len).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
