//! Shares that contain each other, as seen by the guest.

use super::*;
use crate::fs::passthrough::{Caller, Options, Passthrough};
use crate::fs::wire::{
    GetattrIn, LinkIn, MkdirIn, OpenIn, ROOT_ID, ReadIn, WRITE_KILL_SUIDGID, WriteIn,
};
use rustix::io::Errno;
use std::ffi::CString;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

const CALLER: Caller = Caller { uid: 0, gid: 0 };
const READ_ONLY: ShareOptions = ShareOptions {
    read_only: true,
    follow_mounts: false,
    omit_mounts: false,
};
const WRITABLE: ShareOptions = ShareOptions {
    read_only: false,
    follow_mounts: false,
    omit_mounts: false,
};
const NO_BYTES: [vm_memory::VolatileSlice<'_>; 0] = [];

struct Fixture {
    dir: tempfile::TempDir,
    shares: Shares,
    files: Passthrough,
}

/// A directory with `one/two/file` in it.
fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("one/two")).unwrap();
    fs::write(dir.path().join("one/two/file"), "text").unwrap();
    let shares = Shares::default();
    let files = Passthrough::new(shares.clone(), Options::default()).unwrap();
    Fixture { dir, shares, files }
}

impl Fixture {
    fn share(&self, path: &str, options: ShareOptions) -> Shared {
        self.shares
            .share(self.dir.path().join(path), options)
            .unwrap()
    }

    /// The node at a path in the guest.
    fn node(&self, path: impl AsRef<Path>) -> Result<u64, Errno> {
        let mut node = ROOT_ID;
        for name in path.as_ref() {
            let name = CString::new(name.as_encoded_bytes()).unwrap();
            node = self.files.lookup(node, &name)?.nodeid;
        }
        Ok(node)
    }

    fn open(&self, node: u64, flags: OFlags) -> Result<u64, Errno> {
        let arg = OpenIn {
            flags: flags.bits(),
            open_flags: 0,
        };
        Ok(self.files.open(node, &arg)?.fh)
    }

    fn write(&self, node: u64, fh: u64) -> Result<usize, Errno> {
        let arg = WriteIn {
            fh,
            write_flags: WRITE_KILL_SUIDGID,
            ..WriteIn::default()
        };
        self.files.write(node, &arg, &NO_BYTES)
    }

    fn exists(&self, node: u64) -> bool {
        self.files.getattr(node, &GetattrIn::default()).is_ok()
    }
}

#[test]
fn names_that_are_paths_are_refused() {
    let shares = Shares::default();
    let dir = tempfile::tempdir().unwrap();
    for name in ["", ".", "..", "a/b", "/", "x\0y"] {
        assert!(shares.add(name, dir.path(), false).is_err(), "{name:?}");
    }
    shares.add("ok", dir.path(), false).unwrap();
    assert!(shares.add("ok", dir.path(), false).is_err());
    assert!(shares.remove("ok"));
    assert!(!shares.remove("ok"));
}

#[test]
fn a_missing_directory_is_an_error_of_the_host() {
    let shares = Shares::default();
    let error = shares.add("x", "/nonexistent", false).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    let error = shares.share("/nonexistent", WRITABLE).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
}

#[test]
fn one_directory_is_exported_once() {
    let f = fixture();
    let first = f.share("one", WRITABLE);
    let again = f.share("one", READ_ONLY);
    let below = f.share("one/two", WRITABLE);
    assert_eq!(again.path, first.path);
    assert_eq!(below.path, first.path.join("two"));
    assert_eq!(f.shares.names().len(), 1, "the root shows one entry");
    // It is found by name too: the guest may have got that name before.
    assert_eq!(f.node(&again.name), f.node(&first.path));
    assert_eq!(f.shares.locate(&again.name), Some(first.path.clone()));
    // A directory beside it and a single file have entries of their own; the file is the same file.
    let file = f.share("one/two/file", READ_ONLY);
    assert_eq!(file.path, Path::new(&file.name));
    assert_eq!(f.node(&file.path), f.node(below.path.join("file")));
    fs::create_dir(f.dir.path().join("one2")).unwrap();
    assert_eq!(f.share("one2", WRITABLE).path.iter().count(), 1);
}

