//! A minimal embedder: `boot KERNEL [INITRAMFS [PARAMETERS]]` boots a kernel with one CPU, 128 MiB and a
//! serial port on standard output, and exits with it. PARAMETERS are added to the kernel command line. `cargo
//! xtask bench monitor` and `cargo xtask bench peers` measure it.

use koya_vmm::{Vm, VmConfig};
use std::error::Error;

/// The allocator of the `koya` command.
#[cfg(target_env = "musl")]
#[global_allocator]
static HEAP: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> Result<(), Box<dyn Error>> {
    koya_vmm::host::process::prepare_process();
    let mut args = std::env::args().skip(1);
    let kernel = args.next().ok_or("say KERNEL [INITRAMFS [WORDS]]")?;
    let config = VmConfig {
        initramfs: args.next().map(Into::into),
        cmdline: args.next().unwrap_or_default(),
        memory_mib: 128,
        entropy: false,
        balloon: false,
        ..VmConfig::new(kernel)
    };
    let vm = Vm::builder(config.check()?).console(std::io::stdout());
    let reason = vm.run()?;
    match reason.is_orderly() {
        true => Ok(()),
        false => Err(reason.to_string().into()),
    }
}
