//! Owners, modes, extended attributes and times, in the order in which none undoes another.

use crate::archive::Entry;
use crate::error::invalid;
use rustix::fs::{AtFlags, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Where attributes are kept that mean something to the host's kernel: as virtio-fs keeps them for
/// guests, see `koya_devices::fs::passthrough`.
const PREFIX: &str = "user.koya.";

pub(super) fn owner(entry: &Entry) -> io::Result<(Option<Uid>, Option<Gid>)> {
    let number = |n: u64| {
        let number = u32::try_from(n).ok().filter(|n| *n != u32::MAX);
        number.ok_or_else(|| invalid("an owner that is no number"))
    };
    let (uid, gid) = (number(entry.uid)?, number(entry.gid)?);
    Ok((Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))))
}

/// A mode as the host's file has it. Without owners all files are this user's, who reads and writes
/// them for the guest's root: modes do not hold that back.
pub(super) fn mode(mode: u32, owners: bool, is_directory: bool) -> Mode {
    let mode = Mode::from_raw_mode(mode & 0o7777);
    match (owners, is_directory) {
        (true, _) => mode,
        (false, true) => mode | Mode::RWXU,
        (false, false) => mode | Mode::RUSR | Mode::WUSR,
    }
}

pub(super) fn times((tv_sec, nanos): (i64, u32)) -> Timestamps {
    let stamp = Timespec {
        tv_sec,
        tv_nsec: nanos.into(),
    };
    Timestamps {
        last_access: stamp,
        last_modification: stamp,
    }
}

/// What a link or a device node gets. They can't have attributes of these kinds.
pub(super) fn dress(
    dir: impl AsFd,
    name: &OsStr,
    entry: &Entry,
    owners: bool,
    is_link: bool,
) -> io::Result<()> {
    if owners {
        let (uid, gid) = owner(entry)?;
        rustix::fs::chownat(&dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
    }
    if !is_link {
        rustix::fs::chmodat(
            &dir,
            name,
            mode(entry.mode, owners, false),
            AtFlags::empty(),
        )?;
    }
    let times = times(entry.mtime);
    Ok(rustix::fs::utimensat(
        &dir,
        name,
        &times,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

/// A file's or directory's owner and attributes.
pub(super) fn own(file: impl AsFd, entry: &Entry, owners: bool) -> io::Result<()> {
    if owners {
        let (uid, gid) = owner(entry)?;
        rustix::fs::fchown(&file, uid, gid)?;
    }
    for (name, value) in &entry.xattrs {
        let Some(stored) = stored(name)? else {
            continue;
        };
        match rustix::fs::fsetxattr(&file, &stored, value, XattrFlags::empty()) {
            // A file system without attributes loses them, as with other tools.
            Err(Errno::OPNOTSUPP) => {}
            other => other?,
        }
    }
    Ok(())
}

/// The host's name of an attribute, if it is one that a container can have.
fn stored(name: &[u8]) -> io::Result<Option<OsString>> {
    let mut out = OsString::new();
    match name {
        n if n.starts_with(PREFIX.as_bytes()) => return Err(invalid("an attribute of Koya's")),
        n if n.starts_with(b"user.") => {}
        // The label is of the machine that the image was made on.
        b"security.selinux" => return Ok(None),
        n if n.starts_with(b"security.") || n.starts_with(b"trusted.") => out.push(PREFIX),
        _ => {
            log::debug!(
                "the attribute {} is left out",
                String::from_utf8_lossy(name)
            );
            return Ok(None);
        }
    }
    out.push(OsStr::from_bytes(name));
    Ok(Some(out))
}

/// Takes a directory's attributes away: those of an entry of an upper layer replace them.
pub(super) fn clear(file: impl AsFd) -> io::Result<()> {
    let mut list = Vec::with_capacity(1 << 16);
    match rustix::fs::flistxattr(&file, rustix::buffer::spare_capacity(&mut list)) {
        Ok(_) => {}
        Err(Errno::OPNOTSUPP) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    let names = list
        .split(|b| *b == 0)
        .filter(|name| name.starts_with(b"user."));
    for name in names {
        rustix::fs::fremovexattr(&file, OsString::from_vec(name.to_vec()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::mode;

    #[test]
    fn a_user_can_write_and_remove_what_belongs_to_root_elsewhere() {
        for (stored, owners, is_directory, expected) in [
            (0o40555, true, true, 0o555),
            (0o40555, false, true, 0o755),
            (0o100_000, true, false, 0),
            (0o100_000, false, false, 0o600),
            (0o104_755, false, false, 0o4755),
        ] {
            assert_eq!(mode(stored, owners, is_directory).as_raw_mode(), expected);
        }
    }
}
