//! Sockets between guest and host: virtio 1.2, section 5.10.
//!
//! The guest has an address (its CID), the host is CID 2, and both sides connect to ports. Here
//! the host's side is this process: a guest that connects to a port reaches whoever listens on
//! it ([`Ports::listen`]), and [`Ports::connect`] reaches a listener in the guest. Either way the
//! host's end is an ordinary Unix stream, so that anything that can use a socket can use it.
//!
//! For other processes of the host there are [`UnixSockets`].
//!
//! # A stream's life
//! ```text
//! guest connects:  REQUEST → (handler found) RESPONSE → RW … RW → SHUTDOWN → RST
//!                          → (nobody)        RST
//! host connects:   REQUEST ← ; RESPONSE →  … as above
//! ```
//! Credit (section 5.10.6.3): each side says how much buffer it has and how much of what it got
//! it has passed on; the other never sends more than that. [`connection`] is the arithmetic and
//! the state machine on plain data; [`muxer`] owns the connections; [`device`] connects both to
//! the queues and to epoll, on the event loop's thread.

pub mod connection;
pub mod device;
pub mod muxer;
pub mod packet;
mod ports;
mod sockets;

pub use device::Vsock;
pub use ports::{Listener, Ports, VsockMetrics};
pub use sockets::UnixSockets;

/// The host's address (section 5.10.4).
pub const HOST_CID: u64 = 2;
/// The first address that a guest may have; those below are reserved.
pub const FIRST_GUEST_CID: u64 = 3;
