//! The guest's disks: those that come and go, and who may use them.

use crate::device_rules;
use crate::helper::cgroup;
use crate::service::check_id;
use anyhow::{Context, Result, bail};
use koya_protocol::messages::BlockDevice;
use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType,
    Spec,
};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, makedev, mknodat, openat2, unlinkat};
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// The driver of virtio-mmio windows, and what it drives.
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";

/// A container that runs.
pub(crate) struct Running<'a> {
    pub(crate) id: &'a str,
    /// Its first process.
    pub(crate) pid: i32,
}

fn window_name(window: u32) -> String {
    format!("virtio-mmio.{window}")
}

fn device_folder(window: u32) -> PathBuf {
    Path::new("/sys/bus/platform/devices").join(window_name(window))
}

/// The disk behind a window, as the kernel calls it.
fn name_of(window: u32) -> Result<String> {
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
    let virtio = entries(device_folder(window), "virtio")?;
    let virtio = virtio.first().context("the window has no device")?;
    let disks = entries(virtio.join("block"), "vd")?;
    let disk = disks.first().context("the device is no disk")?;
    let name = disk.file_name().context("the disk has no name")?;
    Ok(name.to_string_lossy().into_owned())
}

/// Has the kernel look at a window that was empty, and returns the disk that it finds.
pub(crate) fn attach(window: u32) -> Result<String> {
    if !device_folder(window).exists() {
        bail!("the guest has no window {window}");
    }
    fs::write(format!("{DRIVER}/bind"), window_name(window))
        .with_context(|| format!("the kernel finds no disk behind window {window}"))?;
    name_of(window)
}

/// Has the kernel let go of the disk behind a window. One that is in use stays.
pub(crate) fn detach(window: u32) -> Result<()> {
    let name = name_of(window)?;
    // Refused while it is mounted, or part of something that is. What was written goes out first.
    let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
    let disk = rustix::fs::open(format!("/dev/{name}"), flags, Mode::empty())
        .with_context(|| format!("{name} is in use in the guest"))?;
    rustix::fs::fsync(&disk).with_context(|| format!("cannot write out {name}"))?;
    drop(disk);
    fs::write(format!("{DRIVER}/unbind"), window_name(window))
        .with_context(|| format!("the kernel does not let go of {name}"))
}

fn number(device: &BlockDevice) -> Result<(i64, i64)> {
    let name = check_id(&device.guest_name)?;
    let number = fs::read_to_string(format!("/sys/class/block/{name}/dev"))
        .with_context(|| format!("the guest has no disk {name}"))?;
    let (major, minor) = number.trim().split_once(':').context("no device number")?;
    Ok((major.parse()?, minor.parse()?))
}

fn rules(spec: &Spec) -> Vec<LinuxDeviceCgroup> {
    let linux = spec.linux().as_ref();
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    resources
        .and_then(|r| r.devices().clone())
        .unwrap_or_default()
}

fn change(
    spec: &mut Spec,
    change: impl FnOnce(&mut Vec<LinuxDevice>, &mut Vec<LinuxDeviceCgroup>),
) -> Result<()> {
    let mut rules = rules(spec);
    let linux = spec.linux_mut().as_mut();
    let linux = linux.context("no Linux configuration")?;
    let mut nodes = linux.devices().clone().unwrap_or_default();
    change(&mut nodes, &mut rules);
    linux.set_devices(Some(nodes));
    let mut resources = linux.resources().clone().unwrap_or_default();
    resources.set_devices(Some(rules));
    linux.set_resources(Some(resources));
    Ok(())
}

/// Gives a container that is to be made one of the guest's disks, whose number only the guest knows.
pub(crate) fn add(spec: &mut Spec, device: &BlockDevice) -> Result<()> {
    let (major, minor) = number(device)?;
    let node = LinuxDeviceBuilder::default()
        .typ(LinuxDeviceType::B)
        .path(&device.path)
        .major(major)
        .minor(minor)
        .file_mode(0o660u32)
        .uid(0u32)
        .gid(0u32)
        .build()?;
    let rule = LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .typ(LinuxDeviceType::B)
        .major(major)
        .minor(minor)
        .access(if device.read_only { "rm" } else { "rwm" })
        .build()?;
    change(spec, |nodes, rules| {
        nodes.push(node);
        // The last match wins, and one that allows everything must stay the last.
        let at = rules.len() - usize::from(rules.last().is_some_and(|r| r.allow()));
        rules.insert(at, rule);
    })
}

/// Gives a running container a disk.
pub(crate) fn give(spec: &mut Spec, to: &Running<'_>, device: &BlockDevice) -> Result<()> {
    let (dir, name) = place(to, device)?;
    add(spec, device)?;
    apply(spec, to)?;
    let (major, minor) = number(device)?;
    let mode = Mode::from_raw_mode(0o660);
    let node = makedev(u32::try_from(major)?, u32::try_from(minor)?);
    mknodat(dir, name, FileType::BlockDevice, mode, node)
        .with_context(|| format!("cannot make {} in the container", device.path))
}

/// Takes a disk from a running container. What has it open keeps it open.
pub(crate) fn take(spec: &mut Spec, from: &Running<'_>, device: &BlockDevice) -> Result<()> {
    // The disk itself may be gone already: its number stands in the configuration.
    let path = Path::new(&device.path);
    change(spec, |nodes, rules| {
        let gone = nodes.iter().find(|node| node.path() == path);
        let number = gone.map(|node| (Some(node.major()), Some(node.minor())));
        rules.retain(|rule| Some((rule.major(), rule.minor())) != number);
        nodes.retain(|node| node.path() != path);
    })?;
    apply(spec, from)?;
    let (dir, name) = place(from, device)?;
    match unlinkat(dir, name, rustix::fs::AtFlags::empty()) {
        // The container's own doing.
        Err(rustix::io::Errno::NOENT) => Ok(()),
        other => other.with_context(|| format!("cannot remove {} in the container", device.path)),
    }
}

fn apply(spec: &Spec, container: &Running<'_>) -> Result<()> {
    let path = format!("/sys/fs/cgroup{}", cgroup(container.id));
    device_rules::apply(Path::new(&path), &rules(spec))
}

/// The folder of a device in the container, and its name there. The container may have made any of
/// it a link: it is followed inside the container's root only.
fn place(container: &Running<'_>, device: &BlockDevice) -> Result<(OwnedFd, PathBuf)> {
    let path = Path::new(&device.path);
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        bail!("{} is no place for a device", device.path);
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
