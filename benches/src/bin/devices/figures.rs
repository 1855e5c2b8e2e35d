//! The figures, and their presentation.

use crate::guest::{Monitor, Set};
use crate::{CALLS, EXITS};
use koya_benches::{median, row};
use serde_json::Value;
use std::collections::BTreeMap;

/// Figures by set, name, and monitor: one for each round.
pub(crate) type Results = BTreeMap<(Set, String, Monitor), Vec<f64>>;

/// One row of the table.
struct Figure {
    set: Set,
    /// Key reported by the guest.
    key: &'static str,
    name: &'static str,
    unit: &'static str,
    /// Conversion factor from the guest's unit.
    factor: f64,
    less_is_better: bool,
    peer: Peer,
}

/// The figure compared with Koya's.
#[derive(Clone, Copy)]
enum Peer {
    /// The device of QEMU, or of the host kernel with `vhost`.
    Monitor(&'static str),
    /// Another figure of the same guest.
    Own(&'static str, &'static str),
}

const QEMU: Peer = Peer::Monitor("qemu");
const VHOST: Peer = Peer::Monitor("vhost");
const FROM_KIB: f64 = 1.0 / 1024.0;
const FROM_K: f64 = 1.0 / 1000.0;

const fn more(
    set: Set,
    key: &'static str,
    name: &'static str,
    unit: &'static str,
    factor: f64,
) -> Figure {
    Figure {
        set,
        key,
        name,
        unit,
        factor,
        less_is_better: false,
        peer: QEMU,
    }
}

const fn less(set: Set, key: &'static str, name: &'static str, unit: &'static str) -> Figure {
    Figure {
        set,
        key,
        name,
        unit,
        factor: 1.0,
        less_is_better: true,
        peer: QEMU,
    }
}

const fn beside(peer: Peer, figure: Figure) -> Figure {
    Figure { peer, ..figure }
}

const FIGURES: &[Figure] = {
    use Set::{Cached, Direct, Files, FourGib, OneGib, Sockets};
    &[
        more(
            Cached,
            "sequential-read",
            "blk, page cache: sequential read, 1 MiB",
            "MiB/s",
            FROM_KIB,
        ),
        more(
            Cached,
            "sequential-write",
            "blk, page cache: sequential write, 1 MiB",
            "MiB/s",
            FROM_KIB,
        ),
        more(
            Cached,
            "random-read",
            "blk, page cache: random read, 4 KiB",
            "1/s",
            1.0,
        ),
        more(
            Cached,
            "random-write",
            "blk, page cache: random write, 4 KiB",
            "1/s",
            1.0,
        ),
        less(
            Cached,
            "random-read.exits",
            "blk, page cache: exits a random read",
            "1",
        ),
        less(
            Cached,
            "random-read.calls",
            "blk, page cache: system calls a random read",
            "1",
        ),
        less(
            Cached,
            "random-write.exits",
            "blk, page cache: exits a random write",
            "1",
        ),
        less(
            Cached,
            "random-write.calls",
            "blk, page cache: system calls a random write",
            "1",
        ),
        more(
            Cached,
            "tcp-send",
            "net: TCP from the guest",
            "Mbit/s",
            FROM_K,
        ),
        more(
            Cached,
            "tcp-receive",
            "net: TCP to the guest",
            "Mbit/s",
            FROM_K,
        ),
        less(Cached, "round-trip", "net: round trip (ping)", "ms"),
        less(Cached, "round-trip.exits", "net: exits a round trip", "1"),
        less(
            Cached,
            "round-trip.calls",
            "net: system calls a round trip",
            "1",
        ),
        more(
            Direct,
            "sequential-read",
            "blk, direct: sequential read, 1 MiB",
            "MiB/s",
            FROM_KIB,
        ),
        more(
            Direct,
            "sequential-write",
            "blk, direct: sequential write, 1 MiB",
            "MiB/s",
            FROM_KIB,
        ),
        more(
            Direct,
            "random-read",
            "blk, direct: random read, 4 KiB",
            "1/s",
            1.0,
        ),
        more(
            Direct,
            "random-write",
            "blk, direct: random write, 4 KiB",
            "1/s",
            1.0,
        ),
        more(
            Files,
            "fs-read",
            "fs: sequential read, 1 MiB",
            "MiB/s",
            FROM_KIB,
        ),
        more(
            Files,
            "fs-write",
            "fs: sequential write, 1 MiB",
            "MiB/s",
            FROM_KIB,
        ),
        more(
            Files,
            "fs-random-read",
            "fs: random read, 4 KiB",
            "1/s",
            1.0,
        ),
        more(
            Files,
            "fs-random-write",
            "fs: random write, 4 KiB",
            "1/s",
            1.0,
        ),
        less(
            Files,
            "fs-random-read.exits",
            "fs: exits a random read",
            "1",
        ),
        less(
            Files,
            "fs-random-read.calls",
            "fs: system calls a random read",
            "1",
        ),
        less(Files, "fs-create", "fs: 20,000 files made", "s"),
        less(Files, "fs-stat", "fs: 20,000 files looked at", "s"),
        less(Files, "fs-list", "fs: 20,000 files listed", "s"),
        less(Files, "fs-unlink", "fs: 20,000 files removed", "s"),
        less(Files, "fs-unpack", "fs: a source tree unpacked", "s"),
        less(Files, "fs-walk", "fs: a source tree read", "s"),
        less(Files, "fs-remove", "fs: a source tree removed", "s"),
        less(Files, "dd-512", "fs: dd of 20,000 times 512 bytes", "s"),
        beside(
            Peer::Own("tmpfs", "dd-512-tmpfs"),
            less(
                Files,
                "dd-512-writeback",
                "fs: the same by writeback, beside a tmpfs",
                "s",
            ),
        ),
        beside(
            VHOST,
            more(Sockets, "vsock-send", "vsock: from the guest", "MiB/s", 1.0),
        ),
        beside(
            VHOST,
            more(
                Sockets,
                "vsock-receive",
                "vsock: to the guest",
                "MiB/s",
                1.0,
            ),
        ),
        beside(
            VHOST,
            less(Sockets, "vsock-round-trip", "vsock: round trip", "us"),
        ),
        beside(
            VHOST,
            more(Sockets, "vsock-connect", "vsock: connections", "1/s", 1.0),
        ),
        less(OneGib, "back", "memory: 1 GiB freed, nine tenths back", "s"),
        less(
            FourGib,
            "back",
            "memory: 4 GiB freed, nine tenths back",
            "s",
        ),
    ]
};

/// Whether an expected figure has not been reported. Counts are only expected if the host provides them.
pub(crate) fn is_missing(
    set: Set,
    monitor: Monitor,
    got: &[(String, f64)],
) -> Option<&'static str> {
    let wanted = FIGURES.iter().filter(|figure| {
        let own = matches!(figure.peer, Peer::Own(..));
        let is_counted = figure.key.ends_with(EXITS) || figure.key.ends_with(CALLS);
        figure.set == set && (monitor != Monitor::Qemu || !own) && !is_counted
    });
    wanted
        .map(|figure| figure.key)
        .find(|key| !got.iter().any(|(name, _)| name == key))
}

/// The rows of the table. A comparison with unconfined threads has no column for another peer.
pub(crate) fn rows(results: &Results, peer: Monitor) -> Vec<Value> {
    let mut rows = Vec::new();
    for figure in FIGURES {
        let value = |key: &str, monitor| {
            let values = results.get(&(figure.set, key.to_owned(), monitor))?;
            Some(median(values) * figure.factor)
        };
        let (name, beside) = match (peer, figure.peer) {
            (Monitor::Unconfined, _) => ("unconfined", value(figure.key, peer)),
            (_, Peer::Monitor(name)) => (name, value(figure.key, peer)),
            (_, Peer::Own(name, key)) => (name, value(key, Monitor::Koya)),
        };
        let Some(koya) = value(figure.key, Monitor::Koya) else {
            continue;
        };
        let peers = beside.map(|beside| (name.to_owned(), beside));
        rows.push(row(
            figure.name,
            figure.unit,
            figure.less_is_better,
            koya,
            peers,
        ));
    }
    rows
}
