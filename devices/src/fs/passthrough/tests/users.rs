//! Shares with other owners than on the host.

use super::*;
use crate::fs::wire::{SetattrIn, setattr};
use crate::fs::{IdRange, MappedUsers, ShareOptions};
use std::os::unix::fs::{MetadataExt as _, chown};

fn users(host: u32, guest: u32, recursive: bool) -> MappedUsers {
    let count = 10;
    let range = vec![IdRange { host, guest, count }];
    MappedUsers::new(range.clone(), range, recursive).unwrap()
}

/// A directory that is shared as it is, and with mapped users; the nodes of both.
fn mapped() -> (Fixture, u64) {
    let f = fixture(0, false);
    let user = rustix::process::geteuid().as_raw();
    let options = ShareOptions::default();
    let shared = f
        .shares
        .share_mapped(f.dir.path(), options, users(user, 1000, false));
    let name = CString::new(shared.unwrap().path.into_os_string().into_encoded_bytes()).unwrap();
    let node = f.files.lookup(ROOT_ID, &name).unwrap().nodeid;
    (f, node)
}

#[test]
fn one_file_has_different_owners_in_different_shares() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let (f, root) = mapped();
    let path = f.dir.path().join("x");
    std::fs::write(&path, "x").unwrap();
    chown(&path, Some(3), Some(20)).unwrap();
    let plain = f.files.lookup(f.root, c"x").unwrap();
    let shown = f.files.lookup(root, c"x").unwrap();
    assert_eq!((plain.attr.uid, plain.attr.gid), (3, 20));
    assert_eq!((shown.attr.uid, shown.attr.gid), (1003, u32::MAX));
    assert_ne!(plain.nodeid, shown.nodeid);
    assert_ne!(plain.attr.ino, shown.attr.ino);
    let stat = f
        .files
        .getattr(shown.nodeid, &GetattrIn::default())
        .unwrap();
    assert_eq!(stat.attr.uid, 1003);
    let stat = f
        .files
        .statx(shown.nodeid, &StatxIn::default())
        .unwrap()
        .stat;
    assert_eq!((stat.uid, stat.gid), (1003, u32::MAX));
}

#[test]
fn owners_are_mapped_back() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let (f, root) = mapped();
    let caller = Caller {
        uid: 1002,
        gid: 1001,
    };
    let made = f
        .files
        .mkdir(root, c"d", &MkdirIn::default(), caller)
        .unwrap();
    assert_eq!((made.attr.uid, made.attr.gid), (1002, 1001));
    let owners = |name| {
        let found = f.dir.path().join(name).metadata().unwrap();
        (found.uid(), found.gid())
    };
    assert_eq!(owners("d"), (2, 1));
    let change = SetattrIn {
        valid: setattr::UID | setattr::GID,
        uid: 1005,
        gid: 1009,
        ..SetattrIn::default()
    };
    f.files.setattr(made.nodeid, &change).unwrap();
    assert_eq!(owners("d"), (5, 9));
    // Users that are not mapped can own nothing.
    let change = SetattrIn { uid: 5, ..change };
    let refused = f.files.setattr(made.nodeid, &change);
    assert_eq!(refused.unwrap_err(), Errno::OVERFLOW);
    let refused = f.files.mkdir(root, c"e", &MkdirIn::default(), CALLER);
    assert_eq!(refused.unwrap_err(), Errno::OVERFLOW);
    assert!(!f.dir.path().join("e").exists());
    assert_eq!(owners("d"), (5, 9));
}
