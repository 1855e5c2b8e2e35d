//! The system calls that confined threads may make, with conditions and reasons. Calls that are not listed for a role are
//! denied to its threads.
//!
//! Both C libraries and both architectures share the table: it has the variants that either of them uses. The
//! calls that only one architecture has are at its end.

use super::Filter;
use libc::*;

/// A row of the table.
pub(super) struct Call {
    /// The name in libc.
    pub(super) symbol: &'static str,
    pub(super) number: c_long,
    /// Bits of [`Filter::bit`].
    pub(super) filters: u8,
    /// All conditions must hold. Several rows of a call are alternatives.
    pub(super) arguments: &'static [Argument],
    /// For readers of the table.
    #[cfg_attr(not(test), allow(dead_code))]
    pub(super) reason: &'static str,
}

/// A condition on one argument: `argument & mask == value`.
pub(super) struct Argument {
    pub(super) index: u8,
    pub(super) mask: u64,
    pub(super) value: Value,
}

/// The expected value of an argument.
pub(super) enum Value {
    /// A number.
    Number(u64),
    /// The ID of this process.
    OwnProcess,
}

const VCPU: u8 = Filter::Vcpu.bit();
const LOOP: u8 = Filter::EventLoop.bit();
const BLOCK: u8 = Filter::Block.bit();
const NET: u8 = Filter::Net.bit();
const SOCKETS: u8 = Filter::VsockSockets.bit();
const CONNECTOR: u8 = Filter::VsockConnector.bit();
const FILES: u8 = Filter::Files.bit();
/// The permissions of the starter, which device threads have too until their own filter is in place.
const STARTER: u8 = Filter::Starter.bit();
/// Roles whose threads create threads with other filters.
const CREATORS: u8 = STARTER | SOCKETS;
/// Roles whose threads create threads: also the file system's, whose first one creates others that inherit its filter.
const PARENTS: u8 = CREATORS | FILES;
const ALL: u8 = VCPU | LOOP | BLOCK | NET | SOCKETS | CONNECTOR | FILES | STARTER;

/// A condition on the low 32 bits: the kernel ignores the others of an `int`.
const fn is(index: u8, value: u32) -> Argument {
    masked(index, u32::MAX, value)
}

const fn masked(index: u8, mask: u32, value: u32) -> Argument {
    Argument {
        index,
        mask: mask as u64,
        value: Value::Number(value as u64),
    }
}

/// An ioctl by type and number. Its size may differ between architectures, and the kernel checks that.
const fn ioctl(number: u32) -> [Argument; 1] {
    [masked(1, 0xffff, number)]
}

const fn fcntl(command: c_int) -> [Argument; 1] {
    [is(1, command as u32)]
}

const fn socket_option(option: c_int) -> [Argument; 2] {
    [is(1, SOL_SOCKET as u32), is(2, option as u32)]
}

const fn prctl(operation: c_int) -> [Argument; 1] {
    [is(0, operation as u32)]
}

const NOT_EXECUTABLE: &[Argument] = &[masked(2, PROT_EXEC as u32, 0)];
/// The flags of pthread_create(3): glibc's, and musl's with CLONE_DETACHED, which does nothing.
const THREAD: u32 = 0x003d_0f00;
const OWN_PROCESS: &[Argument] = &[Argument {
    index: 0,
    mask: u32::MAX as u64,
    value: Value::OwnProcess,
}];
const UNIX_STREAM: &[Argument] = &[
    is(0, AF_UNIX as u32),
    masked(1, 0xf, SOCK_STREAM as u32),
    is(2, 0),
];
/// Reads a limit of this process.
const OWN_LIMIT: &[Argument] = &[
    is(0, 0),
    Argument {
        index: 2,
        mask: u64::MAX,
        value: Value::Number(0),
    },
];
/// Of sendto(2) and recvfrom(2): only the peer that the socket is connected to. sendmsg(2) has its address in memory, where a
/// filter cannot see it, and no filter allows it.
const NO_ADDRESS: [Argument; 1] = [Argument {
    index: 4,
    mask: u64::MAX,
    value: Value::Number(0),
}];
/// Without flags: a filter for this thread alone (no TSYNC), without a descriptor that reports its calls (no NEW_LISTENER).
const OWN_FILTER: [Argument; 2] = [is(0, SECCOMP_SET_MODE_FILTER), is(1, 0)];
/// IORING_REGISTER_ENABLE_RINGS.
const ENABLE_RING: &[Argument] = &[is(1, 12)];

