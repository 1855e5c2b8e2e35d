//! Additions to a container's root: files provided by the host, the working directory and, in an image that the host does
//! not mount, mount points.

use crate::configuration::{self, is_read_only};
use crate::places::bundle;
use anyhow::{Context, Result, bail};
use koya_protocol::{image_root, messages};
use koya_rootfs::{Kind, Rootfs};
use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{FileType, Gid, Uid, fchown, fstat};
use rustix::io::Errno;
use std::fs;
use std::path::{Path, PathBuf};

/// Whether a container is known to need none of them, without accessing its root.
pub(crate) fn is_complete(id: &str, spec: &Spec, files: &[messages::File]) -> bool {
    let process = spec.process().as_ref();
    files.is_empty()
        && !is_image(id, spec)
        && !may_lead_into_mounts(spec)
        && process.is_none_or(|process| process.cwd() == Path::new("/"))
}

/// Adds the missing parts of its root to a container's configuration.
///
/// # Errors
/// If the guest has no space. Files that can't be put into the root are left out.
pub(crate) fn complete_root(id: &str, mut spec: Spec, files: &[messages::File]) -> Result<Spec> {
    let Some(path) = spec.root().as_ref().map(|root| root.path().clone()) else {
        return Ok(spec);
    };
    let root = Rootfs::open(&path)
        .with_context(|| format!("cannot open the root file system {}", path.display()))?;
    if is_image(id, &spec) {
        make_mount_points(&root, spec.mounts().as_deref().unwrap_or_default())?;
    }
    follow_links(&mut spec, &root);
    check_places(spec.mounts().as_deref().unwrap_or_default())?;
    let own = bundle(id).join("files");
    for (number, file) in files.iter().enumerate() {
        let Some(place) = place_for(&spec, &root, Path::new(&file.path), file.replace) else {
            continue;
        };
        fs::create_dir_all(&own)?;
        let source = own.join(number.to_string());
        fs::write(&source, &file.content)?;
        configuration::bind(&mut spec, &source, &place);
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

/// Destinations of mounts in which no link leads elsewhere: kernel file systems and single files.
const WITHOUT_PLACES: &[&str] = &[
    "/proc",
    "/dev",
    "/sys",
    "/etc/hosts",
    "/etc/hostname",
    "/etc/resolv.conf",
];

/// Whether the place of a mount may be a link in an earlier one, or lead into it, without accessing the root.
fn may_lead_into_mounts(spec: &Spec) -> bool {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let has_places = |mount: &Mount| {
        let place = mount.destination();
        !WITHOUT_PLACES.iter().any(|path| place.starts_with(path))
    };
    let earlier = mounts.iter().position(has_places);
    earlier.is_some_and(|earlier| earlier + 1 < mounts.len())
}

/// Moves each mount whose place is a link in an earlier mount, or leads into it, to the path where the link leads, as with
/// systemd-resolved's `/etc/resolv.conf` and a tmpfs at `/run`: libcontainer creates no mount point at a dangling link.
fn follow_links(spec: &mut Spec, root: &Rootfs) {
    if !may_lead_into_mounts(spec) {
        return;
    }
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for index in 1..mounts.len() {
        let (earlier, rest) = mounts.split_at_mut(index);
        let place = rest[0].destination();
        if let Some(real) = without_links(earlier, root, place)
            && real != *place
            && (around(earlier, place).is_some() || around(earlier, &real).is_some())
        {
            rest[0].set_destination(real);
        }
    }
    spec.set_mounts(Some(mounts));
}

/// Checks that no mount point is missing in an earlier read-only volume: libcontainer's error names neither.
fn check_places(mounts: &[Mount]) -> Result<()> {
    for (index, mount) in mounts.iter().enumerate() {
        let place = mount.destination();
        let Some(earlier) = around(&mounts[..index], place) else {
            continue;
        };
        if !is_read_only(earlier) {
            continue;
        }
        let at = earlier.destination();
        let within = place.strip_prefix(at).unwrap_or(place);
        let is_missing = |volume: Rootfs| volume.find(within).err() == Some(Errno::NOENT);
        if !within.as_os_str().is_empty() && directory_of(earlier).is_some_and(is_missing) {
            let (place, at) = (place.display(), at.display());
            bail!("cannot make the mount point {place}: the volume at {at} is read-only");
        }
    }
    Ok(())
}

/// A path without links, in a root with these mounts; what does not exist is no link. `None` if there is no end of links.
fn without_links(mounts: &[Mount], root: &Rootfs, path: &Path) -> Option<PathBuf> {
    koya_rootfs::without_links(path, |path| {
        let Some(mount) = around(mounts, path) else {
            return root.link(path);
        };
        let within = path.strip_prefix(mount.destination()).ok()?;
        // The place of a mount is not a link any more.
        let inside = !within.as_os_str().is_empty();
        inside.then(|| directory_of(mount)?.link(within)).flatten()
    })
}

/// The mount that contains a path: the deepest one, and of several at one place the last.
fn around<'m>(mounts: &'m [Mount], path: &Path) -> Option<&'m Mount> {
    let around = mounts
        .iter()
        .filter(|mount| path.starts_with(mount.destination()));
    around.max_by_key(|mount| mount.destination().components().count())
}

