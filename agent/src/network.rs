//! The guest's interfaces and routes, as the host wants them (rtnetlink(7)), and connections to its
//! ports.

use anyhow::{Context, Result, bail};
use futures::TryStreamExt as _;
use ipnet::IpNet;
use koya_protocol::STREAM_PORT;
use koya_protocol::messages::{Interface, Neighbour, Route};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

/// How long a port of the loopback may take to accept a connection.
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

/// Names the interface with this Ethernet address, gives it its addresses, and takes it up.
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
        let index = find(&handle, &wanted.hw_addr).await?;
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
                // Nobody else has it: whoever gave it made sure. Looking would take a second.
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

/// Joins a TCP port of the loopback to a stream of the host.
pub(crate) async fn connect_port(port: u16, token: &str) -> Result<()> {
    let both = [
        SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
        SocketAddr::from((Ipv6Addr::LOCALHOST, port)),
    ];
    // A listener that accepts nobody leaves a connection waiting for minutes.
    let mut socket = tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect(both.as_slice()))
        .await
        .with_context(|| format!("port {port} of the guest does not answer"))?
        .with_context(|| format!("nobody listens at port {port} of the guest"))?;
    socket.set_nodelay(true)?;
    let address = VsockAddr::new(VMADDR_CID_HOST, STREAM_PORT);
    let mut stream = VsockStream::connect(address).await?;
    stream.write_all(token.as_bytes()).await?;
    tokio::task::spawn_local(async move {
        // Its end is whoever's who closed it.
        tokio::io::copy_bidirectional(&mut socket, &mut stream)
            .await
            .ok();
    });
    Ok(())
}

async fn find(handle: &Handle, hw_addr: &str) -> Result<u32> {
    let mut links = handle.link().get().execute();
    while let Some(link) = links.try_next().await? {
        let here = link.attributes.iter().any(|attribute| {
            let LinkAttribute::Address(bytes) = attribute else {
                return false;
            };
            let text: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            text.join(":").eq_ignore_ascii_case(hw_addr)
        });
        if here {
            return Ok(link.header.index);
        }
    }
    bail!("the guest has no interface with the address {hw_addr}")
}

/// Adds routes, in an order in which gateways are reachable when they are named.
pub(crate) async fn update_routes(routes: &[Route]) -> Result<()> {
    with_kernel(async |handle| {
        let on_link = routes.iter().filter(|route| route.gateway.is_empty());
        let beyond = routes.iter().filter(|route| !route.gateway.is_empty());
        for route in on_link.chain(beyond) {
            let added = add_route(&handle, route).await;
            let Route {
                dest,
                gateway,
                device,
                ..
            } = route;
            added.with_context(|| format!("cannot route {dest} by {device} {gateway}"))?;
        }
        Ok(())
    })
    .await
}

async fn add_route(handle: &Handle, route: &Route) -> Result<()> {
    let dest: IpNet = route.dest.parse()?;
    let index = index_of(handle, &route.device).await?;
    let mut message = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(dest.network(), dest.prefix_len())?
        .output_interface(index);
    message = match route.gateway.as_str() {
        "" => message.scope(rtnetlink::packet_route::route::RouteScope::Link),
        // The gateway may be outside of every prefix of ours.
        gateway => message.gateway(gateway.parse()?)?.onlink(),
    };
    Ok(handle
        .route()
        .add(message.build())
        .replace()
        .execute()
        .await?)
}

async fn index_of(handle: &Handle, name: &str) -> Result<u32> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    let link = links.try_next().await?;
    let link = link.with_context(|| format!("the guest has no interface {name}"))?;
    Ok(link.header.index)
}
