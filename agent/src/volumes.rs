//! Volumes in the guest: in memory, shared by containers of the sandbox, and on disks, each mounted for one container.

mod group;

use crate::blocking::run_blocking;
use crate::checks::check_id;
use anyhow::{Context, Result, bail};
use koya_protocol::messages::{DiskVolume, EphemeralVolume, SharedVolume};
use koya_protocol::{EPHEMERAL_DIR, SHARED_DIR, SHARED_VOLUMES, VOLUMES_DIR};
use koya_rootfs::path_of;
use rustix::fs::{Gid, Mode, OFlags, ResolveFlags, Uid, openat2};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};
use std::ffi::{CString, OsStr};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};

const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Resolution of paths below the shared root.
const WITHIN: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

/// Serializes the creation of volumes, which may be shared by containers created at the same time.
static MAKING: Mutex<()> = Mutex::new(());

/// Creates the missing volumes of a container, and its mounts of them.
pub(crate) fn mount_all(id: &str, memory: &[EphemeralVolume], disks: &[DiskVolume]) -> Result<()> {
    for volume in memory {
        let directory = ensure(volume)?;
        let at = place(id, volume.number)?;
        // By its descriptor: containers that use the volume could replace the directory meanwhile.
        mount_bind(path_of(&directory), &at)
            .with_context(|| format!("cannot mount the volume {}", volume.name))?;
    }
    mount_disks(id, disks)
}

/// Makes a container's mounts of directories within shared ones. Links that another container creates meanwhile are not
/// followed.
pub(crate) fn mount_shared(id: &str, volumes: &[SharedVolume]) -> Result<()> {
    let root = rustix::fs::open(SHARED_DIR, DIRECTORY, Mode::empty())?;
    for volume in volumes {
        let path = OsStr::from_bytes(&volume.path);
        // The outer share may have been removed or moved: its own name remains valid.
        let found = open_within(&root, path).or_else(|_| open_within(&root, volume.name.as_ref()));
        let found = found.with_context(|| format!("cannot find the shared {path:?}"))?;
        let at = place(id, volume.number)?;
        mount_bind(path_of(&found), &at)
            .with_context(|| format!("cannot mount the shared {path:?}"))?;
    }
    Ok(())
}

fn open_within(root: impl AsFd, path: &OsStr) -> rustix::io::Result<OwnedFd> {
    openat2(root, path, DIRECTORY, Mode::empty(), WITHIN)
}

/// Creates the mount point of a container's volume.
fn place(id: &str, number: u32) -> Result<PathBuf> {
    let at = Path::new(VOLUMES_DIR).join(id).join(number.to_string());
    fs::create_dir_all(&at)?;
    Ok(at)
}

