//! Owners, modes and file types that only root can set, kept in an extended attribute.
//!
//! Without root, all files that a guest creates belong to the user on the host. Their owners, modes and types in the guest
//! are in the attribute [`ATTRIBUTE`] of each, in the format of containers/storage and fuse-overlayfs:
//!
//! ```text
//! UID:GID:MODE            a file or a directory; MODE is octal
//! UID:GID:MODE:char-1-3   a device node, represented by an empty file; likewise block-MAJOR-MINOR, pipe, socket
//! ```
//!
//! A file without it has its own mode, and belongs to root in the guest if it is the user's on the host: so most files need
//! no attribute. On the host the user can read and write all of them, whatever their mode in the guest, and they have no
//! set-user-ID bits.

use super::xattr::SET_GROUP_ID;
use crate::fs::inodes;
use koya_host::descriptors;
use koya_host::sync::lock;
use rustix::fs::{FileType, Statx, XattrFlags};
use rustix::io::Errno;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;

/// The name of the attribute.
pub(super) const ATTRIBUTE: &CStr = c"user.containers.override_stat";

/// The longest value that is read, in bytes: four numbers and a word.
const LONGEST: usize = 128;

/// Permissions, set-user-ID, set-group-ID and the sticky bit.
const PERMISSIONS: u32 = 0o7777;
/// The subset of these that a file on the host may have, too.
const HARMLESS: u32 = 0o1777;

/// Attributes of a file as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mode: u32,
    pub(super) kind: FileType,
    /// Major and minor number of a device node.
    pub(super) device: (u32, u32),
}

impl Shown {
    fn parse(value: &[u8], host: FileType) -> Option<Self> {
        let mut fields = std::str::from_utf8(value).ok()?.split(':');
        let uid = fields.next()?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let mode = u32::from_str_radix(fields.next()?, 8).ok()?;
        let (kind, device) = match (host, fields.next()) {
            // Only an empty file can stand for something else.
            (FileType::RegularFile, Some(word)) => parse_kind(word)?,
            _ => (host, (0, 0)),
        };
        Some(Self {
            uid,
            gid,
            mode: mode & PERMISSIONS,
            kind,
            device,
        })
    }

    fn value(&self) -> String {
        let Self { uid, gid, mode, .. } = self;
        let (major, minor) = self.device;
        let kind = match self.kind {
            FileType::CharacterDevice => format!(":char-{major}-{minor}"),
            FileType::BlockDevice => format!(":block-{major}-{minor}"),
            FileType::Fifo => ":pipe".to_owned(),
            FileType::Socket => ":socket".to_owned(),
            _ => String::new(),
        };
        format!("{uid}:{gid}:{mode:04o}{kind}")
    }

    /// Whether a file of the host has all of this without the attribute.
    fn is_plain(&self, host: FileType) -> bool {
        let user = user_bits(host);
        (self.uid, self.gid, self.kind) == (0, 0, host)
            && self.mode & !HARMLESS == 0
            && self.mode & user == user
    }

    /// The mode of the file on the host.
    fn host_mode(&self, host: FileType) -> u32 {
        self.mode & HARMLESS | user_bits(host)
    }
}

/// The mode bits that the user needs to serve a file.
fn user_bits(host: FileType) -> u32 {
    match host {
        FileType::Directory => 0o700,
        _ => 0o600,
    }
}

fn parse_kind(word: &str) -> Option<(FileType, (u32, u32))> {
    let device = |numbers: &str| {
        let (major, minor) = numbers.split_once('-')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    };
    match word.split_once('-') {
        None => match word {
            "pipe" => Some((FileType::Fifo, (0, 0))),
            "socket" => Some((FileType::Socket, (0, 0))),
            _ => Some((FileType::RegularFile, (0, 0))),
        },
        Some(("char", numbers)) => Some((FileType::CharacterDevice, device(numbers)?)),
        Some(("block", numbers)) => Some((FileType::BlockDevice, device(numbers)?)),
        Some(_) => None,
    }
}

