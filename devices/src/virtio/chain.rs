//! A descriptor chain that was checked as a whole before anything acts on it.
//!
//! virtio 1.2, section 2.7.5: a chain is what the driver made available at once, first the
//! parts that the device may read, then those that it may write. Everything in it comes from
//! the guest: the number of parts, their addresses, their lengths.

use super::Memory;
use std::ops::Deref;
use thiserror::Error;
use virtio_queue::DescriptorChain;
use vm_memory::bitmap::BS;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

/// The most bytes that one chain may hold: more than any driver sends (Linux reports free memory in
/// chains of up to 128 MiB), little enough that sums cannot overflow. No device may set memory aside by
/// a chain's length without a bound of its own.
pub const MAX_CHAIN_BYTES: u64 = 1 << 30;

/// The most parts of one chain. A queue bounds its own; this bounds indirect tables as well.
pub const MAX_CHAIN_PARTS: usize = 1024;

/// How a driver broke a chain.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChainError {
    /// A descriptor follows that does not exist, or the chain is a loop.
    #[error("the chain does not end")]
    Endless,
    /// A part for reading came after one for writing (section 2.7.4.2).
    #[error("a device-readable part follows a device-writable one")]
    Order,
    /// A part lies outside guest memory.
    #[error("part at {0:#x} is not guest memory")]
    Address(u64),
    /// More than [`MAX_CHAIN_PARTS`] or [`MAX_CHAIN_BYTES`].
    #[error("the chain is too large")]
    TooLarge,
    /// Fewer bytes than the device's header needs.
    #[error("the chain is too short")]
    TooShort,
}

/// One part of a chain, inside guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    address: GuestAddress,
    len: u32,
}

/// A checked chain: the parts to read, the parts to write, and the index to give back.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    readable: Vec<Part>,
    writable: Vec<Part>,
    readable_len: u32,
    writable_len: u32,
}

impl Chain {
    /// Walks and checks a whole chain.
    ///
    /// # Errors
    /// Any rule of section 2.7 that the driver broke.
    pub fn check<M>(chain: DescriptorChain<M>, memory: &Memory) -> Result<Self, ChainError>
    where
        M: Deref,
        M::Target: vm_memory::GuestMemory,
    {
        let mut checked = Self {
            head: chain.head_index(),
            readable: Vec::new(),
            writable: Vec::new(),
            readable_len: 0,
            writable_len: 0,
        };
        let mut total = 0u64;
        let mut more = true;
        for descriptor in chain {
            more = descriptor.has_next();
            let part = Part {
                address: descriptor.addr(),
                len: descriptor.len(),
            };
            // An empty part is legal and says nothing.
            if part.len == 0 {
                continue;
            }
            total += u64::from(part.len);
            let parts = checked.readable.len() + checked.writable.len();
            if total > MAX_CHAIN_BYTES || parts >= MAX_CHAIN_PARTS {
                return Err(ChainError::TooLarge);
            }
            if !memory.check_range(part.address, part.len as usize) {
                return Err(ChainError::Address(part.address.0));
            }
            if descriptor.is_write_only() {
                checked.writable.push(part);
                checked.writable_len += part.len;
            } else if checked.writable.is_empty() {
                checked.readable.push(part);
                checked.readable_len += part.len;
            } else {
                return Err(ChainError::Order);
            }
        }
        if more {
            return Err(ChainError::Endless);
        }
        Ok(checked)
    }

    /// The index that goes into the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that the device may read.
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// Bytes that the device may write.
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    /// Copies readable bytes from `offset` into the whole of `data`.
    ///
    /// # Errors
    /// [`ChainError::TooShort`] if the chain ends before.
    pub fn read(&self, memory: &Memory, offset: u32, data: &mut [u8]) -> Result<(), ChainError> {
        let mut at = 0;
        for slice in self.readable_slices(memory, offset, data.len())? {
            at += slice.copy_to(&mut data[at..at + slice.len()]);
        }
        Ok(())
    }

    /// Copies the whole of `data` to the writable bytes from `offset`.
    ///
    /// # Errors
    /// [`ChainError::TooShort`] if the chain ends before.
    pub fn write(&self, memory: &Memory, offset: u32, data: &[u8]) -> Result<(), ChainError> {
        let mut at = 0;
        for slice in self.writable_slices(memory, offset, data.len())? {
            slice.copy_from(&data[at..at + slice.len()]);
            at += slice.len();
        }
        Ok(())
    }

    /// The writable parts, for devices to which a chain is a list of places and not of contents:
    /// first address and length in bytes.
    pub fn writable_ranges(&self) -> impl Iterator<Item = (GuestAddress, u64)> {
        let parts = self.writable.iter();
        parts.map(|part| (part.address, u64::from(part.len)))
    }

    /// The readable memory `[offset, offset + len)`, for I/O without a copy.
    ///
    /// # Errors
    /// [`ChainError::TooShort`] if the chain ends before.
    pub fn readable_slices<'m>(
        &self,
        memory: &'m Memory,
        offset: u32,
        len: usize,
    ) -> Result<Vec<VolatileSlice<'m, BS<'m, ()>>>, ChainError> {
        slices(&self.readable, memory, offset, len)
    }

    /// The writable memory `[offset, offset + len)`, for I/O without a copy.
    ///
    /// # Errors
    /// [`ChainError::TooShort`] if the chain ends before.
    pub fn writable_slices<'m>(
        &self,
        memory: &'m Memory,
        offset: u32,
        len: usize,
    ) -> Result<Vec<VolatileSlice<'m, BS<'m, ()>>>, ChainError> {
        slices(&self.writable, memory, offset, len)
    }
}

fn slices<'m>(
    parts: &[Part],
    memory: &'m Memory,
    offset: u32,
    len: usize,
) -> Result<Vec<VolatileSlice<'m, BS<'m, ()>>>, ChainError> {
    let mut out = Vec::with_capacity(parts.len());
    let mut skip = u64::from(offset);
    let mut left = len as u64;
    for part in parts {
        if left == 0 {
            break;
        }
        let part_len = u64::from(part.len);
        if skip >= part_len {
            skip -= part_len;
            continue;
        }
        let take = (part_len - skip).min(left);
        let start = GuestAddress(part.address.0 + skip);
        // Regions may meet inside a part: it can be more than one piece of host memory.
        for slice in memory.get_slices(start, take as usize) {
            out.push(slice.map_err(|_| ChainError::Address(start.0))?);
        }
        skip = 0;
        left -= take;
    }
    if left > 0 {
        return Err(ChainError::TooShort);
    }
    Ok(out)
}