#[test]
fn a_later_share_includes_those_within_it() {
    let f = fixture();
    let inner = f.share("one/two", READ_ONLY);
    let known = (
        f.node(&inner.path).unwrap(),
        f.node(inner.path.join("file")).unwrap(),
    );
    let outer = f.share(".", WRITABLE);
    let within = outer.path.join("one/two");
    assert_eq!(f.node(&within), Ok(known.0));
    assert_eq!(f.node(within.join("file")), Ok(known.1));
    assert_eq!(f.shares.locate(&inner.name), Some(within.clone()));
    assert_eq!(f.node(&inner.name), Ok(known.0));
    // All of it is on one mount: renames and links work between its parts.
    let top = f.node(&outer.path).unwrap();
    f.files.rename(known.0, c"file", top, c"moved", 0).unwrap();
    let link = LinkIn { oldnodeid: known.1 };
    f.files.link(known.0, c"again", &link).unwrap();
    assert_eq!(
        f.dir
            .path()
            .join("one/two/again")
            .metadata()
            .unwrap()
            .nlink(),
        2
    );
    // A node found through the part can be written now.
    let fh = f.open(known.1, OFlags::WRONLY).unwrap();
    assert_eq!(f.write(known.1, fh), Ok(0));
}

#[test]
fn each_part_is_writable_as_its_shares_allow() {
    let f = fixture();
    let outer = f.share("one", READ_ONLY);
    let (top, two) = (
        f.node(&outer.path).unwrap(),
        f.node(outer.path.join("two")).unwrap(),
    );
    let file = f.node(outer.path.join("two/file")).unwrap();
    let mkdir = |parent, name| f.files.mkdir(parent, name, &MkdirIn::default(), CALLER);
    assert_eq!(mkdir(two, c"a").unwrap_err(), Errno::ROFS);
    assert_eq!(f.open(file, OFlags::RDWR).unwrap_err(), Errno::ROFS);
    let inner = f.share("one/two", WRITABLE);
    mkdir(two, c"a").unwrap();
    assert_eq!(mkdir(top, c"a").unwrap_err(), Errno::ROFS);
    let fh = f.open(file, OFlags::RDWR).unwrap();
    assert_eq!(f.write(file, fh), Ok(0));
    // Directories created later below it are writable too.
    fs::create_dir(f.dir.path().join("one/two/later")).unwrap();
    mkdir(f.node(outer.path.join("two/later")).unwrap(), c"b").unwrap();
    f.shares.remove(&inner.name);
    assert_eq!(mkdir(two, c"b").unwrap_err(), Errno::ROFS);
    assert_eq!(f.write(file, fh).unwrap_err(), Errno::ROFS);
    let arg = ReadIn {
        fh,
        ..ReadIn::default()
    };
    let read = f.files.read(file, &arg, &NO_BYTES);
    assert_eq!(read, Err(Errno::BADF), "it was open for writing, too");
    assert!(f.open(file, OFlags::RDONLY).is_ok());
}

