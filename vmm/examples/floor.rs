//! The KVM calls that no monitor can do without, and nothing else: the baseline of `cargo xtask bench
//! monitor`.

use koya_devices::virtio::Memory;
use koya_vmm::internals::Machine;
use kvm_bindings::kvm_regs;
use kvm_ioctls::{Kvm, VcpuExit};
use std::error::Error;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};

/// Requests a reset, in real mode.
const CODE: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xf4];

fn main() -> Result<(), Box<dyn Error>> {
    let kvm = Kvm::new()?;
    let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 128 << 20)])?);
    memory.write_slice(CODE, GuestAddress(0x1000))?;
    let machine = Machine::new(&kvm, memory)?;
    machine.fd().set_tss_address(0xfffb_d000)?;
    machine.fd().create_irq_chip()?;
    let mut vcpu = machine.fd().create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: 0x1000,
        rflags: 2,
        ..Default::default()
    })?;
    match vcpu.run()? {
        VcpuExit::IoOut(0x64, [0xfe]) => Ok(()),
        other => Err(format!("{other:?}").into()),
    }
}
