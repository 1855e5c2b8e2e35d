//! Volumes in memory, which containers of the sandbox share.

use crate::state::check_id;
use anyhow::{Context, Result, bail};
use koya_protocol::EPHEMERAL_DIR;
use koya_protocol::messages::EphemeralVolume;
use rustix::fs::{Gid, Mode, Uid};
use rustix::mount::{MountFlags, mount};
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
