//! Tap interfaces: `/dev/net/tun` (Documentation/networking/tuntap.rst).

use super::checked;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

// From include/uapi/linux/if_tun.h, parts of which are missing in libc.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;
const TUNSETQUEUE: libc::Ioctl = 0x4004_54d9;

/// Offloads that the reader of a tap handles (`TUN_F_*`).
pub mod offload {
    /// Checksums.
    pub const CSUM: u32 = 0x01;
    /// Segments of TCP over IPv4.
    pub const TSO4: u32 = 0x02;
    /// Segments of TCP over IPv6.
    pub const TSO6: u32 = 0x04;
    /// Segments of TCP with congestion notification.
    pub const TSO_ECN: u32 = 0x08;
    /// Segments of UDP over IPv4.
    pub const USO4: u32 = 0x20;
    /// Segments of UDP over IPv6.
    pub const USO6: u32 = 0x40;
}

fn request(name: &str, flags: libc::c_int) -> io::Result<libc::ifreq> {
    // SAFETY: zeroes are a valid `ifreq`: arrays and a union of integers and addresses.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The name needs a terminating zero.
    if name.len() >= request.ifr_name.len() || name.contains('\0') {
        let text = format!("{name:?} is not a valid interface name");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    Ok(request)
}

/// Attaches an open `/dev/net/tun` to a tap, which is created if it does not exist; `multi_queue` attaches
/// one of several queues. Frames begin with a virtio-net header of `header` bytes. Returns the name, which
/// the kernel chooses if `name` is empty or contains `%d`.
///
/// # Errors
/// The error from the kernel: no privilege (CAP_NET_ADMIN), in use, or incompatible flags.
pub fn attach_tap(
    tun: &File,
    name: &str,
    multi_queue: bool,
    header: libc::c_int,
) -> io::Result<String> {
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let queues = if multi_queue {
        libc::IFF_MULTI_QUEUE
    } else {
        0
    };
    let mut request = request(name, flags | queues)?;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives on this stack.
    checked(unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, &mut request) } as isize)?;
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    checked(unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETVNETHDRSZ, &header) } as isize)?;
    let name = request.ifr_name.iter().take_while(|byte| **byte != 0);
    // `c_char` is unsigned on some architectures, where a cast would do nothing.
    let name = name.map(|byte| char::from(byte.to_ne_bytes()[0]));
    Ok(name.collect())
}

/// Sets the offloads that this side handles ([`offload`]).
///
/// # Errors
/// The error from the kernel: an unknown bit.
pub fn set_tap_offload(tap: BorrowedFd<'_>, bits: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes a number, no pointer.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(bits)) };
    checked(result as isize).map(drop)
}

/// Enables or disables one queue of a multi-queue tap.
///
/// # Errors
/// The error from the kernel: not a multi-queue tap.
pub fn use_tap_queue(queue: impl AsFd, on: bool) -> io::Result<()> {
    let flags = if on {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    let request = request("", flags)?;
    let fd = queue.as_fd().as_raw_fd();
    // SAFETY: TUNSETQUEUE reads one `ifreq`, which lives on this stack.
    checked(unsafe { libc::ioctl(fd, TUNSETQUEUE, &request) } as isize).map(drop)
}
