//! Device rules of a container: `linux.resources.devices` of the OCI configuration, as a program
//! that the kernel runs on every open and mknod of a device (BPF_PROG_TYPE_CGROUP_DEVICE).
//!
//! The last matching rule wins for each kind of access, so the program checks rules from the last to the first. An
//! implicit "deny" precedes all of them; rules for the devices available to every container follow them.

use crate::cgroup;
use crate::sys::{Instruction, attach_device_program};
use anyhow::{Context, Result};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, Spec};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

/// Bits of the request's access, upper half of the first word.
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;

/// Bits of the request's kind, lower half of the first word.
const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;

/// A rule, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    /// `None` matches both.
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

impl Rule {
    fn matches_all(&self) -> bool {
        self.kind.is_none() && self.major.is_none() && self.minor.is_none() && self.access == ALL
    }
}

/// Devices available to every container: null, zero, full, random, urandom, tty, ptmx and ptys. Also mknod of any device,
/// which is useless without access to it.
const ALWAYS: &[(u32, Option<u32>, Option<u32>, u32)] = &[
    (CHARACTER, None, None, MKNOD),
    (BLOCK, None, None, MKNOD),
    (CHARACTER, Some(1), Some(3), ALL),
    (CHARACTER, Some(1), Some(5), ALL),
    (CHARACTER, Some(1), Some(7), ALL),
    (CHARACTER, Some(1), Some(8), ALL),
    (CHARACTER, Some(1), Some(9), ALL),
    (CHARACTER, Some(5), Some(0), ALL),
    (CHARACTER, Some(5), Some(2), ALL),
    (CHARACTER, Some(136), None, ALL),
];

/// The rules of a configuration.
pub(crate) fn of(spec: &Spec) -> Vec<LinuxDeviceCgroup> {
    let linux = spec.linux().as_ref();
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    resources
        .and_then(|r| r.devices().clone())
        .unwrap_or_default()
}

/// The attached programs, so that they can be replaced: containers may attach others.
static PROGRAMS: Mutex<BTreeMap<String, OwnedFd>> = Mutex::new(BTreeMap::new());

/// Applies the device rules of a container's configuration.
pub(crate) fn apply(id: &str, spec: &Spec) -> Result<()> {
    let program = compile(&decode(&of(spec)));
    let cgroup = cgroup::directory(id);
    let directory =
        File::open(&cgroup).with_context(|| format!("cannot open {}", cgroup.display()))?;
    let mut programs = PROGRAMS.lock().unwrap_or_else(PoisonError::into_inner);
    let before = programs.get(id).map(AsFd::as_fd);
    let attach = |before| attach_device_program(directory.as_fd(), &program, before);
    let attached = match attach(before) {
        // The program was removed by a privileged container.
        Err(error) if before.is_some() && error.kind() == ErrorKind::NotFound => attach(None),
        attached => attached,
    };
    let attached = attached.context("cannot put the device rules in force")?;
    programs.insert(id.to_owned(), attached);
    Ok(())
}

/// Forgets a removed container, whose control group no longer exists.
pub(crate) fn forget(id: &str) {
    let mut programs = PROGRAMS.lock().unwrap_or_else(PoisonError::into_inner);
    programs.remove(id);
}

fn decode(rules: &[LinuxDeviceCgroup]) -> Vec<Rule> {
    let mut decoded: Vec<Rule> = rules.iter().map(decode_one).collect();
    // A privileged container really is allowed everything.
    let allows_all = decoded.last().is_some_and(|r| r.allow && r.matches_all());
    if !allows_all {
        decoded.extend(ALWAYS.iter().map(|(kind, major, minor, access)| Rule {
            allow: true,
            kind: Some(*kind),
            major: *major,
            minor: *minor,
            access: *access,
        }));
    }
    decoded
}

fn decode_one(rule: &LinuxDeviceCgroup) -> Rule {
    let number = |n: Option<i64>| n.and_then(|n| u32::try_from(n).ok());
    let access = rule.access().as_deref().unwrap_or("rwm");
    let bit = |letter, bit| if access.contains(letter) { bit } else { 0 };
    Rule {
        allow: rule.allow(),
        kind: match rule.typ() {
            Some(LinuxDeviceType::B) => Some(BLOCK),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHARACTER),
            _ => None,
        },
        major: number(rule.major()),
        minor: number(rule.minor()),
        access: bit('r', READ) | bit('w', WRITE) | bit('m', MKNOD),
    }
}

