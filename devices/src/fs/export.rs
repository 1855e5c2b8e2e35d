//! A tree of the host that is served to the guest: one for each place that is shared, and one for all
//! places that lie within each other.

use super::inodes::FileSystem;
use super::origin::Origin;
use super::shares::ShareOptions;
use crate::sys;
use koya_host::sync::lock;
use rustix::fs::{FileType, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Of how many file systems below it an export remembers one file, a descriptor each. Data of further
/// ones is the host's to write out in its own time.
const MAX_NESTED: usize = 64;

/// What an export holds open.
struct Held {
    /// Its root, an O_PATH descriptor.
    root: Arc<OwnedFd>,
    /// A descriptor on the same mount that is not O_PATH, for what needs one (file handles,
    /// syncfs); none if it is a single file.
    anchor: Option<Arc<OwnedFd>>,
    /// Other file systems that the guest came to below it: an O_PATH descriptor on each.
    nested: HashMap<FileSystem, Arc<OwnedFd>>,
}

/// A host directory, or a single file, with all that is mounted below it.
///
/// Where the host lets us (CAP_SYS_ADMIN) it is a detached copy of the mounts, which nothing can leave
/// and nothing of the host's own can change.
pub(super) struct Export {
    /// Tells its directories from the same directories in another export.
    pub(super) view: u64,
    /// The mount that its root is on.
    pub(super) mount_id: u64,
    /// Mounts of exports that were made a part of this one, and where those parts are now.
    adopted: Mutex<HashMap<u64, u64>>,
    pub(super) kind: FileType,
    /// Whether the host's mounts that come later show in it.
    pub(super) follows_mounts: bool,
    detached: bool,
    /// Whether anything is mounted below it.
    has_submounts: bool,
    /// Whether its mounts are read-only beyond what they are on the host.
    sealed: Mutex<bool>,
    /// Nothing once it is given up: the guest may remember its nodes for ever.
    held: Mutex<Option<Held>>,
}

impl Export {
    /// Exports what `plain` refers to, on the host's own mount; with [`ShareOptions::read_only`] nothing can be
    /// written through it at all until it is [`unsealed`](Self::unseal).
    pub(super) fn new(
        plain: OwnedFd,
        options: ShareOptions,
        origin: Option<&Origin>,
    ) -> io::Result<Self> {
        let (root, detached) = match options.follow_mounts {
            true => (plain, false),
            false => detach(plain, options.read_only)?,
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let anchor = openat(&root, ".", flags, Mode::empty()).ok().map(Arc::new);
        let stat = super::inodes::stat(&root)?;
        // Than it is on the host.
        let is_more_read_only =
            origin.is_none_or(|origin| !origin.on_read_only_mount() || origin.has_submounts());
        static VIEW: AtomicU64 = AtomicU64::new(1);
        Ok(Self {
            view: VIEW.fetch_add(1, Ordering::Relaxed),
            mount_id: stat.stx_mnt_id,
            adopted: Mutex::default(),
            kind: FileType::from_raw_mode(stat.stx_mode.into()),
            follows_mounts: options.follow_mounts,
            detached,
            has_submounts: origin.is_some_and(Origin::has_submounts),
            sealed: Mutex::new(detached && options.read_only && is_more_read_only),
            held: Mutex::new(Some(Held {
                root: Arc::new(root),
                anchor,
                nested: HashMap::new(),
            })),
        })
    }

    /// Lets writes through, as far as the host itself does: who may write where is then for the server alone
    /// to say. False if that can't be: of a detached tree only the topmost mount can be changed, and what
    /// of it the host has read-only would be lost.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn unseal(&self) -> io::Result<bool> {
        let mut sealed = lock(&self.sealed);
        if *sealed && self.has_submounts {
            return Ok(false);
        }
        if *sealed && let Some(root) = self.root() {
            sys::make_mount_writable(root.as_fd())?;
        }
        *sealed = false;
        Ok(true)
    }

    /// Tells mounts within it apart; 0 is its own.
    pub(super) fn mount_key(&self, mount: u64) -> u64 {
        let mount = self.adopted(mount).unwrap_or(mount);
        if mount == self.mount_id { 0 } else { mount }
    }

    /// Where what was found on a mount is now, if that is another one.
    pub(super) fn adopted(&self, mount: u64) -> Option<u64> {
        lock(&self.adopted).get(&mount).copied()
    }

    /// What was looked at through another mount is on this one now.
    pub(super) fn adopt_mount(&self, before: u64, now: u64) {
        lock(&self.adopted).insert(before, now);
    }

    /// Its root, an O_PATH descriptor, while it is there.
    pub(super) fn root(&self) -> Option<Arc<OwnedFd>> {
        lock(&self.held).as_ref().map(|held| held.root.clone())
    }

    /// A descriptor on its mount, if it is a directory.
    pub(super) fn anchor(&self) -> Option<Arc<OwnedFd>> {
        lock(&self.held)
            .as_ref()
            .and_then(|held| held.anchor.clone())
    }

    /// Closes all that it holds.
    pub(super) fn close(&self) {
        lock(&self.held).take();
    }

    /// Remembers another file system below it, for [`nested`](Self::nested).
    pub(super) fn add_nested(&self, which: FileSystem, kind: FileType, fd: &Arc<OwnedFd>) {
        // To open anything else could have effects, or wait. What the host mounted meanwhile it may
        // want to unmount.
        if matches!(kind, FileType::Directory | FileType::RegularFile)
            && !self.follows_mounts
            && let Some(held) = &mut *lock(&self.held)
            && held.nested.len() < MAX_NESTED
            && !held.nested.contains_key(&which)
            && let Ok(fd) = fd.try_clone()
        {
            held.nested.insert(which, Arc::new(fd));
        }
    }

    /// Forgets them: the guest is gone.
    pub(super) fn forget_nested(&self) {
        if let Some(held) = &mut *lock(&self.held) {
            held.nested.clear();
        }
    }

    /// A file or directory of each other file system that the guest came to below it.
    pub(super) fn nested(&self) -> Vec<Arc<OwnedFd>> {
        let held = lock(&self.held);
        let nested = held.iter().flat_map(|held| held.nested.values());
        nested.cloned().collect()
    }

    /// Whether it has mounts of its own, which nothing can leave.
    pub(super) fn is_detached(&self) -> bool {
        self.detached
    }
}

/// A copy of the mounts at `plain`, and whether it is one.
fn detach(plain: OwnedFd, read_only: bool) -> io::Result<(OwnedFd, bool)> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    match open_tree(&plain, c"", flags) {
        Ok(tree) => match sys::restrict_mount(tree.as_fd(), read_only) {
            Ok(()) => Ok((tree, true)),
            // Before Linux 5.12 the server alone holds what is read-only.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => match read_only {
                true => Ok((plain, false)),
                false => Ok((tree, true)),
            },
            Err(error) => Err(error),
        },
        // Without the privilege (or the call) the directory itself has to do.
        Err(Errno::PERM | Errno::NOSYS | Errno::INVAL) => Ok((plain, false)),
        Err(error) => Err(error.into()),
    }
}
