//! The file system without a guest: requests that only a malicious guest sends, and the limits of the tables.

use super::*;
use crate::fs::wire::{
    CreateIn, Dirent, GetattrIn, LinkIn, MkdirIn, OpenIn, ReadIn, StatxIn, WRITE_KILL_SUIDGID,
    WriteIn,
};
use koya_host::threads::{self, Role};
use koya_host::walls::{Filter, confine_new_threads};
use rustix::fs::CWD;
use std::ffi::CString;
use zerocopy::FromBytes;

mod bounds;
mod flags;
mod listing;
mod owners;
mod users;

const CALLER: Caller = Caller { uid: 0, gid: 0 };

fn writing() -> OpenIn {
    OpenIn {
        flags: OFlags::WRONLY.bits(),
        open_flags: 0,
    }
}

struct Fixture {
    dir: tempfile::TempDir,
    shares: Shares,
    files: Passthrough,
    root: u64,
}

fn fixture(limit: usize, read_only: bool) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let shares = Shares::default();
    shares.add("s", dir.path(), read_only).unwrap();
    let options = Options {
        max_descriptors: limit,
        ..Options::default()
    };
    let files = Passthrough::new(shares.clone(), options).unwrap();
    let root = files.lookup(ROOT_ID, c"s").unwrap().nodeid;
    Fixture {
        dir,
        shares,
        files,
        root,
    }
}

#[test]
fn names_that_leave_the_directory_are_refused() {
    let f = fixture(0, false);
    std::fs::write(f.dir.path().join("x"), "x").unwrap();
    std::os::unix::fs::symlink("/etc", f.dir.path().join("out")).unwrap();
    for name in [c"..", c".", c"", c"a/b", c"../x", c"/etc/passwd"] {
        assert!(f.files.lookup(f.root, name).is_err(), "{name:?}");
        assert!(f.files.lookup(ROOT_ID, name).is_err(), "{name:?}");
        let mkdir = f.files.mkdir(f.root, name, &MkdirIn::default(), CALLER);
        assert!(mkdir.is_err(), "{name:?}");
        assert!(f.files.rename(f.root, c"x", f.root, name, 0).is_err());
        assert!(f.files.unlink(f.root, name, false).is_err());
        assert!(
            f.files
                .create(f.root, name, &CreateIn::default(), CALLER)
                .is_err()
        );
    }
    // A symbolic link is itself, never its target.
    let link = f.files.lookup(f.root, c"out").unwrap();
    assert!(f.files.lookup(link.nodeid, c"passwd").is_err());
    assert_eq!(
        f.files.open(link.nodeid, &OpenIn::default()).unwrap_err(),
        Errno::NXIO
    );
    assert!(f.files.opendir(link.nodeid).is_err());
}

#[test]
fn only_files_are_opened() {
    let f = fixture(0, false);
    let fifo = f.dir.path().join("fifo");
    rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let node = f.files.lookup(f.root, c"fifo").unwrap().nodeid;
    assert_eq!(
        f.files.open(node, &OpenIn::default()).unwrap_err(),
        Errno::NXIO
    );
}

#[test]
fn a_read_only_share_refuses_every_change() {
    let f = fixture(0, true);
    std::fs::write(f.dir.path().join("x"), "x").unwrap();
    let node = f.files.lookup(f.root, c"x").unwrap().nodeid;
    assert_eq!(f.files.open(node, &writing()).unwrap_err(), Errno::ROFS);
    assert!(f.files.open(node, &OpenIn::default()).is_ok());
    assert_eq!(
        f.files
            .mkdir(f.root, c"d", &MkdirIn::default(), CALLER)
            .unwrap_err(),
        Errno::ROFS
    );
    assert_eq!(f.files.unlink(f.root, c"x", false), Err(Errno::ROFS));
    assert_eq!(f.files.setxattr(node, c"user.a", b"1", 0), Err(Errno::ROFS));
    let link = LinkIn { oldnodeid: node };
    assert_eq!(f.files.link(f.root, c"y", &link).unwrap_err(), Errno::ROFS);
}

