//! Digests of blobs and of their decompressed contents (image-spec, descriptor.md).

use crate::Error;
use sha2::{Digest as _, Sha256, Sha512};
use std::fmt::{self, Display, Formatter};
use std::io::{self, Read};

/// A digest with a supported algorithm, in text form.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Digest(String);

impl Digest {
    /// # Errors
    /// If it is invalid, or has another algorithm.
    pub(crate) fn parse(text: &str) -> Result<Self, Error> {
        let (name, hex) = text.split_once(':').unwrap_or(("", text));
        let len = match name {
            "sha256" => 64,
            "sha512" => 128,
            _ => {
                return Err(Error::Unsupported(format!(
                    "digest {text:?} is not supported; sha256 and sha512 are"
                )));
            }
        };
        if !is_hex(hex) || hex.len() != len {
            return Err(Error::invalid(format!("{text:?} is no digest")));
        }
        Ok(Self(text.to_owned()))
    }

    /// A SHA-256 digest from its digits.
    pub(crate) fn of_hex(hex: &str) -> Option<Self> {
        (is_hex(hex) && hex.len() == 64).then(|| Self(format!("sha256:{hex}")))
    }

    /// Path of the blob in a layout.
    pub(crate) fn path(&self) -> String {
        format!("blobs/{}", self.0.replacen(':', "/", 1))
    }

    pub(crate) fn digits(&self) -> &str {
        self.0.split_once(':').map_or(&self.0, |(_, hex)| hex)
    }

    pub(crate) fn hasher(&self) -> Hasher {
        match self.0.starts_with("sha512:") {
            true => Hasher::Sha512(Sha512::new()),
            false => Hasher::Sha256(Sha256::new()),
        }
    }
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

impl Display for Digest {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A digest being computed.
#[derive(Clone)]
pub(crate) enum Hasher {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Hasher {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }

    pub(crate) fn finish(self) -> Digest {
        let (name, bytes) = match self {
            Self::Sha256(hasher) => ("sha256", hasher.finalize().to_vec()),
            Self::Sha512(hasher) => ("sha512", hasher.finalize().to_vec()),
        };
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        Digest(format!("{name}:{hex}"))
    }
}

/// A reader that computes the digest of the data that it returns, if there is one to compare with.
pub(crate) struct Hashing<R> {
    pub(crate) source: R,
    hasher: Option<Hasher>,
}

impl<R: Read> Hashing<R> {
    pub(crate) fn new(source: R, expected: Option<&Digest>) -> Self {
        let hasher = expected.map(Digest::hasher);
        Self { source, hasher }
    }

    /// Reads the remaining data, which may be truncated or invalid, and returns the digest of everything.
    pub(crate) fn digest(&mut self) -> io::Result<Option<Digest>> {
        io::copy(self, &mut io::sink())?;
        Ok(self.hasher.take().map(Hasher::finish))
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buffer)?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buffer[..count]);
        }
        Ok(count)
    }
}
