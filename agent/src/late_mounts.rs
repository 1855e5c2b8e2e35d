//! Bind mounts that are made after libcontainer has populated the container's `/dev`: a whole `/dev`, and files over its
//! default nodes. libcontainer creates nodes and links in `/dev` after all mounts, and fails if a name is taken; runc leaves
//! such a `/dev` as it is. Also mounts whose source is within another mount in the container's own root: links in it must
//! not lead out of it. A hook makes these mounts in the container's mount namespace.

use crate::configuration::{self, is_bind, is_read_only};
use crate::places;
use anyhow::{Context, Result};
use koya_protocol::OWN_ROOT;
use koya_rootfs::{Kind, Rootfs, make_read_only, path_of};
use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{FileType, fstat};
use rustix::mount::{
    MoveMountFlags, OpenTreeFlags, mount_bind, mount_bind_recursive, move_mount, open_tree,
};
use serde::{Deserialize, Serialize};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// The nodes and links that libcontainer creates in each `/dev`.
const MADE: &[&str] = &[
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/tty",
    "/dev/random",
    "/dev/urandom",
    "/dev/ptmx",
    "/dev/fd",
    "/dev/stdin",
    "/dev/stdout",
    "/dev/stderr",
    "/dev/kcore",
];

/// A late mount.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Late {
    source: PathBuf,
    at: PathBuf,
    read_only: bool,
    /// Whether the source is a path in the container's root.
    is_own: bool,
    is_recursive: bool,
    /// Mounts below it that follow in the configuration, and have already been made.
    above: Vec<PathBuf>,
}

/// Removes late mounts from a configuration, and adds a hook that makes them. A node that is covered by a mount is not
/// created.
pub(crate) fn take(spec: &mut Spec) -> Result<()> {
    let Some(all) = spec.mounts_mut().take() else {
        return Ok(());
    };
    let comes_late = |mount: &Mount| {
        let at = mount.destination();
        let is_made = || MADE.iter().any(|made| at == Path::new(made));
        is_bind(mount) && (at == Path::new("/dev") || is_made() || own_source(mount).is_some())
    };
    let mut late = Vec::new();
    let numbered = all.iter().enumerate();
    for (index, mount) in numbered.filter(|(_, mount)| comes_late(mount)) {
        let at = mount.destination();
        let own = own_source(mount);
        let is_whole = at == Path::new("/dev") || own.is_some();
        let mut options = mount.options().iter().flatten();
        // Those that are late mounts themselves are made after it.
        let below =
            |other: &&Mount| is_whole && other.destination().starts_with(at) && !comes_late(other);
        let above = all[index + 1..].iter().filter(below);
        late.push(Late {
            source: match own {
                Some(path) => path.to_owned(),
                None => mount
                    .source()
                    .clone()
                    .context("a bind mount has no source")?,
            },
            is_own: own.is_some(),
            is_recursive: own.is_none() || options.any(|option| option == "rbind"),
            at: at.clone(),
            read_only: is_read_only(mount),
            above: above.map(|other| other.destination().clone()).collect(),
        });
    }
    let linux = spec.linux_mut().as_mut();
    if let Some(devices) = linux.and_then(|linux| linux.devices_mut().as_mut()) {
        let covers = |mount: &Mount, path: &Path| is_bind(mount) && mount.destination() == path;
        devices.retain(|device| !all.iter().any(|mount| covers(mount, device.path())));
    }
    let kept = all
        .into_iter()
        .filter_map(|mount| match comes_late(&mount) {
            false => Some(mount),
            // The nodes of libcontainer are then created in the covered directory.
            true => (mount.destination() == Path::new("/dev")).then(empty_dev),
        });
    let kept: Vec<Mount> = kept.collect();
    let has_read_only_dev = kept
        .iter()
        .any(|mount| mount.destination() == Path::new("/dev") && is_read_only(mount));
    spec.set_mounts(Some(kept));
    let root = root_of(spec);
    if !late.is_empty() {
        let text = serde_json::to_string(&late)?;
        configuration::add_hook(spec, &[places::LATE_MOUNTS, &root, &text]);
    }
    // libcontainer leaves it writable, since it creates nodes there.
    if has_read_only_dev {
        let process = spec.process().as_ref();
        let terminal = process.and_then(|process| process.terminal());
        let terminal = terminal.unwrap_or_default().to_string();
        configuration::add_hook(spec, &[places::READ_ONLY_DEV, &root, &terminal]);
    }
    Ok(())
}

/// Makes a container's `/dev` read-only, after everything in it has been created.
pub(crate) fn make_dev_read_only(root: &str, terminal: &str) -> Result<()> {
    let root = Rootfs::open(Path::new(root))?;
    let find = |path: &str| -> Result<(OwnedFd, PathBuf)> {
        let found = root.find(Path::new(path))?;
        let path = path_of(&found);
        Ok((found, path))
    };
    if terminal == "true" {
        // libcontainer opens it for writing, and mounts the terminal on it; existing special files can still be opened.
        root.make(Path::new("/dev/console"), Kind::File)?;
        let (null, console) = (find("/dev/null")?, find("/dev/console")?);
        mount_bind(&null.1, &console.1)?;
    }
    Ok(make_read_only(&find("/dev")?.0)?)
}