#[test]
fn descriptors_of_nodes_are_bounded() {
    const LIMIT: usize = 16;
    let f = fixture(LIMIT, false);
    let mut nodes = Vec::new();
    for n in 0..200 {
        std::fs::write(f.dir.path().join(format!("{n}")), n.to_string()).unwrap();
        let name = CString::new(n.to_string()).unwrap();
        nodes.push(f.files.lookup(f.root, &name).unwrap().nodeid);
    }
    let (known, open) = f.files.inodes.counts();
    assert_eq!(known, 201);
    assert!(open <= LIMIT + 1, "{open} descriptors");
    // Each of them is still the same file.
    for (n, node) in nodes.iter().enumerate() {
        let attr = f.files.getattr(*node, &GetattrIn::default()).unwrap().attr;
        assert_eq!(attr.size, n.to_string().len() as u64);
    }
    // A file that was removed meanwhile is stale, not another file.
    std::fs::remove_file(f.dir.path().join("3")).unwrap();
    std::fs::write(f.dir.path().join("new"), "new").unwrap();
    let third = f.files.getattr(nodes[3], &GetattrIn::default());
    assert!(third.is_err() || third.unwrap().attr.nlink == 0);
    for node in nodes {
        f.files.forget(node, 1);
    }
    assert_eq!(f.files.inodes.counts().0, 1);
}

#[test]
fn a_renamed_file_is_found_again() {
    let f = fixture(4, false);
    std::fs::write(f.dir.path().join("a"), "hello").unwrap();
    let node = f.files.lookup(f.root, c"a").unwrap().nodeid;
    f.files.rename(f.root, c"a", f.root, c"b", 0).unwrap();
    for n in 0..20 {
        std::fs::write(f.dir.path().join(format!("{n}")), "").unwrap();
        f.files
            .lookup(f.root, &CString::new(n.to_string()).unwrap())
            .unwrap();
    }
    let attr = f.files.getattr(node, &GetattrIn::default()).unwrap().attr;
    assert_eq!(attr.size, 5);
}

/// Without file handles, by parent and name; paths are resolved in the thread's own root.
#[test]
fn a_confined_thread_finds_evicted_files() {
    let f = fixture(4, false);
    for n in 0..40 {
        std::fs::write(f.dir.path().join(n.to_string()), "").unwrap();
    }
    let name = |n: usize| CString::new(n.to_string()).unwrap();
    let role = Role::new("koya-fs").confined_by(Filter::Files);
    let _confinement = confine_new_threads(true).unwrap();
    let work = || {
        let look = |n| f.files.lookup(f.root, &name(n)).unwrap().nodeid;
        let nodes: Vec<_> = (0..40).map(look).collect();
        for (n, node) in nodes.iter().enumerate() {
            f.files.setxattr(*node, c"user.n", b"1", 0).unwrap();
            assert_eq!(f.files.getxattr(*node, c"user.n", 9).unwrap(), b"1");
            let link = LinkIn { oldnodeid: *node };
            let linked = f.files.link(f.root, &name(n + 100), &link).unwrap();
            assert_eq!(linked.nodeid, *node);
        }
        let links = |node: &u64| {
            f.files
                .getattr(*node, &GetattrIn::default())
                .unwrap()
                .attr
                .nlink
        };
        assert!(nodes.iter().all(|node| links(node) == 2));
    };
    std::thread::scope(|scope| {
        threads::spawn_scoped(scope, role, work)
            .unwrap()
            .join()
            .unwrap()
    });
}

#[test]
fn open_files_have_a_limit_too() {
    let f = fixture(8, false);
    std::fs::write(f.dir.path().join("x"), "x").unwrap();
    let node = f.files.lookup(f.root, c"x").unwrap().nodeid;
    let open: Vec<_> = (0..8)
        .map(|_| f.files.open(node, &OpenIn::default()).unwrap().fh)
        .collect();
    assert_eq!(
        f.files.open(node, &OpenIn::default()).unwrap_err(),
        Errno::NFILE
    );
    f.files.release(node, open[0]);
    assert!(f.files.open(node, &OpenIn::default()).is_ok());
}

