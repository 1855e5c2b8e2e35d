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
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, Weak};

const PATH: &str = "/proc/self/fd";

/// The directory: the name of an entry is the number of a descriptor.
#[derive(Debug)]
pub struct Directory {
    fd: OwnedFd,
    is_detached: bool,
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
            Ok(fd) => Ok(Self {
                fd,
                is_detached: true,
            }),
            // Without the privilege (or the system call), the host's mount of /proc is used.
            Err(Errno::PERM | Errno::NOSYS | Errno::INVAL) => {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                Ok(Self {
                    fd: openat(CWD, PATH, flags, Mode::empty())?,
                    is_detached: false,
                })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Whether this thread may use it as its root.
    fn can_be_root(&self) -> bool {
        let may = || capabilities(None).is_ok_and(|own| own.effective.contains(ENTERS));
        self.is_detached && may()
    }
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The capability to change the root directory.
const ENTERS: CapabilitySet = CapabilitySet::SYS_CHROOT;

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

    /// Makes the directory the root of this thread and of the threads that it creates. False without the required
    /// privileges.
    ///
    /// # Errors
    /// The error from the kernel.
    pub(crate) fn enter() -> io::Result<bool> {
        if ROOT.with_borrow(Option::is_some) {
            return Ok(true);
        }
        let directory = match Directory::get() {
            Ok(directory) if directory.can_be_root() => directory,
            Ok(_) => return Ok(false),
            // No thread opens anything by that directory then. =>
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        sys::unshare_fs_state()?;
        rustix::process::fchdir(&*directory)?;
        match rustix::process::chroot(c".") {
            Ok(()) => ROOT.set(Some(Self {
                _mounted: directory,
            })),
            // A security module does not permit it.
            Err(Errno::PERM | Errno::ACCESS) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        Ok(true)
    }
}

/// Whether confined threads that use file names have a root of their own.
pub fn can_be_root() -> bool {
    Directory::open().is_ok_and(|directory| directory.can_be_root())
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
    use std::fs;

    /// Runs `work` on a thread of its own with the directory as its root.
    fn within<T: Send>(work: impl FnOnce() -> T + Send) -> Option<T> {
        std::thread::scope(|scope| {
            let entered = || Root::enter().unwrap().then(work);
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
            None => assert!(!can_be_root()),
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
    fn its_users_share_it_and_the_last_one_closes_it() {
        let (one, other) = (Directory::get().unwrap(), Directory::get().unwrap());
        assert!(Arc::ptr_eq(&one, &other));
    }
}
