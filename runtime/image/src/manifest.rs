//! The documents of an image, and the selection of an image in a file: OCI layouts with media types of OCI or Docker, and
//! the manifest.json of `docker save`.
//!
//! Documents are read leniently, as other engines do ([`json`]): unused fields may be missing.

use crate::choice::{Named, Platform, machine, wanted};
use crate::config::Configuration;
use crate::digest::Digest;
use crate::files::{Blob, Files};
use crate::limits::{Budget, Limits, MAX_DOCUMENTS};
use crate::{Error, Options, json};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;

/// Maximum nesting depth of indices.
const MAX_DEPTH: u32 = 4;
/// Maximum number of manifests that are examined.
const MAX_MANIFESTS: usize = 1024;

/// An image's name in a layout: the annotation of image-spec, and that of containerd with the full name.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
const IMAGE_NAME: &str = "io.containerd.image.name";
/// BuildKit's annotation for attestations, which are not images.
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";

const INDICES: [&str; 2] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
const MANIFESTS: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
const LAYERS: [&str; 5] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
    // Written by old versions of Docker.
    "application/vnd.docker.container.image.rootfs.diff+x-gtar",
];

/// Media types of image configurations; and that of an empty one, for artifacts.
const CONFIGURATIONS: [&str; 2] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];
const EMPTY: &str = "application/vnd.oci.empty.v1+json";

#[derive(Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<Platform>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct Layout {
    #[serde(rename = "imageLayoutVersion")]
    version: String,
}

/// An index or a manifest; without a media type, the fields distinguish them.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    schema_version: Option<u32>,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    artifact_type: Option<String>,
    #[serde(default)]
    manifests: Vec<Descriptor>,
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
}

impl Document {
    /// The type of an artifact that is not an image: signatures and bills of materials are stored beside images, some with
    /// manifests like those of images.
    fn artifact(&self) -> Option<&str> {
        let kind = self.config.as_ref().map_or("", |config| &config.media_type);
        let named = self
            .artifact_type
            .as_deref()
            .filter(|kind| !kind.is_empty());
        if kind == EMPTY || named.is_some() && !CONFIGURATIONS.contains(&kind) {
            return Some(named.unwrap_or(kind));
        }
        let is_layer =
            |layer: &Descriptor| LAYERS.iter().any(|of| layer.media_type.starts_with(of));
        match self.layers.iter().any(is_layer) {
            true => None,
            false => self.layers.first().map(|layer| layer.media_type.as_str()),
        }
    }
}

/// One entry of `docker save`'s manifest.json.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Vec<String>,
    #[serde(default)]
    layers: Vec<String>,
}

/// A layer as stored.
pub(crate) struct Layer {
    pub(crate) blob: Blob,
    /// Digest of the blob, if the image has one.
    pub(crate) digest: Option<Digest>,
}

/// The selected image.
pub(crate) struct Chosen {
    pub(crate) config: Configuration,
    pub(crate) layers: Vec<Layer>,
}

/// A candidate for the selection.
struct Candidate {
    names: Vec<String>,
    digest: Digest,
    manifest: Document,
    config: Configuration,
    platform: Platform,
}

/// Detects the kind of image and selects one.
pub(crate) fn choose(files: &Files, options: &Options) -> Result<Chosen, Error> {
    let limits = &options.limits;
    if let Some(blob) = files.find("oci-layout")? {
        let layout: Layout = parse("oci-layout", &blob.document("oci-layout", limits)?)?;
        if layout.version != "1.0.0" {
            let text = format!(
                "OCI layouts of version {:?} are not supported",
                layout.version
            );
            return Err(Error::Unsupported(text));
        }
    }
    let chosen = if let Some(blob) = files.find("index.json")? {
        let index = parse("index.json", &blob.document("index.json", limits)?)?;
        from_layout(files, index, options)?
    } else if let Some(blob) = files.find("manifest.json")? {
        let text = blob.document("manifest.json", limits)?;
        match text.trim_ascii_start().first() {
            Some(b'{') => from_blobs(files, &parse("manifest.json", &text)?, options)?,
            _ => from_saved(files, parse("manifest.json", &text)?, options)?,
        }
    } else if files.find("repositories")?.is_some() {
        return Err(Error::Unsupported(
            "it was saved by Docker before 1.10, without manifest.json; load it into a newer one and save it again"
                .into(),
        ));
    } else {
        return Err(Error::invalid(
            "holds neither index.json (an OCI layout) nor manifest.json (docker save)",
        ));
    };
    if chosen.layers.len() > limits.layers {
        let (count, limit) = (chosen.layers.len(), limits.layers);
        return Err(Error::invalid(format!(
            "it has {count} layers; up to {limit} are read"
        )));
    }
    chosen.config.check(chosen.layers.len())?;
    Ok(chosen)
}

