//! Each FUSE operation on the host's file system.
//!
//! Called from worker threads, many at a time. This module knows neither queues nor wire offsets: the
//! [`server`](super::server) has decoded the requests. All values from the guest are bounded here or by the
//! host kernel.

mod attr;
mod cookies;
mod dir;
mod file;
mod names;
mod owners;
#[cfg(test)]
mod tests;
mod xattr;

use super::Cache;
use super::handles::{Handle, Handles};
use super::inodes::{self, Found, Inode, Inodes};
use super::shares::{Listener, Move, Share, Shares};
use super::space::Removals;
use super::watch::{self, ChangeGuard, HostEvents, Watches};
use super::wire::{self, AttrOut, EntryOut, HostWatchIn, ROOT_ID};
pub(super) use cookies::Cookies;
use koya_host::descriptors::Directory;
use owners::{Owners, Shown};
use rustix::fs::{FileType, Mode, OFlags, Statx, openat};
use rustix::io::Errno;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

/// The caller of an operation: user and group of the guest's process.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// User ID.
    pub uid: u32,
    /// Group ID.
    pub gid: u32,
}

/// Options of a file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Cache policy of the guest.
    pub cache: Cache,
    /// Maximum number of descriptors for nodes, and for open files; 0 uses a part of the process's limit.
    /// Several devices in one process must divide it themselves.
    pub max_descriptors: usize,
    /// Maximum number of files that the guest may remember, some 300 bytes each on the host; 0 means 4
    /// million. The guest kernel itself takes 1 KiB for each.
    pub max_nodes: usize,
}

/// Default maximum number of files that a guest may remember.
const MAX_NODES: usize = 4 << 20;

/// Forwards changes of shares to the tables.
struct ShareListener {
    inodes: Arc<Inodes>,
    handles: Arc<Handles>,
    watches: Arc<Watches>,
}

impl Listener for ShareListener {
    fn added(&self, share: &Arc<Share>) {
        self.inodes.share_added(share);
    }

    fn merged(&self, within: &Arc<Share>, moves: &[Move], apply: &dyn Fn()) {
        self.inodes.merged(within, moves, apply);
    }

    fn removed(&self, shares: &[Arc<Share>]) {
        self.watches.remove_if(|inode| !inode.is_live());
        self.handles.close_unreachable();
        self.inodes.shares_removed(shares);
    }
}

/// State of the server for one guest.
pub struct Passthrough {
    options: Options,
    shares: Shares,
    inodes: Arc<Inodes>,
    handles: Arc<Handles>,
    watches: Arc<Watches>,
    /// Keeps the listener alive.
    _listener: Arc<dyn Listener>,
    /// The directory through which O_PATH descriptors are reopened.
    descriptors: Arc<Directory>,
    /// `Some` if this process can't change the owner of files.
    owners: Option<Owners>,
    pub(super) removals: Removals,
}

impl Passthrough {
    /// A server for `shares`.
    ///
    /// # Errors
    /// If `/proc` is not mounted, or the host has no file descriptor left.
    pub fn new(shares: Shares, options: Options) -> io::Result<Self> {
        let limit = match options.max_descriptors {
            0 => default_max_descriptors(),
            given => given,
        };
        let max_nodes = match options.max_nodes {
            0 => MAX_NODES,
            given => given,
        };
        let inodes = Arc::new(Inodes::new(limit, max_nodes));
        let handles = Arc::new(Handles::new(limit));
        let watches = Arc::new(Watches::new(inodes.clone())?);
        let listener: Arc<dyn Listener> = Arc::new(ShareListener {
            inodes: inodes.clone(),
            handles: handles.clone(),
            watches: watches.clone(),
        });
        shares.listen(Arc::downgrade(&listener));
        Ok(Self {
            options,
            shares,
            inodes,
            handles,
            watches,
            _listener: listener,
            descriptors: Directory::get()?,
            owners: Owners::needed(),
            removals: Removals::default(),
        })
    }

    /// The options of the file system.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Whether the guest gives each file system of the host a device number, as Koya's guest kernel does. To be called
    /// before it looks anything up.
    pub fn set_has_devices(&self, has_devices: bool) {
        self.inodes.set_has_devices(has_devices);
    }

    /// Drops all state of the guest, which is gone.
    pub fn clear(&self) {
        self.watches.clear();
        self.handles.clear();
        self.inodes.clear();
        for export in self.shares.exports() {
            export.forget_nested();
        }
    }

    /// Checks up to `most` files that the guest remembers, and releases removed ones so that the host can
    /// free their space. To be called periodically.
    pub fn sweep(&self, most: usize) {
        self.inodes.sweep(most);
    }

