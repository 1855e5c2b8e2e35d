//! Files: open, read, write, and what is done to an open file.

use super::{Caller, Passthrough};
use crate::fs::Cache;
use crate::fs::inodes::{self, Inode};
use crate::fs::watch::kind;
use crate::fs::wire::{
    CopyFileRangeIn, CreateIn, EntryOut, FSYNC_FDATASYNC, FallocateIn, FsyncIn, LseekIn,
    OPEN_KILL_SUIDGID, OpenIn, OpenOut, ROOT_ID, ReadIn, WRITE_CACHE, WRITE_KILL_SUIDGID, WriteIn,
    fopen,
};
use crate::sys;
use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, SeekFrom, openat};
use rustix::io::Errno;
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// The flags of a guest's open that reach the host. O_APPEND does not: see [`Passthrough::write`].
/// O_DIRECT does not: it would ask the guest's buffers for an alignment that the guest promised to
/// another file system.
const PASSED_FLAGS: OFlags = OFlags::ACCMODE
    .union(OFlags::TRUNC)
    .union(OFlags::SYNC)
    .union(OFlags::DSYNC)
    .union(OFlags::NOATIME);

fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

impl Passthrough {
    /// FUSE_OPEN
    ///
    /// # Errors
    /// The host's; EROFS for a write to a read-only share.
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
        let _acting = truncates.then(|| self.acting_on(&inode, kind::MODIFY | kind::ATTRIB));
        let file = match self.open_inode(&inode, flags) {
            // Only a file's owner may ask for that; the guest's kernel has checked its own side.
            Err(Errno::PERM) if flags.contains(OFlags::NOATIME) => {
                self.open_inode(&inode, flags - OFlags::NOATIME)?
            }
            other => other?,
        };
        if truncates {
            let bits = arg.open_flags & OPEN_KILL_SUIDGID != 0;
            self.drop_privileges(&inode, bits)?;
        }
        // The guest takes what it remembers of the size for true, and it would cut what it reads.
        let is_old = self.options.cache == Cache::Auto && inode.has_changed(&inodes::stat(&file)?);
        let mut opened = self.opened(&inode, file, flags)?;
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
        // A guest that writes back whole pages reads what is round a small write.
        if self.options.cache == Cache::Writeback && flags & OFlags::ACCMODE == OFlags::WRONLY {
            flags = (flags - OFlags::ACCMODE) | OFlags::RDWR;
        }
        flags | OFlags::NONBLOCK
    }

    /// FUSE_CREATE
    ///
    /// # Errors
    /// The host's.
    pub fn create(
        &self,
        parent: u64,
        name: &CStr,
        arg: &CreateIn,
        caller: Caller,
    ) -> Result<(EntryOut, OpenOut), Errno> {
        let directory = self.writable(parent)?;
        super::names::check(name)?;
        let _acting = self.acting_at(parent, name, kind::CREATE | kind::ATTRIB | kind::MODIFY);
        let fd = self.inodes.fd(&directory)?;
        let flags = self.host_flags(arg.flags)
            | OFlags::CREATE
            | OFlags::EXCL
            | OFlags::NOFOLLOW
            | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(arg.mode & 0o7777);
        let made = self.with_umask(arg.umask, || openat(&fd, name, flags, mode));
        match made {
            Ok(file) => {
                self.give_to(&file, caller, arg.mode, &directory)?;
                self.made(file.into(), flags, &directory, name)
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

    /// FUSE_TMPFILE: a file without a name.
    ///
    /// # Errors
    /// The host's; EOPNOTSUPP where its file system has no such files.
    pub fn tmpfile(
        &self,
        parent: u64,
        arg: &CreateIn,
        caller: Caller,
    ) -> Result<(EntryOut, OpenOut), Errno> {
        let directory = self.writable(parent)?;
        let fd = self.inodes.fd(&directory)?;
        let excl = OFlags::from_bits_retain(arg.flags) & OFlags::EXCL;
        let flags = self.host_flags(arg.flags) | OFlags::TMPFILE | OFlags::CLOEXEC | excl;
        let mode = Mode::from_raw_mode(arg.mode & 0o7777);
        let file = self.with_umask(arg.umask, || openat(&fd, c".", flags, mode))?;
        self.give_to(&file, caller, arg.mode, &directory)?;
        // It has no name, and no other could have this one.
        self.made(file.into(), flags, &directory, c"?")
    }

    /// The node and the handle of a file that was just made and opened. The node gets a descriptor
    /// of its own, and by the file, not by the name, which may be another's by now.
    fn made(
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

    /// FUSE_READ, straight into the guest's memory
    ///
    /// # Errors
    /// The host's.
    pub fn read<B: BitmapSlice>(
        &self,
        nodeid: u64,
        arg: &ReadIn,
        into: &[VolatileSlice<'_, B>],
    ) -> Result<usize, Errno> {
        let handle = self.handle(arg.fh, nodeid)?;
        sys::read_at(&handle.file, into, arg.offset).map_err(errno)
    }

    /// FUSE_WRITE, straight from the guest's memory
    ///
    /// A file that the guest opened with O_APPEND is not open with O_APPEND here: pages that its
    /// kernel writes back must go where they belong. A write of a process's appends by itself, so
    /// that host and guest can append to one file.
    ///
    /// # Errors
    /// The host's.
    pub fn write<B: BitmapSlice>(
        &self,
        nodeid: u64,
        arg: &WriteIn,
        from: &[VolatileSlice<'_, B>],
    ) -> Result<usize, Errno> {
        let inode = self.writable(nodeid)?;
        let handle = self.handles.get(arg.fh, nodeid)?;
        let _acting = self.acting_on(&inode, kind::MODIFY | kind::ATTRIB);
        let bits = arg.write_flags & WRITE_KILL_SUIDGID != 0;
        self.drop_privileges(&inode, bits)?;
        let append = arg.flags & OFlags::APPEND.bits() != 0
            && arg.write_flags & WRITE_CACHE == 0
            && self.options.cache != Cache::Writeback;
        sys::write_at(&handle.file, from, arg.offset, append).map_err(errno)
    }

    /// FUSE_FLUSH: a close of one of the guest's descriptors. Closing a copy of ours makes
    /// network file systems report what they could not write.
    ///
    /// # Errors
    /// The host's.
    pub fn flush(&self, nodeid: u64, fh: u64) -> Result<(), Errno> {
        let handle = self.handle(fh, nodeid)?;
        let copy = rustix::io::fcntl_dupfd_cloexec(&handle.file, 0)?;
        sys::close(copy).map_err(errno)
    }

    /// FUSE_FSYNC and FUSE_FSYNCDIR
    ///
    /// # Errors
    /// The host's.
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

    /// FUSE_SYNCFS: the file system of a node; of the root, which is what Linux asks for, that of every export
    /// and those below it that the guest came to.
    ///
    /// # Errors
    /// The host's, of the first that fails.
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
    /// The host's.
    pub fn fallocate(&self, nodeid: u64, arg: &FallocateIn) -> Result<(), Errno> {
        let inode = self.writable(nodeid)?;
        let handle = self.handles.get(arg.fh, nodeid)?;
        let _acting = self.acting_on(&inode, kind::MODIFY | kind::ATTRIB);
        // The request does not say who asks, and to change a program's length is no everyday thing.
        self.drop_privileges(&inode, true)?;
        let mode = FallocateFlags::from_bits(arg.mode).ok_or(Errno::OPNOTSUPP)?;
        rustix::fs::fallocate(&handle.file, mode, arg.offset, arg.length)
    }

    /// FUSE_LSEEK: SEEK_DATA and SEEK_HOLE
    ///
    /// # Errors
    /// The host's; ENOSYS under writeback, where the host does not know what the guest has written
    /// and a copy by holes would lose it: the guest's kernel then takes files for data throughout.
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

    /// FUSE_COPY_FILE_RANGE
    ///
    /// # Errors
    /// The host's.
    pub fn copy_file_range(&self, nodeid: u64, arg: &CopyFileRangeIn) -> Result<u32, Errno> {
        let from = self.handle(arg.fh_in, nodeid)?;
        let target = self.writable(arg.nodeid_out)?;
        let to = self.handles.get(arg.fh_out, arg.nodeid_out)?;
        let _acting = self.acting_on(&target, kind::MODIFY | kind::ATTRIB);
        self.drop_privileges(&target, true)?;
        let (mut from_at, mut to_at) = (arg.off_in, arg.off_out);
        // The reply has 32 bits for the count.
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

    /// Runs `make` with the guest process's mask, so that the host applies it as the guest's
    /// kernel would: not at all where a directory has default ACLs. Worker threads have a mask of
    /// their own.
    pub(super) fn with_umask<T>(&self, umask: u32, make: impl FnOnce() -> T) -> T {
        rustix::process::umask(Mode::from_raw_mode(umask & 0o777));
        let made = make();
        rustix::process::umask(Mode::empty());
        made
    }

    /// Gives a new file to who asked for it. In a directory with the set-group-ID bit the group
    /// is the directory's, which the host has seen to. Without root every file is the user's.
    pub(super) fn give_to(
        &self,
        fd: impl AsFd,
        caller: Caller,
        mode: u32,
        directory: &Inode,
    ) -> Result<(), Errno> {
        if !self.root_user || (caller.uid == 0 && caller.gid == 0) {
            return Ok(());
        }
        if caller.uid == u32::MAX || caller.gid == u32::MAX {
            return Err(Errno::INVAL);
        }
        let inherited = inodes::stat(self.inodes.fd(directory)?)?.stx_mode & 0o2000 != 0;
        let gid = (!inherited).then(|| rustix::fs::Gid::from_raw(caller.gid));
        let uid = Some(rustix::fs::Uid::from_raw(caller.uid));
        rustix::fs::chownat(&fd, c"", uid, gid, rustix::fs::AtFlags::EMPTY_PATH)?;
        // The change of owner took these bits away.
        if mode & 0o6000 != 0 {
            let now = u32::from(inodes::stat(&fd)?.stx_mode);
            self.chmod(&fd, now | mode & 0o6000)?;
        }
        Ok(())
    }
}
