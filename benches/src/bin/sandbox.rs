//! What a sandbox costs as it stands: time to start and private memory beyond the guest's.
//!
//! `cargo run --release --package koya-benches --bin sandbox` measures tiny guests on this
//! machine's `/dev/kvm`; `cargo xtask rig -- target/release/sandbox linux` measures whole sandboxes
//! where Linux guests run. Medians of several rounds.

use koya_vmm::{Spec, Vm};
use std::error::Error;
use std::fs;
use std::time::{Duration, Instant};

const TINY_ROUNDS: usize = 41;
const LINUX_ROUNDS: usize = 7;
/// Memory of the measured sandbox, in MiB.
const MEMORY_MIB: u64 = 256;

fn main() -> Result<(), Box<dyn Error>> {
    match std::env::args().nth(1).as_deref() {
        None => tiny(),
        Some("linux") => linux(),
        Some(other) => Err(format!("{other:?}: say nothing, or `linux`").into()),
    }
}

fn median(mut all: Vec<Duration>) -> Duration {
    all.sort();
    all[all.len() / 2]
}

/// A guest whose first instructions ask for a reset: from the call to the end, and the CPU time
/// of it.
fn tiny() -> Result<(), Box<dyn Error>> {
    const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xf4];
    let (mut first, mut whole) = (Vec::new(), Vec::new());
    for _ in 0..TINY_ROUNDS {
        let started = Instant::now();
        let vm = Vm::builder(Spec::flat(RESET)).start()?;
        vm.handle().wait_ended();
        first.push(started.elapsed());
        drop(vm);
        whole.push(started.elapsed());
    }
    println!(
        "tiny guest: call to first instruction's exit  {:?}",
        median(first)
    );
    println!(
        "tiny guest: call to everything taken down     {:?}",
        median(whole)
    );
    Ok(())
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
        beyond = private_kib_beyond_guest()?;
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

/// Private pages of this process, without the mapping that is the guest's memory.
fn private_kib_beyond_guest() -> Result<u64, Box<dyn Error>> {
    let smaps = fs::read_to_string("/proc/self/smaps")?;
    let (mut total, mut size) = (0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), value) = (words.next(), words.next()) else {
            continue;
        };
        let value = || value.and_then(|v| v.parse::<u64>().ok()).unwrap_or(0);
        match name {
            "Size:" => size = value(),
            "Private_Clean:" | "Private_Dirty:" if size < MEMORY_MIB << 10 => total += value(),
            _ => {}
        }
    }
    Ok(total)
}
