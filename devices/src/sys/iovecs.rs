//! Guest memory as a list of iovecs, for reads of unknown length.

use super::checked;
use crate::virtio::{Chain, ChainError, Memory};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

/// The writable parts of several chains as one list.
pub struct Iovecs {
    memory: Arc<Memory>,
    all: Vec<libc::iovec>,
    /// Index of the first unused one.
    first: usize,
}

// SAFETY: the pointers point into guest memory, which `memory` keeps mapped and any thread may use.
unsafe impl Send for Iovecs {}

impl Iovecs {
    /// An empty list for this memory.
    pub fn new(memory: Arc<Memory>) -> Self {
        Self {
            memory,
            all: Vec::new(),
            first: 0,
        }
    }

    /// Appends the whole writable part of a chain; returns its number of iovecs.
    ///
    /// # Errors
    /// Never for a chain that was checked against the same memory.
    pub fn push(&mut self, chain: &Chain) -> Result<usize, ChainError> {
        let slices = chain.writable_slices(&self.memory, 0, chain.writable_len() as usize)?;
        if self.first > 256 {
            self.all.drain(..self.first);
            self.first = 0;
        }
        self.all.extend(super::iovecs(&slices));
        Ok(slices.len().min(super::MAX_IOVECS))
    }

    /// Reads once from `fd` into the first `most` iovecs.
    ///
    /// # Errors
    /// The error from readv(2).
    pub fn read(&self, fd: impl AsFd, most: usize) -> io::Result<usize> {
        let left = &self.all[self.first..];
        let count = left.len().min(most).min(super::MAX_IOVECS);
        // SAFETY: each iovec lies in `memory`, which lives as long as this; nobody holds references into
        // guest memory, and the kernel writes inside the iovecs only.
        checked(unsafe { libc::readv(fd.as_fd().as_raw_fd(), left.as_ptr(), count as libc::c_int) })
    }

    /// Drops the first `count` iovecs.
    pub fn drop_front(&mut self, count: usize) {
        self.first = (self.first + count).min(self.all.len());
    }
}
