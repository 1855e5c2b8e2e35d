//! Container images from files: an OCI image layout (a directory or an archive of one), or what
//! `docker save` writes.
//!
//! Everything in an image is somebody else's word: blobs are held against their digests, what layers
//! hold against the configuration's `diff_ids`, sizes against [`Limits`]; layers are unpacked without
//! leaving the directory that they are unpacked to. `docs/images.md` says what is supported and what
//! decides where specifications don't.
//!
//! ```no_run
//! # fn main() -> Result<(), koya_image::Error> {
//! # use std::path::Path;
//! let options = koya_image::Options::default();
//! let image = koya_image::Image::open(Path::new("image.tar"), Path::new("scratch"), &options)?;
//! image.unpack(Path::new("root"))?;
//! println!("{:?}", image.defaults().entrypoint);
//! # Ok(())
//! # }
//! ```

mod archive;
mod choice;
mod compression;
mod config;
mod digest;
mod error;
mod files;
mod json;
mod layer;
mod limits;
mod manifest;
mod zstd;

pub use config::Defaults;
pub use error::Error;
pub use limits::Limits;

use compression::Decoder;
use digest::{Digest, Hashing};
use files::{Files, Section};
use layer::Unpacker;
use limits::{Budget, Metered};
use manifest::{Chosen, Layer};
use std::io::{self, BufReader};
use std::path::Path;

/// Which of an archive's images is meant, and what it may take.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The image's name: the whole one, one without what Docker adds (`docker.io/library/`, `:latest`),
    /// or the tag alone. Default: the only image.
    pub tag: Option<String>,
    /// Bounds.
    pub limits: Limits,
}

/// An image's files on this host.
pub struct Image {
    chosen: Chosen,
    limits: Limits,
}

/// What layers are read through: the blob, decompressed, with both digested.
type LayerReader<'b> = Hashing<Metered<'b, Decoder<BufReader<Hashing<Metered<'b, Section>>>>>>;

impl Image {
    /// Opens an image. An archive is read where it is, unless it is compressed as a whole or no regular
    /// file: then a copy is made in the directory `scratch`, which has to stay until it is unpacked.
    ///
    /// # Errors
    /// What is missing, broken or not supported; several images where one is not chosen.
    pub fn open(path: &Path, scratch: &Path, options: &Options) -> Result<Self, Error> {
        let files = Files::open(path, scratch, &options.limits)?;
        Ok(Self {
            chosen: manifest::choose(&files, options)?,
            limits: options.limits,
        })
    }

    /// What the image wants of its container.
    pub fn defaults(&self) -> Defaults {
        self.chosen.config.defaults()
    }

    /// Unpacks every layer, lowest first, into the empty directory `root`. Owners and device nodes
    /// need root; without, files are this user's, and who they belong to is kept in an extended attribute, by which
    /// virtio-fs shows it. Files stand for device nodes and FIFOs.
    ///
    /// # Errors
    /// A blob that is not what its digest says; an entry that can't be unpacked.
    pub fn unpack(&self, root: &Path) -> Result<(), Error> {
        let mut unpacker = Unpacker::new(root, &self.limits)
            .map_err(Error::host(format!("open {}", root.display())))?;
        let mut budget = Budget::new("bytes in all", self.limits.total);
        // Padding and empty members are decompressed to nothing.
        let mut read = Budget::new("compressed bytes in all", self.limits.total);
        for (number, layer) in self.chosen.layers.iter().enumerate() {
            let diff_id = self.chosen.config.diff_id(number)?;
            self.apply(
                &mut unpacker,
                layer,
                diff_id.as_ref(),
                &mut read,
                &mut budget,
            )
            .map_err(Error::unpacking(format!("layer {}", number + 1)))?;
        }
        unpacker.finish().map_err(Error::host(format!(
            "set times and modes in {}",
            root.display()
        )))
    }

    fn apply(
        &self,
        unpacker: &mut Unpacker,
        layer: &Layer,
        diff_id: Option<&Digest>,
        read: &mut Budget,
        budget: &mut Budget,
    ) -> io::Result<()> {
        let blob = Metered {
            source: layer.blob.reader(),
            budget: read,
        };
        let blob = Hashing::new(blob, layer.digest.as_ref());
        let source = Decoder::new(BufReader::with_capacity(1 << 16, blob))?;
        let metered = Metered { source, budget };
        let mut reader: LayerReader<'_> = Hashing::new(metered, diff_id);
        // Whatever is digested is whole when its digest is right, however it ends.
        let is_digested = layer.digest.is_some() || diff_id.is_some();
        let unpacked = unpacker.layer(&mut reader, is_digested, self.limits.header);
        // That a blob is not what it should be says more than what is wrong with what it holds.
        let inner = match &unpacked {
            Ok(()) => reader.digest(),
            Err(_) => Ok(None),
        };
        let blob = reader.source.source.source().get_mut();
        if let Some(expected) = &layer.digest {
            hold(blob.digest()?, expected)?;
        }
        unpacked?;
        match diff_id {
            Some(expected) => hold(inner?, expected),
            None => inner.map(drop),
        }
    }
}

fn hold(found: Option<Digest>, expected: &Digest) -> io::Result<()> {
    match found {
        Some(found) if found != *expected => {
            Err(error::invalid(format!("it is {found}, not {expected}")))
        }
        _ => Ok(()),
    }
}

impl archive::Source for &mut LayerReader<'_> {}

/// Makes a directory, and those on the way to it, inside an unpacked root: links in it lead nowhere
/// else. One that is there stays as it is.
///
/// # Errors
/// The host's; if something else is in the way.
pub fn make_directory(root: &Path, path: &Path) -> Result<(), Error> {
    let make = || {
        let mut unpacker = Unpacker::new(root, &Limits::default())?;
        unpacker.make_directory(path)?;
        unpacker.finish()
    };
    make().map_err(Error::host(format!(
        "make the directory {}",
        path.display()
    )))
}

#[cfg(test)]
mod tests;
