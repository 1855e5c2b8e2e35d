//! Direct volumes: file systems on block devices or disk images of the host that the guest mounts by itself, instead of a
//! share of a mount on the host.
//!
//! A storage driver that prepares a volume records the device for its path. The format is that of Kata Containers, whose
//! records are found too: `DIRECTORY/BASE64URL(path)/mountInfo.json`.

use crate::Error;
use crate::json::or_null;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

/// Directory of the records.
pub const DIRECTORY: &str = "/run/koya/direct-volumes";
/// Directory of the records of Kata Containers' drivers.
const KATA_DIRECTORY: &str = "/run/kata-containers/shared/direct-volumes";
const FILE: &str = "mountInfo.json";
/// Volume types of drivers that mean a device with a file system.
const KINDS: &[&str] = &["", "block", "directvol"];

/// A volume recorded for a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectVolume {
    #[serde(rename = "volume-type", default)]
    kind: String,
    /// The block device or disk image.
    pub device: PathBuf,
    /// Its file system type, as in mount(8).
    pub fstype: String,
    /// Mount options.
    #[serde(default, deserialize_with = "or_null")]
    pub options: Vec<String>,
    /// Further information from the driver.
    #[serde(
        default,
        deserialize_with = "or_null",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    metadata: BTreeMap<String, String>,
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

    /// The group of all files (`fsGroup` of Kubernetes), and whether files are left unchanged if the root already has it
    /// (`OnRootMismatch`).
    ///
    /// # Errors
    /// If the group is not a number.
    pub(crate) fn group(&self) -> Result<Option<(u32, bool)>, Error> {
        let Some(text) = self.metadata.get("fsGroup").filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        let number = text.parse::<u32>().ok().filter(|group| *group != u32::MAX);
        let wrong = || {
            Error::invalid(
                "mounts",
                format!("fsGroup {text:?} of a volume is not a group ID"),
            )
        };
        let policy = self.metadata.get("fsGroupChangePolicy").map(String::as_str);
        let trusts_root = policy == Some("OnRootMismatch");
        Ok(Some((number.ok_or_else(wrong)?, trusts_root)))
    }

    /// Records this volume for `path`, until [`remove`] or a reboot of the host.
    ///
    /// # Errors
    /// The error from the host.
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

/// Removes the record for a path.
///
/// # Errors
/// If there is none.
pub fn remove(path: &Path) -> Result<(), Error> {
    let what = || format!("forget the volume {}", path.display());
    let dir = entry(Path::new(DIRECTORY), path);
    let forgotten = fs::remove_file(dir.join(FILE)).and_then(|()| fs::remove_dir_all(dir));
    forgotten.map_err(|error| Error::host(what())(error))
}

/// All recorded paths and volumes.
pub fn list() -> Vec<(PathBuf, DirectVolume)> {
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

/// The volume recorded for a path, if any.
pub(crate) fn find(path: &Path) -> Result<Option<DirectVolume>, Error> {
    for directory in [DIRECTORY, KATA_DIRECTORY] {
        if let Some(volume) = read(Path::new(directory), path)? {
            return Ok(Some(volume));
        }
    }
    Ok(None)
}

/// The record of a path, in normalized form: `/a/` is `/a`.
fn entry(directory: &Path, path: &Path) -> PathBuf {
    let path: PathBuf = path.components().collect();
    directory.join(URL_SAFE.encode(path.as_os_str().as_bytes()))
}

fn read(directory: &Path, path: &Path) -> Result<Option<DirectVolume>, Error> {
    let shown = path.display();
    let text = match fs::read(entry(directory, path).join(FILE)) {
        Ok(text) => text,
        // A path that is too long for a file name has no record, and records that only root may read are ignored for other
        // users.
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
        // Name and contents as written by Kata's drivers.
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
