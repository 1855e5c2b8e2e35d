//! What the guest has looked up: nodes, by the number that the guest got for each.
//!
//! A node holds an O_PATH descriptor, which keeps the host's file alive even when it is unlinked.
//! The guest decides how many nodes it remembers, so descriptors are kept only for the most
//! recent ones: a node that is evicted remembers how to find its file again, by a file handle
//! (open_by_handle_at, where the host allows it) or by its parent and name, and is checked to be
//! the same file when it is found. Nodes whose file has no name any more are never evicted.

use super::shares::Share;
use super::wire::{Attr, ROOT_ID};
use crate::sync::lock;
use crate::sys::FileHandle;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, StatxFlags, openat, statx};
use rustix::io::Errno;
use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

/// How many evicted directories may lie between a file and one that is open, when it is looked for
/// by name: a guest decides how deep they are nested, and each is a step of recursion.
const MAX_ASCENT: u32 = 64;

/// The most nodes that a guest may remember, some hundred bytes each. A guest's own kernel takes
/// more for each, so only one that never forgets gets there.
const MAX_NODES: usize = 4 << 20;

/// A file's identity on the host while it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    /// Two shares of one directory are two: one may be read-only, one may be taken away.
    share: u64,
    mount: u64,
    major: u32,
    minor: u32,
    inode: u64,
}

impl Identity {
    pub(super) fn of(stat: &Statx, share: &Share) -> Self {
        Self {
            share: share.number,
            mount: stat.stx_mnt_id,
            major: stat.stx_dev_major,
            minor: stat.stx_dev_minor,
            inode: stat.stx_ino,
        }
    }

    fn file_system(&self) -> FileSystem {
        (self.major, self.minor)
    }
}

/// A file system of the host's, by its device number.
pub(super) type FileSystem = (u32, u32);

/// Where the number of a file system stands in an inode number of the guest's.
const FILE_SYSTEM_SHIFT: u32 = 48;

/// Where a node's descriptor is, or how to get it back.
enum Slot {
    /// Its share was taken away.
    Gone,
    Open(Arc<OwnedFd>),
    Evicted(Traces),
}

/// What an evicted node's file is known by: inode numbers are used again.
#[derive(Clone)]
struct Traces {
    handle: Option<FileHandle>,
    /// Seconds and nanoseconds, where the file system keeps it.
    birth: Option<(i64, u32)>,
}

impl Traces {
    /// Whether this is the file, or may be as far as its file system can tell.
    fn fit(&self, fd: &OwnedFd, stat: &Statx) -> bool {
        match &self.handle {
            Some(handle) => FileHandle::of(fd).is_ok_and(|h| h == *handle),
            None => self.birth == birth(stat),
        }
    }
}

fn birth(stat: &Statx) -> Option<(i64, u32)> {
    let known = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
    known.then_some((stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec))
}

/// A node.
pub(super) struct Inode {
    pub(super) id: u64,
    pub(super) identity: Identity,
    pub(super) kind: FileType,
    pub(super) share: Arc<Share>,
    /// A share's own root, which has no parent to be found from.
    is_root: bool,
    /// Which file system of those that the guest sees.
    file_system: u16,
    /// Known to have no capabilities of the guest's (see `Passthrough::drop_privileges`).
    pub(super) bare: AtomicBool,
    slot: Mutex<Slot>,
    /// The directory and name that it was seen under last.
    place: Mutex<(u64, CString)>,
}

impl Inode {
    /// Attributes as the guest gets them.
    pub(super) fn attr(&self, stat: &Statx) -> Attr {
        Attr {
            ino: self.number(stat.stx_ino),
            ..Attr::from(stat)
        }
    }

    /// The guest's number for an inode of this node's file system. All that the guest sees is one
    /// file system to it, so that a number alone must tell files apart.
    ///
    /// FUSE can announce other file systems as submounts instead. Linux (6.12) then takes such a
    /// submount down without waiting for requests that are under way, and crashes when one of them
    /// is answered.
    pub(super) fn number(&self, inode: u64) -> u64 {
        inode ^ u64::from(self.file_system) << FILE_SYSTEM_SHIFT
    }