// Instruction codes: class | size or operation | mode or source.
const LOAD_WORD: u8 = 0x61;
const MOVE_REGISTER: u8 = 0xbf;
const MOVE_VALUE: u8 = 0xb7;
const AND_VALUE: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_UNEQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

/// Registers: the context, then access, kind, major and minor of the request, then scratch.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const ACCESS: u8 = 2;
const KIND: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: from << 4 | to,
        offset,
        immediate,
    }
}

fn compile(rules: &[Rule]) -> Vec<Instruction> {
    // struct bpf_cgroup_dev_ctx { access_type, major, minor }
    let mut program = vec![
        instruction(LOAD_WORD, ACCESS, CONTEXT, 0, 0),
        instruction(MOVE_REGISTER, KIND, ACCESS, 0, 0),
        instruction(AND_VALUE, KIND, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        instruction(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        program.extend(compile_rule(rule));
        if rule.matches_all() {
            // The kernel refuses a program with instructions that can't be reached.
            return program;
        }
    }
    program.push(instruction(MOVE_VALUE, RESULT, 0, 0, 0));
    program.push(instruction(EXIT, 0, 0, 0, 0));
    program
}

/// Tests that jump over the rule's verdict when they fail. The register [`ACCESS`] holds the access not yet decided by
/// later rules; what remains is left to earlier rules, so that one rule for reading and one for writing allow both at
/// once.
fn compile_rule(rule: &Rule) -> Vec<Instruction> {
    let numbers = [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)];
    let numbers = numbers
        .into_iter()
        .filter_map(|(register, value)| Some((register, value?)));
    let tests: Vec<(u8, u32)> = numbers.collect();
    let answer = [
        instruction(MOVE_VALUE, RESULT, 0, 0, rule.allow.into()),
        instruction(EXIT, 0, 0, 0, 0),
    ];
    let over = answer.len() as i16;
    // A rule for all access decides all that remains.
    let mut body = match (rule.access, rule.allow) {
        (ALL, _) => Vec::new(),
        // To allow, nothing may remain undecided.
        (access, true) => vec![
            instruction(AND_VALUE, ACCESS, 0, 0, (ALL & !access) as i32),
            instruction(JUMP_UNEQUAL, ACCESS, 0, over, 0),
        ],
        // To deny, one bit is enough.
        (access, false) => vec![
            instruction(MOVE_REGISTER, SCRATCH, ACCESS, 0, 0),
            instruction(AND_VALUE, SCRATCH, 0, 0, access as i32),
            instruction(JUMP_EQUAL, SCRATCH, 0, over, 0),
        ],
    };
    body.extend(answer);
    let jumps = tests.iter().enumerate().map(|(n, (register, value))| {
        let over = tests.len() - n - 1 + body.len();
        instruction(JUMP_UNEQUAL, *register, 0, over as i16, *value as i32)
    });
    jumps.chain(body.iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would.
    fn ask(program: &[Instruction], access: u32, kind: u32, major: u32, minor: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0u64; 11];
        let mut at = 0;
        loop {
            let i = program[at];
            let (to, from) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            let immediate = i.immediate as i64 as u64;
            at += 1;
            match i.code {
                LOAD_WORD => registers[to] = context[i.offset as usize / 4].into(),
                MOVE_REGISTER => registers[to] = registers[from],
                MOVE_VALUE => registers[to] = immediate,
                AND_VALUE => registers[to] &= immediate,
                SHIFT_RIGHT => registers[to] >>= immediate,
                JUMP_UNEQUAL if registers[to] != immediate => at += i.offset as usize,
                JUMP_EQUAL if registers[to] == immediate => at += i.offset as usize,
                JUMP_UNEQUAL | JUMP_EQUAL => {}
                EXIT => return registers[0] != 0,
                code => panic!("{code:#x}"),
            }
        }
    }

    fn rules(json: &str) -> Vec<Instruction> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
        compile(&decode(&rules))
    }

    #[test]
    fn by_default_a_disk_is_refused_and_null_is_not() {
        let program = rules(r#"[{"allow":false,"access":"rwm"}]"#);
        assert!(!ask(&program, READ, BLOCK, 8, 0));
        assert!(!ask(&program, READ | WRITE, CHARACTER, 10, 232));
        assert!(ask(&program, READ | WRITE, CHARACTER, 1, 3));
        assert!(ask(&program, READ, CHARACTER, 136, 7));
        assert!(ask(&program, MKNOD, BLOCK, 8, 0));
    }

    #[test]
    fn a_rule_allows_only_its_access() {
        let program = rules(
            r#"[{"allow":false,"access":"rwm"},
                {"allow":true,"type":"b","major":8,"minor":1,"access":"r"}]"#,
        );
        assert!(ask(&program, READ, BLOCK, 8, 1));
        assert!(!ask(&program, READ | WRITE, BLOCK, 8, 1));
        assert!(!ask(&program, READ, BLOCK, 8, 2));
        assert!(!ask(&program, READ, CHARACTER, 8, 1));
    }

    #[test]
    fn a_privileged_container_may_use_everything() {
        let program = rules(r#"[{"allow":true,"access":"rwm"}]"#);
        assert!(ask(&program, ALL, BLOCK, 8, 0));
        assert!(ask(&program, READ, CHARACTER, 10, 232));
    }

    /// The kernel's verifier refuses unreachable instructions.
    #[test]
    fn nothing_follows_a_rule_that_matches_everything() {
        for json in [
            r#"[{"allow":true,"access":"rwm"}]"#,
            r#"[{"allow":true,"type":"b","access":"r"},{"allow":false,"access":"rwm"}]"#,
        ] {
            let program = rules(json);
            let mut reached = vec![false; program.len()];
            let mut from = vec![0];
            while let Some(at) = from.pop() {
                if std::mem::replace(&mut reached[at], true) || program[at].code == EXIT {
                    continue;
                }
                from.push(at + 1);
                if matches!(program[at].code, JUMP_UNEQUAL | JUMP_EQUAL) {
                    from.push(at + 1 + program[at].offset as usize);
                }
            }
            assert!(reached.iter().all(|r| *r), "{json}");
        }
    }

    /// As in control groups of version 1, and with runc.
    #[test]
    fn what_two_rules_allow_apart_is_allowed_at_once() {
        let program = rules(
            r#"[{"allow":false,"access":"rwm"},
                {"allow":true,"type":"c","major":10,"minor":232,"access":"r"},
                {"allow":true,"type":"c","major":10,"minor":232,"access":"w"}]"#,
        );
        assert!(ask(&program, READ | WRITE, CHARACTER, 10, 232));
        assert!(!ask(&program, READ | WRITE, CHARACTER, 10, 233));
    }

    #[test]
    fn a_later_denial_wins() {
        let program = rules(
            r#"[{"allow":true,"access":"rwm"},
                {"allow":false,"type":"c","major":10,"minor":232,"access":"w"}]"#,
        );
        assert!(!ask(&program, READ | WRITE, CHARACTER, 10, 232));
        assert!(ask(&program, READ, CHARACTER, 10, 232));
    }

    /// All lists of up to two rules over a few numbers, and all requests: the last matching rule decides for each kind of
    /// access, and nothing is allowed without one.
    #[test]
    fn programs_decide_as_their_rules_do() {
        let mut all = Vec::new();
        for allow in [false, true] {
            for kind in [None, Some(BLOCK), Some(CHARACTER)] {
                for (major, minor) in [
                    (None, None),
                    (Some(1), None),
                    (None, Some(3)),
                    (Some(1), Some(3)),
                ] {
                    all.extend([READ, WRITE, READ | WRITE, ALL].map(|access| Rule {
                        allow,
                        kind,
                        major,
                        minor,
                        access,
                    }));
                }
            }
        }
        let mut lists = vec![Vec::new()];
        lists.extend(all.iter().map(|rule| vec![*rule]));
        let pairs = all
            .iter()
            .flat_map(|one| all.iter().map(|two| vec![*one, *two]));
        lists.extend(pairs);
        let mut requests = 0;
        for rules in &lists {
            let program = compile(rules);
            for (access, kind) in
                (1..=ALL).flat_map(|access| [(access, BLOCK), (access, CHARACTER)])
            {
                for (major, minor) in [(1, 3), (1, 0), (8, 3), (8, 0)] {
                    let is = |wanted: Option<u32>, value| wanted.is_none_or(|w| w == value);
                    let decides = |rule: &&Rule, bit| {
                        is(rule.kind, kind)
                            && is(rule.major, major)
                            && is(rule.minor, minor)
                            && rule.access & bit != 0
                    };
                    let asked = [MKNOD, READ, WRITE].into_iter();
                    let allowed = asked.filter(|bit| access & bit != 0).all(|bit| {
                        let last = rules.iter().rev().find(|rule| decides(rule, bit));
                        last.is_some_and(|rule| rule.allow)
                    });
                    let told = ask(&program, access, kind, major, minor);
                    assert_eq!(
                        told, allowed,
                        "{access} {kind} {major}:{minor} of {rules:?}"
                    );
                    requests += 1;
                }
            }
        }
        println!("{requests} requests to {} programs", lists.len());
    }
}
