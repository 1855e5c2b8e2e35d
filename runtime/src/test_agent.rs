//! A mock agent for tests.

use crate::agent::Agent;
use protobuf::Message as _;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

/// Reply of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    Silence,
    /// An empty message.
    Ok,
    Error,
    /// Closes the connection.
    HangUp,
    /// Closes only its sending side, and still accepts requests.
    HalfClose,
}

/// A connection to an agent that replies to each request according to its method name.
pub(crate) fn agent(word: impl Fn(&str) -> Word + Send + 'static) -> Agent {
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::spawn(move || while answer(&theirs, &word).is_some() {});
    let (agent, connection) = Agent::connect(ours).unwrap();
    // Kept open until the end of the process; the other end closes it.
    std::mem::forget(connection);
    agent
}

fn answer(mut stream: &UnixStream, word: &impl Fn(&str) -> Word) -> Option<()> {
    // Length, stream and type: ttrpc's PROTOCOL.md.
    let mut header = [0; 10];
    stream.read_exact(&mut header).ok()?;
    let len = u32::from_be_bytes(header[..4].try_into().ok()?);
    let mut payload = vec![0; len as usize];
    stream.read_exact(&mut payload).ok()?;
    let request = ttrpc::Request::parse_from_bytes(&payload).ok()?;
    let mut response = ttrpc::Response::new();
    match word(&request.method) {
        Word::Silence => return Some(()),
        Word::HangUp => return None,
        Word::HalfClose => return stream.shutdown(std::net::Shutdown::Write).ok(),
        Word::Ok => {}
        Word::Error => {
            response.set_status(ttrpc::get_status(ttrpc::Code::UNKNOWN, "it is broken"));
        }
    }
    let payload = response.write_to_bytes().ok()?;
    header[..4].copy_from_slice(&(payload.len() as u32).to_be_bytes());
    header[8] = ttrpc::proto::MESSAGE_TYPE_RESPONSE;
    stream.write_all(&[&header[..], &payload].concat()).ok()
}

mod tests {
    use super::*;
    use crate::Error;
    use std::time::Duration;

    #[test]
    fn an_agent_that_sends_no_more_has_hung_up_for_all_who_come_later() {
        // It still accepts requests.
        let half = agent(|_| Word::HalfClose);
        assert!(matches!(
            half.has_ended("a"),
            Err(Error::AgentDisconnected { .. })
        ));
        let (sender, answer) = std::sync::mpsc::channel();
        let later = half.clone();
        std::thread::spawn(move || sender.send(later.wait("a", "e")));
        let answer = answer.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!(
            matches!(answer, Err(Error::AgentDisconnected { .. })),
            "{answer:?}"
        );
    }

    #[test]
    fn an_end_whose_question_was_lost_is_asked_for_again() {
        let asked = std::cell::Cell::new(0);
        let forgetful = agent(move |_| match asked.replace(asked.get() + 1) {
            0 => Word::Silence,
            _ => Word::Ok,
        });
        assert_eq!(forgetful.wait("a", "").unwrap(), 0);
    }
}
