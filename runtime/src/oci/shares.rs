//! Host paths in a configuration, until their paths in the guest are known.

use koya_protocol::SHARED_DIR;
use koya_rootfs::says_read_only;
use koya_vmm::devices::fs::{MappedUsers, ShareOptions};
use oci_spec::runtime::Spec;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// A host path to be shared with the guest. The name is a placeholder in the configuration until the path is shared
/// ([`place_shares`]).
#[derive(Clone, Debug)]
pub(crate) struct Share {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) options: ShareOptions,
    /// Other owners than on the host.
    pub(crate) users: Option<MappedUsers>,
}

/// Path in the guest of this path in the shared root.
pub(crate) fn guest_path(path: impl AsRef<Path>) -> PathBuf {
    Path::new(SHARED_DIR).join(path)
}

/// Path of a share in the guest, and whether it must be mounted read-only there.
pub(crate) struct SharedPlace {
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
}

/// Replaces the placeholder of each share in a configuration by its path in the guest.
pub(crate) fn place_shares(spec: &mut Spec, places: &HashMap<String, SharedPlace>) {
    let place = |path: &Path| {
        let name = path.strip_prefix(SHARED_DIR).ok()?.to_str()?;
        places.get(name)
    };
    if let Some(root) = spec.root_mut()
        && let Some(place) = place(root.path())
    {
        root.set_path(place.path.clone());
        if place.read_only {
            root.set_readonly(Some(true));
        }
    }
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let Some(place) = mount.source().as_deref().and_then(place) else {
            continue;
        };
        mount.set_source(Some(place.path.clone()));
        let mut options = mount.options().clone().unwrap_or_default();
        if place.read_only && !says_read_only(&options) {
            options.retain(|option| option != "rw" && option != "rrw");
            options.push("ro".into());
            mount.set_options(Some(options));
        }
    }
}

pub(crate) fn root_share(id: &str) -> String {
    format!("{id}.root")
}
