//! Attributes: getattr, setattr, statx, statfs.

use super::Passthrough;
use crate::fs::inodes::{self, STATX_MASK};
use crate::fs::watch::kind;
use crate::fs::wire::{
    self, Attr, AttrOut, FuseStatx, GETATTR_FH, GetattrIn, ROOT_ID, SetattrIn, StatfsOut, StatxIn,
    StatxOut, SxTime, encode_device, setattr,
};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Statx, StatxFlags, Timespec, Timestamps, UTIME_NOW,
    UTIME_OMIT, Uid,
};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

/// Maximum link count of the synthetic root.
const ROOT_LINKS: u32 = 2;

/// The fields of statx(2) that the protocol carries: the basic ones and the creation time.
const STATX_FIELDS: u32 = STATX_MASK.bits() & 0xfff;

impl From<&Statx> for Attr {
    fn from(stat: &Statx) -> Self {
        Self {
            ino: stat.stx_ino,
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            // Seconds are unsigned in the protocol; the kernel converts them back to signed.
            atime: stat.stx_atime.tv_sec as u64,
            mtime: stat.stx_mtime.tv_sec as u64,
            ctime: stat.stx_ctime.tv_sec as u64,
            atimensec: stat.stx_atime.tv_nsec,
            mtimensec: stat.stx_mtime.tv_nsec,
            ctimensec: stat.stx_ctime.tv_nsec,
            mode: stat.stx_mode.into(),
            nlink: stat.stx_nlink,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            rdev: encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
            blksize: stat.stx_blksize,
            flags: 0,
        }
    }
}

impl Passthrough {
    /// FUSE_GETATTR
    ///
    /// # Errors
    /// The error from the host.
    pub fn getattr(&self, nodeid: u64, arg: &GetattrIn) -> Result<AttrOut, Errno> {
        if nodeid == ROOT_ID {
            return Ok(self.attr_out(self.root_attr()));
        }
        let inode = self.inodes.get(nodeid)?;
        let fh = (arg.getattr_flags & GETATTR_FH != 0).then_some(arg.fh);
        Ok(self.attr_out(inode.attr(&self.stat(&inode, fh)?)))
    }

    /// FUSE_STATX: the attributes of statx(2) beyond getattr, above all the creation time.
    ///
    /// # Errors
    /// The error from the host.
    pub fn statx(&self, nodeid: u64, arg: &StatxIn) -> Result<StatxOut, Errno> {
        let timeout = self.options.cache.timeout();
        let out = |stat| StatxOut {
            attr_valid: timeout.as_secs(),
            attr_valid_nsec: timeout.subsec_nanos(),
            stat,
            ..StatxOut::default()
        };
        if nodeid == ROOT_ID {
            return Ok(out(root_statx(&self.root_attr())));
        }
        let inode = self.inodes.get(nodeid)?;
        let fh = (arg.getattr_flags & GETATTR_FH != 0).then_some(arg.fh);
        let stat = self.stat(&inode, fh)?;
        let attr = inode.attr(&stat);
        let time = |t: rustix::fs::StatxTimestamp| SxTime {
            tv_sec: t.tv_sec,
            tv_nsec: t.tv_nsec,
            reserved: 0,
        };
        Ok(out(FuseStatx {
            mask: stat.stx_mask & STATX_FIELDS,
            blksize: stat.stx_blksize,
            nlink: stat.stx_nlink,
            uid: attr.uid,
            gid: attr.gid,
            mode: stat.stx_mode,
            ino: attr.ino,
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            atime: time(stat.stx_atime),
            btime: time(stat.stx_btime),
            ctime: time(stat.stx_ctime),
            mtime: time(stat.stx_mtime),
            rdev_major: stat.stx_rdev_major,
            rdev_minor: stat.stx_rdev_minor,
            ..FuseStatx::default()
        }))
    }

    fn stat(&self, inode: &inodes::Inode, fh: Option<u64>) -> Result<Statx, Errno> {
        match fh {
            Some(fh) => self.stat_of(&self.handle(fh, inode.id)?.file),
            None => self.stat_of(self.inodes.fd(inode)?),
        }
    }

    pub(super) fn stat_of(&self, fd: impl AsFd) -> Result<Statx, Errno> {
        let stat = inodes::stat(&fd)?;
        Ok(self.shown(fd, stat))
    }

    fn root_attr(&self) -> Attr {
        let changes = self.shares.changes();
        Attr {
            ino: ROOT_ID,
            mode: (FileType::Directory.as_raw_mode()) | 0o755,
            nlink: ROOT_LINKS,
            // A time that changes with every entry, so that caches notice.
            mtime: changes,
            ctime: changes,
            blksize: 4096,
            ..Attr::default()
        }
    }

