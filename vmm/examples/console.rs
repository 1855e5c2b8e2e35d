//! Boots a kernel and prints its console: `cargo run --example console -- VMLINUX [INITRAMFS]`

use koya_vmm::{Vm, VmConfig};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let kernel = args.next().ok_or("usage: console VMLINUX [INITRAMFS]")?;
    let config = VmConfig {
        initramfs: args.next().map(Into::into),
        cmdline: args.collect::<Vec<_>>().join(" "),
        ..VmConfig::new(kernel)
    };
    let vm = Vm::builder(config.check()?)
        .console(std::io::stdout())
        .start()?;
    println!("the guest ended: {}", vm.wait());
    Ok(())
}
