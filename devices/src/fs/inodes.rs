//! What the guest has looked up: nodes, by the number that the guest got for each.
//!
//! A node holds an O_PATH descriptor, which keeps the host's file alive even when it is unlinked.
//! The guest decides how many nodes it remembers, so descriptors are kept only for the most
//! recent ones: a node that is evicted remembers how to find its file again, by a file handle
//! (open_by_handle_at, where the host allows it) or by its parent and name, and is checked to be
//! the same file when it is found. Nodes whose file has no name any more are never evicted.

use super::shares::Share;
use super::wire::ROOT_ID;
use crate::sync::lock;
use crate::sys::FileHandle;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, StatxFlags, openat, statx};
use rustix::io::Errno;
use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

/// How many evicted directories may lie between a file and one that is open, when it is looked for
/// by name: a guest decides how deep they are nested, and each is a step of recursion.
const MAX_ASCENT: u32 = 64;

/// A file's identity on the host while it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    mount: u64,
    major: u32,
    minor: u32,
    inode: u64,
}

impl Identity {
    pub(super) fn of(stat: &Statx) -> Self {
        Self {
            mount: stat.stx_mnt_id,
            major: stat.stx_dev_major,
            minor: stat.stx_dev_minor,
            inode: stat.stx_ino,
        }
    }

    /// Whether another file system (or another mount of one) begins between two files.
    pub(super) fn is_across(&self, other: &Self) -> bool {
        (self.mount, self.major, self.minor) != (other.mount, other.major, other.minor)
    }

    /// Whether the file is not on the mount of its share's root.
    pub(super) fn mount_differs(&self, share: &Share) -> bool {
        self.mount != share.mount_id
    }

    /// A number for the file that differs from those of the file system it is mounted into.
    pub(super) fn foreign_number(&self) -> u64 {
        self.inode ^ (u64::from(self.major) << 20 | u64::from(self.minor)) << 32 ^ self.mount << 48
    }
}

/// Where a node's descriptor is, or how to get it back.
enum Slot {
    Open(Arc<OwnedFd>),
    Evicted(Option<FileHandle>),
}

/// A node.
pub(super) struct Inode {
    pub(super) id: u64,
    pub(super) identity: Identity,
    pub(super) kind: FileType,
    pub(super) share: Arc<Share>,
    /// A share's own root, which has no parent to be found from.
    is_root: bool,
    slot: Mutex<Slot>,
    /// The directory and name that it was seen under last.
    place: Mutex<(u64, CString)>,
}

struct Tables {
    by_id: HashMap<u64, (Arc<Inode>, u64)>,
    by_identity: HashMap<Identity, u64>,
    /// Nodes with a descriptor, oldest first; some may be gone.
    recent: VecDeque<u64>,
    open: usize,
    next: u64,
}

/// All nodes of one guest, but for the root of all, which is synthetic.
pub(super) struct Inodes {
    limit: usize,
    tables: Mutex<Tables>,
}

/// What every look at a file asks for.
pub(super) const STATX_MASK: StatxFlags = StatxFlags::BASIC_STATS
    .union(StatxFlags::BTIME)
    .union(StatxFlags::MNT_ID);

/// A file's attributes, of an O_PATH descriptor or any other.
pub(super) fn stat(fd: impl AsFd) -> Result<Statx, Errno> {
    statx(fd, c"", AtFlags::EMPTY_PATH, STATX_MASK)
}

/// Opens the entry `name` of a directory without following it and without opening the file.
pub(super) fn open_entry(parent: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(parent, name, flags, Mode::empty())
}

