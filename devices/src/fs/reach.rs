//! Updates nodes when shares are added, removed and merged.

use super::export::Export;
use super::inodes::{Entry, Inodes, Tables};
use super::node::{
    Found, Identity, Inode, Reach, Slot, cached_stat, contains_share, move_to, same_shares, stat,
    union,
};
use super::shares::{Move, Share};
use super::wire::ROOT_ID;
use koya_host::sync::lock;
use rustix::fs::{FileType, Statx};
use rustix::io::Errno;
use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Number of nodes whose shares are changed before other threads get their turn.
const CHANGED_AT_ONCE: usize = 1024;

/// Maximum number of nodes that are removed together.
const MAX_REMOVED: usize = 64;

/// A directory whose shares have changed, and the next node in it whose shares have to be changed.
struct Changed {
    directory: u64,
    next: u64,
}

impl Changed {
    fn new(directory: u64) -> Self {
        Self { directory, next: 0 }
    }
}

impl Inodes {
    /// Updates the location of a moved file, and the shares through which it and everything below it is
    /// reached.
    pub(super) fn moved(&self, identity: Identity, links: u32, to: &Inode, name: &CStr) {
        // The shares of everything below a directory are those of one location.
        let _moves = lock(&self.moves);
        let mut tables = lock(&self.tables);
        let id = tables.by_identity.get(&identity).copied();
        let entry = id.and_then(|id| tables.by_id.get(&id));
        let Some(inode) = entry.map(|entry| entry.inode.clone()) else {
            return;
        };
        inode.has_links.store(
            links > 1 && inode.kind != FileType::Directory,
            Ordering::Relaxed,
        );
        tables.place(&inode, to.id, name);
        // The guest may have forgotten its new directory meanwhile, whose shares would not be updated any more.
        let reach: Reach = match tables.by_id.contains_key(&to.id) {
            true => live(to.reach()),
            false => Arc::new([]),
        };
        let before = inode.reach();
        let mut changed = Vec::new();
        if tables.change_reach(&inode, &reach) {
            changed.push(Changed::new(inode.id));
            tables.change_roots(&inode, &before, &mut changed);
        }
        drop(tables);
        self.change_all(changed);
    }

    /// Updates the shares of everything below a directory that was found to have others.
    pub(super) fn changed(&self, directory: u64) {
        let _moves = lock(&self.moves);
        self.change_all(vec![Changed::new(directory)]);
    }

    fn change_all(&self, mut changed: Vec<Changed>) {
        while !changed.is_empty() {
            lock(&self.tables).change_below(&mut changed, CHANGED_AT_ONCE);
            std::thread::yield_now();
        }
    }

    /// Adds a share to the nodes below its root.
    pub(super) fn share_added(&self, share: &Arc<Share>) {
        let Some(Ok(stat)) = share.root().map(stat) else {
            return;
        };
        if share.kind != FileType::Directory {
            return;
        }
        let mut tables = lock(&self.tables);
        let identity = Identity::of(&stat, &share.export());
        let roots = tables.roots.entry(identity).or_default();
        roots.push(share.clone());
        let Some(top) = tables.by_identity.get(&identity).copied() else {
            return;
        };
        if let Some(entry) = tables.by_id.get(&top) {
            entry.inode.is_root.store(true, Ordering::Relaxed);
        }
        let reach: Reach = Arc::new([share.clone()]);
        for inode in tables.below(top) {
            if inode.extend_reach(&reach) {
                tables.reopen_in(&inode, &share.export());
            }
        }
    }

    /// Closes nodes that were reached only through removed shares.
    pub(super) fn shares_removed(&self, removed: &[Arc<Share>]) {
        let mut closed = Vec::new();
        let mut tables = lock(&self.tables);
        let stays = |share: &Arc<Share>| !removed.iter().any(|gone| Arc::ptr_eq(gone, share));
        tables.roots.retain(|_, shares| {
            shares.retain(stays);
            !shares.is_empty()
        });
        // Most nodes have the same shares as their directory, and continue to share one list.
        let mut known: HashMap<*const Arc<Share>, (Reach, Reach)> = HashMap::new();
        let inodes: Vec<_> = tables.by_id.values().map(|e| e.inode.clone()).collect();
        for inode in inodes {
            let mut reach = lock(&inode.reach);
            // Keeping the first list alive prevents reuse of its address.
            let (_, rest) = known.entry(reach.as_ptr()).or_insert_with(|| {
                let rest = match reach.iter().all(stays) {
                    true => reach.clone(),
                    false => reach.iter().filter(|share| stays(share)).cloned().collect(),
                };
                (reach.clone(), rest)
            });
            if rest.is_empty() {
                drop(reach);
                closed.push(tables.close(&inode));
            } else {
                *reach = rest.clone();
            }
        }
        // Closed nodes cannot be evicted any more.
        tables.tidy_recent();
        drop(tables);
        drop(closed);
    }