    /// FUSE_LOOKUP: node 0 means that the name does not exist, with the time for which the guest may cache
    /// that
    ///
    /// # Errors
    /// As [`lookup`](Self::lookup).
    pub fn lookup_or_absent(&self, parent: u64, name: &CStr) -> Result<EntryOut, Errno> {
        let timeout = self.options.cache.timeout();
        match self.lookup(parent, name) {
            Err(Errno::NOENT) if parent != ROOT_ID && !timeout.is_zero() => Ok(EntryOut {
                entry_valid: timeout.as_secs(),
                entry_valid_nsec: timeout.subsec_nanos(),
                ..EntryOut::default()
            }),
            other => other,
        }
    }

    /// Looks up a name.
    ///
    /// # Errors
    /// The error from the host, and ENOENT for invalid names.
    pub fn lookup(&self, parent: u64, name: &CStr) -> Result<EntryOut, Errno> {
        // Only a malicious guest sends these: its kernel resolves them itself.
        if name.is_empty() || name == c"." || name == c".." || name.to_bytes().contains(&b'/') {
            return Err(Errno::NOENT);
        }
        if parent == ROOT_ID {
            let share = self.shares.get(name.to_bytes()).ok_or(Errno::NOENT)?;
            let fd = rustix::io::fcntl_dupfd_cloexec(share.root().ok_or(Errno::NOENT)?, 0)?;
            return self.entry(fd, Found::Root(&share), name);
        }
        let directory = self.inodes.get(parent)?;
        let parent = self.inodes.fd(&directory)?;
        let fd = self.opening_up(&[&directory], || inodes::open_entry(&parent, name))?;
        self.entry_in(fd, &directory, name)
    }

    /// Counts a lookup of a file in a directory and returns its attributes for the guest.
    fn entry_in(&self, fd: OwnedFd, directory: &Inode, name: &CStr) -> Result<EntryOut, Errno> {
        self.entry(fd, Found::In(directory), name)
    }

    fn entry(&self, fd: OwnedFd, found: Found<'_>, name: &CStr) -> Result<EntryOut, Errno> {
        let stat = inodes::stat(&fd)?;
        let shown = self.shown(&fd, stat);
        let inode = self.inodes.look_up(fd, &stat, found, name)?;
        // Also for shares: once a share is removed its nodes are stale, and the guest looks them up again.
        let timeout = self.options.cache.timeout();
        Ok(EntryOut {
            nodeid: inode.id,
            generation: 0,
            entry_valid: timeout.as_secs(),
            entry_valid_nsec: timeout.subsec_nanos(),
            attr_valid: timeout.as_secs(),
            attr_valid_nsec: timeout.subsec_nanos(),
            attr: inode.attr(&shown),
        })
    }

    /// FUSE_FORGET, and one item of FUSE_BATCH_FORGET
    pub fn forget(&self, nodeid: u64, count: u64) {
        if self.inodes.forget(nodeid, count) {
            self.watches.forget(nodeid);
        }
    }

    /// Changes on the host to files that the guest watches. To be called before the guest mounts.
    pub fn host_events(&self) -> HostEvents {
        HostEvents::new(self.watches.clone())
    }

    /// Whether [`host_events`](Self::host_events) was called.
    pub fn watches_host(&self) -> bool {
        self.watches.wanted()
    }

    /// Ends the host events.
    pub fn end_host_events(&self) {
        self.watches.end();
    }

    /// FUSE_HOST_WATCH_OP of Koya's guest kernel: watches a node.
    ///
    /// # Errors
    /// The error from the host; ENOSPC beyond the limit.
    pub fn watch(&self, nodeid: u64, arg: &HostWatchIn) -> Result<(), Errno> {
        if nodeid == ROOT_ID {
            // The synthetic root has no file on the host: only its owner changes it.
            return Ok(());
        }
        let inode = self.inodes.get(nodeid)?;
        self.watches.watch(&inode, arg.seq, arg.mask)
    }

    /// FUSE_HOST_UNWATCH of Koya's guest kernel: the node is no longer watched.
    pub fn unwatch(&self, nodeid: u64, number: u64) {
        self.watches.unwatch(nodeid, number);
    }

