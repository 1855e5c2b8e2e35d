//! The program of a filter, in classic BPF (`linux/filter.h`, `linux/seccomp.h`).
//!
//! The kernel checks and translates a program anew for each thread that loads it, and runs it once for every system call
//! number to find the calls that need no look at their arguments. That adds to the start-up time of a container. So the
//! number is found by binary search and the code after it is shared: a quarter of the instructions that seccompiler
//! generates from the same table (five for each call, one after the other), and a tenth of the steps. The tests compare
//! both.

use super::calls::{Argument, Value};
use seccompiler::{BpfProgram, sock_filter};
use std::collections::BTreeMap;
use std::io;

// BPF: loads, jumps, arithmetic and returns, as far as they are used here.
const LD_W_ABS: u16 = 0x20;
const ALU_AND_K: u16 = 0x54;
const JMP_JA: u16 = 0x05;
const JMP_JEQ_K: u16 = 0x15;
const JMP_JGE_K: u16 = 0x35;
const RET_K: u16 = 0x06;

// struct seccomp_data, on little-endian machines.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

const KILL_PROCESS: u32 = libc::SECCOMP_RET_KILL_PROCESS;
const TRAP: u32 = libc::SECCOMP_RET_TRAP;
pub(super) const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;

/// A conditional jump reaches 255 instructions; one is reserved for the jump of the other branch.
const REACH: usize = 254;

/// The filter's decision for a system call.
pub(super) enum Verdict {
    /// A value of `SECCOMP_RET_*`.
    Always(u32),
    /// Allows the call if one of these alternatives holds: all conditions of it.
    If(Vec<&'static [Argument]>),
}

/// The program for these verdicts by system call number; all other calls are trapped.
///
/// # Errors
/// On an unsupported architecture.
pub(super) fn of(verdicts: &BTreeMap<u32, Verdict>) -> io::Result<BpfProgram> {
    let architecture = architecture()?;
    let mut program = Backwards(Vec::new());
    let kill = program.push(RET_K, KILL_PROCESS);
    let trap = program.push(RET_K, TRAP);
    let allow = program.push(RET_K, ALLOW);
    // Start of each range of numbers, with its code.
    let mut ranges: Vec<(u32, Label)> = vec![(0, trap)];
    for (number, verdict) in verdicts {
        let label = match verdict {
            Verdict::Always(ALLOW) => allow,
            Verdict::Always(value) => program.push(RET_K, *value),
            Verdict::If(alternatives) => program.alternatives(alternatives, allow, trap),
        };
        // The number may be the end of the previous range.
        ranges.pop_if(|(start, _)| start == number);
        ranges.extend([(*number, label), (number + 1, trap)]);
    }
    ranges.dedup_by_key(|(_, label)| *label);
    let search = program.search(&ranges);
    program.go_to(search);
    let number = program.push(LD_W_ABS, NUMBER);
    program.branch(JMP_JEQ_K, architecture, number, kill);
    program.push(LD_W_ABS, ARCHITECTURE);
    program.0.reverse();
    Ok(program.0)
}

/// The audit constant of this architecture (`linux/audit.h`).
fn architecture() -> io::Result<u32> {
    match std::env::consts::ARCH {
        "x86_64" => Ok(0xc000_003e),
        "aarch64" => Ok(0xc000_00b7),
        other => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("there are no filters of system calls for {other}"),
        )),
    }
}

/// A position in the program, as the number of instructions after it.
type Label = usize;

/// A program in reverse: jumps lead forward only, so the last instruction is generated first.
struct Backwards(Vec<sock_filter>);

impl Backwards {
    fn push(&mut self, code: u16, k: u32) -> Label {
        self.jump(code, k, 0, 0)
    }

    fn jump(&mut self, code: u16, k: u32, jt: u8, jf: u8) -> Label {
        self.0.push(sock_filter { code, jt, jf, k });
        self.0.len() - 1
    }

    /// Number of instructions that a jump from the next one to `to` skips.
    fn distance(&self, to: Label) -> usize {
        self.0.len() - to - 1
    }