fn parse<T: DeserializeOwned>(name: &str, text: &[u8]) -> Result<T, Error> {
    json::from_slice(text).map_err(|e| Error::invalid(format!("{name}: {e}")))
}

/// Checks a document against its digest.
fn check(name: &str, text: &[u8], digest: &Digest) -> Result<(), Error> {
    let mut hasher = digest.hasher();
    hasher.update(text);
    let found = hasher.finish();
    if found != *digest {
        return Err(Error::invalid(format!("{name} is {found}, not {digest}")));
    }
    Ok(())
}

fn blob(files: &Files, descriptor: &Descriptor) -> Result<(Blob, Digest), Error> {
    let digest = Digest::parse(&descriptor.digest)?;
    let blob = files.get_by_digest(&digest.path())?;
    check_size(&digest.path(), &blob, descriptor)?;
    Ok((blob, digest))
}

fn check_size(name: &str, blob: &Blob, descriptor: &Descriptor) -> Result<(), Error> {
    if blob.size != descriptor.size {
        let (found, wanted) = (blob.size, descriptor.size);
        let text = format!("{name} has {found} bytes, not {wanted}");
        return Err(Error::invalid(text));
    }
    Ok(())
}

fn from_layout(files: &Files, index: Document, options: &Options) -> Result<Chosen, Error> {
    let mut found = Search {
        files,
        limits: &options.limits,
        documents: Budget::new("bytes of manifests and configurations", MAX_DOCUMENTS),
        candidates: Vec::new(),
        others: Vec::new(),
        seen: 0,
    };
    found.index(&index, &[], 0)?;
    let Search {
        mut candidates,
        others,
        ..
    } = found;
    // An image for a compatible architecture is never preferred to a native one of the same name.
    let is_native = |candidate: &Candidate| candidate.platform.is_native();
    let native = candidates.iter().filter(|candidate| is_native(candidate));
    let native: Vec<_> = native.map(|candidate| candidate.names.clone()).collect();
    candidates.retain(|candidate| is_native(candidate) || !native.contains(&candidate.names));
    if candidates.is_empty() {
        let reason = format!("holds nothing for linux/{}", machine());
        return match others.is_empty() {
            true => Err(Error::invalid(reason)),
            false => Err(Error::Choice {
                reason,
                names: others,
            }),
        };
    }
    let named = candidates.iter().map(|c| Named {
        names: c.names.clone(),
        id: c.digest.to_string(),
        variant: c.platform.variant.clone(),
    });
    let wanted = wanted(named.collect(), options.tag.as_deref())?;
    // Of several variants for this architecture the baseline, which runs on every machine.
    let chosen = candidates
        .into_iter()
        .enumerate()
        .filter(|(at, _)| wanted.contains(at));
    let chosen = chosen
        .map(|(_, candidate)| candidate)
        .min_by(|a, b| a.platform.rank().cmp(&b.platform.rank()));
    let Some(Candidate {
        manifest, config, ..
    }) = chosen
    else {
        return Err(Error::invalid("its index is empty"));
    };
    Ok(Chosen {
        layers: layers(&manifest, |layer| blob(files, layer))?,
        config,
    })
}

/// The layers of a manifest, whose blobs are found by their descriptors.
fn layers(
    manifest: &Document,
    find: impl Fn(&Descriptor) -> Result<(Blob, Digest), Error>,
) -> Result<Vec<Layer>, Error> {
    let layer = |layer: &Descriptor| {
        check_layer_type(&layer.media_type)?;
        let (blob, digest) = find(layer)?;
        Ok(Layer {
            blob,
            digest: Some(digest),
        })
    };
    manifest.layers.iter().map(layer).collect()
}

