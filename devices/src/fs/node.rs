//! A node: a file of the host known to the guest, with the means to find it again.

use super::export::Export;
use super::shares::Share;
use super::users::MappedUsers;
use super::wire::{ATTR_DEVICE_SHIFT, Attr};
use crate::sys::FileHandle;
use koya_host::sync::lock;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, StatxFlags, openat, statx};
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Identity of an existing file on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    /// For a directory: its export. Two exports that are not merged may have different mounts in it.
    pub(super) view: u64,
    /// For a directory: the mount on which it was found, 0 for that of the export.
    pub(super) mount: u64,
    /// The export, if it shows other owners than the host's: there a file is not the same as in another export, and what is
    /// said of directories applies to all files.
    owners: u64,
    major: u32,
    minor: u32,
    inode: u64,
}

impl Identity {
    pub(super) fn of(stat: &Statx, export: &Export) -> Self {
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        let owners = match export.maps_users() {
            true => export.view,
            false => 0,
        };
        let (view, mount) = match kind {
            FileType::Directory => (export.view, export.mount_key(stat.stx_mnt_id)),
            _ if owners != 0 => (owners, export.mount_key(stat.stx_mnt_id)),
            _ => (0, 0),
        };
        Self {
            view,
            mount,
            owners,
            major: stat.stx_dev_major,
            minor: stat.stx_dev_minor,
            inode: stat.stx_ino,
        }
    }

    pub(super) fn file_system(&self) -> FileSystem {
        (self.major, self.minor, self.owners)
    }
}

/// A file system of the host, identified by its device number and 0, or by the export that shows other owners.
pub(super) type FileSystem = (u32, u32, u64);

/// Position of the file system number in an inode number of a guest that gives file systems no device numbers.
const FILE_SYSTEM_SHIFT: u32 = 48;

/// A node's descriptor, or the means to reopen its file.
pub(super) enum Slot {
    /// The file no longer exists, or the last share through which it was reached was removed.
    Gone,
    Open(Arc<OwnedFd>),
    Evicted(FileTraces),
}

/// Identification of an evicted node's file, since inode numbers are reused.
#[derive(Clone)]
pub(super) struct FileTraces {
    /// A file handle, and the mount on which to open it.
    pub(super) handle: Option<(u64, FileHandle)>,
    /// Time of creation in seconds and nanoseconds, if the file system records it.
    pub(super) birth: Option<(i64, u32)>,
}

impl FileTraces {
    /// Whether this is the same file, as far as its file system can tell.
    pub(super) fn matches(&self, fd: &OwnedFd, stat: &Statx) -> bool {
        match &self.handle {
            Some((_, handle)) => FileHandle::from_fd(fd).is_ok_and(|h| h == *handle),
            None => self.birth == birth(stat),
        }
    }
}

fn birth(stat: &Statx) -> Option<(i64, u32)> {
    let known = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
    known.then_some((stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec))
}

/// The shares through which a node can be reached; for most nodes those of their directory.
pub(super) type Reach = Arc<[Arc<Share>]>;

/// Whether the share is among these.
pub(super) fn contains_share(reach: &[Arc<Share>], share: &Arc<Share>) -> bool {
    reach.iter().any(|own| Arc::ptr_eq(own, share))
}

fn is_writable(reach: &Reach) -> bool {
    reach.iter().any(|share| share.is_writable())
}

/// Whether both contain the same shares.
pub(super) fn same_shares(one: &Reach, other: &Reach) -> bool {
    Arc::ptr_eq(one, other)
        || one.len() == other.len() && one.iter().all(|share| contains_share(other, share))
}

/// The union of both, without removed shares.
pub(super) fn union(reach: &[Arc<Share>], more: &[Arc<Share>]) -> Reach {
    let added = more.iter().filter(|share| !contains_share(reach, share));
    let all = reach.iter().chain(added);
    all.filter(|share| !share.is_removed()).cloned().collect()
}

