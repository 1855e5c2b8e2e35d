//! The guest's panic log: ramoops (Documentation/admin-guide/ramoops.rst) in a range that the guest's memory
//! map reserves. The guest can write anything there, so it is parsed as untrusted text bounded by the size of
//! the range.

use crate::arch::layout::{PANIC_LOG, PANIC_LOG_SIZE};
use crate::exit::ExitReason;
use crate::guest_text;
use koya_devices::virtio::Memory;
use vm_memory::{Bytes, GuestAddress};

/// "DBGC": fs/pstore/ram_core.c, PERSISTENT_RAM_SIG.
const SIGNATURE: u32 = 0x4347_4244;
/// signature, start, size
const HEADER: usize = 12;
const RECORDS: u64 = 2;

/// Kernel parameters that make the guest use the range.
pub(crate) fn cmdline() -> String {
    format!(
        "ramoops.mem_address={PANIC_LOG:#x} ramoops.mem_size={PANIC_LOG_SIZE:#x} \
         ramoops.record_size={:#x} ramoops.console_size=0 ramoops.ftrace_size=0 \
         ramoops.pmsg_size=0 ramoops.mem_type=2",
        PANIC_LOG_SIZE / RECORDS
    )
}

/// Adds the panic log to the exit reason: a panicking kernel resets the machine, and only the log
/// distinguishes that from an orderly shutdown.
pub fn explain(reason: ExitReason, memory: &Memory) -> ExitReason {
    if !matches!(reason, ExitReason::Reset | ExitReason::TripleFault { .. }) {
        return reason;
    }
    let size = (PANIC_LOG_SIZE / RECORDS) as usize;
    let logs = (0..RECORDS).filter_map(|record| {
        let at = GuestAddress(PANIC_LOG + record * size as u64);
        // Reads only the signature first: most guests leave no log, and reading memory that they never
        // touched is costly.
        let signature: u32 = memory.read_obj(at).ok()?;
        if signature != SIGNATURE {
            return None;
        }
        let mut bytes = vec![0; size];
        memory.read_slice(&mut bytes, at).ok()?;
        parse(&bytes)
    });
    join(reason, &logs.collect::<Vec<_>>())
}

/// Parses a record; returns its text.
fn parse(record: &[u8]) -> Option<String> {
    let word = |at: usize| {
        record
            .get(at..at + 4)?
            .try_into()
            .ok()
            .map(u32::from_le_bytes)
    };
    if word(0)? != SIGNATURE {
        return None;
    }
    let data = &record[HEADER..];
    let len = (word(8)? as usize).min(data.len());
    let text = guest_text::sanitize(&data[..len]);
    (!text.trim().is_empty()).then_some(text)
}

fn join(reason: ExitReason, logs: &[String]) -> ExitReason {
    const PANIC_PREFIX: &str = "Kernel panic - not syncing: ";
    let panic = logs.iter().find_map(|log| {
        let message = log
            .lines()
            .find_map(|l| Some(l.split_once(PANIC_PREFIX)?.1))?;
        Some(ExitReason::Panic {
            message: guest_text::sanitize_line(message.trim()),
            log: guest_text::sanitize_lines(panic_excerpt(log)),
        })
    });
    match (panic, reason) {
        (Some(panic), _) => panic,
        // A fatal oops: its text is more useful than the registers.
        (None, ExitReason::TripleFault { details, .. }) => ExitReason::TripleFault {
            details,
            log: logs
                .last()
                .map(|log| guest_text::sanitize_lines(panic_excerpt(log)))
                .unwrap_or_default(),
        },
        (None, reason) => reason,
    }
}

/// Number of lines shown before the fault: its context, such as the last output of init.
const LINES_BEFORE: usize = 5;

