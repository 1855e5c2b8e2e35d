//! Confinement of the threads of a process while a machine runs.

mod guests;

use guests::SPIN;
use koya_vmm::devices::rng::Rng;
use koya_vmm::{ExitReason, Spec, Vm};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const DRIVEN: [&str; 3] = ["koya-loop", "koya-starter", "koya-vcpu0"];

/// The threads of this process, and whether each has a filter.
fn threads() -> BTreeMap<String, bool> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    // A thread that has ended meanwhile has no status.
    let statuses = tasks.filter_map(|t| std::fs::read_to_string(t.path().join("status")).ok());
    let field = |status: &str, name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().to_owned()
    };
    let of = |status: String| (field(&status, "Name:"), field(&status, "Seccomp:") == "2");
    statuses.map(of).collect()
}

/// A thread confines itself after its creator has gone on.
fn become_confined(name: &str) -> bool {
    appears(name, true)
}

fn appears(name: &str, confined: bool) -> bool {
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(10) {
        if threads().get(name) == Some(&confined) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

/// One test, because both look at all threads of the process.
#[test]
fn a_machine_confines_its_own_threads_and_no_others() {
    let machine = || Vm::builder(Spec::flat(SPIN)).device(Rng::default());
    let before = threads();
    let vm = machine().start().unwrap();
    for name in DRIVEN {
        assert!(become_confined(name), "{name} is not confined");
    }
    let here = std::thread::current();
    let unconfined = |name: &str| threads().get(name) == Some(&false);
    for name in before.keys() {
        assert!(unconfined(name), "{name}, {here:?}");
    }
    assert!(vm.handle().pause() && vm.handle().resume());
    assert_eq!(vm.stop(), ExitReason::Stopped);

    let vm = machine().confined(false).start().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    for name in DRIVEN {
        assert!(appears(name, false), "{name} is confined");
    }
    assert_eq!(vm.stop(), ExitReason::Stopped);
}