fn check_layer_type(kind: &str) -> Result<(), Error> {
    let plain = ["+gzip", "+zstd", ".gzip", ".zstd"]
        .iter()
        .find_map(|end| kind.strip_suffix(end))
        .unwrap_or(kind);
    if LAYERS.contains(&plain) {
        return Ok(());
    }
    let text = format!("layers of type {kind:?} are not supported");
    Err(Error::Unsupported(text))
}

/// Collects the manifests of an index and of nested indices.
struct Search<'f> {
    files: &'f Files,
    limits: &'f Limits,
    /// Limit for bytes of documents.
    documents: Budget,
    /// Manifests for this machine.
    candidates: Vec<Candidate>,
    /// Platforms of the others.
    others: Vec<String>,
    seen: usize,
}

impl Search<'_> {
    /// Reads a manifest or a configuration.
    fn document<T: DeserializeOwned>(&mut self, descriptor: &Descriptor) -> Result<T, Error> {
        let (blob, digest) = blob(self.files, descriptor)?;
        let name = digest.path();
        let text = blob.document(&name, self.limits)?;
        self.documents
            .take(text.len() as u64)
            .map_err(|error| Error::invalid(error.to_string()))?;
        check(&name, &text, &digest)?;
        parse(&name, &text)
    }

    fn index(&mut self, index: &Document, names: &[String], depth: u32) -> Result<(), Error> {
        if depth >= MAX_DEPTH {
            return Err(Error::invalid("its indices point to indices without end"));
        }
        if index.schema_version.is_some_and(|version| version != 2) {
            return Err(Error::Unsupported("an index of an older schema".into()));
        }
        for descriptor in &index.manifests {
            self.seen += 1;
            if self.seen > MAX_MANIFESTS {
                let text = format!("more than {MAX_MANIFESTS} manifests");
                return Err(Error::invalid(text));
            }
            self.descriptor(descriptor, names, depth)?;
        }
        Ok(())
    }

    fn descriptor(
        &mut self,
        descriptor: &Descriptor,
        names: &[String],
        depth: u32,
    ) -> Result<(), Error> {
        let annotation = |key: &str| descriptor.annotations.as_ref()?.get(key).cloned();
        let own = [annotation(IMAGE_NAME), annotation(REF_NAME)];
        let mut own: Vec<String> = own.into_iter().flatten().collect();
        if own.is_empty() {
            own = names.to_vec();
        }
        let kind = descriptor.media_type.as_str();
        if annotation(REFERENCE_TYPE).is_some() {
            return Ok(());
        }
        if !kind.is_empty() && !INDICES.contains(&kind) && !MANIFESTS.contains(&kind) {
            // Signatures and other artifacts; also manifests of an older schema.
            self.others.push(format!("{kind} ({})", descriptor.digest));
            return Ok(());
        }
        let is_index = INDICES.contains(&kind);
        if let Some(platform) = &descriptor.platform
            && !platform.fits()
            && !(is_index && platform.is_empty())
        {
            // Its blobs may be missing: registries are often copied for only one platform.
            if !platform.is_unknown() {
                self.others.push(platform.name());
            }
            return Ok(());
        }
        let document: Document = self.document(descriptor)?;
        let is_index = is_index || document.config.is_none() && !document.manifests.is_empty();
        if is_index {
            return self.index(&document, &own, depth + 1);
        }
        self.manifest(descriptor, document, own)
    }

    fn manifest(
        &mut self,
        descriptor: &Descriptor,
        manifest: Document,
        names: Vec<String>,
    ) -> Result<(), Error> {
        if manifest.schema_version == Some(1) {
            return Err(Error::Unsupported("a manifest of Docker's schema 1".into()));
        }
        let kind = manifest.media_type.as_deref().unwrap_or_default();
        if !kind.is_empty() && !MANIFESTS.contains(&kind) {
            return Err(Error::Unsupported(format!("manifests of type {kind:?}")));
        }
        if let Some(kind) = manifest.artifact() {
            self.others.push(format!("{kind} ({})", descriptor.digest));
            return Ok(());
        }
        let missing = || Error::invalid("a manifest names no configuration");
        let config = manifest.config.as_ref().ok_or_else(missing)?;
        let config: Configuration = self.document(config)?;
        let platform = match &descriptor.platform {
            Some(platform) if !platform.is_empty() => platform.clone(),
            _ => Platform::of(&config),
        };
        if !platform.fits() {
            if !platform.is_unknown() {
                self.others.push(platform.name());
            }
            return Ok(());
        }
        self.candidates.push(Candidate {
            names,
            digest: Digest::parse(&descriptor.digest)?,
            manifest,
            config,
            platform,
        });
        Ok(())
    }
}

