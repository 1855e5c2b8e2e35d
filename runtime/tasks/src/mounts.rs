//! Mounts of a container's root file system, as provided by snapshotters.

use anyhow::{Context, Result, bail};
use rustix::mount::{
    MountFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive, mount_remount, unmount,
};
use std::ffi::CString;
use std::fs;
use std::path::Path;

/// Maximum length of mount options: a page, with the terminator.
const MAX_DATA: usize = 4095;

/// A mount of a root file system, in containerd's form.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    /// File system type, or `bind`.
    pub kind: String,
    /// Source of the mount.
    pub source: String,
    /// Target below the root file system; usually empty.
    pub target: String,
    /// Options of mount(8).
    pub options: Vec<String>,
}

/// Options for mount(2): flags, and the rest for the file system.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    flags: MountFlags,
    bind: Option<bool>,
    data: String,
}

impl Options {
    fn parse(options: &[String]) -> Self {
        let mut flags = MountFlags::empty();
        let (mut bind, mut data) = (None, Vec::new());
        for option in options {
            match option.as_str() {
                "bind" => bind = Some(false),
                "rbind" => bind = Some(true),
                "ro" => flags |= MountFlags::RDONLY,
                "rw" => flags -= MountFlags::RDONLY,
                "nosuid" => flags |= MountFlags::NOSUID,
                "nodev" => flags |= MountFlags::NODEV,
                "noexec" => flags |= MountFlags::NOEXEC,
                "noatime" => flags |= MountFlags::NOATIME,
                "nodiratime" => flags |= MountFlags::NODIRATIME,
                "relatime" => flags |= MountFlags::RELATIME,
                "sync" => flags |= MountFlags::SYNCHRONOUS,
                "defaults" | "suid" | "dev" | "exec" | "async" | "" => {}
                other => data.push(other),
            }
        }
        let data = data.join(",");
        Self { flags, bind, data }
    }
}

/// Mounts all of them, in order, at `target`. If one fails, the others are unmounted again.
pub(crate) fn mount_all(mounts: &[Mount], target: &Path) -> Result<()> {
    fs::create_dir_all(target).with_context(|| format!("cannot make {}", target.display()))?;
    for (index, wanted) in mounts.iter().enumerate() {
        let at = target.join(wanted.target.trim_start_matches('/'));
        let mounted = mount_one(wanted, &at).with_context(|| {
            format!(
                "cannot mount {} ({}) at {}",
                wanted.source,
                wanted.kind,
                at.display()
            )
        });
        if mounted.is_err() {
            (0..index).for_each(|_| unmount_all(target));
            return mounted;
        }
    }
    Ok(())
}

/// Mounts one of them at `at`.
pub(crate) fn mount_one(wanted: &Mount, at: &Path) -> Result<()> {
    let options = Options::parse(&wanted.options);
    let is_bind = options.bind.is_some() || wanted.kind == "bind" || wanted.kind == "rbind";
    if is_bind {
        match options.bind {
            Some(false) => mount_bind(&wanted.source, at)?,
            _ => mount_bind_recursive(&wanted.source, at)?,
        }
        if !options.flags.is_empty()
            && let Err(error) = mount_remount(at, options.flags | MountFlags::BIND, c"")
        {
            unmount_all(at);
            return Err(error.into());
        }
        return Ok(());
    }
    if options.data.len() > MAX_DATA {
        bail!(
            "its {} bytes of options are more than mount(2) takes",
            options.data.len()
        );
    }
    let data = CString::new(options.data)?;
    Ok(mount(
        &wanted.source,
        at,
        &wanted.kind,
        options.flags,
        data.as_c_str(),
    )?)
}

/// Unmounts one mount lazily, even if it is in use.
pub(crate) fn unmount_all(target: &Path) {
    if let Err(error) = unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        log::debug!("cannot unmount {}: {error}", target.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_flags_or_the_file_systems() {
        let words = ["ro", "index=off", "lowerdir=/a:/b", "nosuid"].map(String::from);
        let options = Options::parse(&words);
        assert_eq!(options.flags, MountFlags::RDONLY | MountFlags::NOSUID);
        assert_eq!(options.data, "index=off,lowerdir=/a:/b");
        assert_eq!(options.bind, None);
        let words = ["rbind", "rw"].map(String::from);
        assert_eq!(Options::parse(&words).bind, Some(true));
    }
}
