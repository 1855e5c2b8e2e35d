//! Paths inside the root. A symbolic link is resolved as in the container; nothing is ever opened through one, so none can
//! lead out, whatever lower layers contain.

use super::{IMPLIED, Unpacker, is_directory_at};
use crate::error::invalid;
use crate::limits::{MAX_DEPTH, MAX_NAME};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};
use std::rc::Rc;

/// Maximum number of links in a path: the kernel's limit.
const MAX_LINKS: u32 = 40;

/// Maximum number of components of a path, including those of its links.
const MAX_STEPS: u32 = 8192;

/// Flags for a directory that is used to look up its entries.
const PATH: OFlags = OFlags::PATH
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// A directory, by its path without links.
pub(super) struct Directory {
    pub(super) fd: OwnedFd,
    pub(super) path: Vec<OsString>,
}

/// The existing part of a path.
struct Resolved {
    path: Vec<OsString>,
    existing: usize,
    /// The last existing directory.
    dir: OwnedFd,
}

/// The components of a name in an archive. `..` cannot lead out of the root, as in other engines.
pub(super) fn parts(name: &[u8]) -> io::Result<Vec<OsString>> {
    if name.len() > MAX_NAME {
        return Err(invalid(format!("a name of more than {MAX_NAME} bytes")));
    }
    let mut out = Vec::new();
    for part in Path::new(OsStr::from_bytes(name)).components() {
        match part {
            Component::Normal(name) => out.push(name.to_owned()),
            Component::ParentDir => drop(out.pop()),
            _ => {}
        }
    }
    check_depth(&out)?;
    Ok(out)
}

pub(super) fn check_depth(path: &[OsString]) -> io::Result<()> {
    match path.len() > MAX_DEPTH {
        true => Err(invalid(format!("more than {MAX_DEPTH} directories deep"))),
        false => Ok(()),
    }
}

impl Unpacker {
    /// The directory at this path. If it does not exist, it is created, or `None` is returned.
    ///
    /// # Errors
    /// The error from the host; NotADirectory if something else is in the way.
    pub(super) fn directory(
        &mut self,
        parts: &[OsString],
        make: bool,
    ) -> io::Result<Option<Rc<Directory>>> {
        if let Some((last, found)) = &self.last
            && last == parts
        {
            return Ok(Some(found.clone()));
        }
        let Resolved {
            path,
            existing,
            mut dir,
        } = self.resolve(parts)?;
        if existing < path.len() && !make {
            return Ok(None);
        }
        check_depth(&path)?;
        for at in existing..path.len() {
            self.entries.take(1)?;
            match rustix::fs::mkdirat(&dir, &path[at], Mode::RWXU) {
                Err(Errno::EXIST) => {
                    let text = format!("{} is not a directory", path[at].to_string_lossy());
                    return Err(io::Error::new(io::ErrorKind::NotADirectory, text));
                }
                other => other?,
            }
            dir = rustix::fs::openat(&dir, &path[at], PATH, Mode::empty())?;
            self.tree.touch(&path[..=at], self.layer).finish = Some(IMPLIED);
        }
        let found = Rc::new(Directory { fd: dir, path });
        self.last = Some((parts.to_vec(), found.clone()));
        Ok(Some(found))
    }

    fn resolve(&mut self, parts: &[OsString]) -> io::Result<Resolved> {
        // Most paths contain no link, which the kernel verifies in one call.
        if let Ok(dir) = self.open_path(parts, ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH) {
            return Ok(Resolved {
                path: parts.to_vec(),
                existing: parts.len(),
                dir,
            });
        }
        let (mut links, mut steps) = (0, 0);
        let mut left: VecDeque<OsString> = parts.iter().cloned().collect();
        let mut found = Resolved {
            path: Vec::new(),
            existing: 0,
            dir: self.walk(&[])?,
        };
        while let Some(part) = left.pop_front() {
            steps += 1;
            self.steps.take(1)?;
            if steps > MAX_STEPS {
                return Err(invalid("its path has too many symbolic links"));
            }
            if part == "." || part.is_empty() {
                continue;
            }
            if part == ".." {
                found.path.pop();
                if found.path.len() < found.existing {
                    found.existing = found.path.len();
                    self.steps.take(found.existing as u64)?;
                    found.dir = self.walk(&found.path)?;
                }
                continue;
            }
            if found.path.len() > found.existing {
                found.path.push(part);
                continue;
            }
            match rustix::fs::openat(&found.dir, &part, PATH, Mode::empty()) {
                Ok(dir) => {
                    found.dir = dir;
                    found.path.push(part);
                    found.existing += 1;
                    check_depth(&found.path)?;
                }
                Err(Errno::NOENT) => found.path.push(part),
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    links += 1;
                    let Some(target) = link_at(&found.dir, &part, links)? else {
                        // Counts as missing, unless the path leads back out of it.
                        found.path.push(part);
                        continue;
                    };
                    if target.first() == Some(&b'/') {
                        found.path.clear();
                        found.existing = 0;
                        found.dir = self.walk(&[])?;
                    }
                    let parts = target.split(|b| *b == b'/');
                    for part in parts.rev() {
                        left.push_front(OsStr::from_bytes(part).to_owned());
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(found)
    }

    fn open_path(&self, parts: &[OsString], how: ResolveFlags) -> io::Result<OwnedFd> {
        let path: OsString = match parts {
            [] => ".".into(),
            parts => parts.join(OsStr::new("/")),
        };
        Ok(rustix::fs::openat2(
            &self.root,
            path,
            PATH,
            Mode::empty(),
            how,
        )?)
    }

    /// Opens a path without symbolic links.
    fn walk(&self, path: &[OsString]) -> io::Result<OwnedFd> {
        let whole = self.open_path(path, ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH);
        if whole.is_ok() {
            return whole;
        }
        let root = rustix::fs::openat(&self.root, ".", PATH, Mode::empty())?;
        let step = |dir: OwnedFd, name| Ok(rustix::fs::openat(&dir, name, PATH, Mode::empty())?);
        path.iter().try_fold(root, step)
    }
}

/// The target, if this is a symbolic link.
fn link_at(dir: impl AsFd, name: &OsStr, links: u32) -> io::Result<Option<Vec<u8>>> {
    let kind = rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode;
    if FileType::from_raw_mode(kind) != FileType::Symlink {
        return Ok(None);
    }
    if links > MAX_LINKS {
        return Err(invalid(format!(
            "its path leads through more than {MAX_LINKS} links"
        )));
    }
    let target = rustix::fs::readlinkat(&dir, name, Vec::new())?;
    Ok(Some(target.into_bytes()))
}

/// The names in a directory.
pub(super) fn names(directory: impl AsFd) -> io::Result<Vec<OsString>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let readable = rustix::fs::openat(directory, ".", flags, Mode::empty())?;
    let mut found = Vec::new();
    for entry in rustix::fs::Dir::new(readable)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            found.push(OsStr::from_bytes(&name).to_owned());
        }
    }
    Ok(found)
}

/// Removes a name and everything under it, without following a link.
pub(super) fn remove(directory: impl AsFd, name: &OsStr, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(invalid(format!("more than {MAX_DEPTH} directories deep")));
    }
    if !is_directory_at(&directory, name) {
        return match rustix::fs::unlinkat(&directory, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        };
    }
    let child = rustix::fs::openat(&directory, name, PATH, Mode::empty())?;
    for name in names(&child)? {
        remove(&child, &name, depth + 1)?;
    }
    Ok(rustix::fs::unlinkat(&directory, name, AtFlags::REMOVEDIR)?)
}
