//! Starts threads by role. A role sets the name shown by Linux, the signals that reach the thread, its right to create
//! threads, and its confinement ([`walls`]). `docs/architecture.md` lists the roles.
//!
//! seccomp filters and capabilities are per thread and inherited by the threads it creates. A thread that
//! serves a guest therefore creates none: otherwise it could not be more restricted than its children need. A
//! thread that creates threads on behalf of others does nothing else.

use crate::descriptors::Root;
use crate::sys;
use crate::walls::{self, Filter, landlock};
use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Stack size of a thread in bytes: enough for everything Koya's threads do, and less than a huge page. If
/// the host backs all memory with huge pages, it backs a larger stack with one as soon as it is touched
/// (glibc disables that, musl does not): 2 MiB for each thread instead of a few KiB.
pub const STACK: usize = 1 << 20;
const _: () = assert!(STACK < 2 << 20, "as large as a huge page");

/// The signals that reach a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Signals {
    /// The same as for the creating thread.
    Inherited,
    /// None: handlers run on threads of the process's owner.
    Blocked,
}

/// The role of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Role {
    name: &'static str,
    signals: Signals,
    may_create_threads: bool,
    filter: Option<Filter>,
}

impl Role {
    /// A role with this name; Linux shows 15 bytes of it. Its threads inherit the signal mask of their
    /// creator.
    pub const fn new(name: &'static str) -> Self {
        Self {
            name,
            signals: Signals::Inherited,
            may_create_threads: true,
            filter: None,
        }
    }

    /// This role with all signals blocked.
    #[must_use]
    pub const fn without_signals(self) -> Self {
        Self {
            signals: Signals::Blocked,
            ..self
        }
    }

    /// This role for threads that serve a guest: they may not create threads, and all signals are blocked.
    #[must_use]
    pub const fn guest_facing(self) -> Self {
        Self {
            signals: Signals::Blocked,
            may_create_threads: false,
            ..self
        }
    }

    /// This role with a filter, applied to threads where confinement is on
    /// ([`confine_new_threads`](walls::confine_new_threads)).
    #[must_use]
    pub const fn confined_by(self, filter: Filter) -> Self {
        Self {
            filter: Some(filter),
            ..self
        }
    }

    /// The name.
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The state that a thread of this role inherits from the calling thread.
    fn passed_on(self) -> PassedOn {
        let filter = self.filter.filter(|_| walls::confines());
        let uses_names = filter.is_some_and(Filter::has_own_root);
        PassedOn {
            filter,
            root: Root::own(),
            landlock: landlock::PassedOn::new(filter.is_some(), uses_names),
        }
    }

    /// Gives the calling thread this role.
    ///
    /// # Panics
    /// If the host cannot confine it: it must not do its work then. The presence of filters was checked when
    /// confinement was turned on.
    fn enter(self, passed_on: PassedOn) {
        if self.signals == Signals::Blocked {
            sys::block_signals();
        }
        CURRENT.set(Some(self));
        Root::pass_on(passed_on.root);
        let ruleset = passed_on.landlock.arrive();
        if let Some(filter) = passed_on.filter
            && let Err(error) = walls::confine(filter, ruleset.as_deref())
        {
            panic!("cannot confine a thread of {}: {error}", self.name);
        }
    }
}

/// State inherited by a new thread from its creator.
struct PassedOn {
    /// The filter that confines it.
    filter: Option<Filter>,
    root: Option<Root>,
    landlock: landlock::PassedOn,
}

/// A role with a name and default properties.
impl From<&'static str> for Role {
    fn from(name: &'static str) -> Self {
        Self::new(name)
    }
}

thread_local! {
    static CURRENT: Cell<Option<Role>> = const { Cell::new(None) };
}

/// The role of the calling thread, if it was started by this module.
pub fn current_role() -> Option<Role> {
    CURRENT.get()
}

/// Starts a thread.
///
/// # Errors
/// If the host cannot create a thread, or the calling thread's role forbids it.
pub fn spawn<T: Send + 'static>(
    role: impl Into<Role>,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let role = role.into();
    let passed_on = role.passed_on();
    let entered = move || {
        role.enter(passed_on);
        work()
    };
    builder(role.name.to_owned())?.spawn(entered)
}

/// As [`spawn`], for one of several threads of a role: the number becomes part of its name.
///
/// # Errors
/// As [`spawn`].
pub fn spawn_numbered<T: Send + 'static>(
    role: Role,
    number: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let passed_on = role.passed_on();
    let entered = move || {
        role.enter(passed_on);
        work()
    };
    builder(format!("{}{number}", role.name))?.spawn(entered)
}

