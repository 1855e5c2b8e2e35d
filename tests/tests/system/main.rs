//! Linux guests, by the `koya` command as installed.
//!
//! The tests need a KVM for Linux guests. Without one, this program starts itself again in rigs ([`rigs`]). It prints which
//! KVM it used; nothing is skipped.

mod cases;
mod command_line;
mod confinement;
mod containerd;
mod cri;
mod daemon;
mod debian;
mod disks;
mod docker;
mod exec;
mod failing_calls;
mod faults;
mod files;
mod hooks;
mod images;
mod kernel;
mod kills;
mod life;
mod long;
mod memory;
mod neighbours;
mod network;
mod oci;
mod oci_cpus;
mod oci_descriptors;
mod oci_exec;
mod oci_limits;
mod oci_listeners;
mod oci_mounts;
mod oci_net_devices;
mod oci_notify;
mod oci_seccomp;
mod oci_sysctls;
mod oci_wrong;
mod pod;
mod pod_files;
mod podman;
mod podman_networks;
mod podman_rootless;
mod privileges;
mod rigs;
mod run;
mod smoke;
mod stalled;
mod surroundings;
mod takeover;
mod timeline;
mod tool;
mod torture;
mod volumes;
mod vsock;
mod walls;
mod watches;

use libtest_mimic::{Arguments, Failed, Trial};
use std::process::ExitCode;
use std::time::Instant;

/// Number of this instance among those that run at the same time.
pub(crate) const RIG: &str = "KOYA_TEST_RIG";
/// If set, no test is run: `cargo xtask test` builds this program with the unit tests, and runs it after them.
const NONE: &str = "KOYA_TEST_NONE";

fn main() -> ExitCode {
    if std::env::var_os(NONE).is_some() {
        return ExitCode::SUCCESS;
    }
    let mut arguments = Arguments::from_args();
    let all = [
        cases::trials(),
        command_line::trials(),
        run::trials(),
        torture::trials(),
        containerd::trials(),
        cri::trials(),
        debian::trials(),
        disks::trials(),
        docker::trials(),
        exec::trials(),
        failing_calls::trials(),
        faults::trials(),
        files::trials(),
        images::trials(),
        kernel::trials(),
        kills::trials(),
        life::trials(),
        memory::trials(),
        neighbours::trials(),
        network::trials(),
        oci::trials(),
        oci_cpus::trials(),
        oci_descriptors::trials(),
        oci_exec::trials(),
        oci_limits::trials(),
        oci_listeners::trials(),
        oci_mounts::trials(),
        oci_net_devices::trials(),
        oci_notify::trials(),
        oci_seccomp::trials(),
        oci_sysctls::trials(),
        oci_wrong::trials(),
        pod_files::trials(),
        podman::trials(),
        podman_networks::trials(),
        podman_rootless::trials(),
        privileges::trials(),
        surroundings::trials(),
        timeline::trials(),
        vsock::trials(),
        walls::trials(),
        watches::trials(),
    ];
    let mut trials: Vec<Trial> = all.into_iter().flatten().collect();
    smoke::select(&mut arguments, &mut trials);
    long::select(&mut arguments, &mut trials);
    if std::env::var_os(rigs::ONLY).is_none() {
        daemon::select(&arguments, &mut trials);
    }
    let Ok(rig) = std::env::var("KOYA_RIG") else {
        if arguments.list {
            return libtest_mimic::run(&arguments, trials).exit_code();
        }
        return rigs::run(&arguments, trials).unwrap_or_else(|error| {
            eprintln!("system tests: {error:#}");
            ExitCode::FAILURE
        });
    };
    if let Ok(only) = std::env::var(rigs::ONLY) {
        trials.retain(|trial| only.lines().any(|name| name == trial.name()));
    }
    eprintln!("system tests: on the {rig} KVM");
    // Each test has its own machine, and spends most of its time waiting.
    arguments.test_threads.get_or_insert(2);
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn is_wanted(trial: &Trial, arguments: &Arguments) -> bool {
    match &arguments.filter {
        Some(filter) if arguments.exact => trial.name() == filter,
        Some(filter) => trial.name().contains(filter.as_str()),
        None => true,
    }
}

/// A test that prints its duration at the end.
pub(crate) fn trial(
    name: impl Into<String>,
    test: impl FnOnce() -> anyhow::Result<()> + Send + 'static,
) -> Trial {
    let name = name.into();
    Trial::test(name.clone(), move || {
        let _running = stalled::Running::start(&name);
        let started = Instant::now();
        let result = test();
        let seconds = started.elapsed().as_secs_f64();
        eprintln!("{}{name} {seconds:.1}", rigs::TOOK);
        result.map_err(|error| {
            // Now, since a rig may not live until the summary.
            eprintln!("system tests: {name}: {error:#}");
            Failed::without_message()
        })
    })
}

/// Tests, by the names of their functions.
#[macro_export]
macro_rules! trials {
    ($($name:ident),* $(,)?) => {
        /// This file's tests.
        pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
            vec![$($crate::trial(
                concat!(module_path!(), "::", stringify!($name)).trim_start_matches("system::"),
                $name,
            )),*]
        }
    };
}
