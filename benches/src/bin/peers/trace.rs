//! Reads the host kernel's trace (Documentation/trace/ftrace.rst, `include/trace/events/kvm.h`) of this program's children:
//! their system calls, and the entries and exits of their guests.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

const TRACING: &str = "/sys/kernel/debug/tracing";
/// Entries of guests.
pub(crate) const ENTRIES: &[&str] = &["kvm/kvm_entry"];
/// The same, and system calls.
pub(crate) const ENTRIES_AND_CALLS: &[&str] = &["kvm/kvm_entry", "raw_syscalls/sys_enter"];
/// Exits of guests, each followed by its details; those of one architecture are left out on another.
pub(crate) const EXITS: &[&str] = &[
    "kvm/kvm_exit",
    "kvm/kvm_pio",
    "kvm/kvm_mmio",
    "kvm/kvm_msr",
    "kvm/kvm_cpuid",
    "kvm/kvm_page_fault",
    "kvm/kvm_sys_access",
    "kvm/kvm_hvc_arm64",
];
/// execve in the format of the trace.
fn is_exec(words: &str) -> bool {
    let number = match std::env::consts::ARCH {
        "aarch64" => "NR 221 ",
        _ => "NR 59 ",
    };
    words.starts_with(number)
}

/// Traces these events until it is dropped.
pub(crate) struct Trace<'a> {
    events: &'a [&'a str],
}

impl<'a> Trace<'a> {
    /// Begins a trace, if there are events to trace.
    ///
    /// # Errors
    /// If the kernel has no such trace.
    pub(crate) fn begin(events: &'a [&'a str]) -> io::Result<Self> {
        if !events.is_empty() {
            set("trace_clock", "mono")?;
            set("options/event-fork", "1")?;
            set("set_event_pid", &std::process::id().to_string())?;
            // The first events are the important ones.
            set("options/overwrite", "0")?;
            set("trace", "")?;
        }
        let trace = Self { events };
        for event in events {
            let file = format!("events/{event}/enable");
            if Path::new(TRACING).join(&file).exists() {
                set(&file, "1")?;
            }
        }
        Ok(trace)
    }

    /// Ends the trace and returns it.
    ///
    /// # Errors
    /// If it can't be read.
    pub(crate) fn end(self) -> io::Result<String> {
        match self.events {
            [] => Ok(String::new()),
            _ => fs::read_to_string(Path::new(TRACING).join("trace")),
        }
    }
}

impl Drop for Trace<'_> {
    fn drop(&mut self) {
        for event in self.events {
            let file = format!("events/{event}/enable");
            let is_there = Path::new(TRACING).join(&file).exists();
            if is_there && let Err(error) = set(&file, "0") {
                eprintln!("{event} can't be turned off: {error}");
            }
        }
    }
}

fn set(file: &str, value: &str) -> io::Result<()> {
    fs::write(Path::new(TRACING).join(file), value)
}

/// Parses a line of a trace: time in milliseconds, event, and details.
/// `vcpu-7 [000] d... 12.345678: kvm_entry: vcpu 0, ...`
fn parts(line: &str) -> Option<(f64, &str, &str)> {
    let (before, event) = line.split_once(": ")?;
    let (event, words) = event.split_once(": ")?;
    let seconds: f64 = before.split_whitespace().last()?.parse().ok()?;
    Some((seconds * 1e3, event, words))
}

/// System calls from exec up to the first entry of a guest, without those of this process; and the time of that entry, in
/// milliseconds of the trace's clock.
pub(crate) fn first_entry(trace: &str, this: u32) -> Option<(usize, f64)> {
    let own = format!("-{this} ");
    let mut calls = None;
    for line in trace.lines().filter(|line| !line.contains(&own)) {
        let Some((at, event, words)) = parts(line) else {
            continue;
        };
        match event {
            "kvm_entry" => return Some((calls.unwrap_or(0), at)),
            "sys_enter" if is_exec(words) && calls.is_none() => calls = Some(1),
            "sys_enter" => calls = calls.map(|calls| calls + 1),
            _ => {}
        }
    }
    None
}

/// Exits of a guest by reason, the most frequent first, up to a time in milliseconds of the trace's clock.
pub(crate) fn exits(trace: &str, until: f64) -> Vec<(usize, String)> {
    let (mut exits, mut is_told): (Vec<String>, _) = (Vec::new(), true);
    for line in trace.lines() {
        let Some((at, event, words)) = parts(line) else {
            continue;
        };
        if at > until {
            break;
        }
        match (event, exits.last_mut()) {
            ("kvm_exit", _) => {
                exits.push(reason(words));
                is_told = false;
            }
            // Only the first event counts: an emulated access is traced twice.
            (_, Some(exit)) if !is_told => {
                exit.push_str(&format!(": {}", subject(event, words)));
                is_told = true;
            }
            _ => {}
        }
    }
    let mut counts = BTreeMap::new();
    for exit in exits {
        *counts.entry(exit).or_insert(0) += 1;
    }
    let mut all: Vec<_> = counts.into_iter().map(|(exit, n)| (n, exit)).collect();
    all.sort_by_key(|(count, _)| Reverse(*count));
    all
}

