//! What a thread of each role could do if its code were somebody else's: tries what an attacker would, on a
//! thread that is confined by that role. Each attempt has a process of its own (this test program, started
//! again), so that its parent sees how it ends. The results are the table of `docs/security.md`.

use crate::threads::{self, Role};
use crate::walls::{Filter, confine_new_threads};
use std::fmt::Write as _;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

/// `FILTER ATTEMPT`, in the environment of a process that makes one.
const ATTEMPT: &str = "KOYA_TEST_ATTEMPT";

/// Whether that process reports violations.
const REPORTS: &str = "KOYA_TEST_REPORTS";

/// The name and the work, which ends with the result of a system call.
type Attempt = (&'static str, fn() -> i64);

macro_rules! call {
    ($number:ident $(, $argument:expr)*) => {
        // SAFETY: the thread belongs to a process that only makes this call and ends. Pointers are to static
        // text, to what lives on this stack, or null, where the kernel would report EFAULT.
        i64::from(unsafe { libc::syscall(libc::$number $(, $argument)*) })
    };
}

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

fn ioctl(number: u64) -> i64 {
    call!(SYS_ioctl, -1, number, 0)
}

/// What is tried.
const ATTEMPTS: &[Attempt] = &[
    ("execve", || {
        call!(SYS_execve, path(c"/bin/true"), NONE, NONE)
    }),
    ("fork", || call!(SYS_clone, libc::SIGCHLD, 0, 0, 0, 0)),
    ("fork by clone3", || call!(SYS_clone3, NONE, 0)),
    ("create a thread", || {
        std::thread::Builder::new().spawn(|| ()).map_or(-1, |_| 0)
    }),
    ("open a file", || {
        call!(SYS_openat, AT, path(c"/etc/hostname"), 0)
    }),
    ("open /proc/self/mem", || {
        call!(SYS_openat, AT, path(c"/proc/self/mem"), libc::O_RDWR)
    }),
    ("create a device node", || {
        call!(SYS_mknodat, -1, path(c"x"), libc::S_IFCHR, 0)
    }),
    ("remove a file", || call!(SYS_unlinkat, -1, path(c"x"), 0)),
    ("open by handle", || {
        call!(SYS_open_by_handle_at, -1, NONE, 0)
    }),
    ("memfd_create", || call!(SYS_memfd_create, path(c"x"), 0)),
    ("mount", || call!(SYS_mount, NONE, NONE, NONE, 0, NONE)),
    ("move a mount", || {
        call!(SYS_move_mount, -1, NONE, -1, NONE, 0)
    }),
    ("chroot", || call!(SYS_chroot, path(c"/"))),
    ("new user namespace", || {
        call!(SYS_unshare, libc::CLONE_NEWUSER)
    }),
    ("enter a namespace", || call!(SYS_setns, -1, 0)),
    ("socket: TCP", || socket(libc::AF_INET, libc::SOCK_STREAM)),
    ("socket: UDP", || socket(libc::AF_INET, libc::SOCK_DGRAM)),
    ("socket: raw", || socket(libc::AF_PACKET, libc::SOCK_RAW)),
    ("socket: netlink", || {
        socket(libc::AF_NETLINK, libc::SOCK_RAW)
    }),
    ("socket: vsock of the host", || {
        socket(libc::AF_VSOCK, libc::SOCK_STREAM)
    }),
    ("socket: Unix datagrams", || {
        socket(libc::AF_UNIX, libc::SOCK_DGRAM)
    }),
    ("socket: Unix stream", || {
        socket(libc::AF_UNIX, libc::SOCK_STREAM)
    }),
    ("connect", || call!(SYS_connect, -1, NONE, 0)),
    ("bind", || call!(SYS_bind, -1, NONE, 0)),
    ("listen", || call!(SYS_listen, -1, 0)),
    ("ptrace", || {
        call!(SYS_ptrace, libc::PTRACE_ATTACH, parent(), 0, 0)
    }),
    ("process_vm_writev", || {
        call!(SYS_process_vm_writev, parent(), NONE, 0, NONE, 0, 0)
    }),
    ("pidfd_open", || call!(SYS_pidfd_open, parent(), 0)),
    ("pidfd_getfd", || call!(SYS_pidfd_getfd, -1, 0, 0)),
    ("kill", || call!(SYS_kill, parent(), 0)),
    ("tkill", || call!(SYS_tkill, parent(), 0)),
    ("tgkill another process", || {
        call!(SYS_tgkill, parent(), parent(), 0)
    }),
    ("limits of another process", || {
        call!(SYS_prlimit64, parent(), 0, NONE, NONE)
    }),
    ("setuid", || call!(SYS_setuid, 0)),
    ("prctl: PR_SET_DUMPABLE", || {
        call!(SYS_prctl, libc::PR_SET_DUMPABLE, 1, 0, 0, 0)
    }),
    ("signal handler", || {
        call!(SYS_rt_sigaction, libc::SIGSYS, NONE, NONE, 8)
    }),
    ("executable memory", || {
        map(libc::PROT_READ | libc::PROT_EXEC)
    }),
    ("make memory executable", || {
        call!(SYS_mprotect, map(libc::PROT_READ), 4096, libc::PROT_EXEC)
    }),
    ("personality", || {
        call!(SYS_personality, libc::READ_IMPLIES_EXEC)
    }),
    ("io_uring_setup", || call!(SYS_io_uring_setup, 1, NONE)),
    ("io_uring_register: buffers", || {
        call!(SYS_io_uring_register, -1, 0, NONE, 0)
    }),
    ("KVM_CREATE_VM", || ioctl(0xae01)),
    ("KVM_CREATE_VCPU", || ioctl(0xae41)),
    ("KVM_SET_USER_MEMORY_REGION", || ioctl(0xae46)),
    ("KVM_RUN", || ioctl(0xae80)),
    ("TUNSETIFF", || ioctl(0x4004_54ca)),
    ("TIOCSTI", || ioctl(0x5412)),
    ("bpf", || call!(SYS_bpf, 0, NONE, 0)),
    ("perf_event_open", || {
        call!(SYS_perf_event_open, NONE, 0, -1, -1, 0)
    }),
    ("userfaultfd", || call!(SYS_userfaultfd, 0)),
    ("keyctl", || call!(SYS_keyctl, 0, -3, 0)),
    ("add_key", || call!(SYS_add_key, NONE, NONE, NONE, 0, -3)),
    ("init_module", || call!(SYS_init_module, NONE, 0, NONE)),
    ("kexec_load", || call!(SYS_kexec_load, 0, 0, NONE, 0)),
    ("reboot", || call!(SYS_reboot, 0, 0, 0, NONE)),
    ("settimeofday", || call!(SYS_settimeofday, NONE, NONE)),
];

/// What no thread that a guest drives may do, nor the starter.
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

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// The filter ended the process.
    Killed,
    /// The filter answered that the kernel has no such call.
    Missing,
    /// The filter let it through to the kernel.
    Allowed,
}

