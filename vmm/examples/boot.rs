//! A minimal embedder: `boot [--confined] KERNEL [INITRAMFS [PARAMETERS]]` boots a kernel with one CPU, 128 MiB and a
//! serial port on standard output, and exits with it. PARAMETERS are added to the kernel command line. The vCPU runs on the
//! main thread, or with `--confined` on a thread of its own, with a seccomp filter. `cargo xtask bench monitor` and `cargo
//! xtask bench peers` measure it.

use koya_vmm::{Vm, VmConfig};
use std::error::Error;

/// The allocator of the `koya` command.
#[cfg(target_env = "musl")]
#[global_allocator]
static HEAP: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> Result<(), Box<dyn Error>> {
    koya_vmm::host::process::prepare_process();
    let mut args = std::env::args().skip(1).peekable();
    let is_confined = args.next_if_eq("--confined").is_some();
    let kernel = args
        .next()
        .ok_or("say [--confined] KERNEL [INITRAMFS [WORDS]]")?;
    let config = VmConfig {
        initramfs: args.next().map(Into::into),
        cmdline: args.next().unwrap_or_default(),
        memory_mib: 128,
        entropy: false,
        balloon: false,
        ..VmConfig::new(kernel)
    };
    let vm = Vm::builder(config.check()?).console(std::io::stdout());
    let reason = match is_confined {
        true => vm.start()?.wait(),
        false => vm.run()?,
    };
    match reason.is_orderly() {
        true => Ok(()),
        false => Err(reason.to_string().into()),
    }
}
