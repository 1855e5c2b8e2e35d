//! Tests that take minutes each on an emulated KVM. A complete run omits them; they are selected by the filter `long`, or by
//! their own names.

use libtest_mimic::{Arguments, Trial};

/// Filter that selects them.
const WORD: &str = "long";

const TESTS: &[&str] = &[
    "containerd::v1.6::containers_run_and_end",
    "containerd::v1.7::containers_run_and_end",
    "containerd::v2::killed_at_any_point_nothing_is_left",
    "containerd::v2::killed_at_the_worst_moments_nothing_is_left",
    "containerd::v2::limits_hold_inside_and_outside",
    "containerd::v2::many_start_at_once",
    "cri::v1.6::a_pod_lives",
    "cri::v2::a_configuration_holds",
    "cri::v2::a_pod_has_room_and_limits",
    "cri::v2::networks_of_other_kinds",
    "cri::v2::pods_reach_each_other",
    "cri::v2::settings_and_annotations_count",
    "cri::v2::volumes_of_every_kind",
    "debian::a_build_gives_the_same_files",
    "debian::groups_of_a_container_have_device_rules_of_their_own",
    "disks::an_image_is_a_root",
    "exec::quick_execs_leave_nothing",
    "exec::two_hundred_execs_at_once_have_their_own_output",
    "failing_calls::a_run_on_a_host_whose_calls_fail_leaves_nothing",
    "failing_calls::a_runtime_on_a_host_whose_calls_fail_leaves_nothing",
    "faults::a_disk_that_fails_loses_nothing_that_was_flushed",
    "faults::a_disk_that_hangs_is_waited_for",
    "files::a_tree_survives_tar",
    "files::more_nodes_than_descriptors",
    "kills::a_user_network_killed_at_any_point_leaves_nothing",
    "memory::freed_memory_goes_back_to_the_host",
    "memory::memory_comes_and_goes_again",
    "memory::memory_may_be_a_files",
    "network::many_connections_at_once_reach_a_host_without_routes",
    "oci::hooks_run_on_the_host",
    "oci_limits::limits_of_cpus_and_disks_are_the_hosts_too",
    "oci_wrong::what_others_refuse_is_refused",
    "pod_files::v2::containers_work_on_one_volume",
    "pod_files::v2::mounts_of_the_host_come_later",
    "pod_files::v2::one_file_is_one_file",
    "podman_networks::a_kubernetes_file_is_played",
    "podman_rootless::users_have_pods_volumes_and_builds",
    "run::a_call_that_a_profile_does_not_know_is_not_there",
    "surroundings::localhost_and_the_containers_name_are_known",
    "surroundings::streams_can_be_opened_by_every_user",
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
