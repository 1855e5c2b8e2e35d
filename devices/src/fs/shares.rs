//! The synthetic root: a directory that exists only here, whose entries are host directories (or
//! single files). They are added and removed while the guest runs, from any thread.
//!
//! What lies within what is shared already is not exported once more: whoever shares it is told the
//! path by which the guest has it. So one directory is one directory to the guest, whichever of its
//! containers look at it, and by whichever volumes. Of several shares that a file is reached by, the one
//! that allows more decides what the guest may do to it; between the guest's containers its own mounts
//! decide.

use super::export::Export;
use super::inodes;
use super::origin::Origin;
use koya_host::sync::lock;
use rustix::fs::{CWD, FileType, Mode, OFlags, StatVfsMountFlags, openat};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

/// How a directory is shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShareOptions {
    /// Whether nothing in it can be changed by way of this share.
    pub read_only: bool,
    /// Whether mounts that the host makes and unmounts below it later show in the guest. Such a tree
    /// is not detached from the host's mounts.
    pub follow_mounts: bool,
}

/// What [`Shares::share`] made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// Its name, for [`Shares::remove`].
    pub name: String,
    /// Where the guest finds it now, from the root of the file system: see [`Shares::locate`].
    pub path: PathBuf,
    /// Whether nothing can be changed by way of it: as was asked for, or because the host's own mount
    /// is read-only. The guest must mount it so, since the same files may be writable by other shares.
    pub read_only: bool,
}

/// One host directory or file that the guest was given.
pub struct Share {
    /// Tells it from every other share there was.
    pub(super) number: u64,
    name: String,
    /// A directory's, or a single file's.
    pub(super) kind: FileType,
    read_only: bool,
    place: Mutex<Place>,
    removed: AtomicBool,
}

/// Where a share is.
struct Place {
    export: Arc<Export>,
    /// Its path from the export's root.
    path: PathBuf,
    /// An O_PATH descriptor on the export's mount; none once the share is taken away.
    root: Option<Arc<OwnedFd>>,
    /// Where it is on the host; none if that is not known, or of no use.
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
            place: Mutex::new(Place {
                export,
                path,
                root: Some(root),
                origin,
            }),
            removed: AtomicBool::new(false),
        })
    }

    /// The tree that it is in.
    pub(super) fn export(&self) -> Arc<Export> {
        lock(&self.place).export.clone()
    }

    /// Its root, an O_PATH descriptor, while it is there.
    pub(super) fn root(&self) -> Option<Arc<OwnedFd>> {
        lock(&self.place).root.clone()
    }

    /// Whether the owner has taken it away.
    pub(super) fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Relaxed)
    }

    /// Whether the guest may change something by it.
    pub(super) fn is_writable(&self) -> bool {
        !self.read_only && !self.is_removed()
    }

    /// The path from `outer` to this share, if that is in the same tree and above it (or the same, and
    /// older).
    pub(super) fn below(&self, outer: &Self) -> Option<PathBuf> {
        if std::ptr::eq(self, outer) {
            return None;
        }
        let (export, path) = {
            let place = lock(&self.place);
            (place.export.clone(), place.path.clone())
        };
        let above = lock(&outer.place);
        let rest = path.strip_prefix(&above.path).ok()?;
        let is_above = !rest.as_os_str().is_empty() || outer.number < self.number;
        (Arc::ptr_eq(&export, &above.export) && is_above).then(|| rest.to_owned())
    }
}

/// Who wants to know of changes: the tables of a file system.
pub(super) trait Listener: Send + Sync {
    /// A share was added.
    fn added(&self, share: &Arc<Share>);
    /// An export is to be a part of another, which `within` leads to: `moves` are all of its shares. `apply`
    /// moves them; at a time when nothing is looked up by them.
    fn merged(&self, within: &Arc<Share>, moves: &[Move], apply: &dyn Fn());
    /// Shares were taken away.
    fn removed(&self, shares: &[Arc<Share>]);
}

