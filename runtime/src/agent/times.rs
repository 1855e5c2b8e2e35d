//! Start-up times reported by the agent. They are not trusted.

use koya_protocol::messages::GuestTimes;
use std::time::Duration;

/// Maximum number of marks that are accepted.
const MAX_MARKS: usize = 16;

/// Maximum length of a mark's name in bytes.
const MAX_MARK_NAME: usize = 32;

/// Start-up times reported by the agent, each as the time before its connection.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct AgentTimes {
    /// Time of its first instruction.
    pub(crate) took: Duration,
    /// Completed parts of its start.
    pub(crate) marks: Vec<(String, Duration)>,
}

impl From<GuestTimes> for AgentTimes {
    fn from(times: GuestTimes) -> Self {
        let connected = times.agent_connected_ns;
        let before = |at_ns: u64| Duration::from_nanos(connected.saturating_sub(at_ns));
        // Not trusted: the number is limited, and names contain no control characters.
        let proper = |name: &str| {
            let plain = |byte: u8| byte == b' ' || byte.is_ascii_graphic();
            name.len() <= MAX_MARK_NAME && name.bytes().all(plain)
        };
        let marks = times.marks.into_iter().take(MAX_MARKS);
        Self {
            took: before(times.agent_started_ns),
            marks: marks
                .filter(|mark| proper(&mark.name))
                .map(|mark| (mark.name, before(mark.at_ns)))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use koya_protocol::messages;

    #[test]
    fn little_is_taken_of_what_an_agent_says_of_its_start() {
        let mark = |name: &str, at_ns| messages::GuestMark {
            name: name.into(),
            at_ns,
            ..Default::default()
        };
        let mut times = GuestTimes {
            agent_started_ns: 70,
            agent_connected_ns: 100,
            marks: vec![mark("mounts", 90), mark("\x1b[2J", 91), mark("later", 200)],
            ..Default::default()
        };
        let told = AgentTimes::from(times.clone());
        let nanos = Duration::from_nanos;
        assert_eq!(told.took, nanos(30));
        let expected = [("mounts".to_owned(), nanos(10)), ("later".into(), nanos(0))];
        assert_eq!(told.marks, expected);
        times.marks = vec![mark(&"x".repeat(MAX_MARK_NAME + 1), 1)];
        assert_eq!(AgentTimes::from(times.clone()).marks, []);
        times.marks = vec![mark("again", 1); 1000];
        assert_eq!(AgentTimes::from(times).marks.len(), MAX_MARKS);
    }
}
