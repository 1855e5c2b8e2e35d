//! Mounts: paths of the host become shares, volumes in the guest's memory, or disks.

use super::devices::{device_number, guest_node};
use super::mount_options::{
    FLAGS, adapt_file_system, check_cgroup_options, make_symfollow_recursive,
};
use super::shares::{Share, guest_path};
use super::{namespaces, users};
use crate::Error;
use crate::block_volume::GuestVolume;
use crate::direct_volume;
use crate::ephemeral;
use koya_protocol::messages::EphemeralVolume;
use koya_protocol::{OWN_ROOT, SHARED_MEMORY_DIR, VOLUMES_DIR};
use koya_rootfs::says_read_only;
use koya_vmm::devices::fs::ShareOptions;
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use rustix::fs::StatVfsMountFlags;
use std::os::unix::fs::{FileTypeExt, MetadataExt as _};
use std::path::{Path, PathBuf};

/// Resources that a container's mounts need in the guest.
#[derive(Debug, Default)]
pub(super) struct Adapted {
    pub(super) shares: Vec<Share>,
    pub(super) volumes: Vec<EphemeralVolume>,
    /// Volumes with file systems that the guest mounts, by mount number.
    pub(super) direct: Vec<(u32, GuestVolume)>,
    /// Mount points, each with a flag for files (`None`: either).
    pub(super) points: Vec<(PathBuf, Option<bool>)>,
}

/// The resource that a mount in the guest needs.
enum MountSource {
    Nothing,
    /// A device of the guest.
    Device,
    Share(Share),
    Volume(EphemeralVolume),
    Direct(GuestVolume),
}

/// File system types that a guest mounts by itself.
const GUEST_MOUNTS: &[&str] = &[
    "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2",
];

/// Converts a configuration's mounts for the guest.
///
/// # Errors
/// The unsupported mount.
pub(super) fn adapt(id: &str, directory: &Path, spec: &mut Spec) -> Result<Adapted, Error> {
    // Paths given by a user are literal; the bundles of engines follow conventions.
    let is_literal = directory.as_os_str().is_empty();
    let shared_ipc = namespaces::is_joined(spec, LinuxNamespaceType::Ipc);
    let mut adapted = Adapted::default();
    let mut mounts = Vec::new();
    let is_mapped = namespaces::all(spec).any(|n| n.typ() == LinuxNamespaceType::User);
    for (number, wanted) in spec.mounts().iter().flatten().enumerate() {
        let mapped = users::of(spec, wanted)?;
        let (mut mount, mut source_kind) = match is_literal && is_bind(wanted) {
            true => adapt_bind(id, number, directory, wanted)?,
            false => adapt_mount(id, number, directory, wanted, shared_ipc)?,
        };
        if let MountSource::Share(share) = &source_kind {
            keep_flags(&share.path, wanted, &mut mount, is_mapped);
        }
        if let Some(mapped) = mapped {
            let MountSource::Share(share) = &mut source_kind else {
                let destination = mount.destination().display();
                let why = "id-mapped mounts are only supported for bind-mounts of the host's files";
                return Err(Error::unsupported(
                    "mounts",
                    format!("{destination}: {why}"),
                ));
            };
            share.users = Some(mapped);
            users::remove(&mut mount);
        }
        let is_file = match &source_kind {
            MountSource::Share(share) => !share.path.is_dir(),
            MountSource::Device => true,
            // "tmpfs" is not a path.
            _ => mount
                .source()
                .as_ref()
                .is_some_and(|path| path.is_absolute() && path.is_file()),
        };
        // The type of a source in the container's own root is known only in the guest.
        let source = mount.source().as_ref();
        let is_own = source.is_some_and(|source| source.starts_with(OWN_ROOT));
        let point = (mount.destination().clone(), (!is_own).then_some(is_file));
        adapted.points.push(point);
        mounts.push(mount);
        match source_kind {
            MountSource::Nothing | MountSource::Device => {}
            MountSource::Share(share) => adapted.shares.push(share),
            MountSource::Volume(volume) => adapted.volumes.push(volume),
            MountSource::Direct(volume) => adapted.direct.push((number as u32, volume)),
        }
    }
    if is_mapped {
        mounts.iter_mut().for_each(bind_sysfs);
    }
    mounts.iter_mut().for_each(make_symfollow_recursive);
    spec.set_mounts(Some(mounts));
    Ok(adapted)
}