/// The directory of a bind mount.
fn directory_of(mount: &Mount) -> Option<Rootfs> {
    let source = mount.source().as_ref();
    let source = source.filter(|_| mount.typ().as_deref() == Some("bind"));
    source.and_then(|source| Rootfs::open(source).ok())
}

/// Whether a directory is known to exist after the container's mounts.
fn is_there(spec: &Spec, root: &Rootfs, path: &Path) -> bool {
    let Some(mount) = around(spec.mounts().as_deref().unwrap_or_default(), path) else {
        return root.is_directory(path);
    };
    let within = path.strip_prefix(mount.destination()).unwrap_or(path);
    within.as_os_str().is_empty()
        || directory_of(mount).is_some_and(|source| source.is_directory(within))
}

/// The path without links at which a file is mounted that the container should find at `path`: over an empty file (any
/// file with `replace`), or over one that is created, in the root or in the directory or tmpfs that is mounted there.
fn place_for(spec: &Spec, root: &Rootfs, path: &Path, replace: bool) -> Option<PathBuf> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let real = without_links(mounts, root, path)?;
    if let Some(mount) = around(mounts, &real) {
        return can_be_within(mount, &real, replace).then_some(real);
    }
    if !can_be_mounted_over(root, &real, replace) {
        return None;
    }
    // Links that lead out of the root end at its top, as in the container.
    root.resolve(&real).ok()
}

/// Whether a file can be mounted at a path below a mount.
fn can_be_within(mount: &Mount, path: &Path, replace: bool) -> bool {
    let within = path.strip_prefix(mount.destination()).unwrap_or(path);
    if within.as_os_str().is_empty() {
        return false;
    }
    if mount.typ().as_deref() == Some("tmpfs") {
        // Otherwise libcontainer creates the file.
        return !is_read_only(mount);
    }
    directory_of(mount).is_some_and(|source| {
        let can = can_be_mounted_over(&source, within, replace);
        // A link may lead out of the directory, in the container.
        let is_plain = |real: PathBuf| real == Path::new("/").join(within);
        can && source.resolve(within).is_ok_and(is_plain)
    })
}

