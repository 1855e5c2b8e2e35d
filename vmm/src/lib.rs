//! A KVM virtual machine monitor as a library.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use koya_vmm::{Vm, VmConfig};
//!
//! let config = VmConfig::new("vmlinux");
//! let vm = Vm::builder(config.check()?).console(std::io::stdout());
//! println!("the guest ended: {}", vm.run()?);
//! # Ok(())
//! # }
//! ```
//! [`VmBuilder::start`] returns at once, with a [`Vm`] to control it by.
//!
//! # The way through
//! [`VmConfig`] (plain data) → [`VmConfig::check`] → [`Spec`] (cannot be wrong) → [`VmBuilder`]
//! (a recipe of steps) → [`Vm`] (owns everything) → one thread a vCPU and one event loop → the
//! first [`ExitReason`] ends it → threads joined, descriptors closed, memory unmapped.
//!
//! # What the library never does
//! It touches nothing process-wide: no signal handler, working directory, umask, resource limit
//! or dumpable flag. vCPU threads are kicked by a signal that is blocked in them and open only
//! inside KVM_RUN, so that no handler is needed (see [`kvm::Vcpu`]).
//!
//! # Threads and locks
//! - vCPU threads, the first of which may be the caller's ([`VmBuilder::run`]): KVM_RUN, and on an
//!   exit the [`bus`] to one device, under that device's lock.
//! - the event loop: workers of active devices. It takes no device's bus lock, so that a vCPU
//!   may wait for the loop while it holds one.
//! - the owner's threads: [`Vm`] and [`VmHandle`].

pub mod arch;
mod builder;
pub mod bus;
mod config;
mod event_loop;
mod exit;
pub mod guest_text;
mod hotplug;
#[allow(unsafe_code)] // The one place for ioctls and per-thread signals.
pub mod kvm;
mod marks;
mod memory;
mod panic_log;
mod standard_devices;
mod starter;
mod take_down;
mod vcpu;
mod virtio_slot;
mod vm;

/// Device models, for those who add devices of their own or hold a handle of one.
pub mod devices {
    pub use koya_devices::{balloon, blk, fs, mem, net, rate_limit, rng, serial, virtio, vsock};
    /// Where threads and their roles were.
    pub use koya_host::{sys, threads};
}

pub use builder::{StartError, VmBuilder};
pub use config::{
    Boot, ConfigError, DiskConfig, HugePages, KernelFormat, MAX_CPUS, MAX_DISK_QUEUES,
    MAX_DISK_SLOTS, MAX_MEMORY_MIB, MAX_NET_QUEUES, MIN_MEMORY_MIB, MemoryBacking, NetConfig,
    Serial, Spec, VmConfig, VsockConfig,
};
pub use exit::ExitReason;
pub use hotplug::{AttachError, AttachedDisk};
pub use koya_host as host;
pub use marks::{Exits, Mark, Marks};
pub use memory::{MemoryError, MemoryUsage};
pub use vm::{Vm, VmHandle};
