//! Tiny guests: a few instructions each, in real mode on x86_64 and at EL1 without address translation on aarch64.
#![allow(dead_code, unused_imports, reason = "no test uses all of them")]

#[cfg(target_arch = "x86_64")]
pub(crate) mod attacks;
#[cfg(target_arch = "x86_64")]
pub(crate) mod program;

#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::*;

#[cfg(target_arch = "aarch64")]
pub(crate) use aarch64::*;

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    /// mov al, 0xfe; out 0x64, al; hlt: requests a reset from the keyboard controller.
    pub(crate) const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xf4];
    /// jmp $
    pub(crate) const SPIN: &[u8] = &[0xeb, 0xfe];
    /// cli; hlt: sleeps inside KVM forever.
    pub(crate) const HALT: &[u8] = &[0xfa, 0xf4];
    /// Counts in memory, without exits. l: inc word [0x100]; jmp l
    pub(crate) const COUNT: &[u8] = &[0xff, 0x06, 0x00, 0x01, 0xeb, 0xfa];
    /// Spins unless a port without a device reads as ones. in al, 0x99; inc al; jnz $
    pub(crate) const EMPTY_READS_AS_ONES: &[u8] = &[0xe4, 0x99, 0xfe, 0xc0, 0x75, 0xfe];
    /// lidt with a limit of zero, then a fault: lidt [0x20]; ud2
    pub(crate) const TRIPLE_FAULT: &[u8] = &[0x0f, 0x01, 0x1e, 0x20, 0x00, 0x0f, 0x0b];
}

#[cfg(target_arch = "aarch64")]
mod aarch64 {
    /// movz w0, #9; movk w0, #0x8400, lsl 16; hvc #0; b . : PSCI's SYSTEM_RESET.
    pub(crate) const RESET: &[u8] =
        &words::<4, 16>([0x5280_0120, 0x72b0_8000, 0xd400_0002, 0x1400_0000]);
    /// The same with #8: SYSTEM_OFF.
    pub(crate) const OFF: &[u8] =
        &words::<4, 16>([0x5280_0100, 0x72b0_8000, 0xd400_0002, 0x1400_0000]);
    /// b .
    pub(crate) const SPIN: &[u8] = &words::<1, 4>([0x1400_0000]);
    /// l: wfi; b l: sleeps inside KVM forever.
    pub(crate) const HALT: &[u8] = &words::<2, 8>([0xd503_207f, 0x17ff_ffff]);
    /// Counts in memory, without exits. adr x1, .+0x1000; l: ldr w0, [x1]; add w0, w0, #1; str w0, [x1]; b l
    pub(crate) const COUNT: &[u8] = &words::<5, 20>([
        0x1000_8001,
        0xb940_0020,
        0x1100_0400,
        0xb900_0020,
        0x17ff_fffd,
    ]);
    /// Spins unless an address without a device reads as ones.
    /// movz x2, #0xa00, lsl 16; ldr w1, [x2]; adds w1, w1, #1; b.ne .
    pub(crate) const EMPTY_READS_AS_ONES: &[u8] =
        &words::<4, 16>([0xd2a1_4002, 0xb940_0041, 0x3100_0421, 0x5400_0001]);

    const fn words<const WORDS: usize, const BYTES: usize>(code: [u32; WORDS]) -> [u8; BYTES] {
        assert!(BYTES == WORDS * 4);
        let mut bytes = [0; BYTES];
        let mut at = 0;
        while at < BYTES {
            bytes[at] = code[at / 4].to_le_bytes()[at % 4];
            at += 1;
        }
        bytes
    }
}
