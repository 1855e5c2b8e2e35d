//! Published UDP ports for programs of the host itself (`--net user`).
//!
//! pasta forwards datagrams from outside straight to the guest, but those to the host's loopback arrive at the loopback of the
//! sandbox's network namespace, and replies get lost if the guest's port is another one (as of Debian 12). So these are
//! received here, by sockets in the network namespace of the host, and forwarded to the address of the guest
//! ([`NetworkConfig::host_access`](koya::NetworkConfig::host_access)), each client by a socket of its own, so that replies
//! find their way back.

use super::publish::Ports;
use anyhow::{Context, Result};
use koya::vmm::guest_text::Warnings;
use koya::vmm::host::sync::lock;
use koya::vmm::host::threads;
use nix::ifaddrs::getifaddrs;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};
use std::collections::{BTreeSet, HashMap};
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Time without a reply after which the socket for a client is closed: the kernel default of `nf_conntrack_udp_timeout_stream`.
const IDLE: Duration = Duration::from_secs(120);
/// Maximum number of clients of a port at a time; datagrams of further ones are dropped, with a warning.
const CLIENTS: usize = 256;
/// Maximum size of a datagram.
const DATAGRAM: usize = 1 << 16;

/// A socket in the network namespace of the host for a published port.
#[derive(Debug)]
pub(super) struct Receiver {
    socket: UdpSocket,
    /// Port of the guest.
    port: u16,
}

/// Opens the sockets for published ports in the network namespace of the host, which the calling thread has not left yet.
///
/// # Errors
/// The port that is in use.
pub(super) fn receivers(publish: &[Ports]) -> Result<Vec<Receiver>> {
    let ports: BTreeSet<_> = publish.iter().flat_map(Ports::udp_at_loopback).collect();
    let opened = ports.into_iter().filter_map(|(at, port)| {
        let socket = open(at).transpose()?;
        Some(socket.map(|socket| Receiver { socket, port }))
    });
    opened.collect()
}

/// Forwards datagrams to the guest that has taken over an interface of this namespace.
///
/// # Errors
/// If the host has no thread left.
pub(super) fn serve(receivers: &[Receiver], interface: &str) -> Result<()> {
    if receivers.is_empty() {
        return Ok(());
    }
    let Some(guest) = address_of(interface)? else {
        log::warn!("programs of the host can't reach UDP ports of a guest without IPv4");
        return Ok(());
    };
    for Receiver { socket, port } in receivers {
        forward(socket.try_clone()?, guest, *port)?;
    }
    Ok(())
}

/// The IPv4 address of an interface of this namespace, which is that of the guest that takes it over.
fn address_of(interface: &str) -> Result<Option<Ipv4Addr>> {
    let mut all = getifaddrs().context("cannot read the addresses of the network namespace")?;
    Ok(all.find_map(|found| {
        let address = found
            .address
            .filter(|_| found.interface_name == interface)?;
        Some(address.as_sockaddr_in()?.ip())
    }))
}

/// A socket at a loopback address; `None` without IPv6. pasta may have one at all addresses, which then gets the datagrams to
/// the others.
fn open(at: SocketAddr) -> Result<Option<UdpSocket>> {
    let made = || -> io::Result<UdpSocket> {
        let family = match at {
            SocketAddr::V4(_) => AddressFamily::INET,
            SocketAddr::V6(_) => AddressFamily::INET6,
        };
        let socket = socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        bind(&socket, &at)?;
        Ok(socket.into())
    };
    match made() {
        Err(error) if at.is_ipv6() && is_without_ipv6(&error) => Ok(None),
        made => made
            .map(Some)
            .with_context(|| format!("cannot publish UDP port {} at {}", at.port(), at.ip())),
    }
}

fn is_without_ipv6(error: &io::Error) -> bool {
    let missing = [Errno::ADDRNOTAVAIL, Errno::AFNOSUPPORT];
    Errno::from_io_error(error).is_some_and(|error| missing.contains(&error))
}