#[test]
fn a_nested_share_outlives_the_outer_one_and_is_merged_again() {
    let f = fixture();
    let outer = f.share(".", WRITABLE);
    let inner = f.share("one/two", WRITABLE);
    let (one, two) = (
        f.node(outer.path.join("one")).unwrap(),
        f.node(outer.path.join("one/two")).unwrap(),
    );
    let file = f.node(inner.path.join("file")).unwrap();
    let fh = f.open(file, OFlags::RDONLY).unwrap();
    f.shares.remove(&outer.name);
    assert!(f.exists(two) && f.exists(file) && !f.exists(one));
    let arg = ReadIn {
        fh,
        ..ReadIn::default()
    };
    assert_eq!(f.files.read(file, &arg, &NO_BYTES), Ok(0));
    // It has a name of its own now, and is the same directory.
    let again = f.share("one/two", READ_ONLY);
    assert_eq!(again.path, Path::new(&inner.name));
    assert_eq!(f.node(&again.path), Ok(two));
    let outer = f.share("one", WRITABLE);
    assert_eq!(f.node(outer.path.join("two")), Ok(two));
    assert_eq!(f.node(outer.path.join("two/file")), Ok(file));
    let rename = f
        .files
        .rename(two, c"file", f.node(&outer.path).unwrap(), c"x", 0);
    assert_eq!(rename, Ok(()));
}

#[test]
fn a_file_of_two_shares_is_one_file() {
    let f = fixture();
    let (a, b) = (f.dir.path().join("a"), f.dir.path().join("b"));
    fs::create_dir(&a).unwrap();
    fs::create_dir(&b).unwrap();
    fs::write(a.join("x"), "x").unwrap();
    fs::hard_link(a.join("x"), b.join("y")).unwrap();
    let first = f.share("a", READ_ONLY);
    let x = f.node(first.path.join("x")).unwrap();
    assert_eq!(f.open(x, OFlags::WRONLY).unwrap_err(), Errno::ROFS);
    let second = f.share("b", WRITABLE);
    assert_eq!(f.node(second.path.join("y")), Ok(x));
    assert!(
        f.open(x, OFlags::WRONLY).is_ok(),
        "one of its places may be written"
    );
    // A link is possible within either of its shares, although it was found through the other, on another
    // mount.
    let dir = f.node(&second.path).unwrap();
    f.files.link(dir, c"z", &LinkIn { oldnodeid: x }).unwrap();
    assert_eq!(b.join("y").metadata().unwrap().nlink(), 3);
    // But not outside its shares: it would outlive them.
    let z = f.share("one", WRITABLE);
    let two = f.node(z.path.join("two")).unwrap();
    let refused = f.files.link(two, c"z", &LinkIn { oldnodeid: x });
    assert_eq!(refused.unwrap_err(), Errno::XDEV);
    // It stays valid when one of them is removed.
    let fh = f.open(x, OFlags::RDONLY).unwrap();
    f.shares.remove(&first.name);
    let arg = ReadIn {
        fh,
        ..ReadIn::default()
    };
    assert_eq!(f.files.read(x, &arg, &NO_BYTES), Ok(0));
    f.shares.remove(&second.name);
    f.shares.remove(&z.name);
    assert_eq!(f.files.read(x, &arg, &NO_BYTES), Err(Errno::STALE));
}

