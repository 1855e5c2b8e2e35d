//! What a container finds in its root that the root does not have: files of the guest, and the working
//! directory. A root is not trusted: no link in it leads out of it.

use crate::configuration;
use crate::helper::bundle;
use anyhow::{Context, Result};
use koya_protocol::messages;
use oci_spec::runtime::Spec;
use rustix::fs::{
    CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, fchown, fstat, mkdirat, openat, openat2,
};
use rustix::io::Errno;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

const PATH_ONLY: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

/// Whether it is known without a look at its root that a container has all of it.
pub(crate) fn lacks_nothing(spec: &Spec, files: &[messages::File]) -> bool {
    let process = spec.process().as_ref();
    files.is_empty() && process.is_none_or(|process| process.cwd() == Path::new("/"))
}

/// Adds to a container's configuration what its root lacks.
///
/// # Errors
/// If the guest has no room. Where nothing can be put into the root, the container does without.
pub(crate) fn complete(id: &str, mut spec: Spec, files: &[messages::File]) -> Result<Spec> {
    let Some(path) = spec.root().as_ref().map(|root| root.path().clone()) else {
        return Ok(spec);
    };
    let root = openat(CWD, &path, PATH_ONLY | OFlags::DIRECTORY, Mode::empty())
        .with_context(|| format!("cannot open the root file system {}", path.display()))?;
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

/// Whether one of the container's mounts is what it has at this path.
fn is_mounted_over(spec: &Spec, path: &Path) -> bool {
    let mut mounts = spec.mounts().iter().flatten();
    mounts.any(|mount| path.starts_with(mount.destination()))
}

/// Whether a directory is known to be there once the container's mounts are.
fn is_there(spec: &Spec, root: &OwnedFd, path: &Path) -> bool {
    let mounts = spec.mounts().iter().flatten();
    let around = mounts.filter(|mount| path.starts_with(mount.destination()));
    // The deepest, and of several at one place the last.
    let Some(mount) = around.max_by_key(|mount| mount.destination().components().count()) else {
        return is_directory(root, path);
    };
    let within = path.strip_prefix(mount.destination()).unwrap_or(path);
    if within.as_os_str().is_empty() {
        return true;
    }
    let source = mount
        .source()
        .as_ref()
        .filter(|_| mount.typ().as_deref() == Some("bind"));
    let source = source.and_then(|source| openat(CWD, source, PATH_ONLY, Mode::empty()).ok());
    source.is_some_and(|source| is_directory(&source, within))
}

fn open(root: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    openat2(root, path, PATH_ONLY, Mode::empty(), ResolveFlags::IN_ROOT)
}

fn is_directory(root: &OwnedFd, path: &Path) -> bool {
    let found = open(root, path).and_then(|found| fstat(&found));
    found.is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::Directory)
}

/// Whether there is an empty file, as container engines leave them; or one could be made.
fn can_be_mounted_over(root: &OwnedFd, path: &Path) -> bool {
    match open(root, path).and_then(|found| fstat(&found)) {
        Ok(found) => {
            FileType::from_raw_mode(found.st_mode) == FileType::RegularFile && found.st_size == 0
        }
        Err(Errno::NOENT) => make_file(root, path).is_ok(),
        Err(_) => false,
    }
}

fn make_file(root: &OwnedFd, path: &Path) -> rustix::io::Result<()> {
    let name = path.file_name().ok_or(Errno::INVAL)?;
    let directory = make_directories(root, path.parent().ok_or(Errno::INVAL)?, None)?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::WRONLY;
    // A link that leads nowhere is the root's own affair.
    openat(directory, name, flags, Mode::from_raw_mode(0o644)).map(drop)
}

/// Makes what is missing of a directory; the last one gets this owner, where it may.
fn make_directories(
    root: &OwnedFd,
    path: &Path,
    owner: Option<(u32, u32)>,
) -> rustix::io::Result<OwnedFd> {
    let mut names = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => names.push(name),
            Component::ParentDir => drop(names.pop()),
            _ => {}
        }
    }
    let mut whole = PathBuf::from("/");
    let mut parent = open(root, &whole)?;
    let last = names.len();
    for (index, name) in names.into_iter().enumerate() {
        whole.push(name);
        parent = match open(root, &whole) {
            Err(Errno::NOENT) => {
                match mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
                    // Another container of the same root was first, or a link leads nowhere.
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(error),
                }
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let made = openat(&parent, name, flags, Mode::empty())?;
                if let Some((uid, gid)) = owner.filter(|_| index + 1 == last) {
                    // A host's directory may be another user's to give.
                    fchown(&made, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).ok();
                }
                made
            }
            found => found?,
        };
    }
    Ok(parent)
}

/// Makes the working directory in a root whose mounts are there, for this user.
pub(crate) fn make_working_directory(root: &str, path: &str, owner: (u32, u32)) -> Result<()> {
    let root = openat(CWD, root, PATH_ONLY | OFlags::DIRECTORY, Mode::empty())?;
    make_directories(&root, Path::new(path), Some(owner))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    fn root_of(dir: &Path) -> OwnedFd {
        openat(CWD, dir, PATH_ONLY | OFlags::DIRECTORY, Mode::empty()).unwrap()
    }

    #[test]
    fn a_file_goes_where_there_is_none_or_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        let root = root_of(dir.path());
        let can = |path: &str| can_be_mounted_over(&root, Path::new(path));
        assert!(can("/etc/hosts"));
        assert_eq!(fs::read(dir.path().join("etc/hosts")).unwrap(), b"");
        assert!(can("/etc/hosts"));
        fs::write(dir.path().join("etc/own"), "127.0.0.1").unwrap();
        assert!(!can("/etc/own"));
        symlink("/nowhere", dir.path().join("etc/link")).unwrap();
        assert!(!can("/etc/link") && !can("/etc"));
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
        let root = root_of(dir.path());
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
        // Who is not root gives nothing away.
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
        assert!(make_working_directory(root, "/out/x", (uid, gid)).is_err());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }
}
