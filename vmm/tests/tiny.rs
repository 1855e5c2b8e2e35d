//! Tiny guests on the host's `/dev/kvm`, which also run on a KVM that emulates guests in software.

mod guests;

use guests::{COUNT, EMPTY_READS_AS_ONES, HALT, RESET, SPIN};
use koya_vmm::{ExitReason, Spec, Vm};
use std::time::{Duration, Instant};

fn start(code: &[u8]) -> Vm {
    Vm::builder(Spec::flat(code)).start().expect("a tiny guest")
}

#[test]
fn a_guest_that_resets_ends_in_order() {
    let reason = start(RESET).wait();
    assert_eq!(reason, ExitReason::Reset);
    assert!(reason.is_orderly());
}

#[test]
#[cfg(target_arch = "aarch64")] // A PC without ACPI can only be reset.
fn a_guest_that_turns_its_machine_off_ends_in_order() {
    let reason = start(guests::OFF).wait();
    assert_eq!(reason, ExitReason::Reset);
}

#[test]
fn a_guest_can_be_run_by_the_caller() {
    let reason = Vm::builder(Spec::flat(RESET)).run();
    assert_eq!(reason.expect("a tiny guest"), ExitReason::Reset);
}

#[test]
#[cfg(target_arch = "x86_64")] // Elsewhere, a guest that can't handle its faults takes one after the other.
fn a_triple_fault_is_told_apart() {
    let reason = start(guests::TRIPLE_FAULT).wait();
    assert!(
        matches!(
            reason,
            ExitReason::TripleFault { .. } | ExitReason::InternalError { .. }
        ),
        "{reason}"
    );
}

/// A guest that can't handle its faults reads the time-stamp counter, and then registers that are off limits: a processor
/// inventory number, a performance counter, its event selection, and the same for AMD.
#[test]
#[cfg(target_arch = "x86_64")]
fn other_model_specific_registers_are_a_fault() {
    let reads = |msr: u32| {
        let begin = [0x0f, 0x01, 0x1e, 0x20, 0x00, 0x66, 0xb9]; // lidt [0x20]; mov ecx, msr
        let code = [&begin[..], &msr.to_le_bytes(), &[0x0f, 0x32], RESET].concat(); // rdmsr
        start(&code).wait()
    };
    assert_eq!(reads(0x10), ExitReason::Reset);
    for msr in [0x4e, 0xc1, 0x186, 0xc001_0200] {
        let reason = reads(msr);
        assert!(!reason.is_orderly(), "{msr:#x}: {reason}");
    }
}

#[test]
fn a_guest_that_never_exits_is_stopped() {
    let vm = start(SPIN);
    assert_eq!(vm.stop(), ExitReason::Stopped);
}

#[test]
fn a_halted_guest_is_stopped() {
    assert_eq!(start(HALT).stop(), ExitReason::Stopped);
}

#[test]
fn a_paused_guest_does_not_run() {
    let vm = start(COUNT);
    let handle = vm.handle();
    for _ in 0..20 {
        assert!(handle.pause());
        assert!(handle.resume());
    }
    assert!(handle.pause());
    assert_eq!(handle.ended(), None);
    handle.stop();
    assert!(!handle.pause());
    assert!(!handle.resume());
    assert_eq!(vm.wait(), ExitReason::Stopped);
}

#[test]
fn a_guest_that_was_never_resumed_can_be_dropped() {
    drop(
        Vm::builder(Spec::flat(SPIN))
            .start_paused()
            .expect("a tiny guest"),
    );
}

/// Addresses without a device read as ones; this one resets only if it sees them.
#[test]
fn an_empty_address_floats_high() {
    let code = [EMPTY_READS_AS_ONES, RESET].concat();
    assert_eq!(start(&code).wait(), ExitReason::Reset);
}

fn entries(dir: &str) -> usize {
    std::fs::read_dir(dir).expect("proc").count()
}

fn mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("proc");
    // Memory cached by the allocator and for thread stacks does not count: guest memory and kvm_run are recognized by
    // their mappings.
    maps.lines()
        .filter(|l| l.contains("kvm") || l.contains("anon_inode"))
        .count()
}

/// Run in a process of its own (see below): the threads of other tests would be counted.
fn start_and_stop_two_hundred() {
    let threads = || entries("/proc/self/task");
    let threads_before = threads();
    let mut before = None;
    for round in 0..200 {
        let vm = start(if round % 2 == 0 { RESET } else { SPIN });
        let reason = if round % 2 == 0 { vm.wait() } else { vm.stop() };
        assert!(reason.is_orderly(), "{reason}");
        let started = Instant::now();
        // The kernel wakes a thread that joins another one before it removes the other one from the list.
        while threads() != threads_before && started.elapsed() < Duration::from_secs(5) {
            std::thread::yield_now();
        }
        assert_eq!(threads(), threads_before, "after round {round}");
        // The first round fills caches that the process keeps.
        let now = (entries("/proc/self/fd"), mappings());
        assert_eq!(*before.get_or_insert(now), now, "after round {round}");
    }
}

#[test]
fn two_hundred_machines_leave_no_thread_descriptor_or_mapping() {
    const CHILD: &str = "KOYA_TINY_CHILD";
    if std::env::var_os(CHILD).is_some() {
        start_and_stop_two_hundred();
        return;
    }
    let started = Instant::now();
    let status = std::process::Command::new(std::env::current_exe().expect("this test"))
        .args([
            "--exact",
            "two_hundred_machines_leave_no_thread_descriptor_or_mapping",
            "--test-threads=1",
            "--nocapture",
        ])
        .env(CHILD, "1")
        .status()
        .expect("this test again");
    assert!(status.success());
    assert!(started.elapsed() < Duration::from_secs(300), "hung");
}
