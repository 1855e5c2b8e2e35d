//! Hooks during the life cycle of a task.

use super::Rig;
use crate::create::CreateTask;
use crate::hooks::run_overdue;
use koya::oci_spec::runtime::Hooks;
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;

const KINDS: [&str; 5] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "poststart",
    "poststop",
];

/// File to which this rig's hooks write one line each: their kind, and the status and PID in their input.
fn log(rig: &Rig) -> PathBuf {
    rig.dir.path().join("hooks")
}

fn said(rig: &Rig) -> Vec<String> {
    let text = fs::read_to_string(log(rig)).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// A task with a hook of each kind, of which `failing` fails; created in the guest at its start (`is_late`), or at once.
fn request(rig: &Rig, id: &str, failing: &str, is_late: bool) -> CreateTask {
    let hook = |kind: &str| -> Value {
        let status = i32::from(kind == failing);
        let script = format!(
            "s=$(grep -o '\"status\":\"[a-z]*\"\\|\"pid\":[0-9]*' | tr '\\n' ' ')
             echo {kind} $s >> {}; exit {status}",
            log(rig).display()
        );
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}])
    };
    let network = match is_late {
        true => json!({"type": "network"}),
        false => json!({"type": "network", "path": "/proc/self/ns/net"}),
    };
    let mut request = rig.request(id, &network, &json!({}));
    let hooks = KINDS.map(|kind| (kind.to_owned(), hook(kind)));
    let hooks: Hooks = serde_json::from_value(hooks.into_iter().collect()).unwrap();
    request.spec.0.set_hooks(Some(hooks));
    // Read by `delete` of a shim.
    let config = serde_json::to_vec(&request.spec.0).unwrap();
    fs::write(request.bundle.join("config.json"), config).unwrap();
    request
}

fn lines(kinds: &[&str]) -> Vec<String> {
    let pid = std::process::id();
    let line = |kind: &&str| match *kind {
        "poststart" => format!("poststart \"status\":\"running\" \"pid\":{pid}"),
        "poststop" => "poststop \"status\":\"stopped\"".into(),
        other => format!("{other} \"status\":\"creating\" \"pid\":{pid}"),
    };
    kinds.iter().map(line).collect()
}

#[test]
fn hooks_run_in_their_turn() {
    for is_late in [false, true] {
        let rig = Rig::new();
        rig.set.create(request(&rig, "c", "", is_late)).unwrap();
        assert_eq!(said(&rig), lines(&KINDS[..3]));
        // These hooks may add interfaces, which are looked for later.
        assert_eq!(rig.guest.was_called("boot"), !is_late);
        rig.set.start("c", "").unwrap();
        assert_eq!(said(&rig), lines(&KINDS[..4]));
        rig.guest.ends("c", 3);
        rig.set.wait("c", "").unwrap();
        assert_eq!(said(&rig), lines(&KINDS[..4]));
        rig.set.delete("c", "").unwrap();
        assert_eq!(said(&rig), lines(&KINDS));
        assert_eq!(
            rig.events(),
            ["create c", "start c", "exit c 3", "delete c"]
        );
        run_overdue("c", &rig.dir.path().join("c")).unwrap();
        assert_eq!(said(&rig), lines(&KINDS), "once");
    }
}

#[test]
fn a_hook_that_fails_before_the_start_leaves_no_task() {
    for failing in &KINDS[..3] {
        let rig = Rig::new();
        let error = rig.set.create(request(&rig, "c", failing, false));
        let error = error.unwrap_err().to_string();
        assert_eq!(
            error,
            format!("error running {failing} hook #0: /bin/sh: exit status: 1")
        );
        assert!(rig.set.is_empty());
        assert!(!rig.guest.was_called("create c"));
        assert_eq!(rig.events(), [""; 0]);
        assert_eq!(said(&rig).last(), lines(&["poststop"]).last());
        rig.set.create(request(&rig, "c", "", false)).unwrap();
    }
}

/// As with runc.
#[test]
fn a_hook_that_fails_after_the_start_ends_the_container() {
    let rig = Rig::new();
    rig.set
        .create(request(&rig, "c", "poststart", true))
        .unwrap();
    let error = rig.set.start("c", "").unwrap_err().to_string();
    assert_eq!(
        error,
        "error running poststart hook #0: /bin/sh: exit status: 1"
    );
    assert!(rig.guest.was_called("kill c"));
    assert_eq!(rig.set.wait("c", "").unwrap().status, 255);
    assert_eq!(rig.events(), ["create c", "exit c 255"]);
    rig.set.delete("c", "").unwrap();
    assert_eq!(said(&rig).last(), lines(&["poststop"]).last());
}

#[test]
fn poststop_hooks_that_a_killed_sandbox_owes_are_run() {
    let rig = Rig::new();
    let bundle = rig.dir.path().join("c");
    rig.set
        .create(request(&rig, "c", "poststop", true))
        .unwrap();
    run_overdue("c", &bundle).unwrap();
    let expected = lines(&["prestart", "createRuntime", "createContainer", "poststop"]);
    assert_eq!(said(&rig), expected);
    run_overdue("c", &bundle).unwrap();
    rig.set.delete("c", "").unwrap();
    assert_eq!(said(&rig), expected, "once");
}