struct Inner {
    entries: Mutex<BTreeMap<String, Arc<Share>>>,
    changes: AtomicU64,
    listeners: Mutex<Vec<Weak<dyn Listener>>>,
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

type Entries = BTreeMap<String, Arc<Share>>;

impl Shares {
    /// Puts the host's `path` under the root as `name`. The guest sees it at once.
    ///
    /// For owners who choose the names and whose directories do not lie within each other: one that does
    /// is exported twice. [`share`](Self::share) is for all others.
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
        let plain = open_plain(path.as_ref())?;
        let options = ShareOptions {
            read_only: read_only || is_on_read_only_mount(&plain)?,
            ..ShareOptions::default()
        };
        let export = Export::new(plain, options, None)?;
        let share = Share::new(name, options, Arc::new(export), None).ok_or_else(gone)?;
        let mut entries = lock(&self.0.entries);
        if entries.contains_key(name) {
            let text = format!("a share {name:?} exists");
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        self.insert(&mut entries, share);
        Ok(())
    }

    /// Shares the host's `path`. The guest sees it at once, at the path that is returned: under a name
    /// of its own, or below what holds it.
    ///
    /// # Errors
    /// The host's.
    pub fn share(&self, path: impl AsRef<Path>, options: ShareOptions) -> io::Result<Shared> {
        let plain = open_plain(path.as_ref())?;
        let options = ShareOptions {
            read_only: options.read_only || is_on_read_only_mount(&plain)?,
            ..options
        };
        let stat = inodes::stat(&plain)?;
        let is_directory = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory;
        let origin = is_directory.then(|| Origin::of(&plain, &stat)).flatten();
        let mut entries = lock(&self.0.entries);
        let name = free_name(&entries);
        if let Some(origin) = &origin
            && let Some(share) = join(&entries, &name, options, origin)
        {
            self.insert(&mut entries, share.clone());
            return Ok(shared(&entries, &share));
        }
        let export = Arc::new(Export::new(plain, options, origin.as_ref())?);
        let share = Share::new(&name, options, export, origin).ok_or_else(gone)?;
        self.insert(&mut entries, share.clone());
        self.take_in(&entries, &share);
        Ok(shared(&entries, &share))
    }

    /// Where the guest finds a share now. Other shares that come and go may move it; under its name it is
    /// found at any time, and what the guest has mounted or opened stays. To look a directory up by its name
    /// that is also found below another one makes the guest's kernel move its dentry for the time being, so
    /// this is the path to prefer.
    pub fn locate(&self, name: &str) -> Option<PathBuf> {
        let entries = lock(&self.0.entries);
        let share = entries.get(name)?;
        Some(shared(&entries, share).path)
    }

    fn insert(&self, entries: &mut Entries, share: Arc<Share>) {
        entries.insert(share.name.clone(), share.clone());
        self.0.changes.fetch_add(1, Ordering::SeqCst);
        self.tell(|listener| listener.added(&share));
    }

    /// Makes exports that lie within a new one a part of it, as far as that is possible.
    fn take_in(&self, entries: &Entries, outer: &Arc<Share>) {
        let into = outer.export();
        let Some((root, origin)) = into.root().zip(lock(&outer.place).origin.clone()) else {
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
            self.tell(|listener| listener.merged(outer, &moves, &apply));
            apply();
            from.close();
        }
    }

    /// Takes a share away. What the guest has open only by it is closed and answers ESTALE from now
    /// on, whatever the guest does. False if there was none.
    pub fn remove(&self, name: &str) -> bool {
        self.remove_all([name]) > 0
    }

