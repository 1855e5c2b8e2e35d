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

    /// The offset for the guest, if the entry before has the cookie `before`. Of a hash, the upper bits alone: what ext4 itself
    /// tells 32-bit programs, since positions of more bits make their `readdir` fail with EOVERFLOW (C libraries without large
    /// file support). If those are the same as of the entry before, all bits are needed to tell both positions apart.
    pub(super) fn shown(self, cookie: u64, before: u64) -> u64 {
        let short = upper_bits(cookie);
        match self {
            // Shorter ones would be taken for upper bits.
            Self::Hashes if short != upper_bits(before) || cookie <= MOST_SHORT => short,
            _ => cookie,
        }
    }

    /// The cookie on the host for an offset of [`shown`](Self::shown).
    pub(super) fn host(self, offset: u64) -> u64 {
        match self {
            Self::Hashes if offset == MOST_SHORT => END,
            Self::Hashes if offset < MOST_SHORT => offset << MINOR_BITS,
            // From a guest, which may send anything.
            Self::Hashes => offset.min(END),
            Self::Plain => offset,
        }
    }
}

/// The largest number of 31 bits.
const MOST_SHORT: u64 = END >> MINOR_BITS;

/// Not 0 behind an entry, which is the beginning.
fn upper_bits(cookie: u64) -> u64 {
    (cookie >> MINOR_BITS).max(u64::from(cookie > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_have_31_bits_for_the_guest() {
        let hashes = Cookies::Hashes;
        for (cookie, shown, host) in [
            // A name whose hash begins with 31 zeros.
            (7, 1, 1 << 32),
            (1 << 32, 1, 1 << 32),
            (0x1234_5678_9abc_def0, 0x1234_5678, 0x1234_5678_0000_0000),
            (END, 0x7fff_ffff, END),
        ] {
            assert_eq!(hashes.shown(cookie, 0), shown, "{cookie:x}");
            assert_eq!(hashes.host(shown), host, "{cookie:x}");
        }
        // From a guest, which may send anything.
        assert_eq!(hashes.host(u64::MAX), END);
        let plain = Cookies::Plain;
        assert_eq!(plain.host(plain.shown(u64::MAX, 0)), u64::MAX);
    }

    /// A directory whose entries are behind these positions: from each offset that the guest gets, its listing continues with
    /// the right entry.
    #[test]
    fn each_offset_is_of_one_position() {
        let high = 0x1234_5678u64 << 32;
        for ends in [
            // Hashes of which neighbours begin with the same bits, up to the end.
            vec![
                1 << 40,
                high + 3,
                high + 9,
                high + 11,
                high + (1 << 32),
                END,
            ],
            vec![high, high + 1, (0x7fff_fffe << 32) + 5, END],
            // Numbers in place of hashes (bcachefs).
            vec![(1 << 33) + 1, (1 << 33) + 2, (1 << 33) + 3, (1 << 33) + 4],
        ] {
            let hashes = Cookies::Hashes;
            let mut before = 0;
            for (index, cookie) in ends.iter().enumerate() {
                let offset = hashes.shown(*cookie, before);
                let from = hashes.host(offset);
                // What is at or behind that position is the same as at the cookie itself.
                let follows = |position: u64| ends.iter().position(|end| *end >= position);
                assert_eq!(follows(from), Some(index), "{ends:x?} {offset:x}");
                assert!(from > before || index == 0);
                before = *cookie;
            }
        }
    }
}