/// Size of the in-memory file system with this path as its root, in bytes; `None` for any other path.
fn memory_behind(path: &Path) -> Option<u64> {
    let found = rustix::fs::statfs(path).ok()?;
    // Kubernetes and others mount it there themselves; a subdirectory of a host tmpfs is shared as a directory.
    let is_its_root =
        rustix::fs::stat(path).ok()?.st_dev != rustix::fs::stat(path.parent()?).ok()?.st_dev;
    (ephemeral::is_in_memory(&found) && is_its_root).then(|| found.f_blocks * found.f_bsize as u64)
}

/// Only the owner of the network namespace, which is the guest's, may mount a new sysfs: containers with a user namespace
/// get a bind mount of the guest's.
fn bind_sysfs(mount: &mut Mount) {
    if mount.typ().as_deref() == Some("sysfs") {
        mount.set_typ(Some("bind".into()));
        mount.set_source(Some("/sys".into()));
        let options = mount.options().clone().unwrap_or_default();
        let rbind = ["rbind".to_owned()].into_iter();
        mount.set_options(Some(rbind.chain(options).collect()));
    }
}

/// Converts a mount for the guest; returns it with the resource that it needs.
fn adapt_mount(
    id: &str,
    number: usize,
    directory: &Path,
    mount: &Mount,
    shared_ipc: bool,
) -> Result<(Mount, MountSource), Error> {
    refuse_options(directory, mount)?;
    let destination = mount.destination().display();
    if !is_bind(mount) {
        if let Some(volume) = GuestVolume::of(directory, mount)? {
            let flags = is_read_only(mount).then(|| "ro".to_owned());
            let flags = flags.into_iter().chain(["rbind".to_owned()]).collect();
            let mut adapted = mount.clone();
            adapted.set_typ(Some("bind".into()));
            adapted.set_source(Some(own_place(id, number)));
            adapted.set_options(Some(flags));
            return Ok((adapted, MountSource::Direct(volume)));
        }
        let kind = mount.typ().as_deref().unwrap_or_default();
        if GUEST_MOUNTS.contains(&kind) {
            if kind == "cgroup" || kind == "cgroup2" {
                check_cgroup_options(mount)?;
            }
            let mut adapted = mount.clone();
            // Without a device, a source is only a name; libcontainer wants one.
            let source = mount.source().as_ref();
            if source.is_none_or(|name| name.as_os_str().is_empty()) {
                adapted.set_source(Some(kind.into()));
            }
            adapt_file_system(&mut adapted);
            return Ok((adapted, MountSource::Nothing));
        }
        let reason = format!("{destination}: the guest mounts no {kind:?} by itself");
        return Err(Error::unsupported("mounts", reason));
    }
    let source = source_of(directory, mount)?;
    let mut adapted = mount.clone();
    if source.starts_with(OWN_ROOT) {
        return Ok((adapted, MountSource::Nothing));
    }
    // At any destination: a pod's own /dev/shm is often such a volume, with a size.
    if let Some(volume) = ephemeral::volume_for_source(&source, number as u32) {
        adapted.set_source(Some(own_place(id, number)));
        return Ok((adapted, MountSource::Volume(volume)));
    }
    // Shared memory is in the guest; containers that share IPC use the sandbox's.
    if mount.destination() == Path::new("/dev/shm")
        && let Some(bytes) = memory_behind(&source)
    {
        if shared_ipc {
            adapted.set_source(Some(SHARED_MEMORY_DIR.into()));
            return Ok((adapted, MountSource::Nothing));
        }
        adapted.set_typ(Some("tmpfs".into()));
        adapted.set_source(Some("shm".into()));
        let options = ["nosuid", "noexec", "nodev", "mode=1777"].map(String::from);
        let size = format!("size={bytes}");
        adapted.set_options(Some(options.into_iter().chain([size]).collect()));
        return Ok((adapted, MountSource::Nothing));
    }
    // Kernel file systems exist in the guest as well.
    let is_kernels = ["/proc", "/sys"].iter().any(|dir| source.starts_with(dir));
    if is_kernels || source == Path::new("/dev") {
        return Ok((adapted, MountSource::Nothing));
    }
    adapt_bind(id, number, directory, mount)
}

