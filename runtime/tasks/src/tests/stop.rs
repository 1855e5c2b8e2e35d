//! Start, size and end of the virtual machine.

use super::{LIMIT, Rig, TIMEOUTS};
use crate::Error;
use koya::oci_spec::runtime as oci;
use koya::vmm::ExitReason;
use std::time::{Duration, Instant};

#[test]
fn annotations_of_a_user_do_not_lead_into_another_machine() {
    let rig = Rig::new();
    let refused = |rig: &Rig, id: &str| match rig.create_in_pod(id) {
        Err(Error::FailedPrecondition(text)) => assert!(text.contains("pod"), "{text}"),
        other => panic!("{other:?}"),
    };
    // No pod, and then a container that is none.
    refused(&rig, "c");
    rig.create("pod").unwrap();
    refused(&rig, "c");
}

#[test]
fn a_stop_during_the_start_keeps_its_limit() {
    let rig = Rig::new();
    rig.guest.hold("boot");
    let created = rig.create_behind("c");
    rig.guest.await_call("boot");
    let began = Instant::now();
    rig.set.stop();
    assert!(began.elapsed() < TIMEOUTS.start, "{:?}", began.elapsed());
    rig.set.finish();
    assert!(began.elapsed() < LIMIT, "{:?}", began.elapsed());
    assert!(created.try_recv().is_err(), "the start goes on");
    // A machine started meanwhile is torn down.
    rig.guest.release("boot");
    let error = created.recv_timeout(LIMIT).unwrap().unwrap_err();
    assert!(
        error.to_string().contains("stopped while it started"),
        "{error}"
    );
    assert!(rig.guest.was_called("kill machine"));
    assert!(!rig.guest.was_called("create c"));
    assert!(rig.create("d").is_err(), "nothing starts again");
}

#[test]
fn one_that_is_killed_during_the_start_of_its_machine_has_ended_at_once() {
    let rig = Rig::new();
    rig.create_late("c").unwrap();
    rig.guest.hold("boot");
    let started = rig.behind(|set| set.start("c", ""));
    rig.guest.await_call("boot");
    rig.set.kill("c", "", 9, true).unwrap();
    assert_eq!(rig.set.wait("c", "").unwrap().status, 137);
    rig.guest.release("boot");
    assert!(started.recv_timeout(LIMIT).unwrap().is_err());
    assert_eq!(rig.events(), ["create c", "exit c 137"]);
    assert!(rig.guest.was_called("kill machine"));
    rig.set.delete("c", "").unwrap();
    assert!(rig.set.is_empty());
}

#[test]
fn one_that_was_not_started_is_ended_by_what_ends_a_process() {
    let rig = Rig::new();
    rig.create_late("late").unwrap();
    for ignored in [17, 18, 19, 28] {
        rig.set.kill("late", "", ignored, false).unwrap();
    }
    rig.set.kill("late", "", 1, false).unwrap();
    assert_eq!(rig.set.wait("late", "").unwrap().status, 129);

    // The guest has this one.
    let rig = Rig::new();
    rig.create("c").unwrap();
    rig.set.kill("c", "", 19, false).unwrap();
    assert!(!rig.guest.was_called("kill c"));
    rig.set.kill("c", "", 15, false).unwrap();
    assert!(rig.guest.was_called("kill c"));
    assert!(!rig.guest.was_called("signal 15 c"));
    assert_eq!(rig.set.wait("c", "").unwrap().status, 137);
}

#[test]
fn limits_from_before_the_creation_in_the_guest_are_kept() {
    let rig = Rig::new();
    rig.create_late("c").unwrap();
    let resources = |mib: i64| -> oci::LinuxResources {
        let resources = serde_json::json!({"memory": {"limit": mib << 20}});
        serde_json::from_value(resources).unwrap()
    };
    rig.set.update("c", &resources(600)).unwrap();
    rig.set.update("c", &resources(700)).unwrap();
    assert!(!rig.guest.was_called("boot"));
    rig.set.start("c", "").unwrap();
    let calls = rig.guest.lock().calls.clone();
    let own = calls.iter().filter(|call| call.ends_with(" c"));
    let own: Vec<_> = own.map(String::as_str).collect();
    assert_eq!(own, ["create c", "update c", "update c", "start c"]);
    rig.set.update("c", &resources(600)).unwrap();
    let updates = |calls: &[String]| calls.iter().filter(|call| *call == "update c").count();
    assert_eq!(updates(&rig.guest.lock().calls), 3);
}

#[test]
fn limits_that_name_files_elsewhere_are_refused() {
    let resources = |file: &str| -> oci::LinuxResources {
        serde_json::from_value(serde_json::json!({"unified": {file: "1"}})).unwrap()
    };
    let rig = Rig::new();
    rig.create_in_pod("pod").unwrap();
    rig.create_in_pod("c").unwrap();
    for id in ["pod", "c"] {
        let refused = rig.set.update(id, &resources("cpu.x/../../cgroup.procs"));
        let said = refused.unwrap_err().to_string();
        assert!(said.contains("no slashes"), "{id}: {said}");
        rig.set.update(id, &resources("cpu.max")).unwrap();
    }
}