/// A tree that follows the host's mounts must not be a detached one, which could not be written at all.
#[test]
fn a_read_only_share_that_is_not_detached_changes_nothing() {
    let f = fixture();
    let options = ShareOptions {
        follow_mounts: true,
        ..READ_ONLY
    };
    let share = f.share("one/two", options);
    let path = f.dir.path().join("one/two/file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o6755)).unwrap();
    let node = f.node(share.path.join("file")).unwrap();
    let fh = f.open(node, OFlags::RDONLY).unwrap();
    let before = path.metadata().unwrap();
    assert_eq!(f.write(node, fh).unwrap_err(), Errno::ROFS);
    let allocate = crate::fs::wire::FallocateIn {
        fh,
        length: 100,
        ..Default::default()
    };
    assert_eq!(f.files.fallocate(node, &allocate).unwrap_err(), Errno::ROFS);
    let copy = crate::fs::wire::CopyFileRangeIn {
        fh_in: fh,
        nodeid_out: node,
        fh_out: fh,
        len: 1,
        ..Default::default()
    };
    assert_eq!(
        f.files.copy_file_range(node, &copy).unwrap_err(),
        Errno::ROFS
    );
    let after = path.metadata().unwrap();
    assert_eq!(after.mode() & 0o7777, 0o6755);
    assert_eq!(
        (before.ctime(), before.ctime_nsec()),
        (after.ctime(), after.ctime_nsec())
    );
}

/// Threads look up names while exports are merged: a directory never gets two nodes.
#[test]
fn a_share_is_merged_while_in_use() {
    for _ in 0..50 {
        let f = fixture();
        let inner = f.share("one/two", WRITABLE);
        let node = f.node(&inner.path).unwrap();
        let start = std::sync::Barrier::new(3);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    start.wait();
                    for n in 0..200 {
                        let name = CString::new(format!("d{n}")).unwrap();
                        match f.files.mkdir(node, &name, &MkdirIn::default(), CALLER) {
                            Ok(_) | Err(Errno::EXIST) => {}
                            Err(error) => panic!("{error}"),
                        }
                    }
                });
            }
            start.wait();
            f.share(".", WRITABLE);
        });
        for n in 0..200 {
            let inside = CString::new(format!("d{n}")).unwrap();
            let one = f.files.lookup(node, &inside).unwrap();
            assert_eq!(f.files.lookup(node, &inside).unwrap().nodeid, one.nodeid);
            f.files
                .rename(
                    node,
                    &inside,
                    node,
                    &CString::new(format!("e{n}")).unwrap(),
                    0,
                )
                .unwrap();
        }
    }
}

/// A moved file has the shares of its new location, not those of the old one.
#[test]
fn a_moved_file_has_the_shares_of_its_new_location() {
    let f = fixture();
    for name in ["one/a", "one/a/dir", "one/b"] {
        fs::create_dir_all(f.dir.path().join(name)).unwrap();
    }
    fs::write(f.dir.path().join("one/a/dir/file"), "").unwrap();
    let outer = f.share("one", READ_ONLY);
    let (first, second) = (f.share("one/a", WRITABLE), f.share("one/b", WRITABLE));
    let (a, b) = (f.node(&first.path).unwrap(), f.node(&second.path).unwrap());
    let dir = f.node(first.path.join("dir")).unwrap();
    let file = f.node(first.path.join("dir/file")).unwrap();
    f.files.rename(a, c"dir", b, c"dir", 0).unwrap();
    f.shares.remove(&first.name);
    let mkdir = || f.files.mkdir(dir, c"x", &MkdirIn::default(), CALLER);
    mkdir().unwrap();
    let fh = f.open(file, OFlags::WRONLY).unwrap();
    assert_eq!(f.write(file, fh), Ok(0));
    f.shares.remove(&second.name);
    assert_eq!(mkdir().unwrap_err(), Errno::ROFS);
    f.shares.remove(&outer.name);
    assert!(!f.exists(dir));
}

/// Also if the guest has forgotten the directory that it moves, and what it moves is a file.
#[test]
fn moved_files_lose_the_shares_of_their_old_location() {
    let f = fixture();
    for name in ["one/a/dir/below", "one/b"] {
        fs::create_dir_all(f.dir.path().join(name)).unwrap();
    }
    for name in ["one/a/dir/file", "one/a/other"] {
        fs::write(f.dir.path().join(name), "").unwrap();
    }
    let outer = f.share("one", READ_ONLY);
    let (first, second) = (f.share("one/a", WRITABLE), f.share("one/b", WRITABLE));
    let (a, b) = (f.node(&first.path).unwrap(), f.node(&second.path).unwrap());
    let look = |node, name| f.files.lookup(node, name).unwrap().nodeid;
    let (dir, other) = (look(a, c"dir"), look(a, c"other"));
    let (below, file) = (look(dir, c"below"), look(dir, c"file"));
    f.files.forget(dir, 1);
    assert!(!f.exists(dir));
    f.files.rename(a, c"dir", b, c"dir", 0).unwrap();
    f.files.rename(a, c"other", b, c"other", 0).unwrap();
    let mkdir = |name| f.files.mkdir(below, name, &MkdirIn::default(), CALLER);
    mkdir(c"x").unwrap();
    f.shares.remove(&second.name);
    assert_eq!(mkdir(c"y").unwrap_err(), Errno::ROFS);
    for node in [file, other] {
        assert_eq!(f.open(node, OFlags::WRONLY).unwrap_err(), Errno::ROFS);
        assert!(f.open(node, OFlags::RDONLY).is_ok());
    }
    f.shares.remove(&outer.name);
    assert!(!f.exists(below) && !f.exists(file) && !f.exists(other));
    assert!(f.exists(a));
}

