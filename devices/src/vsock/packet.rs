//! The header of every packet: virtio 1.2, section 5.10.6.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a header.
pub const HEADER_SIZE: u32 = size_of::<Header>() as u32;

/// Socket type: a stream, the only one here.
pub const TYPE_STREAM: u16 = 1;

/// Shutdown flag: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Shutdown flag: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;

/// `struct virtio_vsock_hdr`
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Sender's address.
    pub src_cid: U64,
    /// Receiver's address.
    pub dst_cid: U64,
    /// Sender's port.
    pub src_port: U32,
    /// Receiver's port.
    pub dst_port: U32,
    /// Bytes that follow the header.
    pub len: U32,
    /// [`TYPE_STREAM`]
    pub kind: U16,
    /// One of [`Op`].
    pub op: U16,
    /// For [`Op::Shutdown`].
    pub flags: U32,
    /// The sender's buffer for this stream, in bytes.
    pub buf_alloc: U32,
    /// Bytes that the sender's buffer has passed on since the stream began, wrapping.
    pub fwd_cnt: U32,
}

/// What a packet does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Accepts it.
    Response = 2,
    /// Refuses it, or ends it at once.
    Reset = 3,
    /// Says that no more will be sent or received.
    Shutdown = 4,
    /// Data.
    ReadWrite = 5,
    /// Tells the sender's credit.
    CreditUpdate = 6,
    /// Asks for the receiver's credit.
    CreditRequest = 7,
}

impl Op {
    /// The operation with this number, if there is one.
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
