//! Mounts within a container's root, as in runc: a destination may begin with the path of the root, and a source within the
//! root means the contents left there by earlier mounts.

use super::mounts::{has, is_bind, source_of};
use crate::Error;
use koya_protocol::OWN_ROOT;
use oci_spec::runtime::{Mount, Spec};
use std::path::{Path, PathBuf};

/// Options that the agent supports for such a mount.
const OPTIONS: &[&str] = &[
    "bind", "rbind", "ro", "rw", "private", "rprivate", "defaults",
];

/// Makes destinations relative to the root. `directory` is that of the bundle.
pub(super) fn make_relative(spec: &mut Spec, directory: &Path, rootfs: &Path) {
    let mounts = spec.mounts_mut().iter_mut().flatten();
    for mount in mounts.filter(|_| has_conventions(directory, rootfs)) {
        if let Some(within) = within(mount.destination(), rootfs) {
            mount.set_destination(within);
        }
    }
}

/// Whether paths follow the conventions of engines' bundles. Those given by a user are literal.
fn has_conventions(directory: &Path, rootfs: &Path) -> bool {
    !directory.as_os_str().is_empty() && rootfs != Path::new("/")
}

/// Marks sources that exist only in the guest, once destinations are relative to the root.
///
/// # Errors
/// The unsupported part of such a mount.
pub(super) fn adapt(spec: &mut Spec, directory: &Path, rootfs: &Path) -> Result<(), Error> {
    let Some(mut mounts) = spec.mounts().clone() else {
        return Ok(());
    };
    if !has_conventions(directory, rootfs) {
        return Ok(());
    }
    for index in 0..mounts.len() {
        let (earlier, later) = mounts.split_at_mut(index);
        let Some((mount, later)) = later.split_first_mut() else {
            break;
        };
        if !is_bind(mount) {
            continue;
        }
        let Some(source) = within(&source_of(directory, mount)?, rootfs) else {
            continue;
        };
        let concerns = |other: &Mount| {
            let at = other.destination();
            source.starts_with(at) || (has(mount, "rbind") && at.starts_with(&source))
        };
        if !earlier.iter().any(concerns) {
            continue;
        }
        check(mount, &source, later)?;
        let rest = source.strip_prefix("/").unwrap_or(&source);
        mount.set_source(Some(Path::new(OWN_ROOT).join(rest)));
    }
    spec.set_mounts(Some(mounts));
    Ok(())
}

fn within(path: &Path, rootfs: &Path) -> Option<PathBuf> {
    let rest = path.strip_prefix(rootfs).ok()?;
    Some(Path::new("/").join(rest))
}

/// Checks such a mount, which is made after all others.
fn check(mount: &Mount, source: &Path, later: &[Mount]) -> Result<(), Error> {
    let place = mount.destination().display();
    let refused = |what: String| {
        let reason = format!("{place}: {what} where the source is in the container's own root");
        Err(Error::unsupported("mounts", reason))
    };
    let mut options = mount.options().iter().flatten();
    if let Some(other) = options.find(|option| !OPTIONS.contains(&option.as_str())) {
        return refused(format!("the option {other} is not supported"));
    }
    let covers = |later: &&Mount| source.starts_with(later.destination());
    if let Some(later) = later.iter().find(covers) {
        let over = later.destination().display();
        return refused(format!("a later mount over it ({over}) is not supported"));
    }
    Ok(())
}
