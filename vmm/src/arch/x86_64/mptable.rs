//! The MP table (Intel MultiProcessor Specification 1.4, chapter 4), which describes CPUs and interrupt routing to a guest
//! without ACPI.

use super::layout;

/// Local APIC version: 0x14 is an integrated APIC.
const APIC_VERSION: u8 = 0x14;
const ENABLED: u8 = 1;
const BOOT_CPU: u8 = 2;
const ISA_BUS: u8 = 0;
const ALL_CPUS: u8 = 0xff;

/// The floating pointer structure followed by the table, to be placed at [`layout::MPTABLE`].
pub(super) fn build(cpus: u32) -> Vec<u8> {
    let ioapic_id = cpus as u8;
    let mut entries = Vec::new();
    let mut count = 0u16;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for cpu in 0..cpus as u8 {
        let flags = ENABLED | if cpu == 0 { BOOT_CPU } else { 0 };
        let mut bytes = [0; 20];
        bytes[..4].copy_from_slice(&[0, cpu, APIC_VERSION, flags]);
        // Family 6 with an APIC and an FPU; guests read signature and features from CPUID.
        bytes[4..8].copy_from_slice(&0x600u32.to_le_bytes());
        bytes[8..12].copy_from_slice(&0x201u32.to_le_bytes());
        entry(&bytes);
    }
    entry(&[1, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let mut ioapic = [2, ioapic_id, APIC_VERSION, ENABLED, 0, 0, 0, 0];
    ioapic[4..].copy_from_slice(&layout::IOAPIC.to_le_bytes());
    entry(&ioapic);
    for irq in 0..=layout::LAST_IRQ as u8 {
        // Type INT, polarity and trigger mode of the bus, one entry per pin.
        entry(&[3, 0, 0, 0, ISA_BUS, irq, ioapic_id, irq]);
    }
    // LINT0 receives PIC interrupts (ExtINT) on the first CPU, LINT1 the NMI on all.
    entry(&[4, 3, 0, 0, ISA_BUS, 0, 0, 0]);
    entry(&[4, 1, 0, 0, ISA_BUS, 0, ALL_CPUS, 1]);

    let table_address = layout::MPTABLE as u32 + 16;
    let mut out = floating_pointer(table_address);
    out.extend(header(&entries, count));
    out.extend(entries);
    out
}

fn floating_pointer(table: u32) -> Vec<u8> {
    let mut bytes = vec![0; 16];
    bytes[..4].copy_from_slice(b"_MP_");
    bytes[4..8].copy_from_slice(&table.to_le_bytes());
    // Length in 16-byte paragraphs, specification revision 1.4.
    (bytes[8], bytes[9]) = (1, 4);
    bytes[10] = checksum(&bytes);
    bytes
}

fn header(entries: &[u8], count: u16) -> Vec<u8> {
    let mut bytes = vec![0; 44];
    bytes[..4].copy_from_slice(b"PCMP");
    let len = (bytes.len() + entries.len()) as u16;
    bytes[4..6].copy_from_slice(&len.to_le_bytes());
    bytes[6] = 4;
    bytes[8..16].copy_from_slice(b"KOYA    ");
    bytes[16..28].copy_from_slice(b"MICROVM     ");
    bytes[34..36].copy_from_slice(&count.to_le_bytes());
    bytes[36..40].copy_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    let sum = checksum(&bytes).wrapping_add(checksum(entries));
    bytes[7] = sum;
    bytes
}

/// The byte that makes all bytes sum to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, b| sum.wrapping_sub(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_checksums_are_right_and_the_table_fits_for_every_number_of_cpus() {
        for cpus in 1..=crate::config::MAX_CPUS {
            let bytes = build(cpus);
            assert!(layout::MPTABLE + bytes.len() as u64 <= layout::EBDA_END);
            assert_eq!(checksum(&bytes[..16]), 0);
            let len = u16::from_le_bytes([bytes[20], bytes[21]]) as usize;
            assert_eq!(16 + len, bytes.len());
            assert_eq!(checksum(&bytes[16..]), 0);
        }
    }

    #[test]
    fn every_cpu_is_enabled_and_one_of_them_boots() {
        let bytes = build(4);
        let cpus: Vec<_> = (0..4).map(|n| &bytes[60 + 20 * n..][..20]).collect();
        for (n, cpu) in cpus.iter().enumerate() {
            assert_eq!((cpu[0], cpu[1]), (0, n as u8));
            assert_eq!(cpu[3] & ENABLED, ENABLED);
            assert_eq!(cpu[3] & BOOT_CPU != 0, n == 0);
        }
    }
}
