//! Landlock (Linux 5.13): files, networks and sockets that the kernel denies to a thread, whatever its filter allows. It takes
//! no privileges.
//!
//! A thread that has no use for file names may open none, connect no socket of TCP or UDP, and no abstract Unix socket, as
//! far as the host's version of Landlock has these. Threads that serve files may open what is in their [places](Place), if
//! these are known at their start: a thread's rules can't be extended. That is for processes without the privileges for a root
//! directory of these threads' own.
//!
//! Denied is what a thread *opens*, also by `/proc/self/fd`, creates, renames and removes. Descriptors that are open
//! already, or come from other threads, keep their rights. Not covered by any version: attributes (stat, chmod, utime,
//! setxattr), inotify, and names of files (O_PATH).
//!
//! Not used are the scope of signals, since a filter already limits them to this process, and before Linux 6.15 it denies those
//! between its threads; and the right to connect Unix sockets by path (RESOLVE_UNIX, Linux 7.1): the one thread that may
//! connect does so to sockets that appear, and are replaced, while it runs.

use crate::descriptors;
use crate::sync::lock;
use crate::sys::landlock::{self as calls, Handled};
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

// LANDLOCK_ACCESS_FS_*.
const EXECUTE: u64 = 1;
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
/// All of the first version.
const FIRST: u64 = (1 << 13) - 1;
const REFER: u64 = 1 << 13;
const TRUNCATE: u64 = 1 << 14;
const IOCTL_DEV: u64 = 1 << 15;

// LANDLOCK_ACCESS_NET_*: bind and connect.
const TCP: u64 = 1 | 1 << 1;
const UDP: u64 = 1 << 2 | 1 << 3;

/// LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET.
const ABSTRACT_SOCKETS: u64 = 1;

/// Before this version, files cannot be moved or linked to another directory by a thread with any rules.
const MOVES: i32 = 2;

/// A directory of the host with everything below it, or a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its path.
    pub path: PathBuf,
    /// Whether nothing in it may be changed.
    pub read_only: bool,
}

/// The files that Landlock permits a thread to open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opens {
    /// None.
    Nothing,
    /// Those in its [places](Place).
    Places,
}

/// The version of Landlock's interface, if this kernel has Landlock and it is enabled.
pub fn abi() -> Option<i32> {
    static ABI: OnceLock<Option<i32>> = OnceLock::new();
    // A container's seccomp profile may deny it, too.
    *ABI.get_or_init(|| calls::landlock_abi().ok())
}

/// Whether threads that serve files can be limited to [places](Place): with a later version than the first, in a process
/// without the privileges for a root directory of their own, which would contain no files of the host.
pub fn has_places() -> bool {
    abi().is_some_and(|abi| abi >= MOVES) && !descriptors::may_have_root()
}

/// The operations that a version knows, as far as they are to be denied.
fn handled(abi: i32) -> Handled {
    let since = |first: i32, what: u64| if abi >= first { what } else { 0 };
    Handled {
        files: FIRST | since(MOVES, REFER) | since(3, TRUNCATE) | since(5, IOCTL_DEV),
        network: since(4, TCP) | since(10, UDP),
        scoped: since(6, ABSTRACT_SOCKETS),
    }
}

/// The operations that are allowed in a place. Programs and devices of the host are not executed or controlled in any.
fn allowed(handled: Handled, is_directory: bool, read_only: bool) -> u64 {
    let by_mode = match read_only {
        true => READ_FILE | READ_DIR,
        false => !(EXECUTE | IOCTL_DEV),
    };
    let by_kind = match is_directory {
        true => u64::MAX,
        // The kernel refuses a rule for a file with others.
        false => READ_FILE | WRITE_FILE | TRUNCATE,
    };
    handled.files & by_mode & by_kind
}

/// Rules, for any number of threads.
#[derive(Debug)]
pub(crate) struct Ruleset {
    fd: OwnedFd,
    opens: Opens,
}

impl Ruleset {
    /// Nothing may be opened.
    fn nothing(abi: i32) -> io::Result<Self> {
        Ok(Self {
            fd: calls::create_ruleset(handled(abi))?,
            opens: Opens::Nothing,
        })
    }

