//! Changes on the host, for a guest that watches its files (inotify).
//!
//! A guest's inotify sees what the guest does, and nothing of what the host does to shared files.
//! Koya's guest kernel (`guest-kernel/patches`) tells of each watch, the host's inotify watches the
//! same file here, and what it sees goes back to the guest by whoever holds [`HostEvents`]: the
//! sandbox's agent hands it to the guest's kernel, which fires its own watches.
//!
//! # What the guest did itself
//! The host's inotify also sees what this server does for the guest, and the guest's kernel has
//! told of that already. Each operation therefore notes what it is about to change ([`Acting`]); an
//! event that fits such a note is the guest's own. A note holds until the host's queue is empty after
//! its operation. A host's change of the same kind to the same name in that moment is dropped with
//! it, and is not missed: the guest's own event is fired after the operation.

use super::inodes::{self, Inode, Inodes};
use crate::sync::lock;
use crate::sys;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{FileType, Mode, OFlags, openat};
use rustix::io::Errno;
use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The most files that one guest may watch. The host has a limit for each user besides
/// (`/proc/sys/fs/inotify/max_user_watches`).
const MAX_WATCHES: usize = 1 << 16;

/// How long events are gathered: what changes often is told once.
const GATHER: Duration = Duration::from_millis(10);

/// The most notes that are kept of operations that have ended.
const MAX_NOTES: usize = 1 << 14;

/// Kinds of events, as `inotify(7)` has them.
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
    /// What a guest is told of. Not of opening, reading and closing after that: this server does as
    /// much for every access of the guest's.
    pub(crate) const TOLD: u32 =
        MODIFY | ATTRIB | CLOSE_WRITE | MOVED | CREATE | DELETE | DELETE_SELF | MOVE_SELF;
}

/// The host's numbers for pairs of moves are small, as the guest's are: this bit tells them apart.
const HOST_COOKIE: u32 = 1 << 31;

/// A change on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostEvent {
    /// The node, by the number that the guest has for it.
    pub nodeid: u64,
    /// One of `IN_*` ([inotify(7)]), with `IN_ISDIR` where the host says so.
    ///
    /// [inotify(7)]: https://man7.org/linux/man-pages/man7/inotify.7.html
    pub mask: u32,
    /// The same for both halves of a move.
    pub cookie: u32,
    /// The entry of the directory that it is about; empty: the node itself. At most 255 bytes.
    pub name: Vec<u8>,
}

/// What changes on the host, as a guest that watches it is to be told. Ends with the device.
pub struct HostEvents(Arc<Watches>);

impl HostEvents {
    pub(super) fn new(watches: Arc<Watches>) -> Self {
        watches.wanted.store(true, Ordering::SeqCst);
        Self(watches)
    }

    /// Waits for events and returns all that there are, in the order in which they happened; none
    /// when the device is gone. What is not fetched waits in the host's queue, some 16,000 events.
    ///
    /// # Errors
    /// If the host can't wait or read.
    pub fn next(&self) -> io::Result<Option<Vec<HostEvent>>> {
        loop {
            let queue = self.0.queue.get();
            let queue = queue.map(|fd| fd as &dyn AsRawFd);
            let [ended, started, _] =
                sys::wait_readable([Some(&self.0.ended), Some(&self.0.started), queue], None)?;
            if ended {
                return Ok(None);
            }
            if started {
                self.0.started.read().ok();
                continue;
            }
            if sys::wait_readable([Some(&self.0.ended)], Some(GATHER))? == [true] {
                return Ok(None);
            }
            let events = self.0.read()?;
            if !events.is_empty() {
                return Ok(Some(events));
            }
        }
    }
}

/// What one descriptor of the host's queue stands for.
#[derive(Default)]
struct Watched {
    /// Nodes that the guest watches: one file can be several, by way of several shares.
    nodes: HashSet<u64>,
    /// Directories in it that the guest watches: a directory's own watch hears nothing of its end
    /// while somebody holds it, and this server does.
    children: HashSet<u64>,
}

struct Node {
    inode: Arc<Inode>,
    mask: u32,
    descriptor: i32,
    /// Where its parent is watched, of a directory.
    parent: Option<i32>,
}

/// Which change is the guest's own: a node's, or that of an entry of it.
type Key = (u64, Vec<u8>);

