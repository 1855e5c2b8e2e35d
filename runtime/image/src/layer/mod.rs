//! Unpacks layers (image-spec, layer.md) over each other.
//!
//! [`walk`] finds directories without leaving the root. Each entry is created anew and never through a link. [`tree`]
//! records the contents of the current layer, which its own whiteouts do not affect wherever they stand, and the final
//! attributes of directories: until the end directories are private to this user, so that files can be created in them
//! whatever their final mode.

mod attributes;
mod tree;
mod walk;

use crate::archive::{End, Entry, Kind, Reader, Source};
use crate::error::{cut_short, invalid};
use crate::limits::{Budget, Limits, MAX_ALL_STEPS, MAX_WAITING};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;
use tree::{Finish, Node};
use walk::{Directory, check_depth, names, parts, remove};

/// Prefix of a whiteout: hides the entry of lower layers named by the rest.
const WHITEOUT: &[u8] = b".wh.";
/// An opaque whiteout: hides all entries of lower layers in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Prefix of AUFS's internal files.
const AUFS: &[u8] = b".wh..wh.";

/// Attributes of a directory without an entry.
const IMPLIED: Finish = Finish {
    mode: 0o755,
    mtime: (0, 0),
};

/// Maximum number of passes over hard links, whose targets may be hard links themselves.
const LINK_ROUNDS: usize = 16;

/// Unpacks layers into a root, the lowest first.
pub(crate) struct Unpacker {
    root: OwnedFd,
    tree: Node,
    /// Number of the current layer, from 1.
    layer: u32,
    entries: Budget,
    owners: bool,
    /// Hard links whose targets have not appeared yet, with these targets.
    links: BTreeMap<Vec<OsString>, Vec<OsString>>,
    /// Limit for the names in `links`.
    waiting: Budget,
    /// Limit for the components of paths with symbolic links.
    steps: Budget,
    /// The directory of the last entry: the next one is often in it, too.
    last: Option<(Vec<OsString>, Rc<Directory>)>,
}

