//! The guest's interfaces and routes, as configured by the host (rtnetlink(7)), and connections to its ports.

use crate::slots;
use anyhow::{Context, Result, bail};
use futures::TryStreamExt as _;
use ipnet::IpNet;
use koya_protocol::STREAM_PORT;
use koya_protocol::messages::{Interface, Neighbour};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::{Handle, LinkUnspec};
use std::fs;
use std::future::Future;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

pub(crate) mod routes;

/// Time limit for a port of the loopback to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Runs `work` with a connection to the kernel that ends with it.
async fn with_kernel<T>(work: impl AsyncFnOnce(Handle) -> Result<T>) -> Result<T> {
    let (connection, handle, _) = rtnetlink::new_connection().context("no netlink socket")?;
    let connection: std::pin::Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(connection);
    let task = tokio::spawn(connection);
    let result = work(handle).await;
    task.abort();
    result
}

/// Sets name and addresses of the interface with this MAC address, and brings it up.
pub(crate) async fn update_interface(wanted: &Interface) -> Result<()> {
    let addresses: Vec<IpNet> = wanted
        .ip_addresses
        .iter()
        .map(|text| {
            text.parse()
                .with_context(|| format!("{text:?} is no address"))
        })
        .collect::<Result<_>>()?;
    with_kernel(async |handle| {
        let links: Vec<LinkMessage> = handle.link().get().execute().try_collect().await?;
        let index = find(&links, &wanted.hw_addr, None)?;
        // Another interface with this name gets its own later.
        if let Some(other) = holder(&links, &wanted.name).filter(|other| *other != index) {
            let run_blocking = LinkUnspec::new_with_index(other).name(format!("koya-net{other}"));
            let renamed = handle.link().set(run_blocking.build()).execute().await;
            renamed.with_context(|| format!("the name {} is in use", wanted.name))?;
        }
        let mut link = LinkUnspec::new_with_index(index);
        if !wanted.name.is_empty() {
            link = link.name(&wanted.name);
        }
        if let Ok(mtu @ 1..) = u32::try_from(wanted.mtu) {
            link = link.mtu(mtu);
        }
        let name = &wanted.name;
        let set = handle.link().set(link.build()).execute().await;
        set.with_context(|| format!("cannot set up {name}"))?;
        for address in addresses {
            let mut add = handle
                .address()
                .add(index, address.addr(), address.prefix_len());
            if address.addr().is_ipv6() {
                // Duplicate address detection is skipped: it is unnecessary, and would take a second.
                let message = add.message_mut();
                message.header.flags |= AddressHeaderFlags::Nodad;
                let flags = AddressAttribute::Flags(AddressFlags::Nodad);
                message.attributes.push(flags);
            }
            let added = add.replace().execute().await;
            added.with_context(|| format!("cannot give {name} the address {address}"))?;
        }
        let up = handle
            .link()
            .set(LinkUnspec::new_with_index(index).up().build())
            .execute()
            .await;
        up.with_context(|| format!("cannot take {name} up"))?;
        for neighbour in &wanted.neighbours {
            let added = add_neighbour(&handle, index, neighbour).await;
            added.with_context(|| format!("cannot add the neighbour {neighbour:?}"))?;
        }
        Ok(())
    })
    .await
}

async fn add_neighbour(handle: &Handle, index: u32, neighbour: &Neighbour) -> Result<()> {
    let bytes = neighbour.hw_addr.split(':');
    let bytes = bytes.map(|byte| u8::from_str_radix(byte, 16));
    let bytes = bytes.collect::<Result<Vec<u8>, _>>()?;
    let add = handle
        .neighbours()
        .add(index, neighbour.ip_address.parse()?)
        .state(NeighbourState::Permanent)
        .link_layer_address(&bytes);
    Ok(add.replace().execute().await?)
}

/// Connects a TCP port of the loopback to a stream of the host.
pub(crate) async fn connect_port(port: u16, token: &str) -> Result<()> {
    let both = [
        SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
        SocketAddr::from((Ipv6Addr::LOCALHOST, port)),
    ];
    // A listener with a full backlog would leave a connection waiting for minutes.
    let socket = tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect(both.as_slice()))
        .await
        .with_context(|| format!("port {port} of the guest does not answer"))?
        .with_context(|| format!("nobody listens at port {port} of the guest"))?;
    socket.set_nodelay(true)?;
    forward(socket, token).await
}

/// Connects a socket to a stream of the host.
pub(crate) async fn forward(
    mut socket: impl AsyncRead + AsyncWrite + Unpin + 'static,
    token: &str,
) -> Result<()> {
    let address = VsockAddr::new(VMADDR_CID_HOST, STREAM_PORT);
    let mut stream = VsockStream::connect(address).await?;
    stream.write_all(token.as_bytes()).await?;
    tokio::task::spawn_local(async move {
        // Either side may close the connection.
        tokio::io::copy_bidirectional(&mut socket, &mut stream)
            .await
            .ok();
    });
    Ok(())
}

