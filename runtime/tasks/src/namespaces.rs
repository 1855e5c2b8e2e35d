//! Namespaces of a sandbox's process on the host: mount and network.

use anyhow::{Context, Result, bail};
use koya::oci_spec::runtime::{LinuxNamespaceType, Spec};
use koya::{InterfaceChanges, NetDevice};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::mount::{MountPropagationFlags, mount_change};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

pub(crate) const HOST_NETWORK: &str = "the host's network can't be a virtual machine's: give the \
                                       container a network namespace of its own";

/// A path of a process is used only for sharing between containers: Docker's `--network container:NAME`.
const OTHERS_NETWORK: &str = "the network of another container can't be shared: each has a virtual machine \
                              of its own";

/// Interfaces that the kernel creates in each network namespace, and that carry no traffic.
const KERNELS: [&str; 10] = [
    "lo", "tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0",
    "ip6gre0",
];

/// A sandbox's network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Network {
    Host,
    New,
    Path(PathBuf),
}

/// Whether this path is that of the network namespace of this process. One that can't be looked at is refused elsewhere.
pub(crate) fn is_own_network(path: &Path) -> bool {
    let place = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino()));
    match (place(path), place(Path::new("/proc/self/ns/net"))) {
        (Ok(one), Ok(other)) => one == other,
        _ => true,
    }
}

impl Network {
    pub(crate) fn of(spec: &Spec) -> Self {
        let linux = spec.linux().as_ref();
        let namespaces = linux.and_then(|linux| linux.namespaces().as_ref());
        let mut namespaces = namespaces.into_iter().flatten();
        let network = namespaces.find(|n| n.typ() == LinuxNamespaceType::Network);
        match network.map(|network| network.path()) {
            None => Self::Host,
            Some(None) => Self::New,
            Some(Some(path)) if path.as_os_str().is_empty() => Self::New,
            Some(Some(path)) => Self::Path(path.clone()),
        }
    }

    /// Moves the calling thread into it, and into a new mount namespace: mounts made there end with its last thread. Threads
    /// created later are in the same namespaces; for a single-threaded process, `/proc/PID/ns/net` is the sandbox's.
    pub(crate) fn enter(&self) -> Result<()> {
        enter_own_mounts()?;
        match self {
            Self::Host => Ok(()),
            Self::New => {
                unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")
            }
            Self::Path(path) => {
                let namespace = open(path)?;
                let wanted = namespace.metadata()?.ino();
                let hosts = ["/proc/1/ns/net", "/proc/self/ns/net"];
                if hosts
                    .iter()
                    .any(|host| fs::metadata(host).is_ok_and(|m| m.ino() == wanted))
                {
                    bail!(HOST_NETWORK);
                }
                if is_of_a_process(path) {
                    bail!(OTHERS_NETWORK);
                }
                enter_opened(&namespace, path)
            }
        }
    }

    /// Enters the namespace if it is named by a path.
    pub(crate) fn enter_named(&self) -> Result<()> {
        match self {
            Self::Path(path) => enter_opened(&open(path)?, path),
            Self::Host | Self::New => Ok(()),
        }
    }
}

/// Moves the calling thread into the network namespace of a configuration, as [`Network::enter`] does, and the network devices
/// that the configuration gives to the container.
pub(crate) fn enter(spec: &Spec) -> Result<()> {
    enter_with_devices(spec, Network::enter)
}

/// The same as [`Network::enter_named`] does.
pub(crate) fn enter_named(spec: &Spec) -> Result<()> {
    enter_with_devices(spec, Network::enter_named)
}

fn enter_with_devices(spec: &Spec, enter: fn(&Network) -> Result<()>) -> Result<()> {
    let network = Network::of(spec);
    let devices = koya::net_devices_of(spec)?;
    if devices.is_empty() {
        return enter(&network);
    }
    let host = open(Path::new("/proc/thread-self/ns/net"))?;
    enter(&network)?;
    move_devices(&host, &devices)
}

/// Moves network devices of this namespace of the host to that of the calling thread.
pub(crate) fn move_devices(host: &File, devices: &[NetDevice]) -> Result<()> {
    let is_root = rustix::process::geteuid().is_root() && !is_in_user_namespace();
    check_devices(devices, is_root)?;
    Ok(koya::move_net_devices(host, devices)?)
}

