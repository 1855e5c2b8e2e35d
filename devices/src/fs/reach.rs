//! What shares that come, go and merge mean for the nodes that the guest knows.

use super::export::Export;
use super::inodes::{Inodes, Tables};
use super::node::{Found, Identity, Inode, Reach, move_to, stat};
use super::shares::Share;
use super::wire::ROOT_ID;
use crate::sync::lock;
use rustix::fs::{FileType, Statx};
use rustix::io::Errno;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

impl Inodes {
    /// Another share leads to what is below its root.
    pub(super) fn share_added(&self, share: &Arc<Share>) {
        let root = share.root().map(stat);
        let Some(Ok(stat)) = root else {
            return;
        };
        if share.kind != FileType::Directory {
            return;
        }
        let mut tables = lock(&self.tables);
        let identity = Identity::of(&stat, &share.export());
        tables
            .roots
            .entry(identity)
            .or_default()
            .push(share.clone());
        if let Some(top) = tables.by_identity.get(&identity) {
            let reach: Reach = Arc::new([share.clone()]);
            for inode in tables.below(*top) {
                inode.extend_reach(&reach);
            }
        }
    }

    /// Closes what is known only by a share that was taken away.
    pub(super) fn share_removed(&self, share: &Share) {
        let mut tables = lock(&self.tables);
        let is_other = |other: &Arc<Share>| other.number != share.number;
        tables.roots.retain(|_, shares| {
            shares.retain(is_other);
            !shares.is_empty()
        });
        let inodes: Vec<_> = tables.by_id.values().map(|e| e.inode.clone()).collect();
        for inode in inodes {
            let mut reach = lock(&inode.reach);
            if reach.iter().all(is_other) {
                continue;
            }
            let rest: Reach = reach.iter().filter(|s| is_other(s)).cloned().collect();
            let is_gone = rest.is_empty();
            if !is_gone {
                *reach = rest;
            }
            drop(reach);
            if is_gone {
                tables.close(&inode);
            }
        }
        // Nothing of these can be evicted any more.
        tables.tidy_recent();
    }

    /// An export becomes a part of another, which a new share of that one leads to: what the guest
    /// knows of it stays what it is, and is reached through the other's mounts from now on. `roots` are
    /// its shares with their descriptors there, and `apply` tells them.
    pub(super) fn merged(
        &self,
        within: &Arc<Share>,
        roots: &[(Arc<Share>, Arc<OwnedFd>)],
        apply: &dyn Fn(),
    ) {
        let mut tables = lock(&self.tables);
        let reach: Reach = Arc::new([within.clone()]);
        let is_own = |other: &Arc<Share>| roots.iter().any(|(share, _)| Arc::ptr_eq(share, other));
        let moving: Vec<_> = tables
            .by_id
            .values()
            .map(|entry| entry.inode.clone())
            .filter(|inode| inode.reach().iter().any(is_own))
            .collect();
        let before: Vec<_> = roots.iter().map(|(share, _)| share.export()).collect();
        apply();
        let into = within.export();
        let mounts: Vec<_> = roots
            .iter()
            .map(|(_, fd)| stat(fd).map(|s| s.stx_mnt_id))
            .collect();
        // They have no mounts of their own below them, so they are all on one.
        let Some(Ok(mount)) = mounts.first().copied() else {
            return;
        };
        for export in &before {
            into.adopt_mount(export.mount_id, mount);
        }
        for inode in &moving {
            inode.extend_reach(&reach);
            tables.rekey(inode, &into, mount);
            if move_to(inode, mount) {
                tables.open = tables.open.saturating_sub(1);
            }
        }
        for (share, fd) in roots {
            if let Ok(stat) = stat(fd) {
                let identity = Identity::of(&stat, &into);
                tables.move_root(share, identity);
                if let Some(id) = tables.by_identity.get(&identity).copied()
                    && let Some(inode) = tables.by_id.get(&id).map(|e| e.inode.clone())
                    && let Ok(fd) = fd.try_clone()
                {
                    tables.found_again(&inode, fd, usize::MAX, true);
                }
            }
        }
        tables.tidy_recent();
    }
}

impl Tables {
    /// The shares by which a file is reached that was found there: never none.
    pub(super) fn reach(&self, stat: &Statx, found: Found<'_>) -> Result<Reach, Errno> {
        let found: Reach = match found {
            Found::Root(share) => Arc::new([share.clone()]),
            Found::In(directory) => directory.reach(),
        };
        let mut reach = found;
        if reach.iter().any(|share| share.is_removed()) {
            let live = reach.iter().filter(|share| !share.is_removed());
            reach = live.cloned().collect();
        }
        let first = reach.first().ok_or(Errno::STALE)?;
        let is_directory = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory;
        if !is_directory {
            return Ok(reach);
        }
        let own = self.roots.get(&Identity::of(stat, &first.export()));
        let is_new = |share: &&Arc<Share>| !reach.iter().any(|known| Arc::ptr_eq(known, share));
        let more: Vec<_> = own.into_iter().flatten().filter(is_new).cloned().collect();
        match more.is_empty() {
            true => Ok(reach),
            false => Ok(reach.iter().cloned().chain(more).collect()),
        }
    }

    /// A directory is in another export now.
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

    /// A share's root has another identity now.
    fn move_root(&mut self, share: &Arc<Share>, identity: Identity) {
        self.roots.retain(|_, shares| {
            shares.retain(|other| !Arc::ptr_eq(other, share));
            !shares.is_empty()
        });
        self.roots.entry(identity).or_default().push(share.clone());
    }

    /// The nodes below this one, and itself.
    fn below(&self, top: u64) -> Vec<Arc<Inode>> {
        let mut known = HashMap::from([(top, true), (ROOT_ID, false)]);
        for id in self.by_id.keys() {
            let mut way = vec![*id];
            let answer = loop {
                let last = way[way.len() - 1];
                if let Some(answer) = known.get(&last) {
                    break *answer;
                }
                // A guest can't make a circle, but a forgotten parent ends the way.
                match self.by_id.get(&last) {
                    Some(entry) if way.len() < 4096 => way.push(lock(&entry.inode.place).0),
                    _ => break false,
                }
            };
            known.extend(way.into_iter().map(|id| (id, answer)));
        }
        let below = self.by_id.values().map(|entry| entry.inode.clone());
        below
            .filter(|inode| known.get(&inode.id) == Some(&true))
            .collect()
    }
}
