//! Reports changes on the host to files that the guest watches (inotify).
//!
//! Without this, inotify in a guest reports only the guest's own changes, not those of the host to shared files.
//! Koya's guest kernel (`guest-kernel/patches`) announces each watch, and the host's inotify watches the same
//! file here. Events go to the owner of [`HostEvents`]: the sandbox passes them to its agent, which makes the
//! guest kernel fire its watches.
//!
//! # Changes made by the guest
//! The host's inotify also reports changes that this server makes on behalf of the guest, which the guest kernel has already
//! reported. So each operation records its changes in advance ([`ChangeGuard`]), and events that match the record are
//! ignored. When an operation ends, all events in the host's queue are read before its
//! record is removed. A change of the same kind to the same name by the host during the operation is ignored
//! too, but not missed: the guest's own event is fired after the operation.

mod translate;

use super::inodes::{self, Inode, Inodes};
use crate::sys;
use koya_host::descriptors;
use koya_host::sync::lock;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{CWD, FileType, Mode, OFlags, openat, readlinkat};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::ffi::CStr;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Maximum number of files that a guest may watch.
const MAX_WATCHES: usize = 1 << 16;

/// The limit of watches of a user. A guest gets an eighth of it.
const HOST_LIMIT: &str = "/proc/sys/fs/inotify/max_user_watches";
const USER_LIMIT_DIVISOR: usize = 8;

/// Time for which events are collected before they are reported together.
const COLLECT_TIME: Duration = Duration::from_millis(10);

/// Event types, as in `inotify(7)`.
pub(super) mod kind {
    pub(crate) const MODIFY: u32 = 0x2;
    pub(crate) const ATTRIB: u32 = 0x4;
    pub(crate) const CLOSE_WRITE: u32 = 0x8;
    pub(crate) const MOVED: u32 = 0x40 | 0x80;
    pub(crate) const CREATE: u32 = 0x100;
    pub(crate) const DELETE: u32 = 0x200;
    pub(crate) const DELETE_SELF: u32 = 0x400;
    pub(crate) const MOVE_SELF: u32 = 0x800;
    pub(crate) const Q_OVERFLOW: u32 = 0x4000;
    pub(crate) const IGNORED: u32 = 0x8000;
    pub(crate) const IS_DIR: u32 = 0x4000_0000;
    /// The types that are reported. Opening, reading and closing after reading are not: this server does the
    /// same for every access of the guest.
    pub(crate) const REPORTED: u32 =
        MODIFY | ATTRIB | CLOSE_WRITE | MOVED | CREATE | DELETE | DELETE_SELF | MOVE_SELF;
}

/// A change on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostEvent {
    /// Node ID in the guest.
    pub nodeid: u64,
    /// One of `IN_*` ([inotify(7)]), with `IN_ISDIR` if the host sets it.
    ///
    /// [inotify(7)]: https://man7.org/linux/man-pages/man7/inotify.7.html
    pub mask: u32,
    /// Equal for both halves of a move.
    pub cookie: u32,
    /// The directory entry that changed, at most 255 bytes; empty for the node itself.
    pub name: Vec<u8>,
}

/// Changes on the host to files that the guest watches. Ends with the device.
pub struct HostEvents(Arc<Watches>);

impl HostEvents {
    pub(super) fn new(watches: Arc<Watches>) -> Self {
        // Read here, since the watching threads may have no access to /proc.
        watches.limit.get_or_init(watch_limit);
        watches.wanted.store(true, Ordering::SeqCst);
        Self(watches)
    }

    /// Waits for events and returns up to 1,024 of them in order; `None` when the device is gone. Events that
    /// are not fetched stay in the host's queue, which holds some 16,000.
    ///
    /// # Errors
    /// If the host cannot wait or read.
    pub fn next(&self) -> io::Result<Option<Vec<HostEvent>>> {
        loop {
            let queue = self.0.queue.get();
            let queue = queue.map(|fd| fd as &dyn AsRawFd);
            let [ended, woken, _] =
                sys::wait_readable([Some(&self.0.ended), Some(&self.0.wake), queue], None)?;
            if ended {
                return Ok(None);
            }
            if woken {
                self.0.wake.read().ok();
            }
            if sys::wait_readable([Some(&self.0.ended)], Some(COLLECT_TIME))? == [true] {
                return Ok(None);
            }
            let events = self.0.take()?;
            if !events.is_empty() {
                return Ok(Some(events));
            }
        }
    }
}

impl Drop for HostEvents {
    fn drop(&mut self) {
        self.0.wanted.store(false, Ordering::SeqCst);
        self.0.clear();
    }
}

/// Maximum number of watched directories that are examined for one name: one directory can be several nodes.
const MAX_NAMESAKES: usize = 64;

