//! Disks of the guest: attaching, detaching, and access of containers.

use crate::checks::check_id;
use crate::configuration;
use crate::device_rules;
use crate::places::bundle;
use crate::slots;
use anyhow::{Context, Result, bail};
use koya_protocol::ErrorReason;
use koya_protocol::messages::BlockDevice;
use oci_spec::runtime::{LinuxDevice, Spec};
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, chmodat, makedev, mknodat, openat2, unlinkat,
};
use rustix::io::Errno;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// A running container.
pub(crate) struct Running<'a> {
    pub(crate) id: &'a str,
    /// Its first process.
    pub(crate) pid: i32,
}

/// The kernel's name of the disk in a slot.
fn disk_of(slot: &str) -> Result<String> {
    let disks = slots::device(slot)?.join("block");
    let disk = slots::first_entry(&disks, "vd")?.context("the device is no disk")?;
    let name = disk.file_name().context("the disk has no name")?;
    Ok(name.to_string_lossy().into_owned())
}

/// Makes the kernel probe an empty slot, and returns the disk that it finds.
pub(crate) fn attach(slot: u32) -> Result<String> {
    let slot = slots::probe(slot, "disk")?;
    // The disk's own driver may have failed, which the slot's driver does not report.
    disk_of(&slot).inspect_err(|_| {
        slots::unbind(&slot).ok();
    })
}

/// Makes the kernel release the disk in a slot. A disk in use stays; a missing one is not an error.
pub(crate) fn detach(slot: u32) -> Result<()> {
    let slot = slots::name(slot)?;
    if !slots::is_bound(&slot) {
        return Ok(());
    }
    if let Ok(name) = disk_of(&slot) {
        // Refused while it is mounted, or part of something that is. Unwritten data is flushed first.
        let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
        let disk =
            rustix::fs::open(format!("/dev/{name}"), flags, Mode::empty()).map_err(|error| {
                match error {
                    Errno::BUSY => {
                        ErrorReason::InUse(format!("{name} is in use in the guest")).into()
                    }
                    error => anyhow::Error::from(error).context(format!("cannot open {name}")),
                }
            })?;
        rustix::fs::fsync(&disk).with_context(|| format!("cannot write out {name}"))?;
    }
    slots::unbind(&slot)
}

/// The kernel's device number of a disk.
pub(crate) fn number(device: &BlockDevice) -> Result<(i64, i64)> {
    let name = check_id(&device.guest_name)?;
    let number = fs::read_to_string(format!("/sys/class/block/{name}/dev"))
        .map_err(|_| ErrorReason::NotFound(format!("the guest has no disk {name}")))?;
    let (major, minor) = number.trim().split_once(':').context("no device number")?;
    Ok((major.parse()?, minor.parse()?))
}

/// Adds a disk to a running container, completely or not at all.
pub(crate) fn add_device(to: &Running<'_>, device: &BlockDevice) -> Result<()> {
    let path = config(to);
    let mut spec = Spec::load(&path)?;
    let (major, minor) = number(device)?;
    let nodes = spec.linux().as_ref().and_then(|l| l.devices().clone());
    let mut nodes = nodes.into_iter().flatten();
    if nodes.any(|node| (node.major(), node.minor()) == (major, minor)) {
        let reason = format!("the container has {} already", device.guest_name);
        bail!(ErrorReason::AlreadyExists(reason));
    }
    let (dir, name) = place(to, device)?;
    // The node first: without the rule it opens nothing, and a container that put something else in its place does not get
    // the rule.
    let mode = Mode::from_raw_mode(0o660);
    let node = makedev(u32::try_from(major)?, u32::try_from(minor)?);
    mknodat(&dir, &name, FileType::BlockDevice, mode, node)
        .with_context(|| format!("cannot make {} in the container", device.path))?;
    let given = chmodat(&dir, &name, mode, AtFlags::empty())
        .map_err(anyhow::Error::from)
        .and_then(|()| configuration::add_disk(&mut spec, device))
        .and_then(|()| save(&spec, &path))
        .and_then(|()| device_rules::apply(to.id, &spec));
    if given.is_err() {
        unlinkat(&dir, &name, AtFlags::empty()).ok();
    }
    given
}

/// Removes a disk from a running container. Processes that have it open keep it.
pub(crate) fn remove_device(from: &Running<'_>, device: &BlockDevice) -> Result<()> {
    let path = config(from);
    let mut spec = Spec::load(&path)?;
    let place_of_it = Path::new(&device.path);
    // The disk itself may be gone already: its number is in the configuration.
    configuration::change_devices(&mut spec, |nodes, rules| {
        let number = |node: &LinuxDevice| (Some(node.major()), Some(node.minor()));
        let gone = nodes.iter().find(|node| node.path() == place_of_it);
        let gone = gone.map(number);
        nodes.retain(|node| node.path() != place_of_it);
        // Another node of the same disk keeps its rule.
        if !nodes.iter().any(|node| Some(number(node)) == gone) {
            rules.retain(|rule| Some((rule.major(), rule.minor())) != gone);
        }
    })?;
    save(&spec, &path)?;
    device_rules::apply(from.id, &spec)?;
    // Errors in the container's own tree are ignored: the node is useless without the rule.
    if let Ok((dir, name)) = place(from, device) {
        unlinkat(dir, name, AtFlags::empty()).ok();
    }
    Ok(())
}

fn config(container: &Running<'_>) -> PathBuf {
    bundle(container.id).join("config.json")
}

/// Replaces a configuration atomically: others may read it meanwhile, and there may be no space.
fn save(spec: &Spec, path: &Path) -> Result<()> {
    let new = path.with_extension("new");
    spec.save(&new)?;
    Ok(fs::rename(&new, path)?)
}

/// The directory of a device in the container, and its name there. The container may have replaced any component by a link,
/// which is resolved inside the container's root.
fn place(container: &Running<'_>, device: &BlockDevice) -> Result<(OwnedFd, PathBuf)> {
    let path = Path::new(&device.path);
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        bail!(ErrorReason::Invalid(format!(
            "{} is no place for a device",
            device.path
        )));
    };
    let root = rustix::fs::open(
        format!("/proc/{}/root", container.pid),
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = openat2(root, dir, flags, Mode::empty(), ResolveFlags::IN_ROOT)
        .with_context(|| format!("the container has no {}", dir.display()))?;
    Ok((dir, name.into()))
}
