//! The synthetic root: a directory that exists only here, whose entries are host directories or single files.
//! Entries are added and removed while the guest runs, from any thread.
//!
//! A directory inside one that is already shared is not exported a second time: the caller gets its path within the outer
//! share. So each directory is one directory for the guest, whichever of its containers and volumes use it. If a file is
//! reached through several shares, the most permissive one determines the guest's access; between containers, the guest's
//! own mounts decide.

use super::export::Export;
use super::inodes;
use super::origin::Origin;
use super::users::MappedUsers;
use koya_host::sync::lock;
use koya_host::walls::landlock::Place;
use rustix::fs::{CWD, FileType, Mode, OFlags, StatVfsMountFlags, openat};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

/// Options of a shared directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShareOptions {
    /// Whether nothing may be changed through this share.
    pub read_only: bool,
    /// Whether later mounts and unmounts on the host below it are visible in the guest. Such a tree is not
    /// detached from the host's mounts.
    pub follow_mounts: bool,
    /// Whether file systems that the host has mounted below it are left out, so that the guest sees what they cover. Only
    /// possible for a detached tree: where the host permits none, they are visible, with a warning.
    pub omit_mounts: bool,
}

/// Result of [`Shares::share`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// Its name, for [`Shares::remove`].
    pub name: String,
    /// Its current path in the guest, from the root of the file system: see [`Shares::locate`].
    pub path: PathBuf,
    /// Whether nothing may be changed through it: as requested, or because the host's own mount is read-only.
    /// The guest must mount it read-only, since the same files may be writable through other shares.
    pub read_only: bool,
}

/// A host directory or file that is shared with the guest.
pub struct Share {
    /// Distinguishes it from all other shares, also earlier ones.
    pub(super) number: u64,
    name: String,
    /// Whether it is a directory or a file.
    pub(super) kind: FileType,
    read_only: bool,
    location: Mutex<Location>,
    removed: AtomicBool,
}

/// The location of a share.
struct Location {
    export: Arc<Export>,
    /// Path from the root of the export.
    path: PathBuf,
    /// An O_PATH descriptor on the export's mount; `None` once the share is removed.
    root: Option<Arc<OwnedFd>>,
    /// Its location on the host; `None` if that is unknown or not needed.
    origin: Option<Origin>,
}

impl Share {
    fn new(
        name: &str,
        options: ShareOptions,
        export: Arc<Export>,
        origin: Option<Origin>,
    ) -> Option<Arc<Self>> {
        let root = export.root()?;
        Some(Self::at(
            name,
            options,
            export,
            PathBuf::new(),
            root,
            origin,
        ))
    }

    fn at(
        name: &str,
        options: ShareOptions,
        export: Arc<Export>,
        path: PathBuf,
        root: Arc<OwnedFd>,
        origin: Option<Origin>,
    ) -> Arc<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        Arc::new(Self {
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            name: name.to_owned(),
            kind: match path.as_os_str().is_empty() {
                true => export.kind,
                false => FileType::Directory,
            },
            read_only: options.read_only,
            location: Mutex::new(Location {
                export,
                path,
                root: Some(root),
                origin,
            }),
            removed: AtomicBool::new(false),
        })
    }

    /// The export that contains it.
    pub(super) fn export(&self) -> Arc<Export> {
        lock(&self.location).export.clone()
    }

    /// Its root, an O_PATH descriptor, until it is removed.
    pub(super) fn root(&self) -> Option<Arc<OwnedFd>> {
        lock(&self.location).root.clone()
    }

    /// Whether it was removed by the owner.
    pub(super) fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Relaxed)
    }

    /// Whether the guest may change files through it.
    pub(super) fn is_writable(&self) -> bool {
        !self.read_only && !self.is_removed()
    }

    /// The path from `outer` to this share, if `outer` is in the same export and above it (or at the same
    /// path, and older).
    pub(super) fn below(&self, outer: &Self) -> Option<PathBuf> {
        if std::ptr::eq(self, outer) {
            return None;
        }
        let (export, path) = {
            let location = lock(&self.location);
            (location.export.clone(), location.path.clone())
        };
        let above = lock(&outer.location);
        let rest = path.strip_prefix(&above.path).ok()?;
        let is_above = !rest.as_os_str().is_empty() || outer.number < self.number;
        (Arc::ptr_eq(&export, &above.export) && is_above).then(|| rest.to_owned())
    }
}

/// Receives changes: the tables of a file system.
pub(super) trait Listener: Send + Sync {
    /// A share was added.
    fn added(&self, share: &Arc<Share>);
    /// An export is merged into another, which `within` belongs to: `moves` are all of its shares. `apply` moves
    /// them, and must be called while nothing is looked up through them.
    fn merged(&self, within: &Arc<Share>, moves: &[Move], apply: &dyn Fn());
    /// Shares were removed.
    fn removed(&self, shares: &[Arc<Share>]);
}

