//! Nodes that the guest has looked up, by node ID.
//!
//! A node holds an O_PATH descriptor, which keeps the host's file alive even after it is unlinked. The guest
//! decides how many nodes it remembers, so only the most recent nodes keep their descriptors. An evicted node
//! records the means to find its file again, by file handle (open_by_handle_at, if the host permits it) or by
//! parent and name; when found, it is verified to be the same file. Nodes of unlinked files are never
//! evicted. Those that are not open are dropped, so that the host can free their space ([`Inodes::sweep`]).
//!
//! # One node per file
//! A file other than a directory is one node, wherever it was found, because sockets, FIFOs, locks and memory
//! maps belong to an inode. A directory has one dentry in Linux, so it is one node within one export, and
//! exports are merged as soon as one lies within another ([`shares`](super::shares)). A node knows the shares
//! through which it was reached ([`Inode::is_writable`]).

use super::export::Export;
use super::node::{
    FileTraces, HANDLE_FLAGS, Slot, evict, is_kind, move_to, same_shares, still_same,
};
use super::shares::Share;
use super::wire::ROOT_ID;
use crate::sys::FileHandle;
use koya_host::sync::lock;
use rustix::fs::{FileType, Statx};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

pub(super) use super::node::{
    FileSystem, Found, Identity, Inode, STATX_MASK, cached_stat, open_entry, stat,
};

/// Maximum number of evicted directories between a file and an open one when it is looked up by name: the
/// guest controls the depth of nesting, and each is a recursion step.
const MAX_ASCENT: u32 = 64;

/// A node in the tables.
pub(super) struct Entry {
    pub(super) inode: Arc<Inode>,
    /// Lookups by the guest that it has not forgotten. A directory without any is kept while there are nodes in it: if it
    /// is moved, they are.
    pub(super) lookups: u64,
    pub(super) identity: Identity,
}

pub(super) struct Tables {
    pub(super) by_id: HashMap<u64, Entry>,
    pub(super) by_identity: HashMap<Identity, u64>,
    /// The nodes in each directory: its node, and one of them.
    pub(super) children: BTreeSet<(u64, u64)>,
    /// Nodes that are not needed any more, unless the guest has looked them up again.
    pub(super) leaving: Vec<u64>,
    /// Roots of shares, with their shares.
    pub(super) roots: HashMap<Identity, Vec<Arc<Share>>>,
    /// Nodes with a descriptor, oldest first; some may be gone.
    recent: VecDeque<u64>,
    /// Position in `recent` where the next sweep begins.
    swept: usize,
    pub(super) open: usize,
    next: u64,
    /// File systems of the host, in the order in which the guest reached them.
    file_systems: Vec<FileSystem>,
}

impl Tables {
    /// Makes room for another descriptor by evicting older nodes. Nodes that cannot be evicted (open or
    /// unlinked files) may exceed the limit by half.
    fn make_room(&mut self, limit: usize) -> Result<(), Errno> {
        let mut tries = 16;
        while self.open >= limit && tries > 0 {
            tries -= 1;
            let Some(oldest) = self.recent.pop_front() else {
                break;
            };
            let Some(entry) = self.by_id.get(&oldest) else {
                continue;
            };
            if evict(&entry.inode) {
                self.open = self.open.saturating_sub(1);
            } else {
                self.recent.push_back(oldest);
            }
        }
        if self.open >= limit + limit / 2 {
            return Err(Errno::NFILE);
        }
        Ok(())
    }

    /// A known file was found again: uses the new descriptor if there is none, or if it `replaces` the
    /// existing one.
    pub(super) fn found_again(&mut self, inode: &Inode, fd: OwnedFd, limit: usize, replaces: bool) {
        let mut slot = lock(&inode.slot);
        match &*slot {
            Slot::Open(_) if replaces => *slot = Slot::Open(Arc::new(fd)),
            Slot::Evicted(_) if replaces || self.open < limit => {
                *slot = Slot::Open(Arc::new(fd));
                drop(slot);
                self.opened(inode.id);
            }
            _ => {}
        }
    }

