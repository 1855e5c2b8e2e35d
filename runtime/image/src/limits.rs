//! Resource limits of an image on the host.

use crate::error::invalid;
use std::io::{self, Read};

/// Limits for data read from an image. Larger images are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of an index, manifest or configuration. Default: 4 MiB, as in registries.
    pub document: u64,
    /// Bytes of one extended header: a pax header, a long name, a map of a sparse file. Default: 1 MiB,
    /// as in other container engines.
    pub header: u64,
    /// Total bytes of all layers after decompression, plus those of an archive that is compressed as a whole. Holes of
    /// sparse files do not count. Default: 64 GiB.
    pub total: u64,
    /// Entries of all layers, including implied directories. Default: 2 million.
    pub entries: u64,
    /// Layers. Default: 512.
    pub layers: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            document: 4 << 20,
            header: 1 << 20,
            total: 64 << 30,
            entries: 2_000_000,
            layers: 512,
        }
    }
}

/// Maximum number of components of a path: one directory is held open for each while a tree is removed.
pub(crate) const MAX_DEPTH: usize = 512;
/// Maximum length of a name in an archive, in bytes: PATH_MAX.
pub(crate) const MAX_NAME: usize = 4096;

/// Maximum total bytes of manifests and configurations reached from an index: many entries may refer to one document.
pub(crate) const MAX_DOCUMENTS: u64 = 16 << 20;
/// Maximum total number of components of paths with symbolic links: each takes at least one system call.
pub(crate) const MAX_ALL_STEPS: u64 = 50_000_000;
/// Maximum total bytes of the names of hard links that wait for their targets.
pub(crate) const MAX_WAITING: u64 = 256 << 20;

/// A limit shared by several readers.
#[derive(Debug)]
pub(crate) struct Budget {
    what: &'static str,
    limit: u64,
    left: u64,
}

impl Budget {
    pub(crate) fn new(what: &'static str, limit: u64) -> Self {
        Self {
            what,
            limit,
            left: limit,
        }
    }

    /// Subtracts `count`.
    ///
    /// # Errors
    /// If less is left.
    pub(crate) fn take(&mut self, count: u64) -> io::Result<()> {
        self.left = self
            .left
            .checked_sub(count)
            .ok_or_else(|| invalid(format!("more than {} {}", self.limit, self.what)))?;
        Ok(())
    }
}

/// A reader that charges a budget for its bytes.
pub(crate) struct Metered<'b, R> {
    pub(crate) source: R,
    pub(crate) budget: &'b mut Budget,
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buffer)?;
        self.budget.take(count as u64)?;
        Ok(count)
    }
}