/// Forwards datagrams that arrive at a socket to a port of the guest.
fn forward(socket: UdpSocket, guest: Ipv4Addr, port: u16) -> Result<()> {
    let forwarder = Forwarder {
        socket: Arc::new(socket),
        guest: (guest, port).into(),
        clients: Arc::default(),
        dropped: Warnings::new(),
    };
    threads::spawn("koya-port", move || forwarder.run())?;
    Ok(())
}

/// The sockets of clients, connected to the guest.
type Clients = Arc<Mutex<HashMap<SocketAddr, Arc<UdpSocket>>>>;

struct Forwarder {
    socket: Arc<UdpSocket>,
    guest: SocketAddr,
    clients: Clients,
    dropped: Warnings,
}

impl Forwarder {
    fn run(&self) {
        let mut datagram = vec![0; DATAGRAM];
        loop {
            match self.socket.recv_from(&mut datagram) {
                Ok((len, client)) => {
                    if let Err(error) = self.pass_on(client, &datagram[..len]) {
                        let port = self.guest.port();
                        self.dropped.warn(format_args!(
                            "a datagram to port {port} is dropped: {error}"
                        ));
                    }
                }
                // Out of memory, for example.
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    fn pass_on(&self, client: SocketAddr, datagram: &[u8]) -> io::Result<()> {
        let known = lock(&self.clients).get(&client).cloned();
        let socket = match known {
            Some(socket) => socket,
            None => self.add(client)?,
        };
        match socket.send(datagram) {
            // The report of an earlier datagram, at whose port nobody listened.
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
            sent => sent.map(drop),
        }
    }

    fn add(&self, client: SocketAddr) -> io::Result<Arc<UdpSocket>> {
        if lock(&self.clients).len() >= CLIENTS {
            return Err(io::Error::other(format!("{CLIENTS} clients are active")));
        }
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect(self.guest)?;
        socket.set_read_timeout(Some(IDLE))?;
        let socket = Arc::new(socket);
        let (replies, back, clients) = (socket.clone(), self.socket.clone(), self.clients.clone());
        lock(&self.clients).insert(client, socket.clone());
        let spawned = threads::spawn("koya-port", move || {
            reply(&replies, &back, client);
            lock(&clients).remove(&client);
        });
        if let Err(error) = spawned {
            lock(&self.clients).remove(&client);
            return Err(error);
        }
        Ok(socket)
    }
}

/// Sends the guest's datagrams to a client, until there are no more.
fn reply(from: &UdpSocket, to: &UdpSocket, client: SocketAddr) {
    let mut datagram = vec![0; DATAGRAM];
    loop {
        match from.recv(&mut datagram) {
            Ok(len) => _ = to.send_to(&datagram[..len], client),
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_client_gets_its_own_replies() {
        let guest = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = socket.local_addr().unwrap();
        let forwarder = Forwarder {
            socket: Arc::new(socket),
            guest: guest.local_addr().unwrap(),
            clients: Arc::default(),
            dropped: Warnings::new(),
        };
        let clients = forwarder.clients.clone();
        std::thread::spawn(move || forwarder.run());
        let ask = || {
            let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            client
                .set_read_timeout(Some(Duration::from_secs(20)))
                .unwrap();
            client.connect(port).unwrap();
            client
        };
        let (one, other) = (ask(), ask());
        let mut buffer = [0; 100];
        let mut seen = Vec::new();
        for (client, text) in [(&one, "a"), (&other, "b"), (&one, "c")] {
            client.send(text.as_bytes()).unwrap();
            let (len, from) = guest.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..len], text.as_bytes());
            seen.push(from);
        }
        assert_eq!(seen[0], seen[2]);
        assert_ne!(seen[0], seen[1]);
        assert_eq!(lock(&clients).len(), 2);
        // In the other order, and empty ones too.
        for (from, client, text) in [(seen[1], &other, "to b"), (seen[0], &one, "")] {
            guest.send_to(text.as_bytes(), from).unwrap();
            let len = client.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..len], text.as_bytes());
        }
    }

    #[test]
    fn interfaces_have_addresses() {
        assert_eq!(address_of("lo").unwrap(), Some(Ipv4Addr::LOCALHOST));
        assert_eq!(address_of("koya-none").unwrap(), None);
    }
}
