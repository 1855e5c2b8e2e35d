//! Mounts of overlays, as `podman run --mount type=image` and `--volume DIR:PLACE:O` request them.
//!
//! Their directories are those of the host, so the host mounts them, in the mount namespace of the sandbox's process. The
//! container gets a bind mount of the result.

use crate::mounts::{Mount, mount_one};
use crate::spec::Spec;
use anyhow::{Context, Result};
use koya::oci_spec::runtime as oci;
use std::fs;
use std::path::{Path, PathBuf};

/// Type of these mounts.
const OVERLAY: &str = "overlay";

/// Options of the file system that have no value (Documentation/filesystems/overlayfs.rst).
const WORDS: [&str; 2] = ["userxattr", "volatile"];

/// An overlay that has to be mounted on the host.
#[derive(Debug, PartialEq, Eq)]
pub struct Overlay {
    at: PathBuf,
    /// Path in the container.
    destination: PathBuf,
    options: Vec<String>,
}

impl Overlay {
    /// Mounts it, in the mount namespace of the calling thread.
    ///
    /// # Errors
    /// The host's error, with the path in the container.
    pub fn mount(&self) -> Result<()> {
        fs::create_dir(&self.at).with_context(|| format!("cannot make {}", self.at.display()))?;
        let wanted = Mount {
            kind: OVERLAY.into(),
            source: OVERLAY.into(),
            target: String::new(),
            options: self.options.clone(),
        };
        let mounted = mount_one(&wanted, &self.at);
        mounted.with_context(|| {
            let options = self.options.join(",");
            format!(
                "mounts: {}: cannot mount the overlay ({options})",
                self.destination.display()
            )
        })
    }
}

impl Spec {
    /// Replaces mounts of overlays by bind mounts of directories, which do not exist yet, in `directory`; returns what has to
    /// be mounted there.
    pub fn take_overlays(&mut self, directory: &Path) -> Vec<Overlay> {
        let mounts = self.0.mounts_mut().iter_mut().flatten().enumerate();
        let overlays = mounts.filter(|(_, mount)| mount.typ().as_deref() == Some(OVERLAY));
        let taken = overlays.map(|(number, mount)| {
            let at = directory.join(format!("overlay{number}"));
            take(mount, at)
        });
        taken.collect()
    }
}

fn take(mount: &mut oci::Mount, at: PathBuf) -> Overlay {
    let all = mount.options().clone().unwrap_or_default();
    let is_own = |option: &String| option.contains('=') || WORDS.contains(&option.as_str());
    let (options, others): (Vec<_>, Vec<_>) = all.into_iter().partition(is_own);
    mount.set_typ(Some("bind".into()));
    mount.set_source(Some(at.clone()));
    let bind = std::iter::once("bind".to_owned());
    mount.set_options(Some(bind.chain(others).collect()));
    Overlay {
        at,
        destination: mount.destination().clone(),
        options,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(mounts: &Value) -> Spec {
        let spec = json!({"ociVersion": "1.2.0", "mounts": mounts});
        Spec(serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn overlays_become_bind_mounts_of_the_host() {
        let mut spec = spec(&json!([
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"]},
            {"destination": "/image", "type": "overlay", "source": "overlay",
                "options": ["lowerdir=/a:/b", "userxattr", "private", "ro", "metacopy=on"]},
            {"destination": "/plain", "type": "overlay"},
        ]));
        let taken = spec.take_overlays(Path::new("/run/x"));
        let wanted = |at: &str, destination: &str, options: &[&str]| Overlay {
            at: at.into(),
            destination: destination.into(),
            options: options.iter().map(|one| one.to_string()).collect(),
        };
        let options = ["lowerdir=/a:/b", "userxattr", "metacopy=on"];
        assert_eq!(
            taken,
            [
                wanted("/run/x/overlay1", "/image", &options),
                wanted("/run/x/overlay2", "/plain", &[]),
            ]
        );
        let mounts = serde_json::to_value(spec.0.mounts()).unwrap();
        assert_eq!(mounts[0]["type"], "tmpfs");
        assert_eq!(mounts[1]["type"], "bind");
        assert_eq!(mounts[1]["source"], "/run/x/overlay1");
        assert_eq!(mounts[1]["options"], json!(["bind", "private", "ro"]));
        assert!(spec.take_overlays(Path::new("/run/x")).is_empty());
    }

    #[test]
    fn an_overlay_that_cannot_be_mounted_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let options = json!(["lowerdir=/missing/of/koya"]);
        let mounts = json!([{"destination": "/image", "type": "overlay", "options": options}]);
        let taken = spec(&mounts).take_overlays(dir.path());
        let error = format!("{:#}", taken[0].mount().unwrap_err());
        let start = "mounts: /image: cannot mount the overlay (lowerdir=/missing/of/koya)";
        assert!(error.starts_with(start), "{error}");
    }
}
