//! What a program that holds sandboxes sets up at its start, while it has one thread.

use crate::sys;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The size of the descriptor table, in entries of 8 bytes: the default soft limit of a process.
const DESCRIPTORS: i32 = 1024;

/// Has all threads allocate from one heap, makes the descriptor table as large as it usually gets, has
/// violations of seccomp filters reported, and has no core dumped unless somebody asks for one (prlimit(1)).
/// Libraries must leave it to the program.
pub fn prepare_process() {
    sys::share_heap();
    sys::report_violations();
    dump_no_core();
    reserve_descriptors();
}

/// Guest memory is left out of core dumps, but not what devices and streams hold of it. Programs that this
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

/// In a process with several threads the kernel enlarges the table only after an RCU grace period
/// (`expand_fdtable()` in `fs/file.c`), and whoever opened the descriptor waits for it: 10 ms in the middle of a
/// start, when the 65th is opened. The table never shrinks.
fn reserve_descriptors() {
    // Where the limit is lower, or no descriptor is left, the table grows as it is used.
    if let Ok(any) = eventfd(0, EventfdFlags::CLOEXEC) {
        fcntl_dupfd_cloexec(any, DESCRIPTORS - 1).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_core_is_dumped_and_the_limit_can_be_raised() {
        let before = getrlimit(Resource::Core);
        dump_no_core();
        let after = getrlimit(Resource::Core);
        assert_eq!(after.current, Some(0));
        assert_eq!(after.maximum, before.maximum);
        setrlimit(Resource::Core, before).unwrap();
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
