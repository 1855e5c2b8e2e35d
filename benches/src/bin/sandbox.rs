//! What a sandbox costs as it stands: time to start and private memory beyond the guest's.
//!
//! `cargo run --release --package koya-benches --bin sandbox` measures tiny guests on this
//! machine's `/dev/kvm`; `cargo xtask rig -- target/release/sandbox linux` measures whole sandboxes
//! where Linux guests run. Medians of several rounds.

use koya::{DiskConfig, HostEnd, NetworkConfig, SandboxConfig};
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
/// The same, for what a process holds by the devices of its guest: the place in [`SETS`] follows.
const DEVICES: &str = "devices";

type Change = fn(&mut SandboxConfig);

/// What a sandbox may have beyond files, vsock, a balloon, entropy and a console.
const SETS: &[(&str, Change)] = &[
    ("files, vsock, balloon, entropy, console", |_| {}),
    ("... and a disk", |config| {
        config.disks.push(DiskConfig {
            read_only: true,
            ..DiskConfig::new("/dev/vda")
        });
    }),
    ("... and a network (a tap)", |config| {
        config.networks.push(NetworkConfig::new(HostEnd::Tap {
            name: String::new(),
            address: None,
        }));
    }),
    ("... and room for 4 GiB more memory", |config| {
        config.memory_max_mib = Some(config.memory_mib + 4096);
    }),
    ("... and three more CPUs", |config| config.cpus = 4),
];

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
        Some(DEVICES) => one_set(std::env::args().nth(2).unwrap_or_default().parse()?),
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
    for _ in 0..LINUX_ROUNDS {
        let sandbox = koya::Sandbox::start(&plain())?;
        ready.push(sandbox.ready_after());
        kernel.push(sandbox.stats()?.uptime);
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
    println!("private memory of the process beyond the guest's, by what the guest has:");
    let own = std::env::current_exe()?;
    for (place, (name, _)) in SETS.iter().enumerate() {
        // Each in a process of its own: what one leaves to the allocator is not the next one's.
        let place = place.to_string();
        let output = Command::new(&own).args([DEVICES, &place]).output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        let said = match output.status.success() {
            true => said.trim().to_owned(),
            false => format!(
                "not here: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            ),
        };
        println!("  {name:<42} {said}");
    }
    Ok(())
}

fn plain() -> SandboxConfig {
    SandboxConfig {
        memory_mib: MEMORY_MIB,
        ..SandboxConfig::default()
    }
}

/// What this process holds with one guest.
fn one_set(place: usize) -> Result<(), Box<dyn Error>> {
    let (_, change) = SETS.get(place).ok_or("no such set")?;
    let mut config = plain();
    change(&mut config);
    let sandbox = koya::Sandbox::start(&config)?;
    let held = sandbox.machine().memory_usage()?.overhead / 1024;
    println!("{held} KiB");
    sandbox.stop();
    Ok(())
}
