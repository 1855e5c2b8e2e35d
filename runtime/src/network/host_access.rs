//! Connections from processes in the network namespace on the host to the address of an interface that the guest took
//! over. Without root, podman publishes ports this way: its `rootlessport` enters the namespace and connects to the
//! container's address, which is a local address of the namespace.
//!
//! The address is removed from the namespace's local routing table and routed to the guest's tap instead. The source of
//! these connections is a link-local address, to which the guest gets a route.

use super::{LOCAL_TABLE, Neighbour, NetworkConfig, Route, other};
use crate::egress_filter::{Verdict, decide};
use ipnet::IpNet;
use koya_vmm::devices::net::MacAddr;
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::packet_route::route::{RouteMessage, RouteProtocol, RouteScope, RouteType};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use std::io;
use std::net::{IpAddr, Ipv4Addr};

/// Addresses of the namespace's end of the tap, valid only on this link: a link-local IPv4 address (RFC 3927), which
/// needs no assignment, and a locally administered MAC address.
pub(super) const CALLER: Neighbour = Neighbour {
    ip: IpAddr::V4(Ipv4Addr::new(169, 254, 75, 1)),
    mac: MacAddr([0x02, 0x4b, 0x6f, 0x79, 0x61, 0x01]),
};

/// The guest's route to it.
pub(super) fn route() -> Route {
    Route::new(CALLER.ip.into(), None)
}

fn addresses(network: &NetworkConfig) -> impl Iterator<Item = Ipv4Addr> {
    network.addresses.iter().filter_map(|net| match net {
        IpNet::V4(net) => Some(net.addr()),
        IpNet::V6(_) => None,
    })
}

/// A namespace's route to an address that is its own, by the interface that has it, as the kernel makes it: one of another
/// protocol it does not find.
fn own(address: Ipv4Addr, interface: u32) -> RouteMessage {
    RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(address, 32)
        .kind(RouteType::Local)
        .protocol(RouteProtocol::Kernel)
        .table_id(LOCAL_TABLE)
        .scope(RouteScope::Host)
        .output_interface(interface)
        .pref_source(address)
        .build()
}

/// Routes the addresses of the interface to the guest's tap instead of the namespace itself.
pub(super) async fn set_up(
    handle: &Handle,
    network: &NetworkConfig,
    interface: u32,
    (name, tap): (&str, u32),
) -> io::Result<()> {
    let (IpAddr::V4(caller), Some(guest)) = (CALLER.ip, network.device.mac) else {
        return Ok(());
    };
    let mac = LinkUnspec::new_with_index(tap).address(CALLER.mac.0.to_vec());
    handle
        .link()
        .set(mac.build())
        .execute()
        .await
        .map_err(other)?;
    let add = handle.address().add(tap, CALLER.ip, 32);
    add.replace().execute().await.map_err(other)?;
    decide(handle, tap, &[CALLER.ip.into()], Verdict::Accepted).await?;
    // Otherwise the kernel drops frames from the guest, whose source is an address of the namespace (ip-sysctl).
    let accepts = format!("/proc/sys/net/ipv4/conf/{name}/accept_local");
    std::fs::write(accepts, "1")?;
    for address in addresses(network) {
        let neighbour = handle
            .neighbours()
            .add(tap, address.into())
            .link_layer_address(&guest.0)
            .state(NeighbourState::Permanent);
        neighbour.replace().execute().await.map_err(other)?;
        let there = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(address, 32)
            .scope(RouteScope::Link)
            .output_interface(tap)
            .pref_source(caller)
            .build();
        let added = handle.route().add(there).replace().execute().await;
        added.map_err(other)?;
        // Last: from now on the namespace itself does not answer at this address.
        let removed = handle.route().del(own(address, interface)).execute().await;
        removed.map_err(other)?;
    }
    Ok(())
}

/// Restores the namespace's routes to its own addresses.
pub(super) async fn restore_routes(
    handle: &Handle,
    network: &NetworkConfig,
    interface: u32,
) -> io::Result<()> {
    for address in addresses(network) {
        let route = handle.route().add(own(address, interface)).replace();
        route.execute().await.map_err(other)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::HostEnd;

    #[test]
    fn a_guest_is_called_by_the_addresses_that_have_a_way_back() {
        let mut network = NetworkConfig::new(HostEnd::Join {
            interface: "tap0".into(),
        });
        let all = ["10.0.2.100/24", "fd00::5/64", "10.0.3.1/32"];
        network.addresses = all.map(|net| net.parse().unwrap()).into();
        let called: Vec<_> = addresses(&network).map(|ip| ip.to_string()).collect();
        assert_eq!(called, ["10.0.2.100", "10.0.3.1"]);
        let back = route();
        assert_eq!(back.destination.to_string(), "169.254.75.1/32");
        assert_eq!(back.gateway, None);
    }
}