/// A manifest beside its blobs, which are named by the digits of their digests (skopeo's `dir:`).
fn from_blobs(files: &Files, manifest: &Document, options: &Options) -> Result<Chosen, Error> {
    if manifest.schema_version != Some(2) || options.tag.is_some() {
        let reason = "manifest.json is a manifest of another schema, or has no tags".to_owned();
        return Err(Error::Unsupported(reason));
    }
    let find = |descriptor: &Descriptor| -> Result<(Blob, Digest), Error> {
        let digest = Digest::parse(&descriptor.digest)?;
        let name = digest.digits();
        let blob = files.get_by_digest(name)?;
        check_size(name, &blob, descriptor)?;
        Ok((blob, digest))
    };
    let missing = || Error::invalid("manifest.json names no configuration");
    let (blob, digest) = find(manifest.config.as_ref().ok_or_else(missing)?)?;
    let name = digest.digits();
    let text = blob.document(name, &options.limits)?;
    check(name, &text, &digest)?;
    let config: Configuration = parse(name, &text)?;
    check_platform(&config)?;
    Ok(Chosen {
        layers: layers(manifest, find)?,
        config,
    })
}

/// # Errors
/// If an image is for another machine.
fn check_platform(config: &Configuration) -> Result<(), Error> {
    let platform = Platform::of(config);
    match platform.fits() {
        true => Ok(()),
        false => Err(Error::Choice {
            reason: format!("holds nothing for linux/{}", machine()),
            names: vec![platform.name()],
        }),
    }
}

fn from_saved(files: &Files, saved: Vec<Saved>, options: &Options) -> Result<Chosen, Error> {
    let named = saved.iter().map(|image| {
        let parts = [std::slice::from_ref(&image.config), &image.layers].concat();
        Named {
            names: image.repo_tags.clone(),
            id: parts.join(" "),
            variant: None,
        }
    });
    let wanted = wanted(named.collect(), options.tag.as_deref())?;
    let image = wanted.first().and_then(|at| saved.get(*at));
    let image = image.ok_or_else(|| Error::invalid("manifest.json names no image"))?;
    let text = files
        .get(&image.config)?
        .document(&image.config, &options.limits)?;
    if let Some(digest) = named_digest(&image.config) {
        check(&image.config, &text, &digest)?;
    }
    let config: Configuration = parse(&image.config, &text)?;
    check_platform(&config)?;
    let layers = image.layers.iter().map(|name| {
        Ok(Layer {
            blob: files.get(name)?,
            // Other names are those of the decompressed data, which the configuration contains, too.
            digest: named_digest(name).filter(|_| name.starts_with("blobs/")),
        })
    });
    Ok(Chosen {
        layers: layers.collect::<Result<_, Error>>()?,
        config,
    })
}

/// The digest in a file's name: of a layout, of `docker save`, or of other programs.
fn named_digest(name: &str) -> Option<Digest> {
    if let Some(hex) = name.strip_prefix("blobs/sha256/") {
        return Digest::of_hex(hex);
    }
    let hex = name.strip_suffix(".json").unwrap_or(name);
    Digest::of_hex(hex.strip_prefix("sha256:").unwrap_or(hex))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_in_names_are_found() {
        let hex = "ab".repeat(32);
        for name in [
            format!("{hex}.json"),
            format!("sha256:{hex}"),
            format!("blobs/sha256/{hex}"),
        ] {
            assert!(named_digest(&name).is_some(), "{name}");
        }
        for name in ["config.json", "a/layer.tar", "sha256:xyz"] {
            assert!(named_digest(name).is_none(), "{name}");
        }
    }
}