/// Refuses what libcontainer would ignore: options of crun for links.
fn refuse_options(directory: &Path, mount: &Mount) -> Result<(), Error> {
    let destination = mount.destination().display();
    // Without a link as the source, the first one means nothing.
    let is_link = || {
        let source = source_of(directory, mount);
        source.is_ok_and(|source| source.is_symlink())
    };
    let refused = ["src-nofollow", "dest-nofollow"];
    let mut found = refused.into_iter().filter(|option| has(mount, option));
    match found.find(|option| *option != "src-nofollow" || is_link()) {
        Some(option) => {
            let reason = format!("{destination}: the option {option} is not supported");
            Err(Error::unsupported("mounts", reason))
        }
        None => Ok(()),
    }
}

/// A mount of a container, as far as the host has it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct OnHost {
    /// Path in the container.
    pub(crate) at: PathBuf,
    /// The directory or file of the host; `None` if only the guest has what is mounted, or other owners for it.
    pub(crate) source: Option<PathBuf>,
    pub(crate) options: ShareOptions,
}

/// The mounts of a configuration, in their order. `directory` is that of the bundle.
///
/// # Errors
/// The unsupported mount.
pub(super) fn on_host(directory: &Path, spec: &Spec) -> Result<Vec<OnHost>, Error> {
    let mounts = spec.mounts().iter().flatten();
    let all = mounts.map(|mount| {
        let source_kind = match is_bind(mount) {
            true => adapt_mount("", 0, directory, mount, false)?.1,
            false => MountSource::Nothing,
        };
        let share = match source_kind {
            MountSource::Share(share) => Some(share),
            _ => None,
        };
        Ok(OnHost {
            at: mount.destination().clone(),
            options: share
                .as_ref()
                .map(|share| share.options)
                .unwrap_or_default(),
            source: share
                .filter(|share| share.users.is_none())
                .map(|share| share.path),
        })
    });
    all.collect()
}

/// Mount point in the guest of a volume that the guest mounts itself.
fn own_place(id: &str, number: usize) -> PathBuf {
    Path::new(VOLUMES_DIR).join(id).join(number.to_string())
}

pub(super) fn has(mount: &Mount, name: &str) -> bool {
    let mut options = mount.options().iter().flatten();
    options.any(|option| option == name)
}

pub(super) fn is_read_only(mount: &Mount) -> bool {
    says_read_only(mount.options().as_deref().unwrap_or_default())
}

/// Makes the destinations absolute and plain: they are compared with each other, and libcontainer does not create `/b` for
/// `/b/../c`.
pub(super) fn plain_places(spec: &mut Spec) {
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let place = koya_rootfs::plain(mount.destination());
        mount.set_destination(place);
    }
}

/// Where BuildKit mounts its socket for traces.
const TRACE_SOCKET: &str = "/dev/otel-grpc.sock";

/// Removes the mount of BuildKit's socket for traces. A socket of the host can't be used in a guest, and the steps of a build do
/// without this one.
pub(super) fn drop_trace_socket(spec: &mut Spec, directory: &Path) {
    let Some(mut mounts) = spec.mounts().clone() else {
        return;
    };
    mounts.retain(|mount| !is_trace_socket(mount, directory));
    spec.set_mounts(Some(mounts));
}

