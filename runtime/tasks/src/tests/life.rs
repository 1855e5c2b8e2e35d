//! Starts, ends and deletions, and the order of their events.

use super::{LIMIT, Rig, TIMEOUTS};
use crate::Error;
use crate::process::Status;
use koya::vmm::ExitReason;
use std::time::{Duration, Instant};

#[test]
fn a_task_is_created_started_and_deleted() {
    let rig = Rig::new();
    let pid = rig.create("c").unwrap();
    assert_eq!(pid, std::process::id());
    assert!(matches!(rig.create("c"), Err(Error::AlreadyExists(_))));
    rig.set.start("c", "").unwrap();
    assert_eq!(rig.set.state("c", "").unwrap().status, Status::Running);
    let again = rig.set.start("c", "");
    assert!(
        matches!(again, Err(Error::FailedPrecondition(_))),
        "{again:?}"
    );
    let early = rig.set.delete("c", "");
    assert!(
        matches!(early, Err(Error::FailedPrecondition(_))),
        "{early:?}"
    );
    rig.guest.ends("c", 3);
    assert_eq!(rig.set.wait("c", "").unwrap().status, 3);
    let killed = rig.set.kill("c", "", 9, false);
    assert!(matches!(killed, Err(Error::Finished(_))), "{killed:?}");
    assert_eq!(rig.set.delete("c", "").unwrap().1.status, 3);
    let expected = ["create c", "start c", "exit c 3", "delete c"];
    assert_eq!(rig.events(), expected);
    assert!(matches!(rig.set.state("c", ""), Err(Error::NotFound(_))));
}

#[test]
fn a_start_is_published_before_an_end_that_comes_during_it() {
    let rig = Rig::new();
    rig.create("c").unwrap();
    rig.guest.hold("start c");
    let started = rig.behind(|set| set.start("c", ""));
    rig.guest.await_call("start c");
    rig.guest.ends("c", 7);
    // Its end is known here, but not published yet.
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(rig.events(), ["create c"]);
    rig.guest.release("start c");
    started.recv_timeout(LIMIT).unwrap().unwrap();
    assert_eq!(rig.set.wait("c", "").unwrap().status, 7);
    assert_eq!(rig.events(), ["create c", "start c", "exit c 7"]);
}

#[test]
fn nothing_overtakes_what_is_published_slowly() {
    let rig = Rig::new();
    rig.events.slow.lock().unwrap().push("create c".into());
    // It ends as soon as it exists.
    rig.guest.ends("c", 7);
    rig.create("c").unwrap();
    assert_eq!(rig.set.wait("c", "").unwrap().status, 7);
    rig.set.delete("c", "").unwrap();
    assert_eq!(rig.events(), ["create c", "exit c 7", "delete c"]);

    let rig = Rig::new();
    rig.events.slow.lock().unwrap().push("pause c".into());
    rig.create("c").unwrap();
    rig.set.start("c", "").unwrap();
    let paused = rig.behind(|set| set.pause("c"));
    rig.guest.await_call("pause c");
    rig.set.resume("c").unwrap();
    paused.recv_timeout(LIMIT).unwrap().unwrap();
    let expected = ["create c", "start c", "pause c", "resume c"];
    assert_eq!(rig.events(), expected);
}

#[test]
fn what_can_not_be_started_has_ended() {
    let rig = Rig::new();
    rig.create("c").unwrap();
    rig.guest.set_broken("start c", true);
    assert!(matches!(rig.set.start("c", ""), Err(Error::Failed(_))));
    assert_eq!(rig.set.wait("c", "").unwrap().status, 255);
    assert_eq!(rig.events(), ["create c", "exit c 255"]);
}