/// The part of a log from the first fault on. A record contains the whole kernel log since boot.
fn panic_excerpt(log: &str) -> &str {
    const FAULTS: &[&str] = &[
        "BUG: ",
        "Oops: ",
        "general protection fault",
        "kernel BUG at",
        // arm64
        "Unable to handle kernel ",
        "Internal error: ",
        "Kernel panic - not syncing: ",
    ];
    let is_fault = |line: &str| FAULTS.iter().any(|fault| line.contains(fault));
    let Some(first) = log.lines().position(is_fault) else {
        return log;
    };
    let mut ends = log.match_indices('\n').map(|(at, _)| at + 1);
    match first.checked_sub(LINES_BEFORE + 1) {
        Some(before) => ends.nth(before).map_or(log, |start| &log[start..]),
        None => log,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(text: &str, size: u32) -> Vec<u8> {
        let mut bytes = SIGNATURE.to_le_bytes().to_vec();
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(size.to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes
    }

    #[test]
    fn the_panic_line_is_found() {
        let oops = "====1.1-D\n<1>[ 1.0] BUG: unable to handle page fault";
        let text = "====1.2-D\n<0>[ 1.0] Kernel panic - not syncing: Attempted to kill init!\nmore";
        let logs = [oops, text].map(|t| parse(&record(t, t.len() as u32)).unwrap());
        let found = join(ExitReason::Reset, &logs);
        let ExitReason::Panic { message, log } = found else {
            panic!()
        };
        assert_eq!(message, "Attempted to kill init!");
        assert_eq!(log, text);
    }

    #[test]
    fn of_a_long_log_the_fault_and_what_led_to_it_are_shown() {
        let boot: String = (0..300)
            .map(|n| format!("<6>[ 0.{n}] boot {n}\n"))
            .collect();
        let fault = "<1>[ 1.0] BUG: kernel NULL pointer dereference\n<4>[ 1.0] RIP: 0010:f\n";
        let panic = "<0>[ 1.1] Kernel panic - not syncing: Fatal exception\n<0>[ 1.1] end";
        let shown = panic_excerpt(&format!("{boot}{fault}{panic}")).to_owned();
        assert!(shown.starts_with("<6>[ 0.295] boot 295\n"), "{shown}");
        assert!(shown.ends_with(&format!("{fault}{panic}")));
        assert_eq!(shown.lines().count(), LINES_BEFORE + 4);
        // Short logs and logs without a fault are shown whole.
        for whole in [&format!("one\n{panic}"), "one\ntwo", ""] {
            assert_eq!(panic_excerpt(whole), whole);
        }
    }

    /// On a fault, arm64 prints more in the lines before the one with "Oops".
    #[test]
    fn a_fault_of_arm64_is_shown_from_its_first_line() {
        let boot = "a line of the boot\n".repeat(50);
        let before = "a line of the boot\n".repeat(LINES_BEFORE);
        for fault in [
            "Unable to handle kernel paging request at virtual address 0f\n",
            "Internal error: synchronous external abort: 0000000096000010\n",
        ] {
            let more = "Mem abort info:\n".repeat(LINES_BEFORE + 1);
            let fault = format!(
                "{fault}{more}Internal error: Oops: 04\nKernel panic - not syncing: Oops\n"
            );
            let shown = panic_excerpt(&format!("{boot}{fault}")).to_owned();
            assert_eq!(shown, format!("{before}{fault}"));
        }
    }

    #[test]
    fn an_oops_before_a_triple_fault_is_kept() {
        let details = String::from("rip=0");
        let log = String::new();
        let found = join(
            ExitReason::TripleFault { details, log },
            &["<1>BUG: bad".into()],
        );
        assert_eq!(found.log(), Some("<1>BUG: bad"));
        // An oops that the guest survived is not the reason for its end.
        let survived = join(ExitReason::Reset, &["<1>BUG: bad".into()]);
        assert_eq!(survived, ExitReason::Reset);
    }

    #[test]
    fn control_characters_are_removed_from_the_log() {
        let text =
            "Kernel panic - not syncing: \x1b]0;owned\x07\x1b[2Jdone\r\nCall Trace:\n\t<TASK>";
        let found = join(
            ExitReason::Reset,
            &[parse(&record(text, text.len() as u32)).unwrap()],
        );
        let ExitReason::Panic { message, log } = found else {
            panic!()
        };
        assert_eq!(message, "done");
        assert!(log.ends_with("done\nCall Trace:\n\t<TASK>"), "{log:?}");
        assert!(!log.contains('\x1b'));
    }

    #[test]
    fn a_guest_that_lies_about_sizes_gets_no_more_than_the_region() {
        let bytes = record("Kernel panic - not syncing: x", u32::MAX);
        assert_eq!(parse(&bytes).unwrap().len(), bytes.len() - HEADER);
        assert_eq!(parse(&record("", u32::MAX)), None);
        assert_eq!(parse(&[]), None);
        assert_eq!(parse(&[0; 64]), None);
    }
}
