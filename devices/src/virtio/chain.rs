//! A descriptor chain that has been validated as a whole before use.
//!
//! virtio 1.2, section 2.7.5: a chain is a list of buffers that the driver makes available at once,
//! device-readable ones before device-writable ones. Everything in it comes from the guest: the number of
//! parts, their addresses, their lengths.

use super::Memory;
use std::ops::Deref;
use thiserror::Error;
use virtio_queue::DescriptorChain;
use vm_memory::bitmap::BS;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

/// Maximum size of a chain in bytes: more than any driver sends (Linux reports free memory in chains of up to
/// 128 MiB), and small enough that sums cannot overflow. Devices must not allocate memory by a chain's length
/// without a limit of their own.
pub const MAX_CHAIN_BYTES: u64 = 1 << 30;

/// Maximum number of parts in a chain. The queue size limits direct chains; this also limits indirect ones.
pub const MAX_CHAIN_PARTS: usize = 1024;

/// The rule of virtio that a chain violates.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChainError {
    /// A descriptor refers to one that does not exist, or the chain loops.
    #[error("the chain does not end")]
    Endless,
    /// A readable part follows a writable one (section 2.7.4.2).
    #[error("a device-readable part follows a device-writable one")]
    Order,
    /// A part is outside guest memory.
    #[error("part at {0:#x} is not guest memory")]
    Address(u64),
    /// It exceeds [`MAX_CHAIN_PARTS`] or [`MAX_CHAIN_BYTES`].
    #[error("the chain is too large")]
    TooLarge,
    /// It has fewer bytes than the device's header needs.
    #[error("the chain is too short")]
    TooShort,
}

/// A part of a chain, within guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    address: GuestAddress,
    len: u32,
}

/// A validated chain: readable parts, writable parts and the index of its head.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    readable: Vec<Part>,
    writable: Vec<Part>,
    readable_len: u32,
    writable_len: u32,
}

impl Chain {
    /// Walks and validates a whole chain.
    ///
    /// # Errors
    /// The rule of section 2.7 that the driver violated.
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
            // Empty parts are legal and ignored.
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

    /// The index of its head, for the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Number of readable bytes.
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// Number of writable bytes.
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    /// Fills `data` with readable bytes from `offset` on.
    ///
    /// # Errors
    /// [`ChainError::TooShort`] if the chain ends before `data` is full.
    pub fn read(&self, memory: &Memory, offset: u32, data: &mut [u8]) -> Result<(), ChainError> {
        let mut at = 0;
        for slice in self.readable_slices(memory, offset, data.len())? {
            at += slice.copy_to(&mut data[at..at + slice.len()]);
        }
        Ok(())
    }

    /// Writes all of `data` to the writable bytes from `offset` on.
    ///
    /// # Errors
    /// [`ChainError::TooShort`] if the chain ends before that.
    pub fn write(&self, memory: &Memory, offset: u32, data: &[u8]) -> Result<(), ChainError> {
        let mut at = 0;
        for slice in self.writable_slices(memory, offset, data.len())? {
            slice.copy_from(&data[at..at + slice.len()]);
            at += slice.len();
        }
        Ok(())
    }

    /// Address and length in bytes of each writable part, for devices to which a chain is a list of memory
    /// ranges rather than data.
    pub fn writable_ranges(&self) -> impl Iterator<Item = (GuestAddress, u64)> {
        let parts = self.writable.iter();
        parts.map(|part| (part.address, u64::from(part.len)))
    }

    /// The readable memory `[offset, offset + len)`, for I/O without a copy.
    ///
    /// # Errors
    /// [`ChainError::TooShort`] if the chain ends before that.
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
    /// [`ChainError::TooShort`] if the chain ends before that.
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
        // A part may span adjacent regions and thus several slices of host memory.
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
