//! Open files and directories, by handle number.

use super::inodes::Inode;
use super::passthrough::Cookies;
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
    /// The inode, with the shares through which the file is reached.
    inode: Arc<Inode>,
    /// Whether it is open for writing.
    writes: bool,
    pub(super) file: File,
    /// Keeps the node's own descriptor open: the file may have lost its name before the node is used again.
    _node: Arc<OwnedFd>,
    /// Serializes reads of a directory, which share the descriptor's position.
    pub(super) position: Mutex<Position>,
}

/// Read position of a directory descriptor.
pub(super) struct Position {
    /// Before the entry with this cookie of the host, if that is known.
    pub(super) at: Option<u64>,
    /// The offset that the guest got with the last entry, and the host's cookie for it, which may be more exact.
    pub(super) last: (u64, u64),
    /// The kind of cookies of this directory, once it has been read.
    pub(super) cookies: Option<Cookies>,
    /// Whether all cookies so far were offsets for lseek(2), and there was one. Some file systems (NFS from some servers)
    /// use other cookies of all 64 bits: listings of their directories can only continue from the current position.
    pub(super) seeks: bool,
}

impl Default for Position {
    fn default() -> Self {
        Self {
            at: Some(0),
            last: (0, 0),
            cookies: None,
            seeks: false,
        }
    }
}

/// All handles of a guest.
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
    /// A table with at most `limit` handles.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            state: Mutex::default(),
        }
    }

    /// Adds an open file; ENFILE if the guest has reached its limit.
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

    /// The handle with this number, if it was opened from `nodeid`.
    pub(super) fn get(&self, number: u64, nodeid: u64) -> Result<Arc<Handle>, Errno> {
        let handle = lock(&self.state).open.get(&number).cloned();
        handle.filter(|h| h.nodeid == nodeid).ok_or(Errno::BADF)
    }

    /// Removes a handle.
    pub(super) fn remove(&self, number: u64) {
        let handle = lock(&self.state).open.remove(&number);
        // Not under the lock, because closing may be slow on some file systems.
        drop(handle);
    }

    /// Closes handles whose file is no longer reachable, or no longer writable, after a share was removed.
    pub(super) fn close_unreachable(&self) {
        let mut state = lock(&self.state);
        let gone = |handle: &Handle| match handle.writes {
            true => !handle.inode.is_writable(),
            false => !handle.inode.is_live(),
        };
        let gone: Vec<_> = state.open.extract_if(|_, handle| gone(handle)).collect();
        drop(state);
        // Closing may be slow.
        drop(gone);
    }

    /// Removes all handles.
    pub(super) fn clear(&self) {
        let open = std::mem::take(&mut lock(&self.state).open);
        drop(open);
    }
}
