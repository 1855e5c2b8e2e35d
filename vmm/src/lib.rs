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
//! [`VmBuilder::start`] returns at once with a [`Vm`] that controls the machine. [`Vm::handle`] gives handles
//! for other threads, which pause, stop and query it, attach disks and resize memory and CPUs.
//!
//! # Devices
//! Devices of the configuration are added automatically. [`VmBuilder::device`] adds others, from [`devices`]
//! or your own: anything that implements [`VirtioDevice`](devices::virtio::VirtioDevice).
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use koya_vmm::devices::virtio::loop_worker::LoopWorker;
//! use koya_vmm::devices::virtio::{
//!     ActivateError, Activation, DeviceKind, EventWorker, VirtioDevice, Worker,
//! };
//! use koya_vmm::{Vm, VmConfig};
//!
//! /// Writes zeros into the buffers of its driver.
//! struct Zeros;
//!
//! impl VirtioDevice for Zeros {
//!     fn kind(&self) -> DeviceKind {
//!         DeviceKind(0x1000)
//!     }
//!
//!     fn queue_sizes(&self) -> &[u16] {
//!         &[64]
//!     }
//!
//!     fn activate(&mut self, mut activation: Activation) -> Result<Worker, ActivateError> {
//!         let queue = activation.take_queue(0)?;
//!         let worker = LoopWorker::new("zeros", queue, |chain, memory| {
//!             match chain.write(memory, 0, &[0; 16]) {
//!                 Ok(()) => 16,
//!                 Err(_) => 0, // there was less room
//!             }
//!         });
//!         Ok(Worker::EventLoop(Box::new(worker)))
//!     }
//!
//!     fn reset(&mut self, _worker: Option<EventWorker>) {}
//! }
//!
//! let spec = VmConfig::new("vmlinux").check()?;
//! let vm = Vm::builder(spec).device(Zeros).start()?;
//! # drop(vm);
//! # Ok(())
//! # }
//! ```
//! `examples/own_device.rs` is a whole program, with a guest that drives its device; `examples/console.rs`
//! boots Linux.
//!
//! # Life cycle
//! [`VmConfig`] (plain data) → [`VmConfig::check`] → [`Spec`] (validated) → [`VmBuilder`] → [`Vm`] (owns
//! everything) → one thread per vCPU and one event loop → the first [`ExitReason`] ends it → threads joined,
//! descriptors closed, memory unmapped.
//!
//! There is one error enum per operation ([`ConfigError`], [`StartError`], [`AttachError`]); each names the
//! operation, and has the error from the host or KVM, if any, as its [source](std::error::Error::source).
//!
//! # Process-wide state
//! The library changes nothing process-wide: no signal handler, working directory, umask, resource limit or
//! dumpable flag. vCPU threads are kicked by a signal that is blocked in them and unblocked only inside
//! KVM_RUN, so no handler is needed.
//!
//! # Threads and locks
//! - vCPU threads, the first of which may be the caller's ([`VmBuilder::run`]): KVM_RUN, and on an exit one
//!   device on the bus, under that device's lock.
//! - the event loop: workers of active devices. It takes no device's bus lock, so a vCPU may wait for the
//!   loop while it holds one.
//! - the starter: activates a device when its driver sets DRIVER_OK, while the vCPU waits. Threads that serve
//!   a guest create no others ([`host::threads`]).
//! - the owner's threads: [`Vm`] and [`VmHandle`].

mod arch;
mod boot_events;
mod builder;
mod bus;
mod config;
mod event_loop;
mod exit;
pub mod guest_text;
mod hotplug;
#[allow(unsafe_code)] // The one place for ioctls and per-thread signals.
pub mod kvm;
mod memory;
mod panic_log;
mod standard_devices;
mod starter;
mod teardown;
mod vcpu;
mod virtio_slot;
mod vm;

/// Device models, for embedders that add their own devices or hold handles of existing ones.
pub mod devices {
    pub use koya_devices::{balloon, blk, fs, mem, net, rate_limit, rng, serial, virtio, vsock};
}

pub use arch::ArchError;
pub use boot_events::{BootEvent, BootEvents, DeviceFailure, Exits};
pub use builder::{StartError, VmBuilder};
pub use bus::Overlap;
pub use config::{
    ConfigError, DiskConfig, HugePages, MAX_CPUS, MAX_DISK_QUEUES, MAX_DISK_SLOTS, MAX_MEMORY_MIB,
    MAX_NET_QUEUES, MIN_MEMORY_MIB, MemoryBacking, NetConfig, Serial, Spec, VmConfig, VsockConfig,
};
pub use exit::ExitReason;
pub use hotplug::{AttachError, AttachedDisk, AttachedNetwork};
pub use koya_host as host;
pub use memory::{MemoryError, MemoryUsage};
pub use vm::{Vm, VmHandle};

/// Parts of a machine, for benchmarks and fuzz targets of one of them. Not part of the API: they change without
/// notice.
#[doc(hidden)]
pub mod internals {
    pub use crate::arch::layout::PANIC_LOG;
    pub use crate::arch::{
        BASE_CMDLINE, Entry, Features, Interrupts, features, finish_vm, load_files, prepare_vcpu,
        prepare_vm, set_entry,
    };
    pub use crate::bus::{Bus, BusDevice, Effect};
    pub use crate::kvm::machine::Machine;
    pub use crate::kvm::vcpu::{Exit, Kicker, Thread, Vcpu};
    pub use crate::panic_log::explain;
}