    /// Merges an export into another, which the new share `within` belongs to: known nodes keep their IDs and
    /// are reached through the mounts of the other export from now on. `apply` moves the shares.
    pub(super) fn merged(&self, within: &Arc<Share>, moves: &[Move], apply: &dyn Fn()) {
        let mut tables = lock(&self.tables);
        let reach: Reach = Arc::new([within.clone()]);
        let way = |inode: &Inode| {
            let reach = inode.reach();
            moves.iter().find(|one| contains_share(&reach, &one.share))
        };
        let inodes = tables.by_id.values().map(|entry| entry.inode.clone());
        let moving: Vec<_> = inodes
            .filter_map(|inode| Some((way(&inode)?, inode)))
            .collect();
        apply();
        let into = within.export();
        for (one, inode) in &moving {
            inode.extend_reach(&reach);
            tables.rekey(inode, &into, one.mount);
            // The root gets its new descriptor below: it may have no other location to be found at.
            if !inode.is_root.load(Ordering::Relaxed) && move_to(inode, one.mount) {
                tables.open = tables.open.saturating_sub(1);
            }
        }
        for one in moves {
            let Ok(stat) = cached_stat(&*one.root) else {
                continue;
            };
            let identity = Identity::of(&stat, &into);
            if one.share.kind == FileType::Directory {
                tables.move_root(&one.share, identity);
            }
            if let Some(id) = tables.by_identity.get(&identity).copied()
                && let Some(inode) = tables.by_id.get(&id).map(|entry| entry.inode.clone())
                && let Ok(fd) = one.root.try_clone()
            {
                tables.found_again(&inode, fd, usize::MAX, true);
            }
        }
        tables.tidy_recent();
    }
}

/// The shares that were not removed.
fn live(reach: Reach) -> Reach {
    match reach.iter().any(|share| share.is_removed()) {
        true => union(&reach, &[]),
        false => reach,
    }
}

impl Tables {
    /// The shares through which a file found there can be reached; never empty.
    pub(super) fn reach(&self, stat: &Statx, found: Found<'_>) -> Result<Reach, Errno> {
        let mut reach: Reach = match found {
            Found::Root(share) => Arc::new([share.clone()]),
            Found::In(directory) => directory.reach(),
        };
        reach = live(reach);
        let first = reach.first().ok_or(Errno::STALE)?;
        if FileType::from_raw_mode(stat.stx_mode.into()) != FileType::Directory {
            return Ok(reach);
        }
        match self.roots.get(&Identity::of(stat, &first.export())) {
            Some(own) if !own.iter().all(|share| contains_share(&reach, share)) => {
                Ok(union(&reach, own))
            }
            _ => Ok(reach),
        }
    }

    /// Changes the location of a node.
    pub(super) fn place(&mut self, inode: &Inode, directory: u64, name: &CStr) {
        let now = (directory, name.to_owned());
        let (before, _) = std::mem::replace(&mut *lock(&inode.location), now);
        if before == directory {
            return;
        }
        self.children.remove(&(before, inode.id));
        self.children.insert((directory, inode.id));
        // It may have been kept for this node.
        if self.by_id.get(&before).is_some_and(|e| e.lookups == 0) {
            self.leaving.push(before);
        }
    }

    /// Removes some of the nodes that are not needed any more. Drop them only after these tables are unlocked.
    #[must_use]
    pub(super) fn remove_leaving(&mut self) -> Vec<Entry> {
        let mut removed = Vec::new();
        for _ in 0..MAX_REMOVED {
            let Some(id) = self.leaving.pop() else {
                break;
            };
            let is_used = self.by_id.get(&id).is_some_and(|e| e.lookups > 0);
            if is_used || self.children_of(id).next().is_some() {
                continue;
            }
            let Some(entry) = self.by_id.remove(&id) else {
                continue;
            };
            // A newer node may have taken over the identity.
            if self.by_identity.get(&entry.identity) == Some(&id) {
                self.by_identity.remove(&entry.identity);
            }
            if matches!(*lock(&entry.inode.slot), Slot::Open(_)) {
                self.open = self.open.saturating_sub(1);
            }
            let directory = lock(&entry.inode.location).0;
            self.children.remove(&(directory, id));
            if self.by_id.get(&directory).is_some_and(|e| e.lookups == 0) {
                self.leaving.push(directory);
            }
            removed.push(entry);
        }
        removed
    }