/// Owners for a process that can't change the owner of files.
pub(super) struct Owners {
    user: u32,
    group: u32,
    /// Serializes changes: each reads the attribute first.
    changes: Mutex<()>,
}

impl Owners {
    /// `None` if this process can change the owner of files.
    pub(super) fn needed() -> Option<Self> {
        let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
        let map = || std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        (!user.is_root() || maps_one(&map())).then(|| Self::of(user.as_raw(), group.as_raw()))
    }

    /// Owners for files of this user and group.
    pub(super) fn of(user: u32, group: u32) -> Self {
        Self {
            user,
            group,
            changes: Mutex::new(()),
        }
    }

    /// The attributes of a file as the guest sees them.
    pub(super) fn shown(&self, fd: impl AsFd, stat: &Statx) -> Shown {
        self.kept(fd.as_fd(), stat)
            .unwrap_or_else(|| self.plain(stat))
    }

    /// The same as a `Statx`.
    pub(super) fn overlay(&self, fd: impl AsFd, stat: &Statx) -> Statx {
        let shown = self.shown(fd, stat);
        let mut stat = *stat;
        (stat.stx_uid, stat.stx_gid) = (shown.uid, shown.gid);
        stat.stx_mode = (shown.mode | shown.kind.as_raw_mode()) as u16;
        (stat.stx_rdev_major, stat.stx_rdev_minor) = shown.device;
        stat
    }

    fn plain(&self, stat: &Statx) -> Shown {
        let own = |id, own| if id == own { 0 } else { id };
        Shown {
            uid: own(stat.stx_uid, self.user),
            gid: own(stat.stx_gid, self.group),
            mode: u32::from(stat.stx_mode) & PERMISSIONS,
            kind: kind(stat),
            device: (stat.stx_rdev_major, stat.stx_rdev_minor),
        }
    }

    fn kept(&self, fd: BorrowedFd<'_>, stat: &Statx) -> Option<Shown> {
        // Attributes on files of other users are not trusted.
        if !can_keep(kind(stat)) || stat.stx_uid != self.user {
            return None;
        }
        let mut value = [0; LONGEST];
        let path = descriptors::path(fd);
        let len = rustix::fs::getxattr(path, ATTRIBUTE, &mut value[..]).ok()?;
        Shown::parse(&value[..len], kind(stat))
    }

    /// Changes the attributes of a file as the guest sees them.
    ///
    /// # Errors
    /// EPERM for files of other users of the host; the host's error.
    pub(super) fn change(
        &self,
        fd: impl AsFd,
        chmod: impl Fn(u32) -> Result<(), Errno>,
        change: impl FnOnce(&mut Shown),
    ) -> Result<(), Errno> {
        let fd = fd.as_fd();
        let _one = lock(&self.changes);
        let stat = inodes::stat(fd)?;
        let host = kind(&stat);
        let kept = self.kept(fd, &stat);
        let before = kept.unwrap_or_else(|| self.plain(&stat));
        let mut after = before;
        change(&mut after);
        let mode = u32::from(stat.stx_mode) & PERMISSIONS;
        if !can_keep(host) {
            let owned = (after.uid, after.gid) == (before.uid, before.gid);
            return match host {
                // Nothing depends on the owner of a symbolic link, and archives contain one for each.
                FileType::Symlink => Ok(()),
                _ if !owned => Err(Errno::PERM),
                _ if after.mode != mode => chmod(after.mode & HARMLESS),
                _ => Ok(()),
            };
        }
        if kept.is_none() && after.is_plain(host) {
            return match after.mode == mode {
                true => Ok(()),
                false => chmod(after.mode),
            };
        }
        if stat.stx_uid != self.user {
            return Err(Errno::PERM);
        }
        let wanted = after.host_mode(host);
        // The host asks for write permission before it sets an attribute.
        if mode & 0o200 == 0 {
            chmod(wanted)?;
        }
        if kept != Some(after) {
            let value = after.value();
            let path = descriptors::path(fd);
            rustix::fs::setxattr(path, ATTRIBUTE, value.as_bytes(), XattrFlags::empty())?;
        }
        match wanted == mode {
            true => Ok(()),
            false => chmod(wanted),
        }
    }

