//! Framing of a stream that carries queries to a name server of the host, and its answers: an ID that matches answers to
//! queries, the length of the message, and the message. Numbers are in network byte order.

/// Length of the header before each message.
pub const HEADER_LEN: usize = 6;

/// Flag in the ID of a query from a connected client: the answer may have any length.
pub const OVER_TCP: u32 = 1 << 31;

/// Frames a message; `None` if it is too long.
pub fn frame(id: u32, message: &[u8]) -> Option<Vec<u8>> {
    let len = u16::try_from(message.len()).ok()?;
    Some([&id.to_be_bytes()[..], &len.to_be_bytes(), message].concat())
}

/// The ID, and the length of the message that follows.
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
