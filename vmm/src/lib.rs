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
//! [`VmBuilder::start`] returns at once, with a [`Vm`] to control it by: [`Vm::handle`] gives handles for
//! other threads, by which it is paused, stopped and asked, and by which disks, memory and CPUs come and go.
//!
//! # Devices
//! Those of the configuration are added by themselves. Others, of [`devices`] or of one's own, are added by
//! [`VmBuilder::device`]: whatever implements [`VirtioDevice`](devices::virtio::VirtioDevice).
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use koya_vmm::devices::virtio::loop_worker::LoopWorker;
//! use koya_vmm::devices::virtio::{
//!     ActivateError, Activation, DeviceKind, EventWorker, VirtioDevice, Worker,
//! };
//! use koya_vmm::{Vm, VmConfig};
//!
//! /// Writes zeros into whatever its driver offers.
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
//! # The way through
//! [`VmConfig`] (plain data) → [`VmConfig::check`] → [`Spec`] (cannot be wrong) → [`VmBuilder`]
//! (a recipe of steps) → [`Vm`] (owns everything) → one thread a vCPU and one event loop → the
//! first [`ExitReason`] ends it → threads joined, descriptors closed, memory unmapped.
//!
//! Errors are one enum for each operation ([`ConfigError`], [`StartError`], [`AttachError`]); each says what was
//! tried, and has the host's or KVM's answer as its [source](std::error::Error::source).
//!
//! # What the library never does
//! It touches nothing process-wide: no signal handler, working directory, umask, resource limit
//! or dumpable flag. vCPU threads are kicked by a signal that is blocked in them and open only
//! inside KVM_RUN, so that no handler is needed.
//!
//! # Threads and locks
//! - vCPU threads, the first of which may be the caller's ([`VmBuilder::run`]): KVM_RUN, and on an
//!   exit the bus to one device, under that device's lock.
//! - the event loop: workers of active devices. It takes no device's bus lock, so that a vCPU
//!   may wait for the loop while it holds one.
//! - the starter: activates a device when its driver starts it, while the vCPU waits. Threads that serve a
//!   guest start no others ([`host::threads`]).
//! - the owner's threads: [`Vm`] and [`VmHandle`].

mod arch;
mod builder;
mod bus;
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
}

pub use arch::ArchError;
pub use builder::{StartError, VmBuilder};
pub use bus::Overlap;
pub use config::{
    ConfigError, DiskConfig, HugePages, MAX_CPUS, MAX_DISK_QUEUES, MAX_DISK_SLOTS, MAX_MEMORY_MIB,
    MAX_NET_QUEUES, MIN_MEMORY_MIB, MemoryBacking, NetConfig, Serial, Spec, VmConfig, VsockConfig,
};
pub use exit::ExitReason;
pub use hotplug::{AttachError, AttachedDisk};
pub use koya_host as host;
pub use marks::{Exits, Mark, Marks};
pub use memory::{MemoryError, MemoryUsage};
pub use vm::{Vm, VmHandle};

/// The parts of a machine, for benches that measure one alone. They are no interface of this library: they
/// change without notice.
#[doc(hidden)]
pub mod internals {
    pub use crate::arch::{
        BASE_CMDLINE, Entry, Features, features, prepare_vcpu, prepare_vm, set_entry,
    };
    pub use crate::bus::{Bus, BusDevice, Effect};
    pub use crate::kvm::machine::Machine;
    pub use crate::kvm::vcpu::{Exit, Kicker, Thread, Vcpu};
}
