//! Positions in directories: what the host's file system calls them, and what the guest is told.

use rustix::fs::{SeekFrom, seek};
use std::os::fd::AsFd;

/// What the cookies of a directory on the host are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::fs) enum Cookies {
    /// Anything.
    Plain,
    /// Hashes of names in 63 bits, as ext4 uses them for 64-bit programs: 31 bits of the order of entries, and below them 32
    /// bits that tell those apart of which the first ones are the same.
    Hashes,
}

/// The end of a directory with hashes (`EXT4_HTREE_EOF_64BIT`).
const END: u64 = i64::MAX as u64;
/// Bits of a hash below those that the guest is told.
const MINOR_BITS: u32 = 32;

impl Cookies {
    /// The kind that an open directory has; its position changes. Only the end of a directory of hashes is the largest
    /// offset that there is.
    pub(super) fn of(directory: impl AsFd) -> Self {
        match seek(directory, SeekFrom::End(0)) {
            Ok(END) => Self::Hashes,
            _ => Self::Plain,
        }
    }

    /// The offset for the guest. Of a hash, the upper bits alone: what ext4 itself tells 32-bit programs, since positions of
    /// more bits make their `readdir` fail with EOVERFLOW (C libraries without large file support). Not 0 behind an entry,
    /// which is the beginning.
    pub(super) fn shown(self, cookie: u64) -> u64 {
        match self {
            Self::Plain => cookie,
            Self::Hashes => (cookie >> MINOR_BITS).max(u64::from(cookie > 0)),
        }
    }

    /// The host's cookie for an offset of [`shown`](Self::shown): of entries that share it, the first one, so that none is left
    /// out.
    pub(super) fn host(self, offset: u64) -> u64 {
        match self {
            Self::Hashes if offset >= END >> MINOR_BITS => END,
            Self::Hashes => offset << MINOR_BITS,
            Self::Plain => offset,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_have_31_bits_for_the_guest() {
        let hashes = Cookies::Hashes;
        for (cookie, shown, host) in [
            (0, 0, 0),
            // A name whose hash begins with 31 zeros.
            (7, 1, 1 << 32),
            (1 << 32, 1, 1 << 32),
            (0x1234_5678_9abc_def0, 0x1234_5678, 0x1234_5678_0000_0000),
            (END, 0x7fff_ffff, END),
        ] {
            assert_eq!(hashes.shown(cookie), shown, "{cookie:x}");
            assert_eq!(hashes.host(shown), host, "{cookie:x}");
        }
        // From a guest, which may send anything.
        assert_eq!(hashes.host(u64::MAX), END);
        let plain = Cookies::Plain;
        assert_eq!(plain.host(plain.shown(u64::MAX)), u64::MAX);
    }
}
