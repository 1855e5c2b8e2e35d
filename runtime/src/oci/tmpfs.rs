//! File systems in memory that begin as what they cover, as runc has it: with its mode, unless the configuration says
//! one, and by the option `tmpcopyup` with a copy of its content. podman asks for the latter with each `--tmpfs`, mostly
//! of a directory that is empty or not there, where it means nothing; else the agent copies.

use super::mounts::{has, is_bind, source_of};
use koya_protocol::COPY_UP;
use koya_rootfs::{Rootfs, memory_mode, says_mode};
use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{Dir, Mode, OFlags, openat};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::path::Path;

/// Gives those that say no mode the one of what they cover, and takes the option out where there is nothing to copy.
/// `rootfs` is the root, if it is a directory of the host, as it is before mount points are made; `directory` is that of
/// the bundle.
pub(super) fn adapt(spec: &mut Spec, directory: &Path, rootfs: Option<&Path>) {
    let Some(mut mounts) = spec.mounts().clone() else {
        return;
    };
    let root = rootfs.and_then(|rootfs| Rootfs::open(rootfs).ok());
    for index in 0..mounts.len() {
        let (earlier, later) = mounts.split_at_mut(index);
        let mount = &mut later[0];
        if mount.typ().as_deref() != Some("tmpfs") || is_bind(mount) {
            continue;
        }
        let mut options = mount.options().clone().unwrap_or_default();
        let says_mode = says_mode(&options);
        if says_mode && !has(mount, COPY_UP) {
            continue;
        }
        let covered = find(mount.destination(), earlier, directory, root.as_ref());
        let mode = match &covered {
            Covered::Nothing => memory_mode(None).ok(),
            // What is no directory can't be mounted over, which the guest says.
            Covered::There(found) => memory_mode(Some(found)).ok(),
            Covered::Unknown => None,
        };
        options.extend(mode.filter(|_| !says_mode));
        let is_empty = match &covered {
            Covered::Nothing => true,
            Covered::There(found) => is_empty(found),
            Covered::Unknown => false,
        };
        if is_empty {
            options.retain(|option| option != COPY_UP);
        }
        mount.set_options(Some(options));
    }
    spec.set_mounts(Some(mounts));
}

/// What a mount covers.
enum Covered {
    Nothing,
    There(OwnedFd),
    /// Only the guest can tell.
    Unknown,
}

fn find(place: &Path, earlier: &[Mount], directory: &Path, root: Option<&Rootfs>) -> Covered {
    let around = |mount: &&Mount| place.starts_with(mount.destination());
    let found = match (earlier.iter().rfind(around), root) {
        (None, None) => return Covered::Unknown,
        (None, Some(root)) => root.find(place),
        (Some(mount), _) if is_bind(mount) => {
            let within = place.strip_prefix(mount.destination()).unwrap_or(place);
            let source = source_of(directory, mount).ok();
            let source = source.and_then(|source| Rootfs::open(&source).ok());
            source.map_or(Err(Errno::NOENT), |source| source.find(within))
        }
        // It may have copied what it covers.
        (Some(mount), _) if has(mount, COPY_UP) => return Covered::Unknown,
        (Some(_), _) => return Covered::Nothing,
    };
    match found {
        Ok(found) => Covered::There(found),
        Err(Errno::NOENT) => Covered::Nothing,
        Err(_) => Covered::Unknown,
    }
}

/// Whether it is known that there is nothing in a directory.
fn is_empty(directory: &OwnedFd) -> bool {
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    let names = openat(directory, ".", flags, Mode::empty()).and_then(Dir::new);
    names.is_ok_and(|mut names| {
        names.all(|entry| {
            entry.is_ok_and(|entry| matches!(entry.file_name().to_bytes(), b"." | b".."))
        })
    })
}
