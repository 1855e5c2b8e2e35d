//! Drivers that violate the virtio specification, one after the other, in an endless loop.

use super::program::{Descriptor, MEMORY, Program, Rings, SLOT, Target, register};

/// A kind of attack: a guest for the device in the first slot.
pub(crate) type Attack = fn(&Target) -> Program;

pub(crate) const ATTACKS: &[(&str, Attack)] = &[
    ("registers of every width, also read-only ones", registers),
    ("kicks without end", kicks),
    ("resets amid requests", resets),
    ("features and queues changed while live", live),
    ("broken chains", chains),
    ("broken rings", rings),
    ("indexes that jump", indexes),
    ("full queues of hostile requests", requests),
    ("addresses without a device", nowhere),
];

/// Every register, aligned and not, with one, two and four bytes; the configuration space likewise.
fn registers(_: &Target) -> Program {
    let mut guest = Program::new();
    let again = guest.here();
    for offset in (0..0x110).chain([0xffc, 0xffd, 0xfff]) {
        let address = SLOT + offset;
        for value in [0u32, 1, 0xffff_ffff, 0x8000_0001] {
            guest.store8(address, value as u8);
            guest.store16(address, value as u16);
            guest.store(address, value);
        }
        guest.loads(address);
    }
    guest.again(again);
    guest
}

fn kicks(target: &Target) -> Program {
    let mut guest = Program::new();
    guest.bring_up(target);
    let again = guest.here();
    guest.notify_all(target);
    // Queues that do not exist.
    guest.notify(0xffff);
    guest.again(again);
    guest
}

fn resets(target: &Target) -> Program {
    let mut guest = Program::filled(target);
    let again = guest.here();
    guest.bring_up(target);
    for (index, rings) in (0..).zip(&target.queues) {
        guest.store16(rings.used + 2, 0);
        guest.store16(rings.available + 2, 8);
        guest.notify(index);
    }
    guest.again(again);
    guest
}

fn live(target: &Target) -> Program {
    let mut guest = Program::filled(target);
    guest.bring_up(target);
    let again = guest.here();
    for (index, rings) in (0..).zip(&target.queues) {
        let elsewhere = Rings {
            table: rings.used,
            available: rings.table,
            used: 0xf000,
            size: 4,
        };
        guest.refill(index, *rings, 8);
        guest.register(register::QUEUE_READY, 0);
        guest.set_queue(index, elsewhere);
        guest.register(register::FEATURES_SELECT, 1);
        guest.register(register::FEATURES, 0xffff_ffff);
        guest.register(register::STATUS, 11);
        guest.register(register::STATUS, 15);
        guest.notify(index);
    }
    guest.again(again);
    guest
}

fn chains(target: &Target) -> Program {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    let mut guest = Program::new();
    let one = |address: u64, len: u32, flags: u16, next: u16| Descriptor {
        address,
        len,
        flags,
        next,
    };
    let data = 0x18_0000;
    let end = u64::from(MEMORY);
    let again = guest.here();
    for queue in &target.queues {
        let inner = queue.table + 0x3000;
        let cases = [
            [one(data, 16, NEXT, 1), one(data, 16, NEXT, 0)],
            [one(data, 16, NEXT, 0), Descriptor::default()],
            [one(data, 16, NEXT, 0xffff), Descriptor::default()],
            [one(data, 16, WRITE | NEXT, 1), one(data, 16, 0, 0)],
            [one(data, 0, NEXT, 1), one(data, 0, WRITE, 0)],
            [one(data, u32::MAX, NEXT, 1), one(data, u32::MAX, WRITE, 0)],
            [one(end - 8, 16, NEXT, 1), one(end, 16, WRITE, 0)],
            [one(u64::MAX - 8, 16, NEXT, 1), one(u64::MAX, 1, WRITE, 0)],
            [
                one(SLOT.into(), 16, NEXT, 1),
                one(SLOT.into(), 256, WRITE, 0),
            ],
            // Its own rings as data.
            [
                one(queue.table.into(), 64, NEXT, 1),
                one(queue.available.into(), 0x2000, WRITE, 0),
            ],
            // Tables: in itself, of half a descriptor, of none, too large, outside memory.
            [one(inner.into(), 32, INDIRECT, 0), Descriptor::default()],
            [one(inner.into(), 24, INDIRECT, 0), Descriptor::default()],
            [one(inner.into(), 0, INDIRECT, 0), Descriptor::default()],
            [
                one(inner.into(), !15, INDIRECT | NEXT, 1),
                one(inner.into(), 32, INDIRECT, 0),
            ],
            [one(end, 32, INDIRECT, 0), Descriptor::default()],
        ];
        for case in cases {
            guest.bring_up(target);
            for rings in &target.queues {
                for (index, descriptor) in (0..).zip(case) {
                    guest.descriptor(rings.table, index, descriptor);
                }
                guest.store(rings.available, 1 << 16);
                guest.store(rings.available + 4, 0);
            }
            guest.descriptor(inner, 0, one(inner.into(), 32, INDIRECT, 0));
            guest.descriptor(inner, 1, one(data, 16, NEXT, 0));
            guest.notify_all(target);
            guest.delay(20_000);
        }
    }
    guest.again(again);
    guest
}

