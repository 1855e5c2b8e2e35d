//! Creating, moving and removing directory entries.

use super::{Caller, Passthrough};
use crate::fs::inodes::{self, Identity, Inode};
use crate::fs::watch::kind;
use crate::fs::wire::{EntryOut, LinkIn, MkdirIn, MknodIn, ROOT_ID, decode_device};
use rustix::fs::{AtFlags, FileType, Mode, RenameFlags};
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd};

/// Events that a watch reports for a file that loses a name.
const ENDS: u32 = kind::DELETE | kind::DELETE_SELF | kind::ATTRIB;

/// Checks that a name is a single path component other than `.` and `..`.
pub(super) fn check(name: &CStr) -> Result<(), Errno> {
    let bytes = name.to_bytes();
    if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
        return Err(Errno::INVAL);
    }
    if bytes.len() > crate::fs::wire::NAME_MAX {
        return Err(Errno::NAMETOOLONG);
    }
    Ok(())
}

/// Removes a new file if its owner could not be set, since the guest gets an error for its creation.
pub(super) fn or_remove(
    owned: Result<(), Errno>,
    directory: impl AsFd,
    name: &CStr,
    flags: AtFlags,
) -> Result<(), Errno> {
    if owned.is_err() {
        rustix::fs::unlinkat(directory, name, flags).ok();
    }
    owned
}

impl Passthrough {
    /// FUSE_MKDIR
    ///
    /// # Errors
    /// The error from the host.
    pub fn mkdir(
        &self,
        parent: u64,
        name: &CStr,
        arg: &MkdirIn,
        caller: Caller,
    ) -> Result<EntryOut, Errno> {
        let directory = self.writable(parent)?;
        check(name)?;
        let caller = self.owner_in(&directory, caller)?;
        let _change = self.change_at(parent, name, kind::CREATE | kind::ATTRIB);
        let fd = self.inodes.fd(&directory)?;
        let mode = Mode::from_raw_mode(arg.mode & 0o7777);
        self.with_umask(arg.umask, || {
            self.opening_up(&[&directory], || rustix::fs::mkdirat(&fd, name, mode))
        })?;
        // A directory keeps its mode bits when its owner changes.
        let made = inodes::open_entry(&fd, name)?;
        let owned = self.set_owner(&made, caller, 0, &directory);
        or_remove(owned, &fd, name, AtFlags::REMOVEDIR)?;
        self.entry_in(made, &directory, name)
    }

    /// FUSE_MKNOD: files, sockets, FIFOs and device nodes. Where owners are kept in attributes, an empty file stands for
    /// each special file.
    ///
    /// # Errors
    /// The error from the host.
    pub fn mknod(
        &self,
        parent: u64,
        name: &CStr,
        arg: &MknodIn,
        caller: Caller,
    ) -> Result<EntryOut, Errno> {
        let directory = self.writable(parent)?;
        check(name)?;
        let caller = self.owner_in(&directory, caller)?;
        let _change = self.change_at(parent, name, kind::CREATE | kind::ATTRIB);
        let fd = self.inodes.fd(&directory)?;
        let kind = FileType::from_raw_mode(arg.mode);
        let mode = self.mode_to_create(arg.mode);
        let (major, minor) = decode_device(arg.rdev);
        let device = rustix::fs::makedev(major, minor);
        let make = |kind| {
            self.with_umask(arg.umask, || {
                let make = || rustix::fs::mknodat(&fd, name, kind, mode, device);
                self.opening_up(&[&directory], make)
            })?;
            inodes::open_entry(&fd, name)
        };
        let is_device = matches!(kind, FileType::CharacterDevice | FileType::BlockDevice);
        let is_special = is_device || matches!(kind, FileType::Fifo | FileType::Socket);
        let made = match self.owners.as_ref().filter(|_| is_special) {
            None => make(kind)?,
            Some(owners) => {
                let made = make(FileType::RegularFile)?;
                let kept = self.change_shown(owners, &made, |shown| {
                    (shown.kind, shown.device) = (kind, (major, minor));
                });
                if kept.is_err() {
                    rustix::fs::unlinkat(&fd, name, AtFlags::empty())?;
                }
                match kept {
                    Ok(()) => made,
                    // The file system has no attributes.
                    Err(Errno::OPNOTSUPP) if is_device => return Err(Errno::PERM),
                    Err(Errno::OPNOTSUPP) => make(kind)?,
                    Err(error) => return Err(error),
                }
            }
        };
        let owned = self.set_owner(&made, caller, arg.mode, &directory);
        or_remove(owned, &fd, name, AtFlags::empty())?;
        self.entry_in(made, &directory, name)
    }

