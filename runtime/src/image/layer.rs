//! Unpacks one layer (OCI image specification, "Image Layer Filesystem Changeset") over what
//! lower layers left.
//!
//! Names that are absolute or lead up are refused. The directories on the way to an entry are
//! resolved inside the root (`openat2` with RESOLVE_IN_ROOT), so a link in a lower layer leads
//! where it would lead in the container and never out; the entry itself is made anew and never
//! through a link.

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;
use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// A name that removes the lower layers' entry of the rest of the name.
const WHITEOUT: &[u8] = b".wh.";
/// A name that removes everything of lower layers in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// How deep a removed tree may be.
const MAX_DEPTH: u32 = 256;

struct Unpacker {
    root: OwnedFd,
    /// What this layer made, which an opaque mark of the same layer leaves alone.
    made: HashSet<PathBuf>,
    owners: bool,
}

/// Unpacks a layer into `root`.
///
/// # Errors
/// The first entry that can't be unpacked, with its name.
pub(super) fn unpack(reader: impl Read, root: &Path) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut unpacker = Unpacker {
        root: rustix::fs::openat(CWD, root, flags, Mode::empty())?,
        made: HashSet::new(),
        owners: rustix::process::geteuid().is_root(),
    };
    let mut archive = tar::Archive::new(reader);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let name = entry.path()?.into_owned();
        unpacker
            .entry(&mut entry, &name)
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", name.display())))?;
    }
    Ok(())
}

fn refused(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("refused: {why}"))
}

/// A relative path of plain names; nothing for the root itself.
fn plain(path: &Path) -> io::Result<PathBuf> {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::CurDir => {}
            Component::ParentDir => return Err(refused("the name leads up")),
            _ => return Err(refused("the name is absolute")),
        }
    }
    Ok(out)
}

