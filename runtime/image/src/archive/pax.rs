//! The records of a pax extended header: `LENGTH KEY=VALUE\n`. The length is decisive: a value may contain any byte,
//! including line breaks.

use super::Segment;
use crate::error::invalid;
use std::collections::BTreeMap;
use std::io;

/// Prefix of records for extended attributes: that of star, used by container engines.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// The records of one extended header. The last record of several with the same key counts.
#[derive(Default)]
pub(super) struct Records {
    all: BTreeMap<Vec<u8>, Vec<u8>>,
    /// GNU sparse 0.0: a pair of records for each segment.
    pairs: Vec<u64>,
}

impl Records {
    /// # Errors
    /// If the length of a record is wrong.
    pub(super) fn parse(mut bytes: &[u8]) -> io::Result<Self> {
        let mut records = Self::default();
        while !bytes.is_empty() {
            let (key, value, rest) = record(bytes).ok_or_else(|| invalid("a broken pax record"))?;
            bytes = rest;
            match key {
                b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                    let is_offset = key.ends_with(b"offset");
                    if is_offset != records.pairs.len().is_multiple_of(2) {
                        return Err(invalid("a broken map of a sparse file"));
                    }
                    records.pairs.push(decimal(value)?);
                }
                b"path" | b"linkpath" | b"GNU.sparse.name" if value.contains(&0) => {
                    return Err(invalid("a name with a NUL in it"));
                }
                _ => {
                    records.all.insert(key.to_vec(), value.to_vec());
                }
            }
        }
        Ok(records)
    }

    /// Value of a record. An empty value counts as missing.
    pub(super) fn get(&self, key: &str) -> Option<&[u8]> {
        let value = self.all.get(key.as_bytes())?;
        (!value.is_empty()).then_some(value.as_slice())
    }

    pub(super) fn number(&self, key: &str) -> io::Result<Option<u64>> {
        self.get(key).map(decimal).transpose()
    }

    /// Seconds and nanoseconds.
    pub(super) fn time(&self, key: &str) -> io::Result<Option<(i64, u32)>> {
        self.get(key).map(time).transpose()
    }

    /// Extended attributes by name.
    pub(super) fn into_xattrs(self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let named =
            |(key, value): (Vec<u8>, Vec<u8>)| Some((key.strip_prefix(XATTR)?.to_vec(), value));
        self.all.into_iter().filter_map(named).collect()
    }

    /// The sparse map contained in the records themselves: GNU's versions 0.0 and 0.1.
    pub(super) fn sparse_map(&self) -> io::Result<Option<Vec<Segment>>> {
        let numbers = match self.get("GNU.sparse.map") {
            Some(text) => text
                .split(|b| *b == b',')
                .map(decimal)
                .collect::<io::Result<_>>()?,
            None if self.pairs.is_empty() => return Ok(None),
            None => self.pairs.clone(),
        };
        segments(&numbers).map(Some)
    }
}

/// Key and value of the first record, and the remaining bytes.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|b| *b == b' ')?;
    let length = usize::try_from(decimal(&bytes[..space]).ok()?).ok()?;
    let rest = bytes.get(length..)?;
    let (last, body) = bytes.get(space + 1..length)?.split_last()?;
    let equals = body.iter().position(|b| *b == b'=')?;
    let (key, value) = (&body[..equals], &body[equals + 1..]);
    let proper = *last == b'\n' && !key.is_empty() && !key.contains(&0);
    proper.then_some((key, value, rest))
}

pub(super) fn decimal(bytes: &[u8]) -> io::Result<u64> {
    let number = std::str::from_utf8(bytes)
        .ok()
        .filter(|text| text.bytes().all(|b| b.is_ascii_digit()))
        .and_then(|text| text.parse().ok());
    number.ok_or_else(|| invalid("an invalid number"))
}

/// Pairs of offset and length.
pub(super) fn segments(numbers: &[u64]) -> io::Result<Vec<Segment>> {
    if !numbers.len().is_multiple_of(2) {
        return Err(invalid("a broken map of a sparse file"));
    }
    let pairs = numbers.chunks_exact(2);
    let pairs = pairs.map(|pair| Segment {
        offset: pair[0],
        length: pair[1],
    });
    Ok(pairs.collect())
}

/// Parses `-12.5` into seconds rounded down, and nanoseconds.
fn time(bytes: &[u8]) -> io::Result<(i64, u32)> {
    let (negative, bytes) = match bytes.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, bytes),
    };
    let mut parts = bytes.splitn(2, |b| *b == b'.');
    let seconds = decimal(parts.next().unwrap_or_default())?;
    let mut nanos = 0u32;
    if let Some(digits) = parts.next() {
        if !digits.iter().all(u8::is_ascii_digit) {
            return Err(invalid("an invalid time"));
        }
        for at in 0..9 {
            nanos = nanos * 10 + u32::from(digits.get(at).map_or(0, |digit| digit - b'0'));
        }
    }
    let seconds = i64::try_from(seconds).map_err(|_| invalid("an invalid time"))?;
    Ok(match (negative, nanos) {
        (false, nanos) => (seconds, nanos),
        (true, 0) => (-seconds, 0),
        (true, nanos) => (-seconds - 1, 1_000_000_000 - nanos),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_may_hold_line_ends() {
        use crate::tests::writer::record;
        let note = record("SCHILY.xattr.user.n", b"two\n7 uid");
        let records = Records::parse(&[note, record("uid", b"33333")].concat()).unwrap();
        assert_eq!(records.number("uid").unwrap(), Some(33333));
        let xattrs = records.into_xattrs();
        assert_eq!(xattrs, [(b"user.n".to_vec(), b"two\n7 uid".to_vec())]);
    }

    #[test]
    fn broken_records_are_refused() {
        for bad in [
            &b"12 uid=3333"[..],
            b"99 uid=33333\n",
            b"0 a=b\n",
            b"5 a=b\n",
            b"x a=b\n",
            b"6 =abc\n",
            b"6 abc\n",
            b"10 path=\0x\n",
            b"99999999999999999999999 a=b\n",
            b"25 GNU.sparse.numbytes=1\n",
        ] {
            assert!(
                Records::parse(bad).is_err(),
                "{:?}",
                String::from_utf8_lossy(bad)
            );
        }
    }

    #[test]
    fn times_before_1970_and_parts_of_seconds_are_times() {
        assert_eq!(time(b"12.5").unwrap(), (12, 500_000_000));
        assert_eq!(time(b"-12.25").unwrap(), (-13, 750_000_000));
        assert_eq!(time(b"-1").unwrap(), (-1, 0));
        assert_eq!(time(b"1.0000000019").unwrap(), (1, 1));
        assert!(time(b"1.x").is_err() && time(b"").is_err());
    }
}
