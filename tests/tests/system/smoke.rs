//! A quick overall check: tests of each architecture-dependent part. They take some minutes on emulated hosts, and are
//! selected by the filter `smoke`.

use libtest_mimic::{Arguments, Trial};

/// Filter that selects them.
const WORD: &str = "smoke";

const TESTS: &[&str] = &[
    "run::the_kernel_is_koyas",
    "run::the_exit_status_is_passed_through",
    "run::every_cpu_is_there",
    "run::volumes_and_tmpfs",
    "run::dangerous_system_calls_are_refused",
    "run::a_panic_is_reported_with_its_text",
    "disks::a_disk_holds_a_file_system",
    "disks::disks_come_and_go_while_a_container_runs",
];

/// Keeps only these tests if they are selected.
pub(crate) fn select(arguments: &mut Arguments, trials: &mut Vec<Trial>) {
    if arguments.filter.as_deref() != Some(WORD) {
        return;
    }
    arguments.filter = None;
    let all = trials.len();
    trials.retain(|trial| TESTS.contains(&trial.name()));
    assert!(
        trials.len() == TESTS.len(),
        "{} of {all} tests, not {}",
        trials.len(),
        TESTS.len()
    );
}
