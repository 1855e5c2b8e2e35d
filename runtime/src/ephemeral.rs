//! Kubernetes volumes in memory (`emptyDir` with `medium: Memory`): a tmpfs in the guest instead of on the host, so that its
//! contents count towards the containers' memory.
//!
//! The kubelet mounts a tmpfs of the volume's size on the host, and gives containers that tmpfs or directories of it
//! (`subPath`). Both are recognized by the host's mount table: all paths on one such tmpfs map to one tmpfs in the guest.

use koya_protocol::messages::EphemeralVolume;
use rustix::fs::StatFs;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

/// Mount points of such volumes, in the kubelet's directory of the pod.
const VOLUMES: &str = "/volumes/kubernetes.io~empty-dir/";

/// A line of `/proc/self/mountinfo` (proc(5)), with the fields used here.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    /// Device number of the file system.
    device: String,
    /// The mounted directory of the file system.
    root: PathBuf,
    at: PathBuf,
    kind: String,
}

impl Mount {
    fn parse(line: &str) -> Option<Self> {
        let (first, second) = line.split_once(" - ")?;
        let words: Vec<&str> = first.split(' ').collect();
        Some(Self {
            device: (*words.get(2)?).into(),
            root: unescaped(words.get(3)?).into(),
            at: unescaped(words.get(4)?).into(),
            kind: second.split(' ').next()?.into(),
        })
    }
}

/// Decodes escapes: `\040` is a space.
fn unescaped(text: &str) -> String {
    let pairs = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n")];
    let text = pairs
        .iter()
        .fold(text.to_owned(), |text, (from, to)| text.replace(from, to));
    text.replace("\\134", "\\")
}

/// Whether this is an in-memory file system.
pub(crate) fn is_in_memory(found: &StatFs) -> bool {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    found.f_type == TMPFS_MAGIC
}

/// The in-memory volume that contains a path of the host, if it is a Kubernetes volume; for the container's mount with this
/// number.
pub(crate) fn volume_for_source(source: &Path, number: u32) -> Option<EphemeralVolume> {
    if !is_in_memory(&rustix::fs::statfs(source).ok()?) {
        return None;
    }
    // The table has resolved paths, and other entries that are not valid UTF-8 do not matter.
    let source = fs::canonicalize(source).ok()?;
    let table = fs::read("/proc/thread-self/mountinfo").ok()?;
    let (device, volume, within) = find(&String::from_utf8_lossy(&table), &source)?;
    let found = fs::metadata(&volume).ok()?;
    let space = rustix::fs::statvfs(&volume).ok()?;
    Some(EphemeralVolume {
        name: format!("memory-{}", device.replace(':', "-")),
        directory: within.to_str()?.into(),
        number,
        size_bytes: space.f_blocks.saturating_mul(space.f_frsize),
        mode: found.mode() & 0o7777,
        uid: found.uid(),
        gid: found.gid(),
        ..Default::default()
    })
}

/// The kubelet's in-memory volume that contains `source`: its device (`MAJOR:MINOR`), its mount point, and the path of
/// `source` in it.
pub(crate) fn find(table: &str, source: &Path) -> Option<(String, PathBuf, PathBuf)> {
    let mounts: Vec<Mount> = table.lines().filter_map(Mount::parse).collect();
    // The deepest mount counts, and of several at one path the last.
    let around = mounts.iter().filter(|mount| source.starts_with(&mount.at));
    let own = around.max_by_key(|mount| mount.at.components().count())?;
    let is_volume = |mount: &&Mount| {
        mount.device == own.device
            && mount.kind == "tmpfs"
            && mount.root == Path::new("/")
            && mount.at.to_string_lossy().contains(VOLUMES)
    };
    let volume = mounts.iter().find(is_volume)?;
    let within = own.root.join(source.strip_prefix(&own.at).ok()?);
    let within: PathBuf = within
        .components()
        .filter(|component| matches!(component, Component::Normal(_)))
        .collect();
    Some((own.device.clone(), volume.at.clone(), within))
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "/var/lib/kubelet/pods/u";

    fn found(source: &str) -> Option<(String, String)> {
        let table = format!(
            "22 1 254:0 / / rw - ext4 /dev/vda rw\n\
             30 22 0:50 / {POD}/volumes/kubernetes.io~empty-dir/fast rw,relatime shared:9 - tmpfs tmpfs rw,size=64k\n\
             31 22 0:51 / {POD}/volumes/kubernetes.io~secret/key rw - tmpfs tmpfs rw\n\
             32 22 0:50 /a\\040b {POD}/volume-subpaths/fast/c/0 rw - tmpfs tmpfs rw,size=64k\n"
        );
        let (device, _, within) = find(&table, Path::new(source))?;
        Some((device, within.to_string_lossy().into_owned()))
    }

    #[test]
    fn volumes_in_memory_are_told_from_others() {
        let volume = format!("{POD}/volumes/kubernetes.io~empty-dir/fast");
        assert_eq!(found(&volume), Some(("0:50".into(), "".into())));
        assert_eq!(
            found(&format!("{volume}/deep/er")),
            Some(("0:50".into(), "deep/er".into()))
        );
        let part = format!("{POD}/volume-subpaths/fast/c/0");
        assert_eq!(found(&part), Some(("0:50".into(), "a b".into())));
        assert_eq!(
            found(&format!("{POD}/volumes/kubernetes.io~secret/key")),
            None
        );
        let disk = format!("{POD}/volumes/kubernetes.io~empty-dir/slow");
        assert_eq!(found(&disk), None);
    }
}