#[test]
fn exec_processes_end_before_the_init_process() {
    let rig = Rig::new();
    rig.create("c").unwrap();
    rig.set.start("c", "").unwrap();
    for exec in ["e", "silent"] {
        rig.exec("c", exec).unwrap();
        rig.set.start("c", exec).unwrap();
    }
    assert!(matches!(rig.exec("c", "e"), Err(Error::AlreadyExists(_))));
    rig.guest.ends("c", 0);
    rig.guest.ends("c/e", 4);
    assert_eq!(rig.set.wait("c", "").unwrap().status, 0);
    // The guest has not reported the end of the other one, which is published as killed.
    assert_eq!(rig.set.wait("c", "silent").unwrap().status, 137);
    let events = rig.events();
    let last = events.last().unwrap();
    assert_eq!(last, "exit c 0", "{events:?}");
    for expected in ["exit c/e 4", "exit c/silent 137"] {
        assert!(events.iter().any(|e| e == expected), "{events:?}");
    }
    assert!(matches!(
        rig.exec("c", "late"),
        Err(Error::FailedPrecondition(_))
    ));
    rig.set.delete("c", "e").unwrap();
    assert!(matches!(rig.set.state("c", "e"), Err(Error::NotFound(_))));
}

#[test]
fn a_process_that_comes_too_late_fails_for_the_containers_end() {
    let rig = Rig::new();
    rig.create("c").unwrap();
    rig.set.start("c", "").unwrap();
    rig.exec("c", "e").unwrap();
    rig.guest.hold("exec c/e");
    let (set, guest) = (rig.set.clone(), rig.guest.clone());
    let late = std::thread::spawn(move || set.start("c", "e"));
    guest.await_call("exec c/e");
    guest.ends("c", 137);
    rig.await_event("exit c 137");
    guest.change(|state| _ = state.ended.get_or_insert(ExitReason::Stopped));
    let refused = late.join().unwrap().unwrap_err().to_string();
    assert_eq!(refused, "cannot exec in a stopped container");
}

#[test]
fn a_process_may_be_added_before_the_start() {
    let rig = Rig::new();
    rig.create_late("c").unwrap();
    assert!(!rig.guest.was_called("create c"));
    rig.exec("c", "e").unwrap();
    rig.set.start("c", "e").unwrap();
    assert!(rig.guest.was_called("create c") && !rig.guest.was_called("start c"));
    assert_eq!(rig.set.state("c", "").unwrap().status, Status::Created);
    rig.set.start("c", "").unwrap();
    let creations = |call: &&String| *call == "create c";
    assert_eq!(rig.guest.lock().calls.iter().filter(creations).count(), 1);
    rig.guest.ends("c", 3);
    assert_eq!(rig.set.wait("c", "").unwrap().status, 3);
}

#[test]
fn a_lack_of_memory_is_published_once_and_before_the_end() {
    let rig = Rig::new();
    rig.create("c").unwrap();
    rig.set.start("c", "").unwrap();
    rig.guest.change(|state| state.oom_kills = 1);
    let task = rig.set.task("c").unwrap();
    rig.set.out_of_memory(&task, 1);
    rig.guest.change(|state| state.oom_kills = 2);
    rig.guest.ends("c", 137);
    rig.await_event("exit c 137");
    let expected = ["create c", "start c", "oom c", "oom c", "exit c 137"];
    assert_eq!(rig.events(), expected);
    rig.set.out_of_memory(&task, 2);
    assert_eq!(rig.events(), expected);
}

#[test]
fn a_paused_task_takes_no_processes_until_it_goes_on() {
    let rig = Rig::new();
    rig.create("c").unwrap();
    rig.set.start("c", "").unwrap();
    rig.exec("c", "e").unwrap();
    rig.set.pause("c").unwrap();
    assert_eq!(rig.set.state("c", "").unwrap().status, Status::Paused);
    assert!(rig.set.start("c", "e").is_err());
    assert!(rig.set.pause("c").is_err());
    rig.set.resume("c").unwrap();
    rig.set.start("c", "e").unwrap();
    let expected = [
        "create c",
        "start c",
        "add c/e",
        "pause c",
        "resume c",
        "start c/e",
    ];
    assert_eq!(rig.events(), expected);
}

#[test]
fn one_that_never_ran_is_killed_and_deleted() {
    let rig = Rig::new();
    rig.create("c").unwrap();
    let (_, exit) = rig.set.delete("c", "").unwrap();
    assert_eq!(exit.status, 137);
    assert!(rig.guest.was_called("kill c") && rig.guest.was_called("remove c"));
    assert!(rig.set.is_empty());
    // The machine ends with the last one.
    rig.guest.await_call("stop");
    assert_eq!(rig.events(), ["create c", "exit c 137", "delete c"]);
}