struct SharedRoot {
    entries: Mutex<BTreeMap<String, Arc<Share>>>,
    changes: AtomicU64,
    listeners: Mutex<Vec<Weak<dyn Listener>>>,
    /// All files that can be shared; `None` for any.
    places: Option<Vec<Place>>,
}

/// The entries of the synthetic root. Cheap to clone; all clones are the same root.
#[derive(Clone)]
pub struct Shares(Arc<SharedRoot>);

impl Default for Shares {
    fn default() -> Self {
        Self::within(None)
    }
}

type Entries = BTreeMap<String, Arc<Share>>;

impl Shares {
    /// A root whose entries can only be files in these places, by their paths; `None` for any. Threads that serve the files may
    /// be confined to the same places ([`Place`]), and could not open others.
    pub fn within(places: Option<Vec<Place>>) -> Self {
        Self(Arc::new(SharedRoot {
            entries: Mutex::default(),
            changes: AtomicU64::new(0),
            listeners: Mutex::default(),
            places,
        }))
    }

    /// Shares the host's `path` as `name`. The guest sees it at once.
    ///
    /// For owners that choose the names, and whose directories do not contain each other: a directory inside
    /// another one is exported twice. Otherwise use [`share`](Self::share).
    ///
    /// # Errors
    /// If the name is not a single path component or is in use, or the error from the host.
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
        let options = ShareOptions {
            read_only,
            ..ShareOptions::default()
        };
        let (plain, options) = self.open(path.as_ref(), options)?;
        let export = Export::new(plain, options, None)?;
        let share = Share::new(name, options, Arc::new(export), None).ok_or_else(removed_error)?;
        let mut entries = lock(&self.0.entries);
        if entries.contains_key(name) {
            let text = format!("a share {name:?} exists");
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        self.insert(&mut entries, share);
        Ok(())
    }

    /// Shares the host's `path`. The guest sees it at once at the path returned: under a name of its own, or
    /// below the share that contains it.
    ///
    /// # Errors
    /// The error from the host.
    pub fn share(&self, path: impl AsRef<Path>, options: ShareOptions) -> io::Result<Shared> {
        let (plain, options) = self.open(path.as_ref(), options)?;
        let stat = inodes::stat(&plain)?;
        let is_directory = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory;
        let origin = is_directory.then(|| Origin::of(&plain, &stat)).flatten();
        let omits = options.omit_mounts && !options.follow_mounts;
        let (options, origin) = match origin {
            // Its directories are not those of a share with the mounts: it is neither part of one, nor has one as a part.
            Some(origin) if omits && origin.has_submounts() => (options, None),
            origin => (
                ShareOptions {
                    omit_mounts: false,
                    ..options
                },
                origin,
            ),
        };
        let mut entries = lock(&self.0.entries);
        let name = free_name(&entries);
        if let Some(origin) = &origin
            && let Some(share) = share_within(&entries, &name, options, origin)
        {
            self.insert(&mut entries, share.clone());
            return Ok(shared(&entries, &share));
        }
        let export = Arc::new(Export::new(plain, options, origin.as_ref())?);
        let share = Share::new(&name, options, export, origin).ok_or_else(removed_error)?;
        self.insert(&mut entries, share.clone());
        self.merge_nested(&entries, &share);
        Ok(shared(&entries, &share))
    }

    /// Shares the host's `path`, always under a name of its own, with other owners than on the host.
    ///
    /// # Errors
    /// The error from the host.
    pub fn share_mapped(
        &self,
        path: impl AsRef<Path>,
        options: ShareOptions,
        users: MappedUsers,
    ) -> io::Result<Shared> {
        let (plain, options) = self.open(path.as_ref(), options)?;
        let export = Export::new(plain, options, None)?.with_users(users);
        let mut entries = lock(&self.0.entries);
        let name = free_name(&entries);
        // Without its location, it is not merged with exports that show other owners.
        let share = Share::new(&name, options, Arc::new(export), None);
        let share = share.ok_or_else(removed_error)?;
        self.insert(&mut entries, share.clone());
        Ok(shared(&entries, &share))
    }

    /// The current path of a share in the guest. It may change when other shares are added and removed; the
    /// share's name always works, and mounts and open files of the guest stay valid. Prefer this path: if
    /// a directory is looked up by name although it is also found below another one, the guest kernel moves
    /// its dentry for the time being.
    pub fn locate(&self, name: &str) -> Option<PathBuf> {
        let entries = lock(&self.0.entries);
        let share = entries.get(name)?;
        Some(shared(&entries, share).path)
    }

