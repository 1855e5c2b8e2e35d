//! Confines threads: a seccomp filter for each role, no new privileges, no capability that the role does not use, and, for
//! those that use file names, a root directory without files of the host. [`landlock`] denies files and networks besides.
//!
//! A thread is confined at its start if its [role](crate::threads::Role) names a [`Filter`] and its creator
//! asked for it ([`confine_new_threads`]) or is confined itself. Filters are inherited: a thread that a
//! confined one creates has both filters, and can do what both allow.
//!
//! All threads of a process share its memory. Code that a guest gets to run in one thread can therefore write
//! to the stack of another one and act with that thread's privileges. A filter directly limits only the system calls of its
//! own thread: it contains a confused device model, and is one more obstacle for an attacker who controls it.

mod calls;
pub mod landlock;
mod program;

use crate::descriptors::Root;
use calls::{CALLS, Call, OTHER_NAMES, OWN_CALLS};
use landlock::{Place, Rules, Ruleset};
use program::Verdict;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, set_capabilities,
};
use seccompiler::BpfProgram;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::sync::OnceLock;

/// The filter of a confined thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// Runs a vCPU.
    Vcpu,
    /// Runs the workers of devices: vsock, balloon, memory, entropy.
    EventLoop,
    /// Activates devices and creates their threads.
    Starter,
    /// Serves a queue of a disk.
    Block,
    /// Serves a queue pair of a network.
    Net,
    /// Accepts clients of a vsock device's Unix socket.
    VsockSockets,
    /// Connects to the Unix sockets of a vsock device's ports.
    VsockConnector,
    /// Serves the requests of a virtio-fs device.
    Files,
}

/// The capabilities for serving files: any owner, any mode, device nodes. Not CAP_DAC_READ_SEARCH, which opens
/// any file of a file system by its handle.
const OF_FILES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

impl Filter {
    /// All filters.
    pub const ALL: [Self; 8] = [
        Self::Vcpu,
        Self::EventLoop,
        Self::Starter,
        Self::Block,
        Self::Net,
        Self::VsockSockets,
        Self::VsockConnector,
        Self::Files,
    ];

    const fn bit(self) -> u8 {
        1 << self as u8
    }

    /// Whether its threads create others.
    const fn creates_threads(self) -> bool {
        matches!(self, Self::Starter | Self::VsockSockets | Self::Files)
    }

    /// Whether its threads use file names, none of which must lead to the host's files.
    pub const fn has_own_root(self) -> bool {
        matches!(self, Self::Starter | Self::Files)
    }

    /// Whether its threads are the starter or created by it, so that they have the starter's root directory and rules of
    /// [`landlock`].
    pub const fn is_of_starter(self) -> bool {
        matches!(self, Self::Starter | Self::Files | Self::Block | Self::Net)
    }

    /// The capabilities that its threads keep if they have them. The starter keeps those that a device thread may need.
    pub fn capabilities(self) -> CapabilitySet {
        match self {
            Self::Files | Self::Starter => OF_FILES,
            _ => CapabilitySet::empty(),
        }
    }

    /// The names of the allowed system calls, in order.
    pub fn call_names(self) -> Vec<&'static str> {
        let allowed = rows().filter(|row| row.filters & self.bit() != 0);
        let mut names: Vec<_> = allowed.map(|row| name(row.symbol)).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The compiled filter. It is the same for all threads, and compiled once.
    fn program(self) -> io::Result<&'static BpfProgram> {
        static PROGRAMS: [OnceLock<BpfProgram>; 8] = [const { OnceLock::new() }; 8];
        let place = &PROGRAMS[self as usize];
        match place.get() {
            Some(program) => Ok(program),
            None => {
                let program = program::of(&verdicts(self))?;
                Ok(place.get_or_init(|| program))
            }
        }
    }
}

/// The filter's decisions for the calls that it does not trap.
fn verdicts(filter: Filter) -> BTreeMap<u32, Verdict> {
    let mut verdicts = BTreeMap::new();
    for row in rows().filter(|row| row.filters & filter.bit() != 0) {
        let number = row.number as u32;
        let verdict = verdicts.entry(number).or_insert(Verdict::If(Vec::new()));
        match verdict {
            Verdict::If(alternatives) if !row.arguments.is_empty() => {
                alternatives.push(row.arguments)
            }
            other => *other = Verdict::Always(program::ALLOW),
        }
    }
    if filter.creates_threads() {
        // clone3(2) has its flags in memory, where a filter cannot see them. C libraries use clone(2) instead if the
        // kernel does not have it.
        let missing = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
        verdicts.insert(libc::SYS_clone3 as u32, Verdict::Always(missing));
    }
    verdicts
}

fn rows() -> impl Iterator<Item = &'static Call> {
    CALLS.iter().chain(OWN_CALLS)
}

