//! Location of a shared directory on the host, and nesting of shared directories.
//!
//! A directory has one dentry per file system in Linux, so a host directory must not be exported to a guest
//! twice: two containers would see it through two caches. Directories are compared by their paths on the host
//! and by their paths from the root of their file system, since a Kubernetes subPath is a bind mount of a
//! part of a volume that another container has as a whole.

use super::inodes::FileSystem;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, Statx, openat2};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// An entry of `/proc/PID/mountinfo` (proc_pid_mountinfo(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    id: u64,
    /// Device number of its file system.
    device: Vec<u8>,
    /// The directory of the file system that is mounted.
    root: PathBuf,
    /// The mount point.
    point: PathBuf,
    read_only: bool,
}

impl Mount {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|b| *b == b' ');
        let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        let device = fields.nth(1)?.to_owned();
        let root = unescaped(fields.next()?);
        let point = unescaped(fields.next()?);
        let mut options = fields.next()?.split(|b| *b == b',');
        Some(Self {
            id,
            device,
            root,
            point,
            read_only: options.any(|option| option == b"ro"),
        })
    }
}

/// Decodes space, tab, newline and backslash, which are written as backslash and three octal digits.
fn unescaped(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, after @ ..] = rest {
        let digits = after.get(..3).and_then(|d| std::str::from_utf8(d).ok());
        let code = digits.and_then(|d| u8::from_str_radix(d, 8).ok());
        match (first, code) {
            (b'\\', Some(code)) => {
                bytes.push(code);
                rest = &after[3..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

/// The mounts in the calling thread's namespace.
fn mounts() -> Option<Vec<Mount>> {
    let text = fs::read("/proc/thread-self/mountinfo").ok()?;
    let lines = text.split(|b| *b == b'\n').filter(|line| !line.is_empty());
    lines.map(Mount::parse).collect()
}

/// Location of a directory on the host at the time when it was shared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    /// Its path, without symbolic links.
    path: PathBuf,
    /// The mount that contains it.
    mount: u64,
    /// Its path from the root of its file system.
    in_file_system: PathBuf,
    file_system: FileSystem,
    inode: u64,
    /// Whether the host's mount is read-only, regardless of the share's options.
    on_read_only_mount: bool,
    /// Mounts below it, by path relative to it.
    submounts: BTreeMap<PathBuf, Submount>,
}

/// A mount below a directory. The host reuses mount IDs.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Submount {
    id: u64,
    device: Vec<u8>,
    root: PathBuf,
}

impl Origin {
    /// The location of the directory that a descriptor on the host's own mount refers to. `None` if the host
    /// can't tell; the directory is then treated as separate from all others.
    pub(super) fn of(directory: impl AsFd, stat: &Statx) -> Option<Self> {
        let link = format!("/proc/self/fd/{}", directory.as_fd().as_raw_fd());
        let path = fs::read_link(link).ok()?;
        // The path of a directory that was removed, or that is outside this process's root, leads nowhere.
        let there = super::inodes::stat(
            openat2(
                CWD,
                &path,
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
                ResolveFlags::NO_SYMLINKS,
            )
            .ok()?,
        );
        if identity(&there.ok()?) != identity(stat) {
            return None;
        }
        Self::among(&mounts()?, path, stat)
    }

    fn among(mounts: &[Mount], path: PathBuf, stat: &Statx) -> Option<Self> {
        let own = mounts.iter().find(|mount| mount.id == stat.stx_mnt_id)?;
        let below = |mount: &Mount| {
            let rest = mount.point.strip_prefix(&path).ok()?;
            let is_below = mount.id != own.id && !rest.as_os_str().is_empty();
            let submount = || Submount {
                id: mount.id,
                device: mount.device.clone(),
                root: mount.root.clone(),
            };
            is_below.then(|| (rest.to_owned(), submount()))
        };
        // Of several mounts at one path, the last is visible.
        let submounts = mounts.iter().filter_map(below).collect();
        let (file_system, inode) = identity(stat);
        Some(Self {
            in_file_system: own.root.join(path.strip_prefix(&own.point).ok()?),
            path,
            mount: own.id,
            file_system,
            inode,
            on_read_only_mount: own.read_only,
            submounts,
        })
    }

    /// The paths below this directory at which `inner` may be found with the same files and the same mounts.
    /// If both are `live`, they follow the host's mounts and need not be compared.
    fn paths_to(&self, inner: &Self, live: bool) -> Vec<PathBuf> {
        let mut found = Vec::new();
        if self.on_read_only_mount != inner.on_read_only_mount {
            return found;
        }
        if let Ok(rest) = inner.path.strip_prefix(&self.path)
            && (live || self.has_same_mounts(rest, inner))
        {
            found.push(rest.to_owned());
        }
        if self.file_system == inner.file_system
            && let Ok(rest) = inner.in_file_system.strip_prefix(&self.in_file_system)
            && inner.submounts.is_empty()
            && !self.submounts.keys().any(|at| at.starts_with(rest))
            && !found.iter().any(|known| known == rest)
        {
            found.push(rest.to_owned());
        }
        found
    }

    /// Whether `inner`, at `rest` below this directory, is on the mount that is visible there, and has the
    /// same mounts below.
    fn has_same_mounts(&self, rest: &Path, inner: &Self) -> bool {
        let above = self.submounts.iter().filter(|(at, _)| rest.starts_with(at));
        let own = above.max_by_key(|(at, _)| at.components().count());
        let own = own.map_or(self.mount, |(_, submount)| submount.id);
        let below = self.submounts.iter().filter_map(|(at, submount)| {
            let at = at.strip_prefix(rest).ok()?;
            (!at.as_os_str().is_empty()).then_some((at, submount))
        });
        let wanted = inner.submounts.iter().map(|(at, s)| (at.as_path(), s));
        own == inner.mount && below.eq(wanted)
    }

    /// Whether the host's mount is read-only.
    pub(super) fn on_read_only_mount(&self) -> bool {
        self.on_read_only_mount
    }

    /// Whether anything is mounted below it.
    pub(super) fn has_submounts(&self) -> bool {
        !self.submounts.is_empty()
    }

    /// Looks for `inner` below this directory, whose descriptor on an export's mount is `root`: returns the
    /// path and the descriptor there. If both are `live`, they follow the host's mounts.
    pub(super) fn find(
        &self,
        root: impl AsFd,
        inner: &Self,
        live: bool,
    ) -> Option<(PathBuf, OwnedFd)> {
        self.paths_to(inner, live).into_iter().find_map(|path| {
            let fd = open_below(&root, &path).ok()?;
            let stat = super::inodes::stat(&fd).ok()?;
            (identity(&stat) == (inner.file_system, inner.inode)).then_some((path, fd))
        })
    }
}

fn identity(stat: &Statx) -> (FileSystem, u64) {
    ((stat.stx_dev_major, stat.stx_dev_minor, 0), stat.stx_ino)
}

/// Opens a directory by its path below another, without following symbolic links.
fn open_below(root: impl AsFd, path: &Path) -> Result<OwnedFd, Errno> {
    if path.as_os_str().is_empty() {
        return rustix::io::fcntl_dupfd_cloexec(root, 0);
    }
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(root, path, flags, Mode::empty(), resolve)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn submount(id: u64) -> Submount {
        Submount {
            id,
            device: b"0:50".to_vec(),
            root: "/".into(),
        }
    }

    fn origin(path: &str, in_file_system: &str, submounts: &[(u64, &str)]) -> Origin {
        Origin {
            path: path.into(),
            mount: 1,
            in_file_system: in_file_system.into(),
            file_system: (8, 1, 0),
            inode: 1,
            on_read_only_mount: false,
            submounts: submounts
                .iter()
                .map(|(id, at)| (at.into(), submount(*id)))
                .collect(),
        }
    }

    fn paths(outer: &Origin, inner: &Origin) -> Vec<String> {
        let paths = outer.paths_to(inner, false).into_iter();
        paths.map(|path| path.display().to_string()).collect()
    }

    #[test]
    fn a_line_of_the_mount_table_is_read() {
        let line = b"36 35 98:0 /mnt\\040one /m\\134t ro,noatime master:1 - ext3 /dev/root rw";
        let mount = Mount::parse(line).unwrap();
        assert_eq!(mount.id, 36);
        assert_eq!(mount.root, Path::new("/mnt one"));
        assert_eq!(mount.point, Path::new("/m\\t"));
        assert!(mount.read_only);
        assert_eq!(Mount::parse(b"36 35 98:0"), None);
        assert!(
            mounts()
                .unwrap()
                .iter()
                .any(|mount| mount.point == Path::new("/"))
        );
    }

    #[test]
    fn one_directory_lies_in_another_by_its_path() {
        let outer = origin("/srv", "/data", &[]);
        assert_eq!(
            paths(&outer, &origin("/srv/a/b", "/data/a/b", &[])),
            ["a/b"]
        );
        assert_eq!(paths(&outer, &outer), [""]);
        assert!(paths(&outer, &origin("/srv2", "/data2", &[])).is_empty());
        assert!(paths(&origin("/srv/a", "/data/a", &[]), &outer).is_empty());
    }

    #[test]
    fn one_directory_lies_in_another_by_its_file_system() {
        let whole = origin("/pods/u/volumes/v", "/pods/u/volumes/v", &[]);
        let sub = origin("/pods/u/subpaths/v/0", "/pods/u/volumes/v/sub", &[]);
        assert_eq!(paths(&whole, &sub), ["sub"]);
        let mut elsewhere = sub.clone();
        elsewhere.file_system = (8, 2, 0);
        assert!(paths(&whole, &elsewhere).is_empty());
        // A user of a read-only mount must not get access to the writable one.
        let mut read_only = sub;
        read_only.on_read_only_mount = true;
        assert!(paths(&whole, &read_only).is_empty());
    }

    #[test]
    fn mounts_below_must_be_the_same() {
        let outer = origin("/srv", "/srv", &[(7, "a/m"), (8, "b")]);
        assert_eq!(
            paths(&outer, &origin("/srv/a", "/srv/a", &[(7, "m")])),
            ["a"]
        );
        assert!(paths(&outer, &origin("/srv/a", "/srv/a", &[])).is_empty());
        assert!(paths(&outer, &origin("/srv/a", "/srv/a", &[(9, "m")])).is_empty());
        assert_eq!(paths(&outer, &origin("/srv/c", "/srv/c", &[])), ["c"]);
        // Another file system, although its mount reuses the ID of the one before.
        let mut replaced = origin("/srv/a", "/srv/a", &[(7, "m")]);
        replaced.submounts.get_mut(Path::new("m")).unwrap().device = b"0:51".to_vec();
        assert!(paths(&outer, &replaced).is_empty());
        assert_eq!(
            outer.paths_to(&replaced, true).len(),
            1,
            "the host's, at any time"
        );
        // Bind-mounted on itself since then.
        let mut own = origin("/srv/c", "/elsewhere", &[]);
        own.mount = 9;
        assert!(paths(&outer, &own).is_empty());
        // Through another mount of the same directory, without the submount that is here.
        assert!(paths(&outer, &origin("/mnt/b", "/srv/b", &[])).is_empty());
    }

    #[test]
    fn a_directory_is_found_below_another() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        std::os::unix::fs::symlink("a", dir.path().join("link")).unwrap();
        let open = |path: &Path| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::openat(CWD, path, flags, Mode::empty()).unwrap()
        };
        let origin = |path: &Path| {
            let fd = open(path);
            Origin::of(&fd, &super::super::inodes::stat(&fd).unwrap()).unwrap()
        };
        let outer = origin(dir.path());
        let inner = origin(&dir.path().join("link/b"));
        let root = open(dir.path());
        let (path, fd) = outer.find(&root, &inner, false).unwrap();
        assert_eq!(path, Path::new("a/b"));
        assert_eq!(super::super::inodes::stat(fd).unwrap().stx_ino, inner.inode);
        // Another directory has taken its name meanwhile.
        fs::rename(dir.path().join("a"), dir.path().join("c")).unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        assert!(outer.find(&root, &inner, false).is_none());
    }

    #[test]
    fn a_removed_directory_has_no_location() {
        let dir = tempfile::tempdir().unwrap();
        let fd = rustix::fs::openat(CWD, dir.path(), OFlags::PATH, Mode::empty()).unwrap();
        let stat = super::super::inodes::stat(&fd).unwrap();
        dir.close().unwrap();
        assert_eq!(Origin::of(&fd, &stat), None);
    }
}