    /// Opens a directory or file of the host, if it may be shared.
    fn open(&self, path: &Path, options: ShareOptions) -> io::Result<(OwnedFd, ShareOptions)> {
        let (plain, options) = open_to_share(path, options)?;
        let permits = |place: &Place| {
            path.starts_with(&place.path) && (options.read_only || !place.read_only)
        };
        match &self.0.places {
            Some(places) if !places.iter().any(permits) => Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "it is not in the places that were named before the machine started",
            )),
            _ => Ok((plain, options)),
        }
    }

    fn insert(&self, entries: &mut Entries, share: Arc<Share>) {
        entries.insert(share.name.clone(), share.clone());
        self.0.changes.fetch_add(1, Ordering::SeqCst);
        self.notify(|listener| listener.added(&share));
    }

    /// Merges exports that lie within a new one into it, as far as possible.
    fn merge_nested(&self, entries: &Entries, outer: &Arc<Share>) {
        let into = outer.export();
        let Some((root, origin)) = into.root().zip(lock(&outer.location).origin.clone()) else {
            return;
        };
        let mut others: Vec<_> = entries.values().map(|share| share.export()).collect();
        others.sort_by_key(|export| export.view);
        others.dedup_by_key(|export| export.view);
        others.retain(|export| !Arc::ptr_eq(export, &into));
        for from in others {
            let shares = entries
                .values()
                .filter(|share| Arc::ptr_eq(&share.export(), &from));
            let moves: Option<Vec<Move>> = shares
                .map(|share| Move::of(share, &root, &origin, &into))
                .collect();
            let Some(moves) = moves else {
                continue;
            };
            let writes = moves.iter().any(|one| one.share.is_writable());
            if writes && !can_be_written(&into) {
                continue;
            }
            for one in &moves {
                into.adopt_mount(one.mount_before, one.mount);
            }
            let apply = || moves.iter().for_each(|one| one.apply(&into));
            self.notify(|listener| listener.merged(outer, &moves, &apply));
            apply();
            from.close();
        }
    }

    /// Removes a share. Files that the guest has open only through it are closed and return ESTALE from now
    /// on, whatever the guest does. False if there is no such share.
    pub fn remove(&self, name: &str) -> bool {
        self.remove_all([name]) > 0
    }

    /// Removes several shares; returns the number removed.
    pub fn remove_all<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> usize {
        let mut entries = lock(&self.0.entries);
        let names = names.into_iter();
        let removed: Vec<_> = names.filter_map(|name| entries.remove(name)).collect();
        for share in &removed {
            share.removed.store(true, Ordering::Relaxed);
            lock(&share.location).root.take();
        }
        for export in removed.iter().map(|share| share.export()) {
            if !entries
                .values()
                .any(|other| Arc::ptr_eq(&other.export(), &export))
            {
                export.close();
            }
        }
        if !removed.is_empty() {
            self.0.changes.fetch_add(1, Ordering::SeqCst);
        }
        // Closing open files may be slow.
        drop(entries);
        if !removed.is_empty() {
            self.notify(|listener| listener.removed(&removed));
        }
        removed.len()
    }

    fn notify(&self, what: impl Fn(&dyn Listener)) {
        let mut all = lock(&self.0.listeners);
        all.retain(|listener| listener.strong_count() > 0);
        let listeners: Vec<_> = all.iter().filter_map(Weak::upgrade).collect();
        drop(all);
        listeners.iter().for_each(|listener| what(&**listener));
    }

    /// Adds a listener and reports all existing shares to it.
    pub(super) fn listen(&self, listener: Weak<dyn Listener>) {
        let entries = lock(&self.0.entries);
        if let Some(listener) = listener.upgrade() {
            entries.values().for_each(|share| listener.added(share));
        }
        lock(&self.0.listeners).push(listener);
    }

    /// The share with this name.
    pub(super) fn get(&self, name: &[u8]) -> Option<Arc<Share>> {
        let name = std::str::from_utf8(name).ok()?;
        lock(&self.0.entries).get(name).cloned()
    }

    /// Number, name and file type of every share that is not found within another, in the order in which they
    /// were added.
    pub(super) fn names(&self) -> Vec<(u64, String, FileType)> {
        let entries = lock(&self.0.entries);
        let row = |share: Arc<Share>| (share.number, share.name.clone(), share.kind);
        let mut all: Vec<_> = topmost(&entries).map(row).collect();
        all.sort_by_key(|row| row.0);
        all
    }

    /// All exports.
    pub(super) fn exports(&self) -> Vec<Arc<Export>> {
        let entries = lock(&self.0.entries);
        let mut all: Vec<_> = entries.values().map(|share| share.export()).collect();
        all.sort_by_key(|export| export.view);
        all.dedup_by_key(|export| export.view);
        all
    }

    /// Number of changes, used as modification time of the root.
    pub(super) fn changes(&self) -> u64 {
        self.0.changes.load(Ordering::SeqCst)
    }
}