    /// Marks the node as gone. Drop the returned slot only after these tables are unlocked: closing the last
    /// descriptor of a file may be slow.
    #[must_use]
    pub(super) fn close(&mut self, inode: &Inode) -> Slot {
        let slot = std::mem::replace(&mut *lock(&inode.slot), Slot::Gone);
        if matches!(slot, Slot::Open(_)) {
            self.open = self.open.saturating_sub(1);
        }
        slot
    }

    /// Removes nodes without a descriptor from `recent`.
    pub(super) fn tidy_recent(&mut self) {
        let Self { recent, by_id, .. } = self;
        let is_open = |entry: &Entry| matches!(*lock(&entry.inode.slot), Slot::Open(_));
        recent.retain(|id| by_id.get(id).is_some_and(is_open));
    }

    /// The number of a file system, a new one on first sight. All beyond 65,535 share the last number.
    fn file_system(&mut self, wanted: FileSystem) -> u16 {
        let known = self.file_systems.iter().position(|known| *known == wanted);
        let index = known.unwrap_or_else(|| {
            if self.file_systems.len() < usize::from(u16::MAX) {
                self.file_systems.push(wanted);
            }
            self.file_systems.len() - 1
        });
        index as u16
    }

    fn opened(&mut self, id: u64) {
        self.open += 1;
        self.recent.push_back(id);
    }
}

/// All nodes of a guest except the synthetic root.
pub(super) struct Inodes {
    limit: usize,
    max_nodes: usize,
    /// Whether there was a share with mapped users: a file may have several nodes then.
    maps_users: AtomicBool,
    /// Whether the guest gives each file system a device number.
    has_devices: AtomicBool,
    /// Held while the shares of moved nodes change.
    pub(super) moves: Mutex<()>,
    pub(super) tables: Mutex<Tables>,
}

impl Inodes {
    /// Tables for at most `max_nodes` nodes, with descriptors for about `limit` of them at a time.
    pub(super) fn new(limit: usize, max_nodes: usize) -> Self {
        Self {
            limit,
            max_nodes,
            maps_users: AtomicBool::new(false),
            has_devices: AtomicBool::new(false),
            moves: Mutex::default(),
            tables: Mutex::new(Tables {
                by_id: HashMap::new(),
                by_identity: HashMap::new(),
                children: BTreeSet::new(),
                leaving: Vec::new(),
                roots: HashMap::new(),
                recent: VecDeque::new(),
                swept: 0,
                open: 0,
                next: ROOT_ID,
                file_systems: Vec::new(),
            }),
        }
    }

    /// Whether a file may have several nodes, each with other owners.
    pub(super) fn maps_users(&self) -> bool {
        self.maps_users.load(Ordering::SeqCst)
    }

    /// Whether the guest gives each file system of further nodes a device number.
    pub(super) fn set_has_devices(&self, has_devices: bool) {
        self.has_devices.store(has_devices, Ordering::SeqCst);
    }

    /// The node with this ID, if the guest has not forgotten it.
    pub(super) fn get(&self, id: u64) -> Result<Arc<Inode>, Errno> {
        self.get_if(id, |entry| entry.lookups > 0)
    }

    fn get_if(&self, id: u64, is_wanted: impl Fn(&Entry) -> bool) -> Result<Arc<Inode>, Errno> {
        let tables = lock(&self.tables);
        let entry = tables.by_id.get(&id).filter(|entry| is_wanted(entry));
        let inode = entry.map(|entry| entry.inode.clone());
        drop(tables);
        inode.filter(|inode| inode.is_live()).ok_or(Errno::STALE)
    }

    /// The node's descriptor, reopened if it was evicted.
    pub(super) fn fd(&self, inode: &Inode) -> Result<Arc<OwnedFd>, Errno> {
        self.fd_within(inode, MAX_ASCENT)
    }

    fn fd_within(&self, inode: &Inode, ascent: u32) -> Result<Arc<OwnedFd>, Errno> {
        // Retried if the file's export was merged into another one meanwhile.
        const TRIES: usize = 3;
        for _ in 0..TRIES {
            let traces = match &*lock(&inode.slot) {
                Slot::Open(fd) => return Ok(fd.clone()),
                Slot::Evicted(traces) => traces.clone(),
                Slot::Gone => return Err(Errno::STALE),
            };
            let found = self.find_again(inode, &traces, ascent)?;
            if let Some(fd) = self.keep(inode, &traces, found)? {
                return Ok(fd);
            }
        }
        Err(Errno::STALE)
    }

