//! Owners, modes and file types kept by a process without root.

use super::*;
use crate::fs::passthrough::owners::{ATTRIBUTE, Owners};
use crate::fs::wire::{MknodIn, SetattrIn, setattr};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

/// A user without any privileges.
const USER: u32 = 65534;

/// Runs a test as a user other than root who owns the shared directory.
fn as_user(test: impl FnOnce(&mut Fixture) + Send + 'static) {
    let thread = std::thread::spawn(|| {
        let mut f = fixture(0, false);
        let mut user = rustix::process::geteuid();
        if user.is_root() {
            std::os::unix::fs::chown(f.dir.path(), Some(USER), Some(USER)).unwrap();
            let group = rustix::fs::Gid::from_raw(USER);
            user = rustix::fs::Uid::from_raw(USER);
            // Only for this thread.
            rustix::thread::set_thread_res_gid(group, group, group).unwrap();
            rustix::thread::set_thread_res_uid(user, user, user).unwrap();
        }
        let group = rustix::process::getegid();
        f.files.owners = Some(Owners::of(user.as_raw(), group.as_raw()));
        test(&mut f);
    });
    thread.join().unwrap();
}

fn attribute(path: &Path) -> Option<String> {
    let mut value = [0; 128];
    let len = rustix::fs::getxattr(path, ATTRIBUTE, &mut value[..]).ok()?;
    Some(String::from_utf8(value[..len].to_vec()).unwrap())
}

/// User, group and mode as the guest sees them.
fn seen(f: &Fixture, name: &CStr) -> (u32, u32, u32) {
    let attr = f.files.lookup(f.root, name).unwrap().attr;
    (attr.uid, attr.gid, attr.mode)
}

fn change(f: &Fixture, name: &CStr, valid: u32, (uid, gid, mode): (u32, u32, u32)) {
    let node = f.files.lookup(f.root, name).unwrap().nodeid;
    let arg = SetattrIn {
        valid,
        uid,
        gid,
        mode,
        ..SetattrIn::default()
    };
    let attr = f.files.setattr(node, &arg).unwrap().attr;
    assert_eq!((attr.uid, attr.gid, attr.mode), seen(f, name));
}

fn host_mode(path: &Path) -> u32 {
    path.symlink_metadata().unwrap().mode() & 0o7777
}

#[test]
fn owners_and_modes_are_kept() {
    as_user(|f| {
        let path = f.dir.path().join("x");
        std::fs::write(&path, "x").unwrap();
        let own = path.metadata().unwrap().uid();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(seen(f, c"x"), (0, 0, 0o100_644), "the user's are root's");
        change(f, c"x", setattr::UID | setattr::GID, (33, 44, 0));
        change(f, c"x", setattr::MODE, (0, 0, 0o4710));
        assert_eq!(seen(f, c"x"), (33, 44, 0o104_710));
        assert_eq!(attribute(&path).as_deref(), Some("33:44:4710"));
        assert_eq!(
            host_mode(&path),
            0o710,
            "nothing on the host is set-user-ID"
        );
        assert_eq!(path.metadata().unwrap().uid(), own);
        change(f, c"x", setattr::GID, (0, 45, 0));
        assert_eq!(seen(f, c"x"), (33, 45, 0o100_710), "as chown(2) does");
        // A file that not even its owner may read is served all the same.
        change(f, c"x", setattr::MODE, (0, 0, 0));
        assert_eq!(host_mode(&path), 0o600);
        assert_eq!(seen(f, c"x"), (33, 45, 0o100_000));
        let node = f.files.lookup(f.root, c"x").unwrap().nodeid;
        f.files.open(node, &writing()).unwrap();
        let name = ATTRIBUTE;
        assert_eq!(f.files.getxattr(node, name, 100), Err(Errno::PERM));
        assert_eq!(
            f.files.setxattr(node, name, b"0:0:4777", 0),
            Err(Errno::PERM)
        );
        assert_eq!(f.files.removexattr(node, name), Err(Errno::PERM));
        assert!(f.files.listxattr(node, 1000).unwrap().is_empty());
        // No attribute is written where it would add nothing.
        std::fs::write(f.dir.path().join("plain"), "").unwrap();
        change(f, c"plain", setattr::MODE | setattr::UID, (0, 0, 0o755));
        assert_eq!(attribute(&f.dir.path().join("plain")), None);
        std::os::unix::fs::symlink("x", f.dir.path().join("link")).unwrap();
        change(f, c"link", setattr::UID | setattr::GID, (33, 33, 0));
    });
}

