//! Image configuration: defaults for containers (image-spec, config.md).

use crate::Error;
use crate::digest::Digest;
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// An image's configuration document.
#[derive(Default, Deserialize)]
pub(crate) struct Configuration {
    pub(crate) architecture: Option<String>,
    pub(crate) os: Option<String>,
    pub(crate) variant: Option<String>,
    config: Option<Execution>,
    rootfs: Option<Rootfs>,
}

#[derive(Deserialize)]
struct Rootfs {
    #[serde(rename = "type")]
    kind: Option<String>,
    diff_ids: Option<Vec<String>>,
}

#[derive(Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Execution {
    user: Option<String>,
    exposed_ports: Option<BTreeMap<String, serde_json::Value>>,
    env: Option<Vec<String>>,
    #[serde(deserialize_with = "words")]
    entrypoint: Vec<String>,
    #[serde(deserialize_with = "words")]
    cmd: Vec<String>,
    volumes: Option<BTreeMap<String, serde_json::Value>>,
    working_dir: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    stop_signal: Option<String>,
}

/// A list of strings; a single string is a list of one, as in images of old versions of Docker.
fn words<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Words {
        List(Vec<String>),
        One(String),
        None,
    }
    Ok(match Words::deserialize(from)? {
        Words::List(words) => words,
        Words::One(word) if word.is_empty() => Vec::new(),
        Words::One(word) => vec![word],
        Words::None => Vec::new(),
    })
}

/// Defaults of an image for its containers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Defaults {
    /// The program and its first arguments.
    pub entrypoint: Vec<String>,
    /// Default arguments.
    pub command: Vec<String>,
    /// `NAME=VALUE`
    pub env: Vec<String>,
    /// The user.
    pub user: String,
    /// The working directory.
    pub workdir: Option<PathBuf>,
    /// Stop signal, by name or number.
    pub stop_signal: Option<String>,
    /// Directories for the container's own data.
    pub volumes: Vec<PathBuf>,
    /// Exposed ports: `PORT` or `PORT/PROTOCOL`.
    pub ports: Vec<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

impl Configuration {
    /// # Errors
    /// If it does not fit an image with this number of layers.
    pub(crate) fn check(&self, layers: usize) -> Result<(), Error> {
        let Some(rootfs) = &self.rootfs else {
            return Ok(());
        };
        if let Some(kind) = rootfs
            .kind
            .as_deref()
            .filter(|kind| !matches!(*kind, "" | "layers"))
        {
            return Err(Error::Unsupported(format!(
                "a root file system of type {kind:?}"
            )));
        }
        let ids = rootfs.diff_ids.as_deref().unwrap_or_default();
        if !ids.is_empty() && ids.len() != layers {
            let text = format!(
                "its configuration is of {} layers, and it has {layers}",
                ids.len()
            );
            return Err(Error::invalid(text));
        }
        ids.iter().try_for_each(|id| Digest::parse(id).map(drop))
    }

    /// Digest of the decompressed layer `number`, from 0, if the configuration has one.
    pub(crate) fn diff_id(&self, number: usize) -> Result<Option<Digest>, Error> {
        let ids = self
            .rootfs
            .as_ref()
            .and_then(|rootfs| rootfs.diff_ids.as_deref());
        let id = ids.and_then(|ids| ids.get(number));
        id.map(|id| Digest::parse(id)).transpose()
    }

    pub(crate) fn defaults(&self) -> Defaults {
        let config = self.config.clone().unwrap_or_default();
        let keys = |map: Option<BTreeMap<String, _>>| map.unwrap_or_default().into_keys();
        Defaults {
            // Dockerfiles remove a base image's entrypoint by an empty string.
            entrypoint: Some(config.entrypoint)
                .filter(|words| *words != [""])
                .unwrap_or_default(),
            command: config.cmd,
            env: config.env.unwrap_or_default(),
            user: config.user.unwrap_or_default(),
            workdir: config
                .working_dir
                .filter(|d| !d.is_empty())
                // Some builders leave it relative.
                .map(|d| Path::new("/").join(d)),
            stop_signal: config.stop_signal.filter(|s| !s.is_empty()),
            volumes: keys(config.volumes).map(PathBuf::from).collect(),
            ports: keys(config.exposed_ports).collect(),
            labels: config.labels.unwrap_or_default(),
        }
    }
}
