//! Containers, each in a virtual machine of its own.
//!
//! ```no_run
//! # fn main() -> Result<(), koya::Error> {
//! let sandbox = koya::Sandbox::start(&koya::SandboxConfig::default())?;
//! let config = koya::ContainerConfig::new("rootfs", ["uname", "-a"]);
//! let container = sandbox.run("hello", &config)?;
//! let output = container.output()?;
//! print!("{}", String::from_utf8_lossy(&output.stdout));
//! # Ok(())
//! # }
//! ```
//!
//! A [`Sandbox`] is a virtual machine inside this process, with Koya's agent as its init. A
//! [`Container`] in it has the properties of any OCI container: namespaces, cgroups, capabilities,
//! seccomp. Host directories are shared by virtio-fs; nothing is mounted on the host.
//!
//! # Locations of kernel and agent
//! See [`files::Files::find`]: by `KOYA_KERNEL` and `KOYA_INITRAMFS`, in `KOYA_SHARE`, in
//! `../share/koya` beside the program, or in `/usr/local/share/koya` and `/usr/share/koya`.
//!
//! The library changes no process-wide state; `koya`, the command, does.

mod account;
mod agent;
mod apparmor;
mod attachments;
pub mod block_volume;
mod checks;
mod clock;
mod config;
pub mod confinement;
mod console;
mod container;
mod container_config;
mod detach;
pub mod direct_volume;
pub mod directories;
mod dns;
mod egress_filter;
mod ephemeral;
mod error;
pub mod files;
mod guest_resources;
mod host_view;
mod interface_changes;
#[doc(hidden)]
pub mod internals;
mod json;
mod loopback;
mod mount_points;
mod net_devices;
mod network;
mod notifications;
mod oci;
mod patience;
mod pending_streams;
mod ref_counted;
mod sandbox;
mod seccomp;
pub mod settings;
mod size;
mod small_file;
mod stats;
mod streams;
mod sync;
mod termination;
#[cfg(test)]
mod test_agent;
pub mod timeline;
mod units;
mod unpacked;

/// Target of log messages whose number a guest determines: programs leave them out of their logs. All others of this
/// library are limited.
pub const GUEST_LOG: &str = "ttrpc::sync::client";

pub use checks::check_root;
pub use config::SandboxConfig;
pub use container::{Container, Output, Process};
pub use container_config::{
    ContainerConfig, Device, Direction, ExecOptions, ExtraFd, GuestDevice, ProcessConfig,
    ProcessStreams, Resolver, Rlimit, SocketName, Stdio, Tmpfs, User, Volume,
};
pub use dns::DnsForwarder;
pub use egress_filter::host_addresses;
pub use error::{Error, ErrorKind};
pub use host_view::HostView;
pub use interface_changes::InterfaceChanges;
pub use koya_image as image;
pub use koya_protocol::{cpus, hook, is_id};
pub use koya_vmm as vmm;
pub use koya_vmm::devices::fs::Cache;
pub use koya_vmm::host::process::{enable_core_scheduling, prepare_process};
pub use koya_vmm::host::walls::landlock::Place;
pub use koya_vmm::{DiskConfig, HugePages, MemoryBacking, NetConfig};
pub use loopback::Loopback;
pub use net_devices::{NetDevice, move_net_devices};
pub use network::{HostEnd, Neighbour, NetworkConfig, Route};
pub use notifications::Notifications;
pub use oci::{
    Bundle, DEFAULT_PATH, SharedNamespaces, SharedPidNamespace, check_configuration,
    check_resources, known_capabilities, net_devices_of,
};
pub use oci_spec;
pub use patience::DiskWrites;
pub use pending_streams::GuestListener;
pub use sandbox::{Disk, Sandbox, SandboxStats};
pub use seccomp::{Profile, Seccomp};
pub use settings::Settings;
pub use size::Size;
pub use small_file::read_small_file;
pub use stats::{ContainerStats, CpuStats, DeviceIo, HugePageUse};
pub use timeline::{Step, Timeline, TimelineFile};
pub use units::{parse_size, unit_shift};
pub use unpacked::prepare_image_root;

/// The README's snippets, compiled.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
