//! Capabilities of a compromised thread, by role: performs the actions of an attacker on a thread that is confined by that
//! role. Each attempt has its own process (this test program, started again), so that its parent sees how it ends. The
//! results are the table of `docs/security.md`.

use super::traitor_ground::Ground;
use crate::descriptors::Directory;
use crate::threads::{self, Role};
use crate::walls::landlock::{Place, Rules};
use crate::walls::{Filter, confine_new_threads, confine_new_threads_to, keep_capabilities};
use rustix::thread::CapabilitySet;
use std::fmt::Write as _;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

/// `FILTER ATTEMPT`, in the environment of a process that makes an attempt.
const ATTEMPT: &str = "KOYA_TEST_ATTEMPT";

/// The empty directory for the attempt.
const GROUND: &str = "KOYA_TEST_GROUND";

/// Whether that process reports violations.
const REPORTS: &str = "KOYA_TEST_REPORTS";

/// Set if that process has no privileges, and threads that serve files may open what is in one place only.
pub(super) const PLAIN: &str = "KOYA_TEST_PLAIN";

/// A name, and a function that returns the result of a system call.
type Attempt = (&'static str, fn(&Ground) -> i64);

macro_rules! call {
    ($number:ident $(, $argument:expr)*) => {
        // SAFETY: the thread belongs to a process that only makes this call and ends. Pointers are to static
        // text, to data on this stack, or null, where the kernel would report EFAULT.
        i64::from(unsafe { libc::syscall(libc::$number $(, $argument)*) })
    };
}
pub(super) use call;

const AT: i32 = libc::AT_FDCWD;
const NONE: *const u8 = std::ptr::null();

fn path(text: &'static std::ffi::CStr) -> *const libc::c_char {
    text.as_ptr()
}

fn parent() -> i32 {
    // SAFETY: only integers are passed.
    unsafe { libc::getppid() }
}

fn socket(family: i32, kind: i32) -> i64 {
    call!(SYS_socket, family, kind, 0)
}

fn map(protection: i32) -> i64 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    call!(SYS_mmap, NONE, 4096, protection, flags, -1, 0)
}

fn ioctl(fd: i32, number: u64, argument: *const u8) -> i64 {
    call!(SYS_ioctl, fd, number, argument)
}

