//! Open files and directories, by the number that the guest got for each.

use super::inodes::Inode;
use koya_host::sync::lock;
use rustix::io::Errno;
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

/// An open file or directory.
pub(super) struct Handle {
    /// The node that it was opened from.
    pub(super) nodeid: u64,
    /// Says by which shares it is reached.
    inode: Arc<Inode>,
    /// Whether it is open for writing.
    writes: bool,
    pub(super) file: File,
    /// Keeps the node's own descriptor: an open file may have lost its name by the time that the
    /// node is asked for again.
    _node: Arc<OwnedFd>,
    /// Serializes reading of a directory: its position is the descriptor's.
    pub(super) position: Mutex<()>,
}

/// All handles of one guest.
pub(super) struct Handles {
    limit: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    open: HashMap<u64, Arc<Handle>>,
}

impl Handles {
    /// No more than `limit` at once.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            state: Mutex::default(),
        }
    }

    /// Keeps an open file; ENFILE when the guest has as many as it may.
    pub(super) fn insert(
        &self,
        inode: &Arc<Inode>,
        node: Arc<OwnedFd>,
        file: File,
        writes: bool,
    ) -> Result<u64, Errno> {
        let mut state = lock(&self.state);
        if !inode.is_live() {
            return Err(Errno::STALE);
        }
        if writes && !inode.is_writable() {
            return Err(Errno::ROFS);
        }
        if state.open.len() >= self.limit {
            return Err(Errno::NFILE);
        }
        state.next += 1;
        let number = state.next;
        let handle = Handle {
            nodeid: inode.id,
            inode: inode.clone(),
            writes,
            file,
            _node: node,
            position: Mutex::default(),
        };
        state.open.insert(number, Arc::new(handle));
        Ok(number)
    }

    /// The handle of this number, if it was opened from `nodeid`.
    pub(super) fn get(&self, number: u64, nodeid: u64) -> Result<Arc<Handle>, Errno> {
        let handle = lock(&self.state).open.get(&number).cloned();
        handle.filter(|h| h.nodeid == nodeid).ok_or(Errno::BADF)
    }

    /// Forgets a handle.
    pub(super) fn remove(&self, number: u64) {
        let handle = lock(&self.state).open.remove(&number);
        // Closing may take its time on some file systems: not under the lock.
        drop(handle);
    }

    /// Closes what can't be reached any more, or not for writing, since a share was taken away.
    pub(super) fn close_unreachable(&self) {
        let mut state = lock(&self.state);
        let gone = |handle: &Handle| match handle.writes {
            true => !handle.inode.is_writable(),
            false => !handle.inode.is_live(),
        };
        let gone: Vec<_> = state.open.extract_if(|_, handle| gone(handle)).collect();
        drop(state);
        // Closing may take its time.
        drop(gone);
    }

    /// Forgets all.
    pub(super) fn clear(&self) {
        let open = std::mem::take(&mut lock(&self.state).open);
        drop(open);
    }
}
