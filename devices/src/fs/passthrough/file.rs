//! Files: open, read, write, and operations on open files.

use super::owners::{self, Owners};
use super::{Caller, Passthrough};
use crate::fs::Cache;
use crate::fs::inodes::{self, Inode};
use crate::fs::watch::kind;
use crate::fs::wire::{
    CopyFileRangeIn, CreateIn, EntryOut, FS_IOC_GETFLAGS, FSYNC_FDATASYNC, FallocateIn, FsyncIn,
    IoctlIn, LseekIn, OPEN_KILL_SUIDGID, OpenIn, OpenOut, ROOT_ID, ReadIn, WRITE_CACHE,
    WRITE_KILL_SUIDGID, WriteIn, fopen,
};
use crate::sys;
use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, SeekFrom, openat};
use rustix::io::Errno;
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Neither is O_DIRECT: it would require an alignment of the guest's buffers that the guest does not know.
/// told.
const PASSED_FLAGS: OFlags = OFlags::ACCMODE
    .union(OFlags::TRUNC)
    .union(OFlags::SYNC)
    .union(OFlags::DSYNC)
    .union(OFlags::NOATIME);

fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

/// Offsets of files are signed on the host, and pwritev2(2) takes -1 for the descriptor's position.
fn check_offset(offset: u64) -> Result<(), Errno> {
    i64::try_from(offset).map(drop).map_err(|_| Errno::INVAL)
}

/// Whether the host kernel generates the file's content on reading, so that its size means nothing: a file of procfs,
/// sysfs, control groups and similar file systems.
fn is_made_on_read(file: &File, size: u64) -> Result<bool, Errno> {
    // Files of sysfs have the size of a page.
    if size != 0 && size != 4096 {
        return Ok(false);
    }
    Ok(MADE_ON_READ.contains(&(rustix::fs::fstatfs(file)?.f_type as u32)))
}

/// Magic numbers of such file systems (linux/magic.h).
const MADE_ON_READ: [u32; 11] = [
    0x0000_9fa0, // proc
    0x6265_6572, // sysfs
    0x0027_e0eb, // cgroup
    0x6367_7270, // cgroup2
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
    0x7363_6673, // securityfs
    0xf97c_ff8c, // selinuxfs
    0x6265_6570, // configfs
    0x6165_676c, // pstore
    0xde5e_81e4, // efivarfs
];