fn root_of(spec: &Spec) -> String {
    let root = spec.root().as_ref();
    root.map_or_else(String::new, |root| {
        root.path().to_string_lossy().into_owned()
    })
}

fn empty_dev() -> Mount {
    let mut mount = Mount::default();
    mount.set_destination("/dev".into());
    mount.set_typ(Some("tmpfs".into()));
    mount.set_source(Some("tmpfs".into()));
    mount.set_options(Some(
        ["nosuid", "mode=755", "size=64k"].map(String::from).into(),
    ));
    mount
}

/// Makes late mounts in the root of a container, which is not trusted: links cannot lead out of it.
pub(crate) fn mount_all(root: &str, late: &str) -> Result<()> {
    let late: Vec<Late> = serde_json::from_str(late)?;
    let root = Rootfs::open(Path::new(root))?;
    for mount in late {
        let at = &mount.at;
        make(&root, &mount).with_context(|| format!("cannot mount {}", at.display()))?;
    }
    Ok(())
}

fn make(root: &Rootfs, late: &Late) -> Result<()> {
    let tree = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    let mut above = Vec::new();
    for path in &late.above {
        above.push((path, open_tree(root.find(path)?, "", tree)?));
    }
    let place = || -> Result<(OwnedFd, PathBuf)> {
        let found = root.find(&late.at)?;
        let path = path_of(&found);
        Ok((found, path))
    };
    let own = match late.is_own {
        true => Some(root.find(&late.source)?),
        false => None,
    };
    let source = match &own {
        Some(own) => {
            let kind = match is_directory(own)? {
                true => Kind::Directory,
                false => Kind::File,
            };
            root.make(&late.at, kind)?;
            path_of(own)
        }
        None => late.source.clone(),
    };
    match late.is_recursive {
        true => mount_bind_recursive(&source, place()?.1.as_path())?,
        false => mount_bind(&source, place()?.1.as_path())?,
    }
    if late.read_only {
        make_read_only(&place()?.0)?;
    }
    for (path, mounted) in above {
        // The new mount may lack the mount point, and must not be changed to add it.
        let Ok(onto) = root.find(path) else { continue };
        if is_directory(&onto)? == is_directory(&mounted)? {
            let flags =
                MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
            move_mount(&mounted, "", &onto, "", flags)?;
        }
    }
    Ok(())
}

fn is_directory(fd: &OwnedFd) -> rustix::io::Result<bool> {
    fstat(fd).map(|found| FileType::from_raw_mode(found.st_mode) == FileType::Directory)
}

/// The path in the container's root that a mount's source refers to, if any.
fn own_source(mount: &Mount) -> Option<&Path> {
    let path = mount.source().as_ref()?.strip_prefix(OWN_ROOT).ok()?;
    Some(match path.as_os_str().is_empty() {
        true => Path::new("."),
        false => path,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_covers_dev_or_its_nodes_comes_late() {
        let spec = serde_json::json!({
            "ociVersion": "1.2.0", "root": {"path": "/r"},
            "mounts": [
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/dev", "type": "bind", "source": "/host", "options": ["rbind", "ro"]},
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
                {"destination": "/dev/null", "type": "bind", "source": "/file"},
                {"destination": "/dev/net/tun", "type": "bind", "source": "/dev/net/tun"},
                {"destination": "/etc/hosts", "type": "bind", "source": "/hosts"},
                {"destination": "/own", "source": "/run/koya/own-root/a/b", "options": ["bind"]},
            ],
            "linux": {"devices": [
                {"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200},
                {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
            ]},
        });
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        take(&mut spec).unwrap();
        let all = serde_json::to_value(&spec).unwrap();
        let mounts = all["mounts"].as_array().unwrap();
        let kept: Vec<_> = mounts
            .iter()
            .map(|m| m["destination"].as_str().unwrap())
            .collect();
        let wanted = ["/dev", "/dev", "/dev/shm", "/dev/net/tun", "/etc/hosts"];
        assert_eq!(kept, wanted);
        assert_eq!(mounts[1]["type"], "tmpfs");
        let devices = all["linux"]["devices"].as_array().unwrap();
        assert!(
            devices.len() == 1 && devices[0]["path"] == "/dev/fuse",
            "{devices:?}"
        );
        let args = &all["hooks"]["createContainer"][0]["args"];
        assert_eq!(
            (&args[2], &args[3]),
            (&places::LATE_MOUNTS.into(), &"/r".into())
        );
        let late: Vec<Late> = serde_json::from_str(args[4].as_str().unwrap()).unwrap();
        assert_eq!(late.len(), 3);
        assert!(late[2].is_own && !late[2].is_recursive);
        assert_eq!(late[2].source, Path::new("a/b"));
        assert!(late[0].read_only && !late[1].read_only);
        let above = ["/dev/shm", "/dev/net/tun"].map(PathBuf::from);
        assert_eq!(late[0].above, above);
        assert_eq!(late[1].at, Path::new("/dev/null"));
    }
}