#[test]
fn a_handle_belongs_to_its_node() {
    let f = fixture(0, false);
    std::fs::write(f.dir.path().join("x"), "x").unwrap();
    std::fs::write(f.dir.path().join("y"), "y").unwrap();
    let x = f.files.lookup(f.root, c"x").unwrap().nodeid;
    let y = f.files.lookup(f.root, c"y").unwrap().nodeid;
    let fh = f.files.open(x, &OpenIn::default()).unwrap().fh;
    let arg = ReadIn {
        fh,
        ..ReadIn::default()
    };
    let none: [vm_memory::VolatileSlice<'_>; 0] = [];
    assert_eq!(f.files.read(y, &arg, &none), Err(Errno::BADF));
}

#[test]
fn a_removed_share_is_stale() {
    let f = fixture(0, false);
    std::fs::write(f.dir.path().join("x"), "x").unwrap();
    let node = f.files.lookup(f.root, c"x").unwrap().nodeid;
    let fh = f.files.open(node, &OpenIn::default()).unwrap().fh;
    f.shares.remove("s");
    let none: [vm_memory::VolatileSlice<'_>; 0] = [];
    let arg = ReadIn {
        fh,
        ..ReadIn::default()
    };
    assert_eq!(f.files.read(node, &arg, &none), Err(Errno::STALE));
    let gone = f.files.getattr(node, &GetattrIn::default());
    assert_eq!(gone.unwrap_err(), Errno::STALE);
    assert_eq!(f.files.lookup(ROOT_ID, c"s").unwrap_err(), Errno::NOENT);
}

#[test]
fn unlinked_files_are_bounded() {
    const LIMIT: usize = 16;
    let f = fixture(LIMIT, false);
    let mut nodes = Vec::new();
    let refused = loop {
        std::fs::write(f.dir.path().join("x"), "x").unwrap();
        match f.files.lookup(f.root, c"x") {
            Ok(entry) => nodes.push(entry.nodeid),
            Err(error) => break error,
        }
        std::fs::remove_file(f.dir.path().join("x")).unwrap();
        assert!(nodes.len() < 100, "no limit");
    };
    assert_eq!(refused, Errno::NFILE);
    // Known files stay valid, and releasing one makes room.
    let attr = f
        .files
        .getattr(nodes[0], &GetattrIn::default())
        .unwrap()
        .attr;
    assert_eq!((attr.size, attr.nlink), (1, 0));
    f.files.forget(nodes[0], 1);
    assert!(f.files.lookup(f.root, c"x").is_ok());
}

#[test]
fn a_single_file_has_one_number() {
    let f = fixture(0, false);
    let file = f.dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    f.shares.add("file", &file, true).unwrap();
    let entry = f.files.lookup(ROOT_ID, c"file").unwrap();
    let attr = f.files.getattr(entry.nodeid, &GetattrIn::default());
    assert_eq!(attr.unwrap().attr.ino, entry.attr.ino);
    let statx = f.files.statx(entry.nodeid, &StatxIn::default());
    assert_eq!(statx.unwrap().stat.ino, entry.attr.ino);
    let refused = f.files.open(entry.nodeid, &writing());
    assert_eq!(refused.unwrap_err(), Errno::ROFS);
    // Within its directory it is the same file, and writable.
    let inside = f.files.lookup(f.root, c"file").unwrap();
    assert_eq!(inside.nodeid, entry.nodeid);
    assert!(f.files.open(entry.nodeid, &writing()).is_ok());
}

#[test]
fn the_root_answers_statx() {
    let f = fixture(0, false);
    let arg = StatxIn::default();
    let stat = f.files.statx(ROOT_ID, &arg).unwrap().stat;
    let attr = f
        .files
        .getattr(ROOT_ID, &GetattrIn::default())
        .unwrap()
        .attr;
    assert_eq!((stat.ino, u32::from(stat.mode)), (attr.ino, attr.mode));
    assert_eq!(stat.mask & rustix::fs::StatxFlags::BTIME.bits(), 0);
}

#[test]
fn a_changed_file_loses_its_privileges() {
    use std::os::unix::fs::PermissionsExt;
    let f = fixture(0, false);
    let path = f.dir.path().join("x");
    std::fs::write(&path, "x").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o6755)).unwrap();
    let node = f.files.lookup(f.root, c"x").unwrap().nodeid;
    let capability = c"security.capability";
    let set = || f.files.setxattr(node, capability, b"all", 0);
    // Some file systems of temporary directories have no such attributes.
    let has_attributes = set().is_ok();
    let fh = f.files.open(node, &writing()).unwrap().fh;
    let none: [vm_memory::VolatileSlice<'_>; 0] = [];
    let mut arg = WriteIn {
        fh,
        ..WriteIn::default()
    };
    let mode = || path.metadata().unwrap().permissions().mode() & 0o7777;
    for round in 0..2 {
        f.files.write(node, &arg, &none).unwrap();
        assert!(
            f.files.getxattr(node, capability, 100).is_err(),
            "round {round}"
        );
        assert_eq!(mode(), 0o6755, "who may keep the bits keeps them");
        if has_attributes {
            set().unwrap();
        }
    }
    arg.write_flags = WRITE_KILL_SUIDGID;
    f.files.write(node, &arg, &none).unwrap();
    assert_eq!(mode(), 0o755);
}

#[test]
fn links_change_owners_and_files_are_written_whatever_their_mode() {
    use crate::fs::wire::{SetattrIn, setattr};
    use std::os::unix::fs::PermissionsExt;
    let f = fixture(0, false);
    std::os::unix::fs::symlink("nowhere", f.dir.path().join("link")).unwrap();
    let link = f.files.lookup(f.root, c"link").unwrap().nodeid;
    let own = SetattrIn {
        valid: setattr::UID | setattr::GID,
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        ..SetattrIn::default()
    };
    f.files.setattr(link, &own).unwrap();
    let path = f.dir.path().join("x");
    std::fs::write(&path, "x").unwrap();
    let node = f.files.lookup(f.root, c"x").unwrap().nodeid;
    let fh = f.files.open(node, &writing()).unwrap().fh;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444)).unwrap();
    let none: [vm_memory::VolatileSlice<'_>; 0] = [];
    let arg = WriteIn {
        fh,
        ..WriteIn::default()
    };
    assert_eq!(f.files.write(node, &arg, &none), Ok(0));
}

