//! What Landlock adds to the filters: attempts as in [`traitor_tests`](super::traitor_tests), in a process without privileges,
//! like that of a user.

use super::traitor_tests::{Outcome, PLAIN, command, outcome_of};
use crate::walls::Filter;
use crate::walls::landlock;

fn plain_outcome(filter: Filter, name: &str) -> Outcome {
    let ground = tempfile::tempdir().unwrap();
    let mut command = command(filter, name, ground.path());
    outcome_of(filter, name, command.env(PLAIN, "1"))
}

/// Opened by a thread that serves files of a user without privileges, and has no root directory of its own.
const NEVER_OPENED: &[&str] = &[
    "open a file of the host",
    "the same, by the parents of the root",
    "the same, by the parents of a share",
    "open /proc/self/mem",
    "open a file of the process again",
    "create a file",
    "remove a file",
    "create a device node",
];

/// What a filter allows: the first version of Landlock that denies it, and the error.
const DENIED_TO_CONNECTOR: [(&str, i32, i32); 3] = [
    ("connect an open TCP socket", 4, libc::EACCES),
    ("connect to an abstract Unix socket", 6, libc::EPERM),
    ("connect an open UDP socket", 10, libc::EACCES),
];

#[test]
fn landlock_denies_a_traitor_without_privileges_what_its_filter_allows() {
    let abi = landlock::abi().unwrap_or(0);
    println!("version of Landlock: {abi}");
    for (name, since, error) in DENIED_TO_CONNECTOR {
        let wanted = match abi >= since {
            true => Outcome::Refused(error),
            false => Outcome::Allowed,
        };
        assert_eq!(
            plain_outcome(Filter::VsockConnector, name),
            wanted,
            "{name}"
        );
    }
    let works = "connect to a Unix socket";
    let outcome = plain_outcome(Filter::VsockConnector, works);
    assert_eq!(outcome, Outcome::Allowed, "{works}");
    for filter in [Filter::Files, Filter::Starter] {
        let works = "open a file in a share";
        let outcome = plain_outcome(filter, works);
        assert_eq!(outcome, Outcome::Allowed, "{filter:?}: {works}");
        for name in NEVER_OPENED.iter().filter(|_| abi >= 2) {
            let outcome = plain_outcome(filter, name);
            let wanted = Outcome::Refused(libc::EACCES);
            assert_eq!(outcome, wanted, "{filter:?}: {name}");
        }
    }
}
