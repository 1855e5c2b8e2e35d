//! What a sandbox costs as it stands: time to start and private memory beyond the guest's.
//!
//! `cargo run --release --package koya-benches --bin sandbox` measures tiny guests on this
//! machine's `/dev/kvm`; `cargo xtask rig -- target/release/sandbox linux` measures whole sandboxes
//! where Linux guests run. Medians of several rounds.

use koya_vmm::{Spec, Vm};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use std::error::Error;
use std::process::Command;
use std::time::{Duration, Instant};

const TINY_ROUNDS: usize = 41;
const LINUX_ROUNDS: usize = 7;
/// Memory of the measured sandbox, in MiB.
const MEMORY_MIB: u64 = 256;

/// The first argument of the process that is measured as a whole.
const ONCE: &str = "once";
/// A guest whose first instructions ask for a reset.
const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xf4];

fn main() -> Result<(), Box<dyn Error>> {
    match std::env::args().nth(1).as_deref() {
        None => tiny(),
        Some(ONCE) => {
            Vm::builder(Spec::flat(RESET)).start()?.wait();
            Ok(())
        }
        Some("linux") => linux(),
        Some(other) => Err(format!("{other:?}: say nothing, or `linux`").into()),
    }
}

fn median(mut all: Vec<Duration>) -> Duration {
    all.sort();
    all[all.len() / 2]
}

/// From the call to the guest's first exit and to the end; and a whole process that does the same
/// beside one that does nothing, as CPU time, since the end of a virtual machine waits for the
/// kernel.
fn tiny() -> Result<(), Box<dyn Error>> {
    let (mut first, mut whole) = (Vec::new(), Vec::new());
    let (mut process, mut nothing) = (Vec::new(), Vec::new());
    let own = std::env::current_exe()?;
    for _ in 0..TINY_ROUNDS {
        let started = Instant::now();
        let vm = Vm::builder(Spec::flat(RESET)).start()?;
        vm.handle().wait_ended();
        first.push(started.elapsed());
        drop(vm);
        whole.push(started.elapsed());
        process.push(cpu_of(Command::new(&own).arg(ONCE))?);
        nothing.push(cpu_of(&mut Command::new("/bin/true"))?);
    }
    let show = |what: &str, all| println!("tiny guest: {what:<40} {:>9.2?}", median(all));
    show("call to first instruction's exit", first);
    show("call to everything taken down", whole);
    show("CPU from exec to exit", process);
    show("CPU from exec to exit, /bin/true", nothing);
    Ok(())
}

/// The CPU time of a child, user and system.
fn cpu_of(command: &mut Command) -> Result<Duration, Box<dyn Error>> {
    let used = || -> Result<Duration, Box<dyn Error>> {
        let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
        let micros = [usage.user_time(), usage.system_time()].map(|t| t.num_microseconds());
        Ok(Duration::from_micros(
            micros.iter().sum::<i64>().try_into()?,
        ))
    };
    let before = used()?;
    if !command.status()?.success() {
        return Err(format!("{command:?} failed").into());
    }
    Ok(used()? - before)
}

fn linux() -> Result<(), Box<dyn Error>> {
    let mut ready = Vec::new();
    let mut kernel = Vec::new();
    let mut beyond = 0;
    for _ in 0..LINUX_ROUNDS {
        let config = koya::SandboxConfig {
            memory_mib: MEMORY_MIB,
            ..koya::SandboxConfig::default()
        };
        let sandbox = koya::Sandbox::start(&config)?;
        ready.push(sandbox.ready_after());
        kernel.push(sandbox.stats()?.uptime);
        beyond = sandbox.machine().memory_usage()?.overhead / 1024;
        sandbox.stop();
    }
    println!(
        "sandbox: call to agent ready                  {:.2?}",
        median(ready)
    );
    println!(
        "sandbox: guest kernel's clock after that      {:.2?}",
        median(kernel)
    );
    println!("sandbox: private memory beyond the guest's    {beyond} KiB");
    Ok(())
}