/// The attempts.
const ATTEMPTS: &[Attempt] = &[
    ("execve", |_| {
        call!(SYS_execve, path(c"/bin/true"), NONE, NONE)
    }),
    ("fork", |_| call!(SYS_clone, libc::SIGCHLD, 0, 0, 0, 0)),
    ("fork by clone3", |_| call!(SYS_clone3, NONE, 0)),
    ("create a thread", |_| {
        std::thread::Builder::new().spawn(|| ()).map_or(-1, |_| 0)
    }),
    ("open a file of the host", |_| {
        call!(SYS_openat, AT, path(c"/etc/passwd"), 0)
    }),
    ("the same, by the parents of the root", |_| {
        call!(SYS_openat, AT, path(c"/../../etc/passwd"), 0)
    }),
    ("the same, by the parents of a share", |ground| {
        let up = path(c"../../../../../../../etc/passwd");
        call!(SYS_openat, ground.share(), up, 0)
    }),
    ("open by handle", |ground| {
        call!(SYS_open_by_handle_at, ground.file(), ground.handle(), 0)
    }),
    ("open /proc/self/mem", |_| {
        call!(SYS_openat, AT, path(c"/proc/self/mem"), libc::O_RDWR)
    }),
    ("open ../mem", |_| {
        call!(SYS_openat, AT, path(c"../mem"), libc::O_RDWR)
    }),
    ("open a file of the process again", |ground| {
        let again = ground.file_again();
        call!(SYS_openat, AT, again.as_ptr(), libc::O_RDWR)
    }),
    ("open a file in a share", |ground| {
        call!(SYS_openat, ground.share(), path(c"file"), libc::O_RDWR)
    }),
    ("create a file", |ground| {
        call!(SYS_openat, AT, ground.new_file(), libc::O_CREAT, 0o600)
    }),
    ("remove a file", |ground| {
        call!(SYS_unlinkat, AT, ground.old_file(), 0)
    }),
    ("create a device node", |ground| {
        call!(SYS_mknodat, AT, ground.new_file(), libc::S_IFCHR, 0x103)
    }),
    ("create a device node in a share", |ground| {
        let name = path(c"new");
        call!(SYS_mknodat, ground.share(), name, libc::S_IFCHR, 0x103)
    }),
    ("open a device node in a share", |ground| {
        call!(SYS_openat, ground.share(), path(c"null"), 0)
    }),
    ("watch a file of the host", |_| {
        let queue = call!(SYS_inotify_init1, 0);
        call!(SYS_inotify_add_watch, queue, path(c"/etc/passwd"), 2)
    }),
    ("memfd_create", |_| call!(SYS_memfd_create, path(c"x"), 0)),
    ("mount", |_| call!(SYS_mount, NONE, NONE, NONE, 0, NONE)),
    ("move a mount", |_| {
        call!(SYS_move_mount, -1, NONE, -1, NONE, 0)
    }),
    ("chroot", |_| call!(SYS_chroot, path(c"/"))),
    ("new user namespace", |_| {
        call!(SYS_unshare, libc::CLONE_NEWUSER)
    }),
    ("enter a namespace", |_| call!(SYS_setns, -1, 0)),
    ("socket: TCP", |_| socket(libc::AF_INET, libc::SOCK_STREAM)),
    ("socket: UDP", |_| socket(libc::AF_INET, libc::SOCK_DGRAM)),
    ("socket: raw", |_| socket(libc::AF_PACKET, libc::SOCK_RAW)),
    ("socket: netlink", |_| {
        socket(libc::AF_NETLINK, libc::SOCK_RAW)
    }),
    ("socket: vsock of the host", |_| {
        socket(libc::AF_VSOCK, libc::SOCK_STREAM)
    }),
    ("socket: Unix datagrams", |_| {
        socket(libc::AF_UNIX, libc::SOCK_DGRAM)
    }),
    ("socket: Unix stream", |_| {
        socket(libc::AF_UNIX, libc::SOCK_STREAM)
    }),
    ("connect to a Unix socket", |ground| {
        let socket = socket(libc::AF_UNIX, libc::SOCK_STREAM);
        let (address, len) = ground.address();
        call!(SYS_connect, socket, address, len)
    }),
    ("connect to an abstract Unix socket", |ground| {
        let socket = socket(libc::AF_UNIX, libc::SOCK_STREAM);
        let (address, len) = ground.abstract_address();
        call!(SYS_connect, socket, address, len)
    }),
    ("send a datagram by an open socket", |ground| {
        let (address, len) = ground.internet_address();
        let text = path(c"x");
        call!(SYS_sendto, ground.datagrams(), text, 1, 0, address, len)
    }),
    ("the same, by sendmsg", |ground| {
        call!(SYS_sendmsg, ground.datagrams(), ground.message(), 0)
    }),
    ("the same, by sendmmsg", |ground| {
        call!(SYS_sendmmsg, ground.datagrams(), ground.message(), 0, 0)
    }),
    ("connect an open UDP socket", |ground| {
        let (address, len) = ground.internet_address();
        call!(SYS_connect, ground.datagrams(), address, len)
    }),
    ("connect an open TCP socket", |ground| {
        let (address, len) = ground.server();
        call!(SYS_connect, ground.stream(), address, len)
    }),
    ("bind", |_| call!(SYS_bind, -1, NONE, 0)),
    ("listen", |_| call!(SYS_listen, -1, 0)),
    ("ptrace", |_| {
        call!(SYS_ptrace, libc::PTRACE_ATTACH, parent(), 0, 0)
    }),
    ("process_vm_writev", |_| {
        call!(SYS_process_vm_writev, parent(), NONE, 0, NONE, 0, 0)
    }),
    ("pidfd_open", |_| call!(SYS_pidfd_open, parent(), 0)),
    ("pidfd_getfd", |_| call!(SYS_pidfd_getfd, -1, 0, 0)),
    ("kill", |_| call!(SYS_kill, parent(), 0)),
    ("tkill", |_| call!(SYS_tkill, parent(), 0)),
    ("tgkill another process", |_| {
        call!(SYS_tgkill, parent(), parent(), 0)
    }),
    ("limits of another process", |_| {
        call!(SYS_prlimit64, parent(), 0, NONE, NONE)
    }),
    ("setuid", |_| call!(SYS_setuid, 0)),
    ("prctl: PR_SET_DUMPABLE", |_| {
        call!(SYS_prctl, libc::PR_SET_DUMPABLE, 1, 0, 0, 0)
    }),
    ("seccomp: a filter for all threads", |_| {
        let flags = libc::SECCOMP_FILTER_FLAG_TSYNC;
        call!(SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, NONE)
    }),
    ("seccomp: a filter with a listener", |_| {
        let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
        call!(SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, NONE)
    }),
    ("signal handler", |_| {
        call!(SYS_rt_sigaction, libc::SIGSYS, NONE, NONE, 8)
    }),
    ("executable memory", |_| {
        map(libc::PROT_READ | libc::PROT_EXEC)
    }),
    ("make memory executable", |_| {
        call!(SYS_mprotect, map(libc::PROT_READ), 4096, libc::PROT_EXEC)
    }),
    ("personality", |_| {
        call!(SYS_personality, libc::READ_IMPLIES_EXEC)
    }),
    ("io_uring_setup", |_| {
        call!(SYS_io_uring_setup, 1, Ground::ring_parameters())
    }),
    ("KVM_CREATE_VM", |_| ioctl(-1, 0xae01, NONE)),
    ("KVM_CREATE_VCPU", |_| ioctl(-1, 0xae41, NONE)),
    ("KVM_SET_USER_MEMORY_REGION", |ground| {
        ioctl(ground.vm(), 0x4020_ae46, Ground::memory_slot(1))
    }),
    ("KVM_RUN", |ground| {
        let result = ioctl(ground.vcpu(), 0xae80, NONE);
        let error = io::Error::last_os_error().raw_os_error();
        // KVM's own answer on aarch64: the vCPU is not initialized.
        match result == -1 && error == Some(libc::ENOEXEC) {
            true => 0,
            false => result,
        }
    }),
    ("TUNSETIFF", |_| ioctl(-1, 0x4004_54ca, NONE)),
    ("TIOCSTI", |_| ioctl(-1, 0x5412, NONE)),
    ("bpf", |_| call!(SYS_bpf, 0, NONE, 0)),
    ("perf_event_open", |_| {
        call!(SYS_perf_event_open, NONE, 0, -1, -1, 0)
    }),
    ("userfaultfd", |_| call!(SYS_userfaultfd, 0)),
    ("keyctl", |_| call!(SYS_keyctl, 0, -3, 0)),
    ("add_key", |_| call!(SYS_add_key, NONE, NONE, NONE, 0, -3)),
    ("init_module", |_| call!(SYS_init_module, NONE, 0, NONE)),
    ("kexec_load", |_| call!(SYS_kexec_load, 0, 0, NONE, 0)),
    ("reboot", |_| call!(SYS_reboot, 0, 0, 0, NONE)),
    ("settimeofday", |_| call!(SYS_settimeofday, NONE, NONE)),
];