/// The guest sees that when it looks up the directory.
#[test]
fn files_that_the_host_moves_lose_the_shares_of_their_old_location() {
    let f = fixture();
    for name in ["one/a/dir", "one/b"] {
        fs::create_dir_all(f.dir.path().join(name)).unwrap();
    }
    fs::write(f.dir.path().join("one/a/dir/file"), "").unwrap();
    let _outer = f.share("one", READ_ONLY);
    let (first, second) = (f.share("one/a", WRITABLE), f.share("one/b", WRITABLE));
    let dir = f.node(first.path.join("dir")).unwrap();
    let file = f.node(first.path.join("dir/file")).unwrap();
    let (from, to) = (
        f.dir.path().join("one/a/dir"),
        f.dir.path().join("one/b/dir"),
    );
    fs::rename(from, to).unwrap();
    assert_eq!(f.node(second.path.join("dir")), Ok(dir));
    f.shares.remove(&second.name);
    assert_eq!(f.open(file, OFlags::WRONLY).unwrap_err(), Errno::ROFS);
    assert!(f.open(file, OFlags::RDONLY).is_ok());
}

/// Until then, its files are written as before.
#[test]
fn a_move_by_the_host_out_of_a_writable_share_is_noticed_by_a_lookup() {
    let f = fixture();
    for name in ["one/a/dir", "one/b"] {
        fs::create_dir_all(f.dir.path().join(name)).unwrap();
    }
    fs::write(f.dir.path().join("one/a/dir/file"), "").unwrap();
    let outer = f.share("one", READ_ONLY);
    let inner = f.share("one/a", WRITABLE);
    let dir = f.node(inner.path.join("dir")).unwrap();
    let file = f.node(inner.path.join("dir/file")).unwrap();
    let (from, to) = (
        f.dir.path().join("one/a/dir"),
        f.dir.path().join("one/b/dir"),
    );
    fs::rename(from, to).unwrap();
    let fh = f.open(file, OFlags::WRONLY).unwrap();
    f.files.release(file, fh);
    assert_eq!(f.node(outer.path.join("b/dir")), Ok(dir));
    assert_eq!(f.open(file, OFlags::WRONLY).unwrap_err(), Errno::ROFS);
}

/// Its descriptor leads to the files in it wherever it is, also if the share is a detached mount; but not to those above it.
#[test]
fn a_directory_that_the_host_moves_out_of_a_share_stays_while_it_is_open() {
    let f = fixture();
    let share = f.share("one", WRITABLE);
    let two = f.node(share.path.join("two")).unwrap();
    fs::rename(f.dir.path().join("one/two"), f.dir.path().join("out")).unwrap();
    fs::write(f.dir.path().join("out/later"), "").unwrap();
    assert!(f.files.lookup(two, c"later").is_ok());
    assert!(f.files.lookup(two, c"..").is_err());
    assert!(f.node(share.path.join("two")).is_err(), "by its name");
}

