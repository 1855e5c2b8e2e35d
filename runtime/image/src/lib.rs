//! Container images from files: an OCI image layout (a directory or an archive of one), or the output of `docker save`.
//!
//! Nothing in an image is trusted: blobs are compared with their digests, decompressed layers with the configuration's
//! `diff_ids`, sizes with [`Limits`]; layers are unpacked without leaving the target directory. `docs/images.md` lists the
//! supported formats, and the rules where specifications have none.
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

/// Selection among an archive's images, and resource limits.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Name of the image: in full, without Docker's defaults (`docker.io/library/`, `:latest`), or the tag alone. Default:
    /// the only image.
    pub tag: Option<String>,
    /// Resource limits.
    pub limits: Limits,
}

/// The files of an image on this host.
pub struct Image {
    chosen: Chosen,
    limits: Limits,
}

/// The reader of a layer: the blob, decompressed, with digests of both.
type LayerReader<'b> = Hashing<Metered<'b, Decoder<BufReader<Hashing<Metered<'b, Section>>>>>>;

impl Image {
    /// Opens an image. An archive is read in place, unless it is compressed as a whole or not a regular file: then it is
    /// copied to the directory `scratch`, which must exist until the image is unpacked.
    ///
    /// # Errors
    /// The missing, invalid or unsupported part; the names if there are several images and none is selected.
    pub fn open(path: &Path, scratch: &Path, options: &Options) -> Result<Self, Error> {
        let files = Files::open(path, scratch, &options.limits)?;
        Ok(Self {
            chosen: manifest::choose(&files, options)?,
            limits: options.limits,
        })
    }

    /// Defaults of the image for its containers.
    pub fn defaults(&self) -> Defaults {
        self.chosen.config.defaults()
    }

    /// Unpacks every layer, lowest first, into the empty directory `root`. Owners and device nodes require root; otherwise
    /// files belong to this user, their owners are kept in an extended attribute that virtio-fs applies, and files represent
    /// device nodes and FIFOs.
    ///
    /// # Errors
    /// A blob that does not match its digest; an entry that can't be unpacked.
    pub fn unpack(&self, root: &Path) -> Result<(), Error> {
        let mut unpacker = Unpacker::new(root, &self.limits)
            .map_err(Error::host(format!("open {}", root.display())))?;
        let mut budget = Budget::new("bytes in all", self.limits.total);
        // Padding and empty members produce no output.
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
        // Data with a correct digest is complete, even without an end marker.
        let is_digested = layer.digest.is_some() || diff_id.is_some();
        let unpacked = unpacker.layer(&mut reader, is_digested, self.limits.header);
        // A digest mismatch is a better error than its consequences in the contents.
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

/// Creates a directory and its parents inside an unpacked root; links in it cannot lead out of it. An existing directory is
/// left as it is.
///
/// # Errors
/// The error from the host; if something else is in the way.
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
