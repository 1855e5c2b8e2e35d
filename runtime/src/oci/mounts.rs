//! Mounts: paths of the host become shares, volumes that the guest has itself, or disks.

use super::devices::{device_number, guest_node};
use super::shares::{Share, guest_path};
use super::{namespaces, refuse};
use crate::Error;
use crate::block_volume::GuestVolume;
use crate::direct_volume;
use crate::ephemeral;
use koya_protocol::messages::EphemeralVolume;
use koya_protocol::{OWN_ROOT, SHARED_MEMORY_DIR, VOLUMES_DIR};
use koya_vmm::devices::fs::ShareOptions;
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use std::os::unix::fs::{FileTypeExt, MetadataExt as _};
use std::path::{Path, PathBuf};

/// What a container's mounts need in the guest.
#[derive(Debug, Default)]
pub(super) struct Adapted {
    pub(super) shares: Vec<Share>,
    pub(super) volumes: Vec<EphemeralVolume>,
    /// Disks whose file systems the guest is to mount, by the numbers of their mounts.
    pub(super) direct: Vec<(u32, GuestVolume)>,
    /// Where mounts go, each with whether that is a file.
    pub(super) points: Vec<(PathBuf, Option<bool>)>,
}

/// What a mount of the guest's needs.
enum Needs {
    Nothing,
    /// It is a device of the guest's own.
    Device,
    Share(Share),
    Volume(EphemeralVolume),
    Direct(GuestVolume),
}

/// File systems that a guest mounts by itself.
const GUEST_MOUNTS: &[&str] = &[
    "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2",
];

/// Makes a configuration's mounts the guest's.
///
/// # Errors
/// Which can't be had.
pub(super) fn adapt(id: &str, directory: &Path, spec: &mut Spec) -> Result<Adapted, Error> {
    // A user who names a path means that one; an engine's bundle has conventions.
    let is_literal = directory.as_os_str().is_empty();
    let shared_ipc = namespaces::is_joined(spec, LinuxNamespaceType::Ipc);
    let mut adapted = Adapted::default();
    let mut mounts = Vec::new();
    for (number, mount) in spec.mounts().iter().flatten().enumerate() {
        let (mount, needs) = match is_literal && is_bind(mount) {
            true => adapt_bind(id, number, directory, mount)?,
            false => adapt_mount(id, number, directory, mount, shared_ipc)?,
        };
        let is_file = match &needs {
            Needs::Share(share) => !share.path.is_dir(),
            Needs::Device => true,
            // "tmpfs" is no path.
            _ => mount
                .source()
                .as_ref()
                .is_some_and(|path| path.is_absolute() && path.is_file()),
        };
        // What is of the container's own root is known where that is.
        let source = mount.source().as_ref();
        let is_own = source.is_some_and(|source| source.starts_with(OWN_ROOT));
        let point = (mount.destination().clone(), (!is_own).then_some(is_file));
        adapted.points.push(point);
        mounts.push(mount);
        match needs {
            Needs::Nothing | Needs::Device => {}
            Needs::Share(share) => adapted.shares.push(share),
            Needs::Volume(volume) => adapted.volumes.push(volume),
            Needs::Direct(volume) => adapted.direct.push((number as u32, volume)),
        }
    }
    if namespaces::all(spec).any(|n| n.typ() == LinuxNamespaceType::User) {
        mounts.iter_mut().for_each(bind_sysfs);
    }
    spec.set_mounts(Some(mounts));
    Ok(adapted)
}

/// The size of the file system in memory that a path is on, in bytes; none if it is on another.
fn memory_behind(path: &Path) -> Option<u64> {
    let found = rustix::fs::statfs(path).ok()?;
    // Kubernetes and others mount it there themselves; a directory of the host in memory is a directory.
    let is_its_root =
        rustix::fs::stat(path).ok()?.st_dev != rustix::fs::stat(path.parent()?).ok()?.st_dev;
    (ephemeral::is_in_memory(&found) && is_its_root).then(|| found.f_blocks * found.f_bsize as u64)
}

/// sysfs may be mounted anew only by who owns the network namespace, which is the guest's: users of another
/// namespace get the guest's.
fn bind_sysfs(mount: &mut Mount) {
    if mount.typ().as_deref() == Some("sysfs") {
        mount.set_typ(Some("bind".into()));
        mount.set_source(Some("/sys".into()));
        let options = mount.options().clone().unwrap_or_default();
        let rbind = ["rbind".to_owned()].into_iter();
        mount.set_options(Some(rbind.chain(options).collect()));
    }
}

