//! Paths in a container's root file system, which is not trusted: symbolic links cannot lead out of it.
//!
//! The host creates mount points in roots that are directories of the host, and the agent in roots that only the guest can
//! open; both look up files there, and read some.

use rustix::fs::{
    CWD, FileType, Mode, OFlags, ResolveFlags, StatVfs, StatVfsMountFlags, fchmod, fstat, fstatvfs,
    mkdirat, openat, openat2, readlinkat, symlinkat,
};
use rustix::io::{Errno, Result};
use rustix::mount::{MountFlags, mount_remount};
use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

const PATH_ONLY: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

/// Maximum number of links in one path, as in the kernel. In a path to be created, only dangling ones count.
const LINKS: usize = 40;

/// Maximum number of components of one path that may be created concurrently by others.
const RACES: usize = 64;

/// Mode of a tmpfs that covers nothing: the kernel's default.
const MEMORY_MODE: u32 = 0o1777;

/// Whether the options of a tmpfs set its mode.
pub fn has_mode_option(options: &[String]) -> bool {
    let mut all = options.iter().flat_map(|option| option.split(','));
    all.any(|option| option.starts_with("mode="))
}

/// Whether the options of a mount make it read-only: of `ro` and `rw` the last one counts, as with mount(8), unless one of
/// their recursive forms is there.
pub fn says_read_only(options: &[String]) -> bool {
    let last = |yes: &str, no: &str| {
        let mut words = options.iter().rev().map(String::as_str);
        let word = words.find(|word| *word == yes || *word == no);
        word.map(|word| word == yes)
    };
    let recursive = last("rro", "rrw");
    recursive.or_else(|| last("ro", "rw")).unwrap_or(false)
}

/// A path from the root without `.` and `..`, which are removed lexically, as runc does in places that do not exist yet.
pub fn plain(path: &Path) -> PathBuf {
    Path::new("/").join(plain_names(path).iter().collect::<PathBuf>())
}

/// The mode option for a tmpfs without one: that of the covered directory. If it covers nothing, it is the kernel's default,
/// since the mount point that is created for it would have another one.
///
/// # Errors
/// If it does not cover a directory.
pub fn memory_mode(covered: Option<&OwnedFd>) -> Result<String> {
    let mode = match covered.map(fstat).transpose()? {
        Some(found) if FileType::from_raw_mode(found.st_mode) == FileType::Directory => {
            found.st_mode & 0o7777
        }
        Some(_) => return Err(Errno::NOTDIR),
        None => MEMORY_MODE,
    };
    Ok(format!("mode={mode:04o}"))
}

/// Kind of file to create.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An empty file, mode 0644.
    File,
    /// An empty directory, mode 0755, with the set-group-ID bit of its parent directory.
    Directory,
}

impl Kind {
    /// The kind of an open file: everything except a directory counts as a file.
    ///
    /// # Errors
    /// The error from `fstat(2)`.
    pub fn of(found: &OwnedFd) -> Result<Self> {
        Ok(match FileType::from_raw_mode(fstat(found)?.st_mode) {
            FileType::Directory => Self::Directory,
            _ => Self::File,
        })
    }
}

/// An open root file system.
#[derive(Debug)]
pub struct Rootfs(OwnedFd);

impl Rootfs {
    /// Opens the root file system in this directory.
    ///
    /// # Errors
    /// The error from the kernel.
    pub fn open(directory: &Path) -> Result<Self> {
        let flags = PATH_ONLY | OFlags::DIRECTORY;
        openat(CWD, directory, flags, Mode::empty()).map(Self)
    }

    /// The root file system in an open directory, which may be `O_PATH`.
    pub fn of(directory: OwnedFd) -> Self {
        Self(directory)
    }

    /// Opens a path with `O_PATH`, for `fstat` and similar calls.
    ///
    /// # Errors
    /// The error from `openat2(2)` with `RESOLVE_IN_ROOT`.
    pub fn find(&self, path: &Path) -> Result<OwnedFd> {
        openat2(
            &self.0,
            path,
            PATH_ONLY,
            Mode::empty(),
            ResolveFlags::IN_ROOT,
        )
    }

    /// The target of a symbolic link; `None` for anything else.
    pub fn link(&self, path: &Path) -> Option<PathBuf> {
        let flags = PATH_ONLY | OFlags::NOFOLLOW;
        let found = openat2(&self.0, path, flags, Mode::empty(), ResolveFlags::IN_ROOT).ok()?;
        let target = readlinkat(&found, "", Vec::new()).ok()?;
        Some(PathBuf::from(OsStr::from_bytes(target.as_bytes())))
    }

