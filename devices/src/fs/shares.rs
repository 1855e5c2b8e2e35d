//! The synthetic root: a directory that exists only here, whose entries are host directories (or
//! single files). They are added and removed while the guest runs, from any thread.

use super::inodes::FileSystem;
use crate::sync::lock;
use crate::sys;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, StatxFlags, openat, statx};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Of how many file systems below it a share remembers one file, a descriptor each. Data of further ones
/// is the host's to write out in its own time.
const MAX_NESTED: usize = 64;

/// What a share holds open.
struct Held {
    /// Its root, an O_PATH descriptor.
    root: Arc<OwnedFd>,
    /// A descriptor on the same mount that is not O_PATH, for what needs one (file handles,
    /// syncfs); none if the share is a single file.
    anchor: Option<Arc<OwnedFd>>,
    /// Other file systems that the guest came to below it: an O_PATH descriptor on each.
    nested: HashMap<FileSystem, Arc<OwnedFd>>,
}

/// One host directory or file under the synthetic root.
pub struct Share {
    /// Tells it from every other share there was.
    pub(super) number: u64,
    /// A directory's, or a single file's.
    pub(super) kind: FileType,
    /// Nothing once it is taken away: the guest may remember its nodes for ever.
    held: Mutex<Option<Held>>,
    pub(super) read_only: bool,
    pub(super) mount_id: u64,
    detached: bool,
    removed: AtomicBool,
}

impl Share {
    fn open(path: &Path, read_only: bool) -> io::Result<Self> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE;
        let (root, detached) = match open_tree(CWD, path, flags) {
            Ok(tree) => {
                if read_only {
                    sys::make_mount_read_only(tree.as_fd())?;
                }
                (tree, true)
            }
            // Without the privilege (or the call) the directory itself has to do.
            Err(Errno::PERM | Errno::NOSYS | Errno::INVAL) => {
                let flags = OFlags::PATH | OFlags::CLOEXEC;
                (openat(CWD, path, flags, Mode::empty())?, false)
            }
            Err(error) => return Err(error.into()),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let anchor = openat(&root, ".", flags, Mode::empty()).ok().map(Arc::new);
        let mask = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
        let stat = statx(&root, c"", AtFlags::EMPTY_PATH, mask)?;
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        Ok(Self {
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            kind: FileType::from_raw_mode(stat.stx_mode.into()),
            held: Mutex::new(Some(Held {
                root: Arc::new(root),
                anchor,
                nested: HashMap::new(),
            })),
            read_only,
            mount_id: stat.stx_mnt_id,
            detached,
            removed: AtomicBool::new(false),
        })
    }

    /// The share's root, an O_PATH descriptor, while it is there.
    pub(super) fn root(&self) -> Option<Arc<OwnedFd>> {
        lock(&self.held).as_ref().map(|held| held.root.clone())
    }

    /// A descriptor on the share's mount, if it is a directory.
    pub(super) fn anchor(&self) -> Option<Arc<OwnedFd>> {
        lock(&self.held)
            .as_ref()
            .and_then(|held| held.anchor.clone())
    }

    /// Remembers another file system below it, for [`nested`](Self::nested).
    pub(super) fn add_nested(&self, which: FileSystem, kind: FileType, fd: &Arc<OwnedFd>) {
        // To open anything else could have effects, or wait.
        if matches!(kind, FileType::Directory | FileType::RegularFile)
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

    /// Whether the owner has taken it away.
    pub(super) fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Relaxed)
    }

    /// Whether it is a mount of its own, which nothing can leave.
    pub fn is_detached(&self) -> bool {
        self.detached
    }
}

/// Called with each share that is taken away; nothing when the file system behind it is gone.
type Listener = Box<dyn Fn(&Share) -> Option<()> + Send + Sync>;

struct Inner {
    entries: Mutex<BTreeMap<String, Arc<Share>>>,
    changes: AtomicU64,
    listeners: Mutex<Vec<Listener>>,
}

/// The entries of the synthetic root. Cheap to clone; all clones are the same root.
#[derive(Clone)]
pub struct Shares(Arc<Inner>);

impl Default for Shares {
    fn default() -> Self {
        Self(Arc::new(Inner {
            entries: Mutex::default(),
            changes: AtomicU64::new(0),
            listeners: Mutex::default(),
        }))
    }
}

impl Shares {
    /// Puts the host's `path` under the root as `name`. The guest sees it at once.
    ///
    /// # Errors
    /// If the name is no single path component or is taken, or the host refuses the path.
    pub fn add(&self, name: &str, path: impl AsRef<Path>, read_only: bool) -> io::Result<()> {
        let proper = !name.is_empty()
            && name.len() <= super::wire::NAME_MAX
            && name != "."
            && name != ".."
            && !name.contains(['/', '\0']);
        if !proper {
            let text = format!("{name:?} can't name a share");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let share = Arc::new(Share::open(path.as_ref(), read_only)?);
        let mut entries = lock(&self.0.entries);
        if entries.contains_key(name) {
            let text = format!("a share {name:?} exists");
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        entries.insert(name.to_owned(), share);
        self.0.changes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// Takes an entry away. What the guest has open under it is closed and answers ESTALE from now
    /// on, whatever the guest does. False if there was none.
    pub fn remove(&self, name: &str) -> bool {
        let share = lock(&self.0.entries).remove(name);
        if let Some(share) = &share {
            share.removed.store(true, Ordering::Relaxed);
            lock(&share.held).take();
            self.0.changes.fetch_add(1, Ordering::SeqCst);
            lock(&self.0.listeners).retain(|listener| listener(share).is_some());
        }
        share.is_some()
    }

    pub(super) fn when_removed(
        &self,
        listener: impl Fn(&Share) -> Option<()> + Send + Sync + 'static,
    ) {
        lock(&self.0.listeners).push(Box::new(listener));
    }

    /// The share of this name.
    pub(super) fn get(&self, name: &[u8]) -> Option<Arc<Share>> {
        let name = std::str::from_utf8(name).ok()?;
        lock(&self.0.entries).get(name).cloned()
    }

    /// Every share's number, name, and whether it is a directory or a file, in the order in which
    /// they came.
    pub(super) fn names(&self) -> Vec<(u64, String, FileType)> {
        let entries = lock(&self.0.entries);
        let row = |(name, share): (&String, &Arc<Share>)| (share.number, name.clone(), share.kind);
        let mut all: Vec<_> = entries.iter().map(row).collect();
        all.sort_by_key(|row| row.0);
        all
    }

    /// All shares.
    pub(super) fn all(&self) -> Vec<Arc<Share>> {
        lock(&self.0.entries).values().cloned().collect()
    }

    /// How often entries changed: the root's modification time, in a way.
    pub(super) fn changes(&self) -> u64 {
        self.0.changes.load(Ordering::SeqCst)
    }
}

impl std::fmt::Debug for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "share {}", self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_paths_are_refused() {
        let shares = Shares::default();
        let dir = tempfile::tempdir().unwrap();
        for name in ["", ".", "..", "a/b", "/", "x\0y"] {
            assert!(shares.add(name, dir.path(), false).is_err(), "{name:?}");
        }
        shares.add("ok", dir.path(), false).unwrap();
        assert!(shares.add("ok", dir.path(), false).is_err());
        assert!(shares.remove("ok"));
        assert!(!shares.remove("ok"));
    }

    #[test]
    fn a_directory_that_does_not_exist_is_the_hosts_error() {
        let error = Shares::default()
            .add("x", "/nonexistent", false)
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
