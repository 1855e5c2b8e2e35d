//! The guest's disks: those that come and go, and who may use them.

use crate::configuration;
use crate::device_rules;
use crate::helper::bundle;
use crate::state::check_id;
use anyhow::{Context, Result, bail};
use koya_protocol::Refused;
use koya_protocol::messages::BlockDevice;
use oci_spec::runtime::{LinuxDevice, Spec};
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, chmodat, makedev, mknodat, openat2, unlinkat,
};
use rustix::io::Errno;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// The driver of virtio-mmio windows.
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
/// Where its windows are, among other devices.
const DEVICES: &str = "/sys/bus/platform/devices";

/// A container that runs.
pub(crate) struct Running<'a> {
    pub(crate) id: &'a str,
    /// Its first process.
    pub(crate) pid: i32,
}

/// A window as the kernel calls it.
fn window_name(window: u32) -> Result<String> {
    let entries = fs::read_dir(DEVICES).with_context(|| format!("no {DEVICES}"))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let name = named(window, names);
    name.ok_or_else(|| Refused::NotFound(format!("the guest has no window {window}")).into())
}

/// The name of a window among those of all devices. The command line numbers windows; a device tree has them by
/// their addresses, in the order of their numbers.
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

/// The disk behind a window, as the kernel calls it.
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

/// Has the kernel look at a window that was empty, and returns the disk that it finds.
pub(crate) fn attach(window: u32) -> Result<String> {
    let name = window_name(window)?;
    fs::write(format!("{DRIVER}/bind"), &name)
        .with_context(|| format!("the kernel finds no disk behind window {window}"))?;
    // A disk's own driver may have failed, which the window's does not say.
    disk_of(&name).inspect_err(|_| {
        unbind(&name).ok();
    })
}

/// Has the kernel let go of the disk behind a window. One that is in use stays; one that is gone
/// already is gone.
pub(crate) fn detach(window: u32) -> Result<()> {
    let window = window_name(window)?;
    if !device_directory(&window).join("driver").exists() {
        return Ok(());
    }
    if let Ok(name) = disk_of(&window) {
        // Refused while it is mounted, or part of something that is. What was written goes out first.
        let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
        let disk =
            rustix::fs::open(format!("/dev/{name}"), flags, Mode::empty()).map_err(|error| {
                match error {
                    Errno::BUSY => Refused::InUse(format!("{name} is in use in the guest")).into(),
                    error => anyhow::Error::from(error).context(format!("cannot open {name}")),
                }
            })?;
        rustix::fs::fsync(&disk).with_context(|| format!("cannot write out {name}"))?;
    }
    unbind(&window)
}

fn unbind(window: &str) -> Result<()> {
    fs::write(format!("{DRIVER}/unbind"), window)
        .with_context(|| format!("the kernel does not let go of window {window}"))
}

/// The number by which the kernel knows it.
pub(crate) fn number(device: &BlockDevice) -> Result<(i64, i64)> {
    let name = check_id(&device.guest_name)?;
    let number = fs::read_to_string(format!("/sys/class/block/{name}/dev"))
        .map_err(|_| Refused::NotFound(format!("the guest has no disk {name}")))?;
    let (major, minor) = number.trim().split_once(':').context("no device number")?;
    Ok((major.parse()?, minor.parse()?))
}

/// Gives a running container a disk: all of it, or nothing.
pub(crate) fn give(to: &Running<'_>, device: &BlockDevice) -> Result<()> {
    let path = config(to);
    let mut spec = Spec::load(&path)?;
    let (major, minor) = number(device)?;
    let nodes = spec.linux().as_ref().and_then(|l| l.devices().clone());
    let mut nodes = nodes.into_iter().flatten();
    if nodes.any(|node| (node.major(), node.minor()) == (major, minor)) {
        let reason = format!("the container has {} already", device.guest_name);
        bail!(Refused::AlreadyExists(reason));
    }
    let (dir, name) = place(to, device)?;
    // The node first: without the rule it opens nothing, and a container that put something in its
    // place does not get the rule.
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

/// Takes a disk from a running container. What has it open keeps it open.
pub(crate) fn take(from: &Running<'_>, device: &BlockDevice) -> Result<()> {
    let path = config(from);
    let mut spec = Spec::load(&path)?;
    let place_of_it = Path::new(&device.path);
    // The disk itself may be gone already: its number stands in the configuration.
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
    // What the container did to its own tree is its own affair: the node opens nothing any more.
    if let Ok((dir, name)) = place(from, device) {
        unlinkat(dir, name, AtFlags::empty()).ok();
    }
    Ok(())
}

fn config(container: &Running<'_>) -> PathBuf {
    bundle(container.id).join("config.json")
}

/// Writes a configuration anew: others read it meanwhile, and there may be no room.
fn save(spec: &Spec, path: &Path) -> Result<()> {
    let new = path.with_extension("new");
    spec.save(&new)?;
    Ok(fs::rename(&new, path)?)
}

/// The directory of a device in the container, and its name there. The container may have made any of
/// it a link: it is followed inside the container's root only.
fn place(container: &Running<'_>, device: &BlockDevice) -> Result<(OwnedFd, PathBuf)> {
    let path = Path::new(&device.path);
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        bail!(Refused::Invalid(format!(
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