#[derive(Default)]
struct Note {
    kinds: u32,
    /// Operations that have not ended.
    under_way: u32,
}

#[derive(Default)]
struct State {
    nodes: HashMap<u64, Node>,
    watched: HashMap<i32, Watched>,
    /// The number of what was heard last of each node: requests overtake each other.
    heard: HashMap<u64, u64>,
    notes: HashMap<Key, Note>,
    /// Events were taken from the host's queue and not looked at yet.
    reading: bool,
}

/// What the guest watches.
pub(super) struct Watches {
    inodes: Arc<Inodes>,
    /// The host's inotify instance, made for the first watch: a user has few of them.
    queue: OnceLock<OwnedFd>,
    started: EventFd,
    ended: EventFd,
    /// Somebody holds [`HostEvents`].
    wanted: AtomicBool,
    refused: AtomicBool,
    count: AtomicUsize,
    state: Mutex<State>,
}

impl Watches {
    pub(super) fn new(inodes: Arc<Inodes>) -> io::Result<Self> {
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK);
        Ok(Self {
            inodes,
            queue: OnceLock::new(),
            started: event()?,
            ended: event()?,
            wanted: AtomicBool::new(false),
            refused: AtomicBool::new(false),
            count: AtomicUsize::new(0),
            state: Mutex::default(),
        })
    }

    /// Whether the guest is to be offered this.
    pub(super) fn wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst)
    }

    /// Whoever waits for events is told that there will be none.
    pub(super) fn end(&self) {
        self.ended.write(1).ok();
    }

    /// The guest watches a node for what is in `mask`. `number` orders what is said of watches.
    ///
    /// # Errors
    /// What inotify_add_watch(2) says; ENOSPC beyond the most watches of a guest.
    pub(super) fn watch(&self, inode: &Arc<Inode>, number: u64, mask: u32) -> Result<(), Errno> {
        let mut state = lock(&self.state);
        if !state.is_news(inode.id, number) {
            return Ok(());
        }
        state.heard.insert(inode.id, number);
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

    /// Nobody in the guest watches the node any more.
    pub(super) fn unwatch(&self, nodeid: u64, number: u64) {
        let mut state = lock(&self.state);
        if state.is_news(nodeid, number) {
            state.heard.insert(nodeid, number);
            self.remove(&mut state, nodeid);
        }
    }

    /// The guest forgot the node.
    pub(super) fn forget(&self, nodeid: u64) {
        if self.wanted() {
            let mut state = lock(&self.state);
            state.heard.remove(&nodeid);
            self.remove(&mut state, nodeid);
        }
    }

    /// Ends the watches of nodes that fit.
    pub(super) fn let_go(&self, gone: impl Fn(&Inode) -> bool) {
        let mut state = lock(&self.state);
        let nodes = state.nodes.iter().filter(|(_, node)| gone(&node.inode));
        for nodeid in nodes.map(|(id, _)| *id).collect::<Vec<_>>() {
            state.heard.remove(&nodeid);
            self.remove(&mut state, nodeid);
        }
    }

    fn add(&self, state: &mut State, inode: &Arc<Inode>, mask: u32) -> Result<(), Errno> {
        if let Some(node) = state.nodes.get_mut(&inode.id) {
            node.mask = mask;
            return Ok(());
        }
        if state.nodes.len() >= MAX_WATCHES {
            return Err(Errno::NOSPC);
        }
        let queue = self.queue()?;
        let fd = self.inodes.fd(inode)?;
        let descriptor = watch_file(queue, &*fd, kind::TOLD)?;
        let watched = state.watched.entry(descriptor).or_default();
        watched.nodes.insert(inode.id);
        let parent = match inode.kind {
            FileType::Directory => watch_parent(queue, &*fd),
            _ => None,
        };
        if let Some(parent) = parent {
            let parent = state.watched.entry(parent).or_default();
            parent.children.insert(inode.id);
        }
        let node = Node {
            inode: inode.clone(),
            mask,
            descriptor,
            parent,
        };
        state.nodes.insert(inode.id, node);
        Ok(())
    }

    fn queue(&self) -> Result<&OwnedFd, Errno> {
        if self.queue.get().is_none() {
            let made = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
            self.queue.set(made).ok();
            self.started.write(1).ok();
        }
        self.queue.get().ok_or(Errno::NOTSUP)
    }

    fn remove(&self, state: &mut State, nodeid: u64) {
        let Some(node) = state.nodes.remove(&nodeid) else {
            return;
        };
        self.count.store(state.nodes.len(), Ordering::SeqCst);
        for descriptor in [Some(node.descriptor), node.parent].into_iter().flatten() {
            let Some(watched) = state.watched.get_mut(&descriptor) else {
                continue;
            };
            if Some(descriptor) == node.parent {
                watched.children.remove(&nodeid);
            }
            if descriptor == node.descriptor {
                watched.nodes.remove(&nodeid);
            }
            if watched.nodes.is_empty() && watched.children.is_empty() {
                state.watched.remove(&descriptor);
                if let Some(queue) = self.queue.get() {
                    inotify::remove_watch(queue, descriptor).ok();
                }
            }
        }
    }

    /// The guest is about to change what `about` lists: nodes or entries, and how. The note ends with
    /// what is returned.
    pub(super) fn acting<const N: usize>(
        &self,
        about: impl FnOnce() -> [(Key, u32); N],
    ) -> Option<Acting<'_>> {
        if self.count.load(Ordering::SeqCst) == 0 {
            return None;
        }
        let about = about();
        let mut state = lock(&self.state);
        if state.notes.len() > MAX_NOTES {
            state.forget_ended();
        }
        for (key, kinds) in &about {
            let note = state.notes.entry(key.clone()).or_default();
            note.kinds |= kinds;
            note.under_way += 1;
        }
        Some(Acting {
            watches: self,
            keys: about.into_iter().map(|(key, _)| key).collect(),
        })
    }

    /// Takes what is in the host's queue, as it is for the guest.
    fn read(&self) -> io::Result<Vec<HostEvent>> {
        let Some(queue) = self.queue.get() else {
            return Ok(Vec::new());
        };
        lock(&self.state).reading = true;
        let mut events = Vec::new();
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(queue, &mut buffer);
        loop {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let name = event.file_name().map_or(&[][..], CStr::to_bytes);
            self.translate(
                event.wd(),
                event.events(),
                event.cookie(),
                name,
                &mut events,
            );
        }
        let mut state = lock(&self.state);
        state.reading = false;
        if is_empty(queue) {
            state.forget_ended();
        }
        Ok(events)
    }

    fn translate(
        &self,
        descriptor: i32,
        flags: ReadFlags,
        cookie: u32,
        name: &[u8],
        events: &mut Vec<HostEvent>,
    ) {
        let mut state = lock(&self.state);
        let bits = flags.bits();
        let mut push = |nodeid, mask, cookie, name: &[u8]| {
            let event = HostEvent {
                nodeid,
                mask,
                cookie,
                name: name.to_owned(),
            };
            if events.last() != Some(&event) {
                events.push(event);
            }
        };
        if bits & kind::Q_OVERFLOW != 0 {
            // What was lost is not known: whoever watches looks again.
            log::warn!("virtio-fs: the host dropped events of files that the guest watches");
            for nodeid in state.nodes.keys() {
                push(*nodeid, kind::ATTRIB, 0, &[]);
            }
            return;
        }
        if bits & kind::IGNORED != 0 {
            state.watched.remove(&descriptor);
            return;
        }
        let kinds = bits & kind::TOLD;
        let Some(watched) = state.watched.get(&descriptor) else {
            return;
        };
        let dir = bits & kind::IS_DIR;
        let cookie = if cookie == 0 { 0 } else { cookie | HOST_COOKIE };
        for nodeid in &watched.nodes {
            let Some(node) = state.nodes.get(nodeid) else {
                continue;
            };
            if state.is_own(node, name, kinds) {
                continue;
            }
            if node.mask & kinds != 0 {
                push(*nodeid, kinds | dir, cookie, name);
            }
            // Its own watch says no more than this of a file's end, since this server holds it.
            if name.is_empty() && kinds == kind::ATTRIB && self.is_gone(&node.inode) {
                push(*nodeid, kind::DELETE_SELF, 0, &[]);
            }
        }
        if kinds & (kind::DELETE | kind::MOVED) != 0 && dir != 0 {
            for nodeid in &watched.children {
                if let Some(node) = state.nodes.get(nodeid)
                    && self.is_gone(&node.inode)
                    && !state.is_own(node, &[], kind::DELETE_SELF)
                {
                    push(*nodeid, kind::DELETE_SELF | kind::IS_DIR, 0, &[]);
                }
            }
        }
        if kinds == kind::MOVE_SELF {
            let nodes: Vec<u64> = watched.nodes.iter().copied().collect();
            nodes.iter().for_each(|id| self.moved(&mut state, *id));
        }
    }

    fn is_gone(&self, inode: &Inode) -> bool {
        let stat = self.inodes.fd(inode).and_then(inodes::stat);
        stat.map_or(true, |stat| stat.stx_nlink == 0)
    }

    /// A watched directory has another parent now.
    fn moved(&self, state: &mut State, nodeid: u64) {
        let Some(node) = state.nodes.get(&nodeid) else {
            return;
        };
        let (inode, mask) = (node.inode.clone(), node.mask);
        if inode.kind == FileType::Directory {
            self.remove(state, nodeid);
            if let Err(error) = self.add(state, &inode, mask) {
                log::debug!("virtio-fs: a moved directory can't be watched again: {error}");
            }
            self.count.store(state.nodes.len(), Ordering::SeqCst);
        }
    }
}

