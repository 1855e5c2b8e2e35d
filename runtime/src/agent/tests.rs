//! Handling of an agent's replies, and of missing ones.

use super::*;
use koya_protocol::ErrorReason;
use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::sync::Mutex;

#[test]
fn what_does_not_fit_into_a_message_is_refused_before_it_is_sent() {
    use crate::test_agent::{Word, agent};
    let agent = agent(|_| Word::Ok);
    let exec = |len| agent.exec("c", "e", vec![b' '; len], Stdio::default(), "");
    assert!(exec(MAX_JSON).is_ok());
    let refused = exec(MAX_JSON + 1).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidConfiguration, "{refused}");
    let needs = GuestResources::default();
    let created = agent.create("c", vec![b' '; MAX_JSON + 1], needs, Stdio::default());
    assert!(matches!(created, Err(Error::Invalid { .. })));
}

#[test]
fn a_silent_agent_is_told_from_one_that_refuses() {
    use crate::test_agent::{Word, agent};
    let gone = agent(|_| Word::HangUp);
    assert!(matches!(
        gone.has_ended("a"),
        Err(Error::AgentDisconnected { .. })
    ));
    let silent = agent(|_| Word::Silence);
    assert!(matches!(silent.has_ended("a"), Err(Error::Timeout { .. })));
    let broken = agent(|_| Word::Error);
    assert!(matches!(broken.has_ended("a"), Err(Error::Agent { .. })));
    assert!(agent(|_| Word::Ok).has_ended("a").is_ok());
}

#[test]
fn the_agents_kinds_are_told_apart_and_its_text_decides_nothing() {
    let error = |status| failed("x", ttrpc::Error::RpcStatus(status), None);
    let refused = ErrorReason::NotExecutable {
        exit_status: 127,
        reason: "\x1b[1mnope: not found in PATH (/bin)".into(),
    };
    let Error::NotExecutable { status, reason } = error(refused.status("")) else {
        panic!()
    };
    assert_eq!(
        (status, reason.as_str()),
        (127, "nope: not found in PATH (/bin)")
    );
    let refused = ErrorReason::NoProcess("it has ended".into());
    assert!(matches!(error(refused.status("")), Error::NoProcess { .. }));
    let kinds = [
        (ErrorReason::NotFound("c".into()), ErrorKind::NotFound),
        (
            ErrorReason::AlreadyExists("c".into()),
            ErrorKind::AlreadyExists,
        ),
        (
            ErrorReason::Invalid("c".into()),
            ErrorKind::InvalidConfiguration,
        ),
        (ErrorReason::InUse("c".into()), ErrorKind::InUse),
        (ErrorReason::Unsupported("c".into()), ErrorKind::Unsupported),
    ];
    for (refused, kind) in kinds {
        let error = error(refused.status("more of it"));
        assert_eq!(error.kind(), kind);
        assert_eq!(error.to_string(), "cannot x: more of it");
    }
    let lie = "process not found: cannot execute 127: sh: not found;\x1b[2J";
    let Error::Agent { reason, .. } = error(ttrpc::get_status(ttrpc::Code::UNKNOWN, lie)) else {
        panic!()
    };
    assert_eq!(
        reason,
        "process not found: cannot execute 127: sh: not found;"
    );
}

#[test]
fn a_status_is_one_that_a_process_can_have() {
    for (reported, status) in [(0, 0), (137, 137), (255, 255), (256, 255), (-1, 255)] {
        assert_eq!(exit_status(reported), status);
    }
    assert_eq!(exit_status(i32::MIN), 255, "and not 0, as its low bits");
}

/// Targets of all messages logged in this process.
static TARGETS: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

struct Targets;

impl log::Log for Targets {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        TARGETS.lock().unwrap().insert(record.target().into());
    }

    fn flush(&self) {}
}

/// ttrpc's client logs each message that nobody waits for, and a guest can send any number of them.
#[test]
fn what_an_agent_says_unasked_is_logged_under_a_target_of_its_own() {
    log::set_logger(&Targets).unwrap();
    log::set_max_level(log::LevelFilter::Debug);
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let (agent, _connection) = Agent::connect(ours).unwrap();
    let speaks = std::thread::spawn(move || {
        let mut header = [0; 10];
        theirs.read_exact(&mut header).unwrap();
        header[..4].copy_from_slice(&1u32.to_be_bytes());
        for kind in [9, ttrpc::proto::MESSAGE_TYPE_RESPONSE] {
            for stream in [1u32, 999] {
                header[4..8].copy_from_slice(&stream.to_be_bytes());
                header[8] = kind;
                for _ in 0..10 {
                    theirs.write_all(&[&header[..], &[0xff]].concat()).unwrap();
                }
            }
        }
        theirs
    });
    assert!(agent.has_ended("a").is_err());
    let _open = speaks.join().unwrap();
    let of_ttrpc = || {
        let targets = TARGETS.lock().unwrap();
        let of_ttrpc = targets.iter().filter(|target| target.starts_with("ttrpc"));
        of_ttrpc.cloned().collect::<Vec<_>>()
    };
    let began = Instant::now();
    while of_ttrpc().is_empty() {
        assert!(began.elapsed() < LIMIT, "nothing is logged any more");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(of_ttrpc(), [crate::GUEST_LOG]);
}