/// Meaning of a watch descriptor of the host.
#[derive(Default)]
struct HostWatch {
    /// Nodes that the guest watches: one directory can be several nodes through several exports.
    nodes: HashSet<u64>,
    /// Watched directories in it, by their names on the host: a directory's own watch does not report its removal while
    /// it is held open, as this server does.
    children: BTreeSet<(Arc<[u8]>, u64)>,
}

impl HostWatch {
    /// The watched directories in it of this name.
    fn children_named(&self, name: &[u8]) -> Vec<u64> {
        let name: Arc<[u8]> = Arc::from(name);
        let named = self.children.range((name.clone(), 0)..=(name, u64::MAX));
        named.map(|(_, node)| *node).take(MAX_NAMESAKES).collect()
    }
}

/// Where the removal of a directory is reported: the watch descriptor of its parent, and its name there.
type Place = (i32, Arc<[u8]>);

struct Node {
    inode: Arc<Inode>,
    mask: u32,
    descriptor: i32,
    /// For a directory that was not removed.
    parent: Option<Place>,
}

/// Identifies a change made by the guest: to a node, or to an entry of it.
type Key = (u64, Vec<u8>);

/// Record of a pending operation and the kinds of change that it makes.
#[derive(Default)]
struct Change {
    kinds: u32,
    in_progress: u32,
}

#[derive(Default)]
struct State {
    nodes: BTreeMap<u64, Node>,
    watched: HashMap<i32, HostWatch>,
    /// Sequence number of the last watch request for each node: requests can overtake each other.
    last_requests: HashMap<u64, u64>,
    changes_in_progress: HashMap<Key, Change>,
    /// Events to be reported.
    pending: VecDeque<HostEvent>,
    /// Nodes whose events the host may have dropped, and which have not been told so: those in the first range, then
    /// those in the second.
    dropped: [Range<u64>; 2],
}

/// The watches of a guest.
pub(super) struct Watches {
    inodes: Arc<Inodes>,
    /// The host's inotify instance, created with the first watch: a user can have only a few.
    queue: OnceLock<OwnedFd>,
    /// Signalled when the queue was created, or events are to be reported.
    wake: EventFd,
    ended: EventFd,
    /// Whether [`HostEvents`] is in use.
    wanted: AtomicBool,
    refused: AtomicBool,
    /// Maximum number of files that the guest may watch.
    limit: OnceLock<usize>,
    count: AtomicUsize,
    /// Held by the owner, who waits for `state`: those who read many events let it pass.
    turn: Mutex<()>,
    state: Mutex<State>,
}

fn watch_limit() -> usize {
    let limit = std::fs::read_to_string(HOST_LIMIT).ok();
    let limit = limit.and_then(|text| text.trim().parse::<usize>().ok());
    limit.map_or(MAX_WATCHES, |limit| {
        (limit / USER_LIMIT_DIVISOR).min(MAX_WATCHES)
    })
}