    /// FUSE_SYMLINK
    ///
    /// # Errors
    /// The error from the host.
    pub fn symlink(
        &self,
        parent: u64,
        name: &CStr,
        target: &CStr,
        caller: Caller,
    ) -> Result<EntryOut, Errno> {
        let directory = self.writable(parent)?;
        check(name)?;
        let caller = self.owner_in(&directory, caller)?;
        let _change = self.change_at(parent, name, kind::CREATE | kind::ATTRIB);
        let fd = self.inodes.fd(&directory)?;
        self.opening_up(&[&directory], || rustix::fs::symlinkat(target, &fd, name))?;
        let made = inodes::open_entry(&fd, name)?;
        let owned = self.set_owner(&made, caller, 0, &directory);
        or_remove(owned, &fd, name, AtFlags::empty())?;
        self.entry_in(made, &directory, name)
    }

    /// FUSE_READLINK
    ///
    /// # Errors
    /// The error from the host.
    pub fn readlink(&self, nodeid: u64) -> Result<CString, Errno> {
        if nodeid == ROOT_ID {
            return Err(Errno::INVAL);
        }
        let inode = self.inodes.get(nodeid)?;
        rustix::fs::readlinkat(self.inodes.fd(&inode)?, c"", Vec::new())
    }

    /// FUSE_LINK
    ///
    /// # Errors
    /// The error from the host; EXDEV between file systems.
    pub fn link(&self, parent: u64, name: &CStr, arg: &LinkIn) -> Result<EntryOut, Errno> {
        let directory = self.writable(parent)?;
        let inode = self.writable(arg.oldnodeid)?;
        check(name)?;
        let _change = (
            self.change_at(parent, name, kind::CREATE),
            self.change_of(&inode, kind::ATTRIB),
        );
        let from = self.inodes.fd(&inode)?;
        let to = self.inodes.fd(&directory)?;
        let link = || self.link_descriptor(&*from, &*to, name);
        match self.opening_up(&[&directory], link) {
            // It was found through another share, which is another mount.
            Err(Errno::XDEV) => {
                let from = self.inodes.fd_in(&inode, &directory.export()?)?;
                self.link_descriptor(from, &*to, name)?;
            }
            made => made?,
        }
        self.lookup(parent, name)
    }

    fn link_descriptor(&self, from: impl AsFd, to: impl AsFd, name: &CStr) -> Result<(), Errno> {
        match rustix::fs::linkat(&from, c"", &to, name, AtFlags::EMPTY_PATH) {
            // Confined threads lack CAP_DAC_READ_SEARCH and use the descriptor's link in /proc.
            Err(Errno::NOENT | Errno::PERM) => {
                let link = from.as_fd().as_raw_fd().to_string();
                let flags = AtFlags::SYMLINK_FOLLOW;
                rustix::fs::linkat(&*self.descriptors, link, to, name, flags)
            }
            made => made,
        }
    }