/// `vcpu 0 reason npf rip 0x... info1 ...`, on aarch64 `TRAP: HSR_EC: 0x0024 (DABT_LOW), PC: 0x...`
fn reason(words: &str) -> String {
    if let Some((_, class)) = words.split_once('(') {
        return class.split(')').next().unwrap_or(class).to_owned();
    }
    let mut words = words.split_whitespace().skip_while(|w| *w != "reason");
    words.nth(1).unwrap_or("unknown").to_owned()
}

/// The port, register or page, without the value written.
fn subject(event: &str, words: &str) -> String {
    let words = words.split_whitespace();
    let (skipped, taken) = match event {
        // `pio_write at 0x3f8 size 1 count 1 val 0x41`
        "kvm_pio" => (0, 3),
        // `mmio write len 4 gpa 0xc0000050 val 0x1`
        "kvm_mmio" => (0, 6),
        // `func 80000008 idx 0 rax ...`; the index is the previous value of the register
        "kvm_cpuid" => (0, 2),
        // `msr_write 4b564d01 = 0x...`
        "kvm_msr" => (0, 2),
        // `PC: ffff80008001c0f8 SYS_ICC_SGI1R_EL1 (3,0,12,11,5) write`
        "kvm_sys_access" => (2, 1),
        // `HVC at 0xffff80008001c0f8 (r0: 0x0000000084000000, imm: 0x0)`
        "kvm_hvc_arm64" => (3, 2),
        // `vcpu 0 rip 0x... address 0x... error_code 0x...`
        _ => (4, 4),
    };
    let words: Vec<_> = words.skip(skipped).take(taken).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "# tracer: nop
 peers-1 [000] ..... 1.000000: sys_enter: NR 59 (1, 2)
 monitor-7 [000] ..... 1.000100: sys_enter: NR 59 (1, 2)
 monitor-7 [000] ..... 1.000200: sys_enter: NR 12 (0)
 peers-1 [000] ..... 1.000300: sys_enter: NR 7 (0)
 vcpu-8 [000] d.... 1.002000: kvm_entry: vcpu 0, rip 0x100
";

    #[test]
    fn system_calls_are_those_from_exec_to_the_first_entry() {
        let (calls, at) = first_entry(TRACE, 1).unwrap();
        assert_eq!(calls, 2);
        assert!((at - 1002.0).abs() < 1e-6);
        assert_eq!(first_entry("# tracer: nop", 1), None);
    }

    #[test]
    fn exits_are_told_by_what_they_were_for() {
        let trace = "
 vcpu-8 [000] d.... 1.000: kvm_exit: vcpu 0 reason io rip 0x1 info1 0x0
 vcpu-8 [000] ..... 1.001: kvm_pio: pio_write at 0x3f8 size 1 count 1 val 0x41
 vcpu-8 [000] d.... 1.002: kvm_exit: vcpu 0 reason io rip 0x1 info1 0x0
 vcpu-8 [000] ..... 1.003: kvm_pio: pio_write at 0x3f8 size 1 count 1 val 0x42
 vcpu-8 [000] d.... 1.004: kvm_exit: vcpu 0 reason hlt rip 0x1 info1 0x0
 vcpu-8 [000] d.... 9.000: kvm_exit: vcpu 0 reason interrupt rip 0x1 info1 0x0
";
        let expected = vec![
            (2, "io: pio_write at 0x3f8".to_owned()),
            (1, "hlt".to_owned()),
        ];
        assert_eq!(exits(trace, 2000.0), expected);
    }

    #[test]
    fn exits_of_aarch64_are_told_as_well() {
        let trace = "
 vcpu-8 [000] d.... 1.000: kvm_exit: TRAP: HSR_EC: 0x0024 (DABT_LOW), PC: 0x1
 vcpu-8 [000] ..... 1.001: kvm_mmio: mmio write len 4 gpa 0x40000050 val 0x1
 vcpu-8 [000] d.... 1.002: kvm_exit: TRAP: HSR_EC: 0x0018 (SYS64), PC: 0x2
 vcpu-8 [000] ..... 1.003: kvm_sys_access: PC: 2 ICC_SGI1R_EL1 (3,0,12,11,5) write
 vcpu-8 [000] d.... 1.004: kvm_exit: IRQ: HSR_EC: 0x0000 (UNKNOWN), PC: 0x3
";
        let all: Vec<_> = exits(trace, 2000.0).into_iter().map(|(_, e)| e).collect();
        let mmio = "DABT_LOW: mmio write len 4 gpa 0x40000050";
        assert_eq!(all, [mmio, "SYS64: ICC_SGI1R_EL1", "UNKNOWN"]);
    }
}