/// The location at which a file was found.
#[derive(Clone, Copy)]
pub(super) enum Found<'a> {
    /// As the root of a share.
    Root(&'a Arc<Share>),
    In(&'a Inode),
}

/// A node.
pub(super) struct Inode {
    pub(super) id: u64,
    pub(super) kind: FileType,
    /// Whether it is the root of a share, which has no parent to be found from.
    pub(super) is_root: AtomicBool,
    pub(super) reach: Mutex<Reach>,
    /// Whether it is a file that was found while it had several names, so it may have several locations.
    pub(super) has_links: AtomicBool,
    /// Number of its file system among those the guest has reached.
    pub(super) file_system: u16,
    /// Whether the guest gives each file system a device number; otherwise its number is in the inode numbers.
    pub(super) has_device: bool,
    /// Its owners, if they are not those of the host.
    pub(super) users: Option<Arc<MappedUsers>>,
    /// Known to have no capabilities set by the guest (see `Passthrough::drop_privileges`).
    pub(super) has_no_capabilities: AtomicBool,
    pub(super) slot: Mutex<Slot>,
    /// Directory and name under which it was last seen.
    pub(super) location: Mutex<(u64, CString)>,
    /// State of the contents last reported to the guest: see [`has_changed`](Self::has_changed).
    pub(super) reported: AtomicU64,
    /// Set if the last sweep found the file unlinked and unused.
    pub(super) is_unused: AtomicBool,
}

impl Inode {
    /// Attributes for the guest.
    pub(super) fn attr(&self, stat: &Statx) -> Attr {
        self.reported.store(contents(stat), Ordering::Relaxed);
        let mut attr = Attr::from(stat);
        attr.ino = self.number(stat.stx_ino);
        if self.has_device {
            attr.flags = u32::from(self.file_system) << ATTR_DEVICE_SHIFT;
        }
        if let Some(users) = &self.users {
            attr.uid = users.guest_user(attr.uid);
            attr.gid = users.guest_group(attr.gid);
        }
        attr
    }

    /// Whether the contents have changed since they were last reported to the guest.
    pub(super) fn has_changed(&self, stat: &Statx) -> bool {
        self.reported.load(Ordering::Relaxed) != contents(stat)
    }

    pub(super) fn reach(&self) -> Reach {
        lock(&self.reach).clone()
    }

    /// Whether a share through which it was reached still exists.
    pub(super) fn is_live(&self) -> bool {
        lock(&self.reach).iter().any(|share| !share.is_removed())
    }

    /// Whether one of its shares is writable.
    pub(super) fn is_writable(&self) -> bool {
        is_writable(&lock(&self.reach))
    }

    /// The exports that contain it.
    pub(super) fn exports(&self) -> Vec<Arc<Export>> {
        let reach = self.reach();
        let live = reach.iter().filter(|share| !share.is_removed());
        live.map(|share| share.export()).collect()
    }

    /// The export that contains it; for a file that is in several, the first.
    ///
    /// # Errors
    /// ESTALE if its share was removed.
    pub(super) fn export(&self) -> Result<Arc<Export>, Errno> {
        let reach = lock(&self.reach);
        let live = reach.iter().find(|share| !share.is_removed());
        live.map(|share| share.export()).ok_or(Errno::STALE)
    }

    /// Adds shares through which it can be reached. True if it becomes writable.
    pub(super) fn extend_reach(&self, more: &Reach) -> bool {
        let mut reach = lock(&self.reach);
        if Arc::ptr_eq(&reach, more) || more.iter().all(|share| contains_share(&reach, share)) {
            return false;
        }
        let before = is_writable(&reach);
        *reach = union(&reach, more);
        !before && is_writable(&reach)
    }

    /// The same for a directory: it has one location, so its shares are replaced by those of that location.
    pub(super) fn set_reach(&self, now: &Reach) -> bool {
        let mut reach = lock(&self.reach);
        // Most nodes share one list with their directory.
        if same_shares(&reach, now) {
            return false;
        }
        let before = is_writable(&reach);
        *reach = now.clone();
        !before && is_writable(&reach)
    }

    /// The inode number for the guest. Koya's guest kernel gives each file system of the host a device number. Another one
    /// sees all shares as one file system, so the number alone must identify a file.
    ///
    /// FUSE could announce other file systems as submounts instead. But Linux (6.12) unmounts such a submount
    /// without waiting for requests in flight, and crashes when one of them is answered.
    pub(super) fn number(&self, inode: u64) -> u64 {
        match self.has_device {
            true => inode,
            false => inode ^ u64::from(self.file_system) << FILE_SYSTEM_SHIFT,
        }
    }

    /// Directory and name under which it was last seen.
    pub(super) fn location(&self) -> (u64, CString) {
        lock(&self.location).clone()
    }
}

/// Combines the attributes that change with the contents into one number.
fn contents(stat: &Statx) -> u64 {
    let mut hasher = DefaultHasher::new();
    let time = |t: rustix::fs::StatxTimestamp| (t.tv_sec, t.tv_nsec);
    (stat.stx_size, time(stat.stx_mtime), time(stat.stx_ctime)).hash(&mut hasher);
    hasher.finish()
}

/// The fields requested by every statx.
pub(super) const STATX_MASK: StatxFlags = StatxFlags::BASIC_STATS
    .union(StatxFlags::BTIME)
    .union(StatxFlags::MNT_ID);

/// Attributes of a file, by an O_PATH or any other descriptor.
pub(super) fn stat(fd: impl AsFd) -> Result<Statx, Errno> {
    statx(fd, c"", AtFlags::EMPTY_PATH, STATX_MASK)
}

/// The same as the host knows them, without a request to a network file server: where other threads wait for a lock.
pub(super) fn cached_stat(fd: impl AsFd) -> Result<Statx, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    statx(fd, c"", flags, STATX_MASK)
}