/// Whether the path is an empty file, as left by container engines, or any with `replace`, or can be created.
fn can_be_mounted_over(root: &Rootfs, path: &Path, replace: bool) -> bool {
    match root.find(path).and_then(fstat) {
        Ok(found) => {
            let is_file = FileType::from_raw_mode(found.st_mode) == FileType::RegularFile;
            is_file && (replace || found.st_size == 0)
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
        let can = |path: &str| can_be_mounted_over(&root, Path::new(path), false);
        assert!(can("/etc/hosts"));
        assert_eq!(fs::read(dir.path().join("etc/hosts")).unwrap(), b"");
        assert!(can("/etc/hosts"));
        fs::write(dir.path().join("etc/own"), "127.0.0.1").unwrap();
        assert!(!can("/etc/own"));
        assert!(can_be_mounted_over(&root, Path::new("/etc/own"), true));
        assert!(!can_be_mounted_over(&root, Path::new("/etc"), true));
        // The link of systemd-resolved, before it runs.
        symlink("../run/stub", dir.path().join("etc/link")).unwrap();
        assert!(can("/etc/link") && dir.path().join("run/stub").is_file());
        assert!(!can("/etc"));
    }

    /// A root with systemd-resolved's link, and mounts as JSON.
    fn with_mounts(mounts: serde_json::Value) -> (tempfile::TempDir, Rootfs, Spec) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        symlink(
            "../run/stub/resolv.conf",
            dir.path().join("etc/resolv.conf"),
        )
        .unwrap();
        let root = Rootfs::open(dir.path()).unwrap();
        let spec = serde_json::json!({"ociVersion": "1.2.0", "mounts": mounts});
        (dir, root, serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn a_link_into_a_mount_is_followed() {
        let file =
            serde_json::json!({"destination": "/etc/resolv.conf", "type": "bind", "source": "/f"});
        let run = serde_json::json!({"destination": "/run", "type": "tmpfs", "source": "tmpfs"});
        let proc = serde_json::json!({"destination": "/proc", "type": "proc", "source": "proc"});
        for (mounts, expected) in [
            (vec![&proc, &run, &file], "/run/stub/resolv.conf"),
            (vec![&proc, &file, &run], "/etc/resolv.conf"),
            (vec![&proc, &file], "/etc/resolv.conf"),
        ] {
            let (_dir, root, mut spec) = with_mounts(serde_json::json!(mounts));
            root.make(Path::new("/etc/resolv.conf"), Kind::File)
                .unwrap();
            follow_links(&mut spec, &root);
            let mounts = spec.mounts().as_ref().unwrap();
            let found = mounts.iter().map(|mount| mount.destination());
            let file = found.rev().find(|place| place.ends_with("resolv.conf"));
            assert_eq!(file.unwrap(), Path::new(expected));
        }
    }

    /// containers/crun 497, containers/crun 1463.
    #[test]
    fn links_are_followed_through_mounts() {
        let volume = tempfile::tempdir().unwrap();
        fs::create_dir(volume.path().join("sub")).unwrap();
        symlink("/one/file", volume.path().join("link")).unwrap();
        symlink("../../run/x", volume.path().join("sub/up")).unwrap();
        symlink("round", volume.path().join("round")).unwrap();
        let (dir, root, spec) = with_mounts(serde_json::json!([
            {"destination": "/two", "type": "bind", "source": volume.path()},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs"},
        ]));
        fs::create_dir(dir.path().join("var")).unwrap();
        symlink("/run", dir.path().join("var/run")).unwrap();
        let mounts = spec.mounts().as_ref().unwrap();
        let real = |path: &str| without_links(mounts, &root, Path::new(path));
        for (path, expected) in [
            ("/two/link", "/one/file"),
            ("/two/sub/up", "/run/x"),
            ("/var/run/docker.sock", "/run/docker.sock"),
            ("/run/stub", "/run/stub"),
            ("/two/new/file", "/two/new/file"),
            ("/two", "/two"),
        ] {
            assert_eq!(real(path), Some(expected.into()), "{path}");
        }
        assert_eq!(real("/two/round"), None);
    }

    #[test]
    fn a_place_that_is_missing_in_a_read_only_volume_is_named() {
        let volume = tempfile::tempdir().unwrap();
        fs::create_dir(volume.path().join("there")).unwrap();
        for (option, place, is_possible) in [
            ("ro", "/vol/there", true),
            ("ro", "/vol/new", false),
            ("rw", "/vol/new", true),
            ("ro", "/vol", true),
        ] {
            let (_dir, _root, spec) = with_mounts(serde_json::json!([
                {"destination": "/vol", "type": "bind", "source": volume.path(), "options": [option]},
                {"destination": place, "type": "tmpfs", "source": "tmpfs"},
            ]));
            let checked = check_places(spec.mounts().as_ref().unwrap());
            assert_eq!(checked.is_ok(), is_possible, "{option} {place}");
            let said = checked.err().map(|error| error.to_string());
            assert!(said.is_none_or(|said| said.contains("/vol/new: the volume at /vol")));
        }
    }

    #[test]
    fn own_files_are_put_into_mounts() {
        let volume = tempfile::tempdir().unwrap();
        fs::write(volume.path().join("hosts"), "").unwrap();
        fs::write(volume.path().join("full"), "own").unwrap();
        symlink("/run/x", volume.path().join("link")).unwrap();
        symlink("full", volume.path().join("to-full")).unwrap();
        let (dir, root, spec) = with_mounts(serde_json::json!([
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/ro", "type": "tmpfs", "source": "tmpfs", "options": ["ro"]},
            {"destination": "/vol", "type": "bind", "source": volume.path()},
            {"destination": "/file", "type": "bind", "source": volume.path().join("full")},
        ]));
        let place = |path: &str| place_for(&spec, &root, Path::new(path), false);
        assert_eq!(place("/etc/hosts"), Some("/etc/hosts".into()));
        let target = "/run/stub/resolv.conf";
        assert_eq!(place("/etc/resolv.conf"), Some(target.into()));
        for good in ["/run/hosts", "/vol/hosts", "/vol/made"] {
            assert_eq!(place(good), Some(good.into()));
        }
        // systemd-resolved makes resolv.conf such a symbolic link, which a volume at /etc may contain.
        assert_eq!(place("/vol/link"), Some("/run/x".into()));
        let full = Path::new("/vol/to-full");
        assert_eq!(place_for(&spec, &root, full, false), None);
        assert_eq!(
            place_for(&spec, &root, full, true),
            Some("/vol/full".into())
        );
        assert!(volume.path().join("made").is_file() && !dir.path().join("vol").exists());
        for bad in ["/ro/hosts", "/vol/full", "/vol", "/run", "/file"] {
            assert_eq!(place(bad), None, "{bad}");
        }
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
