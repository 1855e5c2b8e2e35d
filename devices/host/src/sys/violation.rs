//! Violations: system calls that the filter of a confined thread does not allow.
//!
//! The kernel sends SIGSYS to the thread. Without a handler the process is killed, silently. A program can
//! install one that reports the violation and then ends the process; a library cannot, because handlers belong to
//! the process.

use crate::walls::call_name;
use std::os::fd::{IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};

/// Exit status of a process that was ended because of a violation: as if SIGSYS had killed it.
pub const VIOLATION_STATUS: i32 = 128 + libc::SIGSYS;

/// `si_code` of a signal from a filter.
const SYS_SECCOMP: libc::c_int = 1;

/// File to which violations are reported, in addition to standard error.
static LOG: AtomicI32 = AtomicI32::new(-1);

/// File with nothing else in it: what it says is the reason of the process's end.
static REASON: AtomicI32 = AtomicI32::new(-1);

/// `siginfo_t` of SIGSYS; libc has no names for these fields.
#[repr(C)]
struct SigsysInfo {
    signal: libc::c_int,
    error: libc::c_int,
    code: libc::c_int,
    address: *const libc::c_void,
    call: libc::c_int,
    arch: libc::c_uint,
}

/// Makes violations print one line on standard error and end the process with [`VIOLATION_STATUS`].
/// Libraries must leave it to the program.
pub fn report_violations() {
    // SAFETY: zeroes are a valid `sigaction`. The handler makes only calls that are safe in a signal handler,
    // and does not return.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut());
    }
}

/// Reports violations also to this file, which stays open.
pub fn report_violations_to(log: OwnedFd) {
    LOG.store(log.into_raw_fd(), Ordering::SeqCst);
}

/// Reports a violation also to this file, which stays open, and is written only then: for whoever asks why the process has
/// ended.
pub fn report_violations_in(file: OwnedFd) {
    REASON.store(file.into_raw_fd(), Ordering::SeqCst);
}

/// A line of text without allocation.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl Line {
    fn push(&mut self, text: &[u8]) {
        let room = &mut self.bytes[self.len..];
        let count = text.len().min(room.len());
        room[..count].copy_from_slice(&text[..count]);
        self.len += count;
    }

    fn push_number(&mut self, number: libc::c_int) {
        let mut digits = [0; 10];
        let (mut left, mut at) = (number.unsigned_abs(), digits.len());
        while at == digits.len() || left > 0 {
            at -= 1;
            digits[at] = b'0' + (left % 10) as u8;
            left /= 10;
        }
        self.push(&digits[at..]);
    }
}

fn describe(thread: &[u8], call: libc::c_int) -> Line {
    let mut line = Line {
        bytes: [0; 256],
        len: 0,
    };
    line.push(b"koya: the thread ");
    line.push(thread);
    line.push(b" made system call ");
    line.push_number(call);
    if let Some(name) = call_name(call.into()) {
        line.push(b" (");
        line.push(name.as_bytes());
        line.push(b")");
    }
    line.push(b", which its seccomp filter does not allow; the sandbox is ended\n");
    line
}

extern "C" fn handle(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a siginfo of SIGSYS, which begins with these fields; those of a filter are read
    // only if its code says that it is from one.
    let call = unsafe {
        let info = info.cast::<SigsysInfo>();
        ((*info).code == SYS_SECCOMP).then(|| (*info).call)
    };
    if let Some(call) = call {
        let mut name = [0; 16];
        // SAFETY: PR_GET_NAME writes 16 bytes at most.
        unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
        let len = name.iter().position(|byte| *byte == 0).unwrap_or(0);
        let line = describe(&name[..len], call);
        report(libc::STDERR_FILENO, &line);
        report(LOG.load(Ordering::SeqCst), &line);
        report(REASON.load(Ordering::SeqCst), &line);
    }
    // SAFETY: ends the process without running anything else of it.
    unsafe { libc::_exit(VIOLATION_STATUS) };
}

fn report(fd: RawFd, line: &Line) {
    if fd >= 0 {
        // SAFETY: the bytes are on this stack and their number is given.
        unsafe { libc::write(fd, line.bytes.as_ptr().cast(), line.len) };
    }
}

/// Whether the kernel has seccomp filters that can trap.
pub fn has_seccomp_filters() -> bool {
    let action = libc::SECCOMP_RET_TRAP;
    // SAFETY: SECCOMP_GET_ACTION_AVAIL reads one number, which is on this stack.
    let available = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_GET_ACTION_AVAIL,
            0,
            &raw const action,
        )
    };
    available == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::walls::{Filter, confine};
    use std::process::Command;

    /// Where the child process of the next test reports.
    const REPORT: &str = "KOYA_TEST_REPORT";

    #[test]
    #[ignore = "ends its process: run by a_violation_is_the_reason_of_the_end"]
    fn makes_a_violation() {
        let Some(path) = std::env::var_os(REPORT) else {
            return;
        };
        report_violations();
        report_violations_in(std::fs::File::create(path).unwrap().into());
        confine(Filter::Net, None).unwrap();
        // SAFETY: the filter ends the process; without one, the call changes nothing.
        unsafe { libc::syscall(libc::SYS_sync) };
    }

    #[test]
    fn a_violation_is_the_reason_of_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report");
        let name = "sys::violation::tests::makes_a_violation";
        let mut test = Command::new(std::env::current_exe().unwrap());
        test.args([name, "--exact", "--ignored"]).env(REPORT, &path);
        let output = test.output().unwrap();
        assert_eq!(output.status.code(), Some(VIOLATION_STATUS), "{output:?}");
        let said = std::fs::read_to_string(path).unwrap();
        let call = format!("made system call {}", libc::SYS_sync);
        assert!(said.contains(&call) && said.ends_with("ended\n"), "{said}");
    }

    #[test]
    fn a_report_names_thread_and_call() {
        let line = describe(b"koya-blk", libc::SYS_execve as libc::c_int);
        let text = std::str::from_utf8(&line.bytes[..line.len]).unwrap();
        let call = format!("koya-blk made system call {} (execve),", libc::SYS_execve);
        assert!(text.contains(&call) && text.ends_with('\n'), "{text}");
        let line = describe(b"x", 9999);
        let text = std::str::from_utf8(&line.bytes[..line.len]).unwrap();
        assert!(text.contains("system call 9999, which"), "{text}");
    }
}
