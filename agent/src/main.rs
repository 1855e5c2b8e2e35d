//! PID 1 of a Koya guest: runs containers for the host.
//!
//! The same binary has two roles. As `/init` it sets the guest up ([`boot`]), connects to the host, and serves the
//! [`service`] with one thread. For each container or process it executes itself again as a [`helper`]: libcontainer forks
//! and changes process-wide state, which only a single-threaded process may do. Processes that the helper leaves behind
//! become children of PID 1, and the [`reaper`] collects them.
//!
//! PID 1 must not end: if it does, the kernel panics and the monitor reports the panic's text as
//! the reason. That is the intended way for a fatal error here.

mod affinity;
mod blocking;
mod boot;
mod cgroup;
mod checks;
mod clock;
mod configuration;
mod console;
mod cpus;
mod details;
mod device_rules;
mod disks;
mod enosys_filter;
mod executor;
mod helper;
mod images;
mod late_mounts;
mod mappings;
mod names;
mod network;
mod notify;
mod oom;
mod places;
mod privileges;
mod reaper;
mod refused_options;
mod root_setup;
mod service;
mod slots;
mod sockets;
mod start_hooks;
mod state;
mod streams;
#[allow(unsafe_code)] // The one place for system calls that no safe crate wraps.
mod sys;
mod sysctl;
mod tmpfs;
mod user_namespace;
mod volumes;
mod watches;

use koya_protocol::messages::GuestTimes;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).map(String::as_str) == Some(places::ARGUMENT) {
        return helper::main(&args[2..]);
    }
    if args.get(1).map(String::as_str) == Some(places::PAUSE) {
        helper::pause_main();
    }
    if let Some(file) = args.first().and_then(|name| mappings::file_of(name)) {
        return mappings::main(file, &args[1..]);
    }
    if std::process::id() != 1 {
        eprintln!("koya-agent is the init of a Koya guest and does nothing elsewhere");
        return ExitCode::FAILURE;
    }
    let times = GuestTimes {
        agent_started_ns: details::uptime_ns(),
        ..Default::default()
    };
    if let Err(error) = run(times) {
        // The monitor shows the kernel's log of a guest that has ended.
        sys::kernel_log(&format!("koya-agent: {error:#}"));
    }
    ExitCode::FAILURE
}

fn run(mut times: GuestTimes) -> anyhow::Result<()> {
    boot::set_up(&mut times)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(service::serve(times))
}