/// Attempts that must fail on every thread driven by a guest, and on the starter.
const NEVER: &[&str] = &[
    "execve",
    "fork",
    "fork by clone3",
    "memfd_create",
    "mount",
    "move a mount",
    "chroot",
    "new user namespace",
    "enter a namespace",
    "socket: TCP",
    "socket: UDP",
    "socket: raw",
    "socket: netlink",
    "socket: vsock of the host",
    "socket: Unix datagrams",
    "send a datagram by an open socket",
    "the same, by sendmsg",
    "the same, by sendmmsg",
    "bind",
    "listen",
    "ptrace",
    "process_vm_writev",
    "pidfd_open",
    "pidfd_getfd",
    "kill",
    "tkill",
    "tgkill another process",
    "limits of another process",
    "setuid",
    "prctl: PR_SET_DUMPABLE",
    "seccomp: a filter for all threads",
    "seccomp: a filter with a listener",
    "signal handler",
    "executable memory",
    "make memory executable",
    "personality",
    "KVM_CREATE_VM",
    "KVM_CREATE_VCPU",
    "TUNSETIFF",
    "TIOCSTI",
    "bpf",
    "perf_event_open",
    "userfaultfd",
    "keyctl",
    "add_key",
    "init_module",
    "kexec_load",
    "reboot",
    "settimeofday",
];

/// Further attempts that must fail on threads with a root of their own.
const NEVER_BY_NAME: &[&str] = &[
    "open a file of the host",
    "the same, by the parents of the root",
    "the same, by the parents of a share",
    "open /proc/self/mem",
    "open ../mem",
    "create a file",
    "remove a file",
    "create a device node",
    "open a device node in a share",
    "watch a file of the host",
];

/// Outcome of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The filter ended the process.
    Killed,
    /// The filter allowed it and the kernel refused it; or the filter returned ENOSYS.
    Refused(i32),
    /// It worked.
    Allowed,
}

