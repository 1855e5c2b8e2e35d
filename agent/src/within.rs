//! Additions to a container's root: files provided by the host, the working directory and, in an image that the host does
//! not mount, mount points.

use crate::configuration;
use crate::helper::bundle;
use anyhow::{Context, Result, bail};
use koya_protocol::{image_root, messages};
use koya_rootfs::{Kind, Rootfs};
use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{FileType, Gid, Uid, fchown, fstat};
use rustix::io::Errno;
use std::fs;
use std::path::Path;

/// Whether a container is known to need none of them, without accessing its root.
pub(crate) fn lacks_nothing(id: &str, spec: &Spec, files: &[messages::File]) -> bool {
    let process = spec.process().as_ref();
    files.is_empty()
        && !is_image(id, spec)
        && process.is_none_or(|process| process.cwd() == Path::new("/"))
}

/// Adds the missing parts of its root to a container's configuration.
///
/// # Errors
/// If the guest has no space. Files that can't be put into the root are left out.
pub(crate) fn complete(id: &str, mut spec: Spec, files: &[messages::File]) -> Result<Spec> {
    let Some(path) = spec.root().as_ref().map(|root| root.path().clone()) else {
        return Ok(spec);
    };
    let root = Rootfs::open(&path)
        .with_context(|| format!("cannot open the root file system {}", path.display()))?;
    if is_image(id, &spec) {
        make_mount_points(&root, spec.mounts().as_deref().unwrap_or_default())?;
    }
    let own = bundle(id).join("files");
    for (number, file) in files.iter().enumerate() {
        let place = Path::new(&file.path);
        if is_mounted_over(&spec, place) || !can_be_mounted_over(&root, place) {
            continue;
        }
        fs::create_dir_all(&own)?;
        let source = own.join(number.to_string());
        fs::write(&source, &file.content)?;
        configuration::bind(&mut spec, &source, place);
    }
    let cwd = spec.process().as_ref().map(|process| process.cwd().clone());
    if let Some(cwd) = cwd
        && !is_there(&spec, &root, &cwd)
    {
        configuration::make_working_directory(&mut spec);
    }
    Ok(spec)
}

pub(crate) fn is_image(id: &str, spec: &Spec) -> bool {
    let root = spec.root().as_ref();
    root.is_some_and(|root| root.path() == Path::new(&image_root(id)))
}

/// Creates mount points, as the host does in other roots. libcontainer creates none at dangling links.
fn make_mount_points(root: &Rootfs, mounts: &[Mount]) -> Result<()> {
    for (index, mount) in mounts.iter().enumerate() {
        let place = mount.destination();
        let mut earlier = mounts[..index].iter();
        if earlier.any(|earlier| place.starts_with(earlier.destination())) {
            continue;
        }
        let source = mount
            .source()
            .as_ref()
            .filter(|_| mount.typ().as_deref() == Some("bind"));
        let (kind, wanted) = match source.is_none_or(|source| source.is_dir()) {
            true => (Kind::Directory, "directory"),
            false => (Kind::File, "file"),
        };
        root.make(place, kind)
            .with_context(|| format!("cannot make the mount point {}", place.display()))?;
        // The type of a source in the container's own root is not known yet.
        let is_known = source.is_none_or(|source| source.exists());
        if is_known && root.kind(place).is_ok_and(|found| found != kind) {
            bail!(
                "{} is not a {wanted} in the image, but a {wanted} is to be mounted there",
                place.display()
            );
        }
    }
    Ok(())
}

/// Whether one of the container's mounts covers this path.
fn is_mounted_over(spec: &Spec, path: &Path) -> bool {
    let mut mounts = spec.mounts().iter().flatten();
    mounts.any(|mount| path.starts_with(mount.destination()))
}

