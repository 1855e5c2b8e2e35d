//! Volumes that the guest has itself: in memory, which containers of the sandbox share, and on disks, each
//! container's own mount.

use crate::state::check_id;
use anyhow::{Context, Result, bail};
use koya_protocol::messages::{DiskVolume, EphemeralVolume};
use koya_protocol::{EPHEMERAL_DIR, VOLUMES_DIR};
use rustix::fs::{Gid, Mode, Uid};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::ffi::CString;
use std::fs;
use std::path::{Component, Path};

/// Makes a volume, and its folder, as far as they are not there.
pub(crate) fn ensure(volume: &EphemeralVolume) -> Result<()> {
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
    let mut folder = root;
    for component in Path::new(&volume.folder).components() {
        let Component::Normal(name) = component else {
            bail!(
                "{:?} leads out of the volume {}",
                volume.folder,
                volume.name
            );
        };
        folder.push(name);
        // What containers put there is not followed.
        match fs::symlink_metadata(&folder) {
            Ok(found) if found.is_dir() => continue,
            Ok(_) => bail!("{} is no folder", folder.display()),
            Err(_) => {}
        }
        fs::create_dir(&folder).with_context(|| folder.display().to_string())?;
        let owner = (Uid::from_raw(volume.uid), Gid::from_raw(volume.gid));
        rustix::fs::chown(&folder, Some(owner.0), Some(owner.1))?;
        rustix::fs::chmod(&folder, Mode::from_raw_mode(volume.mode))?;
    }
    Ok(())
}

/// Mounts the file systems of a container's disks.
pub(crate) fn mount_disks(id: &str, volumes: &[DiskVolume]) -> Result<()> {
    for volume in volumes {
        let at = Path::new(VOLUMES_DIR)
            .join(id)
            .join(volume.number.to_string());
        fs::create_dir_all(&at)?;
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
    }
    Ok(())
}

/// As mount(8) knows them: flags, and what the file system knows itself.
fn options(all: &[String]) -> (MountFlags, String) {
    let mut flags = MountFlags::empty();
    let mut own = Vec::new();
    for option in all {
        match option.as_str() {
            "ro" => flags |= MountFlags::RDONLY,
            "nosuid" => flags |= MountFlags::NOSUID,
            "nodev" => flags |= MountFlags::NODEV,
            "noexec" => flags |= MountFlags::NOEXEC,
            "sync" => flags |= MountFlags::SYNCHRONOUS,
            "noatime" => flags |= MountFlags::NOATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            "rw" | "defaults" => {}
            other => own.push(other),
        }
    }
    (flags, own.join(","))
}

/// Takes them down: what was written is on the disks then.
pub(crate) fn unmount_disks(id: &str) -> Result<()> {
    let folder = Path::new(VOLUMES_DIR).join(id);
    for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
        let path = entry.path();
        // Where the mount failed there is none.
        unmount(&path, UnmountFlags::empty()).ok();
        fs::remove_dir(&path).with_context(|| format!("{} is in use", path.display()))?;
    }
    fs::remove_dir(&folder).ok();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_told_from_flags() {
        let all = ["rw", "noatime", "nosuid", "discard", "data=ordered"].map(String::from);
        let (flags, data) = options(&all);
        assert_eq!(flags, MountFlags::NOATIME | MountFlags::NOSUID);
        assert_eq!(data, "discard,data=ordered");
    }
}
