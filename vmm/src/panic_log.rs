//! The guest kernel's last words: ramoops (Documentation/admin-guide/ramoops.rst) in a piece of
//! memory that the guest's memory map reserves. The guest writes it, so it is read as text of
//! unknown origin and bounded by the region's size.

use crate::arch::layout::{PANIC_LOG, PANIC_LOG_SIZE};
use crate::exit::ExitReason;
use koya_devices::virtio::Memory;
use vm_memory::{Bytes, GuestAddress};

/// "DBGC": fs/pstore/ram_core.c, PERSISTENT_RAM_SIG.
const SIGNATURE: u32 = 0x4347_4244;
/// signature, start, size
const HEADER: usize = 12;
const RECORDS: u64 = 2;

/// Words for the guest's command line that make it use the region.
pub(crate) fn cmdline() -> String {
    format!(
        "ramoops.mem_address={PANIC_LOG:#x} ramoops.mem_size={PANIC_LOG_SIZE:#x} \
         ramoops.record_size={:#x} ramoops.console_size=0 ramoops.ftrace_size=0 \
         ramoops.pmsg_size=0 ramoops.mem_type=2",
        PANIC_LOG_SIZE / RECORDS
    )
}

/// The panic that the guest left behind, if it did.
pub(crate) fn read(memory: &Memory) -> Option<ExitReason> {
    let size = (PANIC_LOG_SIZE / RECORDS) as usize;
    (0..RECORDS).find_map(|record| {
        let mut bytes = vec![0; size];
        let at = GuestAddress(PANIC_LOG + record * size as u64);
        memory.read_slice(&mut bytes, at).ok()?;
        parse(&bytes)
    })
}

fn parse(record: &[u8]) -> Option<ExitReason> {
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
    let log = String::from_utf8_lossy(&data[..len]).into_owned();
    const MARK: &str = "Kernel panic - not syncing: ";
    let message = log.lines().find_map(|l| Some(l.split_once(MARK)?.1))?;
    Some(ExitReason::Panic {
        message: message.trim().to_owned(),
        log,
    })
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
        let text = "====1.2-D\n<0>[ 1.0] Kernel panic - not syncing: Attempted to kill init!\nmore";
        let found = parse(&record(text, text.len() as u32)).unwrap();
        let ExitReason::Panic { message, log } = found else {
            panic!()
        };
        assert_eq!(message, "Attempted to kill init!");
        assert_eq!(log, text);
    }

    #[test]
    fn a_guest_that_lies_about_sizes_gets_no_more_than_the_region() {
        assert!(parse(&record("Kernel panic - not syncing: x", u32::MAX)).is_some());
        assert_eq!(parse(&record("", u32::MAX)), None);
        assert_eq!(parse(&[]), None);
        assert_eq!(parse(&[0; 64]), None);
    }
}
