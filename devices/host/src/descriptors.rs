//! `/proc/self/fd`, by which a process reopens its own descriptors with other flags.
//!
//! A process that may mount has it on a detached mount: `..` of its root is the root, so neither `/proc/self/mem` nor
//! anything else of the host can be reached from it. Confined threads that use file names have this directory as their root
//! ([`walls`](crate::walls)): an absolute path leads them to an open descriptor of the process, or nowhere.
//!
//! All open descriptors of the process are within their reach. A descriptor of a directory on a mount of the host would lead
//! them out again, by `..`. So every descriptor that a machine keeps open must be a file, or be detached likewise, as the
//! shares of virtio-fs are.

use crate::sync::lock;
use crate::sys;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::thread::{CapabilitySet, capabilities};
use std::cell::RefCell;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, Once, Weak};

const PATH: &str = "/proc/self/fd";

/// The directory: the name of an entry is the number of a descriptor.
#[derive(Debug)]
pub struct Directory {
    fd: OwnedFd,
    /// Why it is not on a detached mount.
    refused: Option<Errno>,
}

impl Directory {
    /// The directory of this process. It is shared, since unmounting takes the host some time.
    ///
    /// # Errors
    /// If `/proc` is not mounted, or the process has no descriptor left.
    pub fn get() -> io::Result<Arc<Self>> {
        // A child process has another one.
        static SHARED: Mutex<(u32, Weak<Directory>)> = Mutex::new((0, Weak::new()));
        let mut shared = lock(&SHARED);
        let own = std::process::id();
        if let (process, directory) = &*shared
            && *process == own
            && let Some(directory) = directory.upgrade()
        {
            return Ok(directory);
        }
        let directory = Arc::new(Self::open()?);
        *shared = (own, Arc::downgrade(&directory));
        Ok(directory)
    }

    fn open() -> io::Result<Self> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        match open_tree(CWD, PATH, flags) {
            Ok(fd) => Ok(Self { fd, refused: None }),
            // Without the privilege (or the system call), the host's mount of /proc is used.
            Err(error @ (Errno::PERM | Errno::NOSYS | Errno::INVAL)) => {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                Ok(Self {
                    fd: openat(CWD, PATH, flags, Mode::empty())?,
                    refused: Some(error),
                })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Whether this thread may use it as its root.
    fn check_root(&self) -> Result<(), NoRoot> {
        match self.refused {
            None if has(ENTERS) => Ok(()),
            Some(error) if has(ENTERS | MOUNTS) && is_in_first_user_namespace() => {
                Err(NoRoot::Mount(error))
            }
            _ => Err(NoRoot::Unprivileged),
        }
    }
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The capability to change the root directory.
const ENTERS: CapabilitySet = CapabilitySet::SYS_CHROOT;
/// The capability to make a detached mount.
const MOUNTS: CapabilitySet = CapabilitySet::SYS_ADMIN;

/// Whether this thread has these capabilities.
fn has(needed: CapabilitySet) -> bool {
    capabilities(None).is_ok_and(|own| own.effective.contains(needed))
}

/// Whether this thread has the privileges for a root directory of its own. The host may refuse it all the same.
pub(crate) fn may_have_root() -> bool {
    has(ENTERS | MOUNTS)
}

/// Whether the capabilities of this process are those over the host. In a user namespace of its own a process has all of
/// them, but may not change the mounts of the host.
fn is_in_first_user_namespace() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// Why a confined thread that uses file names has no root directory of its own.
#[derive(Debug)]
pub enum NoRoot {
    /// Its process lacks a capability over the host.
    Unprivileged,
    /// `/proc` is not mounted.
    Proc,
    /// The host refuses a detached mount, although the process has the privileges.
    Mount(Errno),
    /// The host refuses the new root, although the process has the privileges.
    Chroot(Errno),
    /// Another call failed.
    Failed(io::Error),
}

impl fmt::Display for NoRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unprivileged => f.write_str(
                "the process lacks CAP_SYS_ADMIN or CAP_SYS_CHROOT in the first user namespace",
            ),
            Self::Proc => f.write_str("/proc is not mounted"),
            Self::Mount(error) => write!(
                f,
                "the host refuses a detached mount of {PATH} (open_tree: {error})"
            ),
            Self::Chroot(error) => {
                write!(
                    f,
                    "the host refuses it, perhaps by a security module (chroot: {error})"
                )
            }
            Self::Failed(error) => error.fmt(f),
        }
    }
}

impl From<Errno> for NoRoot {
    fn from(error: Errno) -> Self {
        Self::Failed(error.into())
    }
}

impl From<io::Error> for NoRoot {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

thread_local! {
    /// Root directory of this thread, which it also keeps mounted.
    static ROOT: RefCell<Option<Root>> = const { RefCell::new(None) };
}

/// The root directory of a thread, to be [passed on](Root::pass_on) to the threads that it creates.
#[derive(Clone, Debug)]
pub(crate) struct Root {
    _mounted: Arc<Directory>,
}

impl Root {
    /// The root of the calling thread, if it is not that of the process.
    pub(crate) fn own() -> Option<Self> {
        ROOT.with_borrow(Clone::clone)
    }

