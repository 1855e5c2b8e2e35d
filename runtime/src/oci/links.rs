//! Symbolic links that are copied to the container: mounts with crun's option `copy-symlink`, which podman uses for
//! `--mount type=bind,...,no-dereference`. Where the source is no link, the option means nothing.

use super::mounts::{has, is_bind, source_of};
use crate::Error;
use koya_rootfs::plain;
use oci_spec::runtime::{Mount, Spec};
use std::path::{Path, PathBuf};

/// A link in the root of the container.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) at: PathBuf,
    pub(crate) target: PathBuf,
}

/// Removes these mounts from a configuration, and returns the links, which the host creates. `directory` is that of the
/// bundle.
///
/// # Errors
/// If a link would be in another mount, in which the host can't create it.
pub(super) fn take(spec: &mut Spec, directory: &Path) -> Result<Vec<Link>, Error> {
    let mut links = Vec::new();
    let mut others: Vec<Mount> = Vec::new();
    for mount in spec.mounts().iter().flatten() {
        let Some(target) = copied(mount, directory) else {
            others.push(mount.clone());
            continue;
        };
        let at = plain(mount.destination());
        let mut earlier = others.iter().map(|other| plain(other.destination()));
        if earlier.any(|other| at.starts_with(other)) {
            let why = "the option copy-symlink is not supported within another mount";
            let reason = format!("{}: {why}", at.display());
            return Err(Error::unsupported("mounts", reason));
        }
        links.push(Link { at, target });
    }
    if !links.is_empty() {
        spec.set_mounts(Some(others));
    }
    Ok(links)
}

/// The target of the link that a mount copies.
fn copied(mount: &Mount, directory: &Path) -> Option<PathBuf> {
    let is_copied = is_bind(mount) && has(mount, "copy-symlink");
    let is_mounted = has(mount, "src-nofollow") || has(mount, "dest-nofollow");
    match is_copied && !is_mounted {
        true => source_of(directory, mount).ok()?.read_link().ok(),
        false => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::os::unix::fs::symlink;

    fn taken(directory: &Path, mounts: Value) -> Result<(Vec<Link>, usize), String> {
        let spec = json!({"ociVersion": "1.2.0", "mounts": mounts});
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        let links = take(&mut spec, directory).map_err(|error| error.to_string())?;
        Ok((links, spec.mounts().as_ref().unwrap().len()))
    }

    #[test]
    fn links_are_copied_where_the_host_can_create_them() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        symlink("../to/nowhere", dir.path().join("link")).unwrap();
        let bind = |at: &str, source: &str, options: &[&str]| json!({"destination": at, "type": "bind", "source": source, "options": options});
        let copy = ["rbind", "copy-symlink"];
        let tmpfs = json!({"destination": "/a/tmp", "type": "tmpfs", "source": "tmpfs"});
        let (links, left) = taken(
            dir.path(),
            json!([
                tmpfs,
                bind("/a/b/../link", "link", &copy),
                bind("/file", "file", &copy),
                bind("/other", "link", &["rbind"]),
                bind("/both", "link", &["rbind", "copy-symlink", "src-nofollow"]),
            ]),
        )
        .unwrap();
        let link = Link {
            at: "/a/link".into(),
            target: "../to/nowhere".into(),
        };
        assert_eq!((links, left), (vec![link], 4));
        let within = json!([tmpfs, bind("/a/tmp/link", "link", &copy)]);
        let said = taken(dir.path(), within).unwrap_err();
        assert!(
            said.contains("/a/tmp/link: the option copy-symlink"),
            "{said}"
        );
        let later = json!([bind("/a/tmp/link", "link", &copy), tmpfs]);
        assert_eq!(taken(dir.path(), later).unwrap().1, 1);
    }
}
