//! A guest that processes in its network namespace on the host call by the address of an interface that it took
//! over. Ports of podman's containers without root are published like that: its `rootlessport` enters the
//! namespace and connects to the container's address, which is an address of the namespace itself.
//!
//! There it is made an address of somebody else, on the link that is the guest's tap: the namespace's own stack sends to
//! the guest by it, from a link-local address that the guest answers to by the same link.

use super::{LOCAL_TABLE, Neighbour, NetworkConfig, Route, other};
use crate::out_of_reach::{Verdict, decide};
use ipnet::IpNet;
use koya_vmm::devices::net::MacAddr;
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::packet_route::route::{RouteMessage, RouteProtocol, RouteScope, RouteType};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use std::io;
use std::net::{IpAddr, Ipv4Addr};

/// Who calls: the namespace's end of the tap. A link-local address (RFC 3927), which nobody has to be asked for, and a
/// locally administered MAC address; both mean something on this link alone.
pub(super) const CALLER: Neighbour = Neighbour {
    ip: IpAddr::V4(Ipv4Addr::new(169, 254, 75, 1)),
    mac: MacAddr([0x02, 0x4b, 0x6f, 0x79, 0x61, 0x01]),
};

/// The guest's way back.
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

/// Has the namespace reach the guest by its tap instead of itself by the interface.
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
    // The namespace takes it for a lie that its own addresses come from elsewhere (ip-sysctl).
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
        // Last: from here on nothing of the namespace answers for the guest.
        let removed = handle.route().del(own(address, interface)).execute().await;
        removed.map_err(other)?;
    }
    Ok(())
}

/// Gives the namespace its addresses back.
pub(super) async fn give_back(
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
