//! Translates inotify events of the host into those of the guest.

use super::{HostEvent, State, Watches, kind};
use crate::fault::guest_fault;
use crate::fs::inodes::{self, Inode};
use koya_host::sync::lock;
use rustix::fs::FileType;
use rustix::fs::inotify::{self, ReadFlags};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::ffi::{CStr, CString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::sync::MutexGuard;

/// Limit of collected events; further ones stay in the host's queue.
const MAX_PENDING: usize = 4096;

/// Number of events that are read before other threads get their turn; those read together with them are added.
const EVENTS_AT_ONCE: usize = 256;

/// How often [`EVENTS_AT_ONCE`] are read: more events than the host's queue holds, by default.
const MAX_ROUNDS: usize = 65;

/// Maximum number of events that are reported together.
const MAX_REPORTED: usize = 1024;

/// Added to the host's move cookies, which are small like the guest's, to distinguish them.
pub(super) const HOST_COOKIE: u32 = 1 << 31;

impl Watches {
    /// The events to be reported now.
    pub(super) fn take(&self) -> io::Result<Vec<HostEvent>> {
        let (mut state, read) = self.drained();
        read?;
        let state = &mut *state;
        let again = state.look_again(MAX_REPORTED / 2);
        for event in &again {
            let node = state.nodes.get(&event.nodeid);
            if node.is_some_and(|node| node.parent.is_some()) {
                self.moved(state, event.nodeid);
            }
        }
        let count = state.pending.len().min(MAX_REPORTED - again.len());
        let mut events: Vec<_> = state.pending.drain(..count).collect();
        events.extend(again);
        if !state.pending.is_empty() || !state.dropped[0].is_empty() {
            self.wake.write(1).ok();
        }
        Ok(events)
    }

    /// Reads the events from the host's queue. The guest can cause any number of them, so others get their turn meanwhile.
    pub(super) fn drained(&self) -> (MutexGuard<'_, State>, io::Result<()>) {
        for _ in 0..MAX_ROUNDS {
            let mut state = self.in_turn();
            match self.drain(&mut state) {
                Ok(true) => {}
                Ok(false) => return (state, Ok(())),
                Err(error) => return (state, Err(error)),
            }
        }
        (self.in_turn(), Ok(()))
    }

    fn in_turn(&self) -> MutexGuard<'_, State> {
        drop(lock(&self.turn));
        lock(&self.state)
    }

    /// Reads some events from the host's queue. True if there may be more that can be read now.
    pub(super) fn drain(&self, state: &mut State) -> io::Result<bool> {
        let Some(queue) = self.queue.get() else {
            return Ok(false);
        };
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(queue, &mut buffer);
        let mut left = EVENTS_AT_ONCE;
        // Events in the buffer can't be returned to the queue.
        while (left > 0 && state.pending.len() < MAX_PENDING) || !reader.is_buffer_empty() {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            left = left.saturating_sub(1);
            let name = event.file_name().map_or(&[][..], CStr::to_bytes);
            self.translate(state, event.wd(), event.events(), event.cookie(), name);
        }
        Ok(state.pending.len() < MAX_PENDING)
    }

    pub(super) fn translate(
        &self,
        state: &mut State,
        descriptor: i32,
        flags: ReadFlags,
        cookie: u32,
        name: &[u8],
    ) {
        let bits = flags.bits();
        if bits & kind::Q_OVERFLOW != 0 {
            // The lost events are unknown: watchers have to look again. A guest can cause any number of events.
            guest_fault!("virtio-fs: the host dropped events of files that the guest watches");
            state.note_dropped();
            return;
        }
        if bits & kind::IGNORED != 0 {
            self.ended(state, descriptor);
            return;
        }
        let cookie = if cookie == 0 { 0 } else { cookie | HOST_COOKIE };
        let dir = bits & kind::IS_DIR;
        // An event of the host may have several types; the guest kernel takes one at a time.
        let mut left = bits & kind::REPORTED;
        while left != 0 {
            let kind = left & left.wrapping_neg();
            left &= !kind;
            self.translate_one(state, descriptor, (kind, dir), cookie, name);
        }
    }

    fn translate_one(
        &self,
        state: &mut State,
        descriptor: i32,
        (kind, dir): (u32, u32),
        cookie: u32,
        name: &[u8],
    ) {
        let Some(watched) = state.watched.get(&descriptor) else {
            return;
        };
        let nodes: Vec<u64> = watched.nodes.iter().copied().collect();
        let children: Vec<u64> = match kind & (kind::DELETE | kind::MOVED) != 0 && dir != 0 {
            true => {
                // The root of a detached mount has no name, and is its own parent.
                let names: [&[u8]; 2] = [name, b""];
                let named = names.into_iter().map(|name| watched.children_named(name));
                named.flatten().collect()
            }
            false => Vec::new(),
        };
        for nodeid in nodes {
            let Some(node) = state.nodes.get(&nodeid) else {
                continue;
            };
            // The watch of the file itself reports nothing else on its removal, since this server holds it open.
            let ends = name.is_empty()
                && kind == kind::ATTRIB
                && !state.is_own(node, name, kind::DELETE_SELF)
                && self.is_gone(&node.inode);
            if node.mask & kind != 0
                && !state.is_own(node, name, kind)
                && !self.is_own_by_another_name(state, &node.inode, name, kind)
            {
                push(&mut state.pending, nodeid, kind | dir, cookie, name);
            }
            if ends {
                push(&mut state.pending, nodeid, kind::DELETE_SELF, 0, &[]);
            }
            if kind == kind::MOVE_SELF {
                self.moved(state, nodeid);
            }
        }
        for nodeid in children {
            self.end_if_gone(state, nodeid);
        }
    }

    /// Reports the removal of a watched directory, if it was removed.
    fn end_if_gone(&self, state: &mut State, nodeid: u64) {
        let Some(node) = state.nodes.get(&nodeid) else {
            return;
        };
        if !self.is_gone(&node.inode) {
            return;
        }
        if !state.is_own(node, &[], kind::DELETE_SELF) {
            let mask = kind::DELETE_SELF | kind::IS_DIR;
            push(&mut state.pending, nodeid, mask, 0, &[]);
        }
        // It ends once, also if another directory of its name is removed later.
        let node = state.nodes.get_mut(&nodeid);
        let place = node.and_then(|node| node.parent.take());
        self.leave_parent(state, nodeid, place);
    }

    /// The host has ended a watch: its file is gone, or the file system.
    fn ended(&self, state: &mut State, descriptor: i32) {
        let Some(watched) = state.watched.remove(&descriptor) else {
            return;
        };
        for nodeid in watched.nodes {
            self.remove(state, nodeid);
        }
        for (_, nodeid) in watched.children {
            if let Some(node) = state.nodes.get_mut(&nodeid) {
                node.parent = None;
            }
        }
    }

    /// Whether the guest is changing the file that is this entry of a directory, although the name recorded for the change is
    /// another one: of the names of a file, only that of the last lookup is known, which may have been removed.
    fn is_own_by_another_name(
        &self,
        state: &State,
        directory: &Inode,
        name: &[u8],
        kind: u32,
    ) -> bool {
        if kind & (kind::MODIFY | kind::ATTRIB | kind::CLOSE_WRITE) == 0 {
            return false;
        }
        let changes = state.changes_in_progress.iter();
        let of_this_kind =
            changes.filter(|((_, entry), change)| entry.is_empty() && change.kinds & kind != 0);
        let mut changing = of_this_kind.map(|((node, _), _)| *node).peekable();
        if name.is_empty() || changing.peek().is_none() {
            return false;
        }
        let found = || {
            let directory = self.inodes.fd(directory).ok()?;
            let name = CString::new(name).ok()?;
            file_number(inodes::open_entry(&*directory, &name).ok()?)
        };
        let Some(found) = found() else {
            return false;
        };
        changing.any(|node| {
            let inode = self.inodes.get(node);
            let fd = inode.and_then(|inode| self.inodes.fd(&inode));
            fd.is_ok_and(|fd| file_number(&*fd) == Some(found))
        })
    }

    /// Whether a file is unlinked. If it can't be examined, nothing here holds it open, and the host reports
    /// the removal itself.
    fn is_gone(&self, inode: &Inode) -> bool {
        let stat = self.inodes.fd(inode).and_then(inodes::cached_stat);
        stat.is_ok_and(|stat| stat.stx_nlink == 0)
    }

    /// Updates the watches of a watched directory that has moved to another place, and may have been removed there.
    fn moved(&self, state: &mut State, nodeid: u64) {
        let Some(node) = state.nodes.get(&nodeid) else {
            return;
        };
        let (inode, is_placed) = (node.inode.clone(), node.parent.is_some());
        if inode.kind != FileType::Directory {
            return;
        }
        if self.is_gone(&inode) {
            if is_placed {
                self.end_if_gone(state, nodeid);
            }
            return;
        }
        let parent = self.join_parent(state, &inode);
        let Some(node) = state.nodes.get_mut(&nodeid) else {
            return;
        };
        let before = std::mem::replace(&mut node.parent, parent.clone());
        if before != parent {
            self.leave_parent(state, nodeid, before);
        }
    }
}

/// What identifies a file on the host: its file system, and its number there.
fn file_number(fd: impl AsFd) -> Option<(u32, u32, u64)> {
    let stat = inodes::stat(fd).ok()?;
    Some((stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino))
}

fn push(pending: &mut VecDeque<HostEvent>, nodeid: u64, mask: u32, cookie: u32, name: &[u8]) {
    let event = HostEvent {
        nodeid,
        mask,
        cookie,
        name: name.to_owned(),
    };
    if pending.back() != Some(&event) {
        pending.push_back(event);
    }
}