fn ensure(volume: &EphemeralVolume) -> Result<OwnedFd> {
    let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let root = Path::new(EPHEMERAL_DIR).join(check_id(&volume.name)?);
    if !root.exists() {
        fs::create_dir_all(&root)?;
        let options = format!(
            "size={},mode={:o},uid={},gid={}",
            volume.size_bytes, volume.mode, volume.uid, volume.gid
        );
        let mounted = mount(
            "tmpfs",
            &root,
            "tmpfs",
            MountFlags::NOSUID | MountFlags::NODEV,
            &*CString::new(options)?,
        );
        if let Err(error) = mounted {
            fs::remove_dir(&root).ok();
            bail!("cannot mount the volume {}: {error}", volume.name);
        }
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut directory = rustix::fs::open(&root, flags, Mode::empty())?;
    for component in Path::new(&volume.directory).components() {
        let Component::Normal(name) = component else {
            let whole = &volume.directory;
            bail!("{whole:?} leads out of the volume {}", volume.name);
        };
        match rustix::fs::mkdirat(&directory, name, Mode::RWXU) {
            Ok(()) => {
                let new = rustix::fs::openat(&directory, name, flags, Mode::empty())?;
                let owner = (Uid::from_raw(volume.uid), Gid::from_raw(volume.gid));
                rustix::fs::fchown(&new, Some(owner.0), Some(owner.1))?;
                rustix::fs::fchmod(&new, Mode::from_raw_mode(volume.mode))?;
            }
            Err(rustix::io::Errno::EXIST) => {}
            Err(error) => bail!(
                "{:?} of the volume {}: {error}",
                volume.directory,
                volume.name
            ),
        }
        // Links created by containers are not followed.
        let next = rustix::fs::openat(&directory, name, flags, Mode::empty());
        directory = next.with_context(|| format!("{:?} is no directory", volume.directory))?;
    }
    Ok(directory)
}

/// Mounts the file systems of a container's disks.
fn mount_disks(id: &str, volumes: &[DiskVolume]) -> Result<()> {
    for volume in volumes {
        let at = place(id, volume.number)?;
        let device = format!("/dev/{}", check_id(&volume.guest_name)?);
        let (flags, data) = options(&volume.options);
        let mounted = mount(&*device, &at, &*volume.fstype, flags, &*CString::new(data)?);
        mounted.with_context(|| {
            let kind = &volume.fstype;
            format!(
                "cannot mount the {kind} file system of {}",
                volume.guest_name
            )
        })?;
        if let Some(group) = volume.group
            && !flags.contains(MountFlags::RDONLY)
        {
            let given = group::give(&at, Gid::from_raw(group), volume.trust_root);
            given.with_context(|| format!("cannot set the group of {}", volume.guest_name))?;
        }
    }
    Ok(())
}

/// Mounts a tmpfs as a container's volume with this number; returns its path, and the options that apply to the container's
/// mount of it.
pub(crate) fn mount_memory(
    id: &str,
    number: u32,
    all: &[String],
) -> Result<(PathBuf, Vec<String>)> {
    let at = place(id, number)?;
    let parts = all.iter().flat_map(|all| all.split(','));
    let (left, own): (Vec<_>, Vec<_>) = parts
        .map(str::to_owned)
        .partition(|option| is_of_mount(option));
    let own = CString::new(own.join(","))?;
    mount("tmpfs", &at, "tmpfs", MountFlags::empty(), &*own)?;
    Ok((at, left))
}

/// Whether an option applies to a mount and not to the file system: a flag (possibly recursive), or propagation.
pub(crate) fn is_of_mount(option: &str) -> bool {
    const PROPAGATION: [&str; 4] = ["shared", "slave", "private", "unbindable"];
    let is_known =
        |option: &str| PROPAGATION.contains(&option) || options(&[option.to_owned()]).1.is_empty();
    is_known(option) || option.strip_prefix('r').is_some_and(is_known)
}

/// Splits options of mount(8) into flags and options of the file system.
fn options(all: &[String]) -> (MountFlags, String) {
    let mut flags = MountFlags::empty();
    let mut own = Vec::new();
    for option in all.iter().flat_map(|all| all.split(',')) {
        match option {
            "ro" => flags |= MountFlags::RDONLY,
            // The last one counts.
            "rw" => flags &= !MountFlags::RDONLY,
            "nosuid" => flags |= MountFlags::NOSUID,
            "nodev" => flags |= MountFlags::NODEV,
            "noexec" => flags |= MountFlags::NOEXEC,
            "sync" => flags |= MountFlags::SYNCHRONOUS,
            "dirsync" => flags |= MountFlags::DIRSYNC,
            "noatime" => flags |= MountFlags::NOATIME,
            "nodiratime" => flags |= MountFlags::NODIRATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            "strictatime" => flags |= MountFlags::STRICTATIME,
            "suid" | "dev" | "exec" | "async" | "atime" | "diratime" | "norelatime"
            | "defaults" | "" => {}
            // For the programs that read /etc/fstab.
            "_netdev" | "nofail" | "auto" | "noauto" | "user" | "nouser" => {}
            other => own.push(other),
        }
    }
    (flags, own.join(","))
}

/// Unmounts as many of a container's mounts as possible, which flushes the disks.
pub(crate) async fn unmount_aside(id: &str) -> Result<()> {
    let directory = Path::new(VOLUMES_DIR).join(id);
    // Most containers have none, and need no additional thread.
    if !directory.exists() {
        return Ok(());
    }
    run_blocking(move || unmount_all(&directory)).await
}

fn unmount_all(directory: &Path) -> Result<()> {
    let mut result = Ok(());
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        // A failed mount is missing. Data in a shared directory is already on the host.
        let flags = match mounted_is_shared(&path) {
            true => UnmountFlags::DETACH,
            false => UnmountFlags::empty(),
        };
        unmount(&path, flags).ok();
        let removed = fs::remove_dir(&path);
        result = result.and(removed.with_context(|| format!("{} is in use", path.display())));
    }
    fs::remove_dir(directory).ok();
    result
}

fn mounted_is_shared(path: &Path) -> bool {
    let number = path
        .file_name()
        .and_then(|name| name.to_str()?.parse().ok());
    number.is_some_and(|number: u32| number >= SHARED_VOLUMES)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Another container may replace a directory by a link.
    #[test]
    fn a_shared_directory_is_found_without_links() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("export/sub")).unwrap();
        let link = |to: &str, name: &str| {
            std::os::unix::fs::symlink(to, dir.path().join("export").join(name)).unwrap();
        };
        link("/", "absolute");
        link("sub", "beside");
        link("../..", "above");
        let root = rustix::fs::open(dir.path(), DIRECTORY, Mode::empty()).unwrap();
        assert!(open_within(&root, "export/sub".as_ref()).is_ok());
        for path in [
            "export/absolute",
            "export/beside",
            "export/above",
            "export/../..",
        ] {
            assert!(open_within(&root, path.as_ref()).is_err(), "{path}");
        }
    }

    #[test]
    fn options_are_told_from_flags() {
        let all = ["rw", "noatime,nosuid,_netdev", "discard", "data=ordered"].map(String::from);
        let (flags, data) = options(&all);
        assert_eq!(flags, MountFlags::NOATIME | MountFlags::NOSUID);
        assert_eq!(data, "discard,data=ordered");
        for of_mount in ["ro", "rro", "rprivate", "nosuid", "relatime", "slave"] {
            assert!(is_of_mount(of_mount), "{of_mount}");
        }
        for own in ["size=1k", "mode=755", "huge=never", "rubbish"] {
            assert!(!is_of_mount(own), "{own}");
        }
    }
}