/// Creates a share within an existing export; `None` if there is none that contains it.
fn share_within(
    entries: &Entries,
    name: &str,
    options: ShareOptions,
    origin: &Origin,
) -> Option<Arc<Share>> {
    for outer in topmost(entries) {
        let (export, above, root, known) = {
            let location = lock(&outer.location);
            let Some((root, known)) = location.root.clone().zip(location.origin.clone()) else {
                continue;
            };
            (location.export.clone(), location.path.clone(), root, known)
        };
        if export.follows_mounts != options.follow_mounts {
            continue;
        }
        let Some((path, fd)) = known.find(&root, origin, export.follows_mounts) else {
            continue;
        };
        if options.read_only || can_be_written(&export) {
            let path = joined(&above, &path);
            let (root, origin) = (Arc::new(fd), Some(origin.clone()));
            return Some(Share::at(name, options, export, path, root, origin));
        }
    }
    None
}

/// Whether a writable share can be part of this export.
fn can_be_written(export: &Export) -> bool {
    export.unseal().unwrap_or_else(|error| {
        log::warn!(
            "virtio-fs: a directory is exported twice, since it can't be made writable: {error}"
        );
        false
    })
}

/// A share that moves to another export.
pub(super) struct Move {
    pub(super) share: Arc<Share>,
    path: PathBuf,
    /// Its root in that export.
    pub(super) root: Arc<OwnedFd>,
    /// The mount of that root.
    pub(super) mount: u64,
    mount_before: u64,
}

impl Move {
    /// `None` if the share cannot be found there.
    fn of(share: &Arc<Share>, root: &OwnedFd, origin: &Origin, into: &Export) -> Option<Self> {
        let (export, before, own) = {
            let location = lock(&share.location);
            (
                location.export.clone(),
                location.root.clone()?,
                location.origin.clone()?,
            )
        };
        // Directories below a mount of their own would not be found by their current identity.
        if export.follows_mounts != into.follows_mounts || own.has_submounts() {
            return None;
        }
        let (path, root) = origin.find(root, &own, into.follows_mounts)?;
        Some(Self {
            share: share.clone(),
            path,
            mount: inodes::stat(&root).ok()?.stx_mnt_id,
            mount_before: inodes::stat(&*before).ok()?.stx_mnt_id,
            root: Arc::new(root),
        })
    }

    fn apply(&self, into: &Arc<Export>) {
        let mut location = lock(&self.share.location);
        location.export = into.clone();
        location.path = self.path.clone();
        location.root = Some(self.root.clone());
    }
}

/// Whether a share is an entry of the root that is not found within another.
fn is_topmost(entries: &Entries, share: &Share) -> bool {
    !entries.values().any(|other| share.below(other).is_some())
}

fn topmost(entries: &Entries) -> impl Iterator<Item = Arc<Share>> + '_ {
    let shares = entries.values().filter(|share| is_topmost(entries, share));
    shares.cloned()
}

/// The result for a share with its current path.
fn shared(entries: &Entries, share: &Arc<Share>) -> Shared {
    let above = topmost(entries)
        .find_map(|outer| Some(joined(Path::new(&outer.name), &share.below(&outer)?)));
    Shared {
        name: share.name.clone(),
        path: above.unwrap_or_else(|| share.name.clone().into()),
        read_only: share.read_only,
    }
}

/// Opens a directory or file of the host. On a read-only mount, it is shared read-only.
fn open_to_share(path: &Path, options: ShareOptions) -> io::Result<(OwnedFd, ShareOptions)> {
    let plain = open_plain(path)?;
    let read_only = options.read_only || is_on_read_only_mount(&plain)?;
    let options = ShareOptions {
        read_only,
        ..options
    };
    Ok((plain, options))
}

/// Opens `path` on the host's own mount.
fn open_plain(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    Ok(openat(CWD, path, flags, Mode::empty())?)
}

fn is_on_read_only_mount(plain: &OwnedFd) -> io::Result<bool> {
    let flags = rustix::fs::fstatvfs(plain)?.f_flag;
    Ok(flags.contains(StatVfsMountFlags::RDONLY))
}

/// Joins two paths; `rest` may be empty.
fn joined(base: &Path, rest: &Path) -> PathBuf {
    match rest.as_os_str().is_empty() {
        true => base.to_owned(),
        false => base.join(rest),
    }
}

fn free_name(entries: &Entries) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        let name = format!("export{}", NEXT.fetch_add(1, Ordering::Relaxed));
        if !entries.contains_key(&name) {
            return name;
        }
    }
}

fn removed_error() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl std::fmt::Debug for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "share {}", self.number)
    }
}

#[cfg(test)]
mod tests;
