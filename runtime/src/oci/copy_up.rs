//! `tmpcopyup`, runc's option of a tmpfs: it begins with a copy of the directory that it covers. podman asks for it
//! with each `--tmpfs`, mostly of a directory that is empty or not there, where it means nothing.

use super::refuse;
use crate::Error;
use koya_rootfs::Rootfs;
use oci_spec::runtime::Spec;
use rustix::fs::{Dir, Mode, OFlags, openat};
use rustix::io::Errno;
use std::path::Path;

const OPTION: &str = "tmpcopyup";

/// Takes the option out where there is nothing to copy. `rootfs` is the root, if it is a directory of the host.
///
/// # Errors
/// The directory has content, or what it has can't be known.
pub(super) fn adapt(spec: &mut Spec, rootfs: Option<&Path>) -> Result<(), Error> {
    let mut mounts = spec.mounts().clone();
    for mount in mounts.iter_mut().flatten() {
        let is_tmpfs = mount.typ().as_deref() == Some("tmpfs");
        let options = mount.options().clone().unwrap_or_default();
        if !is_tmpfs || !options.iter().any(|option| option == OPTION) {
            continue;
        }
        let place = mount.destination();
        if !rootfs.is_some_and(|rootfs| is_empty(rootfs, place)) {
            let place = place.display();
            let reason = format!("{place}: {OPTION} of a directory with content is not supported");
            return Err(refuse("mounts", reason));
        }
        let left = options.into_iter().filter(|option| option != OPTION);
        mount.set_options(Some(left.collect()));
    }
    spec.set_mounts(mounts);
    Ok(())
}

/// Whether there is nothing in a directory of the container, or no directory.
fn is_empty(rootfs: &Path, place: &Path) -> bool {
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    let names = Rootfs::open(rootfs)
        .and_then(|root| root.find(place))
        .and_then(|found| openat(found, ".", flags, Mode::empty()))
        .and_then(Dir::new);
    match names {
        Err(error) => error == Errno::NOENT,
        Ok(mut names) => names.all(|entry| {
            entry.is_ok_and(|entry| matches!(entry.file_name().to_bytes(), b"." | b".."))
        }),
    }
}