    /// The path of an existing file in the root without links.
    ///
    /// # Errors
    /// As for [`find`](Self::find).
    pub fn resolve(&self, path: &Path) -> Result<PathBuf> {
        let name = |fd: &OwnedFd| readlinkat(CWD, path_of(fd), Vec::new());
        let (found, root) = (name(&self.find(path)?)?, name(&self.0)?);
        let root = Path::new(OsStr::from_bytes(root.as_bytes()));
        let found = Path::new(OsStr::from_bytes(found.as_bytes()));
        let within = found.strip_prefix(root).map_err(|_| Errno::NOENT)?;
        Ok(Path::new("/").join(within))
    }

    /// The kind of file at a path.
    ///
    /// # Errors
    /// As for [`find`](Self::find).
    pub fn kind(&self, path: &Path) -> Result<Kind> {
        Kind::of(&self.find(path)?)
    }

    /// Whether there is a directory at a path.
    pub fn is_directory(&self, path: &Path) -> bool {
        self.kind(path) == Ok(Kind::Directory)
    }

    /// Creates a path if missing, including parent directories, and opens the last component if it was created. For a
    /// dangling link, its target is created, as runc does. Existing files of any kind are left as they are. Others may
    /// create the same path concurrently.
    ///
    /// # Errors
    /// The reason why it can't be created.
    pub fn make(&self, path: &Path, kind: Kind) -> Result<Option<OwnedFd>> {
        let mut made = Err(Errno::EXIST);
        for _ in 0..RACES {
            made = self.make_unless_raced(path, kind);
            if !matches!(made, Err(Errno::EXIST)) {
                break;
            }
        }
        made
    }

    /// Creates a symbolic link, including parent directories, unless there is one with the same target.
    ///
    /// # Errors
    /// The reason why it can't be created: EEXIST for another file at the path.
    pub fn make_link(&self, path: &Path, target: &Path) -> Result<()> {
        let (parent, name) = path.parent().zip(path.file_name()).ok_or(Errno::EXIST)?;
        self.make(parent, Kind::Directory)?;
        match symlinkat(target, self.find(parent)?, name) {
            Err(Errno::EXIST) if self.link(path).as_deref() == Some(target) => Ok(()),
            made => made,
        }
    }

    fn make_unless_raced(&self, path: &Path, kind: Kind) -> Result<Option<OwnedFd>> {
        match self.find(path) {
            Err(Errno::NOENT) => {}
            other => return other.map(|_| None),
        }
        let mut left = VecDeque::from(plain_names(path));
        let (mut done, mut links, mut made) = (PathBuf::from("/"), 0, None);
        while let Some(name) = left.pop_front() {
            let parent = self.find(&done)?;
            done.push(&name);
            match self.find(&done) {
                Err(Errno::NOENT) => {}
                found => {
                    found?;
                    continue;
                }
            }
            if let Ok(target) = readlinkat(&parent, &name, Vec::new()) {
                links += 1;
                if links > LINKS {
                    return Err(Errno::LOOP);
                }
                let target = Path::new(OsStr::from_bytes(target.as_bytes()));
                done.pop();
                if target.is_absolute() {
                    done = PathBuf::from("/");
                }
                for component in target.components().rev() {
                    match component {
                        Component::Normal(name) => left.push_front(name.to_owned()),
                        Component::ParentDir => left.push_front("..".into()),
                        _ => {}
                    }
                }
            } else if left.is_empty() && kind == Kind::File {
                made = Some(make_file(&parent, &name)?);
            } else {
                made = Some(make_directory(&parent, &name)?);
            }
        }
        Ok(made)
    }
}

/// A path by which this process can open the file of a descriptor again, or mount from it or on it, while the descriptor is
/// open.
pub fn path_of(file: &OwnedFd) -> PathBuf {
    Path::new("/proc/self/fd").join(file.as_raw_fd().to_string())
}

/// The first `limit` bytes of a file that was [found](Rootfs::find); `None` if it is not a regular file. Opening other kinds
/// could block, or have effects on a device.
///
/// # Errors
/// If it can't be opened or read.
pub fn read(found: &OwnedFd, limit: u64) -> io::Result<Option<Vec<u8>>> {
    if FileType::from_raw_mode(fstat(found)?.st_mode) != FileType::RegularFile {
        return Ok(None);
    }
    let file = File::open(path_of(found))?;
    let mut content = Vec::new();
    file.take(limit).read_to_end(&mut content)?;
    Ok(Some(content))
}