/// Not in libc for all architectures; the number is the same on all.
#[allow(non_upper_case_globals)]
const SYS_fchmodat2: c_long = 452;

/// Rows of a table: `call: filters, conditions => reason;`.
macro_rules! calls {
    ($($number:ident: $filters:expr $(, $arguments:expr)? => $reason:literal;)*) => {
        &[$(Call {
            symbol: stringify!($number),
            number: $number,
            filters: $filters,
            arguments: calls!(@arguments $($arguments)?),
            reason: $reason,
        }),*]
    };
    (@arguments) => { &[] };
    (@arguments $arguments:expr) => { &$arguments };
}

/// The table.
pub(super) const CALLS: &[Call] = calls! {
    // The C library and Rust's standard library, in any thread.
    SYS_futex: ALL => "locks, channels, joins";
    SYS_mmap: ALL, *NOT_EXECUTABLE => "allocator";
    SYS_mprotect: ALL, *NOT_EXECUTABLE => "allocator";
    SYS_munmap: ALL => "allocator, end of a thread";
    SYS_mremap: ALL => "allocator";
    SYS_brk: ALL => "allocator";
    SYS_madvise: ALL => "allocator, stack of an ended thread, guest memory";
    SYS_clock_gettime: ALL => "time, where the vDSO has none";
    SYS_clock_nanosleep: ALL => "sleep";
    SYS_nanosleep: ALL => "sleep";
    SYS_restart_syscall: ALL => "a wait after SIGSTOP and SIGCONT";
    SYS_sched_yield: ALL => "locks under contention";
    SYS_getrandom: ALL => "hash maps, entropy";
    SYS_gettid: ALL => "kicks, abort";
    SYS_getpid: ALL => "kicks, abort";
    SYS_tgkill: ALL, *OWN_PROCESS => "kicks of vCPUs, abort";
    SYS_rt_sigprocmask: ALL => "start and end of a thread";
    SYS_sigaltstack: ALL => "start and end of a thread";
    SYS_prctl: ALL, prctl(PR_GET_NAME) => "report of a violation";
    SYS_prctl: ALL, prctl(PR_SET_NAME) => "start of a thread";
    SYS_exit: ALL => "end of a thread";
    SYS_exit_group: ALL => "end of the process after a violation";
    // Descriptors.
    SYS_read: ALL => "events, streams, files, taps";
    SYS_write: ALL => "events, streams, files, taps, log";
    SYS_readv: ALL => "into guest memory";
    SYS_writev: ALL => "from guest memory, log";
    SYS_close: ALL => "descriptors";
    SYS_fcntl: ALL, fcntl(F_DUPFD_CLOEXEC) => "copies of descriptors";
    SYS_fcntl: ALL, fcntl(F_GETFD) => "checks of debug builds";
    SYS_fcntl: ALL, fcntl(F_SETFD) => "copies of descriptors";
    SYS_fcntl: ALL, fcntl(F_GETFL) => "modes of descriptors";
    SYS_fcntl: ALL, fcntl(F_SETFL) => "modes of descriptors";
    SYS_eventfd2: STARTER | LOOP | VCPU => "stop and wake events";
    SYS_prlimit64: STARTER, *OWN_LIMIT => "how many descriptors there may be";
    SYS_epoll_create1: STARTER => "a file system's threads";
    SYS_epoll_ctl: STARTER | LOOP | FILES | VCPU => "watched events";
    SYS_epoll_pwait: STARTER | LOOP | FILES => "waits";
    SYS_ppoll: STARTER | BLOCK | NET | SOCKETS | LOOP | FILES => "waits";
    // KVM.
    SYS_ioctl: VCPU, ioctl(0xae80) => "KVM_RUN";
    SYS_ioctl: VCPU, ioctl(0xae8b) => "KVM_SET_SIGNAL_MASK: kicks";
    SYS_ioctl: LOOP, ioctl(0xae46) => "KVM_SET_USER_MEMORY_REGION: slots of virtio-mem";
    SYS_rt_sigtimedwait: VCPU => "kicks that have had their effect";
    SYS_sched_setaffinity: VCPU, [is(0, 0)] => "a pinned vCPU";
    // Taps.
    SYS_ioctl: LOOP | STARTER, ioctl(0x54d9) => "TUNSETQUEUE: queue pairs in use";
    SYS_ioctl: STARTER, ioctl(0x54d0) => "TUNSETOFFLOAD: features of the driver";
    // vsock.
    SYS_socket: CONNECTOR, *UNIX_STREAM => "vsock ports that are Unix sockets";
    SYS_socketpair: LOOP, *UNIX_STREAM => "vsock ports with a listener in this process";
    SYS_connect: CONNECTOR => "vsock ports that are Unix sockets";
    SYS_sendto: LOOP | SOCKETS, NO_ADDRESS => "streams: data of the guest, the reply to a client";
    SYS_recvfrom: LOOP | SOCKETS, NO_ADDRESS => "streams: the request of a client";
    SYS_shutdown: LOOP | SOCKETS | STARTER | VCPU => "end of a stream";
    SYS_ioctl: LOOP | SOCKETS, ioctl(0x5421) => "FIONBIO: streams";
    SYS_setsockopt: LOOP, socket_option(SO_SNDBUF) => "how much a stream holds";
    SYS_accept4: SOCKETS => "clients of the host";
    SYS_accept: SOCKETS => "musl asks once more where accept4 fails with EINVAL, as on a socket that was shut down";
    SYS_setsockopt: SOCKETS, socket_option(SO_RCVTIMEO) => "how long a client may take";
    // Disks.
    SYS_io_uring_enter: BLOCK => "requests on a restricted ring";
    SYS_io_uring_register: BLOCK, *ENABLE_RING => "a ring belongs to its thread";
    SYS_io_uring_setup: STARTER => "a disk's rings";
    SYS_io_uring_register: STARTER => "restrictions of a disk's rings";
    SYS_io_uring_enter: STARTER => "for a disk's threads";
    SYS_preadv: BLOCK | FILES | STARTER => "into guest memory";
    SYS_pwritev: BLOCK | FILES | STARTER => "from guest memory";
    SYS_pwritev2: BLOCK | FILES | STARTER => "from guest memory";
    SYS_pread64: BLOCK | FILES | STARTER => "bounce buffers";
    SYS_pwrite64: BLOCK | FILES | STARTER => "bounce buffers";
    SYS_fsync: BLOCK | FILES | STARTER => "flushes";
    SYS_fdatasync: BLOCK | FILES | STARTER => "flushes";
    SYS_fallocate: BLOCK | FILES | STARTER => "discard and write zeroes";
    // Files: the calls for a guest's requests. Their paths are single names below open directories.
    SYS_openat: FILES | STARTER => "files, also by /proc/self/fd";
    SYS_openat2: FILES | STARTER => "where a share lies";
    SYS_open_by_handle_at: FILES | STARTER => "files that are not kept open";
    SYS_name_to_handle_at: FILES | STARTER => "files that are not kept open";
    SYS_statx: FILES | STARTER => "attributes";
    SYS_newfstatat: FILES | STARTER => "attributes, before statx";
    SYS_fstat: FILES | STARTER => "attributes, before statx";
    SYS_fstatfs: FILES | STARTER => "space of a file system";
    SYS_readlinkat: FILES | STARTER => "links, the path of a share";
    SYS_getdents64: FILES | STARTER => "directories";
    SYS_lseek: FILES | STARTER => "directories, holes";
    SYS_ioctl: FILES | STARTER, [is(1, 0x8008_6601)] => "FS_IOC_GETFLAGS: lsattr";
    SYS_mkdirat: FILES | STARTER => "mkdir";
    SYS_mknodat: FILES | STARTER => "files, FIFOs, sockets, device nodes";
    SYS_symlinkat: FILES | STARTER => "symlink";
    SYS_linkat: FILES | STARTER => "link";
    SYS_unlinkat: FILES | STARTER => "unlink, rmdir";
    SYS_renameat: FILES | STARTER => "rename";
    SYS_renameat2: FILES | STARTER => "rename with flags";
    SYS_fchownat: FILES | STARTER => "chown";
    SYS_fchmod: FILES | STARTER => "chmod";
    SYS_fchmodat: FILES | STARTER => "chmod before Linux 6.6";
    SYS_fchmodat2: FILES | STARTER => "chmod";
    SYS_utimensat: FILES | STARTER => "times";
    SYS_ftruncate: FILES | STARTER => "truncate";
    SYS_syncfs: FILES | STARTER => "syncfs";
    SYS_copy_file_range: FILES | STARTER => "copies within the host";
    SYS_sendfile: FILES | STARTER => "copies within the host";
    SYS_getxattr: FILES | STARTER => "extended attributes";
    SYS_setxattr: FILES | STARTER => "extended attributes";
    SYS_listxattr: FILES | STARTER => "extended attributes";
    SYS_removexattr: FILES | STARTER => "extended attributes";
    SYS_fgetxattr: FILES | STARTER => "extended attributes";
    SYS_umask: FILES | STARTER => "modes of new files";
    SYS_unshare: FILES | STARTER, [is(0, CLONE_FS as u32)] => "a umask of one's own";
    SYS_inotify_add_watch: FILES | STARTER => "files that the guest watches";
    SYS_inotify_rm_watch: FILES | STARTER | VCPU => "files that the guest watches; a reset of the device";
    SYS_inotify_init1: FILES | STARTER => "files that the guest watches";
    // The creation of threads, and their further confinement.
    SYS_clone: PARENTS, [masked(0, !0x0040_0000, THREAD)] => "threads";
    SYS_clone3: PARENTS => "answered with ENOSYS, so that clone is used";
    SYS_set_robust_list: PARENTS => "start of a thread";
    SYS_rseq: PARENTS => "start of a thread";
    SYS_set_tid_address: PARENTS => "start of a thread";
    SYS_sched_getaffinity: PARENTS => "attributes of a thread's stack";
    SYS_capget: CREATORS => "capabilities of the new thread";
    SYS_capset: CREATORS => "capabilities of the new thread";
    SYS_prctl: CREATORS, prctl(PR_SET_NO_NEW_PRIVS) => "filter of the new thread";
    SYS_prctl: CREATORS, prctl(PR_CAP_AMBIENT) => "capabilities of the new thread";
    SYS_seccomp: CREATORS, OWN_FILTER => "filter of the new thread";
};

