//! Reader for the tar archives found in images.
//!
//! A separate implementation, because nothing in an image may be lost: extended headers with line breaks in values, all
//! forms of sparse files, and the end of an archive. Where the formats leave a choice, it follows Go's `archive/tar`, which
//! wrote most images and reads nearly all.

mod header;
mod pax;

pub(crate) use header::BLOCK;

use crate::error::{cut_short, invalid};
use header::{Header, sparse_map, text};
use pax::Records;
use std::io::{self, Read};

/// Type of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Regular,
    Directory,
    Symlink,
    HardLink,
    CharacterDevice,
    BlockDevice,
    Fifo,
}

/// A stored segment of a sparse file; the rest is holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// An entry without its data.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) kind: Kind,
    pub(crate) name: Vec<u8>,
    /// Target of a link.
    pub(crate) link: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    /// Modification time: seconds and nanoseconds since 1970.
    pub(crate) mtime: (i64, u32),
    pub(crate) device: (u32, u32),
    pub(crate) size: u64,
    /// The segments of a sparse file, in order.
    pub(crate) sparse: Option<Vec<Segment>>,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// End of an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Two blocks of zeros, as required.
    Marked,
    /// No end marker: it may have been truncated between two entries.
    Unmarked,
}

/// Source of an archive.
pub(crate) trait Source: Read + Sized {
    /// Skips bytes, which must be there.
    fn skip(&mut self, count: u64) -> io::Result<()> {
        match io::copy(&mut self.by_ref().take(count), &mut io::sink())? {
            skipped if skipped == count => Ok(()),
            _ => Err(cut_short()),
        }
    }
}

/// Iterates over the entries; as a reader, it returns the stored data of the current entry.
pub(crate) struct Reader<S> {
    source: S,
    /// Maximum size of an extended header in bytes.
    max_header: u64,
    /// Remaining bytes of the current entry's data.
    left: u64,
    padding: u64,
    end: Option<End>,
}

/// Attributes of the next entry from extended headers.
#[derive(Default)]
struct Extended {
    records: Records,
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
}

impl<S: Source> Reader<S> {
    pub(crate) fn new(source: S, max_header: u64) -> Self {
        Self {
            source,
            max_header,
            left: 0,
            padding: 0,
            end: None,
        }
    }

    /// The kind of end, once it has been reached.
    pub(crate) fn end(&self) -> Option<End> {
        self.end
    }

    pub(crate) fn source(&mut self) -> &mut S {
        &mut self.source
    }

