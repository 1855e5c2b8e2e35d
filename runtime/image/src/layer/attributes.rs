//! Owners, modes, extended attributes and times, set in an order in which none resets another.

use crate::archive::{Entry, Kind};
use crate::error::invalid;
use rustix::fs::{AtFlags, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Prefix of attributes that have a meaning for the host kernel, as stored by virtio-fs for guests: see
/// `koya_devices::fs::passthrough`.
const PREFIX: &str = "user.koya.";

/// Attribute for owners, modes and file types that only root can set, as in virtio-fs (see `koya_devices::fs::passthrough`)
/// and containers/storage: `UID:GID:MODE` and, for device nodes and FIFOs, the type.
const OVERRIDE: &str = "user.containers.override_stat";

pub(super) fn owner(entry: &Entry) -> io::Result<(Option<Uid>, Option<Gid>)> {
    let number = |n: u64| {
        let number = u32::try_from(n).ok().filter(|n| *n != u32::MAX);
        number.ok_or_else(|| invalid("an owner that is no number"))
    };
    let (uid, gid) = (number(entry.uid)?, number(entry.gid)?);
    Ok((Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))))
}

const SET_ID: Mode = Mode::SUID.union(Mode::SGID);

/// Mode of the file on the host. Without owners, all files belong to this user, who reads and writes them on behalf of the
/// guest's root: no mode may prevent that, and nothing is set-user-ID.
pub(super) fn mode(mode: u32, owners: bool, is_directory: bool) -> Mode {
    let mode = Mode::from_raw_mode(mode & 0o7777);
    match (owners, is_directory) {
        (true, _) => mode,
        (false, true) => (mode | Mode::RWXU) - SET_ID,
        (false, false) => (mode | Mode::RUSR | Mode::WUSR) - SET_ID,
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

/// Sets the attributes of a symbolic link or a device node, which can't have `user.` attributes.
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

/// Owner, mode and type of an entry that must be stored without root; `None` if those of the host's file are right.
fn kept(entry: &Entry) -> io::Result<Option<String>> {
    owner(entry)?;
    let (major, minor) = entry.device;
    let kind = match entry.kind {
        Kind::CharacterDevice => format!(":char-{major}-{minor}"),
        Kind::BlockDevice => format!(":block-{major}-{minor}"),
        Kind::Fifo => ":pipe".to_owned(),
        _ => String::new(),
    };
    let is_directory = entry.kind == Kind::Directory;
    let bits = entry.mode & 0o7777;
    let is_plain = (entry.uid, entry.gid) == (0, 0)
        && kind.is_empty()
        && mode(bits, false, is_directory).as_raw_mode() == bits;
    let (uid, gid) = (entry.uid, entry.gid);
    Ok((!is_plain).then(|| format!("{uid}:{gid}:{bits:04o}{kind}")))
}

/// Sets the owner and attributes of a file or directory.
///
/// # Errors
/// EOPNOTSUPP for a file that represents a special file, if the file system can't store its type; otherwise the error
/// from the host.
pub(super) fn own(file: impl AsFd, entry: &Entry, owners: bool) -> io::Result<()> {
    if owners {
        let (uid, gid) = owner(entry)?;
        rustix::fs::fchown(&file, uid, gid)?;
    } else if let Some(kept) = kept(entry)? {
        let is_file = matches!(entry.kind, Kind::Regular | Kind::Directory);
        match rustix::fs::fsetxattr(&file, OVERRIDE, kept.as_bytes(), XattrFlags::empty()) {
            Err(Errno::OPNOTSUPP) if is_file => {}
            other => other?,
        }
    }
    for (name, value) in &entry.xattrs {
        let Some(stored) = stored(name)? else {
            continue;
        };
        if !owners && stored == OVERRIDE {
            continue;
        }
        match rustix::fs::fsetxattr(&file, &stored, value, XattrFlags::empty()) {
            // On a file system without attributes they are lost, as with other tools.
            Err(Errno::OPNOTSUPP) => {}
            other => other?,
        }
    }
    Ok(())
}

/// The host's name of an attribute, if a container may have it.
fn stored(name: &[u8]) -> io::Result<Option<OsString>> {
    let mut out = OsString::new();
    match name {
        n if n.starts_with(PREFIX.as_bytes()) => return Err(invalid("an attribute of Koya's")),
        n if n.starts_with(b"user.") => {}
        // The label belongs to the machine on which the image was built.
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

/// Removes a directory's attributes, which are replaced by those of an entry in an upper layer.
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
    use super::{kept, mode};
    use crate::archive::{Entry, Kind};

    #[test]
    fn what_root_alone_can_give_is_kept_apart() {
        let of = |kind, (uid, gid), mode, device| {
            let entry = Entry {
                kind,
                name: b"x".to_vec(),
                link: Vec::new(),
                mode,
                uid,
                gid,
                mtime: (0, 0),
                device,
                size: 0,
                sparse: None,
                xattrs: Vec::new(),
            };
            kept(&entry).map(|kept| kept.unwrap_or_default())
        };
        for (kind, owner, mode, device, expected) in [
            (Kind::Regular, (0, 0), 0o644, (0, 0), ""),
            (Kind::Directory, (0, 0), 0o1777, (0, 0), ""),
            (Kind::Regular, (0, 42), 0o640, (0, 0), "0:42:0640"),
            (Kind::Regular, (0, 0), 0o4755, (0, 0), "0:0:4755"),
            (Kind::Regular, (0, 0), 0o444, (0, 0), "0:0:0444"),
            (Kind::Directory, (0, 0), 0o555, (0, 0), "0:0:0555"),
            (
                Kind::CharacterDevice,
                (0, 5),
                0o620,
                (5, 1),
                "0:5:0620:char-5-1",
            ),
            (
                Kind::BlockDevice,
                (0, 6),
                0o660,
                (8, 0),
                "0:6:0660:block-8-0",
            ),
            (Kind::Fifo, (0, 0), 0o600, (0, 0), "0:0:0600:pipe"),
        ] {
            assert_eq!(of(kind, owner, mode, device).unwrap(), expected, "{kind:?}");
        }
        assert!(of(Kind::Regular, (u64::MAX, 0), 0o644, (0, 0)).is_err());
    }

    #[test]
    fn a_user_can_write_and_remove_what_belongs_to_root_elsewhere() {
        for (stored, owners, is_directory, expected) in [
            (0o40555, true, true, 0o555),
            (0o40555, false, true, 0o755),
            (0o100_000, true, false, 0),
            (0o100_000, false, false, 0o600),
            (0o104_755, false, false, 0o755),
            (0o104_755, true, false, 0o4755),
            (0o41777, false, true, 0o1777),
        ] {
            assert_eq!(mode(stored, owners, is_directory).as_raw_mode(), expected);
        }
    }
}