/// Calls specific to x86_64: legacy calls made by C libraries, and ioctls of its KVM.
#[cfg(target_arch = "x86_64")]
pub(super) const OWN_CALLS: &[Call] = calls! {
    SYS_ioctl: VCPU, ioctl(0xaead) => "KVM_KVMCLOCK_CTRL: after a pause";
    SYS_ioctl: VCPU, ioctl(0xae81) => "KVM_GET_REGS: report of a failure";
    SYS_ioctl: VCPU, ioctl(0xae83) => "KVM_GET_SREGS: report of a failure";
    SYS_poll: STARTER | BLOCK | NET | SOCKETS | LOOP | FILES => "waits";
    SYS_epoll_wait: STARTER | LOOP | FILES => "waits";
    SYS_open: FILES | STARTER => "files, by /proc/self/fd";
    SYS_readlink: FILES | STARTER => "links of /proc";
};

/// Calls specific to later architectures: those of their KVM.
#[cfg(not(target_arch = "x86_64"))]
pub(super) const OWN_CALLS: &[Call] = calls! {
    SYS_ioctl: VCPU, ioctl(0xaeab) => "KVM_GET_ONE_REG: report of a failure";
};

/// Calls that no filter allows, with their names for reports.
pub(super) const OTHER_NAMES: &[(&str, c_long)] = &[
    ("SYS_execve", SYS_execve),
    ("SYS_kill", SYS_kill),
    ("SYS_tkill", SYS_tkill),
    ("SYS_ptrace", SYS_ptrace),
    ("SYS_mount", SYS_mount),
    ("SYS_setuid", SYS_setuid),
    ("SYS_bpf", SYS_bpf),
    ("SYS_rt_sigaction", SYS_rt_sigaction),
    ("SYS_memfd_create", SYS_memfd_create),
    ("SYS_getsockopt", SYS_getsockopt),
    ("SYS_recvmsg", SYS_recvmsg),
    ("SYS_sendmsg", SYS_sendmsg),
];
