//! Guest memory: private, not touched until the guest does, and never counted before.

use crate::arch;
use koya_devices::virtio::Memory;
use thiserror::Error;
use vm_memory::GuestAddress;

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
