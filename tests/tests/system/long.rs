//! Tests that take minutes each on an emulated KVM. A complete run omits them; they are selected by the filter `long`, or by
//! their own names.

use libtest_mimic::{Arguments, Trial};

/// Filter that selects them.
const WORD: &str = "long";

const TESTS: &[&str] = &[
    "containerd::v1.7::containers_run_and_end",
    "cri::v1.6::a_pod_lives",
    "cri::v2::networks_of_other_kinds",
    "debian::a_build_gives_the_same_files",
    "exec::two_hundred_execs_at_once_have_their_own_output",
    "files::a_tree_survives_tar",
    "memory::memory_comes_and_goes_again",
    "network::many_connections_at_once_reach_a_host_without_routes",
    "oci_wrong::what_others_refuse_is_refused",
    "podman_networks::a_kubernetes_file_is_played",
    "podman_rootless::users_have_pods_volumes_and_builds",
    "vsock::thousands_of_streams_at_once",
];

/// Keeps only these tests if they are selected, and removes them if there is no filter.
pub(crate) fn select(arguments: &mut Arguments, trials: &mut Vec<Trial>) {
    let all = trials.len();
    let is_long = |trial: &Trial| TESTS.contains(&trial.name());
    match arguments.filter.as_deref() {
        Some(WORD) => {
            arguments.filter = None;
            trials.retain(is_long);
            assert_eq!(trials.len(), TESTS.len(), "of {all} tests");
        }
        Some(_) => {}
        None if arguments.list => {}
        None => {
            trials.retain(|trial| !is_long(trial));
            // Printed once, not in each rig.
            if std::env::var_os(crate::rigs::ONLY).is_some() {
                return;
            }
            eprintln!(
                "system tests: {} long tests are left out; `cargo xtask test {WORD}` runs them",
                all - trials.len()
            );
        }
    }
}
