//! The tiny guest common to all architectures, on the host's `/dev/kvm`.

use koya_vmm::{ExitReason, Spec, Vm};

#[test]
fn a_guest_counts_down_and_resets() {
    for rounds in [1, 0x1_0001] {
        let reason = Vm::builder(Spec::probe_guest(rounds))
            .start()
            .unwrap()
            .wait();
        assert_eq!(reason, ExitReason::Reset);
    }
}

#[test]
fn a_guest_that_is_paused_goes_on() {
    let vm = Vm::builder(Spec::probe_guest(50_000))
        .start_paused()
        .unwrap();
    let handle = vm.handle();
    assert_eq!(handle.ended(), None);
    assert!(handle.resume());
    for _ in 0..5 {
        // Once it has ended, it can be neither paused nor resumed.
        let _ = handle.pause() && handle.resume();
    }
    assert_eq!(handle.wait_exit(), ExitReason::Reset);
    assert!(!handle.resume());
}