/// Makes a mount read-only, given its open root.
///
/// # Errors
/// The error from mount(2).
pub fn make_read_only(mount: &OwnedFd) -> Result<()> {
    let flags = MountFlags::BIND | MountFlags::RDONLY | kept_flags(&fstatvfs(mount)?);
    mount_remount(path_of(mount), flags, "")
}

/// The current flags of a mount, which a remount would clear if they were not repeated.
fn kept_flags(found: &StatVfs) -> MountFlags {
    use StatVfsMountFlags as Has;
    let all = [
        (Has::NOSUID, MountFlags::NOSUID),
        (Has::NODEV, MountFlags::NODEV),
        (Has::NOEXEC, MountFlags::NOEXEC),
        (Has::NOATIME, MountFlags::NOATIME),
        (Has::NODIRATIME, MountFlags::NODIRATIME),
        (Has::RELATIME, MountFlags::RELATIME),
    ];
    let has = all
        .into_iter()
        .filter(|(has, _)| found.f_flag.contains(*has));
    has.map(|(_, flag)| flag).collect()
}

/// A path without links, where `link` gives the target of a path that is one. `None` if there is no end of links.
pub fn without_links(path: &Path, link: impl Fn(&Path) -> Option<PathBuf>) -> Option<PathBuf> {
    let mut left: Vec<_> = path.iter().rev().map(OsStr::to_owned).collect();
    let (mut done, mut links) = (PathBuf::from("/"), 0);
    while let Some(name) = left.pop() {
        match Path::new(&name).components().next() {
            Some(Component::Normal(name)) => done.push(name),
            Some(Component::ParentDir) => {
                done.pop();
                continue;
            }
            _ => continue,
        }
        let Some(target) = link(&done) else {
            continue;
        };
        links += 1;
        if links > LINKS {
            return None;
        }
        done.pop();
        if target.is_absolute() {
            done = PathBuf::from("/");
        }
        left.extend(target.iter().rev().map(OsStr::to_owned));
    }
    Some(done)
}

/// The components of a path from the root, with `..` removed lexically, as in mount destinations.
fn plain_names(path: &Path) -> Vec<OsString> {
    let mut names = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => names.push(name.to_owned()),
            Component::ParentDir => drop(names.pop()),
            _ => {}
        }
    }
    names
}

// The caller's umask must not apply: other users in the container may need access.

fn make_file(parent: &OwnedFd, name: &OsStr) -> Result<OwnedFd> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::WRONLY;
    let made = openat(parent, name, flags, Mode::RUSR | Mode::WUSR)?;
    fchmod(&made, Mode::from_raw_mode(0o644))?;
    Ok(made)
}