impl State {
    fn is_news(&self, nodeid: u64, number: u64) -> bool {
        self.heard.get(&nodeid).is_none_or(|last| *last < number)
    }

    fn forget_ended(&mut self) {
        self.notes.retain(|_, note| note.under_way > 0);
    }

    /// Whether an event of this node, or of its entry `name`, is of the guest's own doing.
    fn is_own(&self, node: &Node, name: &[u8], kinds: u32) -> bool {
        let noted = |key: &Key| {
            let note = self.notes.get(key);
            note.is_some_and(|note| note.kinds & kinds != 0)
        };
        if self.notes.is_empty() {
            return false;
        }
        if !name.is_empty() {
            return noted(&(node.inode.id, name.to_owned()));
        }
        noted(&own_key(&node.inode)) || noted(&place_key(&node.inode))
    }
}

/// A note's key for a change of a node itself.
pub(super) fn own_key(inode: &Inode) -> Key {
    (inode.id, Vec::new())
}

/// A note's key for a change of a node, as its directory's watch sees it.
pub(super) fn place_key(inode: &Inode) -> Key {
    let (parent, name) = inode.place();
    (parent, name.into_bytes())
}

/// A note's key for a change of an entry.
pub(super) fn entry_key(directory: u64, name: &CStr) -> Key {
    (directory, name.to_bytes().to_owned())
}

