//! The packet header: virtio 1.2, section 5.10.6.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of a header in bytes.
pub const HEADER_SIZE: u32 = size_of::<Header>() as u32;

/// Socket type of a stream, the only one supported.
pub const TYPE_STREAM: u16 = 1;

/// Shutdown flag: the sender will receive no more data.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Shutdown flag: the sender will send no more data.
pub const SHUTDOWN_SEND: u32 = 2;

/// `struct virtio_vsock_hdr`
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// CID of the sender.
    pub src_cid: U64,
    /// CID of the receiver.
    pub dst_cid: U64,
    /// Port of the sender.
    pub src_port: U32,
    /// Port of the receiver.
    pub dst_port: U32,
    /// Number of data bytes after the header.
    pub len: U32,
    /// [`TYPE_STREAM`]
    pub kind: U16,
    /// One of [`Op`].
    pub op: U16,
    /// Flags of [`Op::Shutdown`].
    pub flags: U32,
    /// Size of the sender's buffer for this stream in bytes.
    pub buf_alloc: U32,
    /// Bytes that the sender has forwarded from its buffer since the stream began, wrapping.
    pub fwd_cnt: U32,
}

/// Operation of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Requests a connection.
    Request = 1,
    /// Accepts a connection.
    Response = 2,
    /// Refuses a connection, or ends it at once.
    Reset = 3,
    /// Announces that no more data will be sent or received.
    Shutdown = 4,
    /// Data.
    ReadWrite = 5,
    /// Reports the sender's credit.
    CreditUpdate = 6,
    /// Requests the receiver's credit.
    CreditRequest = 7,
}

impl Op {
    /// The operation with this number.
    pub fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::ReadWrite,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}