/// A file with several names may be in several places.
#[test]
fn a_moved_file_with_another_name_keeps_the_shares_of_that() {
    let f = fixture();
    for name in ["one/a", "one/b"] {
        fs::create_dir_all(f.dir.path().join(name)).unwrap();
    }
    fs::write(f.dir.path().join("one/a/file"), "").unwrap();
    fs::hard_link(
        f.dir.path().join("one/a/file"),
        f.dir.path().join("one/a/link"),
    )
    .unwrap();
    let _outer = f.share("one", READ_ONLY);
    let (first, second) = (f.share("one/a", WRITABLE), f.share("one/b", WRITABLE));
    let (a, b) = (f.node(&first.path).unwrap(), f.node(&second.path).unwrap());
    let file = f.files.lookup(a, c"file").unwrap().nodeid;
    f.files.rename(a, c"file", b, c"file", 0).unwrap();
    f.shares.remove(&second.name);
    assert!(f.open(file, OFlags::WRONLY).is_ok());
}

#[test]
fn the_root_of_a_share_is_found_while_the_share_exists() {
    let f = fixture();
    let options = Options {
        max_descriptors: 4,
        ..Options::default()
    };
    let files = Passthrough::new(f.shares.clone(), options).unwrap();
    let f = Fixture { files, ..f };
    let outer = f.share(".", WRITABLE);
    let inner = f.share("one/two", WRITABLE);
    let two = f.node(&inner.path).unwrap();
    f.shares.remove(&outer.name);
    for n in 0..20 {
        fs::write(f.dir.path().join(format!("one/two/{n}")), "").unwrap();
        let name = CString::new(n.to_string()).unwrap();
        f.files.lookup(two, &name).unwrap();
    }
    assert!(f.exists(two));
}

/// An editor on the host replaces a file that is shared by itself: the container keeps the old one.
#[test]
fn a_single_file_that_the_host_replaces_stays() {
    let f = fixture();
    let share = f.share("one/two/file", READ_ONLY);
    let node = f.node(&share.path).unwrap();
    fs::write(f.dir.path().join("new"), "another").unwrap();
    fs::rename(f.dir.path().join("new"), f.dir.path().join("one/two/file")).unwrap();
    for _ in 0..3 {
        f.files.sweep(100);
    }
    assert!(f.exists(node) && f.open(node, OFlags::RDONLY).is_ok());
}

/// Parts of two volumes that both lie within a later share.
#[test]
fn several_nested_shares_are_merged_together() {
    let f = fixture();
    fs::create_dir_all(f.dir.path().join("other/part")).unwrap();
    let shares = [
        f.share("one/two", WRITABLE),
        f.share("other/part", READ_ONLY),
    ];
    let nodes = shares.each_ref().map(|share| f.node(&share.path).unwrap());
    f.share(".", READ_ONLY);
    for (share, node) in shares.iter().zip(nodes) {
        let path = f.shares.locate(&share.name).unwrap();
        assert_eq!(path.iter().count(), 3, "{path:?}");
        assert_eq!(f.node(&path), Ok(node));
    }
    let mkdir = |node| f.files.mkdir(node, c"new", &MkdirIn::default(), CALLER);
    mkdir(nodes[0]).unwrap();
    assert_eq!(mkdir(nodes[1]).unwrap_err(), Errno::ROFS);
}

#[test]
fn only_what_is_in_the_named_places_is_shared() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["open/a", "sealed", "other"] {
        fs::create_dir_all(at(name)).unwrap();
    }
    let place = |name: &str, read_only| Place {
        path: at(name),
        read_only,
    };
    let places = vec![place("open", false), place("sealed", true)];
    let shares = Shares::within(Some(places));
    for (name, options) in [
        ("open", WRITABLE),
        ("open/a", READ_ONLY),
        ("sealed", READ_ONLY),
    ] {
        shares.share(at(name), options).unwrap();
    }
    for (name, options) in [("other", READ_ONLY), ("sealed", WRITABLE)] {
        let refused = shares.share(at(name), options).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied, "{name}");
    }
    assert!(shares.add("name", at("other"), true).is_err());
}