#[test]
fn a_removed_share_keeps_nothing_open() {
    use std::os::unix::fs::MetadataExt;
    let f = fixture(0, false);
    for name in ["a", "b"] {
        std::fs::write(f.dir.path().join(name), name).unwrap();
        let name = CString::new(name).unwrap();
        let node = f.files.lookup(f.root, &name).unwrap().nodeid;
        f.files.open(node, &OpenIn::default()).unwrap();
    }
    // By device and inode, since paths on a detached mount begin at its own root.
    let identity = |path: &std::path::Path| {
        let data = std::fs::metadata(path).ok()?;
        Some((data.dev(), data.ino()))
    };
    let known = [".", "a", "b"].map(|name| identity(&f.dir.path().join(name)).unwrap());
    let held = || {
        let fds = std::fs::read_dir("/proc/self/fd").unwrap();
        let open = fds.filter_map(|fd| identity(&fd.ok()?.path()));
        open.filter(|file| known.contains(file)).count()
    };
    assert!(
        held() >= 7,
        "two files, each with node and handle, the root's node, root and anchor"
    );
    f.shares.remove("s");
    assert_eq!(held(), 0, "the guest has forgotten and released nothing");
}

#[test]
fn the_roots_listing_does_not_shift() {
    let f = fixture(0, false);
    for name in ["b", "c"] {
        f.shares.add(name, f.dir.path(), false).unwrap();
    }
    let whole = f
        .files
        .readdir(ROOT_ID, 0, 0, 4096, false)
        .unwrap()
        .into_bytes();
    // Space for the dots and the first share.
    let part = f
        .files
        .readdir(ROOT_ID, 0, 0, 100, false)
        .unwrap()
        .into_bytes();
    let last = part.len() - size_of::<crate::fs::wire::Dirent>() - 8;
    let offset = u64::from_ne_bytes(part[last + 8..last + 16].try_into().unwrap());
    f.shares.remove("s");
    let rest = f
        .files
        .readdir(ROOT_ID, 0, offset, 4096, false)
        .unwrap()
        .into_bytes();
    assert_eq!(part.len() + rest.len(), whole.len(), "none is left out");
}