impl Outcome {
    fn cell(self) -> &'static str {
        match self {
            Self::Killed => "",
            Self::Missing => "ENOSYS",
            Self::Allowed => "allowed",
        }
    }
}

/// A thread of this role.
fn confined<T: Send + 'static>(filter: Filter, work: impl FnOnce() -> T + Send + 'static) -> T {
    let _confinement = confine_new_threads(true).unwrap();
    let role = Role::new("koya-traitor").confined_by(filter);
    threads::spawn(role, work).unwrap().join().unwrap()
}

/// Not a test of its own: the process that makes an attempt.
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
    let result = confined(*filter.unwrap(), move || {
        let result = work();
        let error = io::Error::last_os_error().raw_os_error();
        error.filter(|_| result == -1).unwrap_or(0)
    });
    // 0 to 133: the error numbers of Linux.
    std::process::exit(result);
}

fn command(filter: Filter, name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([
        "--exact",
        "sys::traitor_tests::attempt",
        "--nocapture",
        "-q",
    ]);
    command.env(ATTEMPT, format!("{filter:?}\t{name}"));
    command
}

fn outcome(filter: Filter, name: &str) -> Outcome {
    let output = command(filter, name).output().unwrap();
    match (output.status.signal(), output.status.code()) {
        (Some(libc::SIGSYS), _) => Outcome::Killed,
        (None, Some(libc::ENOSYS)) => Outcome::Missing,
        (None, Some(_)) => Outcome::Allowed,
        _ => panic!("{filter:?}, {name}: {output:?}"),
    }
}

/// The columns of both tables.
const COLUMNS: [(Filter, &str); 7] = [
    (Filter::Vcpu, "`koya-vcpuN`"),
    (Filter::EventLoop, "`koya-loop`"),
    (Filter::Block, "`koya-blk`"),
    (Filter::Net, "`koya-net`"),
    (Filter::VsockSockets, "`koya-vsock`"),
    (Filter::Files, "`koya-fs`"),
    (Filter::Starter, "`koya-starter`"),
];

fn docs_have(table: &str) -> bool {
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/security.md");
    std::fs::read_to_string(docs).unwrap().contains(table)
}

#[test]
fn a_traitor_gets_nowhere() {
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
            let never = NEVER.contains(name);
            assert!(
                !never || outcome != Outcome::Allowed,
                "{name} is allowed to {filter:?}"
            );
        }
    }
    println!("{table}");
    assert!(docs_have(&table), "docs/security.md has another table");
}

#[test]
fn a_violation_is_reported_and_ends_the_process() {
    let mut command = command(Filter::Net, "execve");
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
        // Of another thread: a confined one can't open /proc.
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
    // The creator's filter allows threads, and theirs is added to it.
    let passed = confined(Filter::Starter, || {
        threads::spawn(LEAF, crate::walls::confines)
            .unwrap()
            .join()
            .unwrap()
    });
    assert!(passed);
    assert!(!crate::walls::confines());
}