    /// Stores a descriptor found for an evicted node. `None` if it is on a mount that must not be used any
    /// more.
    fn keep(
        &self,
        inode: &Inode,
        traces: &FileTraces,
        found: OwnedFd,
    ) -> Result<Option<Arc<OwnedFd>>, Errno> {
        let stat = stat(&found)?;
        if !is_kind(inode, &stat) || !traces.matches(&found, &stat) {
            return Err(Errno::STALE);
        }
        let fd = Arc::new(found);
        let mut tables = lock(&self.tables);
        let export = inode.export()?;
        if export.adopted(stat.stx_mnt_id).is_some() {
            return Ok(None);
        }
        let Some(entry) = tables.by_id.get(&inode.id) else {
            // Forgotten meanwhile: usable once, and not counted.
            return Ok(Some(fd));
        };
        if entry.identity != Identity::of(&stat, &export) {
            return Err(Errno::STALE);
        }
        tables.make_room(self.limit)?;
        let mut slot = lock(&inode.slot);
        match &*slot {
            // Another thread was faster; one descriptor is enough, and it is already counted.
            Slot::Open(other) => return Ok(Some(other.clone())),
            Slot::Gone => return Err(Errno::STALE),
            Slot::Evicted(_) => {}
        }
        *slot = Slot::Open(fd.clone());
        drop(slot);
        tables.opened(inode.id);
        Ok(Some(fd))
    }

    fn find_again(
        &self,
        inode: &Inode,
        traces: &FileTraces,
        ascent: u32,
    ) -> Result<OwnedFd, Errno> {
        let ascent = ascent.checked_sub(1).ok_or(Errno::STALE)?;
        if let Some((mount, handle)) = &traces.handle {
            let mut exports = inode.exports().into_iter();
            let export = exports.find(|export| export.mount_id == *mount);
            if let Some(anchor) = export.and_then(|export| export.anchor())
                && let Ok(fd) = handle.open(&*anchor, HANDLE_FLAGS.bits() as i32)
            {
                return Ok(fd);
            }
        }
        if inode.is_root.load(Ordering::Relaxed)
            && let Some(fd) = self.root_of(inode)
        {
            return Ok(fd);
        }
        self.open_by_location(inode, ascent)
    }

    /// The root descriptor of the share that this node is the root of.
    fn root_of(&self, inode: &Inode) -> Option<OwnedFd> {
        let identity = lock(&self.tables).by_id.get(&inode.id)?.identity;
        inode.reach().iter().find_map(|share| {
            let root = share.root()?;
            let found = Identity::of(&stat(&*root).ok()?, &share.export());
            (found == identity).then(|| fcntl_dupfd_cloexec(&*root, 0).ok())?
        })
    }

    fn open_by_location(&self, inode: &Inode, ascent: u32) -> Result<OwnedFd, Errno> {
        let (parent, name) = inode.location();
        let parent = self.get_if(parent, |_| true)?;
        open_entry(self.fd_within(&parent, ascent)?, &name)
    }

    /// The file of a node on the mount of another export of it: links are possible only within one mount.
    ///
    /// # Errors
    /// EXDEV if the file cannot be found there.
    pub(super) fn fd_in(&self, inode: &Inode, export: &Arc<Export>) -> Result<OwnedFd, Errno> {
        if !inode.exports().iter().any(|own| Arc::ptr_eq(own, export)) {
            return Err(Errno::XDEV);
        }
        let fd = self.fd(inode)?;
        let own = Identity::of(&stat(&*fd)?, export);
        let handle = FileHandle::from_fd(&*fd).ok().zip(export.anchor());
        let by_handle = handle
            .and_then(|(handle, anchor)| handle.open(&*anchor, HANDLE_FLAGS.bits() as i32).ok());
        let found = match by_handle {
            Some(fd) => fd,
            None => self.open_by_location(inode, MAX_ASCENT)?,
        };
        let there = stat(&found)?;
        match Identity::of(&there, export) == own && there.stx_mnt_id == export.mount_id {
            true => Ok(found),
            false => Err(Errno::XDEV),
        }
    }

