//! Frames of a stream that carries questions to a name server of the host's, and the answers: a number, by which an
//! answer finds its question, the message's length, and the message. Numbers are in network byte order.

/// The length of what is before each message.
pub const HEADER_LEN: usize = 6;

/// In the number of a question whose client is connected: the answer may be of any length.
pub const OVER_TCP: u32 = 1 << 31;

/// A message in its frame; none if it is longer than one may be.
pub fn frame(id: u32, message: &[u8]) -> Option<Vec<u8>> {
    let len = u16::try_from(message.len()).ok()?;
    Some([&id.to_be_bytes()[..], &len.to_be_bytes(), message].concat())
}

/// The number, and the length of the message that follows.
pub fn parse_header(header: [u8; HEADER_LEN]) -> (u32, usize) {
    let [a, b, c, d, e, f] = header;
    let len = u16::from_be_bytes([e, f]);
    (u32::from_be_bytes([a, b, c, d]), usize::from(len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_back() {
        let framed = frame(OVER_TCP | 7, b"message").unwrap();
        let (header, message) = framed.split_at(HEADER_LEN);
        let (id, len) = parse_header(header.try_into().unwrap());
        assert_eq!((id, len), (OVER_TCP | 7, 7));
        assert_eq!(message, b"message");
        assert!(frame(1, &[0; 65536]).is_none());
    }
}
