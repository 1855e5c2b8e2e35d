//! Decompression of layers and whole archives. The format is detected from the first bytes: media types are often wrong, and
//! a layer's `diff_id` covers the decompressed data.

use crate::error::{cut_short, invalid};
use crate::zstd;
use flate2::bufread::GzDecoder;
use std::io::{self, BufRead, Read};

/// Trailing zeros after a gzip stream are padding.
const PADDING: u8 = 0;

/// A decompressor, or a reader of uncompressed data.
pub(crate) enum Decoder<R: BufRead> {
    Plain(R),
    Gzip(Box<Gzip<R>>),
    Zstd(Box<zstd::Decoder<R>>),
}

impl<R: BufRead> Decoder<R> {
    /// # Errors
    /// For compressions that are not supported, by name.
    pub(crate) fn new(mut source: R) -> io::Result<Self> {
        let start = source.fill_buf()?;
        Ok(match start {
            [0x1f, 0x8b, ..] => Self::Gzip(Box::new(Gzip::new(source))),
            // A frame, or one that is to be skipped: RFC 8878, 3.1.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
                Self::Zstd(Box::new(zstd::Decoder::new(source)))
            }
            [0xfd, b'7', b'z', b'X', b'Z', ..] => return Err(unsupported("xz")),
            [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, ..] => return Err(unsupported("bzip2")),
            [0x04, 0x22, 0x4d, 0x18, ..] => return Err(unsupported("lz4")),
            _ => Self::Plain(source),
        })
    }

    pub(crate) fn is_plain(&self) -> bool {
        matches!(self, Self::Plain(_))
    }

    /// The underlying reader.
    pub(crate) fn source(&mut self) -> &mut R {
        match self {
            Self::Plain(source) => source,
            Self::Gzip(gzip) => gzip.source(),
            Self::Zstd(zstd) => zstd.source(),
        }
    }
}

fn unsupported(name: &str) -> io::Error {
    invalid(format!(
        "it is compressed by {name}; gzip and zstd are supported"
    ))
}

impl<R: BufRead> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(source) => source.read(buffer),
            Self::Gzip(gzip) => gzip.read(buffer),
            Self::Zstd(zstd) => zstd.read(buffer),
        }
    }
}

/// The members of a gzip file (RFC 1952), one after the other, and padding.
pub(crate) enum Gzip<R: BufRead> {
    Member(GzDecoder<R>),
    End(R),
    /// During the transition between the two.
    Broken,
}

impl<R: BufRead> Gzip<R> {
    fn new(source: R) -> Self {
        Self::Member(GzDecoder::new(source))
    }

    fn source(&mut self) -> &mut R {
        match self {
            Self::Member(member) => member.get_mut(),
            Self::End(source) => source,
            Self::Broken => unreachable!("nothing fails between two members"),
        }
    }

    /// Goes to the next member.
    fn advance(&mut self) {
        *self = match std::mem::replace(self, Self::Broken) {
            Self::Member(member) => Self::End(member.into_inner()),
            other => other,
        };
    }

    /// At the end of a member: whether another one follows.
    fn enter(&mut self) -> io::Result<bool> {
        self.advance();
        let mut padded = false;
        loop {
            let rest = self.source().fill_buf()?;
            match rest.first() {
                None => return Ok(false),
                Some(&PADDING) => {
                    let zeros = rest.iter().take_while(|b| **b == PADDING).count();
                    self.source().consume(zeros);
                    padded = true;
                }
                Some(0x1f) if !padded => break,
                Some(_) => return Err(invalid("gzip: other bytes follow the stream")),
            }
        }
        *self = match std::mem::replace(self, Self::Broken) {
            Self::End(source) => Self::Member(GzDecoder::new(source)),
            other => other,
        };
        Ok(true)
    }
}

impl<R: BufRead> Read for Gzip<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        while let Self::Member(member) = self {
            let count = member.read(buffer).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => cut_short(),
                io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData => {
                    invalid(format!("gzip: {error}"))
                }
                _ => error,
            })?;
            if count > 0 {
                return Ok(count);
            }
            self.enter()?;
        }
        Ok(0)
    }
}
