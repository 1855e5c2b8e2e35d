//! Settings of a program that holds sandboxes, made at its start while it has one thread.

use crate::sys;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::process::{Resource, Rlimit, getpid, getrlimit, setrlimit};
use rustix::thread::{CoreSchedulingScope, create_core_scheduling_cookie};
use std::io;

/// The size of the descriptor table, in entries of 8 bytes: the default soft limit of a process.
const DESCRIPTORS: i32 = 1024;

/// Makes all threads allocate from one heap, gives the descriptor table its usual size, enables reports of seccomp
/// violations, disables core dumps unless requested (prlimit(1)), and unblocks signals that the caller had blocked. Libraries
/// must leave it to the program.
pub fn prepare_process() {
    sys::unblock_signals();
    sys::share_heap();
    sys::report_violations();
    dump_no_core();
    reserve_descriptors();
}

/// Lets the threads of this process, and those that they create, share CPU cores only with each other: the other hyperthread
/// of a core runs a thread of this process or nothing (core scheduling, Linux 5.14). A guest then learns nothing about other
/// processes from state that two hyperthreads share. Has no effect on a host without hyperthreads. Libraries must leave it
/// to the program.
///
/// # Errors
/// If the kernel has no core scheduling.
pub fn enable_core_scheduling() -> io::Result<()> {
    create_core_scheduling_cookie(getpid(), CoreSchedulingScope::ThreadGroup).or_else(|error| {
        match error {
            Errno::NODEV => Ok(()),
            Errno::INVAL => {
                let text =
                    "the host's kernel has no core scheduling (CONFIG_SCHED_CORE, Linux 5.14)";
                Err(io::Error::new(io::ErrorKind::Unsupported, text))
            }
            other => Err(other.into()),
        }
    })
}

/// Guest memory is left out of core dumps, but not the copies held by devices and streams. Programs that this
/// process starts inherit the limit, and can raise it again.
fn dump_no_core() {
    let limit = getrlimit(Resource::Core);
    let none = Rlimit {
        current: Some(0),
        ..limit
    };
    // Lowering a limit cannot fail.
    setrlimit(Resource::Core, none).ok();
}

/// In a process with several threads, the kernel enlarges the table only after an RCU grace period (`expand_fdtable()` in
/// `fs/file.c`): opening the 65th descriptor would take 10 ms in the middle of a start. The table never shrinks.
fn reserve_descriptors() {
    // Where the limit is lower, or no descriptor is left, the table grows as it is used.
    if let Ok(any) = eventfd(0, EventfdFlags::CLOEXEC) {
        fcntl_dupfd_cloexec(any, DESCRIPTORS - 1).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mask is inherited through exec(2): of a parent that uses sigwait(3), SIGTERM would never arrive.
    #[test]
    fn signals_that_the_caller_blocked_arrive() {
        let blocked = || {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
            u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
        };
        let of_a_thread = std::thread::spawn(move || {
            sys::block_signals();
            let before = blocked();
            sys::unblock_signals();
            (before, blocked())
        });
        let (before, after) = of_a_thread.join().unwrap();
        assert_ne!(before & (1 << (libc::SIGTERM - 1)), 0);
        assert_eq!(after, 0);
    }

    #[test]
    fn no_core_is_dumped_and_the_limit_can_be_raised() {
        let before = getrlimit(Resource::Core);
        dump_no_core();
        let after = getrlimit(Resource::Core);
        assert_eq!(after.current, Some(0));
        assert_eq!(after.maximum, before.maximum);
        setrlimit(Resource::Core, before).unwrap();
    }

    /// The call may fail on this host, but where core scheduling is available it must succeed.
    #[test]
    fn cores_are_kept_apart_where_the_host_can() {
        let cookie = || {
            let scope = CoreSchedulingScope::Thread;
            rustix::thread::core_scheduling_cookie(getpid(), scope)
        };
        match (enable_core_scheduling(), cookie()) {
            (Ok(()), Ok(cookie)) => assert_ne!(cookie, 0),
            (Ok(()), Err(Errno::NODEV)) => {}
            (Err(error), Err(Errno::INVAL)) => {
                assert_eq!(error.kind(), io::ErrorKind::Unsupported, "{error}");
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_descriptor_table_has_room() {
        reserve_descriptors();
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let size = status.lines().find_map(|line| line.strip_prefix("FDSize:"));
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let wanted = limit.map_or(1024, |limit| limit.min(1024));
        assert!(size.unwrap().trim().parse::<u64>().unwrap() >= wanted);
    }
}