/// Search paths are full of names that do not exist.
#[test]
fn absent_names_are_cached_for_the_timeout() {
    let f = fixture(0, false);
    let absent = f.files.lookup_or_absent(f.root, c"absent").unwrap();
    assert_eq!((absent.nodeid, absent.entry_valid), (0, 1));
    // Not for shares, which the owner adds and removes.
    assert_eq!(
        f.files.lookup_or_absent(ROOT_ID, c"absent").unwrap_err(),
        Errno::NOENT
    );
    let never = Options {
        cache: Cache::Never,
        ..Options::default()
    };
    let files = Passthrough::new(f.shares.clone(), never).unwrap();
    let root = files.lookup_or_absent(ROOT_ID, c"s").unwrap().nodeid;
    assert_eq!(
        files.lookup_or_absent(root, c"absent").unwrap_err(),
        Errno::NOENT
    );
}

/// The guest kernel first asks for the size, and then for that many bytes.
#[test]
fn an_attributes_size_can_be_queried() {
    let f = fixture(0, false);
    std::fs::write(f.dir.path().join("x"), "x").unwrap();
    let node = f.files.lookup(f.root, c"x").unwrap().nodeid;
    for name in [c"user.a", c"security.capability"] {
        f.files.setxattr(node, name, &[7; 20], 0).unwrap();
        assert_eq!(f.files.getxattr(node, name, 0).unwrap().len(), 20);
        assert_eq!(f.files.getxattr(node, name, 20).unwrap(), [7; 20]);
        assert_eq!(f.files.getxattr(node, name, 19), Err(Errno::RANGE));
    }
}

/// A size cached by the guest would truncate what it reads.
#[test]
fn a_changed_file_is_reported_on_open() {
    use crate::fs::wire::fopen;
    let f = fixture(0, false);
    let path = f.dir.path().join("x");
    std::fs::write(&path, "short").unwrap();
    let node = f.files.lookup(f.root, c"x").unwrap().nodeid;
    let changed = || f.files.open(node, &OpenIn::default()).unwrap().open_flags & fopen::CHANGED;
    assert_eq!(changed(), 0);
    std::fs::write(&path, "longer than that").unwrap();
    assert_eq!(changed(), fopen::CHANGED);
    f.files.getattr(node, &GetattrIn::default()).unwrap();
    assert_eq!(changed(), 0);
}

/// The guest remembers a removed file whose space the host wants back.
#[test]
fn removed_files_are_dropped() {
    let f = fixture(0, false);
    let held = |name: &str| {
        let node = f
            .files
            .lookup(f.root, &CString::new(name).unwrap())
            .unwrap();
        f.files.inodes.get(node.nodeid).unwrap()
    };
    for name in ["idle", "open", "stays"] {
        std::fs::write(f.dir.path().join(name), name).unwrap();
    }
    let (idle, open, stays) = (held("idle"), held("open"), held("stays"));
    let fh = f.files.open(open.id, &OpenIn::default()).unwrap().fh;
    for name in ["idle", "open"] {
        std::fs::remove_file(f.dir.path().join(name)).unwrap();
    }
    let links = |node: &Inode| {
        let attr = f.files.getattr(node.id, &GetattrIn::default());
        attr.map(|out| out.attr.nlink)
    };
    let (_, before) = f.files.inodes.counts();
    // It may be about to be opened: nothing is dropped at the first sweep.
    f.files.sweep(100);
    assert_eq!(f.files.inodes.counts().1, before);
    f.files.sweep(100);
    assert_eq!(f.files.inodes.counts().1, before - 1);
    assert_eq!(links(&idle), Err(Errno::STALE));
    assert_eq!((links(&open), links(&stays)), (Ok(0), Ok(1)));
    f.files.release(open.id, fh);
    f.files.sweep(100);
    f.files.sweep(100);
    assert_eq!(links(&open), Err(Errno::STALE));
}

