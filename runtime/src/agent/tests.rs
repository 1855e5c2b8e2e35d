//! Handling of an agent's replies, and of missing ones.

use super::*;
use koya_protocol::Refused;

#[test]
fn what_does_not_fit_into_a_message_is_refused_before_it_is_sent() {
    use crate::test_agent::{Word, agent};
    let agent = agent(|_| Word::Ok);
    let exec = |len| agent.exec("c", "e", vec![b' '; len], Stdio::default(), "");
    assert!(exec(MAX_JSON).is_ok());
    let refused = exec(MAX_JSON + 1).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidConfiguration, "{refused}");
    let needs = Needs::default();
    let created = agent.create("c", vec![b' '; MAX_JSON + 1], needs, Stdio::default());
    assert!(matches!(created, Err(Error::Invalid { .. })));
}

#[test]
fn a_silent_agent_is_told_from_one_that_refuses() {
    use crate::test_agent::{Word, agent};
    let gone = agent(|_| Word::HangUp);
    assert!(matches!(gone.has_ended("a"), Err(Error::HungUp { .. })));
    let silent = agent(|_| Word::Silence);
    assert!(matches!(silent.has_ended("a"), Err(Error::Overdue { .. })));
    let broken = agent(|_| Word::Error);
    assert!(matches!(broken.has_ended("a"), Err(Error::Agent { .. })));
    assert!(agent(|_| Word::Ok).has_ended("a").is_ok());
}

#[test]
fn the_agents_kinds_are_told_apart_and_its_text_decides_nothing() {
    let error = |status| failed("x", ttrpc::Error::RpcStatus(status), None);
    let refused = Refused::NotExecutable {
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
    let refused = Refused::NoProcess("it has ended".into());
    assert!(matches!(error(refused.status("")), Error::NoProcess { .. }));
    let kinds = [
        (Refused::NotFound("c".into()), ErrorKind::NotFound),
        (Refused::AlreadyExists("c".into()), ErrorKind::AlreadyExists),
        (
            Refused::Invalid("c".into()),
            ErrorKind::InvalidConfiguration,
        ),
        (Refused::InUse("c".into()), ErrorKind::InUse),
        (Refused::Unsupported("c".into()), ErrorKind::Unsupported),
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