    /// Counts a lookup of the file that `fd` refers to and returns its node, a new one if the guest did not
    /// know the file.
    ///
    /// # Errors
    /// ENFILE if the guest holds more unlinked files than there are descriptors for, or has reached its limit
    /// of nodes; ESTALE if the share was removed.
    pub(super) fn look_up(
        &self,
        fd: OwnedFd,
        stat: &Statx,
        found: Found<'_>,
        name: &CStr,
    ) -> Result<Arc<Inode>, Errno> {
        let mut tables = lock(&self.tables);
        // It would not be found if a directory above it is moved.
        if let Found::In(directory) = found
            && !tables.by_id.contains_key(&directory.id)
        {
            return Err(Errno::STALE);
        }
        let reach = tables.reach(stat, found)?;
        let export = reach[0].export();
        let identity = Identity::of(stat, &export);
        // It was opened through an export that was merged into this one meanwhile.
        let moved = export.adopted(stat.stx_mnt_id);
        let (parent, is_entry) = match found {
            Found::Root(_) => (ROOT_ID, true),
            Found::In(directory) => (directory.id, false),
        };
        let is_root = is_entry || tables.roots.contains_key(&identity);
        if let Some(id) = tables.by_identity.get(&identity).copied()
            && let Some(entry) = tables.by_id.get_mut(&id)
            && still_same(&entry.inode, &fd, stat)
        {
            entry.lookups += 1;
            let inode = entry.inode.clone();
            let is_placed = inode.kind == FileType::Directory && !is_entry;
            inode.has_links.fetch_or(has_links(stat), Ordering::Relaxed);
            // The host may have moved it.
            let is_changed = is_placed && !same_shares(&inode.reach(), &reach);
            // The existing descriptor may be on a mount that is read-only.
            let replaces = match is_placed {
                true => inode.set_reach(&reach),
                false => inode.extend_reach(&reach),
            };
            if moved.is_none() {
                tables.found_again(&inode, fd, self.limit, replaces);
            }
            if !is_entry {
                tables.place(&inode, parent, name);
            }
            drop(tables);
            inode.is_root.fetch_or(is_root, Ordering::Relaxed);
            if is_changed {
                self.changed(id);
            }
            return Ok(inode);
        }
        if tables.by_id.len() >= self.max_nodes {
            return Err(Errno::NFILE);
        }
        tables.make_room(self.limit)?;
        tables.next += 1;
        let id = tables.next;
        let known = match found {
            Found::In(parent) => tables
                .by_id
                .get(&parent.id)
                .map(|e| e.identity.file_system()),
            Found::Root(_) => None,
        };
        let file_system = match found {
            Found::In(parent) if known == Some(identity.file_system()) => parent.file_system,
            _ => tables.file_system(identity.file_system()),
        };
        let fd = Arc::new(fd);
        let users = export.users_on(stat.stx_mnt_id);
        if users.is_some() {
            self.maps_users.store(true, Ordering::SeqCst);
        }
        let inode = Arc::new(Inode {
            id,
            kind: FileType::from_raw_mode(stat.stx_mode.into()),
            is_root: AtomicBool::new(is_root),
            reach: Mutex::new(reach),
            has_links: AtomicBool::new(has_links(stat)),
            file_system,
            has_device: self.has_devices.load(Ordering::SeqCst),
            users,
            has_no_capabilities: AtomicBool::new(false),
            slot: Mutex::new(Slot::Open(fd.clone())),
            location: Mutex::new((parent, name.to_owned())),
            reported: AtomicU64::new(0),
            is_unused: AtomicBool::new(false),
        });
        if let Found::In(parent) = found
            && parent.file_system != file_system
        {
            export.add_nested(identity.file_system(), inode.kind, &fd);
        }
        let entry = Entry {
            inode: inode.clone(),
            lookups: 1,
            identity,
        };
        tables.by_id.insert(id, entry);
        tables.by_identity.insert(identity, id);
        tables.children.insert((parent, id));
        let is_closed = moved.is_some_and(|mount| {
            drop(fd);
            move_to(&inode, mount)
        });
        if !is_closed {
            tables.opened(id);
        }
        Ok(inode)
    }