#[test]
fn a_guest_that_ignores_kills_holds_no_deletion() {
    let rig = Rig::new();
    rig.create("c").unwrap();
    rig.guest.change(|state| state.ignores_kills = true);
    let started = Instant::now();
    let (_, exit) = rig.set.delete("c", "").unwrap();
    assert_eq!(exit.status, 137);
    assert!(started.elapsed() >= TIMEOUTS.kill && started.elapsed() < LIMIT);
    assert!(rig.guest.was_called("remove c"));
}

#[test]
fn a_deletion_waits_for_the_start_and_then_for_the_end() {
    let rig = Rig::new();
    rig.create("c").unwrap();
    rig.guest.hold("start c");
    let started = rig.behind(|set| set.start("c", ""));
    rig.guest.await_call("start c");
    let deleted = rig.behind(|set| set.delete("c", ""));
    // Longer than the limit for an ended container: this one has not ended.
    assert!(deleted.recv_timeout(TIMEOUTS.held * 3).is_err());
    rig.guest.release("start c");
    started.recv_timeout(LIMIT).unwrap().unwrap();
    let refused = deleted.recv_timeout(LIMIT).unwrap();
    assert!(
        matches!(refused, Err(Error::FailedPrecondition(_))),
        "{refused:?}"
    );
    assert!(!rig.guest.was_called("kill machine"));
}

#[test]
fn a_guest_that_holds_a_request_about_one_that_has_ended_is_ended() {
    let rig = Rig::new();
    rig.create("c").unwrap();
    rig.set.start("c", "").unwrap();
    for call in ["pause c", "stop"] {
        rig.guest.hold(call);
    }
    let paused = rig.behind(|set| set.pause("c"));
    rig.guest.await_call("pause c");
    rig.guest.ends("c", 0);
    rig.await_event("exit c 0");
    let deleted = rig.behind(|set| set.delete("c", ""));
    assert_eq!(deleted.recv_timeout(LIMIT).unwrap().unwrap().1.status, 0);
    assert!(paused.recv_timeout(LIMIT).unwrap().is_err());
    assert!(rig.guest.was_called("kill machine"));
}

#[test]
fn of_two_deletions_one_finds_nothing() {
    let rig = Rig::new();
    rig.create("c").unwrap();
    rig.set.start("c", "").unwrap();
    rig.guest.ends("c", 0);
    rig.await_event("exit c 0");
    let both = [0, 1].map(|_| rig.behind(|set| set.delete("c", "")));
    let both = both.map(|one| one.recv_timeout(LIMIT).unwrap());
    assert_eq!(both.iter().filter(|one| one.is_ok()).count(), 1, "{both:?}");
    let missing = |one: &&Result<_, Error>| matches!(one, Err(Error::NotFound(_)));
    assert_eq!(both.iter().filter(missing).count(), 1, "{both:?}");
}

#[test]
fn what_can_not_be_made_leaves_nothing() {
    let rig = Rig::new();
    rig.guest.set_broken("create c", true);
    assert!(rig.create("c").is_err());
    assert!(rig.set.is_empty());
    assert_eq!(rig.events(), [""; 0]);
    rig.guest.await_call("stop");
}

#[test]
fn who_waits_for_one_that_is_deleted_hears_of_it() {
    let rig = Rig::new();
    rig.create_late("c").unwrap();
    let watch = rig.set.watch("c", "").unwrap();
    rig.set.delete("c", "").unwrap();
    assert_eq!(watch.now().unwrap().status, 137);

    rig.create("c").unwrap();
    rig.set.start("c", "").unwrap();
    rig.exec("c", "e").unwrap();
    let watch = rig.set.watch("c", "e").unwrap();
    let waits = rig.behind(|set| set.wait("c", "e"));
    assert!(waits.recv_timeout(Duration::from_millis(50)).is_err());
    rig.set.delete("c", "e").unwrap();
    let missing = waits.recv_timeout(LIMIT).unwrap();
    assert!(matches!(missing, Err(Error::NotFound(_))), "{missing:?}");
    assert_eq!(watch.now(), None);
}