    /// FUSE_SETATTR
    ///
    /// # Errors
    /// The error from the host.
    pub fn setattr(&self, nodeid: u64, arg: &SetattrIn) -> Result<AttrOut, Errno> {
        let inode = self.writable(nodeid)?;
        // Changing the size opens the host's file temporarily.
        let kinds = kind::MODIFY | kind::ATTRIB | kind::CLOSE_WRITE;
        let _change = self.change_of(&inode, kinds);
        let fd = self.inodes.fd(&inode)?;
        let fh = (arg.valid & setattr::FH != 0).then_some(arg.fh);
        // The owner first: changing it clears set-user-ID bits, which a mode in the same request may set
        // again.
        if arg.valid & (setattr::UID | setattr::GID) != 0 {
            let given = |bit, number: u32| {
                let wanted = arg.valid & bit != 0;
                match number {
                    u32::MAX if wanted => Err(Errno::INVAL),
                    _ => Ok(wanted.then_some(number)),
                }
            };
            let uid = given(setattr::UID, arg.uid)?;
            let gid = given(setattr::GID, arg.gid)?;
            let (uid, gid) = match &inode.users {
                Some(users) => (
                    uid.map(|uid| users.host_user(uid)).transpose()?,
                    gid.map(|gid| users.host_group(gid)).transpose()?,
                ),
                None => (uid, gid),
            };
            self.chown(&fd, uid, gid)?;
            // The host clears the mode bits; the guest's capabilities are stored in an attribute that the
            // host does not interpret.
            self.drop_privileges(&inode, false)?;
        }
        if arg.valid & setattr::MODE != 0 {
            self.chmod(&fd, arg.mode)?;
        }
        if arg.valid & setattr::SIZE != 0 {
            let bits = arg.valid & setattr::KILL_SUIDGID != 0;
            let truncate = |file: &File| -> Result<(), Errno> {
                self.drop_privileges(&inode, bits)?;
                rustix::fs::ftruncate(file, arg.size)
            };
            match fh {
                Some(fh) => truncate(&self.handle(fh, nodeid)?.file)?,
                None => truncate(&self.open_inode(&inode, OFlags::WRONLY | OFlags::NONBLOCK)?)?,
            }
        }
        if arg.valid & (setattr::ATIME | setattr::MTIME) != 0 {
            let times = Timestamps {
                last_access: time(
                    arg.valid,
                    setattr::ATIME,
                    setattr::ATIME_NOW,
                    arg.atime,
                    arg.atimensec,
                ),
                last_modification: time(
                    arg.valid,
                    setattr::MTIME,
                    setattr::MTIME_NOW,
                    arg.mtime,
                    arg.mtimensec,
                ),
            };
            rustix::fs::utimensat(&fd, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        Ok(self.attr_out(inode.attr(&self.stat(&inode, fh)?)))
    }

    /// Changes the owner through an O_PATH descriptor, as chown(2) does: without set-user-ID bits of a file.
    fn chown(&self, fd: impl AsFd, uid: Option<u32>, gid: Option<u32>) -> Result<(), Errno> {
        let Some(owners) = &self.owners else {
            let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
            return rustix::fs::chownat(fd, c"", uid, gid, AtFlags::EMPTY_PATH);
        };
        self.change_shown(owners, fd, |shown| {
            shown.uid = uid.unwrap_or(shown.uid);
            shown.gid = gid.unwrap_or(shown.gid);
            if shown.kind != FileType::Directory {
                shown.mode &= !super::xattr::privileged_bits(shown.mode);
            }
        })
    }

    /// Changes the mode through an O_PATH descriptor.
    pub(super) fn chmod(&self, fd: impl AsFd, mode: u32) -> Result<(), Errno> {
        let mode = mode & 0o7777;
        match &self.owners {
            None => self.change_host_mode(fd.as_fd(), mode),
            Some(owners) => self.change_shown(owners, fd, |shown| shown.mode = mode),
        }
    }

    /// The same for the file on the host.
    pub(super) fn change_host_mode(&self, fd: BorrowedFd<'_>, mode: u32) -> Result<(), Errno> {
        match crate::sys::change_mode(fd, mode) {
            // Before Linux 6.6, use the descriptor's link in /proc. The file is never a symbolic link: Linux
            // refuses to change their mode before it asks the server.
            Err(error) if error.raw_os_error() == Some(Errno::NOSYS.raw_os_error()) => {
                let name = std::os::fd::AsRawFd::as_raw_fd(&fd).to_string();
                rustix::fs::chmodat(
                    &*self.descriptors,
                    name,
                    Mode::from_raw_mode(mode),
                    AtFlags::empty(),
                )
            }
            other => other.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO)),
        }
    }

    /// FUSE_STATFS
    ///
    /// # Errors
    /// The error from the host.
    pub fn statfs(&self, nodeid: u64) -> Result<StatfsOut, Errno> {
        if nodeid == ROOT_ID {
            return Ok(StatfsOut {
                bsize: 4096,
                frsize: 4096,
                namelen: wire::NAME_MAX as u32,
                ..StatfsOut::default()
            });
        }
        let inode = self.inodes.get(nodeid)?;
        let stat = rustix::fs::fstatvfs(self.inodes.fd(&inode)?)?;
        Ok(StatfsOut {
            blocks: stat.f_blocks,
            bfree: stat.f_bfree,
            bavail: stat.f_bavail,
            files: stat.f_files,
            ffree: stat.f_ffree,
            bsize: stat.f_bsize as u32,
            namelen: stat.f_namemax as u32,
            frsize: stat.f_frsize as u32,
            ..StatfsOut::default()
        })
    }
}

/// Attributes of the synthetic root, which has no creation time.
fn root_statx(attr: &Attr) -> FuseStatx {
    let time = |seconds: u64| SxTime {
        tv_sec: seconds as i64,
        ..SxTime::default()
    };
    FuseStatx {
        mask: STATX_FIELDS & !StatxFlags::BTIME.bits(),
        blksize: attr.blksize,
        nlink: attr.nlink,
        mode: attr.mode as u16,
        ino: attr.ino,
        ctime: time(attr.ctime),
        mtime: time(attr.mtime),
        ..FuseStatx::default()
    }
}

fn time(valid: u32, set: u32, now: u32, seconds: u64, nanoseconds: u32) -> Timespec {
    let tv_nsec = if valid & set == 0 {
        UTIME_OMIT
    } else if valid & now != 0 {
        UTIME_NOW
    } else {
        // Larger values could be UTIME_NOW or UTIME_OMIT.
        nanoseconds.min(999_999_999).into()
    };
    Timespec {
        tv_sec: seconds as i64,
        tv_nsec,
    }
}