    /// Records that the calling thread has inherited this root from its creator.
    pub(crate) fn pass_on(root: Option<Self>) {
        ROOT.set(root);
    }

    /// Makes the directory the root of this thread and of the threads that it creates.
    ///
    /// # Errors
    /// Why it has none.
    pub(crate) fn enter() -> Result<(), NoRoot> {
        if ROOT.with_borrow(Option::is_some) {
            return Ok(());
        }
        let directory = match Directory::get() {
            Ok(directory) => directory,
            // No thread opens anything by that directory then.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(NoRoot::Proc),
            Err(error) => return Err(error.into()),
        };
        directory.check_root()?;
        sys::unshare_fs_state()?;
        rustix::process::fchdir(&*directory)?;
        match rustix::process::chroot(c".") {
            Ok(()) => ROOT.set(Some(Self {
                _mounted: directory,
            })),
            Err(error @ (Errno::PERM | Errno::ACCESS)) => return Err(NoRoot::Chroot(error)),
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// [Enters](Self::enter) the root where the host permits it. Otherwise the thread is confined without one, and a process
    /// with the privileges for it says so once. Returns whether it has one.
    ///
    /// # Errors
    /// The error from the kernel, if it is none of those of a host that does not permit it.
    pub(crate) fn enter_if_possible() -> io::Result<bool> {
        static SAID: Once = Once::new();
        match Self::enter() {
            Ok(()) => return Ok(true),
            Err(NoRoot::Unprivileged) => {}
            Err(NoRoot::Failed(error)) => return Err(error),
            Err(why) => SAID.call_once(|| {
                log::warn!(
                    "threads that serve files are confined without a root directory of their own, and see \
                     the host's files: {why}"
                );
            }),
        }
        Ok(false)
    }
}

/// Whether confined threads that use file names have a root of their own: tried by a thread that ends.
///
/// # Errors
/// Why they have none.
pub fn check_own_root() -> Result<(), NoRoot> {
    std::thread::scope(|scope| {
        let tries = std::thread::Builder::new().spawn_scoped(scope, Root::enter)?;
        let failed = |_| NoRoot::Failed(io::Error::other("the thread that tried it panicked"));
        tries.join().map_err(failed)?
    })
}

/// A path by which the calling thread can open the file of a descriptor, which may be O_PATH.
pub fn path(fd: BorrowedFd<'_>) -> String {
    let number = fd.as_raw_fd();
    match ROOT.with_borrow(Option::is_some) {
        true => format!("/{number}"),
        false => format!("{PATH}/{number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::walls::keep_capabilities;
    use std::fs;

    /// Runs `work` on a thread of its own with the directory as its root.
    fn within<T: Send>(work: impl FnOnce() -> T + Send) -> Option<T> {
        std::thread::scope(|scope| {
            let entered = || Root::enter().ok().map(|()| work());
            scope.spawn(entered).join().unwrap()
        })
    }

    #[test]
    fn nothing_of_the_host_is_reached_from_it() {
        assert!(fs::exists("/proc/self/mem").unwrap());
        let found = within(|| {
            let directory = Directory::get().unwrap();
            let paths = [
                "/etc",
                "/proc",
                "../mem",
                "/../mem",
                "../..",
                "../../etc",
                "/mem",
                "/self/mem",
            ];
            let open = |from: BorrowedFd<'_>, path: &str| {
                openat(from, path, OFlags::PATH, Mode::empty()).ok()
            };
            let inode = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).unwrap().st_ino;
            let own = inode(directory.as_fd());
            let found = paths
                .iter()
                .flat_map(|path| [open(directory.as_fd(), path), open(CWD, path)]);
            // `..` is the directory itself.
            let others = found.flatten().filter(|fd| inode(fd.as_fd()) != own);
            others.count()
        });
        match found {
            Some(others) => assert_eq!(others, 0),
            None => assert!(check_own_root().is_err()),
        }
    }

    #[test]
    fn a_descriptor_is_opened_again_by_its_path_with_a_root_and_without() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), "text").unwrap();
        let fd = openat(CWD, dir.path().join("a"), OFlags::PATH, Mode::empty()).unwrap();
        assert_eq!(fs::read(path(fd.as_fd())).unwrap(), b"text");
        within(|| {
            assert_eq!(path(fd.as_fd()), format!("/{}", fd.as_raw_fd()));
            assert_eq!(fs::read(path(fd.as_fd())).unwrap(), b"text");
        });
        // Only the thread has the new root.
        assert!(fs::exists("/proc/self/fd").unwrap());
    }

    #[test]
    fn a_thread_without_the_capability_says_so() {
        let why = std::thread::scope(|scope| {
            let tried = || {
                keep_capabilities(CapabilitySet::empty()).unwrap();
                assert!(!Root::enter_if_possible().unwrap() && !may_have_root());
                Root::enter().unwrap_err()
            };
            scope.spawn(tried).join().unwrap()
        });
        assert!(matches!(why, NoRoot::Unprivileged), "{why}");
        assert!(why.to_string().contains("CAP_SYS_CHROOT"), "{why}");
    }

    #[test]
    fn its_users_share_it_and_the_last_one_closes_it() {
        let (one, other) = (Directory::get().unwrap(), Directory::get().unwrap());
        assert!(Arc::ptr_eq(&one, &other));
    }
}
