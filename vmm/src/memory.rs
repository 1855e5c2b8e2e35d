//! Guest memory: private, not touched until the guest does, and never counted before.

use crate::arch;
use crate::config::{HugePages, MemoryBacking, MemorySpec};
use koya_devices::sys::Advice;
use koya_devices::virtio::Memory;
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::sync::Arc;
use thiserror::Error;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

/// What a virtual machine holds of the host's memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct MemoryUsage {
    /// Pages of guest memory that exist.
    pub guest: u64,
    /// Private pages of the process beside them: the monitor, its devices, and whatever else the
    /// process does.
    pub overhead: u64,
}

/// All of it, in bytes.
pub(crate) fn size(memory: &Memory) -> u64 {
    memory.iter().map(|region| region.len()).sum()
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
            "Rss:" | "Private_Hugetlb:" | "Shared_Hugetlb:" if is_guest => usage.guest += bytes(),
            "Private_Clean:" | "Private_Dirty:" if !is_guest => usage.overhead += bytes(),
            _ => {}
        }
    }
    usage
}

/// Why the guest could not have its memory.
#[derive(Debug, Error)]
#[error("cannot reserve {mib} MiB of guest memory{hint}")]
pub struct MemoryError {
    mib: u64,
    hint: &'static str,
    #[source]
    source: io::Error,
}

/// The host's huge page, in bytes, as [`HugePages::Reserved`] asks for it.
const HUGE_PAGE: u64 = 2 << 20;

/// Reserves guest memory at the architecture's addresses: what the guest starts with, and after it
/// the room to grow, which is no memory for the guest until it is plugged. A page costs nothing until
/// it is touched, but for huge pages, which the host sets aside.
pub(crate) fn reserve(spec: &MemorySpec) -> Result<Memory, MemoryError> {
    let mib = (spec.bytes + spec.hotplug_bytes) >> 20;
    try_reserve(spec).map_err(|source| MemoryError {
        mib,
        hint: match spec.huge_pages {
            HugePages::Reserved => " in huge pages; see HugePages_Free in /proc/meminfo",
            _ => "",
        },
        source,
    })
}

fn try_reserve(spec: &MemorySpec) -> io::Result<Memory> {
    let mut ranges = arch::layout::memory_ranges(spec.bytes);
    if spec.hotplug_bytes > 0 {
        ranges.push((arch::layout::hotplug_start(spec.bytes), spec.hotplug_bytes));
    }
    let file = match spec.backing {
        MemoryBacking::Anonymous => None,
        MemoryBacking::Memfd => Some(Arc::new(memory_file(spec)?)),
    };
    let mut regions = Vec::new();
    let mut offset = 0;
    for (start, len) in ranges {
        let place = file.clone().map(|file| FileOffset::from_arc(file, offset));
        let mapping = map_aligned(start, len, place, spec.huge_pages)?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(start));
        regions.push(region.ok_or(io::ErrorKind::InvalidInput)?);
        offset += len;
    }
    let memory = Memory::from_regions(regions).map_err(io::Error::other)?;
    if spec.huge_pages == HugePages::Transparent {
        for region in memory.iter() {
            let slice = region.as_volatile_slice().map_err(io::Error::other)?;
            if let Err(error) = koya_devices::sys::advise(&slice, Advice::HugePages) {
                log::warn!("the host has no transparent huge pages: {error}");
            }
        }
    }
    Ok(memory)
}

fn memory_file(spec: &MemorySpec) -> io::Result<File> {
    let mut flags = MemfdFlags::CLOEXEC;
    if spec.huge_pages == HugePages::Reserved {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let file = File::from(memfd_create("koya-guest", flags)?);
    file.set_len(spec.bytes + spec.hotplug_bytes)?;
    Ok(file)
}

/// Maps it where huge pages of the host are huge pages of the guest: both addresses must be as far from the
/// begin of one. The kernel (since 6.7) sees to it for whole huge pages that begin with one; here what is in
/// the way is measured, and a place holder takes as much, since mappings follow each other downwards.
fn map_aligned(
    start: u64,
    len: u64,
    place: Option<FileOffset>,
    huge_pages: HugePages,
) -> io::Result<MmapRegion> {
    let first = map(len, place.clone(), huge_pages)?;
    let beyond =
        |mapping: &MmapRegion| (mapping.as_ptr().addr() as u64).wrapping_sub(start) % HUGE_PAGE;
    if len < HUGE_PAGE || beyond(&first) == 0 {
        return Ok(first);
    }
    let spare = beyond(&first);
    drop(first);
    let _holder = map(spare, None, HugePages::Host)?;
    // Where another thread came in between, it costs time, and nothing else.
    map(len, place, huge_pages)
}

fn map(len: u64, place: Option<FileOffset>, huge_pages: HugePages) -> io::Result<MmapRegion> {
    let shared = match place {
        Some(_) => libc::MAP_SHARED,
        None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    };
    let kind = match huge_pages {
        // Claimed now: a page that is missing later would be a signal in the middle of the guest.
        HugePages::Reserved if place.is_some() => 0,
        HugePages::Reserved => {
            libc::MAP_HUGETLB | (HUGE_PAGE.ilog2() as i32) << libc::MAP_HUGE_SHIFT
        }
        _ => libc::MAP_NORESERVE,
    };
    let mut mapping = MmapRegionBuilder::new(len as usize)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(shared | kind)
        .with_hugetlbfs(huge_pages == HugePages::Reserved);
    if let Some(place) = place {
        mapping = mapping.with_file_offset(place);
    }
    mapping.build().map_err(|error| match error {
        MmapRegionError::Mmap(source) => source,
        other => io::Error::other(other),
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
        let memory = reserve(&MemorySpec::new(64 << 20)).unwrap();
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

    #[test]
    fn every_kind_of_memory_is_memory() {
        use vm_memory::Bytes;
        for backing in [MemoryBacking::Anonymous, MemoryBacking::Memfd] {
            for huge_pages in [HugePages::Host, HugePages::Transparent] {
                let spec = MemorySpec {
                    hotplug_bytes: arch::layout::memory_block(0),
                    backing,
                    huge_pages,
                    ..MemorySpec::new(64 << 20)
                };
                let memory = reserve(&spec).unwrap();
                let more = arch::layout::hotplug_start(spec.bytes);
                for (address, word) in [(16 << 20, 1u64), (more, 2)] {
                    memory.write_obj(word, GuestAddress(address)).unwrap();
                }
                let word: u64 = memory.read_obj(GuestAddress(16 << 20)).unwrap();
                assert_eq!(word, 1, "{spec:?}");
            }
        }
    }

    #[test]
    fn huge_pages_that_the_host_does_not_have_are_refused_at_once() {
        let spec = MemorySpec {
            huge_pages: HugePages::Reserved,
            // More than any host has.
            ..MemorySpec::new(1 << 46)
        };
        for backing in [MemoryBacking::Anonymous, MemoryBacking::Memfd] {
            let error = reserve(&MemorySpec { backing, ..spec }).unwrap_err();
            assert!(error.to_string().contains("HugePages_Free"), "{error}");
        }
    }
}
