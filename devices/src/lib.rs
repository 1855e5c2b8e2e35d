//! Device models for Koya's virtual machines.
//!
//! A device has access to guest memory, an [`Interrupt`](virtio::Interrupt) and the host resource that it serves. It
//! does not know KVM, configuration files or containers: `koya-vmm` connects it to a virtual machine, tests
//! connect it to a mock driver.
//!
//! | module | what | specification |
//! |---|---|---|
//! | [`virtio`] | queues, descriptor chains, the device trait, the MMIO transport | virtio 1.2, sections 2 to 4 |
//! | [`balloon`] | returns unused memory to the host | virtio 1.2, section 5.5 |
//! | [`mem`] | memory hotplug | virtio 1.2, section 5.15 |
//! | [`blk`] | disks | virtio 1.2, section 5.2 |
//! | [`net`] | networks | virtio 1.2, section 5.1 |
//! | [`rate_limit`] | rate limits of devices | |
//! | [`rng`] | entropy | virtio 1.2, section 5.4 |
//! | [`vsock`] | sockets between guest and host | virtio 1.2, section 5.10 |
//! | [`fs`] | a host directory in the guest | virtio 1.2, section 5.11, and FUSE 7.x |
//! | [`serial`] | a serial port | 16550A |
//!
//! Invariants: every number from a guest is bounded before use. A guest's fault marks the device as needing
//! reset, a fault on the host is an error with its cause, and only a bug in Koya may panic. `unsafe` code is
//! in [`sys`] only.

pub mod balloon;
pub mod blk;
mod discard;
mod fault;
pub mod fs;
pub mod mem;
pub mod net;
pub mod rate_limit;
pub mod rng;
pub mod serial;
#[allow(unsafe_code)] // The one place for system calls that no safe crate wraps.
pub mod sys;
#[cfg(any(test, feature = "test-utils"))]
pub mod test_utils;
pub mod virtio;
pub mod vsock;
