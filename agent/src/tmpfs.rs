//! tmpfs mounts that begin with a copy of the covered directory (`tmpcopyup`). Each is created before the container, among
//! its volumes, and the container's mount becomes a bind mount of it. In a root that the host does not mount, tmpfs mounts
//! without a mode get that of the covered directory, which the host does for other roots.

use crate::configuration::{self, is_bind};
use crate::volumes;
use anyhow::{Context, Result};
use koya_protocol::COPY_UP;
use koya_rootfs::{Rootfs, has_mode_option, memory_mode};
use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Uid, chmodat, chownat, mkdirat,
    mknodat, open, openat, openat2, readlinkat, statat, symlinkat,
};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

const DIRECTORY: OFlags = OFlags::DIRECTORY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Whether a container has such a mount, as far as is known without accessing its root.
pub(crate) fn concerns(spec: &Spec, is_image: bool) -> bool {
    let mut mounts = spec.mounts().iter().flatten();
    mounts.any(|mount| is_tmpfs(mount) && (is_image || copies(mount)))
}

/// Creates the tmpfs mounts, and adapts the configuration.
///
/// # Errors
/// The mount that can't be made, for example because the contents exceed its size.
pub(crate) fn prepare(id: &str, mut spec: Spec) -> Result<Spec> {
    let root = spec.root().as_ref().context("no root")?.path().clone();
    let root = Rootfs::open(&root).context("cannot open the root file system")?;
    let owner = configuration::guest_root(&spec);
    let has_mapped_users = owner != (Uid::ROOT, Gid::ROOT);
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for index in 0..mounts.len() {
        let (earlier, later) = mounts.split_at_mut(index);
        let mount = &mut later[0];
        if !is_tmpfs(mount) {
            continue;
        }
        let covered = covered(mount.destination(), earlier, &root);
        let mut options = mount.options().clone().unwrap_or_default();
        if !has_mode_option(&options) {
            options.push(memory_mode(covered.as_ref())?);
        }
        let is_copy = copies(mount);
        options.retain(|option| option != COPY_UP);
        if let (true, Some(covered)) = (is_copy, &covered) {
            let place = mount.destination().display();
            let number = u32::try_from(index)?;
            let (made, left) = volumes::mount_memory(id, number, &options)
                .with_context(|| format!("cannot mount a tmpfs for {place}"))?;
            let to = open(&made, DIRECTORY, Mode::empty())?;
            if has_mapped_users {
                rustix::fs::fchown(&to, Some(owner.0), Some(owner.1))?;
            }
            copy_all(covered, &to).with_context(|| format!("{COPY_UP} of {place}"))?;
            mount.set_typ(Some("bind".into()));
            mount.set_source(Some(made));
            options = left;
            options.push("bind".into());
        }
        mount.set_options(Some(options));
    }
    spec.set_mounts(Some(mounts));
    Ok(spec)
}

fn is_tmpfs(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("tmpfs") && !is_bind(mount)
}

fn copies(mount: &Mount) -> bool {
    let mut options = mount.options().iter().flatten();
    is_tmpfs(mount) && options.any(|option| option == COPY_UP)
}

/// The directory that a mount covers, if there is one.
fn covered(place: &Path, earlier: &[Mount], root: &Rootfs) -> Option<OwnedFd> {
    let around = earlier
        .iter()
        .rfind(|mount| place.starts_with(mount.destination()));
    let found = match around {
        None => root.find(place),
        Some(mount) => {
            let source = mount.source().as_ref().filter(|_| is_bind(mount))?;
            let within = place.strip_prefix(mount.destination()).ok()?;
            Rootfs::open(source).and_then(|source| source.find(within))
        }
    };
    let readable = found.and_then(|found| openat(found, ".", DIRECTORY, Mode::empty()));
    readable.ok()
}

/// Copies the contents of a directory with types, owners and modes. Neither tree is trusted: no link is followed.
fn copy_all(from: &OwnedFd, to: &OwnedFd) -> Result<()> {
    let mut left = vec![PathBuf::new()];
    while let Some(directory) = left.pop() {
        let shown = || format!("/{}", directory.display());
        let from = open_within(from, &directory).with_context(shown)?;
        let to = open_within(to, &directory).with_context(shown)?;
        for entry in Dir::read_from(&from).with_context(shown)? {
            let entry = entry.with_context(shown)?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if matches!(name.as_bytes(), b"." | b"..") {
                continue;
            }
            let is_directory = copy(&from, &to, name)
                .with_context(|| format!("/{}", directory.join(name).display()))?;
            if is_directory {
                left.push(directory.join(name));
            }
        }
    }
    Ok(())
}

fn open_within(root: &OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    if path.as_os_str().is_empty() {
        return openat(root, ".", DIRECTORY, Mode::empty());
    }
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    openat2(root, path, DIRECTORY, Mode::empty(), resolve)
}