/// Opens the entry `name` of a directory with O_PATH, without following symbolic links.
pub(super) fn open_entry(parent: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(parent, name, flags, Mode::empty())
}

/// Flags for opening a file by its handle.
pub(super) const HANDLE_FLAGS: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW);

/// Closes a node's descriptor if its file can be found again. False if it must be kept: it is in use (as for
/// open files, see `Handle`), or the file can be reached only through it.
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
    let Some(traces) = file_traces(inode, fd) else {
        return false;
    };
    *slot = Slot::Evicted(traces);
    true
}

/// The means to find the file again; `None` if it is unlinked.
fn file_traces(inode: &Inode, fd: &OwnedFd) -> Option<FileTraces> {
    let stat = cached_stat(fd).ok().filter(|stat| stat.stx_nlink > 0)?;
    let mount = stat.stx_mnt_id;
    let same_mount = inode
        .exports()
        .iter()
        .any(|export| export.mount_id == mount);
    let handle = same_mount.then(|| FileHandle::from_fd(fd).ok()).flatten();
    Some(FileTraces {
        handle: handle.map(|handle| (mount, handle)),
        birth: birth(&stat),
    })
}

/// Makes a node use another mount of its file system. True if that closed its descriptor. Threads that are
/// using the old descriptor continue with it.
pub(super) fn move_to(inode: &Inode, mount: u64) -> bool {
    let mut slot = lock(&inode.slot);
    match &mut *slot {
        Slot::Open(fd) => {
            let stat = cached_stat(&**fd).ok();
            let Some(stat) = stat.filter(|stat| stat.stx_nlink > 0) else {
                return false;
            };
            let traces = FileTraces {
                handle: FileHandle::from_fd(&*fd).ok().map(|handle| (mount, handle)),
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

/// Whether a file with a node's identity is the node's file: the file of an evicted node may have been
/// removed and its inode number reused.
pub(super) fn still_same(inode: &Inode, fd: &OwnedFd, stat: &Statx) -> bool {
    match &*lock(&inode.slot) {
        Slot::Open(_) => true,
        Slot::Evicted(traces) => is_kind(inode, stat) && traces.matches(fd, stat),
        Slot::Gone => false,
    }
}

pub(super) fn is_kind(inode: &Inode, stat: &Statx) -> bool {
    inode.kind == FileType::from_raw_mode(stat.stx_mode.into())
}