impl Passthrough {
    /// FUSE_OPEN
    ///
    /// # Errors
    /// The error from the host; EROFS for a write to a read-only share.
    pub fn open(&self, nodeid: u64, arg: &OpenIn) -> Result<OpenOut, Errno> {
        if nodeid == ROOT_ID {
            return Err(Errno::ISDIR);
        }
        let inode = self.inodes.get(nodeid)?;
        if inode.kind != FileType::RegularFile {
            return Err(Errno::NXIO);
        }
        let flags = self.host_flags(arg.flags);
        if flags.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC) {
            self.writable(nodeid)?;
        }
        let truncates = flags.contains(OFlags::TRUNC);
        let _change = truncates.then(|| self.change_of(&inode, kind::MODIFY | kind::ATTRIB));
        let file = match self.open_inode(&inode, flags) {
            // Only a file's owner may use that flag; the guest kernel has already made its own check.
            Err(Errno::PERM) if flags.contains(OFlags::NOATIME) => {
                self.open_inode(&inode, flags - OFlags::NOATIME)?
            }
            other => other?,
        };
        if truncates {
            let bits = arg.open_flags & OPEN_KILL_SUIDGID != 0;
            self.drop_privileges(&inode, bits)?;
        }
        let stat = inodes::stat(&file)?;
        // The guest trusts its cached size, which would truncate what it reads.
        let is_old = self.options.cache == Cache::Auto && inode.has_changed(&stat);
        let is_generated = is_made_on_read(&file, stat.stx_size)?;
        let mut opened = self.opened(&inode, file, flags)?;
        // The guest's page cache ends at the file's size; direct I/O forwards every read.
        if is_generated {
            opened.open_flags = fopen::DIRECT_IO;
        }
        if is_old {
            opened.open_flags |= fopen::CHANGED;
        }
        Ok(opened)
    }

    fn opened(&self, inode: &Arc<Inode>, file: File, flags: OFlags) -> Result<OpenOut, Errno> {
        let open_flags = match self.options.cache {
            Cache::Never => fopen::DIRECT_IO | fopen::PARALLEL_DIRECT_WRITES,
            Cache::Auto => 0,
            Cache::Always | Cache::Writeback => fopen::KEEP_CACHE,
        };
        let writes = flags.intersects(OFlags::WRONLY | OFlags::RDWR);
        let node = self.inodes.fd(inode)?;
        Ok(OpenOut {
            fh: self.handles.insert(inode, node, file, writes)?,
            open_flags,
            backing_id: 0,
        })
    }

    fn host_flags(&self, flags: u32) -> OFlags {
        let mut flags = OFlags::from_bits_retain(flags) & PASSED_FLAGS;
        // A guest in writeback mode reads the rest of a page around a small write.
        if self.options.cache == Cache::Writeback && flags & OFlags::ACCMODE == OFlags::WRONLY {
            flags = (flags - OFlags::ACCMODE) | OFlags::RDWR;
        }
        flags | OFlags::NONBLOCK
    }

    /// FUSE_CREATE
    ///
    /// # Errors
    /// The error from the host.
    pub fn create(
        &self,
        parent: u64,
        name: &CStr,
        arg: &CreateIn,
        caller: Caller,
    ) -> Result<(EntryOut, OpenOut), Errno> {
        let directory = self.writable(parent)?;
        super::names::check(name)?;
        let caller = self.owner_in(&directory, caller)?;
        let _change = self.change_at(parent, name, kind::CREATE | kind::ATTRIB | kind::MODIFY);
        let fd = self.inodes.fd(&directory)?;
        let flags = self.host_flags(arg.flags)
            | OFlags::CREATE
            | OFlags::EXCL
            | OFlags::NOFOLLOW
            | OFlags::CLOEXEC;
        let mode = self.mode_to_create(arg.mode);
        let made = self.with_umask(arg.umask, || {
            self.opening_up(&[&directory], || openat(&fd, name, flags, mode))
        });
        match made {
            Ok(file) => {
                let owned = self.set_owner(&file, caller, arg.mode, &directory);
                super::names::or_remove(owned, &fd, name, AtFlags::empty())?;
                self.created(file.into(), flags, &directory, name)
            }
            Err(Errno::EXIST) if arg.flags & OFlags::EXCL.bits() == 0 => {
                let entry = self.lookup(parent, name)?;
                let again = OpenIn {
                    flags: arg.flags,
                    open_flags: arg.open_flags,
                };
                match self.open(entry.nodeid, &again) {
                    Ok(open) => Ok((entry, open)),
                    Err(error) => {
                        self.forget(entry.nodeid, 1);
                        Err(error)
                    }
                }
            }
            Err(error) => Err(error),
        }
    }

    /// FUSE_TMPFILE: creates an unnamed file.
    ///
    /// # Errors
    /// The error from the host; EOPNOTSUPP if its file system has no unnamed files.
    pub fn tmpfile(
        &self,
        parent: u64,
        arg: &CreateIn,
        caller: Caller,
    ) -> Result<(EntryOut, OpenOut), Errno> {
        let directory = self.writable(parent)?;
        let caller = self.owner_in(&directory, caller)?;
        let fd = self.inodes.fd(&directory)?;
        let excl = OFlags::from_bits_retain(arg.flags) & OFlags::EXCL;
        let flags = self.host_flags(arg.flags) | OFlags::TMPFILE | OFlags::CLOEXEC | excl;
        let mode = self.mode_to_create(arg.mode);
        let file = self.with_umask(arg.umask, || {
            self.opening_up(&[&directory], || openat(&fd, c".", flags, mode))
        })?;
        self.set_owner(&file, caller, arg.mode, &directory)?;
        // It has no name; this one cannot be that of another file.
        self.created(file.into(), flags, &directory, c"?")
    }

    /// Node and handle of a file that was just created and opened. The node gets its own descriptor, obtained
    /// from the file and not by name, since another file may have taken the name by now.
    fn created(
        &self,
        file: File,
        flags: OFlags,
        directory: &Inode,
        name: &CStr,
    ) -> Result<(EntryOut, OpenOut), Errno> {
        let node = self.reopen(&file, OFlags::PATH)?;
        let entry = self.entry_in(node, directory, name)?;
        let opened = self
            .inodes
            .get(entry.nodeid)
            .and_then(|inode| self.opened(&inode, file, flags));
        if opened.is_err() {
            self.forget(entry.nodeid, 1);
        }
        Ok((entry, opened?))
    }

    /// FUSE_READ, directly into guest memory
    ///
    /// # Errors
    /// The error from the host.
    pub fn read<B: BitmapSlice>(
        &self,
        nodeid: u64,
        arg: &ReadIn,
        into: &[VolatileSlice<'_, B>],
    ) -> Result<usize, Errno> {
        let handle = self.handle(arg.fh, nodeid)?;
        check_offset(arg.offset)?;
        sys::read_at(&handle.file, into, arg.offset).map_err(errno)
    }

    /// FUSE_WRITE, directly from guest memory
    ///
    /// A file opened with O_APPEND by the guest is not opened with O_APPEND here, because pages written back
    /// from the guest's page cache have to go to their own offsets. A write by a process appends explicitly,
    /// so that host and guest can append to the same file.
    ///
    /// # Errors
    /// The error from the host.
    pub fn write<B: BitmapSlice>(
        &self,
        nodeid: u64,
        arg: &WriteIn,
        from: &[VolatileSlice<'_, B>],
    ) -> Result<usize, Errno> {
        let inode = self.writable(nodeid)?;
        let handle = self.handles.get(arg.fh, nodeid)?;
        check_offset(arg.offset)?;
        let _change = self.change_of(&inode, kind::MODIFY | kind::ATTRIB);
        let bits = arg.write_flags & WRITE_KILL_SUIDGID != 0;
        self.drop_privileges(&inode, bits)?;
        let append = arg.flags & OFlags::APPEND.bits() != 0
            && arg.write_flags & WRITE_CACHE == 0
            && self.options.cache != Cache::Writeback;
        sys::write_at(&handle.file, from, arg.offset, append).map_err(errno)
    }

    /// FUSE_FLUSH: the guest closes a descriptor. Closing a duplicate here makes network file systems report
    /// failed writes.
    ///
    /// # Errors
    /// The error from the host.
    pub fn flush(&self, nodeid: u64, fh: u64) -> Result<(), Errno> {
        let handle = self.handle(fh, nodeid)?;
        let copy = rustix::io::fcntl_dupfd_cloexec(&handle.file, 0)?;
        sys::close(copy).map_err(errno)
    }

    /// FUSE_FSYNC and FUSE_FSYNCDIR
    ///
    /// # Errors
    /// The error from the host.
    pub fn fsync(&self, nodeid: u64, arg: &FsyncIn) -> Result<(), Errno> {
        if nodeid == ROOT_ID {
            return Ok(());
        }
        let handle = self.handle(arg.fh, nodeid)?;
        if arg.fsync_flags & FSYNC_FDATASYNC != 0 {
            rustix::fs::fdatasync(&handle.file)
        } else {
            rustix::fs::fsync(&handle.file)
        }
    }

    /// FUSE_SYNCFS: syncs the file system of a node. Linux sends the root's node, for which the file systems
    /// of all exports and those below them that the guest has reached are synced.
    ///
    /// # Errors
    /// The first error from the host.
    pub fn syncfs(&self, nodeid: u64) -> Result<(), Errno> {
        if nodeid != ROOT_ID {
            let inode = self.inodes.get(nodeid)?;
            return rustix::fs::syncfs(self.open_inode(&inode, OFlags::RDONLY)?);
        }
        let mut first = Ok(());
        for export in self.shares.exports() {
            let synced = match (export.anchor(), export.root(), export.kind) {
                (Some(anchor), _, _) => rustix::fs::syncfs(anchor),
                (None, Some(root), FileType::RegularFile) => self
                    .reopen(&*root, OFlags::RDONLY)
                    .and_then(rustix::fs::syncfs),
                _ => Ok(()),
            };
            first = first.and(synced);
            for fd in export.nested() {
                let opened = self.reopen(&*fd, OFlags::RDONLY);
                first = first.and(opened.and_then(rustix::fs::syncfs));
            }
        }
        first
    }

    /// FUSE_FALLOCATE
    ///
    /// # Errors
    /// The error from the host.
    pub fn fallocate(&self, nodeid: u64, arg: &FallocateIn) -> Result<(), Errno> {
        let inode = self.writable(nodeid)?;
        let handle = self.handles.get(arg.fh, nodeid)?;
        let _change = self.change_of(&inode, kind::MODIFY | kind::ATTRIB);
        // The request does not name the caller, and changing the length of a program is rare.
        self.drop_privileges(&inode, true)?;
        let mode = FallocateFlags::from_bits(arg.mode).ok_or(Errno::OPNOTSUPP)?;
        rustix::fs::fallocate(&handle.file, mode, arg.offset, arg.length)
    }

    /// FUSE_LSEEK: SEEK_DATA and SEEK_HOLE
    ///
    /// # Errors
    /// The error from the host; ENOSYS with writeback, where the host does not know what the guest has
    /// written and a copy that skips holes would lose it: the guest kernel then treats files as data
    /// throughout.
    pub fn lseek(&self, nodeid: u64, arg: &LseekIn) -> Result<u64, Errno> {
        if self.options.cache == Cache::Writeback {
            return Err(Errno::NOSYS);
        }
        let handle = self.handle(arg.fh, nodeid)?;
        const SEEK_DATA: u32 = 3;
        const SEEK_HOLE: u32 = 4;
        let to = match arg.whence {
            SEEK_DATA => SeekFrom::Data(arg.offset),
            SEEK_HOLE => SeekFrom::Hole(arg.offset),
            _ => return Err(Errno::INVAL),
        };
        rustix::fs::seek(&handle.file, to)
    }

    /// FUSE_IOCTL: the flags of a file, as shown by lsattr(1). The guest does not change them: some bind the host's root, too.
    ///
    /// # Errors
    /// The error from the host; ENOSYS for anything else, which programs see as ENOTTY.
    pub fn ioctl(&self, nodeid: u64, arg: &IoctlIn) -> Result<u32, Errno> {
        if arg.cmd != FS_IOC_GETFLAGS || arg.out_size as usize != size_of::<u32>() {
            return Err(Errno::NOSYS);
        }
        let handle = self.handle(arg.fh, nodeid)?;
        Ok(rustix::fs::ioctl_getflags(&handle.file)?.bits())
    }

    /// FUSE_COPY_FILE_RANGE
    ///
    /// # Errors
    /// The error from the host.
    pub fn copy_file_range(&self, nodeid: u64, arg: &CopyFileRangeIn) -> Result<u32, Errno> {
        let from = self.handle(arg.fh_in, nodeid)?;
        let target = self.writable(arg.nodeid_out)?;
        let to = self.handles.get(arg.fh_out, arg.nodeid_out)?;
        let _change = self.change_of(&target, kind::MODIFY | kind::ATTRIB);
        self.drop_privileges(&target, true)?;
        let (mut from_at, mut to_at) = (arg.off_in, arg.off_out);
        // The count in the reply has 32 bits.
        let len = arg.len.min(1 << 30) as usize;
        let copied = rustix::fs::copy_file_range(
            &from.file,
            Some(&mut from_at),
            &to.file,
            Some(&mut to_at),
            len,
        )?;
        Ok(copied as u32)
    }

    /// Runs `make` with the umask of the guest's process, so that the host applies it like the guest kernel
    /// would: not in directories with default ACLs. Worker threads have their own umask.
    pub(super) fn with_umask<T>(&self, umask: u32, make: impl FnOnce() -> T) -> T {
        rustix::process::umask(Mode::from_raw_mode(umask & 0o777));
        let made = make();
        rustix::process::umask(Mode::empty());
        made
    }

    /// The mode with which the host creates a file.
    pub(super) fn mode_to_create(&self, mode: u32) -> Mode {
        let privileged = match self.owners {
            None => 0,
            Some(_) => 0o6000,
        };
        Mode::from_raw_mode(mode & 0o7777 & !privileged)
    }

    /// The caller as an owner of files in a directory, before anything is made for it there.
    ///
    /// # Errors
    /// EOVERFLOW if the directory's share has mapped users, and the caller is not one of them.
    pub(super) fn owner_in(&self, directory: &Inode, caller: Caller) -> Result<Caller, Errno> {
        Ok(match &directory.users {
            Some(users) => Caller {
                uid: users.host_user(caller.uid)?,
                gid: users.host_group(caller.gid)?,
            },
            None => caller,
        })
    }

    /// Gives a new file to the [caller](Self::owner_in). In a directory with the set-group-ID bit, the host has already set the
    /// group to that of the directory.
    pub(super) fn set_owner(
        &self,
        fd: impl AsFd,
        caller: Caller,
        mode: u32,
        directory: &Inode,
    ) -> Result<(), Errno> {
        if let Some(owners) = &self.owners {
            return self.keep_owner(owners, fd, caller, mode, directory);
        }
        if caller.uid == 0 && caller.gid == 0 {
            return Ok(());
        }
        if caller.uid == u32::MAX || caller.gid == u32::MAX {
            return Err(Errno::INVAL);
        }
        let inherited = inodes::stat(self.inodes.fd(directory)?)?.stx_mode & 0o2000 != 0;
        let gid = (!inherited).then(|| rustix::fs::Gid::from_raw(caller.gid));
        let uid = Some(rustix::fs::Uid::from_raw(caller.uid));
        match rustix::fs::chownat(&fd, c"", uid, gid, AtFlags::EMPTY_PATH) {
            // A file system without owners, or one that assigns its own: FAT, SMB, NFS with root squashing.
            Err(Errno::PERM | Errno::OPNOTSUPP) => return Ok(()),
            given => given?,
        }
        // The change of owner cleared these bits.
        if mode & 0o6000 != 0 {
            let now = u32::from(inodes::stat(&fd)?.stx_mode);
            self.chmod(&fd, now | mode & 0o6000)?;
        }
        Ok(())
    }

    /// The same where owners are kept in attributes: on a file system without attributes, files belong to the user.
    fn keep_owner(
        &self,
        owners: &Owners,
        fd: impl AsFd,
        caller: Caller,
        mode: u32,
        directory: &Inode,
    ) -> Result<(), Errno> {
        let parent = self.inodes.fd(directory)?;
        let parent = owners.shown(&parent, &inodes::stat(&parent)?);
        let kept = self.change_shown(owners, fd, |shown| {
            let (gid, more) = owners::inherited(&parent, shown.kind, caller.gid);
            (shown.uid, shown.gid) = (caller.uid, gid);
            shown.mode |= mode & 0o6000 | more;
        });
        match kept {
            Err(Errno::OPNOTSUPP) => Ok(()),
            other => other,
        }
    }
}