/// As [`spawn`], for a scoped thread.
///
/// # Errors
/// As [`spawn`].
pub fn spawn_scoped<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    role: impl Into<Role>,
    work: impl FnOnce() -> T + Send + 'scope,
) -> io::Result<ScopedJoinHandle<'scope, T>> {
    let role = role.into();
    let passed_on = role.passed_on();
    let entered = move || {
        role.enter(passed_on);
        work()
    };
    builder(role.name.to_owned())?.spawn_scoped(scope, entered)
}

fn builder(name: String) -> io::Result<Builder> {
    if let Some(role) = current_role()
        && !role.may_create_threads
    {
        let text = format!(
            "a thread of {} starts no others, but {name} here",
            role.name
        );
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    Ok(Builder::new().name(name).stack_size(STACK))
}

/// The threads of a device. Dropping this does not stop them: the device must wake them from other waits.
pub struct Threads {
    role: Role,
    stop: Arc<EventFd>,
    running: Vec<JoinHandle<()>>,
}

impl Threads {
    /// No threads yet; each will have this role.
    ///
    /// # Errors
    /// If the host has no file descriptor left.
    pub fn new(role: Role) -> io::Result<Self> {
        Ok(Self {
            role,
            stop: Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?),
            running: Vec::new(),
        })
    }

    /// Becomes readable when the threads must stop. No thread reads it, so it stays readable for all.
    pub fn stop_event(&self) -> &Arc<EventFd> {
        &self.stop
    }

    /// Starts a thread.
    ///
    /// # Errors
    /// As [`spawn`].
    pub fn spawn(&mut self, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.running.push(spawn(self.role, work)?);
        Ok(())
    }

    /// Takes over a thread that waits for the [stop event](Self::stop_event) likewise.
    pub fn adopt(&mut self, thread: JoinHandle<()>) {
        self.running.push(thread);
    }

    /// Signals all threads to stop and joins them.
    pub fn stop(&mut self) {
        self.stop.write(1).ok();
        for thread in self.running.drain(..) {
            if thread.join().is_err() {
                log::error!("a thread of {} panicked", self.role.name);
            }
        }
        self.stop.read().ok();
    }

    /// Whether there are no threads.
    pub fn is_empty(&self) -> bool {
        self.running.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAF: Role = Role::new("koya-leaf").guest_facing();

    fn own(file: &str) -> String {
        std::fs::read_to_string(format!("/proc/thread-self/{file}")).unwrap()
    }

    fn blocked_signals() -> u64 {
        let status = own("status");
        let line = status.lines().find_map(|l| l.strip_prefix("SigBlk:"));
        u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
    }

    #[test]
    fn a_thread_has_its_role_as_name() {
        let name = || own("comm");
        let plain = spawn("koya-test", name).unwrap().join().unwrap();
        assert_eq!(plain.trim(), "koya-test");
        let numbered = spawn_numbered(LEAF, 3, name).unwrap().join().unwrap();
        assert_eq!(numbered.trim(), "koya-leaf3");
    }

    #[test]
    fn a_thread_has_the_signal_mask_of_its_role() {
        let before = blocked_signals();
        let inherited = spawn("koya-test", blocked_signals).unwrap();
        assert_eq!(inherited.join().unwrap(), before);
        let quiet = Role::new("koya-quiet").without_signals();
        for role in [quiet, LEAF] {
            let blocked = spawn(role, blocked_signals).unwrap().join().unwrap();
            // All except SIGKILL, SIGSTOP, SIGSYS and the few that a C library keeps for itself.
            assert!(blocked.count_ones() >= 58, "{blocked:#x}");
        }
    }

    #[test]
    fn a_guest_facing_thread_creates_no_threads() {
        let refused = || {
            let plain = spawn("koya-other", || ()).map(drop);
            let scoped = std::thread::scope(|s| spawn_scoped(s, "koya-other", || ()).map(drop));
            [plain, scoped].map(|tried| tried.unwrap_err().kind())
        };
        let refused = spawn(LEAF, refused).unwrap().join().unwrap();
        assert_eq!(refused, [io::ErrorKind::PermissionDenied; 2]);
        let allowed = spawn("koya-test", || spawn("koya-other", || ()).is_ok());
        assert!(allowed.unwrap().join().unwrap());
    }
}
