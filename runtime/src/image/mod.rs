//! Container images from files: an OCI image layout (a directory or a tar of one), or what
//! `docker save` writes.
//!
//! Everything in an image is somebody else's word: blobs are held against their digests, names
//! are checked, and layers are unpacked by [`layer`], which never leaves the root it unpacks to.

mod layer;
mod zstd;

use crate::Error;
use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::{Component, Path, PathBuf};

/// The largest manifest or configuration, in bytes.
const MAX_DOCUMENT: u64 = 4 << 20;
/// How deep indices may point to indices.
const MAX_DEPTH: u32 = 4;

/// An image's files on this host.
pub struct Image {
    config: ImageConfiguration,
    layers: Vec<Blob>,
}

/// What an image wants of a container that runs it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Defaults {
    /// The program and its first arguments.
    pub entrypoint: Vec<String>,
    /// Arguments, if the user gives none.
    pub command: Vec<String>,
    /// `NAME=VALUE`
    pub env: Vec<String>,
    /// The user.
    pub user: String,
    /// The working directory.
    pub workdir: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// By the layer's media type: the OCI's image-spec, layer.md, and Docker's older names.
    fn of_type(kind: &MediaType) -> Result<Self, Error> {
        match kind {
            MediaType::ImageLayer => Ok(Self::None),
            MediaType::ImageLayerGzip => Ok(Self::Gzip),
            MediaType::ImageLayerZstd => Ok(Self::Zstd),
            other => match other.to_string().as_str() {
                "application/vnd.docker.image.rootfs.diff.tar" => Ok(Self::None),
                "application/vnd.docker.image.rootfs.diff.tar.gzip" => Ok(Self::Gzip),
                "application/vnd.docker.image.rootfs.diff.tar.zstd" => Ok(Self::Zstd),
                name => Err(broken(format!("layers of type {name} are not supported"))),
            },
        }
    }

    /// By a layer's first bytes: RFC 1952 and RFC 8878.
    fn of_bytes(start: [u8; 4]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd] => Self::Zstd,
            _ => Self::None,
        }
    }

    fn reader(self, file: File) -> Box<dyn Read> {
        let file = BufReader::new(file);
        match self {
            Self::None => Box::new(file),
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
            Self::Zstd => Box::new(zstd::Decoder::new(file)),
        }
    }
}

struct Blob {
    path: PathBuf,
    compression: Compression,
    /// `sha256:` digest to hold it against, where the image names one.
    digest: Option<String>,
}

/// One entry of `docker save`'s manifest.json.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SavedImage {
    config: String,
    layers: Vec<String>,
}

fn broken(reason: impl Into<String>) -> Error {
    Error::invalid("image", reason)
}

impl Image {
    /// Opens an image: a layout directory as it is, a tar unpacked into `scratch` first.
    ///
    /// # Errors
    /// What is missing, broken or not supported.
    pub fn open(path: &Path, scratch: &Path) -> Result<Self, Error> {
        if path.is_dir() {
            return Self::open_dir(path);
        }
        let file = File::open(path).map_err(Error::host(format!("open {}", path.display())))?;
        unpack_archive(file, scratch)?;
        Self::open_dir(scratch)
    }

    fn open_dir(dir: &Path) -> Result<Self, Error> {
        if dir.join("index.json").exists() {
            return Self::open_layout(dir);
        }
        if dir.join("manifest.json").exists() {
            return Self::open_saved(dir);
        }
        Err(broken(
            "holds neither index.json (an OCI layout) nor manifest.json (docker save)",
        ))
    }

    fn open_layout(dir: &Path) -> Result<Self, Error> {
        let mut index: ImageIndex = document(&dir.join("index.json"), None)?;
        for _ in 0..MAX_DEPTH {
            let descriptor = choose(&index)?.clone();
            let (path, digest) = blob(dir, &descriptor)?;
            if *descriptor.media_type() == MediaType::ImageIndex {
                index = document(&path, Some(&digest))?;
                continue;
            }
            let manifest: ImageManifest = document(&path, Some(&digest))?;
            let (path, digest) = blob(dir, manifest.config())?;
            let layers = manifest
                .layers()
                .iter()
                .map(|layer| {
                    let (path, digest) = blob(dir, layer)?;
                    Ok(Blob {
                        path,
                        compression: Compression::of_type(layer.media_type())?,
                        digest: Some(digest),
                    })
                })
                .collect::<Result<_, Error>>()?;
            return Ok(Self {
                config: document(&path, Some(&digest))?,
                layers,
            });
        }
        Err(broken("its indices point to indices without end"))
    }

