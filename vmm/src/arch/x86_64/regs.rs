//! Initial vCPU state.
//!
//! Register values are computed by separate functions so that tests can apply the VM-entry checks of VT-x
//! (Intel SDM volume 3, chapter 27.3.1), which are stricter than those of SVM.

use super::super::ArchError;
use super::layout;
use kvm_bindings::{
    Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::VcpuFd;

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always one.
const RFLAGS_RESERVED: u64 = 2;

/// Model-specific registers at power-on; KVM leaves those that are not set undefined.
pub(super) fn set_msrs(vcpu: &VcpuFd) -> Result<(), ArchError> {
    const IA32_SYSENTER_CS: u32 = 0x174;
    const IA32_SYSENTER_ESP: u32 = 0x175;
    const IA32_SYSENTER_EIP: u32 = 0x176;
    const IA32_MISC_ENABLE: u32 = 0x1a0;
    const FAST_STRINGS: u64 = 1;
    const STAR: u32 = 0xc000_0081;
    const LSTAR: u32 = 0xc000_0082;
    const CSTAR: u32 = 0xc000_0083;
    const SYSCALL_MASK: u32 = 0xc000_0084;
    const KERNEL_GS_BASE: u32 = 0xc000_0102;
    let values = [
        (IA32_SYSENTER_CS, 0),
        (IA32_SYSENTER_ESP, 0),
        (IA32_SYSENTER_EIP, 0),
        (STAR, 0),
        (CSTAR, 0),
        (KERNEL_GS_BASE, 0),
        (SYSCALL_MASK, 0),
        (LSTAR, 0),
        (IA32_MISC_ENABLE, FAST_STRINGS),
    ];
    let entries: Vec<_> = values
        .iter()
        .map(|(index, data)| kvm_msr_entry {
            index: *index,
            data: *data,
            ..Default::default()
        })
        .collect();
    let msrs = Msrs::from_entries(&entries).map_err(ArchError::load("MSRs"))?;
    let set = vcpu
        .set_msrs(&msrs)
        .map_err(ArchError::kvm("set a vCPU's MSRs"))?;
    if set != entries.len() {
        return Err(ArchError::Load {
            what: "MSRs",
            source: format!("KVM refused MSR {:#x}", entries[set].index).into(),
        });
    }
    Ok(())
}

/// The x87 and SSE control words after FNINIT.
pub(super) fn set_fpu(vcpu: &VcpuFd) -> Result<(), ArchError> {
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu)
        .map_err(ArchError::kvm("set a vCPU's floating-point state"))
}

/// Local interrupt pins: LINT0 receives PIC interrupts, LINT1 the NMI.
pub(super) fn set_lapic(vcpu: &VcpuFd) -> Result<(), ArchError> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const MODE_EXTINT: u32 = 7;
    const MODE_NMI: u32 = 4;
    let mut lapic = vcpu
        .get_lapic()
        .map_err(ArchError::kvm("read a local APIC"))?;
    set_delivery_mode(&mut lapic, LVT_LINT0, MODE_EXTINT);
    set_delivery_mode(&mut lapic, LVT_LINT1, MODE_NMI);
    vcpu.set_lapic(&lapic)
        .map_err(ArchError::kvm("set a local APIC"))
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let mut bytes = [0; 4];
    for (byte, raw) in bytes.iter_mut().zip(&lapic.regs[register..]) {
        *byte = *raw as u8;
    }
    let value = u32::from_le_bytes(bytes) & !0x700 | mode << 8;
    for (raw, byte) in lapic.regs[register..].iter_mut().zip(value.to_le_bytes()) {
        *raw = byte as _;
    }
}

/// Enters long mode at `rip`, with the address of the boot parameters in RSI.
pub(super) fn enter_long_mode(vcpu: &VcpuFd, rip: u64) -> Result<(), ArchError> {
    let sregs = vcpu
        .get_sregs()
        .map_err(ArchError::kvm("read a vCPU's system registers"))?;
    vcpu.set_sregs(&long_mode_sregs(sregs))
        .map_err(ArchError::kvm("set a vCPU's system registers"))?;
    vcpu.set_regs(&long_mode_regs(rip))
        .map_err(ArchError::kvm("set a vCPU's registers"))
}

/// Enters real mode at address 0.
pub(super) fn enter_real_mode(vcpu: &VcpuFd) -> Result<(), ArchError> {
    let mut sregs = vcpu
        .get_sregs()
        .map_err(ArchError::kvm("read a vCPU's system registers"))?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs)
        .map_err(ArchError::kvm("set a vCPU's system registers"))?;
    let regs = kvm_regs {
        rflags: RFLAGS_RESERVED,
        rsp: 0x1000,
        ..Default::default()
    };
    vcpu.set_regs(&regs)
        .map_err(ArchError::kvm("set a vCPU's registers"))
}

fn long_mode_regs(rip: u64) -> kvm_regs {
    kvm_regs {
        rip,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        rsi: layout::ZERO_PAGE,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    }
}