    /// The directory and name that it was seen under last.
    pub(super) fn place(&self) -> (u64, CString) {
        lock(&self.place).clone()
    }
}

struct Tables {
    by_id: HashMap<u64, (Arc<Inode>, u64)>,
    by_identity: HashMap<Identity, u64>,
    /// Nodes with a descriptor, oldest first; some may be gone.
    recent: VecDeque<u64>,
    open: usize,
    next: u64,
    /// The host's file systems, in the order in which the guest came to them.
    file_systems: Vec<FileSystem>,
}

impl Tables {
    /// Another node is to get a descriptor: older ones give up theirs. What can't be given up
    /// (open or nameless files) may exceed the limit by half.
    fn make_room(&mut self, limit: usize) -> Result<(), Errno> {
        let mut tries = 16;
        while self.open >= limit && tries > 0 {
            tries -= 1;
            let Some(oldest) = self.recent.pop_front() else {
                break;
            };
            let Some((inode, _)) = self.by_id.get(&oldest) else {
                continue;
            };
            if evict(inode) {
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

    /// The number of a file system, a new one if it was not seen before. Those beyond 65,535 share
    /// the last.
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
                file_systems: Vec::new(),
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
        let traces = match &*lock(&inode.slot) {
            Slot::Open(fd) => return Ok(fd.clone()),
            Slot::Evicted(traces) => traces.clone(),
            Slot::Gone => return Err(Errno::STALE),
        };
        let found = self.find_again(inode, &traces, ascent)?;
        let stat = stat(&found)?;
        if Identity::of(&stat, &inode.share) != inode.identity || !traces.fit(&found, &stat) {
            return Err(Errno::STALE);
        }
        let fd = Arc::new(found);
        let mut tables = lock(&self.tables);
        if !tables.by_id.contains_key(&inode.id) {
            // Forgotten meanwhile: good for this one use, and not counted.
            return Ok(fd);
        }
        tables.make_room(self.limit)?;
        let mut slot = lock(&inode.slot);
        match &*slot {
            // Another thread was quicker; one descriptor is enough, and is counted once.
            Slot::Open(other) => return Ok(other.clone()),
            Slot::Gone => return Err(Errno::STALE),
            Slot::Evicted(_) => {}
        }
        *slot = Slot::Open(fd.clone());
        drop(slot);
        tables.opened(inode.id);
        Ok(fd)
    }

    fn find_again(&self, inode: &Inode, traces: &Traces, ascent: u32) -> Result<OwnedFd, Errno> {
        let ascent = ascent.checked_sub(1).ok_or(Errno::STALE)?;
        if let (Some(handle), Some(anchor)) = (&traces.handle, inode.share.anchor()) {
            let flags = OFlags::PATH | OFlags::NOFOLLOW;
            if let Ok(fd) = handle.open(&*anchor, flags.bits() as i32) {
                return Ok(fd);
            }
        }
        let (parent, name) = inode.place();
        let parent = self.get(parent)?;
        open_entry(self.fd_within(&parent, ascent)?, &name)
    }

    /// Counts one look-up of the file that `fd` refers to and returns its node, a new one if the
    /// guest did not know the file. `directory` is where it was found; a share's root has none.
    ///
    /// # Errors
    /// ENFILE when the guest holds more files without a name than there are descriptors for.
    pub(super) fn look_up(
        &self,
        fd: OwnedFd,
        stat: &Statx,
        share: &Arc<Share>,
        directory: Option<&Inode>,
        name: &CStr,
    ) -> Result<Arc<Inode>, Errno> {
        let identity = Identity::of(stat, share);
        let parent = directory.map_or(ROOT_ID, |d| d.id);
        let mut tables = lock(&self.tables);
        if let Some(id) = tables.by_identity.get(&identity).copied()
            && let Some((inode, lookups)) = tables.by_id.get_mut(&id)
            && still_same(inode, &fd, stat)
        {
            *lookups += 1;
            let inode = inode.clone();
            drop(tables);
            if !inode.is_root {
                *lock(&inode.place) = (parent, name.to_owned());
            }
            return Ok(inode);
        }
        if share.is_removed() {
            return Err(Errno::STALE);
        }
        if tables.by_id.len() >= MAX_NODES {
            return Err(Errno::NFILE);
        }
        tables.make_room(self.limit)?;
        tables.next += 1;
        let id = tables.next;
        let file_system = match directory {
            Some(parent) if parent.identity.file_system() == identity.file_system() => {
                parent.file_system
            }
            _ => tables.file_system(identity.file_system()),
        };
        let inode = Arc::new(Inode {
            id,
            identity,
            kind: FileType::from_raw_mode(stat.stx_mode.into()),
            share: share.clone(),
            is_root: directory.is_none(),
            file_system,
            bare: AtomicBool::new(false),
            slot: Mutex::new(Slot::Open(Arc::new(fd))),
            place: Mutex::new((parent, name.to_owned())),
        });
        if directory.is_some_and(|d| d.file_system != file_system)
            && let Slot::Open(fd) = &*lock(&inode.slot)
        {
            share.add_nested(identity.file_system(), inode.kind, fd);
        }
        tables.by_id.insert(id, (inode.clone(), 1));
        tables.by_identity.insert(identity, id);
        tables.opened(id);
        Ok(inode)
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

    /// Takes back `count` look-ups; a node without any is gone, and then this is true.
    pub(super) fn forget(&self, id: u64, count: u64) -> bool {
        let mut tables = lock(&self.tables);
        let Some((_, lookups)) = tables.by_id.get_mut(&id) else {
            return false;
        };
        *lookups = lookups.saturating_sub(count);
        if *lookups > 0 {
            return false;
        }
        let Some((inode, _)) = tables.by_id.remove(&id) else {
            return false;
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
        true
    }

    /// Closes what is known under a share that was taken away.
    pub(super) fn let_go(&self, share: &Share) {
        let mut tables = lock(&self.tables);
        let gone = |inode: &&Arc<Inode>| inode.share.number == share.number;
        let inodes: Vec<_> = tables
            .by_id
            .values()
            .map(|e| &e.0)
            .filter(gone)
            .cloned()
            .collect();
        for inode in inodes {
            let slot = std::mem::replace(&mut *lock(&inode.slot), Slot::Gone);
            if matches!(slot, Slot::Open(_)) {
                tables.open = tables.open.saturating_sub(1);
            }
        }
        // Nothing of these can be evicted any more.
        let Tables { recent, by_id, .. } = &mut *tables;
        recent.retain(|id| by_id.get(id).is_some_and(|(inode, _)| !gone(&inode)));
    }

    /// Forgets all.
    pub(super) fn clear(&self) {
        let mut tables = lock(&self.tables);
        tables.by_id.clear();
        tables.by_identity.clear();
        tables.recent.clear();
        tables.open = 0;
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
    // In use (open files are: see `Handle`), or without a name: only the descriptor leads to it.
    if Arc::strong_count(fd) > 1 {
        return false;
    }
    let Ok(stat) = stat(fd) else {
        return false;
    };
    if stat.stx_nlink == 0 {
        return false;
    }
    let same_mount = inode.identity.mount == inode.share.mount_id;
    let handle = same_mount.then(|| FileHandle::of(fd).ok()).flatten();
    let birth = birth(&stat);
    *slot = Slot::Evicted(Traces { handle, birth });
    true
}

/// Whether a file with a node's identity is the node's file: an evicted node's file may be gone,
/// and its inode number another's.
fn still_same(inode: &Inode, fd: &OwnedFd, stat: &Statx) -> bool {
    match &*lock(&inode.slot) {
        Slot::Open(_) => true,
        Slot::Evicted(traces) => traces.fit(fd, stat),
        Slot::Gone => false,
    }
}
