//! Numbers that only a malicious guest sends.

use super::*;
use rustix::fs::{SeekFrom, seek};

/// pwritev2(2) writes at the descriptor's position if the offset is -1.
#[test]
fn offsets_beyond_those_of_files_are_refused() {
    let f = fixture(0, false);
    std::fs::write(f.dir.path().join("x"), "four").unwrap();
    let node = f.files.lookup(f.root, c"x").unwrap().nodeid;
    let both = OpenIn {
        flags: OFlags::RDWR.bits(),
        open_flags: 0,
    };
    let fh = f.files.open(node, &both).unwrap().fh;
    let handle = f.files.handle(fh, node).unwrap();
    seek(&handle.file, SeekFrom::Start(1)).unwrap();
    let mut bytes = *b"abc";
    let slice = vm_memory::VolatileSlice::from(&mut bytes[..]);
    for offset in [u64::MAX, u64::MAX - 1, 1 << 63] {
        let (write, read) = (
            WriteIn {
                fh,
                offset,
                size: 3,
                ..WriteIn::default()
            },
            ReadIn {
                fh,
                offset,
                size: 3,
                ..ReadIn::default()
            },
        );
        let written = f.files.write(node, &write, &[slice]);
        assert_eq!(written, Err(Errno::INVAL), "{offset:#x}");
        let read = f.files.read(node, &read, &[slice]);
        assert_eq!(read, Err(Errno::INVAL), "{offset:#x}");
    }
    let text = std::fs::read(f.dir.path().join("x")).unwrap();
    assert_eq!(text, b"four");
}

/// A directory is kept for the nodes in it, but not for the guest, which has forgotten it.
#[test]
fn directories_may_be_forgotten_before_the_files_in_them() {
    let f = fixture(0, false);
    std::fs::create_dir_all(f.dir.path().join("a/b/c")).unwrap();
    let look = |node, name| f.files.lookup(node, name).unwrap().nodeid;
    let exists = |node| f.files.getattr(node, &GetattrIn::default()).is_ok();
    let known = || f.files.inodes.counts().0;
    let a = look(f.root, c"a");
    let b = look(a, c"b");
    let c = look(b, c"c");
    f.files.forget(a, 1);
    f.files.forget(b, 1);
    assert!(!exists(a) && !exists(b) && exists(c));
    assert!(f.files.lookup(b, c"c").is_err());
    assert_eq!(known(), 4);
    // It is the same one if it is looked up again.
    assert_eq!(look(f.root, c"a"), a);
    f.files.forget(c, 1);
    assert_eq!(known(), 2);
    f.files.forget(a, 1);
    assert_eq!(known(), 1);
}

/// One that moved away needs its former directory no more.
#[test]
fn a_forgotten_directory_is_removed_when_it_is_left() {
    let f = fixture(0, false);
    std::fs::create_dir_all(f.dir.path().join("a/b")).unwrap();
    std::fs::create_dir(f.dir.path().join("c")).unwrap();
    let a = f.files.lookup(f.root, c"a").unwrap().nodeid;
    let b = f.files.lookup(a, c"b").unwrap().nodeid;
    let c = f.files.lookup(f.root, c"c").unwrap().nodeid;
    f.files.forget(a, 1);
    std::fs::rename(f.dir.path().join("a/b"), f.dir.path().join("b")).unwrap();
    assert_eq!(f.files.lookup(f.root, c"b").unwrap().nodeid, b);
    f.files.forget(c, 1);
    assert_eq!(f.files.inodes.counts().0, 2);
}

/// Nodes share one list with their directory, or have one of the same shares.
#[test]
fn a_move_between_directories_of_the_same_shares_changes_no_shares() {
    let f = fixture(0, false);
    std::fs::create_dir_all(f.dir.path().join("a/dir")).unwrap();
    std::fs::create_dir(f.dir.path().join("b")).unwrap();
    let look = |node, name| f.files.lookup(node, name).unwrap().nodeid;
    let (a, b) = (look(f.root, c"a"), look(f.root, c"b"));
    let dir = f.files.inodes.get(look(a, c"dir")).unwrap();
    let other = f.files.inodes.get(b).unwrap();
    let copy: Arc<[_]> = Arc::from(other.reach().to_vec());
    *koya_host::sync::lock(&other.reach) = copy;
    let before = dir.reach();
    f.files.rename(a, c"dir", b, c"dir", 0).unwrap();
    assert!(Arc::ptr_eq(&before, &dir.reach()));
    assert!(!Arc::ptr_eq(&before, &other.reach()));
}