/// Whether a directory is known to exist after the container's mounts.
fn is_there(spec: &Spec, root: &Rootfs, path: &Path) -> bool {
    let mounts = spec.mounts().iter().flatten();
    let around = mounts.filter(|mount| path.starts_with(mount.destination()));
    // The deepest mount counts, and of several at one path the last.
    let Some(mount) = around.max_by_key(|mount| mount.destination().components().count()) else {
        return root.is_directory(path);
    };
    let within = path.strip_prefix(mount.destination()).unwrap_or(path);
    if within.as_os_str().is_empty() {
        return true;
    }
    let source = mount
        .source()
        .as_ref()
        .filter(|_| mount.typ().as_deref() == Some("bind"));
    let source = source.and_then(|source| Rootfs::open(source).ok());
    source.is_some_and(|source| source.is_directory(within))
}

/// Whether the path is an empty file, as left by container engines, or can be created.
fn can_be_mounted_over(root: &Rootfs, path: &Path) -> bool {
    match root.find(path).and_then(fstat) {
        Ok(found) => {
            FileType::from_raw_mode(found.st_mode) == FileType::RegularFile && found.st_size == 0
        }
        Err(Errno::NOENT) => root.make(path, Kind::File).is_ok(),
        Err(_) => false,
    }
}

/// Creates the working directory for this user, in a root with its mounts.
pub(crate) fn make_working_directory(root: &str, path: &str, owner: (u32, u32)) -> Result<()> {
    let made = Rootfs::open(Path::new(root))?.make(Path::new(path), Kind::Directory)?;
    if let Some(made) = made {
        let (uid, gid) = owner;
        // In a host directory this may not be permitted.
        fchown(&made, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).ok();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    #[test]
    fn a_file_goes_where_there_is_none_or_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        let root = Rootfs::open(dir.path()).unwrap();
        let can = |path: &str| can_be_mounted_over(&root, Path::new(path));
        assert!(can("/etc/hosts"));
        assert_eq!(fs::read(dir.path().join("etc/hosts")).unwrap(), b"");
        assert!(can("/etc/hosts"));
        fs::write(dir.path().join("etc/own"), "127.0.0.1").unwrap();
        assert!(!can("/etc/own"));
        // The link of systemd-resolved, before it runs.
        symlink("../run/stub", dir.path().join("etc/link")).unwrap();
        assert!(can("/etc/link") && dir.path().join("run/stub").is_file());
        assert!(!can("/etc"));
    }

    #[test]
    fn a_working_directory_is_looked_for_in_the_containers_mounts() {
        let dir = tempfile::tempdir().unwrap();
        let volume = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("own/data/hidden")).unwrap();
        fs::create_dir(volume.path().join("sub")).unwrap();
        let mounts = serde_json::json!([
            {"destination": "/own/data", "type": "bind", "source": volume.path()},
            {"destination": "/memory", "type": "tmpfs", "source": "tmpfs"},
        ]);
        let spec = serde_json::json!({"ociVersion": "1.2.0", "mounts": mounts});
        let spec: Spec = serde_json::from_value(spec).unwrap();
        let root = Rootfs::open(dir.path()).unwrap();
        let there = |path: &str| is_there(&spec, &root, Path::new(path));
        assert!(there("/") && there("/own") && there("/own/data") && there("/own/data/sub"));
        assert!(there("/memory"));
        for missing in ["/other", "/own/data/hidden", "/memory/sub"] {
            assert!(!there(missing), "{missing}");
        }
    }

    #[test]
    fn a_working_directory_is_made_inside_the_root_for_its_user() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        symlink(outside.path(), dir.path().join("out")).unwrap();
        fs::create_dir(dir.path().join("in")).unwrap();
        symlink("/in", dir.path().join("link")).unwrap();
        let root = dir.path().to_str().unwrap();
        let owner = fs::metadata(dir.path()).unwrap();
        // Only root can change the owner.
        let (uid, gid) = match owner.uid() {
            0 => (1234, 1235),
            uid => (uid, owner.gid()),
        };
        make_working_directory(root, "/link/a/b", (uid, gid)).unwrap();
        let made = fs::metadata(dir.path().join("in/a/b")).unwrap();
        assert_eq!(
            (made.uid(), made.gid(), made.mode() & 0o777),
            (uid, gid, 0o755)
        );
        assert_eq!(
            fs::metadata(dir.path().join("in/a")).unwrap().uid(),
            owner.uid()
        );
        make_working_directory(root, "/out/x", (uid, gid)).unwrap();
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }
}