    /// Goes to the next entry, skipping unread data of the previous one.
    ///
    /// # Errors
    /// The error from the source; InvalidData if it is not an archive, UnexpectedEof if it is truncated.
    pub(crate) fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        let mut extended = None;
        loop {
            let Some(block) = self.header()? else {
                return match extended {
                    None => Ok(None),
                    Some(_) => Err(invalid("the last extended header has no entry")),
                };
            };
            let header = Header::new(&block)?;
            let kind = header.kind();
            if !matches!(kind, b'x' | b'g' | b'L' | b'K') {
                return self.entry(&header, extended.unwrap_or_default()).map(Some);
            }
            let payload = self.payload(header.size()?)?;
            if kind == b'g' {
                // A global header applies to all entries: it is mostly a comment written by git. Other engines ignore its
                // other fields too.
                Records::parse(&payload)?;
                continue;
            }
            let extended = extended.get_or_insert_with(Extended::default);
            match kind {
                b'x' => extended.records = Records::parse(&payload)?,
                b'L' => extended.name = Some(text(&payload).to_vec()),
                _ => extended.link = Some(text(&payload).to_vec()),
            }
        }
    }

    /// The next header block; `None` at the end of the archive.
    fn header(&mut self) -> io::Result<Option<[u8; BLOCK]>> {
        if self.end.is_some() {
            return Ok(None);
        }
        self.source.skip(self.left + self.padding)?;
        (self.left, self.padding) = (0, 0);
        let Some(block) = self.block()? else {
            self.end = Some(End::Unmarked);
            return Ok(None);
        };
        if block != [0; BLOCK] {
            return Ok(Some(block));
        }
        self.end = Some(match self.block()? {
            Some(second) if second == [0; BLOCK] => End::Marked,
            Some(_) => return Err(invalid("a block of zeros between two entries")),
            None => End::Unmarked,
        });
        Ok(None)
    }

    fn block(&mut self) -> io::Result<Option<[u8; BLOCK]>> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.source.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(cut_short()),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Some(block))
    }

    fn payload(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > self.max_header {
            return Err(invalid(format!(
                "an extended header of {size} bytes; up to {} are read",
                self.max_header
            )));
        }
        self.begin(size);
        let mut payload = Vec::new();
        self.by_ref().take(size).read_to_end(&mut payload)?;
        Ok(payload)
    }

    fn begin(&mut self, size: u64) {
        self.left = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
    }

    fn entry(&mut self, header: &Header<'_>, extended: Extended) -> io::Result<Entry> {
        let Extended {
            records,
            name,
            link,
        } = extended;
        let owned = |bytes: &[u8]| bytes.to_vec();
        let name = name
            .or_else(|| records.get("GNU.sparse.name").map(owned))
            .or_else(|| records.get("path").map(owned))
            .unwrap_or_else(|| header.name());
        let link = link
            .or_else(|| records.get("linkpath").map(owned))
            .unwrap_or_else(|| header.link());
        let kind = kind(header.kind(), &name)?;
        let stored = match (kind, records.number("size")?) {
            (Kind::Regular, Some(size)) => size,
            (Kind::Regular, None) => header.size()?,
            // Other types have no data, even with a size: that of a hard link is the size of its target.
            _ => 0,
        };
        if stored > i64::MAX as u64 {
            return Err(invalid("a size that is too big"));
        }
        self.begin(stored);
        let (size, sparse) = match kind {
            Kind::Regular => self.sparse(header, &records, stored)?,
            _ => (0, None),
        };
        let owner = |key: &str, field: io::Result<i64>| match records.number(key)? {
            Some(number) => Ok(number),
            None => u64::try_from(field?).map_err(|_| invalid("an owner below zero")),
        };
        let mtime = match records.time("mtime")? {
            Some(time) => time,
            None => (header.mtime()?, 0),
        };
        Ok(Entry {
            kind,
            name,
            link,
            mode: header.mode()?,
            uid: owner("uid", header.uid())?,
            gid: owner("gid", header.gid())?,
            mtime,
            device: match kind {
                Kind::CharacterDevice | Kind::BlockDevice => header.device()?,
                _ => (0, 0),
            },
            size,
            sparse,
            xattrs: records.into_xattrs(),
        })
    }

    /// Actual size of a file, and the map if it is sparse. Stored parts of the map are consumed.
    fn sparse(
        &mut self,
        header: &Header<'_>,
        records: &Records,
        stored: u64,
    ) -> io::Result<(u64, Option<Vec<Segment>>)> {
        let (size, map) = if header.kind() == b'S' {
            let old = header.sparse()?;
            (Some(old.size), self.old_map(old.map, old.more)?)
        } else {
            let version = (
                records.get("GNU.sparse.major"),
                records.get("GNU.sparse.minor"),
            );
            let size = match records.number("GNU.sparse.realsize")? {
                Some(size) => Some(size),
                None => records.number("GNU.sparse.size")?,
            };
            let map = match version {
                (Some(b"1"), Some(b"0")) => Some(self.stored_map()?),
                (None, None) | (Some(b"0"), _) => records.sparse_map()?,
                _ => return Err(invalid("a sparse file of a version that is not known")),
            };
            match map {
                Some(map) => (size, map),
                None => return Ok((stored, None)),
            }
        };
        let size = size.ok_or_else(|| invalid("a sparse file without its size"))?;
        let mut end = 0u64;
        let mut sum = 0u64;
        for segment in &map {
            let behind = segment.offset.checked_add(segment.length);
            let behind =
                behind.filter(|b| *b <= size && *b <= i64::MAX as u64 && segment.offset >= end);
            end = behind.ok_or_else(|| invalid("a broken map of a sparse file"))?;
            sum += segment.length;
        }
        if sum != self.left {
            return Err(invalid("a sparse file whose map is not of its data"));
        }
        Ok((size, Some(map)))
    }

    /// The rest of an old GNU map: blocks of 21 pairs before the data, not included in its size.
    fn old_map(&mut self, mut map: Vec<Segment>, mut more: bool) -> io::Result<Vec<Segment>> {
        while more {
            let block = self.block()?.ok_or_else(cut_short)?;
            map.extend(sparse_map(&block[..504])?);
            more = block[504] != 0;
            if map.len() as u64 * 24 > self.max_header {
                return Err(invalid("a map of a sparse file that is too big"));
            }
        }
        Ok(map)
    }

    /// A map of GNU's version 1.0: decimal numbers in lines at the start of the data, padded to whole blocks; the first one
    /// is the number of pairs.
    fn stored_map(&mut self) -> io::Result<Vec<Segment>> {
        let mut bytes = Vec::new();
        let mut numbers = Vec::new();
        let mut wanted = None;
        while wanted.is_none_or(|wanted| (numbers.len() as u64) < wanted) {
            if self.left < BLOCK as u64 {
                return Err(invalid("a broken map of a sparse file"));
            }
            let block = self.block()?.ok_or_else(cut_short)?;
            self.left -= BLOCK as u64;
            bytes.extend_from_slice(&block);
            let mut used = 0;
            for line in bytes.split_inclusive(|b| *b == b'\n') {
                let Some(line) = line.strip_suffix(b"\n") else {
                    break;
                };
                if wanted.is_some_and(|wanted| numbers.len() as u64 >= wanted) {
                    break;
                }
                used += line.len() + 1;
                let number = pax::decimal(line)?;
                match wanted {
                    // A pair has at least four bytes.
                    None if number > self.max_header / 4 => {
                        return Err(invalid("a map of a sparse file that is too big"));
                    }
                    None => wanted = Some(number * 2),
                    Some(_) => numbers.push(number),
                }
            }
            bytes.drain(..used);
            if bytes.len() > BLOCK + 32 {
                return Err(invalid("a broken map of a sparse file"));
            }
        }
        pax::segments(&numbers)
    }
}

impl<S: Source> Read for Reader<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX);
        let most = buffer.len().min(most);
        if most == 0 {
            return Ok(0);
        }
        match self.source.read(&mut buffer[..most])? {
            0 => Err(cut_short()),
            count => {
                self.left -= count as u64;
                Ok(count)
            }
        }
    }
}

fn kind(flag: u8, name: &[u8]) -> io::Result<Kind> {
    Ok(match flag {
        // Before POSIX, a directory was a file with a name that ends in a slash.
        0 if name.ends_with(b"/") => Kind::Directory,
        0 | b'0' | b'7' | b'S' => Kind::Regular,
        b'1' => Kind::HardLink,
        b'2' => Kind::Symlink,
        b'3' => Kind::CharacterDevice,
        b'4' => Kind::BlockDevice,
        b'5' => Kind::Directory,
        b'6' => Kind::Fifo,
        other => {
            let name = String::from_utf8_lossy(name);
            let text = format!(
                "{name}: entries of type {:?} are not supported",
                char::from(other)
            );
            return Err(invalid(text));
        }
    })
}

#[cfg(test)]
mod tests;
