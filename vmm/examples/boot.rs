//! The monitor alone, as an embedder would write it: `boot KERNEL` boots it with one CPU, 128 MiB and
//! a serial port on standard output, and ends when it does. `cargo xtask bench monitor` measures it.

use koya_vmm::{Vm, VmConfig};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let kernel = std::env::args_os().nth(1).ok_or("say KERNEL")?;
    let config = VmConfig {
        memory_mib: 128,
        entropy: false,
        balloon: false,
        ..VmConfig::new(kernel)
    };
    let vm = Vm::builder(config.check()?).console(std::io::stdout());
    let reason = vm.start()?.wait();
    match reason.is_orderly() {
        true => Ok(()),
        false => Err(reason.to_string().into()),
    }
}