/// A few at a time, and eventually all of them.
#[test]
fn a_sweep_reaches_every_file() {
    let f = fixture(0, false);
    for n in 0..50 {
        std::fs::write(f.dir.path().join(n.to_string()), "").unwrap();
        f.files
            .lookup(f.root, &CString::new(n.to_string()).unwrap())
            .unwrap();
        std::fs::remove_file(f.dir.path().join(n.to_string())).unwrap();
    }
    for _ in 0..20 {
        f.files.sweep(10);
    }
    assert_eq!(f.files.inodes.counts().1, 1, "the root is left");
}

/// Inode numbers are reused, and not every file system records more than that.
#[test]
fn an_evicted_file_keeps_its_type() {
    use crate::fs::node::{FileTraces, Slot, still_same};
    let f = fixture(0, false);
    std::fs::write(f.dir.path().join("a"), "").unwrap();
    let node = f.files.lookup(f.root, c"a").unwrap().nodeid;
    let inode = f.files.inodes.get(node).unwrap();
    *koya_host::sync::lock(&inode.slot) = Slot::Evicted(FileTraces {
        handle: None,
        birth: None,
    });
    let look = |path: &std::path::Path| {
        let fd = openat(CWD, path, OFlags::PATH, Mode::empty()).unwrap();
        let mut stat = inodes::stat(&fd).unwrap();
        stat.stx_mask &= !rustix::fs::StatxFlags::BTIME.bits();
        still_same(&inode, &fd, &stat)
    };
    assert!(look(&f.dir.path().join("a")));
    assert!(!look(f.dir.path()));
}

#[test]
fn nodes_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let shares = Shares::default();
    shares.add("s", dir.path(), false).unwrap();
    let options = Options {
        max_nodes: 8,
        ..Options::default()
    };
    let files = Passthrough::new(shares, options).unwrap();
    let root = files.lookup(ROOT_ID, c"s").unwrap().nodeid;
    let look = |n: u32| {
        std::fs::write(dir.path().join(n.to_string()), "").unwrap();
        files.lookup(root, &CString::new(n.to_string()).unwrap())
    };
    let nodes: Vec<_> = (0..7).map(|n| look(n).unwrap().nodeid).collect();
    assert_eq!(look(7).unwrap_err(), Errno::NFILE);
    files.forget(nodes[0], 1);
    assert!(look(8).is_ok());
}

/// Their size is 0, so the guest would read nothing.
#[test]
fn files_without_a_size_are_not_cached() {
    let f = fixture(0, false);
    std::fs::write(f.dir.path().join("empty"), "").unwrap();
    let kernel = std::path::Path::new("/proc/sys/kernel");
    f.shares.add("kernel", kernel, true).unwrap();
    let reading = OpenIn::default();
    let kernel = f.files.lookup(ROOT_ID, c"kernel").unwrap().nodeid;
    let node = f.files.lookup(kernel, c"ostype").unwrap().nodeid;
    let opened = f.files.open(node, &reading).unwrap();
    assert_eq!(opened.open_flags, wire::fopen::DIRECT_IO);
    let node = f.files.lookup(f.root, c"empty").unwrap().nodeid;
    assert_eq!(f.files.open(node, &reading).unwrap().open_flags, 0);
}