    /// Makes the next instruction `to` itself, or a jump to it.
    fn go_to(&mut self, to: Label) {
        let distance = self.distance(to);
        if distance > 0 {
            self.push(JMP_JA, distance as u32);
        }
    }

    /// `to`, or a jump to it within the reach of a branch.
    fn near(&mut self, to: Label) -> Label {
        let distance = self.distance(to);
        match distance > REACH {
            true => self.push(JMP_JA, distance as u32),
            false => to,
        }
    }

    fn branch(&mut self, code: u16, k: u32, yes: Label, no: Label) -> Label {
        let (yes, no) = (self.near(yes), self.near(no));
        let (jt, jf) = (self.distance(yes), self.distance(no));
        // `near` leaves room for the jump that it adds for the other branch.
        self.jump(code, k, jt as u8, jf as u8)
    }

    /// Code that finds the range of the loaded number.
    fn search(&mut self, ranges: &[(u32, Label)]) -> Label {
        let (low, high) = ranges.split_at(ranges.len() / 2);
        match (low, high) {
            ([], [(_, label)]) => *label,
            _ => {
                let above = self.search(high);
                let below = self.search(low);
                self.branch(JMP_JGE_K, high[0].0, above, below)
            }
        }
    }

    fn alternatives(&mut self, all: &[&[Argument]], allow: Label, trap: Label) -> Label {
        all.iter().rev().fold(trap, |otherwise, conditions| {
            conditions.iter().rev().fold(allow, |then, condition| {
                self.condition(condition, then, otherwise)
            })
        })
    }

