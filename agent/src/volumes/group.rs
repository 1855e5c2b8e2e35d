//! Group of a volume, as for `fsGroup` of Kubernetes: all files belong to the group and are readable and writable for it,
//! and new files in its directories inherit the group.

use anyhow::{Result, bail};
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, chownat, fchmod, fchown, fstat, open, openat, statat,
};
use std::os::fd::OwnedFd;
use std::path::Path;

const FLAGS: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::CLOEXEC);

/// Mode bits added to directories and files, as by the kubelet.
const DIRECTORY: Mode = Mode::RWXU.union(Mode::RWXG).union(Mode::SGID);
const FILE: Mode = Mode::RUSR
    .union(Mode::WUSR)
    .union(Mode::RGRP)
    .union(Mode::WGRP);

/// Maximum depth of nested directories, since each of them is kept open.
const MOST: usize = 512;

/// Sets the group of all files in a file system. With `trust_root`, nothing is done if the root already has the group and
/// its mode bits.
pub(super) fn give(root: &Path, group: Gid, trust_root: bool) -> Result<()> {
    let root = open(root, FLAGS | OFlags::DIRECTORY, Mode::empty())?;
    let stat = fstat(&root)?;
    let has = Mode::from_raw_mode(stat.st_mode).contains(DIRECTORY);
    if trust_root && has && stat.st_gid == group.as_raw() {
        return Ok(());
    }
    give_in(&root, group, MOST)?;
    // Last: the root's group means that all other files have it.
    give_one(&root, group, DIRECTORY)
}

fn give_one(file: &OwnedFd, group: Gid, wanted: Mode) -> Result<()> {
    let before = Mode::from_raw_mode(fstat(file)?.st_mode);
    fchown(file, None, Some(group))?;
    // The change of owner may have cleared bits of the mode.
    Ok(fchmod(
        file,
        (before & Mode::from_raw_mode(0o7777)) | wanted,
    )?)
}

fn give_in(directory: &OwnedFd, group: Gid, left: usize) -> Result<()> {
    if left == 0 {
        bail!("directories are nested more than {MOST} levels deep");
    }
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let inner = openat(directory, name, FLAGS | OFlags::DIRECTORY, Mode::empty())?;
                give_in(&inner, group, left - 1)?;
                give_one(&inner, group, DIRECTORY)?;
            }
            FileType::RegularFile => {
                let file = openat(directory, name, FLAGS, Mode::empty())?;
                give_one(&file, group, FILE)?;
            }
            // Symbolic links have no mode, and opening a special file may have side effects.
            _ => chownat(
                directory,
                name,
                None,
                Some(group),
                AtFlags::SYMLINK_NOFOLLOW,
            )?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    #[test]
    fn all_of_a_volume_is_its_groups() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("a/b")).unwrap();
        for (name, mode) in [("a/file", 0o600), ("a/b/program", 0o4755)] {
            fs::write(at(name), "").unwrap();
            fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        symlink("/etc/passwd", at("link")).unwrap();
        // Only root can set any group.
        let own = fs::metadata(dir.path()).unwrap();
        let group = if own.uid() == 0 { 3000 } else { own.gid() };
        give(dir.path(), Gid::from_raw(group), true).unwrap();
        for (name, mode) in [
            ("", 0o2770),
            ("a", 0o2775),
            ("a/b", 0o2775),
            ("a/file", 0o660),
            ("a/b/program", 0o4775),
        ] {
            let data = fs::symlink_metadata(at(name)).unwrap();
            let found = (data.gid(), data.mode() & 0o7777);
            // The permissions of others depend on the umask.
            assert_eq!((found.0, found.1 & !0o5), (group, mode & !0o5), "{name}");
        }
        let link = fs::symlink_metadata(at("link")).unwrap();
        assert_eq!(link.gid(), group);
        fs::set_permissions(at("a/file"), fs::Permissions::from_mode(0o600)).unwrap();
        let mode = || fs::metadata(at("a/file")).unwrap().mode() & 0o7777;
        give(dir.path(), Gid::from_raw(group), true).unwrap();
        assert_eq!(mode(), 0o600, "its root has it");
        give(dir.path(), Gid::from_raw(group), false).unwrap();
        assert_eq!(mode(), 0o660);
    }
}
