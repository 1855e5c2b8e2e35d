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
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

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
    /// Makes a virtual machine with this memory, but for what is plugged block by block.
    ///
    /// # Errors
    /// KVM's answer, with what it was asked for.
    pub fn new(kvm: &Kvm, memory: Arc<Memory>) -> Result<Self, (&'static str, kvm_ioctls::Error)> {
        let vm = kvm.create_vm().map_err(|e| ("make a virtual machine", e))?;
        let machine = Self {
            vm,
            memory,
            registers: OnceLock::new(),
        };
        for (slot, region) in machine.memory.iter().enumerate() {
            if region.is_pluggable() {
                continue;
            }
            let mapped = machine.map(slot, region.start_addr(), region.len());
            mapped.map_err(|e| ("map memory", e))?;
        }
        Ok(machine)
    }

    /// Lets the guest reach a part of a region that is plugged block by block, as part `index` of all such.
    ///
    /// # Errors
    /// EFAULT if it is no part of one region, else KVM's answer: EEXIST if it overlaps another.
    pub fn map_part(
        &self,
        index: usize,
        start: GuestAddress,
        len: u64,
    ) -> Result<(), kvm_ioctls::Error> {
        self.map(self.first_part() + index, start, len)
    }

    /// Takes part `index` away: when this returns, the guest does not reach it any more.
    ///
    /// # Errors
    /// KVM's answer.
    pub fn unmap_part(&self, index: usize) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot: slot_number(self.first_part() + index)?,
            // What takes a slot away.
            memory_size: 0,
            ..Default::default()
        };
        // SAFETY: without a size it names no memory.
        unsafe { self.vm.set_user_memory_region(region) }
    }

    /// How many parts can be mapped on this host.
    pub fn most_parts(&self, kvm: &Kvm) -> usize {
        kvm.get_nr_memslots().saturating_sub(self.first_part())
    }

    /// The first slot behind those of whole regions and of registers.
    fn first_part(&self) -> usize {
        self.memory.num_regions() + 1
    }

    fn map(&self, slot: usize, start: GuestAddress, len: u64) -> Result<(), kvm_ioctls::Error> {
        let fault = || kvm_ioctls::Error::new(libc::EFAULT);
        let (region, offset) = self.memory.to_region_addr(start).ok_or_else(fault)?;
        if len > region.len() - offset.raw_value() {
            return Err(fault());
        }
        // Whatever of it is plugged: the device that plugs blocks says when a part is mapped.
        let mapping = region.mapping().map_err(|_| fault())?;
        let host = mapping.offset(offset.raw_value() as usize);
        let host = host.map_err(|_| fault())?.ptr_guard_mut();
        let region = kvm_userspace_memory_region {
            slot: slot_number(slot)?,
            guest_phys_addr: start.raw_value(),
            memory_size: len,
            userspace_addr: host.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the host range lies within the mapping of this region, which `memory` keeps alive until
        // the VM's descriptor is closed; KVM itself refuses a range of the guest's that overlaps another.
        unsafe { self.vm.set_user_memory_region(region) }
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
            slot: slot_number(self.memory.num_regions())?,
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

    /// Its memory.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The virtual machine's descriptor.
    pub fn fd(&self) -> &VmFd {
        &self.vm
    }
}

fn slot_number(slot: usize) -> Result<u32, kvm_ioctls::Error> {
    u32::try_from(slot).map_err(|_| kvm_ioctls::Error::new(libc::EINVAL))
}