    /// Only files in these places may be opened.
    fn places(abi: i32, places: &[Place]) -> io::Result<Self> {
        let handled = handled(abi);
        let fd = calls::create_ruleset(handled)?;
        for place in places {
            let add = || -> io::Result<()> {
                let flags = OFlags::PATH | OFlags::CLOEXEC;
                let file = openat(CWD, &place.path, flags, Mode::empty())?;
                let kind = FileType::from_raw_mode(fstat(&file)?.st_mode);
                let allowed = allowed(handled, kind == FileType::Directory, place.read_only);
                match calls::allow_beneath(fd.as_fd(), file.as_fd(), allowed) {
                    // A file that no path leads to, such as a memfd in /proc: the kernel allows it without a rule.
                    Err(error) if error.raw_os_error() == Some(libc::EBADFD) => Ok(()),
                    added => added,
                }
            };
            add().map_err(|error| {
                let text = format!("no rule of Landlock for {}: {error}", place.path.display());
                io::Error::new(error.kind(), text)
            })?;
        }
        Ok(Self {
            fd,
            opens: Opens::Places,
        })
    }

    /// Restricts the calling thread, and those that it creates. It must have `no_new_privs`.
    ///
    /// # Errors
    /// The error from the kernel.
    pub(crate) fn restrict(&self) -> io::Result<()> {
        match calls::restrict_self(self.fd.as_fd()) {
            Ok(()) => {
                note(self.opens);
                Ok(())
            }
            // All 16 layers that the kernel permits are in use: the caller of this program has restricted itself.
            Err(error) if error.raw_os_error() == Some(libc::E2BIG) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// The rules for threads that a thread creates.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rules {
    /// For those that serve files and have no root directory of their own.
    files: Option<Arc<Ruleset>>,
    others: Option<Arc<Ruleset>>,
}

impl Rules {
    /// Those that this host can have. Without places, threads that serve files have none.
    ///
    /// # Errors
    /// The error from the kernel, or the place that does not exist.
    pub(crate) fn new(places: Option<&[Place]>) -> io::Result<Self> {
        let Some(abi) = abi() else {
            return Ok(Self::default());
        };
        let files = match places {
            Some(places) if has_places() => Some(Arc::new(Ruleset::places(abi, places)?)),
            _ => None,
        };
        Ok(Self {
            files,
            others: Some(Arc::new(Ruleset::nothing(abi)?)),
        })
    }

    /// Makes these the rules for threads that the calling thread creates. Returns those before.
    pub(crate) fn replace(self) -> Self {
        RULES.replace(self)
    }
}

thread_local! {
    static RULES: RefCell<Rules> = const {
        RefCell::new(Rules {
            files: None,
            others: None,
        })
    };
    static OWN: RefCell<Option<Noted>> = const { RefCell::new(None) };
}

/// What a new thread gets from its creator.
pub(crate) struct PassedOn {
    /// The restrictions that it inherits.
    inherited: Option<Opens>,
    ruleset: Option<Arc<Ruleset>>,
}

impl PassedOn {
    /// For a thread that is confined or not, and that uses file names or not.
    pub(crate) fn new(is_confined: bool, uses_names: bool) -> Self {
        let inherited = OWN.with_borrow(|own| own.as_ref().map(|noted| noted.opens));
        // Rules that are inherited are not extended: its filter, which is inherited too, does not allow that.
        let needs = is_confined && inherited.is_none();
        let ruleset = RULES.with_borrow(|rules| match uses_names {
            _ if !needs => None,
            true => rules.files.clone(),
            false => rules.others.clone(),
        });
        Self { inherited, ruleset }
    }

    /// Notes, on the new thread, what it has inherited. Returns the rules that are to be put into force.
    pub(crate) fn arrive(self) -> Option<Arc<Ruleset>> {
        if let Some(opens) = self.inherited {
            note(opens);
        }
        self.ruleset
    }
}

/// The restricted threads: the kernel does not report them.
static THREADS: Mutex<BTreeMap<u32, Opens>> = Mutex::new(BTreeMap::new());

/// An entry there, until the thread ends.
struct Noted {
    thread: u32,
    opens: Opens,
}

impl Drop for Noted {
    fn drop(&mut self) {
        lock(&THREADS).remove(&self.thread);
    }
}

fn note(opens: Opens) {
    let thread = thread_id();
    OWN.set(Some(Noted { thread, opens }));
    lock(&THREADS).insert(thread, opens);
}

fn thread_id() -> u32 {
    rustix::thread::gettid()
        .as_raw_nonzero()
        .get()
        .unsigned_abs()
}

/// What Landlock permits a thread of this process to open, by its ID. `None` if Koya has not restricted it.
pub fn opens(thread: u32) -> Option<Opens> {
    lock(&THREADS).get(&thread).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{RenameFlags, renameat_with};
    use std::fs;
    use std::path::Path;

    fn place(path: &Path, read_only: bool) -> Place {
        Place {
            path: path.to_owned(),
            read_only,
        }
    }

    /// Runs `work` on a thread with these rules.
    fn within<T: Send>(ruleset: &Ruleset, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let restricted = scope.spawn(|| {
                rustix::thread::set_no_new_privs(true).unwrap();
                ruleset.restrict().unwrap();
                work()
            });
            restricted.join().unwrap()
        })
    }

