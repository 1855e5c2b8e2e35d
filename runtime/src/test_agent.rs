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