    fn open_saved(dir: &Path) -> Result<Self, Error> {
        let saved: Vec<SavedImage> = document(&dir.join("manifest.json"), None)?;
        let [image] = saved.as_slice() else {
            return Err(broken(format!("holds {} images; save one", saved.len())));
        };
        let layers = image
            .layers
            .iter()
            .map(|name| {
                let path = dir.join(inside(Path::new(name))?);
                let mut start = [0; 4];
                File::open(&path)
                    .and_then(|mut f| f.read_exact(&mut start))
                    .map_err(Error::host(format!("read {}", path.display())))?;
                Ok(Blob {
                    path,
                    compression: Compression::of_bytes(start),
                    digest: None,
                })
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self {
            config: document(&dir.join(inside(Path::new(&image.config))?), None)?,
            layers,
        })
    }

    /// What the image wants of its container.
    pub fn defaults(&self) -> Defaults {
        let Some(config) = self.config.config() else {
            return Defaults::default();
        };
        let list = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
        Defaults {
            entrypoint: list(config.entrypoint()),
            command: list(config.cmd()),
            env: list(config.env()),
            user: config.user().clone().unwrap_or_default(),
            workdir: config
                .working_dir()
                .as_ref()
                .filter(|d| !d.is_empty())
                .map(PathBuf::from),
        }
    }

    /// Unpacks every layer, lowest first, into the empty directory `root`.
    ///
    /// # Errors
    /// A blob that is not what its digest says; an entry that would lead out of the root.
    pub fn unpack(&self, root: &Path) -> Result<(), Error> {
        for (number, blob) in self.layers.iter().enumerate() {
            let file = File::open(&blob.path)
                .map_err(Error::host(format!("open {}", blob.path.display())))?;
            if let Some(digest) = &blob.digest {
                check_digest(&file, digest)?;
            }
            let file = File::open(&blob.path)
                .map_err(Error::host(format!("open {}", blob.path.display())))?;
            layer::unpack(blob.compression.reader(file), root)
                .map_err(|e| broken(format!("layer {}: {e}", number + 1)))?;
        }
        Ok(())
    }
}

/// The manifest for this machine, or the only one.
fn choose(index: &ImageIndex) -> Result<&Descriptor, Error> {
    let manifests = index.manifests();
    let machine = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let fits = |d: &&Descriptor| {
        d.platform().as_ref().is_some_and(|p| {
            p.architecture().to_string() == machine && p.os().to_string() == "linux"
        })
    };
    match manifests.as_slice() {
        [only] => Ok(only),
        [] => Err(broken("its index is empty")),
        many => many
            .iter()
            .find(fits)
            .ok_or_else(|| broken(format!("holds nothing for linux/{machine}"))),
    }
}

fn blob(dir: &Path, descriptor: &Descriptor) -> Result<(PathBuf, String), Error> {
    let digest = descriptor.digest().to_string();
    let hex = digest
        .strip_prefix("sha256:")
        .filter(|hex| hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
        .ok_or_else(|| broken(format!("digest {digest} is not supported, sha256 is")))?;
    Ok((dir.join("blobs/sha256").join(hex), digest))
}

fn document<T: serde::de::DeserializeOwned>(path: &Path, digest: Option<&str>) -> Result<T, Error> {
    let mut text = Vec::new();
    File::open(path)
        .and_then(|f| f.take(MAX_DOCUMENT).read_to_end(&mut text))
        .map_err(Error::host(format!("read {}", path.display())))?;
    if let Some(digest) = digest {
        check_digest(text.as_slice(), digest)?;
    }
    serde_json::from_slice(&text).map_err(|e| broken(format!("{}: {e}", path.display())))
}

fn check_digest(reader: impl Read, digest: &str) -> Result<(), Error> {
    struct Hasher(Sha256);
    impl Write for Hasher {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.update(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut hasher = Hasher(Sha256::new());
    io::copy(&mut BufReader::new(reader), &mut hasher).map_err(Error::host("read a blob"))?;
    let hex: String = hasher
        .0
        .finalize()
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    if digest.strip_prefix("sha256:") != Some(&hex) {
        return Err(broken(format!("a blob is sha256:{hex}, not {digest}")));
    }
    Ok(())
}

/// A relative path without anything that leads up.
fn inside(path: &Path) -> Result<PathBuf, Error> {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::CurDir => {}
            _ => return Err(broken(format!("the name {} leads out", path.display()))),
        }
    }
    Ok(out)
}

/// The regular files of an image's archive. Links in one (older `docker save`) are refused by
/// name.
fn unpack_archive(file: File, scratch: &Path) -> Result<(), Error> {
    let mut archive = tar::Archive::new(BufReader::new(file));
    let entries = archive.entries().map_err(Error::host("read the image"))?;
    for entry in entries {
        let mut entry = entry.map_err(Error::host("read the image"))?;
        let name = entry.path().map_err(Error::host("read the image"))?;
        let path = scratch.join(inside(&name)?);
        match entry.header().entry_type() {
            tar::EntryType::Directory => {
                fs::create_dir_all(&path).map_err(Error::host("unpack the image"))?;
            }
            tar::EntryType::Regular => {
                if let Some(parent) = path.parent() {
                    fs::create_dir_all(parent).map_err(Error::host("unpack the image"))?;
                }
                File::create_new(&path)
                    .and_then(|mut out| io::copy(&mut entry, &mut out))
                    .map_err(Error::host("unpack the image"))?;
            }
            tar::EntryType::XGlobalHeader => {}
            other => {
                let text = format!("{}: entries of type {other:?} are refused", path.display());
                return Err(broken(text));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