    fn children_of(&self, directory: u64) -> impl Iterator<Item = u64> + '_ {
        let children = self.children.range((directory, 0)..=(directory, u64::MAX));
        children.map(|(_, child)| *child)
    }

    /// Updates the shares of a node in a directory with these shares. True if those of the nodes in it have to be updated
    /// too.
    fn change_reach(&self, inode: &Inode, directory: &Reach) -> bool {
        let before = inode.reach();
        let now = match inode.kind {
            FileType::Directory => {
                let identity = self.by_id.get(&inode.id).map(|entry| entry.identity);
                match identity.and_then(|identity| self.roots.get(&identity)) {
                    Some(own) if !own.iter().all(|share| contains_share(directory, share)) => {
                        union(directory, own)
                    }
                    _ => directory.clone(),
                }
            }
            // It may have another location.
            _ if inode.has_links.load(Ordering::Relaxed) => union(&before, directory),
            _ => {
                let exports: Vec<_> = directory.iter().map(|share| share.export()).collect();
                // A share of the file itself, or of the same directory in another export.
                let stays = |share: &&Arc<Share>| {
                    let export = share.export();
                    let is_same = |other: &Arc<Export>| Arc::ptr_eq(other, &export);
                    share.kind != FileType::Directory
                        || !exports.is_empty() && !exports.iter().any(is_same)
                };
                let others: Vec<_> = before.iter().filter(stays).cloned().collect();
                match others.is_empty() {
                    true => directory.clone(),
                    false => union(directory, &others),
                }
            }
        };
        if same_shares(&before, &now) {
            return false;
        }
        inode.set_reach(&now);
        inode.kind == FileType::Directory
    }

    /// Updates the shares of roots of shares within a moved one that were found only by their own names.
    fn change_roots(&self, top: &Inode, before: &Reach, changed: &mut Vec<Changed>) {
        let now = top.reach();
        for id in self.roots_within(top.id) {
            let Some(inode) = self.by_id.get(&id).map(|entry| &entry.inode) else {
                continue;
            };
            if id == top.id || lock(&inode.location).0 != ROOT_ID {
                continue;
            }
            let own = inode.reach();
            let stays =
                |share: &&Arc<Share>| !contains_share(before, share) || contains_share(&now, share);
            let kept: Vec<_> = own.iter().filter(stays).cloned().collect();
            inode.set_reach(&union(&kept, &now));
            changed.push(Changed::new(id));
        }
    }

    /// Updates the shares of up to `most` nodes in these directories, which have others now, and below them.
    fn change_below(&self, changed: &mut Vec<Changed>, most: usize) {
        for _ in 0..most {
            let Some(Changed { directory, next }) = changed.last_mut() else {
                return;
            };
            let directory = *directory;
            let left = (directory, *next)..=(directory, u64::MAX);
            let child = self.children.range(left).next().map(|(_, child)| *child);
            let (Some(child), Some(above)) = (child, self.by_id.get(&directory)) else {
                changed.pop();
                continue;
            };
            *next = child + 1;
            if let Some(entry) = self.by_id.get(&child)
                && self.change_reach(&entry.inode, &above.inode.reach())
            {
                changed.push(Changed::new(child));
            }
        }
    }

    /// The node and all nodes below it.
    pub(super) fn below(&self, top: u64) -> Vec<Arc<Inode>> {
        let mut left = self.roots_within(top);
        left.push(top);
        let mut known: HashSet<u64> = left.iter().copied().collect();
        left = known.iter().copied().collect();
        let mut below = Vec::new();
        while let Some(id) = left.pop() {
            below.extend(self.by_id.get(&id).map(|entry| entry.inode.clone()));
            left.extend(self.children_of(id).filter(|child| known.insert(*child)));
        }
        below
    }

    /// The roots of shares within the share that this node is the root of: they may have been found only by their own names.
    fn roots_within(&self, top: u64) -> Vec<u64> {
        let top = self.by_id.get(&top).map(|entry| entry.identity);
        let Some(outer) = top.and_then(|identity| self.roots.get(&identity)) else {
            return Vec::new();
        };
        let is_within = |share: &Arc<Share>| outer.iter().any(|outer| share.below(outer).is_some());
        let within = self.roots.iter();
        let within = within.filter(|(_, shares)| shares.iter().any(is_within));
        let nodes = within.filter_map(|(identity, _)| self.by_identity.get(identity));
        nodes.copied().collect()
    }

    /// Reopens a file that may be written through this export if its descriptor is on a read-only mount of
    /// another one.
    fn reopen_in(&mut self, inode: &Inode, export: &Arc<Export>) {
        let mount = match &*lock(&inode.slot) {
            Slot::Open(fd) => cached_stat(&**fd).map(|stat| stat.stx_mnt_id),
            _ => return,
        };
        let is_there = |other: &Arc<Export>| {
            !Arc::ptr_eq(other, export) && mount.is_ok_and(|mount| other.mount_id == mount)
        };
        if inode.exports().iter().any(is_there) && move_to(inode, export.mount_id) {
            self.open = self.open.saturating_sub(1);
        }
    }

    /// Changes the identity of a directory that is now in another export.
    fn rekey(&mut self, inode: &Inode, into: &Export, mount: u64) {
        if inode.kind != FileType::Directory {
            return;
        }
        let Some(entry) = self.by_id.get_mut(&inode.id) else {
            return;
        };
        let before = entry.identity;
        entry.identity.view = into.view;
        entry.identity.mount = into.mount_key(mount);
        let now = entry.identity;
        if self.by_identity.get(&before) == Some(&inode.id) {
            self.by_identity.remove(&before);
            self.by_identity.entry(now).or_insert(inode.id);
        }
    }

    /// Changes the identity of a share's root.
    fn move_root(&mut self, share: &Arc<Share>, identity: Identity) {
        self.roots.retain(|_, shares| {
            shares.retain(|other| !Arc::ptr_eq(other, share));
            !shares.is_empty()
        });
        self.roots.entry(identity).or_default().push(share.clone());
    }
}