    /// FUSE_UNLINK, and FUSE_RMDIR with `directory`
    ///
    /// # Errors
    /// The error from the host.
    pub fn unlink(&self, parent: u64, name: &CStr, is_directory: bool) -> Result<(), Errno> {
        let directory = self.writable(parent)?;
        check(name)?;
        let _change = self.change_at(parent, name, ENDS);
        let flags = if is_directory {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        let fd = self.inodes.fd(&directory)?;
        self.opening_up(&[&directory], || rustix::fs::unlinkat(&fd, name, flags))?;
        self.removals.note();
        Ok(())
    }

    /// FUSE_RENAME and FUSE_RENAME2
    ///
    /// # Errors
    /// The error from the host.
    pub fn rename(
        &self,
        parent: u64,
        name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> Result<(), Errno> {
        let from = self.writable(parent)?;
        let to = self.writable(new_parent)?;
        check(name)?;
        check(new_name)?;
        let kinds = kind::MOVED | kind::MOVE_SELF | ENDS;
        let _change = (
            self.change_at(parent, name, kinds),
            self.change_at(new_parent, new_name, kinds),
        );
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let (from_fd, to_fd) = (self.inodes.fd(&from)?, self.inodes.fd(&to)?);
        let rename = || rustix::fs::renameat_with(&from_fd, name, &to_fd, new_name, flags);
        match self.opening_up(&[&from, &to], rename) {
            // A move to another parent changes the `..` entry of a directory, so the host requires write permission for
            // it.
            Err(Errno::ACCESS) if self.open_up_entries([(&from_fd, name), (&to_fd, new_name)]) => {
                rename()?;
            }
            moved => moved?,
        }
        self.removals.note();
        self.note_move((&to, &*to_fd), new_name);
        if flags.contains(RenameFlags::EXCHANGE) {
            self.note_move((&from, &*from_fd), name);
        }
        Ok(())
    }

    /// After a move that left a whiteout under the old name (RENAME_WHITEOUT): gives it to the caller. The move cannot be
    /// undone, so a file system without owners is no error.
    pub fn give_whiteout(&self, parent: u64, name: &CStr, flags: u32, caller: Caller) {
        if flags & RenameFlags::WHITEOUT.bits() == 0 {
            return;
        }
        let give = || {
            let directory = self.writable(parent)?;
            // The guest's own change: its watches must not report it as one of the host.
            let _change = self.change_at(parent, name, kind::ATTRIB);
            let caller = self.owner_in(&directory, caller)?;
            let entry = inodes::open_entry(self.inodes.fd(&directory)?, name)?;
            let stat = inodes::stat(&entry)?;
            // Another process may have replaced it meanwhile.
            let kind = FileType::from_raw_mode(stat.stx_mode.into());
            let is_whiteout = kind == FileType::CharacterDevice
                && (stat.stx_rdev_major, stat.stx_rdev_minor) == (0, 0);
            match is_whiteout {
                true => self.set_owner(&entry, caller, 0, &directory),
                false => Ok(()),
            }
        };
        if let Err(error) = give() {
            log::debug!("virtio-fs: a whiteout keeps its owner: {error}");
        }
    }

    /// Like [`opening_up`](Self::opening_up) for entries of directories: moves modes that deny access to the owner to the
    /// attribute; returns whether there were any.
    fn open_up_entries<F: AsFd>(&self, entries: [(&F, &CStr); 2]) -> bool {
        let Some(owners) = &self.owners else {
            return false;
        };
        let mut opened = false;
        for (directory, name) in entries {
            let Ok(entry) = inodes::open_entry(directory, name) else {
                continue;
            };
            if inodes::stat(&entry).is_ok_and(|stat| owners.denies_owner(&stat)) {
                opened |= self.change_shown(owners, &entry, |_| {}).is_ok();
            }
        }
        opened
    }

    /// Updates the location and the shares of a moved file.
    fn note_move(&self, (to, fd): (&Inode, impl AsFd), name: &CStr) {
        if let Ok(stat) = inodes::open_entry(fd, name).and_then(inodes::stat)
            && let Ok(export) = to.export()
        {
            let identity = Identity::of(&stat, &export);
            self.inodes.moved(identity, stat.stx_nlink, to, name);
        }
    }
}