/// Makes the kernel probe a slot that holds a network now.
pub(crate) fn attach(slot: u32) -> Result<()> {
    let name = slots::probe(slot, "network")?;
    // The network's own driver may have failed, which the slot's driver does not report.
    if !slots::device(&name).is_ok_and(|device| device.join("net").exists()) {
        slots::unbind(&name).ok();
        bail!("the device in slot {slot} is no network");
    }
    Ok(())
}

/// Makes the kernel release the device of an interface that was set up.
pub(crate) async fn detach(interface: &Interface) -> Result<()> {
    let (hw_addr, name) = (&interface.hw_addr, &interface.name);
    let found = with_kernel(async |handle| {
        let links: Vec<LinkMessage> = handle.link().get().execute().try_collect().await?;
        let index = find(&links, hw_addr, Some(name)).ok();
        let link = links.into_iter().find(|l| Some(l.header.index) == index);
        let mut attributes = link.into_iter().flat_map(|link| link.attributes);
        Ok(attributes.find_map(|attribute| match attribute {
            LinkAttribute::IfName(own) => Some(own),
            _ => None,
        }))
    });
    let Some(own) = found.await? else {
        return Ok(());
    };
    // /sys/devices/platform/SLOT/virtioN
    let device = fs::canonicalize(format!("/sys/class/net/{own}/device"))
        .with_context(|| format!("{own} has no device"))?;
    let slot = device.parent().and_then(|slot| slot.file_name());
    let slot = slot.with_context(|| format!("{own} has no slot"))?;
    slots::unbind(&slot.to_string_lossy())
}

/// The interface with this MAC address. Networks on one host interface (ipvlan) share an address: of several, the one with the
/// name that it is known by, or the first one that is not set up yet, since both sides have them in the same order.
fn find(links: &[LinkMessage], hw_addr: &str, known: Option<&str>) -> Result<u32> {
    let has_address = |link: &&LinkMessage| {
        link.attributes.iter().any(|attribute| {
            let LinkAttribute::Address(bytes) = attribute else {
                return false;
            };
            let text: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            text.join(":").eq_ignore_ascii_case(hw_addr)
        })
    };
    let is_up = |link: &LinkMessage| link.header.flags.contains(LinkFlags::Up);
    let all = links.iter().filter(has_address);
    let named = known.and_then(|name| holder(links, name));
    let first = all.min_by_key(|link| {
        let index = link.header.index;
        (Some(index) != named, is_up(link), index)
    });
    let first = first.map(|link| link.header.index);
    first.with_context(|| format!("the guest has no interface with the address {hw_addr}"))
}

/// The interface with this name.
fn holder(links: &[LinkMessage], name: &str) -> Option<u32> {
    let has_name = |link: &&LinkMessage| {
        let mut attributes = link.attributes.iter();
        attributes.any(|a| matches!(a, LinkAttribute::IfName(own) if own == name))
    };
    links.iter().find(has_name).map(|link| link.header.index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, last: u8, is_up: bool) -> LinkMessage {
        let mut link = LinkMessage::default();
        link.header.index = index;
        if is_up {
            link.header.flags = LinkFlags::Up;
        }
        link.attributes = vec![
            LinkAttribute::IfName(name.into()),
            LinkAttribute::Address(vec![2, 0, 0, 0, 0, last]),
        ];
        link
    }

    #[test]
    fn interfaces_of_one_address_are_set_up_one_after_the_other() {
        let links = |first: bool, second: bool| {
            vec![
                link(1, "lo", 0, true),
                link(3, "eth1", 0xaa, second),
                link(2, "eth0", 0xaa, first),
                link(4, "eth2", 0xbb, false),
            ]
        };
        let address = "02:00:00:00:00:AA";
        assert_eq!(find(&links(false, false), address, None).unwrap(), 2);
        assert_eq!(find(&links(true, false), address, None).unwrap(), 3);
        assert_eq!(find(&links(true, true), address, None).unwrap(), 2);
        assert_eq!(find(&links(true, true), address, Some("eth1")).unwrap(), 3);
        // Renamed by a container.
        assert_eq!(find(&links(true, true), address, Some("x")).unwrap(), 2);
        assert_eq!(find(&links(true, true), address, Some("eth2")).unwrap(), 2);
        assert!(find(&links(false, false), "02:00:00:00:00:cc", None).is_err());
        assert_eq!(holder(&links(false, false), "eth2"), Some(4));
        assert_eq!(holder(&links(false, false), "eth9"), None);
    }
}
