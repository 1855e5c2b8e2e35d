//! An agent that does as a test wants.

use crate::agent::Agent;
use protobuf::Message as _;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

/// What it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    Silence,
    /// With an empty message.
    Ok,
    Error,
    /// And never again.
    HangUp,
    /// The same, but requests are still taken.
    HalfClose,
}

/// A connection to an agent that answers each request by its method's name.
pub(crate) fn agent(word: impl Fn(&str) -> Word + Send + 'static) -> Agent {
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::spawn(move || while answer(&theirs, &word).is_some() {});
    let (agent, connection) = Agent::connect(ours).unwrap();
    // As long as the test's process: what ends it is the other end.
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
        // It goes on to take requests.
        let half = agent(|_| Word::HalfClose);
        assert!(matches!(half.has_ended("a"), Err(Error::HungUp { .. })));
        let (sender, answer) = std::sync::mpsc::channel();
        let later = half.clone();
        std::thread::spawn(move || sender.send(later.wait("a", "e")));
        let answer = answer.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!(matches!(answer, Err(Error::HungUp { .. })), "{answer:?}");
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