impl Unpacker {
    fn entry<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>, name: &Path) -> io::Result<()> {
        let path = plain(name)?;
        let (Some(parent), Some(file)) = (path.parent(), path.file_name()) else {
            // The root's own entry: its mode counts.
            if let Ok(mode) = entry.header().mode() {
                rustix::fs::chmodat(
                    &self.root,
                    ".",
                    Mode::from_raw_mode(mode & 0o7777),
                    AtFlags::empty(),
                )?;
            }
            return Ok(());
        };
        let directory = self.directory(parent)?;
        if file.as_bytes() == OPAQUE {
            return self.clear(&directory, parent);
        }
        if let Some(hidden) = file.as_bytes().strip_prefix(WHITEOUT) {
            if hidden.is_empty() || hidden == b"." || hidden == b".." {
                return Err(refused("the whiteout has no name"));
            }
            return remove(&directory, OsStr::from_bytes(hidden), 0);
        }
        self.make(entry, &directory, file)?;
        self.made.insert(path);
        Ok(())
    }

    /// The directory at `path` inside the root, made if lower layers have none.
    fn directory(&self, path: &Path) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |path: &Path| {
            let path = if path.as_os_str().is_empty() {
                Path::new(".")
            } else {
                path
            };
            rustix::fs::openat2(
                &self.root,
                path,
                flags,
                Mode::empty(),
                ResolveFlags::IN_ROOT,
            )
        };
        match open(path) {
            Err(Errno::NOENT) => {
                let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
                    return Err(Errno::NOENT.into());
                };
                let parent = self.directory(parent)?;
                match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
                    Err(Errno::EXIST) => Err(refused("a link on the way leads nowhere inside")),
                    other => {
                        other?;
                        Ok(open(path)?)
                    }
                }
            }
            other => Ok(other?),
        }
    }

    fn make<R: Read>(
        &self,
        entry: &mut tar::Entry<'_, R>,
        directory: &OwnedFd,
        name: &OsStr,
    ) -> io::Result<()> {
        let kind = entry.header().entry_type();
        let mode = Mode::from_raw_mode(entry.header().mode()? & 0o7777);
        let is_directory = kind == tar::EntryType::Directory;
        if !(is_directory && is_directory_at(directory, name)) {
            remove(directory, name, 0)?;
        }
        match kind {
            tar::EntryType::Directory => match rustix::fs::mkdirat(directory, name, mode) {
                Err(Errno::EXIST) => {}
                other => other?,
            },
            tar::EntryType::Regular | tar::EntryType::Continuous | tar::EntryType::GNUSparse => {
                let flags = OFlags::WRONLY
                    | OFlags::CREATE
                    | OFlags::EXCL
                    | OFlags::NOFOLLOW
                    | OFlags::CLOEXEC;
                let file = rustix::fs::openat(directory, name, flags, Mode::from_raw_mode(0o600))?;
                io::copy(entry, &mut File::from(file))?;
            }
            tar::EntryType::Symlink => {
                let target = entry
                    .link_name()?
                    .ok_or_else(|| refused("a link to nothing"))?;
                rustix::fs::symlinkat(target.as_os_str(), directory, name)?;
            }
            tar::EntryType::Link => {
                // A hard link shares the target's owner and mode.
                return self.hard_link(entry, directory, name);
            }
            tar::EntryType::Char | tar::EntryType::Block | tar::EntryType::Fifo => {
                make_node(entry.header(), kind, directory, name)?;
            }
            other => return Err(refused(&format!("entries of type {other:?}"))),
        }
        self.dress(entry, directory, name, mode)
    }

    fn hard_link<R: Read>(
        &self,
        entry: &tar::Entry<'_, R>,
        directory: &OwnedFd,
        name: &OsStr,
    ) -> io::Result<()> {
        let target = entry
            .link_name()?
            .ok_or_else(|| refused("a link to nothing"))?;
        let target = plain(&target)?;
        let (Some(parent), Some(file)) = (target.parent(), target.file_name()) else {
            return Err(refused("a hard link to the root"));
        };
        let from = self.directory(parent)?;
        rustix::fs::linkat(&from, file, directory, name, AtFlags::empty())?;
        Ok(())
    }

    /// Owner, mode, extended attributes and time, in the order in which none undoes another.
    fn dress<R: Read>(
        &self,
        entry: &mut tar::Entry<'_, R>,
        directory: &OwnedFd,
        name: &OsStr,
        mode: Mode,
    ) -> io::Result<()> {
        let (uid, gid) = (entry.header().uid()?, entry.header().gid()?);
        let time = entry.header().mtime()?;
        if self.owners {
            let number = |n: u64| {
                u32::try_from(n)
                    .ok()
                    .filter(|n| *n != u32::MAX)
                    .ok_or_else(|| refused("an owner that is no number"))
            };
            let (uid, gid) = (Uid::from_raw(number(uid)?), Gid::from_raw(number(gid)?));
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::chownat(directory, name, Some(uid), Some(gid), flags)?;
        }
        if entry.header().entry_type() != tar::EntryType::Symlink {
            rustix::fs::chmodat(directory, name, mode, AtFlags::empty())?;
            self.set_attributes(entry, directory, name)?;
        }
        let stamp = Timespec {
            tv_sec: i64::try_from(time).unwrap_or(0),
            tv_nsec: 0,
        };
        let times = Timestamps {
            last_access: stamp,
            last_modification: stamp,
        };
        rustix::fs::utimensat(directory, name, &times, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(())
    }

    /// What the guest's kernel is to see as privileged attributes is stored as virtio-fs stores
    /// it: see `koya_vmm::devices::fs::passthrough`.
    fn set_attributes<R: Read>(
        &self,
        entry: &mut tar::Entry<'_, R>,
        directory: &OwnedFd,
        name: &OsStr,
    ) -> io::Result<()> {
        let Some(extensions) = entry.pax_extensions()? else {
            return Ok(());
        };
        let mut path = OsString::from(format!("/proc/self/fd/{}/", directory.as_raw_fd()));
        path.push(name);
        for extension in extensions.filter_map(Result::ok) {
            let Some(key) = extension
                .key()
                .ok()
                .and_then(|k| k.strip_prefix("SCHILY.xattr."))
            else {
                continue;
            };
            let stored = match key {
                k if k.starts_with("user.koya.") => return Err(refused("an attribute of Koya's")),
                k if k.starts_with("user.") => k.to_owned(),
                k if k.starts_with("security.") || k.starts_with("trusted.") => {
                    format!("user.koya.{k}")
                }
                _ => continue,
            };
            let value = extension.value_bytes();
            match rustix::fs::lsetxattr(&path, &stored, value, XattrFlags::empty()) {
                // A file system without attributes loses them, as other tools do.
                Err(Errno::OPNOTSUPP | Errno::PERM) => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Removes what lower layers have in a directory.
    fn clear(&self, directory: &OwnedFd, path: &Path) -> io::Result<()> {
        for name in names(directory)? {
            if !self.made.contains(&path.join(&name)) {
                remove(directory, &name, 0)?;
            }
        }
        Ok(())
    }
}

fn make_node(
    header: &tar::Header,
    kind: tar::EntryType,
    directory: &OwnedFd,
    name: &OsStr,
) -> io::Result<()> {
    let (kind, device) = match kind {
        tar::EntryType::Fifo => (FileType::Fifo, 0),
        other => {
            let major = header.device_major()?.unwrap_or(0);
            let minor = header.device_minor()?.unwrap_or(0);
            let kind = match other {
                tar::EntryType::Block => FileType::BlockDevice,
                _ => FileType::CharacterDevice,
            };
            (kind, rustix::fs::makedev(major, minor))
        }
    };
    rustix::fs::mknodat(directory, name, kind, Mode::from_raw_mode(0o600), device)?;
    Ok(())
}

fn is_directory_at(directory: &OwnedFd, name: &OsStr) -> bool {
    rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Directory)
}

fn names(directory: impl AsFd) -> io::Result<Vec<OsString>> {
    let mut found = Vec::new();
    for entry in rustix::fs::Dir::read_from(directory)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            found.push(OsString::from(OsStr::from_bytes(&name)));
        }
    }
    Ok(found)
}

/// Removes an entry and everything under it, without following a link.
fn remove(directory: &OwnedFd, name: &OsStr, depth: u32) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(refused("directories too deep"));
    }
    match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let child = rustix::fs::openat(directory, name, flags, Mode::empty())?;
    for name in names(&child)? {
        remove(&child, &name, depth + 1)?;
    }
    rustix::fs::unlinkat(directory, name, AtFlags::REMOVEDIR)?;
    Ok(())
}
