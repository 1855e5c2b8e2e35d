//! Updates nodes when shares are added, removed and merged.

use super::export::Export;
use super::inodes::{Inodes, Tables};
use super::node::{
    Found, Identity, Inode, Reach, Slot, cached_stat, contains_share, move_to, stat, union,
};
use super::shares::{Move, Share};
use super::wire::ROOT_ID;
use koya_host::sync::lock;
use rustix::fs::{FileType, Statx};
use rustix::io::Errno;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Inodes {
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

impl Tables {
    /// The shares through which a file found there can be reached; never empty.
    pub(super) fn reach(&self, stat: &Statx, found: Found<'_>) -> Result<Reach, Errno> {
        let mut reach: Reach = match found {
            Found::Root(share) => Arc::new([share.clone()]),
            Found::In(directory) => directory.reach(),
        };
        if reach.iter().any(|share| share.is_removed()) {
            let live = reach.iter().filter(|share| !share.is_removed());
            reach = live.cloned().collect();
        }
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

    /// Updates the shares of a file that moved to another directory: those of the old directory are removed,
    /// those of the new one are added. A file that has yet another location keeps both.
    pub(super) fn change_reach(&mut self, inode: &Inode, from: &Reach, to: &Reach) {
        if Arc::ptr_eq(from, to) {
            return;
        }
        if inode.kind != FileType::Directory {
            inode.extend_reach(to);
            return;
        }
        for inode in self.below(inode.id) {
            let before = inode.reach();
            let kept = before
                .iter()
                .filter(|share| !contains_share(from, share))
                .cloned();
            let kept: Reach = kept.collect();
            match inode.kind {
                FileType::Directory => inode.set_reach(&union(&kept, to)),
                _ => inode.extend_reach(to),
            };
        }
    }

    /// The node and all nodes below it.
    pub(super) fn below(&self, top: u64) -> Vec<Arc<Inode>> {
        let mut known = HashMap::from([(top, true), (ROOT_ID, false)]);
        let top_shares = self.by_id.get(&top).map(|entry| entry.identity);
        let top_shares = top_shares.and_then(|identity| self.roots.get(&identity));
        // The roots of shares within it may have been found only by their own names.
        for (identity, shares) in &self.roots {
            let is_within = |share: &Arc<Share>| {
                let mut above = top_shares.into_iter().flatten();
                above.any(|top| share.below(top).is_some())
            };
            if shares.iter().any(is_within)
                && let Some(id) = self.by_identity.get(identity)
            {
                known.insert(*id, true);
            }
        }
        let mut way = Vec::new();
        for id in self.by_id.keys() {
            let mut last = *id;
            let answer = loop {
                if let Some(answer) = known.get(&last) {
                    break *answer;
                }
                // Cycles and forgotten nodes end the search.
                known.insert(last, false);
                way.push(last);
                match self.by_id.get(&last) {
                    Some(entry) => last = lock(&entry.inode.location).0,
                    None => break false,
                }
            };
            known.extend(way.drain(..).map(|id| (id, answer)));
        }
        let below = self.by_id.values().map(|entry| entry.inode.clone());
        below
            .filter(|inode| known.get(&inode.id) == Some(&true))
            .collect()
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
