//! Converts an OCI configuration that was written for the host: parts for the guest, files to be shared with the guest, and
//! unsupported parts.
//!
//! Follows the OCI runtime specification 1.2. Paths of the host become shares; namespaces that are
//! shared within the sandbox (network, and those given by path) are the guest's; limits that only the host can
//! set are left out; unsupported features are refused by name. A [`ContainerConfig`](crate::ContainerConfig)
//! is converted to an OCI configuration first ([`from_config`]).

mod bundle;
mod capabilities;
mod devices;
pub(crate) mod from_config;
mod links;
mod mount_options;
mod mounts;
mod namespaces;
mod net_devices;
mod own_root;
mod paths;
pub(crate) mod process;
mod seccomp;
mod shares;
mod tmpfs;
mod unified;
mod users;
mod valid;

pub(crate) use bundle::Root;
pub use bundle::{Bundle, SharedNamespaces, SharedPidNamespace};
pub use capabilities::known_capabilities;
pub(crate) use devices::HostDisk;
pub(crate) use links::Link;
pub(crate) use mounts::OnHost;
pub use net_devices::net_devices_of;
pub use process::DEFAULT_PATH;
pub(crate) use shares::{Share, SharedPlace, guest_path, place_shares};
pub use valid::check_resources;

use crate::Error;
use crate::account::Accounts;
use crate::block_volume::GuestVolume;
use crate::mount_points;
use koya_protocol::hook;
use koya_protocol::messages::EphemeralVolume;
use koya_vmm::devices::fs::ShareOptions;
use oci_spec::runtime::{self as oci, LinuxNamespaceType, Spec};
use shares::root_share;
use std::path::{Path, PathBuf};

/// The parts from which the guest creates a container.
pub(crate) struct Adapted {
    pub(crate) spec: Spec,
    pub(crate) shares: Vec<Share>,
    pub(crate) volumes: Vec<EphemeralVolume>,
    /// Block devices of the host that it requests.
    pub(crate) disks: Vec<HostDisk>,
    /// Whether it has a device node for every device of the guest.
    pub(crate) has_guest_devices: bool,
    /// Whether terminals are not among these.
    pub(crate) omits_terminals: bool,
    /// Volumes with file systems that the guest mounts, by mount number.
    pub(crate) direct: Vec<(u32, GuestVolume)>,
    /// Mount points in a root that is a directory, each with a flag for files (`None`: either); and the working directory
    /// if the root is read-only.
    pub(crate) mount_points: Vec<(PathBuf, Option<bool>)>,
    /// Links in such a root.
    pub(crate) links: Vec<Link>,
}

impl Bundle {
    /// Validates it as far as that is possible without a virtual machine: its creation repeats that. The root file system
    /// must be mounted.
    ///
    /// # Errors
    /// The unsupported or invalid part of the configuration.
    pub fn check(&self) -> Result<(), Error> {
        let root = Root::of(&self.rootfs)?;
        let adapted = adapt("container", self.clone(), root, &Accounts::default())?;
        match root {
            Root::Directory => {
                mount_points::check(&self.rootfs, &adapted.mount_points)?;
                let mounts = adapted.spec.mounts().as_deref().unwrap_or_default();
                mount_points::check_ordinary(&self.rootfs, mounts)
            }
            Root::Image => Ok(()),
        }
    }
}

/// Validates a configuration by itself, without looking at the files that it names.
///
/// # Errors
/// The unsupported or invalid part.
pub fn check_configuration(spec: &Spec) -> Result<(), Error> {
    check_supported(spec)
}

