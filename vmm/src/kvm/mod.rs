//! KVM: opening it, a virtual machine's memory, and running vCPUs.
//!
//! The crate's `unsafe` stands here: memory slots (a promise that a mapping outlives its slot),
//! per-thread signals, and the parts of `kvm_run` that the bindings show as unions.

mod vcpu;

pub use vcpu::{Exit, Kicker, Thread, Vcpu};

use koya_devices::virtio::Memory;
use koya_devices::virtio::mmio::WINDOW_SIZE;
use koya_devices::virtio::registers::RegisterPages;
use kvm_bindings::{KVM_API_VERSION, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};
use std::sync::{Arc, OnceLock};
use thiserror::Error;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

/// Where the host offers KVM.
pub const DEVICE: &str = "/dev/kvm";

/// What Koya needs of KVM, beyond running a guest.
pub const NEEDED: &[(&str, Cap)] = &[
    ("KVM_CAP_IRQCHIP", Cap::Irqchip),
    ("KVM_CAP_USER_MEMORY", Cap::UserMemory),
    ("KVM_CAP_IOEVENTFD", Cap::Ioeventfd),
    ("KVM_CAP_IRQFD", Cap::Irqfd),
];

/// Why there is no KVM to use; each says what to do.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KvmError {
    /// No such device.
    #[error(
        "{DEVICE} does not exist: load the kvm_intel or kvm_amd module, or turn virtualization \
         on in the firmware (in a virtual machine: nested virtualization on its host)"
    )]
    NoDevice,
    /// Not allowed to open it.
    #[error("no permission for {DEVICE}: join the group that owns it (usually kvm), or ask root")]
    NoPermission,
    /// Something else.
    #[error("cannot open {DEVICE}")]
    Open(#[source] kvm_ioctls::Error),
    /// An interface from another age.
    #[error("{DEVICE} speaks version {0} of its interface, not {KVM_API_VERSION}")]
    Version(i32),
    /// A part of it is missing.
    #[error("this host's KVM lacks {0}")]
    Missing(&'static str),
}

/// Opens KVM and checks that it has what Koya needs.
///
/// # Errors
/// What is missing and what to do about it.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = open_device()?;
    match missing(&kvm) {
        Some(name) => Err(KvmError::Missing(name)),
        None => Ok(kvm),
    }
}

/// Opens KVM. A start asks what is [`missing`] only when something failed.
pub(crate) fn open_device() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => KvmError::NoDevice,
        libc::EACCES | libc::EPERM => KvmError::NoPermission,
        _ => KvmError::Open(error),
    })?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return Err(KvmError::Version(version));
    }
    Ok(kvm)
}

/// The first of what Koya needs that this KVM does not have.
pub(crate) fn missing(kvm: &Kvm) -> Option<&'static str> {
    // Cap is neither Copy nor Clone; its number is what KVM takes.
    let lacks = |cap: &Cap| kvm.check_extension_raw(cap_number(cap)) <= 0;
    let (name, _) = NEEDED.iter().find(|(_, cap)| lacks(cap))?;
    Some(name)
}

fn cap_number(cap: &Cap) -> libc::c_ulong {
    // SAFETY: Cap is a field-less enum with representation u32, so its bytes are its number.
    let number = unsafe { *std::ptr::from_ref(cap).cast::<u32>() };
    number.into()
}

/// A virtual machine's descriptor and the memory that is mapped into it: the mapping lives at
/// least as long as the slots that point to it.
pub struct Machine {
    vm: VmFd,
    memory: Arc<Memory>,
    registers: OnceLock<RegisterPages>,
}

impl Machine {
    /// Makes a virtual machine with this memory.
    ///
    /// # Errors
    /// KVM's answer, with what it was asked for.
    pub fn new(kvm: &Kvm, memory: Arc<Memory>) -> Result<Self, (&'static str, kvm_ioctls::Error)> {
        let vm = kvm.create_vm().map_err(|e| ("make a virtual machine", e))?;
        for (slot, region) in memory.iter().enumerate() {
            let host = region
                .get_host_address(MemoryRegionAddress(0))
                .map_err(|_| ("map memory", kvm_ioctls::Error::new(libc::EFAULT)))?;
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: host as u64,
                flags: 0,
            };
            // SAFETY: the host range is the whole mapping of this region, which `memory` keeps
            // alive until the VM's descriptor is closed; slots of one VM do not overlap because
            // regions of one Memory do not.
            unsafe { vm.set_user_memory_region(region) }.map_err(|e| ("map memory", e))?;
        }
        Ok(Self {
            vm,
            memory,
            registers: OnceLock::new(),
        })
    }

    /// Lets the guest read the first `windows` pages of these registers at an address without an exit.
    /// What it writes there remains one.
    ///
    /// # Errors
    /// KVM's answer; EEXIST the second time.
    pub fn map_registers(
        &self,
        pages: &RegisterPages,
        address: u64,
        windows: usize,
    ) -> Result<(), kvm_ioctls::Error> {
        let size = (windows as u64).saturating_mul(WINDOW_SIZE);
        let region = pages.region();
        if size > region.size() as u64 {
            return Err(kvm_ioctls::Error::new(libc::EINVAL));
        }
        let kept = self.registers.set(pages.clone());
        kept.map_err(|_| kvm_ioctls::Error::new(libc::EEXIST))?;
        let region = kvm_userspace_memory_region {
            slot: self.memory.iter().count() as u32,
            guest_phys_addr: address,
            memory_size: size,
            userspace_addr: region.as_ptr() as u64,
            flags: KVM_MEM_READONLY,
        };
        // SAFETY: the host range is within the mapping of these pages, which `registers` keeps alive until
        // the VM's descriptor is closed; the slot's number is none of memory's, and KVM itself refuses a
        // range of the guest's that overlaps another.
        unsafe { self.vm.set_user_memory_region(region) }
    }

    /// The virtual machine's descriptor.
    pub fn fd(&self) -> &VmFd {
        &self.vm
    }
}