/// What is known to be impossible before a device is moved, from which it may not come back.
fn check_devices(devices: &[NetDevice], is_root: bool) -> Result<()> {
    if !is_root {
        bail!(
            "linux.netDevices: network devices are not supported for rootless containers: run as root"
        );
    }
    let (count, most) = (devices.len(), InterfaceChanges::MAX_INTERFACES);
    if count > most {
        bail!("linux.netDevices: {count} devices are more than the {most} that a sandbox takes");
    }
    let mut devices = devices.iter();
    match devices.find(|device| KERNELS.contains(&device.new_name.as_str())) {
        Some(NetDevice { name, new_name }) => bail!(
            "linux.netDevices: {name} can't be {new_name} in the container, a name that the kernel gives to \
             interfaces of its own: give it another one"
        ),
        None => Ok(()),
    }
}

/// Moves the calling thread into a new mount namespace: mounts made there end with its last thread.
///
/// # Errors
/// If the thread may not have one.
pub fn enter_own_mounts() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
    // Later mounts of the host still propagate here (volumes), but not vice versa.
    let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", flags).context("cannot make mounts private")
}

fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("cannot open {}", path.display()))
}

fn enter_opened(namespace: &File, path: &Path) -> Result<()> {
    setns(namespace, CloneFlags::CLONE_NEWNET)
        .with_context(|| format!("cannot enter {}", path.display()))
}

/// Whether this process is in a user namespace other than the host's initial one (user_namespaces(7)).
pub fn is_in_user_namespace() -> bool {
    // A kernel without user namespaces has no such file.
    let users = fs::read_to_string("/proc/self/uid_map");
    users.is_ok_and(|users| !users.split_whitespace().eq(["0", "0", "4294967295"]))
}

/// The PID of this process in the namespace of `/proc`, in which clients see it. Its own pid namespace may be another one.
pub(crate) fn own_pid() -> u32 {
    let own = fs::read_link("/proc/self").ok();
    let own = own.and_then(|own| own.to_str()?.parse().ok());
    own.unwrap_or_else(std::process::id)
}

/// Whether this is `/proc/PID/ns/net`, Docker's way to name the network of another container.
fn is_of_a_process(path: &Path) -> bool {
    let number = path
        .to_str()
        .and_then(|path| path.strip_prefix("/proc/")?.strip_suffix("/ns/net"));
    number.is_some_and(|number| number.parse::<u32>().is_ok())
}

/// The interfaces of this process's network namespace that a guest can take over.
pub(crate) fn interfaces() -> Result<Vec<String>> {
    let names = current_interfaces().context("cannot read /proc/net/dev")?;
    if names.len() > InterfaceChanges::MAX_INTERFACES {
        bail!(
            "{} network interfaces are more than a sandbox takes",
            names.len()
        );
    }
    Ok(names)
}

/// The same, however many there are.
pub(crate) fn current_interfaces() -> io::Result<Vec<String>> {
    Ok(interfaces_in(&fs::read_to_string("/proc/net/dev")?))
}

/// The same, from the contents of `/proc/net/dev` (proc_pid_net(5)).
fn interfaces_in(text: &str) -> Vec<String> {
    let names = text.lines().skip(2).filter_map(|line| line.split_once(':'));
    let names = names.map(|(name, _)| name.trim());
    names
        .filter(|name| !KERNELS.contains(name))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_network_of_another_container_is_told_by_its_path() {
        assert!(is_of_a_process(Path::new("/proc/77/ns/net")));
        for other in [
            "/run/netns/a",
            "/var/run/docker/netns/77",
            "/proc/self/ns/net",
        ] {
            assert!(!is_of_a_process(Path::new(other)), "{other}");
        }
    }

    #[test]
    fn devices_that_cannot_become_the_guests_are_not_moved() {
        let device = |new_name: &str| NetDevice {
            name: "eth0".into(),
            new_name: new_name.into(),
        };
        let refused = |devices: &[NetDevice], is_root| {
            let checked = check_devices(devices, is_root);
            checked.map_or_else(|error| error.to_string(), |()| String::new())
        };
        assert_eq!(refused(&[device("eth1")], true), "");
        assert!(refused(&[device("eth1")], false).contains("for rootless containers"));
        let kernels = refused(&[device("eth1"), device("sit0")], true);
        assert!(kernels.contains("eth0 can't be sit0"), "{kernels}");
        let many = vec![device("net%d"); InterfaceChanges::MAX_INTERFACES + 1];
        let many = refused(&many, true);
        assert!(many.contains("9 devices are more than the 8"), "{many}");
    }

    #[test]
    fn a_guest_gets_the_interfaces_that_carry_something() {
        let text =
            "Inter-|   Receive\n face |bytes\n    lo: 0 0\n  eth0: 7 1\n  sit0: 0 0\n net1:1 2\n";
        assert_eq!(interfaces_in(text), ["eth0", "net1"]);
    }
}