fn is_trace_socket(mount: &Mount, directory: &Path) -> bool {
    let found = || source_of(directory, mount).ok()?.metadata().ok();
    mount.destination() == Path::new(TRACE_SOCKET)
        && is_bind(mount)
        && found().is_some_and(|found| found.file_type().is_socket())
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

/// Linux's ST_NOSYMFOLLOW.
const NO_SYMLINKS: StatVfsMountFlags = StatVfsMountFlags::from_bits_retain(0x2000);

/// All flags of the mount that a file of the host is in, as options, except that for read-only access.
pub(super) fn flags_of(source: &Path) -> Vec<&'static str> {
    let found = rustix::fs::statvfs(source);
    found.map_or_else(
        |_| Vec::new(),
        |found| kept_flags(found.f_flag, &Mount::default(), false),
    )
}

/// Adds the flags to a bind mount that it keeps of its source's mount, as with runc.
fn keep_flags(source: &Path, wanted: &Mount, adapted: &mut Mount, is_mapped: bool) {
    let Ok(found) = rustix::fs::statvfs(source) else {
        return;
    };
    let kept = kept_flags(found.f_flag, wanted, is_mapped);
    if !kept.is_empty() {
        let options = adapted.options().clone().unwrap_or_default();
        let kept = kept.into_iter().map(String::from);
        adapted.set_options(Some(options.into_iter().chain(kept).collect()));
    }
}

/// All flags of its source, as with mount(8), if a bind mount has no options for flags, and otherwise those of access times
/// unless it has options for these. A container with mapped users keeps what it could not clear on the host, and can't have
/// other access times than the guest's mounts. A read-only source needs no flag.
fn kept_flags(found: StatVfsMountFlags, wanted: &Mount, is_mapped: bool) -> Vec<&'static str> {
    let has_any = |flags: &[&str]| flags.iter().any(|flag| has(wanted, flag));
    let is_plain = !has_any(&FLAGS);
    let access = !is_mapped && !has_any(&["noatime", "nodiratime", "relatime", "strictatime"]);
    let lasts = |cleared| is_plain || (is_mapped && !has_any(&[cleared]));
    let all = [
        (StatVfsMountFlags::NOSUID, "nosuid", lasts("suid")),
        (StatVfsMountFlags::NODEV, "nodev", lasts("dev")),
        (StatVfsMountFlags::NOEXEC, "noexec", lasts("exec")),
        (StatVfsMountFlags::NOATIME, "noatime", access),
        (StatVfsMountFlags::NODIRATIME, "nodiratime", access),
        (NO_SYMLINKS, "nosymfollow", is_plain),
    ];
    let kept = all.into_iter();
    let kept = kept.filter(|(flag, _, keeps)| *keeps && found.contains(*flag));
    kept.map(|(_, name, _)| name).collect()
}

