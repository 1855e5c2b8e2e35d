//! tmpfs mounts that inherit properties of the covered directory, as in runc: its mode, unless the configuration sets one,
//! and with the option `tmpcopyup` a copy of its contents. podman sets that option for each `--tmpfs`, mostly over a
//! directory that is empty or missing, where it has no effect; otherwise the agent makes the copy.

use super::mounts::{has, is_bind, source_of};
use koya_protocol::COPY_UP;
use koya_rootfs::{Rootfs, has_mode_option, memory_mode};
use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{Dir, Mode, OFlags, openat};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::path::Path;

/// Sets the mode of mounts without one to that of the covered directory, and removes the option if there is nothing to copy.
/// `rootfs` is the root if it is a directory of the host, before mount points are created; `directory` is that of the
/// bundle.
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
        let has_mode_option = has_mode_option(&options);
        if has_mode_option && !has(mount, COPY_UP) {
            continue;
        }
        let covered = find(mount.destination(), earlier, directory, root.as_ref());
        let mode = match &covered {
            Covered::Nothing => memory_mode(None).ok(),
            // Only a directory can be mounted over; the guest reports the error.
            Covered::There(found) => memory_mode(Some(found)).ok(),
            Covered::Unknown => None,
        };
        options.extend(mode.filter(|_| !has_mode_option));
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

/// Adds a `/dev` in memory to a configuration that mounts nothing there. runc and crun create the devices in the root file
/// system then, which a guest can't do in a read-only one, nor where an earlier container has done so.
pub(super) fn add_dev(spec: &mut Spec) {
    const OPTIONS: [&str; 4] = ["nosuid", "strictatime", "mode=0755", "size=65536k"];
    let dev = Path::new("/dev");
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    if mounts.iter().any(|mount| mount.destination() == dev) {
        return;
    }
    let mut mount = Mount::default();
    mount
        .set_destination(dev.into())
        .set_typ(Some("tmpfs".into()))
        .set_source(Some("tmpfs".into()))
        .set_options(Some(OPTIONS.map(str::to_owned).into()));
    let within = mounts.iter().position(|m| m.destination().starts_with(dev));
    mounts.insert(within.unwrap_or(mounts.len()), mount);
    spec.set_mounts(Some(mounts));
}

/// The directory that a mount covers.
enum Covered {
    Nothing,
    There(OwnedFd),
    /// Known only in the guest.
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
        // It may contain a copy of the covered directory.
        (Some(mount), _) if has(mount, COPY_UP) => return Covered::Unknown,
        (Some(_), _) => return Covered::Nothing,
    };
    match found {
        Ok(found) => Covered::There(found),
        Err(Errno::NOENT) => Covered::Nothing,
        Err(_) => Covered::Unknown,
    }
}

/// Whether a directory is known to be empty.
fn is_empty(directory: &OwnedFd) -> bool {
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    let names = openat(directory, ".", flags, Mode::empty()).and_then(Dir::new);
    names.is_ok_and(|mut names| {
        names.all(|entry| {
            entry.is_ok_and(|entry| matches!(entry.file_name().to_bytes(), b"." | b".."))
        })
    })
}
