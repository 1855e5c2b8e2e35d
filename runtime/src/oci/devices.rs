//! Device nodes and device rules: of the host's those that are disks, and the guest's own.

use super::refuse;
use crate::Error;
use oci_spec::runtime::{self as oci, LinuxDeviceType};
use rustix::fs::FileType;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A block device of the host, and where a container has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostDisk {
    /// Major and minor.
    pub(crate) number: (i64, i64),
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl HostDisk {
    fn of<'a>(
        device: &oci::LinuxDevice,
        rules: impl Iterator<Item = &'a oci::LinuxDeviceCgroup>,
    ) -> Self {
        let number = (device.major(), device.minor());
        Self {
            number,
            path: device.path().clone(),
            read_only: !may_write(rules, number),
            mode: device.file_mode().unwrap_or(0),
            uid: device.uid().unwrap_or(0),
            gid: device.gid().unwrap_or(0),
        }
    }

    /// Whether the host has a node of the same disk at the same path, as when all of the host's were listed. A
    /// disk may have several nodes.
    fn is_listing(&self) -> bool {
        let is_its_name = self.host().is_ok_and(|host| host == self.path);
        is_its_name || block_number(&self.path) == Some(self.number)
    }

    /// Where it is on the host: as its kernel names it.
    pub(crate) fn host(&self) -> io::Result<PathBuf> {
        let (major, minor) = self.number;
        let about = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"))?;
        let name = about.lines().find_map(|line| line.strip_prefix("DEVNAME="));
        let name = name.ok_or_else(|| io::Error::other("it has no name"))?;
        Ok(Path::new("/dev").join(name))
    }
}

/// Major and minor of the block device at a path of the host, if there is one.
pub(super) fn block_number(path: &Path) -> Option<(i64, i64)> {
    let found = rustix::fs::stat(path).ok()?;
    let is_block = FileType::from_raw_mode(found.st_mode) == FileType::BlockDevice;
    is_block.then_some(device_number(found.st_rdev))
}

/// Major and minor of a device number (makedev(3)).
pub(super) fn device_number(device: u64) -> (i64, i64) {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    (major.into(), minor.into())
}

/// Character devices that every guest has, by number, and their nodes: memory, terminals, TUN, FUSE.
const GUEST_DEVICES: &[((i64, i64), &str)] = &[
    ((1, 3), "/dev/null"),
    ((1, 5), "/dev/zero"),
    ((1, 7), "/dev/full"),
    ((1, 8), "/dev/random"),
    ((1, 9), "/dev/urandom"),
    ((1, 11), "/dev/kmsg"),
    ((5, 0), "/dev/tty"),
    ((5, 2), "/dev/ptmx"),
    ((10, 200), "/dev/net/tun"),
    ((10, 229), "/dev/fuse"),
];

/// Where the guest has the character device with this number, if it has it.
pub(super) fn guest_node(number: (i64, i64)) -> Option<&'static str> {
    let mut all = GUEST_DEVICES.iter();
    all.find_map(|(own, node)| (*own == number).then_some(*node))
}

/// The devices of a container beyond those that its configuration has for the guest.
#[derive(Debug, Default)]
pub(super) struct Adapted {
    /// Disks of the host that it asks for.
    pub(super) disks: Vec<HostDisk>,
    /// Whether it is given all that its host has: of a guest, that is all that the guest has.
    pub(super) lists_the_hosts: bool,
}

/// Leaves the guest's own nodes in a configuration.
///
/// # Errors
/// Which can't be had.
pub(super) fn adapt(linux: &mut oci::Linux) -> Result<Adapted, Error> {
    let all_allowed = linux.resources().as_ref().is_some_and(|resources| {
        let rules = resources.devices().iter().flatten();
        let all = |r: &oci::LinuxDeviceCgroup| {
            let every_access = r.access().as_ref().is_none_or(|access| access.len() == 3);
            let every_kind = matches!(r.typ(), None | Some(LinuxDeviceType::A));
            r.allow() && r.major().is_none() && r.minor().is_none() && every_access && every_kind
        };
        rules.into_iter().any(all)
    });
    let mut devices = Vec::new();
    let mut adapted = Adapted::default();
    for device in linux.devices().iter().flatten() {
        let number = (device.major(), device.minor());
        let is_pipe = matches!(device.typ(), LinuxDeviceType::P);
        let rules = linux
            .resources()
            .as_ref()
            .and_then(|r| r.devices().as_ref());
        let disk = matches!(device.typ(), LinuxDeviceType::B)
            .then(|| HostDisk::of(device, rules.into_iter().flatten()));
        // Privileged containers get all nodes of the host, each by its path there; a volume has a path that
        // is not the host's node of the same disk.
        let is_volume = |disk: &HostDisk| !all_allowed || !disk.is_listing();
        let is_character = matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::U);
        if is_pipe || is_character && guest_node(number).is_some() {
            devices.push(device.clone());
        } else if let Some(disk) = disk.filter(is_volume) {
            adapted.disks.push(disk);
        } else if all_allowed {
            adapted.lists_the_hosts = true;
            log::debug!(
                "{} is a device of the host's alone",
                device.path().display()
            );
        } else {
            let path = device.path().display();
            let reason = format!("{path} is a device of the host, which a guest does not have");
            return Err(refuse("linux.devices", reason));
        }
    }
    linux.set_devices(Some(devices));
    if let Some(resources) = linux.resources_mut() {
        leave_out_disks(resources);
    }
    Ok(adapted)
}

/// The host's numbers of disks are others' in the guest.
fn leave_out_disks(resources: &mut oci::LinuxResources) {
    let rules = resources.devices().clone().unwrap_or_default();
    let is_disk = |rule: &oci::LinuxDeviceCgroup| {
        let kind = matches!(
            rule.typ(),
            None | Some(LinuxDeviceType::A | LinuxDeviceType::B)
        );
        kind && rule.major().is_some_and(|major| major >= 0)
    };
    let rules = rules.into_iter().filter(|rule| !is_disk(rule)).collect();
    resources.set_devices(Some(rules));
}

/// Whether these rules let a block device be written: the last that fits counts.
fn may_write<'a>(
    rules: impl Iterator<Item = &'a oci::LinuxDeviceCgroup>,
    number: (i64, i64),
) -> bool {
    let fits = |rule: &&oci::LinuxDeviceCgroup| {
        let kind = matches!(
            rule.typ(),
            None | Some(LinuxDeviceType::A | LinuxDeviceType::B)
        );
        let is = |own: Option<i64>, wanted| own.is_none_or(|own| own < 0 || own == wanted);
        let writes = rule
            .access()
            .as_ref()
            .is_none_or(|access| access.contains('w'));
        kind && writes && is(rule.major(), number.0) && is(rule.minor(), number.1)
    };
    rules.filter(fits).last().is_some_and(|rule| rule.allow())
}
