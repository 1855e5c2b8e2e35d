//! A node of the guest: a file of the host, and how it is found again.

use super::export::Export;
use super::shares::Share;
use super::wire::Attr;
use crate::sys::FileHandle;
use koya_host::sync::lock;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, StatxFlags, openat, statx};
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// A file's identity on the host while it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    /// Of a directory: its export. Two that are not merged may show different mounts in it.
    pub(super) view: u64,
    /// Of a directory: the mount that it was found on, 0 for the export's own.
    pub(super) mount: u64,
    major: u32,
    minor: u32,
    inode: u64,
}

impl Identity {
    pub(super) fn of(stat: &Statx, export: &Export) -> Self {
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        let (view, mount) = match kind {
            FileType::Directory => (export.view, export.mount_key(stat.stx_mnt_id)),
            _ => (0, 0),
        };
        Self {
            view,
            mount,
            major: stat.stx_dev_major,
            minor: stat.stx_dev_minor,
            inode: stat.stx_ino,
        }
    }

    pub(super) fn file_system(&self) -> FileSystem {
        (self.major, self.minor)
    }
}

/// A file system of the host, by its device number.
pub(super) type FileSystem = (u32, u32);

/// Where the number of a file system stands in an inode number of the guest.
const FILE_SYSTEM_SHIFT: u32 = 48;

/// Where a node's descriptor is, or how to get it back.
pub(super) enum Slot {
    /// Its file, or the last share that it was reached by, is gone.
    Gone,
    Open(Arc<OwnedFd>),
    Evicted(Traces),
}

/// What an evicted node's file is known by: inode numbers are used again.
#[derive(Clone)]
pub(super) struct Traces {
    /// A handle, and the mount that it can be opened on.
    pub(super) handle: Option<(u64, FileHandle)>,
    /// Seconds and nanoseconds, where the file system keeps it.
    pub(super) birth: Option<(i64, u32)>,
}

impl Traces {
    /// Whether this is the file, or may be as far as its file system can tell.
    pub(super) fn fit(&self, fd: &OwnedFd, stat: &Statx) -> bool {
        match &self.handle {
            Some((_, handle)) => FileHandle::of(fd).is_ok_and(|h| h == *handle),
            None => self.birth == birth(stat),
        }
    }
}

fn birth(stat: &Statx) -> Option<(i64, u32)> {
    let known = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
    known.then_some((stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec))
}

/// The shares by which a node can be reached. Most nodes have those of their directory.
pub(super) type Reach = Arc<[Arc<Share>]>;

/// Whether a share is among these.
pub(super) fn leads(reach: &[Arc<Share>], share: &Arc<Share>) -> bool {
    reach.iter().any(|own| Arc::ptr_eq(own, share))
}

fn is_writable(reach: &Reach) -> bool {
    reach.iter().any(|share| share.is_writable())
}

/// Both, without what was taken away.
pub(super) fn union(reach: &[Arc<Share>], more: &[Arc<Share>]) -> Reach {
    let added = more.iter().filter(|share| !leads(reach, share));
    let all = reach.iter().chain(added);
    all.filter(|share| !share.is_removed()).cloned().collect()
}