/// A mount as the guest makes it, and what must be shared for it.
fn adapt_mount(
    id: &str,
    number: usize,
    directory: &Path,
    mount: &Mount,
    shared_ipc: bool,
) -> Result<(Mount, Needs), Error> {
    let destination = mount.destination().display();
    if mount.uid_mappings().is_some() || mount.gid_mappings().is_some() {
        let reason = format!("{destination}: mounts with mapped users are not supported");
        return Err(refuse("mounts", reason));
    }
    if !is_bind(mount) {
        if let Some(volume) = GuestVolume::of(directory, mount)? {
            let options = mount.options().iter().flatten();
            let flags = options.filter(|option| *option == "ro" || *option == "rro");
            let flags = flags.cloned().chain(["rbind".to_owned()]).collect();
            let mut adapted = mount.clone();
            adapted.set_typ(Some("bind".into()));
            adapted.set_source(Some(own_place(id, number)));
            adapted.set_options(Some(flags));
            return Ok((adapted, Needs::Direct(volume)));
        }
        let kind = mount.typ().as_deref().unwrap_or_default();
        if GUEST_MOUNTS.contains(&kind) {
            return Ok((mount.clone(), Needs::Nothing));
        }
        let reason = format!("{destination}: the guest mounts no {kind:?} by itself");
        return Err(refuse("mounts", reason));
    }
    let source = source_of(directory, mount)?;
    let mut adapted = mount.clone();
    if source.starts_with(OWN_ROOT) {
        return Ok((adapted, Needs::Nothing));
    }
    // Wherever it goes: a pod's own /dev/shm is often such a volume, with a size.
    if let Some(volume) = ephemeral::behind(&source, number as u32) {
        adapted.set_source(Some(own_place(id, number)));
        return Ok((adapted, Needs::Volume(volume)));
    }
    // Memory that processes share is the guest's: the sandbox's, where containers share ipc.
    if mount.destination() == Path::new("/dev/shm")
        && let Some(bytes) = memory_behind(&source)
    {
        if shared_ipc {
            adapted.set_source(Some(SHARED_MEMORY_DIR.into()));
            return Ok((adapted, Needs::Nothing));
        }
        adapted.set_typ(Some("tmpfs".into()));
        adapted.set_source(Some("shm".into()));
        let options = ["nosuid", "noexec", "nodev", "mode=1777"].map(String::from);
        let size = format!("size={bytes}");
        adapted.set_options(Some(options.into_iter().chain([size]).collect()));
        return Ok((adapted, Needs::Nothing));
    }
    // What the host's kernel makes up, the guest's does too.
    let is_kernels = ["/proc", "/sys"].iter().any(|dir| source.starts_with(dir));
    if is_kernels || source == Path::new("/dev") {
        return Ok((adapted, Needs::Nothing));
    }
    adapt_bind(id, number, directory, mount)
}

/// Where the guest has what it mounts itself.
fn own_place(id: &str, number: usize) -> PathBuf {
    Path::new(VOLUMES_DIR).join(id).join(number.to_string())
}

pub(super) fn has(mount: &Mount, name: &str) -> bool {
    let mut options = mount.options().iter().flatten();
    options.any(|option| option == name)
}

pub(super) fn is_bind(mount: &Mount) -> bool {
    matches!(mount.typ().as_deref(), Some("bind" | "rbind"))
        || has(mount, "bind")
        || has(mount, "rbind")
}

pub(super) fn source_of(directory: &Path, mount: &Mount) -> Result<PathBuf, Error> {
    let source = mount.source().as_ref().ok_or_else(|| {
        let destination = mount.destination().display();
        Error::invalid("mounts", format!("{destination}: no source"))
    })?;
    Ok(directory.join(source))
}

/// A directory or a file of the host, or what stands for a block device.
fn adapt_bind(
    id: &str,
    number: usize,
    directory: &Path,
    mount: &Mount,
) -> Result<(Mount, Needs), Error> {
    let source = source_of(directory, mount)?;
    let mut adapted = mount.clone();
    for option in ["shared", "rshared"] {
        if has(mount, option) {
            let destination = mount.destination().display();
            let reason =
                format!("{destination}: mounts of a guest can't reach the host ({option})");
            return Err(refuse("mounts", reason));
        }
    }
    if let Some(volume) = direct_volume::find(&source)? {
        adapted.set_source(Some(own_place(id, number)));
        return Ok((adapted, Needs::Direct(GuestVolume::Device(volume))));
    }
    let wrong = |why: String| refuse("mounts", format!("{}: {why}", source.display()));
    let found = source.metadata();
    let found = found.map_err(Error::invalid_by("mounts", source.display().to_string()))?;
    if found.file_type().is_char_device()
        && let Some(node) = guest_node(device_number(found.rdev()))
    {
        adapted.set_source(Some(node.into()));
        return Ok((adapted, Needs::Device));
    }
    if !found.is_dir() && !found.is_file() {
        let what = match found.file_type() {
            kind if kind.is_socket() => "a socket of the host's can't be used in a guest",
            kind if kind.is_fifo() => "a FIFO of the host's can't be used in a guest",
            _ => "it is a device of the host, which a guest does not have",
        };
        return Err(wrong(what.into()));
    }
    let share = Share {
        name: format!("{id}.mount{number}"),
        path: source,
        options: ShareOptions {
            read_only: has(mount, "ro") || has(mount, "rro"),
            follow_mounts: has(mount, "slave") || has(mount, "rslave"),
        },
    };
    adapted.set_source(Some(guest_path(&share.name)));
    Ok((adapted, Needs::Share(share)))
}
