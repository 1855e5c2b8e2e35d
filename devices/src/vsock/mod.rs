//! Sockets between guest and host: virtio 1.2, section 5.10.
//!
//! The guest has an address (its CID), the host has CID 2, and both sides connect to ports. The host's side
//! is this process: a guest that connects to a port reaches its listener ([`Ports::listen`]), and
//! [`Ports::connect`] reaches a listener in the guest. The host's end of a stream is always an ordinary Unix
//! stream, usable by any code that can use a socket.
//!
//! [`UnixSockets`] make this available to other processes on the host.
//!
//! # Life cycle of a stream
//! ```text
//! guest connects:  REQUEST → (listener found) RESPONSE → RW … RW → SHUTDOWN → RST
//!                          → (no listener)    RST
//! host connects:   REQUEST ← ; RESPONSE →  … as above
//! ```
//! Credit (section 5.10.6.3): each side reports the size of its buffer and the number of bytes it has forwarded
//! from it; the other side never exceeds that. [`connection`] implements the accounting and
//! the state machine on plain data; [`muxer`] owns the connections; [`device`] connects them to the queues
//! and to epoll on the event loop.

pub mod connection;
mod connector;
pub mod device;
pub mod muxer;
pub mod packet;
mod ports;
mod sockets;

pub use device::Vsock;
pub use ports::{Listener, Ports, VsockMetrics};
pub use sockets::UnixSockets;

/// CID of the host (section 5.10.4).
pub const HOST_CID: u64 = 2;
/// Lowest CID of a guest; those below are reserved.
pub const FIRST_GUEST_CID: u64 = 3;