/// Where a file was found.
#[derive(Clone, Copy)]
pub(super) enum Found<'a> {
    /// It is the root of a share.
    Root(&'a Arc<Share>),
    In(&'a Inode),
}

/// A node.
pub(super) struct Inode {
    pub(super) id: u64,
    pub(super) kind: FileType,
    /// A share's own root, which has no parent to be found from.
    pub(super) is_root: AtomicBool,
    pub(super) reach: Mutex<Reach>,
    /// Which file system of those that the guest sees.
    pub(super) file_system: u16,
    /// Known to have no capabilities of the guest's (see `Passthrough::drop_privileges`).
    pub(super) bare: AtomicBool,
    pub(super) slot: Mutex<Slot>,
    /// The directory and name that it was seen under last.
    pub(super) place: Mutex<(u64, CString)>,
    /// What the guest was told of its contents last: see [`has_changed`](Self::has_changed).
    pub(super) told: AtomicU64,
    /// The last sweep found it without a name and idle.
    pub(super) is_leaving: AtomicBool,
}

impl Inode {
    /// Attributes as the guest gets them.
    pub(super) fn attr(&self, stat: &Statx) -> Attr {
        self.told.store(contents(stat), Ordering::Relaxed);
        Attr {
            ino: self.number(stat.stx_ino),
            ..Attr::from(stat)
        }
    }

    /// Whether its contents are not those that the guest was told of last.
    pub(super) fn has_changed(&self, stat: &Statx) -> bool {
        self.told.load(Ordering::Relaxed) != contents(stat)
    }

    pub(super) fn reach(&self) -> Reach {
        lock(&self.reach).clone()
    }

    /// Whether a share by which it was reached is still there.
    pub(super) fn is_live(&self) -> bool {
        lock(&self.reach).iter().any(|share| !share.is_removed())
    }

    /// Whether one of them lets the guest change it.
    pub(super) fn is_writable(&self) -> bool {
        is_writable(&lock(&self.reach))
    }

    /// The trees that it is in.
    pub(super) fn exports(&self) -> Vec<Arc<Export>> {
        let reach = self.reach();
        let live = reach.iter().filter(|share| !share.is_removed());
        live.map(|share| share.export()).collect()
    }

    /// The tree that it is in; of a file the first of them.
    ///
    /// # Errors
    /// ESTALE if it was taken away.
    pub(super) fn export(&self) -> Result<Arc<Export>, Errno> {
        let reach = lock(&self.reach);
        let live = reach.iter().find(|share| !share.is_removed());
        live.map(|share| share.export()).ok_or(Errno::STALE)
    }

    /// Adds shares by which it can be reached. True if it was not writable before and is now.
    pub(super) fn extend_reach(&self, more: &Reach) -> bool {
        let mut reach = lock(&self.reach);
        if Arc::ptr_eq(&reach, more) || more.iter().all(|share| leads(&reach, share)) {
            return false;
        }
        let before = is_writable(&reach);
        *reach = union(&reach, more);
        !before && is_writable(&reach)
    }

    /// The same for a directory, which has one place and so is reached as that is, and no other way.
    pub(super) fn set_reach(&self, now: &Reach) -> bool {
        let mut reach = lock(&self.reach);
        let before = is_writable(&reach);
        *reach = now.clone();
        !before && is_writable(&reach)
    }

    /// The guest's number for an inode of this node's file system. All that the guest sees is one
    /// file system to it, so that a number alone must tell files apart.
    ///
    /// FUSE can announce other file systems as submounts instead. Linux (6.12) then takes such a
    /// submount down without waiting for requests that are under way, and crashes when one of them
    /// is answered.
    pub(super) fn number(&self, inode: u64) -> u64 {
        inode ^ u64::from(self.file_system) << FILE_SYSTEM_SHIFT
    }

    /// The directory and name that it was seen under last.
    pub(super) fn place(&self) -> (u64, CString) {
        lock(&self.place).clone()
    }
}

/// What of a file's attributes changes with its contents, in one number.
fn contents(stat: &Statx) -> u64 {
    let mut hasher = DefaultHasher::new();
    let time = |t: rustix::fs::StatxTimestamp| (t.tv_sec, t.tv_nsec);
    (stat.stx_size, time(stat.stx_mtime), time(stat.stx_ctime)).hash(&mut hasher);
    hasher.finish()
}

/// What every look at a file asks for.
pub(super) const STATX_MASK: StatxFlags = StatxFlags::BASIC_STATS
    .union(StatxFlags::BTIME)
    .union(StatxFlags::MNT_ID);

/// A file's attributes, of an O_PATH descriptor or any other.
pub(super) fn stat(fd: impl AsFd) -> Result<Statx, Errno> {
    statx(fd, c"", AtFlags::EMPTY_PATH, STATX_MASK)
}

/// Opens the entry `name` of a directory without following it and without opening the file.
pub(super) fn open_entry(parent: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(parent, name, flags, Mode::empty())
}

/// How a file is opened by its handle.
pub(super) const HANDLE_FLAGS: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW);

/// Closes a node's descriptor if the file can be found again. False if it must stay: it is in use (open
/// files are: see `Handle`), or only the descriptor leads to it.
pub(super) fn evict(inode: &Inode) -> bool {
    if inode.is_root.load(Ordering::Relaxed) {
        return false;
    }
    let mut slot = lock(&inode.slot);
    let Slot::Open(fd) = &*slot else {
        return false;
    };
    if Arc::strong_count(fd) > 1 {
        return false;
    }
    let Some(traces) = traces(inode, fd) else {
        return false;
    };
    *slot = Slot::Evicted(traces);
    true
}

/// How a file is found again; none if it has no name.
fn traces(inode: &Inode, fd: &OwnedFd) -> Option<Traces> {
    let stat = stat(fd).ok().filter(|stat| stat.stx_nlink > 0)?;
    let mount = stat.stx_mnt_id;
    let same_mount = inode
        .exports()
        .iter()
        .any(|export| export.mount_id == mount);
    let handle = same_mount.then(|| FileHandle::of(fd).ok()).flatten();
    Some(Traces {
        handle: handle.map(|handle| (mount, handle)),
        birth: birth(&stat),
    })
}

/// A node is to be found through another mount of its file system from now on. True if that closed its
/// descriptor. Who uses it at this moment goes on with the one that he has.
pub(super) fn move_to(inode: &Inode, mount: u64) -> bool {
    let mut slot = lock(&inode.slot);
    match &mut *slot {
        Slot::Open(fd) => {
            // Without asking a server on the network: all others wait.
            let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
            let stat = statx(&*fd, c"", flags, STATX_MASK);
            let Some(stat) = stat.ok().filter(|stat| stat.stx_nlink > 0) else {
                return false;
            };
            let traces = Traces {
                handle: FileHandle::of(&*fd).ok().map(|handle| (mount, handle)),
                birth: birth(&stat),
            };
            *slot = Slot::Evicted(traces);
            true
        }
        Slot::Evicted(traces) => {
            if let Some((own, _)) = &mut traces.handle {
                *own = mount;
            }
            false
        }
        Slot::Gone => false,
    }
}

/// Whether a file with a node's identity is the node's file: an evicted node's file may be gone,
/// and its inode number another's.
pub(super) fn still_same(inode: &Inode, fd: &OwnedFd, stat: &Statx) -> bool {
    match &*lock(&inode.slot) {
        Slot::Open(_) => true,
        Slot::Evicted(traces) => is_kind(inode, stat) && traces.fit(fd, stat),
        Slot::Gone => false,
    }
}

pub(super) fn is_kind(inode: &Inode, stat: &Statx) -> bool {
    inode.kind == FileType::from_raw_mode(stat.stx_mode.into())
}