    #[test]
    fn each_version_has_its_operations() {
        let of = |abi| {
            let Handled {
                files,
                network,
                scoped,
            } = handled(abi);
            (files, network, scoped)
        };
        assert_eq!(of(1), (0x1fff, 0, 0));
        assert_eq!(of(2), (0x3fff, 0, 0));
        assert_eq!(of(3), (0x7fff, 0, 0));
        assert_eq!(of(4), (0x7fff, 3, 0));
        assert_eq!(of(5), (0xffff, 3, 0));
        assert_eq!(of(6), (0xffff, 3, 1));
        assert_eq!(of(9), (0xffff, 3, 1));
        assert_eq!(of(10), (0xffff, 15, 1));
        assert_eq!(of(99), of(10));
    }

    #[test]
    fn a_place_allows_what_its_mode_and_kind_have() {
        let all = handled(10);
        assert_eq!(allowed(all, true, false), 0x7ffe);
        assert_eq!(allowed(all, true, true), READ_FILE | READ_DIR);
        assert_eq!(
            allowed(all, false, false),
            READ_FILE | WRITE_FILE | TRUNCATE
        );
        assert_eq!(allowed(all, false, true), READ_FILE);
        // Nothing that the version does not know.
        assert_eq!(allowed(handled(2), false, false), READ_FILE | WRITE_FILE);
    }

    #[test]
    fn only_files_in_its_places_are_opened_by_a_thread() {
        let Some(abi) = abi().filter(|abi| *abi >= MOVES) else {
            return;
        };
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["open/a", "open/b", "sealed"] {
            fs::create_dir_all(at(name)).unwrap();
        }
        for name in ["open/a/file", "sealed/file", "alone", "other"] {
            fs::write(at(name), "text").unwrap();
        }
        let places = [
            place(&at("open"), false),
            place(&at("sealed"), true),
            place(&at("alone"), false),
        ];
        let ruleset = Ruleset::places(abi, &places).unwrap();
        let path_only = |name: &str| openat(CWD, at(name), OFlags::PATH, Mode::empty()).unwrap();
        let (share, other) = (path_only("open"), path_only("other"));
        within(&ruleset, || {
            fs::write(at("open/a/new"), "text").unwrap();
            fs::write(at("alone"), "more").unwrap();
            assert_eq!(fs::read(at("sealed/file")).unwrap(), b"text");
            // As of every thread that serves files.
            let flags = RenameFlags::empty();
            renameat_with(&share, "a/file", &share, "b/file", flags).unwrap();
            fs::hard_link(at("open/b/file"), at("open/a/file")).unwrap();
            assert!(fs::read_dir(descriptors::path(share.as_fd())).is_ok());
            let denied = [
                fs::read(at("other")).map(drop),
                fs::read(descriptors::path(other.as_fd())).map(drop),
                fs::read(at("open/../other")).map(drop),
                fs::write(at("sealed/file"), "more"),
                fs::write(at("new"), "text"),
                fs::remove_file(at("other")),
                fs::remove_file(at("sealed/file")),
                fs::rename(at("open/b/file"), at("file")),
            ];
            for (number, denied) in denied.into_iter().enumerate() {
                let kind = denied.unwrap_err().kind();
                assert!(
                    matches!(
                        kind,
                        io::ErrorKind::PermissionDenied | io::ErrorKind::CrossesDevices
                    ),
                    "{number}: {kind}"
                );
            }
        });
        // Other threads are not affected.
        assert_eq!(fs::read(at("other")).unwrap(), b"text");
        let missing = Ruleset::places(abi, &[place(&at("missing"), true)]).unwrap_err();
        assert!(missing.to_string().contains("missing"), "{missing}");
    }

    #[test]
    fn restricted_threads_are_known_while_they_run() {
        let Some(abi) = abi() else {
            return;
        };
        let ruleset = Ruleset::nothing(abi).unwrap();
        let (thread, inherited) = within(&ruleset, || {
            assert_eq!(opens(thread_id()), Some(Opens::Nothing));
            assert!(fs::read("/etc/passwd").is_err());
            let passed_on = PassedOn::new(true, true);
            assert!(passed_on.ruleset.is_none(), "there is no second layer");
            (thread_id(), passed_on.inherited)
        });
        assert_eq!(inherited, Some(Opens::Nothing));
        assert_eq!(opens(thread), None, "it has ended");
        assert_eq!(opens(thread_id()), None);
    }
}
