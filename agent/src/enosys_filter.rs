//! System calls that are newer than a filter.
//!
//! The authors of a filter did not refuse such calls, they did not know them. C libraries try new calls and fall back to old
//! ones on ENOSYS, but accept EPERM as the result. runc therefore returns ENOSYS for calls with numbers above all that the
//! filter names, and so does this: by a second filter.

use crate::sys;
use libseccomp::{ScmpArch, ScmpSyscall};
use oci_spec::runtime::{Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompFilterFlag};
use std::io;

// linux/audit.h
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_ARM: u32 = 0x4000_0028;
const AUDIT_ARCH_AARCH64: u32 = 0xc000_00b7;

/// First number of another table (x32), which is left to the filter itself.
const OTHER_TABLE: u32 = 0x4000_0000;

// linux/seccomp.h
const RET_ALLOW: u32 = 0x7fff_0000;
const RET_ENOSYS: u32 = 0x0005_0000 | libc::ENOSYS as u32;
const FLAG_LOG: u32 = 1 << 1;
const FLAG_SPEC_ALLOW: u32 = 1 << 2;

// linux/bpf_common.h: load a word, compare it with a constant, return a constant.
const LOAD: u16 = 0x20;
const IF_EQUAL: u16 = 0x15;
const IF_GREATER: u16 = 0x25;
const IF_NOT_LESS: u16 = 0x35;
const RETURN: u16 = 0x06;

/// Offsets of the number of a call, and of its architecture (`struct seccomp_data`).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

/// An instruction: operation, jump if its comparison is true, jump if it is false, operand.
pub(crate) type Step = (u16, u8, u8, u32);

/// Whether a filter returns an error other than ENOSYS for unknown calls, one that a second filter can override: of two
/// errors the kernel takes that of the newer filter.
pub(crate) fn concerns(filter: &LinuxSeccomp) -> bool {
    refused_after(filter).is_some()
}

/// The last known call of such a filter, by architecture; `None` if nothing has to be done.
fn refused_after(filter: &LinuxSeccomp) -> Option<Vec<(u32, u32)>> {
    let answers_enosys = filter.default_errno_ret() == Some(libc::ENOSYS as u32);
    let is_concerned = filter.default_action() == LinuxSeccompAction::ScmpActErrno
        && !answers_enosys
        && !forbids_filters(filter);
    let last = is_concerned.then(|| last_calls(filter));
    last.filter(|last| !last.is_empty())
}

/// Whether installing a second filter would have side effects.
fn forbids_filters(filter: &LinuxSeccomp) -> bool {
    use LinuxSeccompAction::{ScmpActAllow, ScmpActErrno, ScmpActLog};
    let mut rules = filter.syscalls().iter().flatten();
    rules.any(|rule| {
        !matches!(rule.action(), ScmpActAllow | ScmpActErrno | ScmpActLog)
            && rule.names().iter().any(|name| name == "seccomp")
    })
}

/// Makes the calling thread, which has the filter and may add another, return ENOSYS for unknown calls, if necessary. If the
/// filter forbids adding one, it stays as it is.
pub(crate) fn install(filter: &LinuxSeccomp) -> io::Result<()> {
    let Some(last) = refused_after(filter) else {
        return Ok(());
    };
    let mut flags = 0;
    for flag in filter.flags().iter().flatten() {
        flags |= match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => FLAG_SPEC_ALLOW,
            _ => 0,
        };
    }
    match sys::filter_calls(&program(&last), flags) {
        // There is no one to report this to.
        Err(error) if is_forbidden(&error) => Ok(()),
        set => set,
    }
}

/// Whether the error comes from the filter itself.
fn is_forbidden(error: &io::Error) -> bool {
    !matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EFAULT | libc::ENOMEM)
    )
}

/// The largest call number in a filter, by architecture.
fn last_calls(filter: &LinuxSeccomp) -> Vec<(u32, u32)> {
    let mut architectures = vec![ScmpArch::native()];
    for architecture in filter.architectures().iter().flatten() {
        let found = match architecture {
            Arch::ScmpArchX86 => ScmpArch::X86,
            Arch::ScmpArchX86_64 => ScmpArch::X8664,
            Arch::ScmpArchArm => ScmpArch::Arm,
            Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
            _ => continue,
        };
        if !architectures.contains(&found) {
            architectures.push(found);
        }
    }
    let rules = || filter.syscalls().iter().flatten();
    let last = |architecture: &ScmpArch| {
        let number = match architecture {
            ScmpArch::X86 => AUDIT_ARCH_I386,
            ScmpArch::X8664 => AUDIT_ARCH_X86_64,
            ScmpArch::Arm => AUDIT_ARCH_ARM,
            ScmpArch::Aarch64 => AUDIT_ARCH_AARCH64,
            _ => return None,
        };
        let calls = rules().flat_map(|rule| rule.names()).filter_map(|name| {
            let call = ScmpSyscall::from_name_by_arch(name, *architecture).ok()?;
            // libseccomp uses negative numbers for calls that the architecture does not have.
            u32::try_from(call.as_raw_syscall()).ok()
        });
        Some((number, calls.max().filter(|last| *last > 0)?))
    };
    architectures.iter().filter_map(last).collect()
}

