//! A KVM virtual machine and the memory mapped into it.

use crate::arch::ArchError;
use koya_devices::virtio::Memory;
use koya_devices::virtio::mmio::MMIO_SLOT_SIZE;
use koya_devices::virtio::registers::RegisterPages;
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use std::sync::{Arc, OnceLock};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// A VM's file descriptor and its guest memory: the memory stays mapped at least as long as the memory slots
/// that refer to it.
pub struct Machine {
    vm: VmFd,
    memory: Arc<Memory>,
    registers: OnceLock<RegisterPages>,
}

impl Machine {
    /// Creates a virtual machine with this memory. Pluggable regions are not registered with KVM yet.
    ///
    /// # Errors
    /// The error from KVM, with the operation that failed.
    pub fn new(kvm: &Kvm, memory: Arc<Memory>) -> Result<Self, ArchError> {
        let vm = create_vm(kvm).map_err(ArchError::kvm("make a virtual machine"))?;
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
            mapped.map_err(ArchError::kvm("map memory"))?;
        }
        Ok(machine)
    }

    /// Registers part of a pluggable region as memory slot `index` of all pluggable slots.
    ///
    /// # Errors
    /// EFAULT if the range is not within one region, otherwise the error from KVM: EEXIST if it overlaps
    /// another slot.
    pub fn map_slot(
        &self,
        index: usize,
        start: GuestAddress,
        len: u64,
    ) -> Result<(), kvm_ioctls::Error> {
        self.map(self.first_slot() + index, start, len)
    }

    /// Removes pluggable slot `index`: when this returns, the guest can no longer access it.
    ///
    /// # Errors
    /// The error from KVM.
    pub fn unmap_slot(&self, index: usize) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot: slot_number(self.first_slot() + index)?,
            // A size of zero removes the slot.
            memory_size: 0,
            ..Default::default()
        };
        // SAFETY: with size zero the slot refers to no memory.
        unsafe { self.vm.set_user_memory_region(region) }
    }

    /// Number of pluggable memory slots that this host supports.
    pub fn max_slots(&self, kvm: &Kvm) -> usize {
        kvm.get_nr_memslots().saturating_sub(self.first_slot())
    }

    /// Number of the first pluggable slot, after the slots of whole regions and of register pages.
    fn first_slot(&self) -> usize {
        self.memory.num_regions() + 1
    }

    fn map(&self, slot: usize, start: GuestAddress, len: u64) -> Result<(), kvm_ioctls::Error> {
        let fault = || kvm_ioctls::Error::new(libc::EFAULT);
        let (region, offset) = self.memory.to_region_addr(start).ok_or_else(fault)?;
        if len > region.len() - offset.raw_value() {
            return Err(fault());
        }
        // The whole mapping, plugged or not: the device decides when a slot is registered.
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
        // the VM's descriptor is closed; KVM itself refuses a range of the guest that overlaps another.
        unsafe { self.vm.set_user_memory_region(region) }
    }

    /// Maps the first `count` of these register pages read-only at a guest address, so that reads do not
    /// exit. Writes still do.
    ///
    /// # Errors
    /// The error from KVM; EEXIST on the second call.
    pub fn map_registers(
        &self,
        pages: &RegisterPages,
        address: u64,
        count: usize,
    ) -> Result<(), kvm_ioctls::Error> {
        let size = (count as u64).saturating_mul(MMIO_SLOT_SIZE);
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
        // the VM's descriptor is closed; the slot number is not used for memory, and KVM itself refuses a
        // guest range that overlaps another.
        unsafe { self.vm.set_user_memory_region(region) }
    }

    /// The guest memory.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The VM's file descriptor.
    pub fn fd(&self) -> &VmFd {
        &self.vm
    }
}

#[cfg(target_arch = "x86_64")]
fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    kvm.create_vm()
}

/// With guest physical addresses as wide as the host allows, up to the 48 bits that guests use: the default
/// of 40 is too wide for some hosts, and too narrow for large guests.
#[cfg(target_arch = "aarch64")]
fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    match u32::try_from(kvm.get_host_ipa_limit()) {
        Ok(limit @ 1..) => kvm.create_vm_with_ipa_size(limit.min(48)),
        _ => kvm.create_vm(),
    }
}

fn slot_number(slot: usize) -> Result<u32, kvm_ioctls::Error> {
    u32::try_from(slot).map_err(|_| kvm_ioctls::Error::new(libc::EINVAL))
}