impl Unpacker {
    pub(crate) fn new(root: &Path, limits: &Limits) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            root: rustix::fs::openat(CWD, root, flags, Mode::empty())?,
            tree: Node::default(),
            layer: 0,
            entries: Budget::new("entries", limits.entries),
            owners: rustix::process::geteuid().is_root(),
            links: BTreeMap::new(),
            waiting: Budget::new("bytes of hard links without a target", MAX_WAITING),
            steps: Budget::new("steps along links", MAX_ALL_STEPS),
            last: None,
        })
    }

    /// Unpacks the next layer. Without a digest it must have an end marker.
    ///
    /// # Errors
    /// The first entry that can't be unpacked, with its name.
    pub(crate) fn layer(
        &mut self,
        source: impl Source,
        is_digested: bool,
        max_header: u64,
    ) -> io::Result<()> {
        if self.layer == 0 {
            // The directory was created with the caller's umask, which must not affect the image.
            self.tree.finish = Some(IMPLIED);
        }
        self.layer += 1;
        let mut reader = Reader::new(source, max_header);
        while let Some(entry) = reader.next_entry()? {
            let unpacked = self.entry(&mut reader, &entry);
            unpacked.map_err(|e| named(&String::from_utf8_lossy(&entry.name), e))?;
        }
        if reader.end() != Some(End::Marked) && !is_digested {
            return Err(cut_short());
        }
        self.make_links()?;
        self.tree.prune();
        Ok(())
    }

    pub(crate) fn make_directory(&mut self, path: &Path) -> io::Result<()> {
        let parts = parts(path.as_os_str().as_bytes())?;
        self.directory(&parts, true).map(drop)
    }

    /// Sets the final attributes of directories.
    pub(crate) fn finish(self) -> io::Result<()> {
        finish(&self.root, &self.tree, self.owners)
    }

    fn entry<S: Source>(&mut self, reader: &mut Reader<S>, entry: &Entry) -> io::Result<()> {
        self.entries.take(1)?;
        let parts = parts(&entry.name)?;
        let Some((name, parents)) = parts.split_last() else {
            return self.own_root(entry);
        };
        if let Some(hiding) = parents
            .iter()
            .find(|part| part.as_bytes().starts_with(WHITEOUT))
        {
            return match hiding.as_bytes().starts_with(AUFS) {
                true => Ok(()),
                false => Err(invalid("a whiteout has nothing in it")),
            };
        }
        if name.as_bytes() == OPAQUE {
            return self.hide_all(parents);
        }
        if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT) {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(invalid("a whiteout of no name"));
            }
            return self.hide(parents, OsStr::from_bytes(hidden));
        }
        self.make(reader, entry, parents, name)
    }

    /// Handles the entry for the root itself.
    fn own_root(&mut self, entry: &Entry) -> io::Result<()> {
        if entry.kind != Kind::Directory {
            return Err(invalid("the root must be a directory"));
        }
        attributes::clear(&self.root)?;
        attributes::own(&self.root, entry, self.owners)?;
        self.tree.touch(&[], self.layer).finish = Some(Finish {
            mode: entry.mode,
            mtime: entry.mtime,
        });
        Ok(())
    }

    fn make<S: Source>(
        &mut self,
        reader: &mut Reader<S>,
        entry: &Entry,
        parents: &[OsString],
        name: &OsStr,
    ) -> io::Result<()> {
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let parent = self.directory(parents, true)?.ok_or_else(missing)?;
        let path = [parent.path.as_slice(), &[name.to_owned()]].concat();
        check_depth(&path)?;
        let dir = &parent.fd;
        let is_directory = entry.kind == Kind::Directory;
        if !(is_directory && is_directory_at(dir, name)) {
            self.clear(dir, &path, name)?;
        }
        self.links.remove(&path);
        let mut made = None;
        match entry.kind {
            Kind::Directory => {
                make_directory(dir, name, entry, self.owners)?;
                made = Some(Finish {
                    mode: entry.mode,
                    mtime: entry.mtime,
                });
            }
            Kind::Regular => make_file(reader, entry, dir, name, self.owners)?,
            Kind::Symlink => {
                if entry.link.is_empty() {
                    return Err(invalid("a link to nothing"));
                }
                rustix::fs::symlinkat(OsStr::from_bytes(&entry.link), dir, name)?;
                attributes::dress(dir, name, entry, self.owners, true)?;
            }
            Kind::HardLink => {
                let target = parts(&entry.link)?;
                if target == path || !self.link(&target, &parent, name)? {
                    let names = path.iter().chain(&target);
                    // Each takes an element of its list and a heap allocation.
                    self.waiting
                        .take(names.map(|name| name.len() as u64 + 64).sum())?;
                    self.links.insert(path.clone(), target);
                }
            }
            // Only root can create it, so it is represented by a file.
            Kind::CharacterDevice | Kind::BlockDevice | Kind::Fifo if !self.owners => {
                check_device(entry)?;
                match make_file(reader, entry, dir, name, self.owners) {
                    Err(error) if is_unsupported(&error) => {
                        rustix::fs::unlinkat(dir, name, AtFlags::empty())?;
                        // The file system can't store the type. Device nodes are left out.
                        if entry.kind == Kind::Fifo {
                            make_node(entry, dir, name)?;
                            attributes::dress(dir, name, entry, self.owners, false)?;
                        }
                    }
                    made => made?,
                }
            }
            Kind::CharacterDevice | Kind::BlockDevice | Kind::Fifo => {
                make_node(entry, dir, name)?;
                attributes::dress(dir, name, entry, self.owners, false)?;
            }
        }
        let node = self.tree.touch(&path, self.layer);
        node.finish = made;
        Ok(())
    }

    /// Removes an existing file in the place of an entry.
    fn clear(&mut self, dir: impl AsFd, path: &[OsString], name: &OsStr) -> io::Result<()> {
        remove(dir, name, path.len())?;
        self.tree.remove(path);
        // The directory of the last entry may have been below the removed file.
        self.last = None;
        Ok(())
    }

    /// Creates a hard link, if its target exists. It shares the target's owner, mode and times.
    fn link(&mut self, target: &[OsString], parent: &Directory, name: &OsStr) -> io::Result<bool> {
        let Some((file, directory)) = target.split_last() else {
            return Err(invalid("a hard link to the root"));
        };
        let last = self.last.take();
        let from = self.directory(directory, false);
        self.last = last;
        let Some(from) = from? else {
            return Ok(false);
        };
        if is_directory_at(&from.fd, file) {
            return Err(invalid("a hard link to a directory"));
        }
        match rustix::fs::linkat(&from.fd, file, &parent.fd, name, AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Creates hard links to later entries of the layer.
    fn make_links(&mut self) -> io::Result<()> {
        for _ in 0..LINK_ROUNDS {
            for (path, target) in std::mem::take(&mut self.links) {
                let Some((name, parents)) = path.split_last() else {
                    continue;
                };
                // Its directory may have been hidden or replaced since.
                let Some(parent) = self.directory(parents, false)? else {
                    continue;
                };
                if !self.link(&target, &parent, name)? {
                    self.links.insert(path, target);
                }
            }
            if self.links.is_empty() {
                return Ok(());
            }
        }
        let shown = |path: &[OsString]| path.join(OsStr::new("/")).to_string_lossy().into_owned();
        let first = self.links.iter().next();
        first.map_or(Ok(()), |(path, target)| {
            let text = format!("a hard link to {}, which is not there", shown(target));
            Err(named(&shown(path), invalid(text)))
        })
    }

    /// Applies a whiteout. If its directory does not exist, there is nothing to hide.
    fn hide(&mut self, parents: &[OsString], name: &OsStr) -> io::Result<()> {
        let Some(parent) = self.directory(parents, false)? else {
            return Ok(());
        };
        let path = [parent.path.as_slice(), &[name.to_owned()]].concat();
        self.hide_at(&parent.fd, path)
    }

    /// Applies an opaque whiteout.
    fn hide_all(&mut self, directory: &[OsString]) -> io::Result<()> {
        let Some(directory) = self.directory(directory, false)? else {
            return Ok(());
        };
        if self.tree.clear(&directory.path, self.layer) {
            return Ok(());
        }
        for name in names(&directory.fd)? {
            let path = [directory.path.as_slice(), &[name]].concat();
            self.hide_at(&directory.fd, path)?;
        }
        Ok(())
    }

    /// Removes entries of lower layers, and keeps those of this one.
    fn hide_at(&mut self, dir: &OwnedFd, path: Vec<OsString>) -> io::Result<()> {
        check_depth(&path)?;
        let Some(name) = path.last() else {
            return Ok(());
        };
        if !self.tree.is_of(&path, self.layer) {
            return self.clear(dir, &path, name);
        }
        if !is_directory_at(dir, name) || self.tree.clear(&path, self.layer) {
            return Ok(());
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let child = rustix::fs::openat(dir, name, flags, Mode::empty())?;
        for name in names(&child)? {
            self.hide_at(&child, [path.as_slice(), &[name]].concat())?;
        }
        Ok(())
    }
}

fn named(name: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{name}: {error}"))
}

fn is_directory_at(directory: impl AsFd, name: &OsStr) -> bool {
    rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Directory)
}

fn open_directory(dir: impl AsFd, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, name, flags, Mode::empty())?)
}