    /// Whether a file or directory that the host refused to open or to change belongs to the user and has a mode that denies
    /// access to its owner: such a mode does not bind root in the guest.
    pub(super) fn denies_owner(&self, stat: &Statx) -> bool {
        let user = user_bits(kind(stat));
        can_keep(kind(stat)) && stat.stx_uid == self.user && u32::from(stat.stx_mode) & user != user
    }
}

/// The group and the additional mode bits of a new file in this directory.
pub(super) fn inherited(directory: &Shown, kind: FileType, group: u32) -> (u32, u32) {
    match directory.mode & SET_GROUP_ID {
        0 => (group, 0),
        _ if kind == FileType::Directory => (directory.gid, SET_GROUP_ID),
        _ => (directory.gid, 0),
    }
}

/// Whether a user ID map (user_namespaces(7)) contains a single ID.
fn maps_one(map: &str) -> bool {
    let counts = map
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2));
    let sum: u64 = counts.filter_map(|count| count.parse::<u64>().ok()).sum();
    sum == 1
}

fn kind(stat: &Statx) -> FileType {
    FileType::from_raw_mode(stat.stx_mode.into())
}

/// Other files can't have attributes in `user.` (xattr(7)).
fn can_keep(host: FileType) -> bool {
    matches!(host, FileType::RegularFile | FileType::Directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_other_tools() {
        let shown = |uid, gid, mode, kind, device| Shown {
            uid,
            gid,
            mode,
            kind,
            device,
        };
        let file = FileType::RegularFile;
        for (value, expected) in [
            ("0:42:0640", shown(0, 42, 0o640, file, (0, 0))),
            // With the bits of the file type, and with its name, as some programs write it.
            ("1:2:0104755", shown(1, 2, 0o4755, file, (0, 0))),
            ("1:2:0644:file", shown(1, 2, 0o644, file, (0, 0))),
            (
                "0:5:0620:char-5-1",
                shown(0, 5, 0o620, FileType::CharacterDevice, (5, 1)),
            ),
            (
                "0:6:0660:block-259-3",
                shown(0, 6, 0o660, FileType::BlockDevice, (259, 3)),
            ),
            ("7:7:0600:pipe", shown(7, 7, 0o600, FileType::Fifo, (0, 0))),
            (
                "7:7:0600:socket",
                shown(7, 7, 0o600, FileType::Socket, (0, 0)),
            ),
        ] {
            let parsed = Shown::parse(value.as_bytes(), file).unwrap();
            assert_eq!(parsed, expected, "{value}");
            let again = Shown::parse(parsed.value().as_bytes(), file);
            assert_eq!(again, Some(expected), "{}", parsed.value());
        }
        for value in [
            "",
            "0",
            "0:0",
            "0:0:9",
            "-1:0:0644",
            "0:0:0644:char-1",
            "0:0:0644:char-1-x",
        ] {
            assert_eq!(Shown::parse(value.as_bytes(), file), None, "{value}");
        }
        let directory = Shown::parse(b"0:0:01777:char-1-3", FileType::Directory).unwrap();
        assert_eq!(directory.kind, FileType::Directory);
    }

    #[test]
    fn a_map_of_one_user_is_known() {
        assert!(maps_one("         0       1000          1\n"));
        assert!(!maps_one("         0          0 4294967295\n"));
        assert!(!maps_one("0 1000 1\n1 100000 65536\n"));
        assert!(!maps_one(""));
    }
}
