//! Every chain of up to two descriptors, with addresses and lengths at the limits, compared with a second reading of the rules
//! of virtio 1.2, section 2.7.5.

use crate::pool::Guest;
use koya_devices::test_utils::MEMORY_SIZE;
use koya_devices::virtio::{ChainError, QueueError};

const MEMORY: u64 = MEMORY_SIZE as u64;
const DATA: u64 = 0x10_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const SIZE: u16 = 2;

type Descriptor = (u64, u32, u16, u16);

/// What the device may do with the chain that begins with the first descriptor: the number of readable and of writable bytes.
fn expected(table: &[Descriptor; 2]) -> Result<(u32, u32), ChainError> {
    let (mut readable, mut writable) = (0, 0);
    let mut at = 0;
    // A third descriptor would be one of these again.
    for _ in 0..SIZE {
        let Some((address, len, flags, next)) = table.get(usize::from(at)) else {
            return Err(ChainError::Endless);
        };
        let is_writable = flags & WRITE != 0;
        if readable + writable + u64::from(*len) > u32::MAX.into() {
            // The walk ends before the sum overflows.
            return Err(ChainError::Endless);
        }
        if *len > 0 {
            if readable + writable + u64::from(*len) > 1 << 30 {
                return Err(ChainError::TooLarge);
            }
            if address
                .checked_add((*len).into())
                .is_none_or(|end| end > MEMORY)
            {
                return Err(ChainError::Address(*address));
            }
            match is_writable {
                true => writable += u64::from(*len),
                false if writable > 0 => return Err(ChainError::Order),
                false => readable += u64::from(*len),
            }
        }
        if flags & NEXT == 0 {
            return Ok((readable as u32, writable as u32));
        }
        at = *next;
    }
    Err(ChainError::Endless)
}

fn checked(guest: &mut Guest, table: &[Descriptor; 2]) -> Result<(u32, u32), ChainError> {
    for (index, (address, len, flags, next)) in (0..).zip(table) {
        guest.set_descriptor(index, *address, *len, *flags, *next);
    }
    match guest.queue().pop() {
        Ok(Some(chain)) => Ok((chain.readable_len(), chain.writable_len())),
        Ok(None) => panic!("a chain is available"),
        Err(QueueError::Chain { source, .. }) => Err(source),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn chains_of_two_descriptors_follow_the_rules() {
    let mut all = Vec::new();
    for address in [DATA, MEMORY - 16, MEMORY, u64::MAX - 7] {
        for len in [0, 1, 16, 17, 1 << 30, u32::MAX] {
            for flags in [0, NEXT, WRITE, NEXT | WRITE] {
                for next in [0, 1, 2, u16::MAX] {
                    all.push((address, len, flags, next));
                }
            }
        }
    }
    let mut guest = Guest::new(SIZE);
    guest.make_available(0);
    let mut count = 0;
    for first in &all {
        // Of a descriptor that is the last one, or whose next is not the second, the second does not matter.
        let is_read = first.2 & NEXT != 0 && first.3 == 1;
        let seconds = if is_read { &all[..] } else { &all[..1] };
        for second in seconds {
            let table = [*first, *second];
            assert_eq!(checked(&mut guest, &table), expected(&table), "{table:x?}");
            count += 1;
        }
    }
    println!("{count} chains");
    assert_eq!(count, 48 * 384 + 336);
}
