//! A virtual machine as KVM has it, and the memory that is mapped into it.

use crate::arch::ArchError;
use koya_devices::virtio::Memory;
use koya_devices::virtio::mmio::WINDOW_SIZE;
use koya_devices::virtio::registers::RegisterPages;
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use std::sync::{Arc, OnceLock};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

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
    pub fn new(kvm: &Kvm, memory: Arc<Memory>) -> Result<Self, ArchError> {
        let vm = kvm
            .create_vm()
            .map_err(ArchError::kvm("make a virtual machine"))?;
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
        // the VM's descriptor is closed; KVM itself refuses a range of the guest that overlaps another.
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
        // range of the guest that overlaps another.
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