/// Copies one entry, without the contents of a directory; returns whether it is one.
fn copy(from: &OwnedFd, to: &OwnedFd, name: &OsStr) -> Result<bool> {
    let found = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let kind = FileType::from_raw_mode(found.st_mode);
    match kind {
        FileType::Directory => mkdirat(to, name, Mode::RWXU)?,
        FileType::RegularFile => copy_file(from, to, name)?,
        FileType::Symlink => symlinkat(readlinkat(from, name, Vec::new())?, to, name)?,
        _ => mknodat(to, name, kind, Mode::RUSR, found.st_rdev)?,
    }
    give(to, name, &found)?;
    Ok(kind == FileType::Directory)
}

fn copy_file(from: &OwnedFd, to: &OwnedFd, name: &OsStr) -> Result<()> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let source = openat(from, name, flags | OFlags::RDONLY, Mode::empty())?;
    let new = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let copy = openat(to, name, new, Mode::RUSR | Mode::WUSR)?;
    std::io::copy(&mut File::from(source), &mut File::from(copy))?;
    Ok(())
}

/// The owner first: changing it clears set-user-ID bits.
fn give(directory: impl AsFd, name: &OsStr, like: &Stat) -> Result<(), Errno> {
    let owner = (Uid::from_raw(like.st_uid), Gid::from_raw(like.st_gid));
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    chownat(&directory, name, Some(owner.0), Some(owner.1), flags)?;
    if FileType::from_raw_mode(like.st_mode) == FileType::Symlink {
        return Ok(());
    }
    let mode = Mode::from_raw_mode(like.st_mode & 0o7777);
    chmodat(directory, name, mode, AtFlags::empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

    #[test]
    fn a_copy_has_kinds_owners_modes_and_content() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let at = |name: &str| from.path().join(name);
        fs::create_dir_all(at("a/b/c")).unwrap();
        fs::set_permissions(at("a/b"), fs::Permissions::from_mode(0o1770)).unwrap();
        fs::write(at("a/b/file"), "content").unwrap();
        std::os::unix::fs::chown(at("a/b/file"), Some(7), Some(8)).unwrap();
        fs::set_permissions(at("a/b/file"), fs::Permissions::from_mode(0o4751)).unwrap();
        symlink("/nowhere", at("link")).unwrap();
        mknodat(
            rustix::fs::CWD,
            at("fifo"),
            FileType::Fifo,
            Mode::RUSR | Mode::WUSR,
            0,
        )
        .unwrap();
        let opened = |dir: &tempfile::TempDir| open(dir.path(), DIRECTORY, Mode::empty()).unwrap();
        copy_all(&opened(&from), &opened(&to)).unwrap();
        for name in ["a", "a/b", "a/b/c", "a/b/file", "link", "fifo"] {
            let (old, new) = (at(name), to.path().join(name));
            let (old, new) = (old.symlink_metadata(), new.symlink_metadata());
            let (old, new) = (old.unwrap(), new.unwrap());
            assert_eq!(
                (old.mode(), old.uid(), old.gid()),
                (new.mode(), new.uid(), new.gid()),
                "{name}"
            );
        }
        assert_eq!(fs::read(to.path().join("a/b/file")).unwrap(), b"content");
        let link = fs::read_link(to.path().join("link")).unwrap();
        assert_eq!(link, Path::new("/nowhere"));
        // Existing files are not overwritten.
        assert!(copy_all(&opened(&from), &opened(&to)).is_err());
    }

    #[test]
    fn what_a_mount_covers_may_be_in_an_earlier_one() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("root/x/y")).unwrap();
        fs::create_dir_all(dir.path().join("other/y/z")).unwrap();
        let root = Rootfs::open(&dir.path().join("root")).unwrap();
        let mount = |kind: &str, at: &str, source: &Path| {
            let mut mount = Mount::default();
            mount.set_destination(at.into());
            mount.set_typ(Some(kind.into()));
            mount.set_source(Some(source.into()));
            mount
        };
        let is_there =
            |place: &str, earlier: &[Mount]| covered(Path::new(place), earlier, &root).is_some();
        assert!(is_there("/x/y", &[]) && !is_there("/x/y/z", &[]));
        let bind = mount("bind", "/x", &dir.path().join("other"));
        assert!(is_there("/x/y/z", std::slice::from_ref(&bind)));
        // The type of a bind mount is ignored.
        let mut by_option = mount("none", "/x", &dir.path().join("other"));
        by_option.set_options(Some(vec!["rbind".into()]));
        assert!(is_there("/x/y/z", &[by_option]));
        let tmpfs = mount("tmpfs", "/x", Path::new("tmpfs"));
        assert!(!is_there("/x/y", &[bind, tmpfs]));
    }
}