/// The guest is changing something: see [`Watches::acting`].
pub(super) struct Acting<'a> {
    watches: &'a Watches,
    keys: Vec<Key>,
}

impl Drop for Acting<'_> {
    fn drop(&mut self) {
        let state = &mut *lock(&self.watches.state);
        let seen = !state.reading && self.watches.queue.get().is_none_or(is_empty);
        for key in &self.keys {
            let Some(note) = state.notes.get_mut(key) else {
                continue;
            };
            note.under_way = note.under_way.saturating_sub(1);
            if note.under_way == 0 && seen {
                state.notes.remove(key);
            }
        }
    }
}

/// Whether nothing is in the host's queue.
fn is_empty(queue: &OwnedFd) -> bool {
    rustix::io::ioctl_fionread(queue).is_ok_and(|bytes| bytes == 0)
}

fn watch_file(queue: &OwnedFd, fd: impl AsFd, kinds: u32) -> Result<i32, Errno> {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    // A file that is watched already keeps what it is watched for.
    let flags = WatchFlags::from_bits_retain(kinds) | WatchFlags::MASK_ADD;
    inotify::add_watch(queue, path, flags)
}

/// Watches the directory that a directory is in. Without the right to do so, its end is not seen.
fn watch_parent(queue: &OwnedFd, directory: impl AsFd) -> Option<i32> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = openat(&directory, c"..", flags, Mode::empty()).ok()?;
    watch_file(queue, parent, kind::DELETE | kind::MOVED).ok()
}

#[cfg(test)]
mod tests;
