//! Direct volumes: file systems on block devices or disk images of the host that the guest mounts by
//! itself, instead of a share of what the host has mounted.
//!
//! Who prepares a volume (a storage driver) writes down that its path stands for a device. The file is as
//! Kata Containers' drivers write it, and theirs are found too: `DIRECTORY/BASE64URL(path)/mountInfo.json`.

use crate::Error;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

/// Where they are written down.
pub const DIRECTORY: &str = "/run/koya/direct-volumes";
/// Where Kata Containers' drivers write theirs.
const KATA_DIRECTORY: &str = "/run/kata-containers/shared/direct-volumes";
const FILE: &str = "mountInfo.json";
/// As drivers name the kinds that are a device with a file system.
const KINDS: &[&str] = &["", "block", "directvol"];

/// What a path stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectVolume {
    #[serde(rename = "volume-type", default)]
    kind: String,
    /// The block device, or an image of one.
    pub device: PathBuf,
    /// Its file system, as mount(8) names it.
    pub fstype: String,
    /// Options of the mount.
    #[serde(default, deserialize_with = "list")]
    pub options: Vec<String>,
    /// What else drivers say of it.
    #[serde(
        default,
        deserialize_with = "map",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    metadata: BTreeMap<String, String>,
}

/// Go writes an empty list as null.
fn list<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

fn map<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, String>, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

impl DirectVolume {
    /// A device with a file system.
    pub fn new(device: impl Into<PathBuf>, fstype: impl Into<String>) -> Self {
        Self {
            kind: "block".into(),
            device: device.into(),
            fstype: fstype.into(),
            options: Vec::new(),
            metadata: BTreeMap::new(),
        }
    }

    /// The group that is to use it, of Kubernetes' `fsGroup`, and whether its root says whether all of it is that group's.
    ///
    /// # Errors
    /// If it is no number.
    pub(crate) fn group(&self) -> Result<Option<(u32, bool)>, Error> {
        let Some(text) = self.metadata.get("fsGroup").filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        let number = text.parse::<u32>().ok().filter(|group| *group != u32::MAX);
        let wrong = || {
            Error::invalid(
                "mounts",
                format!("fsGroup {text:?} of a volume is no group"),
            )
        };
        let policy = self.metadata.get("fsGroupChangePolicy").map(String::as_str);
        let trusts_root = policy == Some("OnRootMismatch");
        Ok(Some((number.ok_or_else(wrong)?, trusts_root)))
    }

    /// Writes down that `path` stands for this, until [`forget`] or the host's next start.
    ///
    /// # Errors
    /// If the host refuses.
    pub fn add(&self, path: &Path) -> Result<(), Error> {
        let what = || format!("write down the volume {}", path.display());
        let add = || -> io::Result<()> {
            let dir = entry(Path::new(DIRECTORY), path);
            fs::create_dir_all(&dir)?;
            let new = dir.join("new");
            fs::write(&new, serde_json::to_vec(self)?)?;
            fs::rename(new, dir.join(FILE))
        };
        add().map_err(|error| Error::host(what())(error))
    }
}

/// That a path stands for a device is forgotten.
///
/// # Errors
/// If it was not known.
pub fn forget(path: &Path) -> Result<(), Error> {
    let what = || format!("forget the volume {}", path.display());
    let dir = entry(Path::new(DIRECTORY), path);
    let forgotten = fs::remove_file(dir.join(FILE)).and_then(|()| fs::remove_dir_all(dir));
    forgotten.map_err(|error| Error::host(what())(error))
}

