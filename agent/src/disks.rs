//! Disks of the guest: attaching, detaching, and access of containers.

use crate::checks::check_id;
use crate::configuration;
use crate::device_rules;
use crate::places::bundle;
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

/// Directory of the driver for virtio-mmio slots.
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
/// Directory of its slots, among other devices.
pub(crate) const DEVICES: &str = "/sys/bus/platform/devices";

/// A running container.
pub(crate) struct Running<'a> {
    pub(crate) id: &'a str,
    /// Its first process.
    pub(crate) pid: i32,
}

/// The kernel's name of a slot.
fn window_name(window: u32) -> Result<String> {
    let entries = fs::read_dir(DEVICES).with_context(|| format!("no {DEVICES}"))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let name = named(window, names);
    name.ok_or_else(|| ErrorReason::NotFound(format!("the guest has no window {window}")).into())
}

/// The name of a slot, found in a list of all devices. With a command line, slots are numbered; with a device tree, they are
/// named by address, in the order of their numbers.
fn named(window: u32, devices: impl Iterator<Item = String>) -> Option<String> {
    let numbered = format!("virtio-mmio.{window}");
    let mut placed = Vec::new();
    for name in devices {
        if name == numbered {
            return Some(name);
        }
        if let Some(address) = name.strip_suffix(".virtio_mmio")
            && let Ok(address) = u64::from_str_radix(address, 16)
        {
            placed.push((address, name));
        }
    }
    placed.sort_unstable();
    let (_, name) = placed.into_iter().nth(usize::try_from(window).ok()?)?;
    Some(name)
}

fn device_directory(name: &str) -> PathBuf {
    Path::new(DEVICES).join(name)
}

/// The kernel's name of the disk in a slot.
fn disk_of(window: &str) -> Result<String> {
    let entries = |dir: PathBuf, prefix: &'static str| -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(&dir).with_context(|| format!("no {}", dir.display()))?;
        Ok(entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                let name = path.file_name().unwrap_or_default();
                name.to_string_lossy().starts_with(prefix)
            })
            .collect())
    };
    let virtio = entries(device_directory(window), "virtio")?;
    let virtio = virtio.first().context("the window has no device")?;
    let disks = entries(virtio.join("block"), "vd")?;
    let disk = disks.first().context("the device is no disk")?;
    let name = disk.file_name().context("the disk has no name")?;
    Ok(name.to_string_lossy().into_owned())
}

/// Makes the kernel probe a slot that was empty; returns the kernel's name of the slot.
pub(crate) fn probe(window: u32, what: &str) -> Result<String> {
    let name = window_name(window)?;
    fs::write(format!("{DRIVER}/bind"), &name)
        .with_context(|| format!("the kernel finds no {what} behind window {window}"))?;
    Ok(name)
}

/// Makes the kernel probe an empty slot, and returns the disk that it finds.
pub(crate) fn attach(window: u32) -> Result<String> {
    let name = probe(window, "disk")?;
    // The disk's own driver may have failed, which the slot's driver does not report.
    disk_of(&name).inspect_err(|_| {
        unbind(&name).ok();
    })
}

/// Makes the kernel release the disk in a slot. A disk in use stays; a missing one is not an error.
pub(crate) fn detach(window: u32) -> Result<()> {
    let window = window_name(window)?;
    if !device_directory(&window).join("driver").exists() {
        return Ok(());
    }
    if let Ok(name) = disk_of(&window) {
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
    unbind(&window)
}

/// Makes the kernel release the device in a slot, whatever it is. An empty slot is not an error.
pub(crate) fn release(window: u32) -> Result<()> {
    let window = window_name(window)?;
    match device_directory(&window).join("driver").exists() {
        true => unbind(&window),
        false => Ok(()),
    }
}

/// Makes the kernel release the device in the slot with this name.
pub(crate) fn unbind(window: &str) -> Result<()> {
    fs::write(format!("{DRIVER}/unbind"), window)
        .with_context(|| format!("the kernel does not let go of window {window}"))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_found_by_number_or_by_the_order_of_their_addresses() {
        let of = |window, names: &[&str]| named(window, names.iter().map(|name| (*name).into()));
        let numbered = ["serial8250", "virtio-mmio.1", "virtio-mmio.10"];
        assert_eq!(of(1, &numbered).as_deref(), Some("virtio-mmio.1"));
        assert_eq!(of(0, &numbered), None);
        let placed = [
            "9000000.serial",
            "100040000.virtio_mmio",
            "40001000.virtio_mmio",
            "40000000.virtio_mmio",
            "timer",
        ];
        assert_eq!(of(0, &placed).as_deref(), Some("40000000.virtio_mmio"));
        assert_eq!(of(2, &placed).as_deref(), Some("100040000.virtio_mmio"));
        assert_eq!(of(3, &placed), None);
    }
}