fn program(last: &[(u32, u32)]) -> Vec<Step> {
    let mut program = vec![(LOAD, 0, 0, ARCHITECTURE)];
    for &(architecture, last) in last {
        program.extend([
            (IF_EQUAL, 0, 5, architecture),
            (LOAD, 0, 0, NUMBER),
            (IF_NOT_LESS, 2, 0, OTHER_TABLE),
            (IF_GREATER, 0, 1, last),
            (RETURN, 0, 0, RET_ENOSYS),
            (RETURN, 0, 0, RET_ALLOW),
        ]);
    }
    program.push((RETURN, 0, 0, RET_ALLOW));
    program
}

#[cfg(test)]
mod tests {
    use super::*;
    use libcontainer::seccomp::initialize_seccomp;
    use serde_json::{Value, json};

    fn filter(value: Value) -> LinuxSeccomp {
        serde_json::from_value(value).unwrap()
    }

    /// Runs the program like the kernel.
    fn run(program: &[Step], architecture: u32, number: u32) -> u32 {
        let (mut at, mut loaded) = (0, 0);
        loop {
            let (code, then, or, operand) = program[at];
            let jump = |holds: bool| usize::from(if holds { then } else { or });
            at += 1;
            match code {
                LOAD if operand == NUMBER => loaded = number,
                LOAD => loaded = architecture,
                IF_EQUAL => at += jump(loaded == operand),
                IF_GREATER => at += jump(loaded > operand),
                IF_NOT_LESS => at += jump(loaded >= operand),
                RETURN => return operand,
                other => panic!("{other:#x}"),
            }
        }
    }

    #[test]
    fn numbers_above_the_last_are_not_there() {
        let program = program(&[(AUDIT_ARCH_X86_64, 300), (AUDIT_ARCH_I386, 400)]);
        for (architecture, number, answer) in [
            (AUDIT_ARCH_X86_64, 300, RET_ALLOW),
            (AUDIT_ARCH_X86_64, 301, RET_ENOSYS),
            (AUDIT_ARCH_X86_64, OTHER_TABLE + 520, RET_ALLOW),
            (AUDIT_ARCH_I386, 301, RET_ALLOW),
            (AUDIT_ARCH_I386, 401, RET_ENOSYS),
            (AUDIT_ARCH_ARM, 1000, RET_ALLOW),
        ] {
            let found = run(&program, architecture, number);
            assert_eq!(found, answer, "{architecture:#x} {number}");
        }
    }

    #[test]
    fn filters_that_refuse_what_they_do_not_name_are_concerned() {
        let rule = json!([{"names": ["write"], "action": "SCMP_ACT_ALLOW"}]);
        let of = |action: &str, number: Option<u32>, rules: &Value| {
            let mut value = json!({"defaultAction": action, "syscalls": rules});
            if let Some(number) = number {
                value["defaultErrnoRet"] = number.into();
            }
            concerns(&filter(value))
        };
        assert!(of("SCMP_ACT_ERRNO", None, &rule));
        assert!(of("SCMP_ACT_ERRNO", Some(6), &rule));
        assert!(!of("SCMP_ACT_ERRNO", Some(38), &rule));
        assert!(!of("SCMP_ACT_ALLOW", None, &rule));
        assert!(!of("SCMP_ACT_KILL", None, &rule));
        let none = json!([{"names": ["none_such"], "action": "SCMP_ACT_ALLOW"}]);
        assert!(!of("SCMP_ACT_ERRNO", None, &none));
        let kills = json!([{"names": ["write", "seccomp"], "action": "SCMP_ACT_KILL"}]);
        assert!(!of("SCMP_ACT_ERRNO", None, &kills));
    }

    /// In the real kernel, on a thread that is allowed all calls known to this libseccomp except one.
    #[test]
    fn the_kernel_takes_the_newer_error() {
        let known = (0..400).filter_map(|number| {
            let name = ScmpSyscall::from_raw_syscall(number).get_name().ok()?;
            (name != "getcwd").then_some(name)
        });
        let names: Vec<_> = known.collect();
        let filter = filter(json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
            {"names": names, "action": "SCMP_ACT_ALLOW"}]}));
        let thread = std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            initialize_seccomp(&filter).unwrap();
            let before = sys::answer_to_call(1000);
            install(&filter).unwrap();
            let refused = std::env::current_dir().map(drop);
            (
                before,
                sys::answer_to_call(1000),
                refused.unwrap_err().raw_os_error(),
            )
        });
        let (before, after, refused) = thread.join().unwrap();
        assert_eq!(before, Some(libc::EPERM));
        assert_eq!(after, Some(libc::ENOSYS));
        assert_eq!(refused, Some(libc::EPERM));
    }
}
