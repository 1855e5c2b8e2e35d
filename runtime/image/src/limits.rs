//! What an image may take of the host.

use crate::error::invalid;
use std::io::{self, Read};

/// Bounds of what is read from an image. Whatever is beyond is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of an index, manifest or configuration. Default: 4 MiB, which registries also allow.
    pub document: u64,
    /// Bytes of one extended header: a pax header, a long name, a map of a sparse file. Default: 1 MiB,
    /// as for other container engines.
    pub header: u64,
    /// Bytes that all layers, and before them an archive that is compressed as a whole, may have after
    /// decompression. Holes of sparse files take none. Default: 64 GiB.
    pub total: u64,
    /// Entries of all layers, with directories that no entry names. Default: 2 million.
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

/// How deep a path may be, in components: a directory is held open for each while a tree is removed.
pub(crate) const MAX_DEPTH: usize = 512;
/// The longest name in an archive, in bytes: PATH_MAX.
pub(crate) const MAX_NAME: usize = 4096;

/// How many bytes of manifests and configurations an index may lead to: many may name one.
pub(crate) const MAX_DOCUMENTS: u64 = 16 << 20;
/// How many components of paths with links in them are looked at, in all: each is a system call or some.
pub(crate) const MAX_ALL_STEPS: u64 = 50_000_000;
/// How many bytes the names of hard links may take that wait for their targets.
pub(crate) const MAX_WAITING: u64 = 256 << 20;

/// Counts down from a limit over several readers.
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

    /// Takes `count` of it.
    ///
    /// # Errors
    /// If there is not so much left.
    pub(crate) fn take(&mut self, count: u64) -> io::Result<()> {
        self.left = self
            .left
            .checked_sub(count)
            .ok_or_else(|| invalid(format!("more than {} {}", self.limit, self.what)))?;
        Ok(())
    }
}

/// A reader whose bytes come off a budget.
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