/// Converts a container's configuration for the guest.
///
/// # Errors
/// The unsupported part, by name.
pub(crate) fn adapt(
    id: &str,
    bundle: Bundle,
    root: Root,
    accounts: &Accounts,
) -> Result<Adapted, Error> {
    let Bundle {
        mut spec,
        directory,
        rootfs,
        shared,
    } = bundle;
    check_supported(&spec)?;
    let links = normalize_mounts(&mut spec, &directory, &rootfs)?;
    if let (Some(link), Root::Image) = (links.first(), root) {
        let why = "the option copy-symlink is not supported with an image as the root";
        let reason = format!("{}: {why}", link.at.display());
        return Err(Error::unsupported("mounts", reason));
    }
    own_root::adapt(&mut spec, &directory, &rootfs)?;
    let root = adapt_root(id, rootfs, root, &mut spec);
    let rootfs = root.as_ref().map(|share| share.path.as_path());
    tmpfs::adapt(&mut spec, &directory, rootfs);
    let mounts = mounts::adapt(id, &directory, &mut spec)?;
    let is_read_only = root.as_ref().is_some_and(|root| root.options.read_only);
    let mut devices = devices::Adapted::default();
    if let Some(linux) = spec.linux_mut() {
        namespaces::adapt(linux, &shared.pids)?;
        // Those of the network namespace are the guest's, with their new names.
        linux.set_net_devices(None);
        let propagation = linux.rootfs_propagation().as_deref().map(root_propagation);
        linux.set_rootfs_propagation(propagation.transpose()?);
        devices = devices::adapt(linux, is_read_only)?;
        if let Some(resources) = linux.resources_mut() {
            retain_guest_limits(resources);
        }
    }
    let mut mount_points = mounts.points;
    let has_mapped_users = namespaces::all(&spec).any(|n| n.typ() == LinuxNamespaceType::User);
    if let Some(process) = spec.process_mut() {
        // The guest creates it if possible, and gives it to its user. That is impossible in a read-only root, and as root in
        // a user namespace that does not own the tree.
        if is_read_only || has_mapped_users {
            mount_points.push((process.cwd().clone(), None));
        }
        process::adapt(process, accounts)?;
    }
    Ok(Adapted {
        spec,
        shares: root.into_iter().chain(mounts.shares).collect(),
        volumes: mounts.volumes,
        disks: devices.disks,
        has_guest_devices: devices.lists_the_hosts,
        omits_terminals: devices.omits_terminals,
        direct: mounts.direct,
        mount_points,
        links,
    })
}

/// The mounts of a container, as far as the host has them.
///
/// # Errors
/// The unsupported mount.
pub(crate) fn mounts_on_host(bundle: &Bundle) -> Result<Vec<OnHost>, Error> {
    let mut spec = bundle.spec.clone();
    normalize_mounts(&mut spec, &bundle.directory, &bundle.rootfs)?;
    own_root::adapt(&mut spec, &bundle.directory, &bundle.rootfs)?;
    mounts::on_host(&bundle.directory, &spec)
}

/// Gives mounts their places in the container, adds the one at `/dev` if there is none, and removes those that are none: links,
/// which are returned, and BuildKit's socket.
///
/// # Errors
/// The unsupported mount.
fn normalize_mounts(spec: &mut Spec, directory: &Path, rootfs: &Path) -> Result<Vec<Link>, Error> {
    mounts::plain_places(spec);
    mounts::drop_trace_socket(spec, directory);
    own_root::make_relative(spec, directory, rootfs);
    tmpfs::add_dev(spec);
    links::take(spec, directory)
}

/// The share of the root, unless the guest mounts it.
fn adapt_root(id: &str, rootfs: PathBuf, root: Root, spec: &mut Spec) -> Option<Share> {
    let of = spec.root().as_ref();
    let read_only = of.and_then(oci::Root::readonly).unwrap_or(false);
    let share = (root == Root::Directory).then(|| Share {
        name: root_share(id),
        path: rootfs,
        options: ShareOptions {
            read_only,
            follow_mounts: false,
            omit_mounts: false,
        },
        users: None,
    });
    let mut root = oci::Root::default();
    root.set_path(match &share {
        Some(share) => guest_path(&share.name),
        None => koya_protocol::image_root(id).into(),
    });
    root.set_readonly(Some(read_only));
    spec.set_root(Some(root));
    share
}