    /// The same of several; how many there were.
    pub fn remove_all<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> usize {
        let mut entries = lock(&self.0.entries);
        let names = names.into_iter();
        let removed: Vec<_> = names.filter_map(|name| entries.remove(name)).collect();
        for share in &removed {
            share.removed.store(true, Ordering::Relaxed);
            lock(&share.place).root.take();
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
        // To close what is open may take its time.
        drop(entries);
        if !removed.is_empty() {
            self.tell(|listener| listener.removed(&removed));
        }
        removed.len()
    }

    fn tell(&self, what: impl Fn(&dyn Listener)) {
        let mut all = lock(&self.0.listeners);
        all.retain(|listener| listener.strong_count() > 0);
        let listeners: Vec<_> = all.iter().filter_map(Weak::upgrade).collect();
        drop(all);
        listeners.iter().for_each(|listener| what(&**listener));
    }

    /// Has a listener hear of all shares that there are, and of every change.
    pub(super) fn listen(&self, listener: Weak<dyn Listener>) {
        let entries = lock(&self.0.entries);
        if let Some(listener) = listener.upgrade() {
            entries.values().for_each(|share| listener.added(share));
        }
        lock(&self.0.listeners).push(listener);
    }

    /// The share of this name.
    pub(super) fn get(&self, name: &[u8]) -> Option<Arc<Share>> {
        let name = std::str::from_utf8(name).ok()?;
        lock(&self.0.entries).get(name).cloned()
    }

    /// The number of every share that is not found within another, its name, and whether it is a directory or a file, in
    /// the order in which they came.
    pub(super) fn names(&self) -> Vec<(u64, String, FileType)> {
        let entries = lock(&self.0.entries);
        let row = |share: Arc<Share>| (share.number, share.name.clone(), share.kind);
        let mut all: Vec<_> = topmost(&entries).map(row).collect();
        all.sort_by_key(|row| row.0);
        all
    }

    /// Every tree that is exported.
    pub(super) fn exports(&self) -> Vec<Arc<Export>> {
        let entries = lock(&self.0.entries);
        let mut all: Vec<_> = entries.values().map(|share| share.export()).collect();
        all.sort_by_key(|export| export.view);
        all.dedup_by_key(|export| export.view);
        all
    }

    /// How often entries changed: the root's modification time, in a way.
    pub(super) fn changes(&self) -> u64 {
        self.0.changes.load(Ordering::SeqCst)
    }
}

/// A share of what lies within one that is there; none if there is no such.
fn join(
    entries: &Entries,
    name: &str,
    options: ShareOptions,
    origin: &Origin,
) -> Option<Arc<Share>> {
    for outer in topmost(entries) {
        let (export, above, root, known) = {
            let place = lock(&outer.place);
            let Some((root, known)) = place.root.clone().zip(place.origin.clone()) else {
                continue;
            };
            (place.export.clone(), place.path.clone(), root, known)
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

/// Whether what is to be written can be a part of an export.
fn can_be_written(export: &Export) -> bool {
    export.unseal().unwrap_or_else(|error| {
        log::warn!(
            "virtio-fs: a directory is exported twice, since it can't be made writable: {error}"
        );
        false
    })
}

/// A share that is to be in another export.
pub(super) struct Move {
    pub(super) share: Arc<Share>,
    path: PathBuf,
    /// Its root there.
    pub(super) root: Arc<OwnedFd>,
    /// The mount that this is on.
    pub(super) mount: u64,
    mount_before: u64,
}

impl Move {
    /// None if the share is not to be found there.
    fn of(share: &Arc<Share>, root: &OwnedFd, origin: &Origin, into: &Export) -> Option<Self> {
        let (export, before, own) = {
            let place = lock(&share.place);
            (
                place.export.clone(),
                place.root.clone()?,
                place.origin.clone()?,
            )
        };
        // Directories below a mount of its own would not be known by their present identity.
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
        let mut place = lock(&self.share.place);
        place.export = into.clone();
        place.path = self.path.clone();
        place.root = Some(self.root.clone());
    }
}

/// Whether a share is an entry of the root, and not found within another.
fn is_topmost(entries: &Entries, share: &Share) -> bool {
    !entries.values().any(|other| share.below(other).is_some())
}

fn topmost(entries: &Entries) -> impl Iterator<Item = Arc<Share>> + '_ {
    let shares = entries.values().filter(|share| is_topmost(entries, share));
    shares.cloned()
}

/// Where the guest finds a share.
fn shared(entries: &Entries, share: &Arc<Share>) -> Shared {
    let above = topmost(entries)
        .find_map(|outer| Some(joined(Path::new(&outer.name), &share.below(&outer)?)));
    Shared {
        name: share.name.clone(),
        path: above.unwrap_or_else(|| share.name.clone().into()),
        read_only: share.read_only,
    }
}

/// What `path` leads to, on the host's own mount.
fn open_plain(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    Ok(openat(CWD, path, flags, Mode::empty())?)
}

fn is_on_read_only_mount(plain: &OwnedFd) -> io::Result<bool> {
    let flags = rustix::fs::fstatvfs(plain)?.f_flag;
    Ok(flags.contains(StatVfsMountFlags::RDONLY))
}

/// A path below another, which it is itself if that is empty.
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

fn gone() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl std::fmt::Debug for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "share {}", self.number)
    }
}

#[cfg(test)]
mod tests;
