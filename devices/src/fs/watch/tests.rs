//! Watches without a guest: changes by the host are reported, those by the guest are not.

use super::translate::HOST_COOKIE;
use super::*;
use crate::fs::Shares;
use crate::fs::passthrough::{Caller, Options, Passthrough};
use crate::fs::wire::{
    CreateIn, HostWatchIn, LinkIn, MkdirIn, OpenIn, ROOT_ID, SetattrIn, setattr,
};
use std::fs;
use std::path::PathBuf;

const CALLER: Caller = Caller { uid: 0, gid: 0 };
const ALL: u32 = 0xfff;

struct Fixture {
    dir: tempfile::TempDir,
    shares: Shares,
    files: Passthrough,
    events: HostEvents,
    root: u64,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let shares = Shares::default();
        shares.add("s", dir.path(), false).unwrap();
        let files = Passthrough::new(shares.clone(), Options::default()).unwrap();
        let root = files.lookup(ROOT_ID, c"s").unwrap().nodeid;
        Self {
            dir,
            shares,
            events: files.host_events(),
            files,
            root,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn node(&self, name: &CStr) -> u64 {
        self.files.lookup(self.root, name).unwrap().nodeid
    }

    fn watch(&self, node: u64, seq: u64) {
        let arg = HostWatchIn {
            seq,
            mask: ALL,
            padding: 0,
        };
        self.files.watch(node, &arg).unwrap();
    }

    /// A watched directory that the host has just moved to `other/dir`.
    fn moved_directory(&self) -> u64 {
        fs::create_dir(self.path("dir")).unwrap();
        fs::create_dir(self.path("other")).unwrap();
        let dir = self.node(c"dir");
        self.watch(dir, 1);
        fs::rename(self.path("dir"), self.path("other/dir")).unwrap();
        dir
    }

    /// The events reported now: node, type, name.
    fn reported(&self) -> Vec<(u64, u32, String)> {
        let events = self.events.0.take().unwrap();
        let row = |e: &HostEvent| (e.nodeid, e.mask, String::from_utf8_lossy(&e.name).into());
        events.iter().map(row).collect()
    }
}

#[test]
fn changes_by_the_host_are_reported() {
    let f = Fixture::new();
    f.watch(f.root, 1);
    fs::write(f.path("a"), "text").unwrap();
    fs::create_dir(f.path("d")).unwrap();
    fs::rename(f.path("a"), f.path("b")).unwrap();
    fs::remove_file(f.path("b")).unwrap();
    let events = f.events.next().unwrap().unwrap();
    let kinds: Vec<_> = events.iter().map(|e| (e.mask, &e.name[..])).collect();
    assert_eq!(
        kinds,
        [
            (kind::CREATE, &b"a"[..]),
            (kind::MODIFY, b"a"),
            (kind::CLOSE_WRITE, b"a"),
            (kind::CREATE | kind::IS_DIR, b"d"),
            (0x40, b"a"),
            (0x80, b"b"),
            (kind::DELETE, b"b"),
        ]
    );
    assert!(events.iter().all(|e| e.nodeid == f.root));
    // Both halves of a move have the same cookie, which no move by the guest has.
    assert_eq!(events[4].cookie, events[5].cookie);
    assert_ne!(events[4].cookie & HOST_COOKIE, 0);
}

#[test]
fn a_watch_reports_only_the_types_in_its_mask() {
    let f = Fixture::new();
    let arg = HostWatchIn {
        seq: 1,
        mask: kind::DELETE,
        padding: 0,
    };
    f.files.watch(f.root, &arg).unwrap();
    fs::write(f.path("a"), "text").unwrap();
    fs::remove_file(f.path("a")).unwrap();
    assert_eq!(f.reported(), [(f.root, kind::DELETE, "a".into())]);
}

#[test]
fn changes_by_the_guest_are_not_reported_and_later_ones_by_the_host_are() {
    let f = Fixture::new();
    f.watch(f.root, 1);
    fs::write(f.path("file"), "").unwrap();
    let file = f.node(c"file");
    f.watch(file, 2);
    f.reported();
    let (made, open) = f
        .files
        .create(f.root, c"new", &CreateIn::default(), CALLER)
        .unwrap();
    f.files.release(made.nodeid, open.fh);
    f.files
        .mkdir(f.root, c"dir", &MkdirIn::default(), CALLER)
        .unwrap();
    f.files.rename(f.root, c"new", f.root, c"moved", 0).unwrap();
    let truncate = SetattrIn {
        valid: setattr::SIZE | setattr::MODE,
        size: 100,
        mode: 0o600,
        ..SetattrIn::default()
    };
    f.files.setattr(file, &truncate).unwrap();
    f.files.unlink(f.root, c"file", false).unwrap();
    f.files.unlink(f.root, c"dir", true).unwrap();
    let reported = f.reported();
    // The removal of an unlinked file that the guest watches is reported, no matter which side removed it.
    assert!(reported.is_empty(), "{reported:x?}");

    fs::write(f.path("new"), "").unwrap();
    let reported = f.reported();
    assert_eq!(
        reported[0],
        (f.root, kind::CREATE, "new".into()),
        "{reported:x?}"
    );
}

/// An operation of the guest that causes no event on the host hides nothing.
#[test]
fn a_record_does_not_outlive_its_operation() {
    let f = Fixture::new();
    fs::write(f.path("file"), "").unwrap();
    let file = f.node(c"file");
    f.watch(file, 1);
    let open = f.files.open(file, &OpenIn::default()).unwrap();
    f.files.release(file, open.fh);
    assert!(lock(&f.events.0.state).changes_in_progress.is_empty());
    fs::write(f.path("file"), "").unwrap();
    let reported = f.reported();
    assert!(
        reported.contains(&(file, kind::CLOSE_WRITE, String::new())),
        "{reported:x?}"
    );
}

#[test]
fn the_removal_of_a_file_and_of_a_directory_is_reported() {
    let f = Fixture::new();
    fs::write(f.path("file"), "").unwrap();
    fs::create_dir(f.path("dir")).unwrap();
    let (file, dir) = (f.node(c"file"), f.node(c"dir"));
    f.watch(file, 1);
    f.watch(dir, 2);
    fs::remove_file(f.path("file")).unwrap();
    fs::remove_dir(f.path("dir")).unwrap();
    let reported = f.reported();
    let ends: Vec<_> = reported
        .iter()
        .filter(|(_, mask, _)| mask & kind::DELETE_SELF != 0)
        .map(|(node, ..)| *node)
        .collect();
    assert_eq!(ends, [file, dir], "{reported:x?}");
}

/// The guest may keep removed directories, and its watches on them, for as long as it likes.
#[test]
fn the_end_of_a_directory_is_reported_once() {
    const COUNT: usize = 20;
    let f = Fixture::new();
    for number in 0..COUNT {
        let name = format!("dir{number}");
        fs::create_dir(f.path(&name)).unwrap();
        let node = f.node(&std::ffi::CString::new(name).unwrap());
        f.watch(node, number as u64 + 1);
    }
    for number in 0..COUNT {
        fs::remove_dir(f.path(&format!("dir{number}"))).unwrap();
        f.files
            .mkdir(f.root, c"other", &MkdirIn::default(), CALLER)
            .unwrap();
        f.files.unlink(f.root, c"other", true).unwrap();
    }
    let reported = f.reported();
    let ends = reported
        .iter()
        .filter(|(_, mask, _)| mask & kind::DELETE_SELF != 0);
    assert_eq!(ends.count(), COUNT, "{reported:x?}");
    let state = lock(&f.events.0.state);
    assert_eq!(state.nodes.len(), COUNT, "they are still watched");
    assert!(state.watched.values().all(|one| one.children.is_empty()));
}

/// Also if the host has given it another name.
#[test]
fn the_end_of_a_renamed_directory_is_reported_once() {
    let f = Fixture::new();
    for (is_read, name) in [(false, "first"), (true, "second")] {
        fs::create_dir(f.path(name)).unwrap();
        let dir = f.node(&std::ffi::CString::new(name).unwrap());
        f.watch(dir, 1);
        fs::rename(f.path(name), f.path("other")).unwrap();
        let mut reported = match is_read {
            true => f.reported(),
            false => Vec::new(),
        };
        // Another one takes over its name.
        fs::create_dir(f.path(name)).unwrap();
        fs::remove_dir(f.path(name)).unwrap();
        fs::remove_dir(f.path("other")).unwrap();
        reported.extend(f.reported());
        let ends = reported
            .iter()
            .filter(|(node, mask, _)| *node == dir && mask & kind::DELETE_SELF != 0);
        assert_eq!(ends.count(), 1, "{name}: {reported:x?}");
    }
}

/// A guest may watch thousands of directories beside each other, and cause thousands of events.
#[test]
fn an_event_concerns_the_directories_of_its_name_only() {
    let f = Fixture::new();
    let mut nodes = Vec::new();
    for number in 0..20 {
        let name = format!("dir{number}");
        fs::create_dir(f.path(&name)).unwrap();
        let node = f.node(&std::ffi::CString::new(name).unwrap());
        f.watch(node, 1);
        nodes.push(node);
    }
    let state = lock(&f.events.0.state);
    let place = state.nodes[&nodes[3]].parent.clone().unwrap();
    let parent = &state.watched[&place.0];
    assert_eq!(parent.children.len(), 20);
    assert_eq!(parent.children_named(b"dir3"), [nodes[3]]);
    assert!(parent.children_named(b"dir").is_empty());
}

#[test]
fn other_threads_get_their_turn_while_many_events_are_read() {
    const COUNT: usize = 1000;
    let f = Fixture::new();
    f.watch(f.root, 1);
    for number in 0..COUNT {
        fs::create_dir(f.path(&number.to_string())).unwrap();
    }
    let watches = &f.events.0;
    let has_more = watches.drain(&mut lock(&watches.state)).unwrap();
    let read = lock(&watches.state).pending.len();
    assert!(has_more && (256..512).contains(&read), "{read}");
    assert_eq!(f.reported().len(), COUNT);
}

fn translate(f: &Fixture, descriptor: i32, kind: u32) {
    let watches = &f.events.0;
    let flags = inotify::ReadFlags::from_bits_retain(kind);
    watches.translate(&mut lock(&watches.state), descriptor, flags, 0, &[]);
}

#[test]
fn a_watch_that_the_host_ends_is_removed() {
    let f = Fixture::new();
    fs::write(f.path("file"), "").unwrap();
    let file = f.node(c"file");
    f.watch(file, 1);
    let descriptor = lock(&f.events.0.state).nodes[&file].descriptor;
    translate(&f, descriptor, kind::IGNORED);
    let state = lock(&f.events.0.state);
    assert!(state.nodes.is_empty() && state.watched.is_empty());
    assert!(!f.events.0.any());
}

#[test]
fn several_nodes_of_a_directory_count_each() {
    let f = Fixture::new();
    let mut nodes = vec![f.root];
    for name in [c"t", c"u"] {
        let share = name.to_str().unwrap();
        f.shares.add(share, f.dir.path(), false).unwrap();
        nodes.push(f.files.lookup(ROOT_ID, name).unwrap().nodeid);
    }
    let watches = Watches::new(f.events.0.inodes.clone()).unwrap();
    watches.limit.set(2).unwrap();
    let watch = |node: &u64| {
        let inode = watches.inodes.get(*node)?;
        watches.watch(&inode, 1, ALL)
    };
    let watched: Vec<_> = nodes.iter().map(watch).collect();
    assert_eq!(watched[0], Ok(()));
    assert_eq!(watched[2], Err(Errno::NOSPC));
}

/// They are not collected all at once.
#[test]
fn events_dropped_by_the_host_concern_every_node() {
    const COUNT: usize = 600;
    let f = Fixture::new();
    let mut nodes = HashSet::new();
    for number in 0..COUNT {
        let name = format!("file{number}");
        fs::write(f.path(&name), "").unwrap();
        let node = f.node(&std::ffi::CString::new(name).unwrap());
        f.watch(node, 1);
        nodes.insert(node);
    }
    translate(&f, -1, kind::Q_OVERFLOW);
    assert!(lock(&f.events.0.state).pending.is_empty());
    let first = f.reported();
    assert!(first.len() < COUNT);
    assert_eq!(first[0].1, kind::MODIFY);
    // More are dropped meanwhile: all have to look again.
    translate(&f, -1, kind::Q_OVERFLOW);
    let mut told: Vec<_> = f.reported().iter().map(|row| row.0).collect();
    told.extend(f.reported().iter().map(|row| row.0));
    assert_eq!(told.len(), COUNT);
    let told: HashSet<u64> = told.into_iter().collect();
    assert_eq!(told, nodes);
    assert_eq!(f.reported(), []);
}

/// Of a file's names, the server knows that of the last lookup.
#[test]
fn changes_by_the_guest_are_not_reported_for_another_name_of_the_file() {
    let f = Fixture::new();
    f.watch(f.root, 1);
    fs::write(f.path("file"), "text").unwrap();
    let node = f.node(c"file");
    f.reported();
    let truncate = |size| {
        let arg = SetattrIn {
            valid: setattr::SIZE,
            size,
            ..SetattrIn::default()
        };
        f.files.setattr(node, &arg).unwrap();
    };
    f.files
        .link(f.root, c"other", &LinkIn { oldnodeid: node })
        .unwrap();
    truncate(3);
    assert_eq!(f.reported(), [], "two names");
    f.files.unlink(f.root, c"other", false).unwrap();
    truncate(2);
    assert_eq!(f.reported(), [], "the last one was removed");
    fs::write(f.path("file"), "more").unwrap();
    let names: HashSet<_> = f.reported().into_iter().map(|(.., name)| name).collect();
    assert_eq!(names, HashSet::from(["file".to_owned()]));
}

#[test]
fn a_moved_directory_is_watched_where_it_is() {
    let f = Fixture::new();
    let dir = f.moved_directory();
    assert!(
        f.reported()
            .contains(&(dir, kind::MOVE_SELF, String::new()))
    );
    fs::remove_dir(f.path("other/dir")).unwrap();
    let reported = f.reported();
    let gone = (dir, kind::DELETE_SELF | kind::IS_DIR, String::new());
    assert!(reported.contains(&gone), "{reported:x?}");
}

/// A change by the guest does not hide a change by the host right after it.
#[test]
fn a_change_by_the_host_right_after_one_by_the_guest_is_reported() {
    let f = Fixture::new();
    f.watch(f.root, 1);
    f.files
        .mkdir(f.root, c"dir", &MkdirIn::default(), CALLER)
        .unwrap();
    f.files.unlink(f.root, c"dir", true).unwrap();
    fs::create_dir(f.path("dir")).unwrap();
    let made = (f.root, kind::CREATE | kind::IS_DIR, "dir".into());
    assert_eq!(f.reported(), [made]);
}

#[test]
fn changes_in_a_moved_directory_are_reported() {
    let f = Fixture::new();
    let dir = f.moved_directory();
    fs::create_dir(f.path("other/dir/new")).unwrap();
    let made = (dir, kind::CREATE | kind::IS_DIR, "new".into());
    assert!(f.reported().contains(&made));
}

#[test]
fn requests_for_unknown_nodes_take_no_memory() {
    let f = Fixture::new();
    for node in 1000..2000 {
        f.files.unwatch(node, 1);
    }
    assert!(lock(&f.events.0.state).last_requests.is_empty());
    f.watch(f.root, 1);
    f.files.unwatch(f.root, 2);
    f.files.clear();
    assert!(lock(&f.events.0.state).last_requests.is_empty());
}

/// A directory can be two nodes through two exports: a change by the guest through one is a change by the
/// host for the other.
#[test]
fn two_shares_of_one_directory_are_distinguished() {
    let f = Fixture::new();
    f.shares.add("t", f.dir.path(), false).unwrap();
    let other = f.files.lookup(ROOT_ID, c"t").unwrap().nodeid;
    f.watch(f.root, 1);
    f.watch(other, 2);
    f.files
        .mkdir(f.root, c"dir", &MkdirIn::default(), CALLER)
        .unwrap();
    let made = (other, kind::CREATE | kind::IS_DIR, "dir".into());
    assert_eq!(f.reported(), [made]);
}

#[test]
fn the_last_watch_request_counts() {
    let f = Fixture::new();
    // The end of a watch overtakes its beginning.
    f.files.unwatch(f.root, 2);
    f.watch(f.root, 1);
    fs::write(f.path("a"), "").unwrap();
    assert_eq!(f.reported(), []);
    f.watch(f.root, 3);
    fs::remove_file(f.path("a")).unwrap();
    assert_eq!(f.reported().len(), 1);
}

#[test]
fn watches_of_forgotten_and_removed_nodes_end() {
    let f = Fixture::new();
    fs::create_dir(f.path("dir")).unwrap();
    let dir = f.node(c"dir");
    f.watch(dir, 1);
    f.watch(f.root, 2);
    f.files.forget(dir, 1);
    {
        let watches = &f.events.0;
        let state = lock(&watches.state);
        assert_eq!(state.nodes.len(), 1);
        assert_eq!(state.last_requests.len(), 1);
    }
    f.shares.remove("s");
    let state = lock(&f.events.0.state);
    assert!(state.nodes.is_empty() && state.watched.is_empty() && state.last_requests.is_empty());
}

#[test]
fn events_end_with_the_device() {
    let f = Fixture::new();
    f.files.end_host_events();
    assert_eq!(f.events.next().unwrap(), None);
}