/// Refuses a configuration that is invalid or not supported by itself, whatever the host and the guest are like.
///
/// # Errors
/// The part, by name.
fn check_supported(spec: &Spec) -> Result<(), Error> {
    valid::check(spec)?;
    let Some(process) = spec.process() else {
        return Err(Error::invalid("process", "it is missing"));
    };
    if !process.cwd().is_absolute() {
        return Err(Error::invalid(
            "process.cwd",
            "Cwd must be an absolute path",
        ));
    }
    if let Some(hooks) = spec.hooks() {
        check_hooks(hooks)?;
    }
    let linux = spec.linux().as_ref();
    if linux.is_some_and(|linux| linux.intel_rdt().is_some()) {
        return Err(Error::unsupported(
            "linux.intelRdt",
            "a guest has no such control",
        ));
    }
    if let Some(seccomp) = linux.and_then(|linux| linux.seccomp().as_ref()) {
        seccomp::check(seccomp)?;
    }
    if linux.is_some_and(|linux| linux.memory_policy().is_some()) {
        let reason = "a guest's memory is one node, and the host's nodes are not its to choose";
        return Err(Error::unsupported("linux.memoryPolicy", reason));
    }
    namespaces::check(spec)
}

/// Checks hooks: a guest can only run those from the container's own files.
fn check_hooks(hooks: &oci::Hooks) -> Result<(), Error> {
    let of_the_host = "those of the host are run by whoever makes the container";
    let elsewhere = "a program of the host can't run in the guest";
    let lists = [
        ("prestart", hooks.prestart(), of_the_host),
        ("createRuntime", hooks.create_runtime(), of_the_host),
        ("createContainer", hooks.create_container(), elsewhere),
        ("poststart", hooks.poststart(), of_the_host),
        ("poststop", hooks.poststop(), of_the_host),
    ];
    for (name, list, why) in lists {
        if list.as_ref().is_some_and(|list| !list.is_empty()) {
            let reason = format!("{name} hooks are not supported here: {why}");
            return Err(Error::unsupported("hooks", reason));
        }
    }
    let own = hooks.start_container().as_deref().unwrap_or_default();
    hook::check("startContainer", own).map_err(|why| Error::invalid("hooks", why))
}

/// Mount propagation of a container's root, without the "r" prefix that runc and the kubelet use ("rslave"): it is recursive
/// anyway.
fn root_propagation(wanted: &str) -> Result<String, Error> {
    let plain = wanted.strip_prefix('r').unwrap_or(wanted);
    match ["shared", "slave", "private", "unbindable"].contains(&plain) {
        true => Ok(plain.into()),
        false => Err(Error::unsupported(
            "linux.rootfsPropagation",
            format!("{wanted:?} is not supported"),
        )),
    }
}

/// Reduces limits to those that the guest's control groups support. Its disks and huge pages are not the host's; limits for
/// those of the host are those of the sandbox's control group. Of sets of CPUs the guest takes those that it has.
pub(crate) fn retain_guest_limits(resources: &mut oci::LinuxResources) {
    resources.set_block_io(None);
    resources.set_network(None);
    resources.set_rdma(None);
    resources.set_hugepage_limits(None);
    if let Some(memory) = resources.memory() {
        let mut memory = *memory;
        // As for runc, 0 means that there is none.
        let amount = |value: Option<i64>| value.filter(|value| *value != 0);
        memory.set_limit(amount(memory.limit()));
        memory.set_swap(amount(memory.swap()));
        resources.set_memory(Some(memory));
    }
    if let Some(cpu) = resources.cpu() {
        let mut cpu = *Box::new(cpu.clone());
        cpu.set_quota(cpu.quota().filter(|quota| *quota != 0));
        cpu.set_period(cpu.period().filter(|period| *period != 0));
        cpu.set_realtime_period(None);
        cpu.set_realtime_runtime(None);
        resources.set_cpu(Some(cpu));
    }
    if let Some(mut files) = resources.unified().clone() {
        let controllers = ["cpuset.", "io.", "hugetlb."];
        let sets = ["cpuset.cpus", "cpuset.mems"];
        files.retain(|file, _| {
            sets.contains(&file.as_str()) || !controllers.iter().any(|name| file.starts_with(name))
        });
        resources.set_unified(Some(files));
    }
}

#[cfg(test)]
mod tests;