impl Outcome {
    fn cell(self) -> String {
        match self {
            Self::Killed => String::new(),
            Self::Refused(libc::ENOENT) => "ENOENT".to_owned(),
            Self::Refused(libc::EPERM) => "EPERM".to_owned(),
            Self::Refused(libc::EACCES) => "EACCES".to_owned(),
            Self::Refused(libc::ENOSYS) => "ENOSYS".to_owned(),
            Self::Refused(number) => format!("error {number}"),
            Self::Allowed => "allowed".to_owned(),
        }
    }
}

/// A thread of this role, created as in a machine. Without a place, Landlock denies nothing.
fn confined<T: Send + 'static>(
    filter: Filter,
    place: Option<&Place>,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let places = place.map(std::slice::from_ref);
    let _confinement = confine_new_threads_to(true, places).unwrap();
    if place.is_none() {
        Rules::default().replace();
    }
    let role = |filter| Role::new("koya-traitor").confined_by(filter);
    let run = move || threads::spawn(role(filter), work).unwrap().join().unwrap();
    match filter {
        Filter::Block | Filter::Net | Filter::Files => {
            let starter = threads::spawn(role(Filter::Starter), run);
            starter.unwrap().join().unwrap()
        }
        _ => run(),
    }
}

/// Not a separate test: the process that makes an attempt.
#[test]
fn attempt() {
    let Ok(asked) = std::env::var(ATTEMPT) else {
        return;
    };
    if std::env::var_os(REPORTS).is_some() {
        super::report_violations();
    }
    let (filter, name) = asked.split_once('\t').unwrap();
    let filter = Filter::ALL.iter().find(|f| format!("{f:?}") == filter);
    let (_, work) = ATTEMPTS.iter().find(|(known, _)| *known == name).unwrap();
    let dir = std::env::var_os(GROUND).unwrap();
    let dir: &Path = dir.as_ref();
    let place = std::env::var_os(PLAIN).map(|_| Place {
        path: dir.join("share"),
        read_only: false,
    });
    if place.is_some() {
        keep_capabilities(CapabilitySet::empty()).unwrap();
    }
    let ground = Ground::new(dir, name);
    // As a server of files does, before its threads have a filter.
    let _directory = Directory::get().unwrap();
    let result = confined(*filter.unwrap(), place.as_ref(), move || {
        let result = work(&ground);
        let error = io::Error::last_os_error().raw_os_error();
        error.filter(|_| result == -1).unwrap_or(0)
    });
    // 0 to 133: the error numbers of Linux.
    std::process::exit(result);
}

pub(super) fn command(filter: Filter, name: &str, ground: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([
        "--exact",
        "sys::traitor_tests::attempt",
        "--nocapture",
        "-q",
    ]);
    command.env(ATTEMPT, format!("{filter:?}\t{name}"));
    command.env(GROUND, ground);
    command
}

fn outcome(filter: Filter, name: &str) -> Outcome {
    let ground = tempfile::tempdir().unwrap();
    outcome_of(filter, name, &mut command(filter, name, ground.path()))
}

pub(super) fn outcome_of(filter: Filter, name: &str, command: &mut Command) -> Outcome {
    let output = command.output().unwrap();
    match (output.status.signal(), output.status.code()) {
        (Some(libc::SIGSYS), _) => Outcome::Killed,
        (None, Some(0)) => Outcome::Allowed,
        (None, Some(error @ 1..=133)) => Outcome::Refused(error),
        _ => panic!("{filter:?}, {name}: {output:?}"),
    }
}

/// The columns of both tables.
const COLUMNS: [(Filter, &str); 8] = [
    (Filter::Vcpu, "`koya-vcpuN`"),
    (Filter::EventLoop, "`koya-loop`"),
    (Filter::Block, "`koya-blk`"),
    (Filter::Net, "`koya-net`"),
    (Filter::VsockSockets, "`koya-vsock`"),
    (Filter::VsockConnector, "`koya-vsock-out`"),
    (Filter::Files, "`koya-fs`"),
    (Filter::Starter, "`koya-starter`"),
];

fn docs_have(table: &str) -> bool {
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/security.md");
    std::fs::read_to_string(docs).unwrap().contains(table)
}