impl Inodes {
    /// Descriptors for no more than about `limit` nodes at once.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            tables: Mutex::new(Tables {
                by_id: HashMap::new(),
                by_identity: HashMap::new(),
                recent: VecDeque::new(),
                open: 0,
                next: ROOT_ID,
            }),
        }
    }

    /// The node of this number.
    pub(super) fn get(&self, id: u64) -> Result<Arc<Inode>, Errno> {
        let inode = lock(&self.tables).by_id.get(&id).map(|e| e.0.clone());
        let inode = inode.ok_or(Errno::STALE)?;
        if inode.share.is_removed() {
            return Err(Errno::STALE);
        }
        Ok(inode)
    }

    /// The node's descriptor, opened again if it was evicted.
    pub(super) fn fd(&self, inode: &Inode) -> Result<Arc<OwnedFd>, Errno> {
        self.fd_within(inode, MAX_ASCENT)
    }

    fn fd_within(&self, inode: &Inode, ascent: u32) -> Result<Arc<OwnedFd>, Errno> {
        let handle = match &*lock(&inode.slot) {
            Slot::Open(fd) => return Ok(fd.clone()),
            Slot::Evicted(handle) => handle.clone(),
        };
        let found = self.find_again(inode, handle.as_ref(), ascent)?;
        let stat = stat(&found)?;
        if Identity::of(&stat) != inode.identity {
            return Err(Errno::STALE);
        }
        let fd = Arc::new(found);
        let mut slot = lock(&inode.slot);
        if let Slot::Open(other) = &*slot {
            // Another thread was quicker; one descriptor is enough, and is counted once.
            return Ok(other.clone());
        }
        *slot = Slot::Open(fd.clone());
        drop(slot);
        self.opened(inode.id);
        Ok(fd)
    }

    fn find_again(
        &self,
        inode: &Inode,
        handle: Option<&FileHandle>,
        ascent: u32,
    ) -> Result<OwnedFd, Errno> {
        let ascent = ascent.checked_sub(1).ok_or(Errno::STALE)?;
        if let (Some(handle), Some(anchor)) = (handle, inode.share.anchor()) {
            let flags = OFlags::PATH | OFlags::NOFOLLOW;
            if let Ok(fd) = handle.open(anchor, flags.bits() as i32) {
                return Ok(fd);
            }
        }
        let (parent, name) = lock(&inode.place).clone();
        let parent = self.get(parent)?;
        let found = open_entry(self.fd_within(&parent, ascent)?, &name)?;
        // The number may be another file's by now; its handle never is.
        match handle {
            Some(handle) if !FileHandle::of(&found).is_ok_and(|h| h == *handle) => {
                Err(Errno::STALE)
            }
            _ => Ok(found),
        }
    }

    /// Counts one look-up of the file that `fd` refers to and returns its node, a new one if the
    /// guest did not know the file.
    pub(super) fn look_up(
        &self,
        fd: OwnedFd,
        stat: &Statx,
        share: &Arc<Share>,
        place: (u64, &CStr),
    ) -> Arc<Inode> {
        let identity = Identity::of(stat);
        let mut tables = lock(&self.tables);
        if let Some(id) = tables.by_identity.get(&identity).copied()
            && let Some((inode, lookups)) = tables.by_id.get_mut(&id)
            && still_same(inode, &fd)
        {
            *lookups += 1;
            let inode = inode.clone();
            drop(tables);
            if !inode.is_root {
                *lock(&inode.place) = (place.0, place.1.to_owned());
            }
            return inode;
        }
        tables.next += 1;
        let id = tables.next;
        let inode = Arc::new(Inode {
            id,
            identity,
            kind: FileType::from_raw_mode(stat.stx_mode.into()),
            share: share.clone(),
            is_root: place.0 == ROOT_ID,
            slot: Mutex::new(Slot::Open(Arc::new(fd))),
            place: Mutex::new((place.0, place.1.to_owned())),
        });
        tables.by_id.insert(id, (inode.clone(), 1));
        tables.by_identity.insert(identity, id);
        drop(tables);
        self.opened(id);
        inode
    }

    /// A file moved: where it will be found again.
    pub(super) fn moved(&self, identity: Identity, parent: u64, name: &CStr) {
        let tables = lock(&self.tables);
        if let Some(id) = tables.by_identity.get(&identity)
            && let Some((inode, _)) = tables.by_id.get(id)
        {
            *lock(&inode.place) = (parent, name.to_owned());
        }
    }

    /// Takes back `count` look-ups; a node without any is gone.
    pub(super) fn forget(&self, id: u64, count: u64) {
        let mut tables = lock(&self.tables);
        let Some((_, lookups)) = tables.by_id.get_mut(&id) else {
            return;
        };
        *lookups = lookups.saturating_sub(count);
        if *lookups > 0 {
            return;
        }
        let Some((inode, _)) = tables.by_id.remove(&id) else {
            return;
        };
        // A newer node may have taken over the identity.
        if tables.by_identity.get(&inode.identity) == Some(&id) {
            tables.by_identity.remove(&inode.identity);
        }
        if matches!(*lock(&inode.slot), Slot::Open(_)) {
            tables.open = tables.open.saturating_sub(1);
        }
        // `recent` is cleaned when it is walked; bound what lies in it meanwhile.
        if tables.recent.len() > 2 * tables.open + 64 {
            let Tables { recent, by_id, .. } = &mut *tables;
            recent.retain(|id| by_id.contains_key(id));
        }
        drop(tables);
        drop(inode);
    }

    /// Forgets all.
    pub(super) fn clear(&self) {
        let mut tables = lock(&self.tables);
        tables.by_id.clear();
        tables.by_identity.clear();
        tables.recent.clear();
        tables.open = 0;
    }

    /// A node got a descriptor: another may have to give one up.
    fn opened(&self, id: u64) {
        let mut tables = lock(&self.tables);
        tables.open += 1;
        tables.recent.push_back(id);
        let mut tries = 16;
        while tables.open > self.limit && tries > 0 {
            tries -= 1;
            let Some(oldest) = tables.recent.pop_front() else {
                return;
            };
            let Some((inode, _)) = tables.by_id.get(&oldest) else {
                continue;
            };
            if oldest != id && evict(inode) {
                tables.open = tables.open.saturating_sub(1);
            } else {
                tables.recent.push_back(oldest);
            }
        }
    }

    #[cfg(test)]
    pub(super) fn counts(&self) -> (usize, usize) {
        let tables = lock(&self.tables);
        (tables.by_id.len(), tables.open)
    }
}

/// Closes a node's descriptor if the file can be found again. False if it must stay.
fn evict(inode: &Inode) -> bool {
    if inode.is_root {
        return false;
    }
    let mut slot = lock(&inode.slot);
    let Slot::Open(fd) = &*slot else {
        return false;
    };
    // In use, or without a name: nothing but the descriptor leads to it.
    if Arc::strong_count(fd) > 1 || stat(fd).map_or(true, |s| s.stx_nlink == 0) {
        return false;
    }
    let same_mount = inode.identity.mount == inode.share.mount_id;
    let handle = if same_mount {
        FileHandle::of(fd).ok()
    } else {
        None
    };
    *slot = Slot::Evicted(handle);
    true
}

/// Whether a file with a node's identity is the node's file: an evicted node's file may be gone,
/// and its inode number another's.
fn still_same(inode: &Inode, fd: &OwnedFd) -> bool {
    match &*lock(&inode.slot) {
        Slot::Open(_) => true,
        Slot::Evicted(Some(handle)) => FileHandle::of(fd).is_ok_and(|h| h == *handle),
        Slot::Evicted(None) => true,
    }
}