#[test]
fn new_files_are_their_callers() {
    as_user(|f| {
        let caller = Caller { uid: 7, gid: 8 };
        let mkdir = MkdirIn {
            mode: 0o755,
            umask: 0,
        };
        f.files.mkdir(f.root, c"dir", &mkdir, caller).unwrap();
        assert_eq!(seen(f, c"dir"), (7, 8, 0o40_755));
        change(f, c"dir", setattr::MODE, (0, 0, 0o2775));
        let dir = f.files.lookup(f.root, c"dir").unwrap().nodeid;
        let arg = CreateIn {
            flags: OFlags::RDWR.bits(),
            mode: 0o4444,
            umask: 0o022,
            open_flags: 0,
        };
        let other = Caller { uid: 9, gid: 10 };
        let (entry, _) = f.files.create(dir, c"file", &arg, other).unwrap();
        let attr = entry.attr;
        assert_eq!((attr.uid, attr.gid, attr.mode), (9, 8, 0o104_444));
        assert_eq!(host_mode(&f.dir.path().join("dir/file")), 0o644);
        let entry = f.files.mkdir(dir, c"below", &mkdir, other).unwrap();
        assert_eq!((entry.attr.gid, entry.attr.mode), (8, 0o42_755));
        f.files.symlink(dir, c"link", c"file", other).unwrap();
        // A change of the file drops its privileges.
        let node = f.files.lookup(dir, c"file").unwrap().nodeid;
        let fh = f.files.open(node, &writing()).unwrap().fh;
        let none: [vm_memory::VolatileSlice<'_>; 0] = [];
        let arg = WriteIn {
            fh,
            write_flags: WRITE_KILL_SUIDGID,
            ..WriteIn::default()
        };
        f.files.write(node, &arg, &none).unwrap();
        let attr = f.files.getattr(node, &GetattrIn::default()).unwrap().attr;
        assert_eq!(attr.mode, 0o100_444);
    });
}

#[test]
fn files_stand_for_device_nodes() {
    as_user(|f| {
        let make = |name, mode, rdev| {
            let arg = MknodIn {
                mode,
                rdev,
                umask: 0,
                padding: 0,
            };
            f.files.mknod(f.root, name, &arg, CALLER).unwrap().attr
        };
        // Major 1, minor 3, and a pipe.
        let null = make(c"null", 0o20_666, 0x103);
        assert_eq!((null.mode, null.rdev), (0o20_666, 0x103));
        assert_eq!(make(c"pipe", 0o10_600, 0).mode, 0o10_600);
        assert_eq!(make(c"file", 0o100_644, 0).mode, 0o100_644);
        let path = f.dir.path().join("null");
        assert!(path.symlink_metadata().unwrap().is_file());
        assert_eq!(attribute(&path).as_deref(), Some("0:0:0666:char-1-3"));
        let node = f.files.lookup(f.root, c"null").unwrap().nodeid;
        let stat = f.files.statx(node, &StatxIn::default()).unwrap().stat;
        assert_eq!(
            (stat.mode, stat.rdev_major, stat.rdev_minor),
            (0o20_666, 1, 3)
        );
        for (plus, expected) in [(true, [2, 1, 8]), (false, [0, 0, 0])] {
            let kinds = super::listing::kinds(f, f.root, plus);
            let kinds = ["null", "pipe", "file"].map(|name| kinds[name]);
            assert_eq!(kinds, expected, "plus: {plus}");
        }
        f.files.unlink(f.root, c"null", false).unwrap();
    });
}

/// Fedora's root and its directories of programs have the mode 0555.
#[test]
fn the_guests_root_is_shut_out_of_nothing_that_is_the_users() {
    as_user(|f| {
        let dir = f.dir.path().join("dir");
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("x"), "x").unwrap();
        let set = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        set(&dir.join("x"), 0o440);
        set(&dir, 0o555);
        let node = f.files.lookup(f.root, c"dir").unwrap().nodeid;
        let mkdir = MkdirIn {
            mode: 0o755,
            umask: 0,
        };
        f.files.mkdir(node, c"new", &mkdir, CALLER).unwrap();
        f.files.unlink(node, c"new", true).unwrap();
        assert_eq!(seen(f, c"dir"), (0, 0, 0o40_555), "it is shown as it was");
        assert_eq!(host_mode(&dir), 0o755);
        let file = f.files.lookup(node, c"x").unwrap().nodeid;
        f.files.open(file, &writing()).unwrap();
        let attr = f.files.getattr(file, &GetattrIn::default()).unwrap().attr;
        assert_eq!(attr.mode, 0o100_440);
        f.files.setxattr(file, c"user.a", b"1", 0).unwrap();
        // Attributes of a file are accessible as well, whatever its mode.
        set(&dir.join("x"), 0o040);
        assert_eq!(f.files.getxattr(file, c"user.a", 9).unwrap(), b"1");
        set(&dir.join("x"), 0o440);
        f.files.removexattr(file, c"user.a").unwrap();
        // Files of other users stay inaccessible.
        let owners = f.files.owners.as_ref().unwrap();
        let etc = std::fs::File::open("/etc").unwrap();
        let stat = crate::fs::inodes::stat(&etc).unwrap();
        assert!(!owners.denies_owner(&stat));
        let never = |_| panic!("it is not to be touched");
        let changed = owners.change(&etc, never, |shown| shown.uid = 5);
        assert_eq!(changed, Err(Errno::PERM));
    });
}

