//! A directory tree of the host that is exported to the guest: one for each shared path, or one for several
//! shared paths that contain each other.

use super::inodes::FileSystem;
use super::origin::Origin;
use super::shares::ShareOptions;
use super::users::MappedUsers;
use crate::sys;
use koya_host::sync::lock;
use rustix::fs::{FileType, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Maximum number of file systems below an export of which a file is kept open, one descriptor each. The host
/// writes out data of further ones in its own time.
const MAX_NESTED: usize = 64;

/// The descriptors that an export keeps open.
struct Descriptors {
    /// The root, an O_PATH descriptor.
    root: Arc<OwnedFd>,
    /// A descriptor on the same mount that is not O_PATH, for system calls that need one (file handles,
    /// syncfs); `None` for a single file.
    anchor: Option<Arc<OwnedFd>>,
    /// Other file systems that the guest has reached below it: an O_PATH descriptor on each.
    nested: HashMap<FileSystem, Arc<OwnedFd>>,
}

/// A host directory, or a single file, with everything that is mounted below it.
///
/// If the host permits it (CAP_SYS_ADMIN), this is a detached copy of the mounts, which cannot be left and
/// is not affected by later mount changes on the host.
pub(super) struct Export {
    /// Distinguishes its directories from the same directories in another export.
    pub(super) view: u64,
    /// The mount of its root.
    pub(super) mount_id: u64,
    /// Mounts of exports merged into this one, and the mounts of those parts now.
    adopted: Mutex<HashMap<u64, u64>>,
    pub(super) kind: FileType,
    /// Whether its files have other owners in the guest than on the host.
    users: Option<Arc<MappedUsers>>,
    /// Whether later mounts on the host appear in it.
    pub(super) follows_mounts: bool,
    detached: bool,
    /// Whether anything is mounted below it.
    has_submounts: bool,
    /// Whether its mounts are read-only although they are writable on the host.
    sealed: Mutex<bool>,
    /// `None` once closed: the guest may remember its nodes forever.
    descriptors: Mutex<Option<Descriptors>>,
}

impl Export {
    /// Exports the file of `plain`, a descriptor on the host's own mount. With [`ShareOptions::read_only`]
    /// nothing can be written through it until it is [`unsealed`](Self::unseal).
    pub(super) fn new(
        plain: OwnedFd,
        options: ShareOptions,
        origin: Option<&Origin>,
    ) -> io::Result<Self> {
        let (root, detached) = match options.follow_mounts {
            true => (plain, false),
            false => detach(plain, options)?,
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let anchor = openat(&root, ".", flags, Mode::empty()).ok().map(Arc::new);
        let stat = super::inodes::stat(&root)?;
        // Compared with the host.
        let is_more_read_only =
            origin.is_none_or(|origin| !origin.on_read_only_mount() || origin.has_submounts());
        static VIEW: AtomicU64 = AtomicU64::new(1);
        Ok(Self {
            view: VIEW.fetch_add(1, Ordering::Relaxed),
            mount_id: stat.stx_mnt_id,
            adopted: Mutex::default(),
            kind: FileType::from_raw_mode(stat.stx_mode.into()),
            users: None,
            follows_mounts: options.follow_mounts,
            detached,
            has_submounts: origin.is_some_and(Origin::has_submounts),
            sealed: Mutex::new(detached && options.read_only && is_more_read_only),
            descriptors: Mutex::new(Some(Descriptors {
                root: Arc::new(root),
                anchor,
                nested: HashMap::new(),
            })),
        })
    }

    /// The same with other owners than on the host.
    pub(super) fn with_users(self, users: MappedUsers) -> Self {
        let users = Some(Arc::new(users));
        Self { users, ..self }
    }

    /// Whether files have other owners than on the host.
    pub(super) fn maps_users(&self) -> bool {
        self.users.is_some()
    }

    /// The owners of files on one of its mounts.
    pub(super) fn users_on(&self, mount: u64) -> Option<Arc<MappedUsers>> {
        let applies = |users: &&Arc<MappedUsers>| users.recursive || self.mount_key(mount) == 0;
        self.users.as_ref().filter(applies).cloned()
    }

    /// Permits writes as far as the host does; from then on only the server enforces read-only shares. False if
    /// that is impossible: of a detached tree only the topmost mount can be changed, and mounts that are
    /// read-only on the host would become writable.
    ///
    /// # Errors
    /// The error from the host.
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

    /// Identifies a mount within the export; 0 is the export's own mount.
    pub(super) fn mount_key(&self, mount: u64) -> u64 {
        let mount = self.adopted(mount).unwrap_or(mount);
        if mount == self.mount_id { 0 } else { mount }
    }

    /// The mount that replaces a mount of a merged export, if there is one.
    pub(super) fn adopted(&self, mount: u64) -> Option<u64> {
        lock(&self.adopted).get(&mount).copied()
    }

    /// Records that files found on mount `before` are now on mount `now`.
    pub(super) fn adopt_mount(&self, before: u64, now: u64) {
        lock(&self.adopted).insert(before, now);
    }

    /// Its root, an O_PATH descriptor, until it is closed.
    pub(super) fn root(&self) -> Option<Arc<OwnedFd>> {
        lock(&self.descriptors)
            .as_ref()
            .map(|descriptors| descriptors.root.clone())
    }

    /// A descriptor on its mount, if it is a directory.
    pub(super) fn anchor(&self) -> Option<Arc<OwnedFd>> {
        lock(&self.descriptors)
            .as_ref()
            .and_then(|descriptors| descriptors.anchor.clone())
    }

    /// Closes all descriptors.
    pub(super) fn close(&self) {
        lock(&self.descriptors).take();
    }

    /// Keeps a file of another file system below it open, for [`nested`](Self::nested).
    pub(super) fn add_nested(&self, which: FileSystem, kind: FileType, fd: &Arc<OwnedFd>) {
        // Opening any other kind of file could block or have effects. Later mounts of the host are not kept,
        // since the host may want to unmount them.
        if matches!(kind, FileType::Directory | FileType::RegularFile)
            && !self.follows_mounts
            && let Some(descriptors) = &mut *lock(&self.descriptors)
            && descriptors.nested.len() < MAX_NESTED
            && !descriptors.nested.contains_key(&which)
            && let Ok(fd) = fd.try_clone()
        {
            descriptors.nested.insert(which, Arc::new(fd));
        }
    }

    /// Closes these files when the guest is gone.
    pub(super) fn forget_nested(&self) {
        if let Some(descriptors) = &mut *lock(&self.descriptors) {
            descriptors.nested.clear();
        }
    }

    /// A file or directory on each other file system that the guest has reached below it.
    pub(super) fn nested(&self) -> Vec<Arc<OwnedFd>> {
        let descriptors = lock(&self.descriptors);
        let nested = descriptors
            .iter()
            .flat_map(|descriptors| descriptors.nested.values());
        nested.cloned().collect()
    }

    /// Whether it is a detached copy of the mounts, which cannot be left.
    pub(super) fn is_detached(&self) -> bool {
        self.detached
    }
}

/// Gives a detached copy of mounts on the host the properties of a share with these options, for tools of the host that use
/// the files of a container.
///
/// # Errors
/// The error from mount_setattr(2).
pub fn protect_mount(mount: BorrowedFd<'_>, options: &ShareOptions) -> io::Result<()> {
    sys::protect_mount(mount, options.read_only, options.follow_mounts)
}

/// Copies the mounts at `plain`; returns whether that was possible.
fn detach(plain: OwnedFd, options: ShareOptions) -> io::Result<(OwnedFd, bool)> {
    let read_only = options.read_only;
    let topmost = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let whole = || open_tree(&plain, c"", topmost | OpenTreeFlags::AT_RECURSIVE);
    let copied = match options.omit_mounts {
        // In a user namespace the host's mounts can't be told apart from what they cover.
        true => open_tree(&plain, c"", topmost).or_else(|error| {
            log::warn!("virtio-fs: mounts below a shared directory can't be left out: {error}");
            whole()
        }),
        false => whole(),
    };
    match copied {
        Ok(tree) => match sys::restrict_mount(tree.as_fd(), read_only) {
            Ok(()) => Ok((tree, true)),
            // Before Linux 5.12 only the server enforces read-only shares.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => match read_only {
                true => Ok((plain, false)),
                false => Ok((tree, true)),
            },
            Err(error) => Err(error),
        },
        // Without the privilege (or the system call), uses the directory itself.
        Err(Errno::PERM | Errno::NOSYS | Errno::INVAL) => Ok((plain, false)),
        Err(error) => Err(error.into()),
    }
}
