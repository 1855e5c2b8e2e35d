//! Device nodes and device rules: disks of the host, and the guest's own devices.

use crate::Error;
use koya_protocol::is_terminal;
use oci_spec::runtime::{self as oci, LinuxDeviceType, LinuxNamespaceType};
use rustix::fs::FileType;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A block device of the host, with its path in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostDisk {
    /// Major and minor number.
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

    /// Whether the host has a node of the same disk at the same path, as in a list of all host devices. A disk may have
    /// several nodes.
    fn is_listing(&self) -> bool {
        let is_its_name = self.host().is_ok_and(|host| host == self.path);
        is_its_name || block_number(&self.path) == Some(self.number)
    }

    /// Path on the host, by the kernel's name.
    pub(crate) fn host(&self) -> io::Result<PathBuf> {
        let (major, minor) = self.number;
        let about = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"))?;
        let name = about.lines().find_map(|line| line.strip_prefix("DEVNAME="));
        let name = name.ok_or_else(|| io::Error::other("it has no name"))?;
        Ok(Path::new("/dev").join(name))
    }
}

/// Major and minor number of the block device at a path of the host, if there is one.
pub(super) fn block_number(path: &Path) -> Option<(i64, i64)> {
    let found = rustix::fs::stat(path).ok()?;
    let is_block = FileType::from_raw_mode(found.st_mode) == FileType::BlockDevice;
    is_block.then_some(device_number(found.st_rdev))
}

/// Major and minor number of a device number (makedev(3)).
pub(super) fn device_number(device: u64) -> (i64, i64) {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    (major.into(), minor.into())
}

/// Character devices of every guest, by number, with their nodes: memory, terminals, TUN, FUSE.
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

/// Major and minor number of the guest's character device with this node.
///
/// # Errors
/// If the guest has no such device, with a list of those it has.
pub(super) fn guest_number(node: &Path) -> Result<(i64, i64), Error> {
    let mut all = GUEST_DEVICES.iter();
    let found = all.find_map(|(number, own)| (Path::new(own) == node).then_some(*number));
    found.ok_or_else(|| {
        let nodes: Vec<_> = GUEST_DEVICES.iter().map(|(_, node)| *node).collect();
        let (node, nodes) = (node.display(), nodes.join(", "));
        Error::unsupported("device", format!("{node} is not one of {nodes}"))
    })
}

/// Path of the character device with this number in the guest, if it exists there.
pub(super) fn guest_node(number: (i64, i64)) -> Option<&'static str> {
    let mut all = GUEST_DEVICES.iter();
    all.find_map(|(own, node)| (*own == number).then_some(*node))
}

/// Devices of a container that its configuration for the guest does not contain.
#[derive(Debug, Default)]
pub(super) struct Adapted {
    /// Disks of the host that it requests.
    pub(super) disks: Vec<HostDisk>,
    /// Whether it requests all devices of the host: it then gets all devices of the guest.
    pub(super) lists_the_hosts: bool,
    /// Whether it lists none of the host's terminals, as podman does for a container with systemd, which would start a
    /// login on each.
    pub(super) omits_terminals: bool,
}

/// Whether the host has no device with the number of this one. Without sysfs it counts as having all.
fn is_nowhere(device: &oci::LinuxDevice) -> bool {
    let all = match device.typ() {
        LinuxDeviceType::B => "/sys/dev/block",
        LinuxDeviceType::C | LinuxDeviceType::U => "/sys/dev/char",
        _ => return false,
    };
    let number = format!("{}:{}", device.major(), device.minor());
    Path::new(all).is_dir() && !Path::new(all).join(number).exists()
}

/// Reduces a configuration to the guest's own device nodes, and those of devices that exist nowhere: nodes alone.
///
/// # Errors
/// The device that a guest does not have, or that can't be made in a read-only root.
pub(super) fn adapt(linux: &mut oci::Linux, is_read_only: bool) -> Result<Adapted, Error> {
    let all_allowed = linux.resources().as_ref().is_some_and(|resources| {
        let rules = resources.devices().iter().flatten();
        let all = |r: &oci::LinuxDeviceCgroup| {
            let every_access = r.access().as_ref().is_none_or(|access| access.len() == 3);
            let every_kind = matches!(r.typ(), None | Some(LinuxDeviceType::A));
            r.allow() && r.major().is_none() && r.minor().is_none() && every_access && every_kind
        };
        rules.into_iter().any(all)
    });
    // With a user namespace nodes are those of the guest's /dev, bound to their places.
    let mut namespaces = linux.namespaces().iter().flatten();
    let has_users = namespaces.any(|namespace| namespace.typ() == LinuxNamespaceType::User);
    let mut devices = Vec::new();
    let mut listed = linux.devices().iter().flatten();
    let mut adapted = Adapted {
        omits_terminals: !listed.any(|device| is_terminal(device.path())),
        ..Adapted::default()
    };
    for device in linux.devices().iter().flatten().map(in_the_root) {
        let number = (device.major(), device.minor());
        let is_pipe = matches!(device.typ(), LinuxDeviceType::P);
        let rules = linux
            .resources()
            .as_ref()
            .and_then(|r| r.devices().as_ref());
        let disk = matches!(device.typ(), LinuxDeviceType::B)
            .then(|| HostDisk::of(&device, rules.into_iter().flatten()));
        // Privileged containers get all nodes of the host, each at its path there; a volume is a disk at a path that is not
        // one of its nodes on the host.
        let is_volume = |disk: &HostDisk| !all_allowed || !disk.is_listing();
        let is_character = matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::U);
        let is_guests = is_character && guest_node(number).is_some();
        let is_node_alone = || !all_allowed && !has_users && is_nowhere(&device);
        if is_pipe || is_guests || is_node_alone() {
            if is_read_only && !device.path().starts_with("/dev") {
                let path = device.path().display();
                let reason = format!("{path}: it can't be made outside /dev in a read-only root");
                return Err(Error::unsupported("linux.devices", reason));
            }
            devices.push(below_dev(device));
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
            return Err(Error::unsupported("linux.devices", reason));
        }
    }
    linux.set_devices(Some(devices));
    if let Some(resources) = linux.resources_mut() {
        leave_out_disks(resources);
    }
    Ok(adapted)
}

/// The device at an absolute path: a relative one starts at the container's root, as with runc and crun.
fn in_the_root(device: &oci::LinuxDevice) -> oci::LinuxDevice {
    let mut device = device.clone();
    let path = Path::new("/").join(device.path());
    // Without a slash at its end.
    device.set_path(path.components().collect());
    device
}

/// The device at a path that libcontainer accepts: it makes devices below `/dev` alone, but takes the directory above that
/// for the container's root.
fn below_dev(mut device: oci::LinuxDevice) -> oci::LinuxDevice {
    if !device.path().starts_with("/dev") {
        let within = device.path().strip_prefix("/").unwrap_or(device.path());
        let path = Path::new("/dev/..").join(within);
        device.set_path(path);
    }
    device
}

/// Removes rules for disks: the host's numbers belong to other disks in the guest.
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

/// Whether these rules allow writes to a block device: the last matching rule counts.
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