fn make_directory(parent: &OwnedFd, name: &OsStr) -> Result<OwnedFd> {
    mkdirat(parent, name, Mode::RWXU)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = openat(parent, name, flags, Mode::empty())?;
    // The bit is inherited on creation, and would be cleared by setting a mode without it.
    let inherited = Mode::from_raw_mode(fstat(&made)?.st_mode) & Mode::SGID;
    fchmod(&made, Mode::from_raw_mode(0o755) | inherited)?;
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn of_contradicting_options_the_last_one_counts() {
        for (options, expected) in [
            ("bind", false),
            ("bind,ro", true),
            ("ro,rw", false),
            ("rw,ro,bind", true),
            ("rbind,rro", true),
            ("rro,rrw", false),
            ("rro,rw", true),
            ("ro,rrw", false),
        ] {
            let options: Vec<_> = options.split(',').map(String::from).collect();
            assert_eq!(says_read_only(&options), expected, "{options:?}");
        }
    }

    #[test]
    fn those_who_make_the_same_do_not_mind_each_other() {
        for _ in 0..50 {
            let dir = tempfile::tempdir().unwrap();
            let root = Rootfs::open(dir.path()).unwrap();
            let together = std::sync::Barrier::new(4);
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        together.wait();
                        root.make(Path::new("/a/b/c"), Kind::Directory).unwrap();
                        root.make(Path::new("/a/b/d"), Kind::File).unwrap();
                    });
                }
            });
            assert!(dir.path().join("a/b/c").is_dir() && dir.path().join("a/b/d").is_file());
        }
    }

    #[test]
    fn only_what_is_missing_is_made_and_opened() {
        let dir = tempfile::tempdir().unwrap();
        let root = Rootfs::open(dir.path()).unwrap();
        let make = |path: &str, kind| root.make(Path::new(path), kind).unwrap().is_some();
        assert!(make("/a/b", Kind::Directory));
        assert!(!make("/a", Kind::File), "what is there stays");
        assert!(!make("/", Kind::Directory));
        assert!(make("/a/./x/../file", Kind::File));
        assert!(dir.path().join("a/file").is_file() && !dir.path().join("a/x").exists());
        let error = root.make(Path::new("/a/file/x"), Kind::Directory);
        assert_eq!(error.unwrap_err(), Errno::NOTDIR);
    }

    /// opencontainers/runc 4401.
    #[test]
    fn a_directory_has_the_set_group_id_bit_of_the_one_it_is_in() {
        let dir = tempfile::tempdir().unwrap();
        let root = Rootfs::open(dir.path()).unwrap();
        std::fs::create_dir(dir.path().join("set")).unwrap();
        let set = root.find(Path::new("/set")).unwrap();
        let set = openat(set, ".", OFlags::DIRECTORY, Mode::empty()).unwrap();
        fchmod(set, Mode::from_raw_mode(0o7755)).unwrap();
        let modes = ["/set/a", "/set/a/b", "/plain"].map(|path| {
            root.make(Path::new(path), Kind::Directory).unwrap();
            fstat(root.find(Path::new(path)).unwrap()).unwrap().st_mode & 0o7777
        });
        assert_eq!(modes, [0o2755, 0o2755, 0o755]);
    }

    /// opencontainers/runc 4971.
    #[test]
    fn memory_has_the_mode_of_what_it_covers() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let root = Rootfs::open(dir.path()).unwrap();
        let set = root.make(Path::new("/set"), Kind::Directory);
        set.unwrap();
        let set = root.find(Path::new("/set")).unwrap();
        assert_eq!(memory_mode(Some(&set)).as_deref(), Ok("mode=0755"));
        assert_eq!(memory_mode(None).as_deref(), Ok("mode=1777"));
        let file = root.find(Path::new("/file")).unwrap();
        assert_eq!(memory_mode(Some(&file)), Err(Errno::NOTDIR));
        let says = |options: &str| has_mode_option(&[options.to_owned()]);
        assert!(says("size=1k,mode=700") && !says("ro"));
    }

    #[test]
    fn only_files_are_read_and_not_beyond_a_limit() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "content").unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();
        let root = Rootfs::open(dir.path()).unwrap();
        let content = |path: &str| read(&root.find(Path::new(path)).unwrap(), 4).unwrap();
        assert_eq!(content("/file").unwrap(), b"cont");
        assert_eq!((content("/fifo"), content("/")), (None, None));
    }

    #[test]
    fn links_end_in_the_tree() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let root = Rootfs::open(dir.path()).unwrap();
        let make = |path: &str, kind| root.make(Path::new(path), kind).map(drop);
        symlink("/run", dir.path().join("var-run")).unwrap();
        symlink("../../stub/file", dir.path().join("link")).unwrap();
        symlink(outside.path(), dir.path().join("out")).unwrap();
        symlink("loop", dir.path().join("loop")).unwrap();
        symlink("deep/b", dir.path().join("a")).unwrap();
        make("/var-run/one", Kind::Directory).unwrap();
        make("/link", Kind::File).unwrap();
        make("/a/c", Kind::Directory).unwrap();
        make("/out/x", Kind::File).unwrap();
        let resolved = |path: &str| root.resolve(Path::new(path));
        assert_eq!(resolved("/link").unwrap(), Path::new("/stub/file"));
        assert_eq!(resolved("/var-run/../run").unwrap(), Path::new("/run"));
        assert_eq!(resolved("/").unwrap(), Path::new("/"));
        assert_eq!(resolved("/nothing"), Err(Errno::NOENT));
        let link = |path: &str| root.link(Path::new(path));
        assert_eq!(link("/link"), Some("../../stub/file".into()));
        assert_eq!((link("/run"), link("/nothing")), (None, None));
        assert!(dir.path().join("run/one").is_dir());
        assert!(dir.path().join("stub/file").is_file());
        assert!(dir.path().join("deep/b/c").is_dir());
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
        assert_eq!(make("/loop/x", Kind::File), Err(Errno::LOOP));
        assert!(root.is_directory(Path::new("/var-run")) && !root.is_directory(Path::new("/link")));
    }
}