/// Every path that stands for a device.
pub fn all() -> Vec<(PathBuf, DirectVolume)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(DIRECTORY).into_iter().flatten().flatten() {
        let Ok(path) = URL_SAFE.decode(entry.file_name().as_bytes()) else {
            continue;
        };
        let path = PathBuf::from(std::ffi::OsString::from_vec(path));
        if let Ok(Some(volume)) = read(Path::new(DIRECTORY), &path) {
            all.push((path, volume));
        }
    }
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// What a path stands for, if it is a volume.
pub(crate) fn find(path: &Path) -> Result<Option<DirectVolume>, Error> {
    for directory in [DIRECTORY, KATA_DIRECTORY] {
        if let Some(volume) = read(Path::new(directory), path)? {
            return Ok(Some(volume));
        }
    }
    Ok(None)
}

/// A path's name, however it is written: `/a/` is `/a`.
fn entry(directory: &Path, path: &Path) -> PathBuf {
    let path: PathBuf = path.components().collect();
    directory.join(URL_SAFE.encode(path.as_os_str().as_bytes()))
}

fn read(directory: &Path, path: &Path) -> Result<Option<DirectVolume>, Error> {
    let shown = path.display();
    let text = match fs::read(entry(directory, path).join(FILE)) {
        Ok(text) => text,
        // A path that is too long to be a name is none's, and what only root may read is nothing to others.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::InvalidFilename
                    | io::ErrorKind::PermissionDenied
            ) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(Error::host(format!("read what {shown} stands for"))(error)),
    };
    let volume: DirectVolume = serde_json::from_slice(&text).map_err(Error::invalid_by(
        "mounts",
        format!("{shown} stands for a device that is not well described"),
    ))?;
    if !KINDS.contains(&volume.kind.as_str()) {
        let kind = &volume.kind;
        let reason = format!(
            "{shown} stands for a device, but volumes of the kind {kind:?} are not supported"
        );
        return Err(Error::unsupported("mounts", reason));
    }
    Ok(Some(volume))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drivers_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = Path::new("/var/lib/kubelet/pods/u/volumes/csi/pvc/mount");
        assert_eq!(read(dir.path(), path).unwrap(), None);
        // As Kata's drivers name it and write it.
        let own = "L3Zhci9saWIva3ViZWxldC9wb2RzL3Uvdm9sdW1lcy9jc2kvcHZjL21vdW50";
        fs::create_dir(dir.path().join(own)).unwrap();
        let file = dir.path().join(own).join(FILE);
        let text = r#"{"volume-type": "directvol", "device": "/dev/sdf", "fstype": "ext4",
            "metadata": {"fsGroup": "3000"}, "options": ["ro"]}"#;
        fs::write(&file, text).unwrap();
        let volume = read(dir.path(), path).unwrap().unwrap();
        assert_eq!(volume.device, Path::new("/dev/sdf"));
        assert_eq!(
            (volume.fstype.as_str(), volume.options),
            ("ext4", vec!["ro".to_owned()])
        );
        fs::write(&file, text.replace("[\"ro\"]", "null")).unwrap();
        let volume = read(dir.path(), path).unwrap().unwrap();
        assert!(volume.options.is_empty());
        assert_eq!(volume.group().unwrap(), Some((3000, false)));
        let trusting = r#""3000", "fsGroupChangePolicy": "OnRootMismatch""#;
        fs::write(&file, text.replace("\"3000\"", trusting)).unwrap();
        let volume = read(dir.path(), path).unwrap().unwrap();
        assert_eq!(volume.group().unwrap(), Some((3000, true)));
        fs::write(&file, text.replace("3000", "staff")).unwrap();
        let volume = read(dir.path(), path).unwrap().unwrap();
        assert!(volume.group().unwrap_err().to_string().contains("staff"));
        fs::write(&file, text.replace(r#"{"fsGroup": "3000"}"#, "null")).unwrap();
        let volume = read(dir.path(), path).unwrap().unwrap();
        assert_eq!(volume.group().unwrap(), None);
        fs::write(&file, text.replace("directvol", "vfiovol")).unwrap();
        let refused = read(dir.path(), path).unwrap_err().to_string();
        assert!(refused.contains("vfiovol"), "{refused}");
    }
}
