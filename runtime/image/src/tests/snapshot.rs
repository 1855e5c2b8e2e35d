//! Contents of a directory as comparable text.

use rustix::fs::{lgetxattr, llistxattr};
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Description of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Told {
    /// Type, mode, owner, contents, links, attributes.
    pub(super) text: String,
    pub(super) mtime: (i64, i64),
}

pub(super) type Snapshot = BTreeMap<PathBuf, Told>;

pub(super) fn of(root: &Path) -> Snapshot {
    let mut all = Snapshot::new();
    let mut inodes = HashMap::new();
    walk(root, Path::new(""), &mut all, &mut inodes);
    all
}

fn walk(root: &Path, at: &Path, all: &mut Snapshot, inodes: &mut HashMap<(u64, u64), PathBuf>) {
    let path = root.join(at);
    let data = fs::symlink_metadata(&path).unwrap();
    let kind = data.file_type();
    let what = if kind.is_dir() {
        "directory".to_owned()
    } else if kind.is_symlink() {
        format!("link to {:?}", fs::read_link(&path).unwrap())
    } else if kind.is_file() {
        let bytes = fs::read(&path).unwrap();
        format!("file of {} bytes, {}", bytes.len(), super::digest(&bytes))
    } else if kind.is_fifo() {
        "FIFO".to_owned()
    } else {
        let letter = if kind.is_block_device() { 'b' } else { 'c' };
        format!("device {letter} {:x}", data.rdev())
    };
    let mut text = format!(
        "{what}, {:o} {}:{}",
        data.mode() & 0o7777,
        data.uid(),
        data.gid()
    );
    if !kind.is_dir() && data.nlink() > 1 {
        // Names are sorted, so the first name of a file is the same in each tree.
        let first = inodes
            .entry((data.dev(), data.ino()))
            .or_insert_with(|| at.to_owned());
        text += &format!(", with {}", first.display());
    }
    for (name, value) in attributes(&path) {
        text += &format!(
            ", {}={value:02x?}",
            String::from_utf8_lossy(name.as_bytes())
        );
    }
    let mtime = (data.mtime(), data.mtime_nsec());
    all.insert(at.to_owned(), Told { text, mtime });
    if kind.is_dir() {
        let mut names: Vec<_> = fs::read_dir(&path)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        names.sort();
        names
            .iter()
            .for_each(|name| walk(root, &at.join(name), all, inodes));
    }
}

/// Attributes by the names that a guest sees.
fn attributes(path: &Path) -> BTreeMap<OsString, Vec<u8>> {
    let mut list = vec![0; 1 << 16];
    let Ok(len) = llistxattr(path, &mut list[..]) else {
        return BTreeMap::new();
    };
    let names = list[..len]
        .split(|b| *b == 0)
        .filter(|name| !name.is_empty());
    let named = names.map(|name| {
        let mut value = vec![0; 1 << 16];
        let own = OsString::from_vec(name.to_vec());
        let len = lgetxattr(path, &own, &mut value[..]).unwrap();
        value.truncate(len);
        let seen = name.strip_prefix(b"user.koya.").unwrap_or(name);
        (OsString::from_vec(seen.to_vec()), value)
    });
    named.collect()
}