impl Watches {
    pub(super) fn new(inodes: Arc<Inodes>) -> io::Result<Self> {
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK);
        Ok(Self {
            inodes,
            queue: OnceLock::new(),
            wake: event()?,
            ended: event()?,
            wanted: AtomicBool::new(false),
            refused: AtomicBool::new(false),
            limit: OnceLock::new(),
            count: AtomicUsize::new(0),
            turn: Mutex::default(),
            state: Mutex::default(),
        })
    }

    /// Whether to offer watches to the guest.
    pub(super) fn wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst)
    }

    /// Whether the guest watches anything.
    pub(super) fn any(&self) -> bool {
        self.count.load(Ordering::SeqCst) > 0
    }

    /// Ends waits for events: there will be no more.
    pub(super) fn end(&self) {
        self.ended.write(1).ok();
    }

    /// Watches a node for the types in `mask`. `number` orders the watch requests.
    ///
    /// # Errors
    /// The error from inotify_add_watch(2); ENOSPC beyond the guest's limit.
    pub(super) fn watch(&self, inode: &Arc<Inode>, number: u64, mask: u32) -> Result<(), Errno> {
        let mut state = lock(&self.state);
        // It may have been forgotten meanwhile, or its share removed.
        self.inodes.get(inode.id)?;
        if !state.is_newer(inode.id, number) {
            return Ok(());
        }
        state.last_requests.insert(inode.id, number);
        let watched = self.add(&mut state, inode, mask);
        self.count.store(state.nodes.len(), Ordering::SeqCst);
        if let Err(error) = watched
            && !self.refused.swap(true, Ordering::Relaxed)
        {
            log::warn!(
                "virtio-fs: the guest is not told of changes on the host to a file that it watches: \
                 {error} (/proc/sys/fs/inotify has the host's limits)"
            );
        }
        watched
    }

    /// The guest no longer watches the node.
    pub(super) fn unwatch(&self, nodeid: u64, number: u64) {
        let mut state = lock(&self.state);
        if self.inodes.get(nodeid).is_ok() && state.is_newer(nodeid, number) {
            state.last_requests.insert(nodeid, number);
            self.remove(&mut state, nodeid);
        }
    }

    /// The guest forgot the node.
    pub(super) fn forget(&self, nodeid: u64) {
        if self.wanted() {
            let mut state = lock(&self.state);
            state.last_requests.remove(&nodeid);
            self.remove(&mut state, nodeid);
        }
    }

    /// Removes the watches of matching nodes.
    pub(super) fn remove_if(&self, gone: impl Fn(&Inode) -> bool) {
        let _turn = lock(&self.turn);
        let mut state = lock(&self.state);
        let nodes = state.nodes.iter().filter(|(_, node)| gone(&node.inode));
        for nodeid in nodes.map(|(id, _)| *id).collect::<Vec<_>>() {
            state.last_requests.remove(&nodeid);
            self.remove(&mut state, nodeid);
        }
    }

    /// Removes all watches: the guest is gone, or its events are no longer reported.
    pub(super) fn clear(&self) {
        self.remove_if(|_| true);
        *lock(&self.state) = State::default();
    }

    fn add(&self, state: &mut State, inode: &Arc<Inode>, mask: u32) -> Result<(), Errno> {
        if let Some(node) = state.nodes.get_mut(&inode.id) {
            node.mask = mask;
            return Ok(());
        }
        let queue = self.queue()?;
        // The host's watches include parents, and one watch can be that of several nodes.
        let count = state.watched.len().max(state.nodes.len());
        if count >= *self.limit.get_or_init(watch_limit) {
            return Err(Errno::NOSPC);
        }
        let fd = self.inodes.fd(inode)?;
        let descriptor = watch_file(queue, &*fd, kind::REPORTED)?;
        let watched = state.watched.entry(descriptor).or_default();
        watched.nodes.insert(inode.id);
        let node = Node {
            inode: inode.clone(),
            mask,
            descriptor,
            parent: self.join_parent(state, inode),
        };
        state.nodes.insert(inode.id, node);
        Ok(())
    }

    fn queue(&self) -> Result<&OwnedFd, Errno> {
        if self.queue.get().is_none() {
            let made = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
            self.queue.set(made).ok();
            self.wake.write(1).ok();
        }
        self.queue.get().ok_or(Errno::NOTSUP)
    }

    fn remove(&self, state: &mut State, nodeid: u64) {
        let Some(node) = state.nodes.remove(&nodeid) else {
            return;
        };
        self.count.store(state.nodes.len(), Ordering::SeqCst);
        if let Some(watched) = state.watched.get_mut(&node.descriptor) {
            watched.nodes.remove(&nodeid);
        }
        self.tidy(state, node.descriptor);
        self.leave_parent(state, nodeid, node.parent);
    }

    /// Watches the parent of a directory, if it can be watched.
    fn join_parent(&self, state: &mut State, inode: &Inode) -> Option<Place> {
        if inode.kind != FileType::Directory {
            return None;
        }
        let fd = self.inodes.fd(inode).ok()?;
        let parent = watch_parent(self.queue.get()?, &*fd)?;
        // If it is renamed after this, its own watch reports that.
        let name = name_on_host(&fd).unwrap_or_else(|| inode.location().1.into_bytes());
        let name: Arc<[u8]> = Arc::from(name);
        let watched = state.watched.entry(parent).or_default();
        watched.children.insert((name.clone(), inode.id));
        Some((parent, name))
    }

    fn leave_parent(&self, state: &mut State, nodeid: u64, place: Option<Place>) {
        if let Some((parent, name)) = place {
            if let Some(watched) = state.watched.get_mut(&parent) {
                watched.children.remove(&(name, nodeid));
            }
            self.tidy(state, parent);
        }
    }

    /// Removes a watch of the host that is no longer needed.
    fn tidy(&self, state: &mut State, descriptor: i32) {
        let idle = |watched: &HostWatch| watched.nodes.is_empty() && watched.children.is_empty();
        if state.watched.get(&descriptor).is_some_and(idle) {
            state.watched.remove(&descriptor);
            if let Some(queue) = self.queue.get() {
                inotify::remove_watch(queue, descriptor).ok();
            }
        }
    }

    /// Records pending changes by the guest, by node or entry and kind of change. The record is
    /// removed when the guard is dropped.
    pub(super) fn begin_change<const N: usize>(
        &self,
        about: impl FnOnce() -> [(Key, u32); N],
    ) -> Option<ChangeGuard<'_>> {
        if !self.any() {
            return None;
        }
        let about = about();
        let mut state = lock(&self.state);
        for (key, kinds) in &about {
            let change = state.changes_in_progress.entry(key.clone()).or_default();
            change.kinds |= kinds;
            change.in_progress += 1;
        }
        Some(ChangeGuard {
            watches: self,
            keys: about.into_iter().map(|(key, _)| key).collect(),
        })
    }
}