/// The name of a system call that some filter mentions.
pub(crate) fn call_name(number: libc::c_long) -> Option<&'static str> {
    let known = rows().map(|row| (row.symbol, row.number));
    let mut known = known.chain(OTHER_NAMES.iter().copied());
    let (symbol, _) = known.find(|(_, known)| *known == number)?;
    Some(name(symbol))
}

/// The kernel's name for a system call.
fn name(symbol: &'static str) -> &'static str {
    symbol.strip_prefix("SYS_").unwrap_or(symbol)
}

thread_local! {
    static CONFINES: Cell<bool> = const { Cell::new(false) };
}

/// Whether threads that this thread creates are confined by their roles.
pub(crate) fn confines() -> bool {
    CONFINES.get()
}

/// Sets, while this value lives, whether threads created by the calling thread are confined by their roles.
#[derive(Debug)]
pub struct ConfineNewThreads {
    before: bool,
    rules_before: Rules,
    /// Keeps it on its thread: it is not `Send`.
    _thread: std::marker::PhantomData<*const ()>,
}

/// Sets whether threads created by this thread are confined, until the result is dropped. Confined threads pass the setting
/// on to those that they create. By default threads are not confined.
///
/// # Errors
/// If the kernel has no seccomp filters, or the host has no descriptor left.
pub fn confine_new_threads(on: bool) -> io::Result<ConfineNewThreads> {
    confine_new_threads_to(on, None)
}

/// As [`confine_new_threads`]. Threads that use file names, and have no root directory of their own, may open only files in
/// these places, as far as the kernel has [Landlock](landlock).
///
/// # Errors
/// As [`confine_new_threads`], or the place that does not exist.
pub fn confine_new_threads_to(on: bool, places: Option<&[Place]>) -> io::Result<ConfineNewThreads> {
    let rules = match on {
        true => {
            check_host()?;
            Rules::new(places)?
        }
        false => Rules::default(),
    };
    Ok(ConfineNewThreads {
        before: CONFINES.replace(on),
        rules_before: rules.replace(),
        _thread: std::marker::PhantomData,
    })
}

impl Drop for ConfineNewThreads {
    fn drop(&mut self) {
        CONFINES.set(self.before);
        std::mem::take(&mut self.rules_before).replace();
    }
}

/// Checks that the kernel has seccomp filters.
///
/// # Errors
/// If it has none.
pub fn check_host() -> io::Result<()> {
    if crate::sys::has_seccomp_filters() {
        return Ok(());
    }
    let text = "this kernel has no seccomp filters (CONFIG_SECCOMP_FILTER)";
    Err(io::Error::new(io::ErrorKind::Unsupported, text))
}

/// Confines the calling thread for good.
///
/// # Errors
/// The error from the kernel. The thread may be confined in part, and must end.
pub(crate) fn confine(filter: Filter, ruleset: Option<&Ruleset>) -> io::Result<()> {
    let has_root = filter.has_own_root() && Root::enter_if_possible()?;
    keep_capabilities(filter.capabilities())?;
    rustix::thread::set_no_new_privs(true)?;
    // Its own root directory contains no files of the host.
    if let Some(ruleset) = ruleset.filter(|_| !has_root) {
        ruleset.restrict()?;
    }
    seccompiler::apply_filter(filter.program()?).map_err(io::Error::other)?;
    CONFINES.set(true);
    Ok(())
}

/// Drops all capabilities of this thread but these. Those for new programs (inheritable, ambient) are cleared: confined
/// threads execute none, and programs of root have those of the bounding set.
pub(crate) fn keep_capabilities(kept: CapabilitySet) -> io::Result<()> {
    let had = capabilities(None)?;
    if had.permitted.is_empty() && had.inheritable.is_empty() {
        return Ok(());
    }
    // Fails before Linux 4.3, where there is nothing to clear.
    clear_ambient_capability_set().ok();
    set_capabilities(
        None,
        CapabilitySets {
            effective: had.effective & kept,
            permitted: had.permitted & kept,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Filters are inherited: calls denied to the starter are denied to the threads that it creates.
    #[test]
    fn the_starter_has_all_calls_of_device_threads() {
        let starter = Filter::Starter.call_names();
        for filter in [Filter::Block, Filter::Net, Filter::Files] {
            let missing: Vec<_> = filter
                .call_names()
                .into_iter()
                .filter(|name| !starter.contains(name))
                .collect();
            assert!(missing.is_empty(), "{filter:?}: {missing:?}");
            let lacks = !Filter::Starter.capabilities() & filter.capabilities();
            assert!(lacks.is_empty(), "{filter:?}: {lacks:?}");
        }
    }

    #[test]
    fn every_call_has_a_reason_and_every_filter_compiles() {
        for row in rows() {
            assert!(!row.reason.is_empty(), "{}", row.symbol);
            assert_eq!(call_name(row.number), Some(name(row.symbol)));
        }
        for filter in Filter::ALL {
            // BPF_MAXINSNS.
            assert!((1..4096).contains(&filter.program().unwrap().len()));
        }
    }
}