/// For example by `mv` in read-only directories of an image.
#[test]
fn a_directory_that_is_shut_can_be_moved_to_another() {
    as_user(|f| {
        for name in ["from", "from/shut", "to", "to/other"] {
            std::fs::create_dir(f.dir.path().join(name)).unwrap();
        }
        for name in ["from/shut", "to/other"] {
            let mode = std::fs::Permissions::from_mode(0o555);
            std::fs::set_permissions(f.dir.path().join(name), mode).unwrap();
        }
        let [from, to] = [c"from", c"to"].map(|name| f.files.lookup(f.root, name).unwrap().nodeid);
        let exchange = rustix::fs::RenameFlags::EXCHANGE.bits();
        f.files
            .rename(from, c"shut", to, c"other", exchange)
            .unwrap();
        f.files.rename(from, c"shut", to, c"moved", 0).unwrap();
        for name in [c"other", c"moved"] {
            assert_eq!(f.files.lookup(to, name).unwrap().attr.mode, 0o40_555);
        }
    });
}

/// FAT, SMB and NFS with root squashing reject chown, as the host does here for a thread without CAP_CHOWN.
#[test]
fn files_are_made_where_they_cannot_be_given_away() {
    let work = || {
        let f = fixture(0, false);
        let mut left = rustix::thread::capabilities(None).unwrap();
        left.effective -= rustix::thread::CapabilitySet::CHOWN;
        // Only for this thread.
        rustix::thread::set_capabilities(None, left).unwrap();
        let caller = Caller { uid: 7, gid: 8 };
        let arg = CreateIn {
            flags: OFlags::RDWR.bits(),
            mode: 0o644,
            umask: 0,
            open_flags: 0,
        };
        let own = rustix::process::geteuid().as_raw();
        let (entry, _) = f.files.create(f.root, c"file", &arg, caller).unwrap();
        assert_eq!((entry.attr.uid, entry.attr.mode), (own, 0o100_644));
        let mkdir = MkdirIn {
            mode: 0o755,
            umask: 0,
        };
        f.files.mkdir(f.root, c"dir", &mkdir, caller).unwrap();
        f.files.symlink(f.root, c"link", c"file", caller).unwrap();
        // Nothing is left of a file whose creation fails for the guest.
        let nobody = Caller {
            uid: u32::MAX,
            gid: 0,
        };
        assert_eq!(
            f.files.create(f.root, c"no", &arg, nobody).err(),
            Some(Errno::INVAL)
        );
        assert_eq!(
            f.files.mkdir(f.root, c"no", &mkdir, nobody).err(),
            Some(Errno::INVAL)
        );
        assert_eq!(f.files.lookup(f.root, c"no").err(), Some(Errno::NOENT));
    };
    std::thread::spawn(work).join().unwrap();
}

#[test]
fn a_whiteout_belongs_to_the_user_who_moved_the_file() {
    let f = fixture(0, false);
    let path = f.dir.path().join("file");
    std::fs::write(&path, "").unwrap();
    let (whiteout, user) = (4, Caller { uid: 7, gid: 8 });
    f.files
        .rename(f.root, c"file", f.root, c"moved", whiteout)
        .unwrap();
    f.files.give_whiteout(f.root, c"moved", whiteout, user);
    f.files.give_whiteout(f.root, c"file", 0, user);
    let owner = |name: &str| {
        let found = std::fs::symlink_metadata(f.dir.path().join(name)).unwrap();
        (found.uid(), found.gid())
    };
    let own = owner("moved");
    assert_eq!(
        owner("file"),
        own,
        "a move without a whiteout changes nothing"
    );
    f.files.give_whiteout(f.root, c"file", whiteout, user);
    let wanted = if own.0 == 0 { (7, 8) } else { own };
    assert_eq!((owner("file"), owner("moved")), (wanted, own));
    assert_eq!(f.files.lookup(f.root, c"file").unwrap().attr.rdev, 0);
}