#[test]
fn a_traitor_gets_nowhere() {
    // A root of its own takes privileges; the results without the right to mount are in another table.
    let with_own_root = crate::descriptors::check_own_root().is_ok();
    let head = COLUMNS.map(|(_, name)| name).join(" | ");
    let mut table = format!(
        "| attempt | {head} |\n|---|{}\n",
        "---|".repeat(COLUMNS.len())
    );
    for (name, _) in ATTEMPTS {
        let outcomes = COLUMNS.map(|(filter, _)| outcome(filter, name));
        let cells = outcomes.map(Outcome::cell).join(" | ");
        writeln!(table, "| {name} | {cells} |").unwrap();
        for ((filter, _), outcome) in COLUMNS.iter().zip(outcomes) {
            let never = NEVER.contains(name) || with_own_root && NEVER_BY_NAME.contains(name);
            assert!(
                !never || outcome != Outcome::Allowed,
                "{name} is allowed to {filter:?}"
            );
        }
    }
    println!("{table}");
    assert!(
        !with_own_root || docs_have(&table),
        "docs/security.md has another table"
    );
}

#[test]
fn a_violation_is_reported_and_ends_the_process() {
    let ground = tempfile::tempdir().unwrap();
    let mut command = command(Filter::Net, "execve", ground.path());
    let output = command.env(REPORTS, "1").output().unwrap();
    assert_eq!(output.status.code(), Some(super::VIOLATION_STATUS));
    let said = String::from_utf8_lossy(&output.stderr);
    let line = format!(
        "the thread koya-traitor made system call {} (execve),",
        libc::SYS_execve
    );
    assert!(said.contains(&line), "{said}");
}

/// Blocked signals would keep the handler from running.
#[test]
fn threads_without_signals_report_violations_too() {
    let leaf = Role::new("koya-leaf").guest_facing();
    let mask = threads::spawn(leaf, super::block_signals).unwrap();
    // SAFETY: the set is one that the C library wrote.
    let blocked = unsafe { libc::sigismember(&mask.join().unwrap(), libc::SIGSYS) };
    assert_eq!(blocked, 0);
}

#[test]
fn a_filter_has_as_many_calls_as_documented() {
    // The table has the numbers of x86_64, which has some calls of its own.
    if std::env::consts::ARCH != "x86_64" {
        return;
    }
    let mut table = "| thread | system calls | capabilities |\n|---|---|---|\n".to_owned();
    for (filter, name) in COLUMNS {
        let calls = filter.call_names().len();
        let kept: Vec<_> = filter.capabilities().iter_names().map(|c| c.0).collect();
        let kept = match kept.is_empty() {
            true => "none".to_owned(),
            false => kept.join(", "),
        };
        writeln!(table, "| {name} | {calls} | {kept} |").unwrap();
    }
    println!("{table}");
    assert!(docs_have(&table), "docs/security.md has another table");
}

#[test]
fn a_confined_thread_keeps_the_capabilities_of_its_role() {
    for filter in Filter::ALL {
        let kept = filter.capabilities();
        let had = rustix::thread::capabilities(None).unwrap();
        // Read by another thread: a confined one can't open /proc.
        let (say, thread) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let _confinement = confine_new_threads(true).unwrap();
        let role = Role::new("koya-traitor").confined_by(filter);
        let running = threads::spawn(role, move || {
            say.send(rustix::thread::gettid()).unwrap();
            ended.recv().ok();
        });
        let id = thread.recv().unwrap();
        let status = format!("/proc/self/task/{}/status", id.as_raw_nonzero());
        let status = std::fs::read_to_string(status).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap().trim_start_matches(':').trim().to_owned()
        };
        let set = |name: &str| u64::from_str_radix(&field(name), 16).unwrap();
        assert_eq!(set("CapEff"), (had.effective & kept).bits(), "{filter:?}");
        assert_eq!(set("CapPrm"), (had.permitted & kept).bits(), "{filter:?}");
        assert_eq!((set("CapInh"), set("CapAmb")), (0, 0), "{filter:?}");
        assert_eq!(field("NoNewPrivs"), "1");
        assert_eq!(field("Seccomp"), "2");
        drop(end);
        running.unwrap().join().unwrap();
    }
}

#[test]
fn confinement_is_passed_on_and_can_be_off() {
    const LEAF: Role = Role::new("koya-leaf").confined_by(Filter::Block);
    let mode = || {
        // SAFETY: only integers are passed; a filter that does not allow it is not in place.
        unsafe { libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) }
    };
    let off = confine_new_threads(false).unwrap();
    assert_eq!(threads::spawn(LEAF, mode).unwrap().join().unwrap(), 0);
    drop(off);
    // The creator's filter allows threads, and the filter of the new thread is added to it.
    let passed = confined(Filter::Starter, None, || {
        threads::spawn(LEAF, crate::walls::confines)
            .unwrap()
            .join()
            .unwrap()
    });
    assert!(passed);
    assert!(!crate::walls::confines());
}