    /// Records a change by the guest of these kinds, so that the host's watch does not report it.
    fn change_of(&self, inode: &Inode, kinds: u32) -> Option<ChangeGuard<'_>> {
        self.watches.begin_change(|| {
            [
                (watch::own_key(inode), kinds),
                (watch::location_key(inode), kinds),
            ]
        })
    }

    /// The same for an entry of a directory.
    fn change_at(&self, directory: u64, name: &CStr, kinds: u32) -> Option<ChangeGuard<'_>> {
        self.watches
            .begin_change(|| [(watch::entry_key(directory, name), kinds)])
    }

    fn attr_out(&self, attr: wire::Attr) -> AttrOut {
        let timeout = self.options.cache.timeout();
        AttrOut {
            attr_valid: timeout.as_secs(),
            attr_valid_nsec: timeout.subsec_nanos(),
            dummy: 0,
            attr,
        }
    }

    /// An open file of a node whose share still exists.
    fn handle(&self, fh: u64, nodeid: u64) -> Result<Arc<Handle>, Errno> {
        self.inodes.get(nodeid)?;
        self.handles.get(fh, nodeid)
    }

    /// A node that the guest may change.
    fn writable(&self, nodeid: u64) -> Result<Arc<Inode>, Errno> {
        if nodeid == ROOT_ID {
            return Err(Errno::ROFS);
        }
        let inode = self.inodes.get(nodeid)?;
        match inode.is_writable() {
            true => Ok(inode),
            false => Err(Errno::ROFS),
        }
    }

    /// Opens a node's file, which must be a regular file or a directory: opening anything else could affect
    /// the host.
    fn open_inode(&self, inode: &Inode, flags: OFlags) -> Result<File, Errno> {
        match inode.kind {
            FileType::RegularFile | FileType::Directory => {}
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::NXIO),
        }
        let fd = self.inodes.fd(inode)?;
        self.opening_up(&[inode], || self.open_node(inode, &fd, flags))
    }

    fn open_node(&self, inode: &Inode, fd: &OwnedFd, flags: OFlags) -> Result<File, Errno> {
        // Reading a file changes its access time unless the mount prevents that.
        let still = !inode.is_writable() && !inode.export()?.is_detached();
        let quiet = still.then(|| self.reopen(fd, flags | OFlags::NOATIME));
        match quiet {
            // Only a file's owner may use that flag.
            None | Some(Err(Errno::PERM)) => Ok(self.reopen(fd, flags)?.into()),
            Some(opened) => Ok(opened?.into()),
        }
    }

    /// The attributes of a file as the guest sees them.
    fn shown(&self, fd: impl AsFd, stat: Statx) -> Statx {
        match &self.owners {
            None => stat,
            Some(owners) => owners.overlay(fd, &stat),
        }
    }

    /// Changes the attributes of a file as the guest sees them.
    fn change_shown(
        &self,
        owners: &Owners,
        fd: impl AsFd,
        change: impl FnOnce(&mut Shown),
    ) -> Result<(), Errno> {
        let fd = fd.as_fd();
        owners.change(fd, |mode| self.change_host_mode(fd, mode), change)
    }

    /// Runs an operation on the host. If the mode of a file denies access to its owner, which the guest's root would have,
    /// the mode is moved to the attribute and the operation is retried.
    fn opening_up<T>(
        &self,
        inodes: &[&Inode],
        operation: impl Fn() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let result = operation();
        let (Err(Errno::ACCESS), Some(owners)) = (&result, &self.owners) else {
            return result;
        };
        let mut opened = false;
        for inode in inodes.iter().filter(|inode| inode.is_writable()) {
            let fd = self.inodes.fd(inode)?;
            if owners.denies_owner(&inodes::stat(&fd)?) {
                opened |= self.change_shown(owners, &fd, |_| {}).is_ok();
            }
        }
        match opened {
            true => operation(),
            false => result,
        }
    }

    /// Reopens the file of a descriptor (which may be O_PATH) with other flags.
    fn reopen(&self, fd: impl AsFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        // The link in /proc must be followed: it is ours, and leads to the descriptor's file.
        let closed = OFlags::NOFOLLOW | OFlags::CREATE | OFlags::EXCL;
        let flags = (flags - closed) | OFlags::CLOEXEC;
        let name = fd.as_fd().as_raw_fd().to_string();
        openat(&*self.descriptors, name, flags, Mode::empty())
    }
}

/// Maximum number of descriptors for nodes, and for open files: a sixth of the process's limit each. Nodes
/// that cannot be evicted may exceed it by half, and an open file has two descriptors, so a guest takes 7
/// twelfths at most; vsock takes an eighth, and the rest is for the monitor.
fn default_max_descriptors() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let limit = limit.unwrap_or(1 << 20).min(1 << 20) as usize;
    (limit / 6).max(32)
}