/// Of the configuration of a pod sandbox container only its limits are used.
#[test]
fn limits_of_a_pod_that_name_files_elsewhere_are_refused() {
    let rig = Rig::new();
    let network = serde_json::json!({"type": "network", "path": "/proc/self/ns/net"});
    let annotations = serde_json::json!({"io.kubernetes.cri.container-type": "sandbox"});
    let mut request = rig.request("pod", &network, &annotations);
    let resources = serde_json::json!({"unified": {"cpu.x/../../cgroup.procs": "0"}});
    let mut linux = request.spec.0.linux().clone().unwrap();
    linux.set_resources(Some(serde_json::from_value(resources).unwrap()));
    request.spec.0.set_linux(Some(linux));
    let said = rig.set.create(request).unwrap_err().to_string();
    assert!(said.contains("no slashes"), "{said}");
    assert!(!rig.guest.was_called("boot"));
}

#[test]
fn two_that_come_at_once_have_one_machine() {
    let rig = Rig::new();
    rig.guest.hold("boot");
    let both = ["a", "b"].map(|id| rig.create_behind(id));
    rig.guest.await_call("boot");
    rig.guest.release("boot");
    for one in both {
        one.recv_timeout(LIMIT).unwrap().unwrap();
    }
    let calls = rig.guest.lock().calls.clone();
    assert_eq!(calls.iter().filter(|call| *call == "boot").count(), 1);
}

#[test]
fn a_machine_that_could_not_start_is_started_again() {
    let rig = Rig::new();
    rig.guest.set_broken("boot", true);
    assert!(rig.create("c").is_err());
    rig.guest.set_broken("boot", false);
    rig.create("c").unwrap();
    rig.set.start("c", "").unwrap();
}

#[test]
fn the_end_waits_for_a_guest_that_writes_its_disks_out() {
    let rig = Rig::new();
    rig.create("c").unwrap();
    rig.set.start("c", "").unwrap();
    rig.guest.hold("stop");
    let finished = rig.behind(|set| set.finish());
    rig.guest.await_call("stop");
    assert!(finished.recv_timeout(TIMEOUTS.start * 2).is_err());
    assert!(!rig.guest.was_called("kill machine"));
    rig.guest.release("stop");
    finished.recv_timeout(LIMIT).unwrap();
    assert_eq!(rig.set.wait("c", "").unwrap().status, 137);
}

#[test]
fn a_pod_ends_with_its_machine_and_the_machine_with_the_pod() {
    let rig = Rig::new();
    let pod = rig.create_in_pod("pod").unwrap();
    let member = rig.create_in_pod("c").unwrap();
    assert_eq!(pod, std::process::id());
    assert_ne!(member, pod);
    rig.set.start("pod", "").unwrap();
    rig.set.start("c", "").unwrap();
    rig.guest
        .change(|state| state.ended = Some(ExitReason::Reset));
    for id in ["pod", "c"] {
        assert_eq!(rig.set.wait(id, "").unwrap().status, 255);
    }

    let rig = Rig::new();
    rig.create_in_pod("pod").unwrap();
    rig.create_in_pod("c").unwrap();
    rig.set.start("pod", "").unwrap();
    rig.set.start("c", "").unwrap();
    rig.guest.ends("c", 0);
    assert_eq!(rig.set.wait("c", "").unwrap().status, 0);
    assert!(!rig.guest.was_called("stop"), "the pod runs");
    rig.set.kill("pod", "", 9, false).unwrap();
    assert_eq!(rig.set.wait("pod", "").unwrap().status, 137);
    rig.guest.await_call("stop");
}

#[test]
fn a_guest_has_room_before_the_limit_and_one_at_a_time_makes_it() {
    let rig = Rig::new();
    rig.create_in_pod("pod").unwrap();
    rig.create_in_pod("c").unwrap();
    rig.set.start("c", "").unwrap();
    let resources = |mib: i64| -> oci::LinuxResources {
        let resources = serde_json::json!({"memory": {"limit": mib << 20}});
        serde_json::from_value(resources).unwrap()
    };
    let memory_mib = || rig.guest.lock().size.memory_mib.unwrap_or(0);
    let await_memory = |mib: std::ops::Range<u64>| {
        let began = Instant::now();
        while !mib.contains(&memory_mib()) && began.elapsed() < LIMIT {
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(mib.contains(&memory_mib()), "{}", memory_mib());
    };
    // A limit where there was none is a reduction.
    rig.set.update("c", &resources(600)).unwrap();
    await_memory(632..700);
    rig.set.update("c", &resources(1024)).unwrap();
    let calls = rig.guest.lock().calls.clone();
    let at = |name: &str| calls.iter().rposition(|call| call == name).unwrap();
    assert!(at("resize") < at("update c"), "{calls:?}");
    await_memory(1056..1100);

    // A reduction: first the limit, then the guest in the background, without blocking other requests.
    rig.guest.hold("resize");
    rig.set.update("c", &resources(600)).unwrap();
    rig.set.state("c", "").unwrap();
    await_memory(1056..1100);
    rig.guest.release("resize");
    await_memory(632..700);

    // An impossible limit is not recorded.
    rig.guest.set_broken("resize", true);
    assert!(rig.set.update("c", &resources(2048)).is_err());
    let limits = {
        let task = rig.set.task("c").unwrap();
        let mut state = rig.set.lock();
        state.entry(&task).unwrap().limits
    };
    assert_eq!(limits.memory, Some(600 << 20));
}

#[test]
fn the_end_needs_no_thread() {
    let rig = Rig::new();
    rig.create("c").unwrap();
    rig.set.start("c", "").unwrap();
    let began = Instant::now();
    rig.set.finish_by(|_, _| anyhow::bail!("no thread is left"));
    assert!(rig.guest.was_called("stop"));
    assert!(began.elapsed() < LIMIT, "{:?}", began.elapsed());
    assert_eq!(rig.set.wait("c", "").unwrap().status, 137);
}
