//! Framing of a stream that carries a container's messages to its service manager (sd_notify(3)): the length of a message
//! in two bytes, in network byte order, and the message.

/// Maximum length of a message in bytes, as in systemd. The agent drops longer ones.
pub const MAX_LEN: usize = 4096;

/// Length of the header before each message.
pub const HEADER_LEN: usize = 2;

/// Frames a message; `None` if it is empty or too long.
pub fn frame(message: &[u8]) -> Option<Vec<u8>> {
    let len = u16::try_from(message.len()).ok()?;
    let header = len.to_be_bytes();
    is_allowed(message.len()).then(|| [&header[..], message].concat())
}

/// The length of the message that follows; `None` if no agent sends such a message.
pub fn parse_header(header: [u8; HEADER_LEN]) -> Option<usize> {
    let len = usize::from(u16::from_be_bytes(header));
    is_allowed(len).then_some(len)
}

fn is_allowed(len: usize) -> bool {
    (1..=MAX_LEN).contains(&len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_have_a_bounded_length() {
        let framed = frame(b"READY=1").unwrap();
        let (header, message) = framed.split_at(HEADER_LEN);
        assert_eq!(parse_header(header.try_into().unwrap()), Some(7));
        assert_eq!(message, b"READY=1");
        assert_eq!(frame(&[b'x'; MAX_LEN]).unwrap().len(), HEADER_LEN + MAX_LEN);
        for len in [0, MAX_LEN + 1, usize::from(u16::MAX) + 1] {
            assert!(frame(&vec![b'x'; len]).is_none(), "{len}");
        }
        assert_eq!(parse_header([0, 0]), None);
        assert_eq!(parse_header([0x10, 0]), Some(MAX_LEN));
        assert_eq!(parse_header([0x10, 1]), None);
    }
}
