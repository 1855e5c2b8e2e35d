//! Tests with common images and with hostile ones.

mod cases;
mod differential;
mod kinds;
mod layers;
mod snapshot;
pub(crate) mod writer;

use crate::digest::Digest;
use crate::{Error, Image, Options};
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";

fn digest(bytes: &[u8]) -> String {
    let mut hasher = Digest::of_hex(&"0".repeat(64)).unwrap().hasher();
    hasher.update(bytes);
    hasher.finish().to_string()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};
    compress_to_vec(bytes, CompressionLevel::Fastest)
}

/// A layout under construction.
struct Layout {
    dir: tempfile::TempDir,
}

impl Layout {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        fs::write(
            dir.path().join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )
        .unwrap();
        Self { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn blob_path(&self, digest: &str) -> PathBuf {
        self.path().join("blobs").join(digest.replacen(':', "/", 1))
    }

    /// A blob's descriptor.
    fn blob(&self, kind: &str, bytes: &[u8]) -> Value {
        let digest = digest(bytes);
        fs::write(self.blob_path(&digest), bytes).unwrap();
        json!({"mediaType": kind, "digest": digest, "size": bytes.len()})
    }

    /// The descriptor of a manifest with these layers, each as stored and decompressed.
    fn manifest(&self, kinds: [&str; 3], layers: &[(Vec<u8>, &[u8])], more: Value) -> Value {
        let diff_ids: Vec<_> = layers.iter().map(|(_, tar)| digest(tar)).collect();
        let mut config = json!({"architecture": "amd64", "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        for (key, value) in more.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        let config = self.blob(kinds[1], config.to_string().as_bytes());
        let layers: Vec<_> = layers
            .iter()
            .map(|(stored, _)| self.blob(kinds[2], stored))
            .collect();
        let manifest =
            json!({"schemaVersion": 2, "mediaType": kinds[0], "config": config, "layers": layers});
        self.blob(kinds[0], manifest.to_string().as_bytes())
    }

    /// A manifest with OCI media types and uncompressed layers.
    fn plain(&self, layers: &[Vec<u8>]) -> Value {
        let layers: Vec<_> = layers
            .iter()
            .map(|tar| (tar.clone(), tar.as_slice()))
            .collect();
        self.manifest([OCI_MANIFEST, OCI_CONFIG, OCI_LAYER], &layers, json!({}))
    }

    fn index(&self, manifests: &[Value]) {
        let index = json!({"schemaVersion": 2, "manifests": manifests});
        fs::write(self.path().join("index.json"), index.to_string()).unwrap();
    }

    /// The layout in an archive.
    fn archive(&self) -> Vec<u8> {
        let mut items = Vec::new();
        for name in ["oci-layout", "index.json"] {
            items.push(writer::file(
                name,
                fs::read(self.path().join(name)).unwrap(),
            ));
        }
        for entry in fs::read_dir(self.path().join("blobs/sha256")).unwrap() {
            let path = entry.unwrap().path();
            let name = format!("blobs/sha256/{}", path.file_name().unwrap().display());
            items.push(writer::file(&name, fs::read(path).unwrap()));
        }
        writer::Tar::of(&items)
    }
}

/// The platform of an image that this machine cannot run.
fn elsewhere() -> Value {
    json!({"architecture": "s390x", "os": "linux"})
}

/// Opens an image and unpacks it into a new directory.
fn unpack_with(path: &Path, options: &Options) -> Result<(tempfile::TempDir, Image), Error> {
    let scratch = tempfile::tempdir().unwrap();
    let root = tempfile::tempdir().unwrap();
    let image = Image::open(path, scratch.path(), options)?;
    image.unpack(root.path())?;
    Ok((root, image))
}

fn unpack(path: &Path) -> Result<(tempfile::TempDir, Image), Error> {
    unpack_with(path, &Options::default())
}

/// Unpacks an archive of these bytes.
fn unpack_bytes(bytes: &[u8]) -> Result<(tempfile::TempDir, Image), Error> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    unpack(file.path())
}

fn refusal<T>(result: Result<T, Error>) -> String {
    match result {
        Ok(_) => panic!("it was not refused"),
        Err(Error::Host { operation, source }) => format!("cannot {operation}: {source}"),
        Err(error) => error.to_string(),
    }
}