/// Converts a bind mount: a directory or file of the host, or a path recorded for a block device.
fn adapt_bind(
    id: &str,
    number: usize,
    directory: &Path,
    mount: &Mount,
) -> Result<(Mount, MountSource), Error> {
    let source = source_of(directory, mount)?;
    let mut adapted = mount.clone();
    for option in ["shared", "rshared"] {
        if has(mount, option) {
            let destination = mount.destination().display();
            let reason =
                format!("{destination}: mounts of a guest can't reach the host ({option})");
            return Err(Error::unsupported("mounts", reason));
        }
    }
    if let Some(volume) = direct_volume::find(&source)? {
        adapted.set_source(Some(own_place(id, number)));
        return Ok((adapted, MountSource::Direct(GuestVolume::Device(volume))));
    }
    let wrong = |why: String| Error::unsupported("mounts", format!("{}: {why}", source.display()));
    let found = source.metadata();
    let found = found.map_err(Error::invalid_by("mounts", source.display().to_string()))?;
    if found.file_type().is_char_device()
        && let Some(node) = guest_node(device_number(found.rdev()))
    {
        adapted.set_source(Some(node.into()));
        return Ok((adapted, MountSource::Device));
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
            read_only: is_read_only(mount),
            follow_mounts: has(mount, "slave") || has(mount, "rslave"),
            omit_mounts: !has(mount, "rbind") && mount.typ().as_deref() != Some("rbind"),
        },
        users: None,
    };
    adapted.set_source(Some(guest_path(&share.name)));
    Ok((adapted, MountSource::Share(share)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::os::unix::fs::symlink;

    #[test]
    fn options_that_would_be_ignored_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        symlink("file", dir.path().join("link")).unwrap();
        let said = |source: &str, option: &str| {
            let mount = json!({"destination": "/x", "type": "bind", "source": source,
                "options": ["bind", option]});
            let mount = serde_json::from_value(mount).unwrap();
            let adapted = adapt_mount("c", 0, dir.path(), &mount, false);
            adapted.map_or_else(|error| error.to_string(), |_| String::new())
        };
        assert!(said("link", "src-nofollow").contains("src-nofollow"));
        assert_eq!(said("file", "src-nofollow"), "");
        assert!(said("file", "dest-nofollow").contains("dest-nofollow"));
        assert_eq!(said("link", "ro"), "");
    }

    #[test]
    fn the_socket_for_traces_of_a_build_is_left_out() {
        use std::os::unix::net::UnixListener;
        let dir = tempfile::tempdir().unwrap();
        let _listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let bind = |at: &str, source: &str| json!({"destination": at, "type": "bind", "source": source, "options": ["ro"]});
        let mounts = json!([
            bind("/dev/otel-grpc.sock", "socket"),
            bind("/dev/otel-grpc.sock", "file"),
            bind("/dev/other.sock", "socket"),
        ]);
        let spec = json!({"ociVersion": "1.2.0", "mounts": mounts});
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        drop_trace_socket(&mut spec, dir.path());
        let left = spec.mounts().iter().flatten();
        let left: Vec<_> = left.map(|mount| mount.destination().clone()).collect();
        let expected = ["/dev/otel-grpc.sock", "/dev/other.sock"];
        assert_eq!(left, expected.map(PathBuf::from));
    }

    #[test]
    fn a_bind_mount_keeps_flags_of_its_source() {
        use StatVfsMountFlags as F;
        let kept = |found: F, options: &[&str], is_mapped| {
            let mount = json!({"destination": "/x", "type": "bind", "options": options});
            kept_flags(found, &serde_json::from_value(mount).unwrap(), is_mapped).join(",")
        };
        let all = F::NOSUID | F::NODEV | F::NOATIME | NO_SYMLINKS;
        assert_eq!(
            kept(all, &["bind"], false),
            "nosuid,nodev,noatime,nosymfollow"
        );
        assert_eq!(kept(all, &["bind", "ro", "atime"], false), "noatime");
        assert_eq!(kept(all, &["bind", "relatime"], false), "");
        // The kernel lets no user namespace change access times of what it did not mount.
        assert_eq!(kept(all, &["bind"], true), "nosuid,nodev,nosymfollow");
        assert_eq!(kept(all, &["bind", "ro"], true), "nosuid,nodev");
        assert_eq!(kept(all, &["bind", "dev", "noatime"], true), "nosuid");
    }

    #[test]
    fn only_files_of_the_host_have_mapped_users() {
        let dir = tempfile::tempdir().unwrap();
        let adapted = |kind: &str, source: &str| {
            let mapping = json!([{"containerID": 0, "hostID": 1, "size": 2}]);
            let mut spec: Spec = serde_json::from_value(json!({
                "ociVersion": "1.2.0",
                "linux": {"uidMappings": mapping, "gidMappings": mapping},
                "mounts": [{"destination": "/x", "type": kind, "source": source, "options": ["ro", "ridmap"]}],
            }))
            .unwrap();
            let adapted = adapt("c", dir.path(), &mut spec).map_err(|error| error.to_string())?;
            let mount = spec.mounts().as_ref().unwrap()[0].clone();
            Ok::<_, String>((adapted, mount))
        };
        let (adapted_bind, mount) = adapted("bind", ".").unwrap();
        assert!(adapted_bind.shares[0].users.is_some());
        assert_eq!(mount.options(), &Some(vec!["ro".into()]));
        for (kind, source) in [("tmpfs", "tmpfs"), ("bind", "/proc")] {
            let said = adapted(kind, source).unwrap_err();
            assert!(said.contains("only supported for bind-mounts"), "{said}");
        }
    }
}
