//! One header block: POSIX ustar, GNU, star and the older form without a magic number.

use super::Segment;
use crate::error::invalid;
use std::io;

/// Size of a block in bytes.
pub(crate) const BLOCK: usize = 512;

/// A header block with a valid checksum.
pub(super) struct Header<'b>(&'b [u8; BLOCK]);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

impl<'b> Header<'b> {
    /// # Errors
    /// If the checksum is wrong: the block is not a header.
    pub(super) fn new(block: &'b [u8; BLOCK]) -> io::Result<Self> {
        let header = Self(block);
        let told = octal(&block[148..156]).map_err(|_| invalid("no header of a tar archive"))?;
        let counts = |at: usize| !(148..156).contains(&at);
        let byte = |at: usize| if counts(at) { block[at] } else { b' ' };
        let unsigned: i64 = (0..BLOCK).map(|at| i64::from(byte(at))).sum();
        // Some old programs summed signed bytes.
        let signed: i64 = (0..BLOCK).map(|at| i64::from(byte(at) as i8)).sum();
        if told != unsigned && told != signed {
            return Err(invalid("no header of a tar archive"));
        }
        Ok(header)
    }

    fn format(&self) -> Format {
        match (&self.0[257..263], &self.0[263..265], &self.0[508..512]) {
            (b"ustar\0", _, b"tar\0") => Format::Star,
            (b"ustar\0", _, _) => Format::Ustar,
            (b"ustar ", b" \0", _) => Format::Gnu,
            _ => Format::V7,
        }
    }

    pub(super) fn kind(&self) -> u8 {
        self.0[156]
    }

    pub(super) fn name(&self) -> Vec<u8> {
        let name = text(&self.0[..100]);
        let prefix = match self.format() {
            Format::Ustar => text(&self.0[345..500]),
            Format::Star => text(&self.0[345..476]),
            Format::V7 | Format::Gnu => b"",
        };
        match prefix {
            b"" => name.to_vec(),
            _ => [prefix, b"/", name].concat(),
        }
    }

    pub(super) fn link(&self) -> Vec<u8> {
        text(&self.0[157..257]).to_vec()
    }

    pub(super) fn mode(&self) -> io::Result<u32> {
        // Some programs also store the bits of the file type.
        number(&self.0[100..108]).map(|mode| mode as u32 & 0o7777)
    }

    pub(super) fn uid(&self) -> io::Result<i64> {
        number(&self.0[108..116])
    }

    pub(super) fn gid(&self) -> io::Result<i64> {
        number(&self.0[116..124])
    }

    pub(super) fn size(&self) -> io::Result<u64> {
        number(&self.0[124..136])?
            .try_into()
            .map_err(|_| invalid("a size below zero"))
    }

    pub(super) fn mtime(&self) -> io::Result<i64> {
        number(&self.0[136..148])
    }

    pub(super) fn device(&self) -> io::Result<(u32, u32)> {
        if self.format() == Format::V7 {
            return Ok((0, 0));
        }
        let part = |bytes| {
            let number = number(bytes)?;
            u32::try_from(number).map_err(|_| invalid("an invalid device number"))
        };
        Ok((part(&self.0[329..337])?, part(&self.0[337..345])?))
    }

    pub(super) fn sparse(&self) -> io::Result<OldSparse> {
        if self.format() != Format::Gnu {
            return Err(invalid("a sparse file in an archive that is not GNU's"));
        }
        Ok(OldSparse {
            size: unsigned(&self.0[483..495])?,
            map: sparse_map(&self.0[386..482])?,
            more: self.0[482] != 0,
        })
    }
}

/// The header fields of an old GNU sparse file.
pub(super) struct OldSparse {
    /// Actual size of the file.
    pub(super) size: u64,
    /// First entries of the map.
    pub(super) map: Vec<Segment>,
    /// Whether more entries follow.
    pub(super) more: bool,
}

/// Pairs of offset and length, 24 bytes each; an empty one ends the map.
pub(super) fn sparse_map(bytes: &[u8]) -> io::Result<Vec<Segment>> {
    let pairs = bytes.chunks_exact(24).take_while(|pair| pair[0] != 0);
    let pairs = pairs.map(|pair| {
        Ok(Segment {
            offset: unsigned(&pair[..12])?,
            length: unsigned(&pair[12..])?,
        })
    });
    pairs.collect()
}

/// The bytes up to a NUL.
pub(super) fn text(bytes: &[u8]) -> &[u8] {
    bytes.split(|b| *b == 0).next().unwrap_or_default()
}

fn unsigned(bytes: &[u8]) -> io::Result<u64> {
    number(bytes)?
        .try_into()
        .map_err(|_| invalid("a number below zero"))
}

/// The number in a field: octal digits, or two's complement marked by the highest bit (GNU, star).
fn number(bytes: &[u8]) -> io::Result<i64> {
    let Some(first) = bytes.first().filter(|first| **first & 0x80 != 0) else {
        return octal(bytes);
    };
    let too_big = || invalid("a number that is too big");
    // The marker bit is not part of the number; the next one is the sign.
    let sign = if first & 0x40 != 0 { -1i64 } else { 0 };
    let mut value = sign;
    for (at, byte) in bytes.iter().enumerate() {
        let byte = if at == 0 {
            (byte & 0x7f) | (sign as u8 & 0x80)
        } else {
            *byte
        };
        value = value.checked_mul(256).ok_or_else(too_big)? | i64::from(byte);
    }
    Ok(value)
}

fn octal(bytes: &[u8]) -> io::Result<i64> {
    let trim = |b: &u8| *b == b' ' || *b == 0;
    let from = bytes.iter().position(|b| !trim(b)).unwrap_or(bytes.len());
    let digits = text(&bytes[from..]).trim_ascii_end();
    digits.iter().try_fold(0i64, |value, digit| match digit {
        b'0'..=b'7' => Ok(value * 8 + i64::from(digit - b'0')),
        _ => Err(invalid("an invalid number")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_programs_write_them() {
        let cases: &[(&[u8], i64)] = &[
            (b"0000644\0", 0o644),
            (b"   644 \0", 0o644),
            (b"\0\0\0\0\0\0\0\0", 0),
            (b"77777777", 0o77_777_777),
            (b"\x80\0\0\0\x40\0\0\0", 1 << 30),
            (b"\xff\xff\xff\xff\xff\xff\xff\xfe", -2),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", i64::MAX),
        ];
        for (bytes, value) in cases {
            assert_eq!(number(bytes).unwrap(), *value, "{bytes:?}");
        }
        for bad in [
            &b"00x0644\0"[..],
            b"\x80\0\0\x01\0\0\0\0\0\0\0\0",
            b"0000844\0",
        ] {
            assert!(number(bad).is_err(), "{bad:?}");
        }
    }
}
