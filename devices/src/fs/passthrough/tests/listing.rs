//! Contents of directory listings.

use super::*;
use std::collections::HashMap;

/// The entries of a reply, in order.
fn entries(listing: dir::Listing, plus: bool) -> Vec<(String, Dirent)> {
    let bytes = listing.into_bytes();
    let (mut rest, mut entries) = (bytes.as_slice(), Vec::new());
    while !rest.is_empty() {
        let skipped = if plus { size_of::<EntryOut>() } else { 0 };
        let (dirent, after) = Dirent::read_from_prefix(&rest[skipped..]).unwrap();
        let len = dirent.namelen as usize;
        entries.push((String::from_utf8(after[..len].to_vec()).unwrap(), dirent));
        rest = &rest[skipped + (size_of::<Dirent>() + len).next_multiple_of(8)..];
    }
    entries
}

/// The names in a directory, read by replies of this size.
fn names(f: &Fixture, node: u64, room: u32, plus: bool, each: impl Fn(u64)) -> Vec<String> {
    let fh = f.files.opendir(node).unwrap().fh;
    let (mut names, mut offset) = (Vec::new(), 0);
    loop {
        each(fh);
        let listing = f.files.readdir(node, fh, offset, room, plus).unwrap();
        let entries = entries(listing, plus);
        let Some((_, last)) = entries.last() else {
            return names;
        };
        offset = last.off;
        names.extend(entries.into_iter().map(|(name, _)| name));
    }
}

/// The types (`d_type`) of the entries of a small directory.
pub(super) fn kinds(f: &Fixture, node: u64, plus: bool) -> HashMap<String, u32> {
    let fh = f.files.opendir(node).unwrap().fh;
    let listing = f.files.readdir(node, fh, 0, 64 << 10, plus).unwrap();
    let entries = entries(listing, plus).into_iter();
    entries.map(|(name, dirent)| (name, dirent.kind)).collect()
}

/// kata-containers/kata-containers 12749: cookies of some NFS servers are not offsets for lseek(2).
#[test]
fn a_directory_is_listed_without_seeking() {
    let f = fixture(0, false);
    let node = f.files.lookup(ROOT_ID, c"s").unwrap().nodeid;
    let mut expected = vec![".".to_owned(), "..".to_owned()];
    for n in 0..300 {
        // Names of every length.
        let name = format!("{n:03}{}", "x".repeat(n % 250));
        std::fs::write(f.dir.path().join(&name), "").unwrap();
        expected.push(name);
    }
    expected.sort();
    for plus in [false, true] {
        for room in [512, 4096, 128 << 10] {
            // As if no cookie so far were an offset; a seek would lead nowhere.
            let no_seeks = |fh| {
                let handle = f.files.handles.get(fh, node).unwrap();
                let mut position = koya_host::sync::lock(&handle.position);
                position.seeks = false;
                // Linux never asks for less than a page.
                assert!(position.at.is_some() || room < 4096, "room {room}");
            };
            for each in [&no_seeks as &dyn Fn(u64), &|_| ()] {
                let mut found = names(&f, node, room, plus, each);
                found.sort();
                assert_eq!(found, expected, "room {room}, plus {plus}");
            }
        }
    }
}

/// Programs of 32 bits without large file support can't list directories with larger positions, as ext4 has them: glibc's
/// `readdir` fails with EOVERFLOW.
#[test]
fn positions_fit_programs_of_32_bits() {
    let f = fixture(0, false);
    for n in 0..500 {
        std::fs::write(f.dir.path().join(format!("file{n}")), "").unwrap();
    }
    for room in [512, 64 << 10] {
        let all = f.files.opendir(f.root).unwrap().fh;
        let (mut found, mut offset) = (Vec::new(), 0);
        loop {
            let listing = f.files.readdir(f.root, all, offset, room, false).unwrap();
            let part = entries(listing, false);
            let Some((_, last)) = part.last() else { break };
            offset = last.off;
            found.extend(part);
        }
        assert_eq!(found.len(), 502);
        // From each position on, the same entries follow, in a directory that is opened later as well.
        let later = f.files.opendir(f.root).unwrap().fh;
        for (index, (name, dirent)) in found.iter().enumerate().step_by(7) {
            assert!(i32::try_from(dirent.off).is_ok(), "{name}: {}", dirent.off);
            for fh in [all, later] {
                let listing = f.files.readdir(f.root, fh, dirent.off, 512, false).unwrap();
                let next = entries(listing, false).into_iter().next();
                let next = next.map(|(name, _)| name);
                assert_eq!(next.as_ref(), found.get(index + 1).map(|(name, _)| name));
            }
        }
    }
}

/// Inode numbers on the first file system are the host's; on others they differ from those, or the file system has a number.
#[test]
fn numbers_of_several_file_systems_differ() {
    use std::os::unix::fs::MetadataExt;
    let f = fixture(0, false);
    f.files.set_has_devices(true);
    f.shares.add("proc", "/proc", true).unwrap();
    let attr = |name: &CStr| f.files.lookup(ROOT_ID, name).unwrap().attr;
    let proc = std::fs::metadata("/proc").unwrap().ino();
    let found = attr(c"proc");
    assert_eq!((found.ino, found.flags), (proc, 1 << 16));
    f.files.clear();
    f.files.set_has_devices(false);
    f.shares.add("again", f.dir.path(), true).unwrap();
    let own = f.dir.path().metadata().unwrap().ino();
    let number = |name: &CStr| f.files.lookup(ROOT_ID, name).unwrap().attr.ino;
    assert_eq!(number(c"again"), own);
    assert_eq!(number(c"proc"), proc | 1 << 48);
    // A listing has the same numbers as a lookup.
    let node = f.files.lookup(ROOT_ID, c"proc").unwrap().nodeid;
    let version = f.files.lookup(node, c"version").unwrap().attr.ino;
    let fh = f.files.opendir(node).unwrap().fh;
    let mut offset = 0;
    loop {
        let listing = f.files.readdir(node, fh, offset, 4096, false).unwrap();
        let bytes = listing.into_bytes();
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let (dirent, names) = Dirent::read_from_prefix(rest).unwrap();
            let len = dirent.namelen as usize;
            if &names[..len] == b"version" {
                assert_eq!(dirent.ino, version);
                return;
            }
            offset = dirent.off;
            rest = &rest[(size_of::<Dirent>() + len).next_multiple_of(8)..];
        }
        assert!(!bytes.is_empty(), "/proc/version is listed");
    }
}