    /// Subtracts `count` lookups; true if none are left.
    pub(super) fn forget(&self, id: u64, count: u64) -> bool {
        let mut tables = lock(&self.tables);
        let Some(entry) = tables.by_id.get_mut(&id) else {
            return false;
        };
        entry.lookups = entry.lookups.saturating_sub(count);
        if entry.lookups > 0 {
            return false;
        }
        tables.leaving.push(id);
        let removed = tables.remove_leaving();
        // `recent` is cleaned up when it is walked; until then its size is bounded here.
        if tables.recent.len() > 2 * tables.open + 64 {
            let Tables { recent, by_id, .. } = &mut *tables;
            recent.retain(|id| by_id.contains_key(id));
        }
        drop(tables);
        drop(removed);
        true
    }

    /// Checks up to `most` of the nodes and drops those whose files are unlinked and not open, so that the
    /// host can free their space. Descriptors on later mounts below a share are closed too if they are not in
    /// use, since the host may want to unmount them.
    pub(super) fn sweep(&self, most: usize) {
        let mut gone = Vec::new();
        for inode in self.next_to_sweep(most) {
            let fd = match &*lock(&inode.slot) {
                Slot::Open(fd) => fd.clone(),
                _ => continue,
            };
            let Ok(stat) = cached_stat(&*fd) else {
                continue;
            };
            let pins_a_mount = pins_a_mount(&inode, stat.stx_mnt_id);
            // The root of a share is mounted, so it is kept.
            let is_nameless = stat.stx_nlink == 0
                && !inode.is_root.load(Ordering::Relaxed)
                && (inode.kind == FileType::RegularFile || pins_a_mount);
            // Dropped at the second sweep: a thread that is about to open the file has no counted descriptor
            // yet.
            let was_leaving = inode.is_unused.swap(is_nameless, Ordering::Relaxed);
            if is_nameless && was_leaving || pins_a_mount && !is_nameless {
                gone.push((inode, is_nameless));
            }
        }
        if gone.is_empty() {
            return;
        }
        let mut closed = Vec::new();
        let mut tables = lock(&self.tables);
        for (inode, is_nameless) in gone {
            // An open file holds the node's descriptor too.
            let is_idle = match &*lock(&inode.slot) {
                Slot::Open(fd) => Arc::strong_count(fd) == 1,
                _ => false,
            };
            if !is_idle || !tables.by_id.contains_key(&inode.id) {
                continue;
            }
            if is_nameless {
                closed.push(tables.close(&inode));
            } else if evict(&inode) {
                tables.open = tables.open.saturating_sub(1);
            }
        }
        tables.tidy_recent();
        drop(tables);
        drop(closed);
    }

    fn next_to_sweep(&self, most: usize) -> Vec<Arc<Inode>> {
        let mut tables = lock(&self.tables);
        let len = tables.recent.len();
        let start = tables.swept;
        let ids = (0..len.min(most)).map(|n| tables.recent[(start + n) % len]);
        let inodes = ids.filter_map(|id| Some(tables.by_id.get(&id)?.inode.clone()));
        let inodes = inodes.collect();
        tables.swept = match len {
            0 => 0,
            _ => (start + len.min(most)) % len,
        };
        inodes
    }

    /// Removes all nodes.
    pub(super) fn clear(&self) {
        let mut tables = lock(&self.tables);
        tables.by_id.clear();
        tables.by_identity.clear();
        tables.children.clear();
        tables.leaving.clear();
        tables.recent.clear();
        tables.open = 0;
    }

    #[cfg(test)]
    pub(super) fn counts(&self) -> (usize, usize) {
        let tables = lock(&self.tables);
        (tables.by_id.len(), tables.open)
    }
}

/// Whether a file has several names. The links of a directory are its subdirectories.
fn has_links(stat: &Statx) -> bool {
    stat.stx_nlink > 1 && FileType::from_raw_mode(stat.stx_mode.into()) != FileType::Directory
}

/// Whether the descriptor of a file on this mount prevents the host from unmounting it: the file is below a
/// share that follows the host's mounts.
fn pins_a_mount(inode: &Inode, mount: u64) -> bool {
    let exports = inode.exports();
    let is_below = |export: &Arc<Export>| export.follows_mounts && export.mount_key(mount) != 0;
    exports.iter().any(is_below) && !exports.iter().any(|export| export.mount_id == mount)
}
