//! Guest memory: private, not touched until the guest does, and never counted before.

use crate::arch;
use koya_devices::virtio::Memory;
use std::io;
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

/// What a virtual machine holds of the host's memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct MemoryUsage {
    /// Pages of guest memory that exist.
    pub guest: u64,
    /// Private pages of the process beside them: the monitor, its devices, and whatever else the
    /// process does.
    pub overhead: u64,
}

/// Reads from `/proc/self/smaps` (proc(5)) what this process holds.
pub(crate) fn usage(memory: &Memory) -> io::Result<MemoryUsage> {
    let guest: Vec<(u64, u64)> = memory
        .iter()
        .filter_map(|region| {
            let start = region.get_host_address(MemoryRegionAddress(0)).ok()? as u64;
            Some((start, start + region.len()))
        })
        .collect();
    let smaps = std::fs::read_to_string("/proc/self/smaps")?;
    Ok(sum(&smaps, &guest))
}

fn sum(smaps: &str, guest: &[(u64, u64)]) -> MemoryUsage {
    let mut usage = MemoryUsage::default();
    let mut is_guest = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), value) = (words.next(), words.next()) else {
            continue;
        };
        if let Some((start, end)) = name.split_once('-')
            && let (Ok(start), Ok(end)) =
                (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            // The kernel may show one region as several mappings, or two as one.
            is_guest = guest
                .iter()
                .any(|(first, last)| start < *last && end > *first);
            continue;
        }
        let bytes = || value.and_then(|v| v.parse::<u64>().ok()).unwrap_or(0) * 1024;
        match name {
            "Rss:" if is_guest => usage.guest += bytes(),
            "Private_Clean:" | "Private_Dirty:" if !is_guest => usage.overhead += bytes(),
            _ => {}
        }
    }
    usage
}

/// Why the guest could not have its memory.
#[derive(Debug, Error)]
#[error("cannot reserve {mib} MiB of guest memory")]
pub struct MemoryError {
    mib: u64,
    #[source]
    source: vm_memory::mmap::FromRangesError,
}

/// Reserves `bytes` of guest memory at the architecture's addresses. vm-memory maps it
/// MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE: a page costs nothing until it is touched.
pub(crate) fn reserve(bytes: u64) -> Result<Memory, MemoryError> {
    let ranges: Vec<_> = arch::layout::memory_ranges(bytes)
        .iter()
        .map(|(start, len)| (GuestAddress(*start), *len as usize))
        .collect();
    Memory::from_ranges(&ranges).map_err(|source| MemoryError {
        mib: bytes >> 20,
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_and_overhead_are_told_apart() {
        let smaps = "1000-3000 rw-p 00000000 00:00 0\nRss: 8 kB\nPrivate_Dirty: 8 kB\n\
                     3000-5000 rw-p 00000000 00:00 0 [heap]\nRss: 6 kB\nPrivate_Clean: 1 kB\n\
                     Private_Dirty: 4 kB\n";
        let usage = sum(smaps, &[(0x2000, 0x3000)]);
        assert_eq!((usage.guest, usage.overhead), (8 << 10, 5 << 10));
    }

    #[test]
    fn touched_memory_is_seen() {
        use vm_memory::Bytes;
        let memory = reserve(64 << 20).unwrap();
        let before = usage(&memory).unwrap();
        memory
            .write_slice(&vec![1; 8 << 20], GuestAddress(16 << 20))
            .unwrap();
        let after = usage(&memory).unwrap();
        assert!(
            after.guest - before.guest >= 8 << 20,
            "{before:?} {after:?}"
        );
    }
}