fn long_mode_sregs(mut sregs: kvm_sregs) -> kvm_sregs {
    // boot.rst: CS __BOOT_CS (0x10), the data segments __BOOT_DS (0x18), flat, paging on.
    let code = segment(2, 0xb, true);
    let data = segment(3, 0x3, false);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs) = (data, data, data);
    (sregs.gs, sregs.ss) = (data, data);
    sregs.tr = kvm_segment {
        selector: 4 << 3,
        limit: 0x67,
        // 64-bit TSS, busy: VM entry accepts no other type.
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    sregs.ldt = kvm_segment {
        unusable: 1,
        ..Default::default()
    };
    sregs.gdt.base = layout::BOOT_GDT;
    sregs.gdt.limit = (8 * gdt().len() - 1) as u16;
    sregs.idt.base = layout::BOOT_IDT;
    sregs.idt.limit = 7;
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    sregs.cr3 = layout::PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    sregs
}

fn segment(index: u16, type_: u8, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index << 3,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// The boot GDT: null, unused, code, data, and a task state segment in two entries.
pub(super) fn gdt() -> [u64; 6] {
    [
        0,
        0,
        // 4 GiB, present, DPL 0, long-mode code, accessed
        0x00af_9b00_0000_ffff,
        // 4 GiB, present, DPL 0, data, accessed
        0x00cf_9300_0000_ffff,
        // 0x67 bytes at 0, present, busy 64-bit TSS
        0x0000_8b00_0000_0067,
        0,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Intel SDM volume 3, 27.3.1.1: guest control registers, debug registers and MSRs.
    #[test]
    fn control_registers_pass_vm_entry() {
        let sregs = long_mode_sregs(kvm_sregs::default());
        // Fixed by IA32_VMX_CR0_FIXED0 on every VT-x CPU: PE, NE, PG.
        for bit in [CR0_PE, CR0_NE, CR0_PG] {
            assert_ne!(sregs.cr0 & bit, 0);
        }
        // NW without CD is refused.
        assert_eq!(sregs.cr0 & (1 << 29 | 1 << 30), 0);
        // IA-32e mode needs PAE; LMA must equal the entry control, LME must equal LMA.
        assert_ne!(sregs.cr4 & CR4_PAE, 0);
        assert_eq!(sregs.efer, EFER_LME | EFER_LMA);
        assert_eq!(sregs.cr3 & 0xfff, 0);
        // VMXE and reserved bits are set by KVM.
        assert_eq!(sregs.cr4 >> 23, 0);
    }

    /// 27.3.1.2: guest segment registers.
    #[test]
    fn segments_pass_vm_entry() {
        let sregs = long_mode_sregs(kvm_sregs::default());
        let cs = sregs.cs;
        assert!([9, 11, 13, 15].contains(&cs.type_), "accessed code");
        assert_eq!((cs.s, cs.present, cs.l, cs.db), (1, 1, 1, 0));
        assert_eq!(cs.dpl, sregs.ss.dpl);
        for data in [sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs] {
            assert!([3, 7].contains(&data.type_), "writable, accessed data");
            assert_eq!((data.s, data.present, data.dpl), (1, 1, 0));
            assert_eq!(data.selector & 7, 0, "RPL 0, from the GDT");
            assert_eq!(data.base >> 32, 0);
        }
        for segment in [cs, sregs.ss, sregs.ds, sregs.tr] {
            // Granularity: low limit bits all ones need no G, high bits need G.
            let low_zero = segment.limit & 0xfff != 0xfff;
            let high_set = segment.limit >> 20 != 0;
            assert!(!(low_zero && segment.g == 1));
            assert!(!(high_set && segment.g == 0));
        }
    }

    #[test]
    fn task_register_passes_vm_entry() {
        let tr = long_mode_sregs(kvm_sregs::default()).tr;
        assert_eq!(tr.type_, 11, "busy 64-bit TSS");
        assert_eq!((tr.s, tr.present, tr.unusable), (0, 1, 0));
        assert_eq!(tr.selector & 4, 0, "TI is 0");
        assert!(tr.limit >= 0x67);
    }

    /// 27.3.1.3 and 27.3.1.4: descriptor tables, RIP and RFLAGS.
    #[test]
    fn tables_and_flags_pass_vm_entry() {
        let sregs = long_mode_sregs(kvm_sregs::default());
        assert_eq!(sregs.gdt.base >> 47, 0);
        assert_eq!(usize::from(sregs.gdt.limit), 8 * gdt().len() - 1);
        assert!(
            sregs.gdt.base + 8 * gdt().len() as u64 <= sregs.idt.base,
            "apart"
        );
        assert!(usize::from(sregs.tr.selector) + 15 <= usize::from(sregs.gdt.limit));
        let regs = long_mode_regs(0x100_0000);
        // Bit 1 is one; bits 3, 5, 15, 22 and up are zero; VM is zero in IA-32e mode.
        assert_eq!(regs.rflags & 2, 2);
        assert_eq!(regs.rflags & !0x3f_7fd7, 0);
        assert_eq!(regs.rflags & 1 << 17, 0);
    }

    /// The descriptors a guest would reload match the initial segment registers.
    #[test]
    fn the_table_agrees_with_the_registers() {
        let table = gdt();
        let sregs = long_mode_sregs(kvm_sregs::default());
        for segment in [sregs.cs, sregs.ds, sregs.tr] {
            let descriptor = table[usize::from(segment.selector >> 3)];
            assert_eq!((descriptor >> 40 & 0xf) as u8, segment.type_);
            assert_eq!((descriptor >> 44 & 1) as u8, segment.s);
            assert_eq!((descriptor >> 47 & 1) as u8, segment.present);
            assert_eq!((descriptor >> 53 & 1) as u8, segment.l);
            assert_eq!((descriptor >> 55 & 1) as u8, segment.g);
        }
    }
}