fn rings(target: &Target) -> Program {
    let mut guest = Program::new();
    let usual = Rings::of(0, 16);
    let cases = [
        // Parts in one place; at the end of memory, and beyond it; in device registers.
        Rings {
            available: usual.table,
            used: usual.table,
            ..usual
        },
        Rings {
            used: usual.available,
            ..usual
        },
        Rings {
            table: MEMORY - 256,
            available: MEMORY - 38,
            used: MEMORY - 136,
            size: 16,
        },
        Rings {
            table: MEMORY - 240,
            ..usual
        },
        Rings {
            used: MEMORY,
            ..usual
        },
        Rings {
            table: SLOT,
            available: SLOT,
            used: SLOT,
            size: 16,
        },
        Rings {
            available: 0xffff_fffe,
            ..usual
        },
        Rings { size: 0, ..usual },
        Rings { size: 3, ..usual },
        Rings {
            size: 0xffff,
            ..usual
        },
        Rings {
            table: usual.table + 4,
            available: usual.available + 1,
            used: usual.used + 2,
            size: 16,
        },
        // Over this code, which may be its end.
        Rings { used: 0, ..usual },
    ];
    let again = guest.here();
    for case in cases {
        guest.negotiate(target);
        for (index, rings) in (0..).zip(&target.queues) {
            guest.set_queue(index, if index == 0 { case } else { *rings });
        }
        guest.register(register::STATUS, 15);
        guest.store(usual.table, 0);
        guest.store(usual.available, 1 << 16);
        guest.notify_all(target);
        guest.delay(20_000);
    }
    guest.again(again);
    guest
}

fn indexes(target: &Target) -> Program {
    let mut guest = Program::filled(target);
    let again = guest.here();
    for jump in [16u16, 17, 0x8000, 0xffff, 0x7fff] {
        guest.bring_up(target);
        for (index, rings) in (0..).zip(&target.queues) {
            // The driver's event index too, and heads that are no descriptors.
            guest.store16(rings.available + 4 + 2 * rings.size, jump);
            guest.store16(rings.available + 4, jump);
            guest.store16(rings.available + 2, jump);
            guest.notify(index);
            for back in [0, jump.wrapping_sub(1), jump] {
                guest.store16(rings.available + 2, back);
                guest.notify(index);
            }
        }
        guest.delay(20_000);
    }
    guest.again(again);
    guest
}

fn requests(target: &Target) -> Program {
    let mut guest = Program::filled(target);
    guest.bring_up(target);
    let again = guest.here();
    for (index, rings) in (0..).zip(&target.queues) {
        guest.refill(index, *rings, 8);
    }
    guest.again(again);
    guest
}

/// Ports and addresses without a device, empty slots, and a page at a time to a port.
fn nowhere(_: &Target) -> Program {
    let mut guest = Program::new();
    let again = guest.here();
    for address in [
        0xc000_0000,
        SLOT + 0x1000,
        SLOT + 0x1_2000,
        SLOT + 0xf_f000,
        0xffff_f000,
    ] {
        guest.store(address, 1);
        guest.loads(address);
        guest.store(address + 0x70, 15);
    }
    for port in [0u16, 0x80, 0x3f8, 0x2f8, 0xcf8, 0x600, 0xffff] {
        guest.ports(port);
        guest.page_to_port(port);
    }
    guest.again(again);
    guest
}