impl State {
    /// Records that the host has dropped events, of any nodes.
    fn note_dropped(&mut self) {
        let next = self.dropped[0].start;
        self.dropped = [next..u64::MAX, 0..next];
    }

    /// Events for up to `most` of the nodes whose own events may have been dropped: their watchers have to look again.
    fn look_again(&mut self, most: usize) -> Vec<HostEvent> {
        let mut events = Vec::new();
        let [current, rest] = &mut self.dropped;
        while !current.is_empty() && events.len() < most {
            let Some((nodeid, node)) = self.nodes.range(current.clone()).next() else {
                *current = std::mem::take(rest);
                continue;
            };
            current.start = *nodeid + 1;
            events.push(HostEvent {
                nodeid: *nodeid,
                mask: match node.mask & kind::MODIFY {
                    0 => kind::ATTRIB,
                    modify => modify,
                },
                cookie: 0,
                name: Vec::new(),
            });
        }
        events
    }

    fn is_newer(&self, nodeid: u64, number: u64) -> bool {
        self.last_requests
            .get(&nodeid)
            .is_none_or(|last| *last < number)
    }

    /// Whether an event of this node, or of its entry `name`, was caused by the guest.
    fn is_own(&self, node: &Node, name: &[u8], kinds: u32) -> bool {
        let is_recorded = |key: &Key| {
            let change = self.changes_in_progress.get(key);
            change.is_some_and(|change| change.kinds & kinds != 0)
        };
        if self.changes_in_progress.is_empty() {
            return false;
        }
        if !name.is_empty() {
            return is_recorded(&(node.inode.id, name.to_owned()));
        }
        is_recorded(&own_key(&node.inode)) || is_recorded(&location_key(&node.inode))
    }
}

/// Key for a change of the node itself.
pub(super) fn own_key(inode: &Inode) -> Key {
    (inode.id, Vec::new())
}

/// Key for a change of a node as seen by the watch of its directory.
pub(super) fn location_key(inode: &Inode) -> Key {
    let (parent, name) = inode.location();
    (parent, name.into_bytes())
}

/// Key for a change of a directory entry.
pub(super) fn entry_key(directory: u64, name: &CStr) -> Key {
    (directory, name.to_bytes().to_owned())
}

/// Guard of an operation by which the guest changes something: see [`Watches::begin_change`].
pub(super) struct ChangeGuard<'a> {
    watches: &'a Watches,
    keys: Vec<Key>,
}

impl Drop for ChangeGuard<'_> {
    fn drop(&mut self) {
        // All events of this operation are in the host's queue by now.
        let (mut state, read) = self.watches.drained();
        let state = &mut *state;
        if let Err(error) = read {
            log::debug!("virtio-fs: the host's watches can't be read: {error}");
        }
        if !state.pending.is_empty() {
            self.watches.wake.write(1).ok();
        }
        for key in &self.keys {
            if let Some(change) = state.changes_in_progress.get_mut(key) {
                change.in_progress = change.in_progress.saturating_sub(1);
                if change.in_progress == 0 {
                    state.changes_in_progress.remove(key);
                }
            }
        }
    }
}

fn watch_file(queue: &OwnedFd, fd: impl AsFd, kinds: u32) -> Result<i32, Errno> {
    let path = descriptors::path(fd.as_fd());
    // If the file is already watched, the types are added.
    let flags = WatchFlags::from_bits_retain(kinds) | WatchFlags::MASK_ADD;
    inotify::add_watch(queue, path, flags)
}

/// Watches the parent of a directory. Without permission, the directory's removal is not seen.
fn watch_parent(queue: &OwnedFd, directory: impl AsFd) -> Option<i32> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = openat(&directory, c"..", flags, Mode::empty()).ok()?;
    watch_file(queue, parent, kind::DELETE | kind::MOVED).ok()
}

/// The name of a directory on the host, or its last name if it was removed. `None` if its path is too long, for example.
fn name_on_host(directory: &OwnedFd) -> Option<Vec<u8>> {
    const REMOVED: &[u8] = b" (deleted)";
    let path = readlinkat(CWD, descriptors::path(directory.as_fd()), Vec::new()).ok()?;
    let name = path.as_bytes().rsplit(|byte| *byte == b'/').next()?;
    let is_removed = inodes::cached_stat(directory).ok()?.stx_nlink == 0;
    let name = match is_removed {
        true => name.strip_suffix(REMOVED).unwrap_or(name),
        false => name,
    };
    Some(name.to_owned())
}

#[cfg(test)]
mod tests;