    fn condition(&mut self, argument: &Argument, then: Label, otherwise: Label) -> Label {
        let value = match argument.value {
            Value::Number(number) => number,
            Value::OwnProcess => rustix::process::getpid().as_raw_nonzero().get() as u64,
        };
        let place = ARGUMENTS + 8 * u32::from(argument.index);
        let halves = [(place, 0), (place + 4, 32)];
        halves.into_iter().fold(then, |then, (place, shift)| {
            let mask = (argument.mask >> shift) as u32;
            let value = (value >> shift) as u32 & mask;
            if mask == 0 {
                return then;
            }
            self.branch(JMP_JEQ_K, value, then, otherwise);
            if mask != u32::MAX {
                self.push(ALU_AND_K, mask);
            }
            self.push(LD_W_ABS, place)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::calls::{CALLS, Call, OWN_CALLS};
    use super::super::{Filter, rows, verdicts};
    use super::*;
    use seccompiler::{
        SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    };

    /// Runs a program as the kernel does; returns the verdict and the number of steps.
    fn run(program: &[sock_filter], number: u32, arguments: [u64; 6]) -> (u32, usize) {
        let (mut accumulator, mut at, mut steps) = (0, 0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            let branch = |holds: bool| usize::from(if holds { jt } else { jf });
            steps += 1;
            at += 1;
            match code {
                LD_W_ABS => {
                    accumulator = match k {
                        NUMBER => number,
                        ARCHITECTURE => architecture().unwrap(),
                        _ => {
                            let argument = arguments[(k - ARGUMENTS) as usize / 8];
                            (argument >> (8 * ((k - ARGUMENTS) % 8))) as u32
                        }
                    }
                }
                ALU_AND_K => accumulator &= k,
                JMP_JA => at += k as usize,
                JMP_JEQ_K => at += branch(accumulator == k),
                JMP_JGE_K => at += branch(accumulator >= k),
                RET_K => return (k, steps),
                other => panic!("{other:#x}"),
            }
        }
    }

    fn value(argument: &Argument) -> u64 {
        match argument.value {
            Value::Number(number) => number,
            Value::OwnProcess => u64::from(std::process::id()),
        }
    }

    /// The program that seccompiler generates from the same rows.
    fn theirs(filter: Filter) -> BpfProgram {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        for row in rows().filter(|row| row.filters & filter.bit() != 0) {
            let alternatives = rules.entry(row.number).or_default();
            let conditions = row.arguments.iter().map(|argument| {
                let is = SeccompCmpOp::MaskedEq(argument.mask);
                let long = SeccompCmpArgLen::Qword;
                SeccompCondition::new(argument.index, long, is, value(argument)).unwrap()
            });
            let conditions: Vec<_> = conditions.collect();
            if !conditions.is_empty() {
                alternatives.push(SeccompRule::new(conditions).unwrap());
            }
        }
        let architecture = std::env::consts::ARCH.try_into().unwrap();
        let (trap, allow) = (SeccompAction::Trap, SeccompAction::Allow);
        let filter = SeccompFilter::new(rules, trap, allow, architecture).unwrap();
        filter.try_into().unwrap()
    }

    /// Arguments that satisfy a row, and others that differ in one bit.
    fn arguments(row: &Call) -> Vec<[u64; 6]> {
        let mut fitting = [0; 6];
        for argument in row.arguments {
            fitting[argument.index as usize] = value(argument);
        }
        let mut all = vec![fitting, [u64::MAX; 6], [0; 6]];
        for index in 0..6 {
            for bit in 0..64 {
                let mut other = fitting;
                other[index] ^= 1 << bit;
                all.push(other);
            }
        }
        all
    }

    #[test]
    fn programs_decide_as_seccompilers_do() {
        let mut compared = 0;
        for filter in Filter::ALL {
            let (ours, theirs) = (of(&verdicts(filter)).unwrap(), theirs(filter));
            let numbers = (0..1024).chain([1 << 30, 0x4000_0001, u32::MAX]);
            let plain = numbers.map(|number| (number, vec![[0; 6], [u64::MAX; 6]]));
            let with = rows().map(|row| (row.number as u32, arguments(row)));
            for (number, arguments) in plain.chain(with) {
                for arguments in arguments {
                    let (ours, _) = run(&ours, number, arguments);
                    let (mut theirs, _) = run(&theirs, number, arguments);
                    if number == libc::SYS_clone3 as u32 && filter.creates_threads() {
                        theirs = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
                    }
                    assert_eq!(ours, theirs, "{filter:?}: {number} {arguments:x?}");
                    compared += 1;
                }
            }
        }
        println!("{compared} calls of {} rows", CALLS.len() + OWN_CALLS.len());
    }

    #[test]
    fn a_number_is_found_in_few_steps() {
        for filter in Filter::ALL {
            let (ours, theirs) = (of(&verdicts(filter)).unwrap(), theirs(filter));
            let steps = |program: &[sock_filter]| -> usize {
                (0..512).map(|number| run(program, number, [0; 6]).1).sum()
            };
            println!(
                "{filter:?}: {} instructions, {} steps; seccompiler's: {}, {}",
                ours.len(),
                steps(&ours) / 512,
                theirs.len(),
                steps(&theirs) / 512
            );
            assert!(ours.len() * 2 < theirs.len() && steps(&ours) * 2 < steps(&theirs));
        }
    }

    #[test]
    fn branches_that_are_too_long_go_by_way_of_a_jump() {
        // Two hundred calls with conditions, no two of them adjacent.
        const ODD: &[Argument] = &[Argument {
            index: 0,
            mask: 1,
            value: Value::Number(1),
        }];
        let calls = (0..200).map(|call| (call * 3, Verdict::If(vec![ODD])));
        let mut verdicts: BTreeMap<u32, Verdict> = calls.collect();
        verdicts.insert(1, Verdict::Always(ALLOW));
        let program = of(&verdicts).unwrap();
        assert!(program.len() > 3 * REACH);
        for number in 0..1000 {
            for first in [0, 1] {
                let conditional = number % 3 == 0 && number < 600 && first == 1;
                let wanted = if conditional || number == 1 {
                    ALLOW
                } else {
                    TRAP
                };
                let arguments = [first, 0, 0, 0, 0, 0];
                assert_eq!(run(&program, number, arguments).0, wanted, "{number}");
            }
        }
        assert_eq!(run(&of(&BTreeMap::new()).unwrap(), 1, [0; 6]).0, TRAP);
    }
}