/// Subdirectories come first: the mode of the parent may deny access to them.
fn finish(directory: &OwnedFd, node: &Node, owners: bool) -> io::Result<()> {
    for (name, child) in &node.children {
        let opened = open_directory(directory, name);
        let finished = opened.and_then(|opened| finish(&opened, child, owners));
        finished.map_err(|e| named(&name.to_string_lossy(), e))?;
    }
    if let Some(Finish { mode, mtime }) = node.finish {
        rustix::fs::fchmod(directory, attributes::mode(mode, owners, true))?;
        rustix::fs::futimens(directory, &attributes::times(mtime))?;
    }
    Ok(())
}

fn make_directory(dir: impl AsFd, name: &OsStr, entry: &Entry, owners: bool) -> io::Result<()> {
    match rustix::fs::mkdirat(&dir, name, Mode::RWXU) {
        Err(Errno::EXIST) => {}
        other => other?,
    }
    let made = open_directory(&dir, name)?;
    attributes::clear(&made)?;
    attributes::own(&made, entry, owners)
}

fn make_file<S: Source>(
    reader: &mut Reader<S>,
    entry: &Entry,
    dir: impl AsFd,
    name: &OsStr,
    owners: bool,
) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    let mut file = File::from(rustix::fs::openat(dir, name, flags, mode)?);
    write_data(reader, entry, &mut file)?;
    attributes::own(&file, entry, owners)?;
    rustix::fs::fchmod(&file, attributes::mode(entry.mode, owners, false))?;
    Ok(rustix::fs::futimens(
        &file,
        &attributes::times(entry.mtime),
    )?)
}

/// Writes an entry's data, with its holes.
pub(crate) fn write_data<S: Source>(
    reader: &mut Reader<S>,
    entry: &Entry,
    file: &mut File,
) -> io::Result<()> {
    let Some(map) = &entry.sparse else {
        return io::copy(reader, file).map(drop);
    };
    for segment in map {
        file.seek(SeekFrom::Start(segment.offset))?;
        io::copy(&mut reader.by_ref().take(segment.length), file)?;
    }
    file.set_len(entry.size)
}

/// Whether the error is that of a file system without user attributes.
fn is_unsupported(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error())
}

fn check_device(entry: &Entry) -> io::Result<()> {
    let (major, minor) = entry.device;
    // The kernel's limits: 12 and 20 bits.
    match major >= 1 << 12 || minor >= 1 << 20 {
        true => Err(invalid(format!("there is no device {major}:{minor}"))),
        false => Ok(()),
    }
}

fn make_node(entry: &Entry, dir: impl AsFd, name: &OsStr) -> io::Result<()> {
    let kind = match entry.kind {
        Kind::Fifo => FileType::Fifo,
        Kind::BlockDevice => FileType::BlockDevice,
        _ => FileType::CharacterDevice,
    };
    check_device(entry)?;
    let (major, minor) = entry.device;
    let device = rustix::fs::makedev(major, minor);
    let mode = Mode::RUSR | Mode::WUSR;
    Ok(rustix::fs::mknodat(dir, name, kind, mode, device)?)
}
