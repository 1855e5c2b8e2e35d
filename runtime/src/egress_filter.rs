//! Destinations that a guest must not reach through a process on the host that connects on its behalf: detection of the
//! host's own addresses, and rules that drop frames to them.

use crate::Error;
use crate::network::{INGRESS, ingress, on_this_thread, other, routes_of};
use futures::TryStreamExt as _;
use ipnet::IpNet;
use rtnetlink::Handle;
use rtnetlink::packet_core::DefaultNla;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use rtnetlink::packet_route::tc::{
    TcAction, TcActionAttribute, TcActionOption, TcFilterU32Option, TcU32Key, TcU32Selector,
    TcU32SelectorFlags,
};
use std::io;
use std::net::IpAddr;

/// The kernel's table of local addresses (linux/rtnetlink.h).
const RT_TABLE_LOCAL: u8 = 255;
/// IPv4 and IPv6 in an Ethernet header (linux/if_ether.h).
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;

/// Local addresses of the host in the calling thread's network namespace: IPv4 and IPv6 addresses of all interfaces,
/// including link-local ones, and further entries of the local routing table; aggregated to as few networks as possible.
/// Starts no thread; must not be called from an asynchronous runtime.
///
/// # Errors
/// The error from the kernel.
pub fn host_addresses() -> Result<Vec<IpNet>, Error> {
    let found = on_this_thread(|handle| Box::pin(read_addresses(handle)));
    found.map_err(Error::host("read the host's addresses"))
}

async fn read_addresses(handle: Handle) -> io::Result<Vec<IpNet>> {
    let mut all = Vec::new();
    let mut addresses = handle.address().get().execute();
    while let Some(message) = addresses.try_next().await.map_err(other)? {
        all.extend(address(&message.attributes).map(IpNet::from));
    }
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        for message in routes_of(&handle, family).await? {
            all.extend(local_route(&message));
        }
    }
    Ok(IpNet::aggregate(&all))
}

/// The local address: on a point-to-point link, the other attribute is the peer's.
fn address(attributes: &[AddressAttribute]) -> Option<IpAddr> {
    let local = attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    local.or_else(|| {
        attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })
    })
}

/// Destination of a route in the kernel's local table; other tables have such routes for some packets only (transparent
/// proxies), and a default route is not informative.
fn local_route(message: &RouteMessage) -> Option<IpNet> {
    let header = &message.header;
    let own = header.table == RT_TABLE_LOCAL
        && matches!(header.kind, RouteType::Local | RouteType::Anycast)
        && header.destination_prefix_length > 0;
    let attributes = message.attributes.iter().filter(|_| own);
    let mut found = attributes.filter_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    });
    IpNet::new(found.next()?, header.destination_prefix_length).ok()
}

/// All destinations that a guest must not reach through a process on the host: pasta connects to any destination of a frame,
/// and these are the host itself.
pub(crate) fn destinations(own: &[IpNet], further: &[IpNet]) -> Vec<IpNet> {
    let fixed = [
        "0.0.0.0/8",
        "127.0.0.0/8",
        "::/128",
        "::1/128",
        "::ffff:0:0/96",
    ];
    let fixed = fixed.iter().filter_map(|text| text.parse().ok());
    let all = fixed.chain(own.iter().map(|net| net.addr().into()));
    // Every frame is compared with each rule, so the list is minimized.
    IpNet::aggregate(&all.chain(further.iter().copied()).collect())
}

/// Verdict on a frame (linux/pkt_cls.h).
#[derive(Clone, Copy)]
pub(crate) enum Verdict {
    /// Passed to the namespace's own network stack.
    Accepted = 0,
    /// Dropped.
    Dropped = 2,
}

/// Sets the verdict on frames from a guest to these destinations, before they are forwarded.
pub(crate) async fn decide(
    handle: &Handle,
    tap: u32,
    destinations: &[IpNet],
    verdict: Verdict,
) -> io::Result<()> {
    ingress(handle, tap).await?;
    let gact = {
        // `struct tc_gact` (linux/tc_act/tc_gact.h): index, capabilities, action, two counts.
        const TCA_GACT_PARMS: u16 = 2;
        let words = [0, 0, verdict as i32, 0, 0];
        let bytes = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut action = TcAction::default();
        action.attributes = vec![
            TcActionAttribute::Kind("gact".into()),
            TcActionAttribute::Options(vec![TcActionOption::Other(DefaultNla::new(
                TCA_GACT_PARMS,
                bytes,
            ))]),
        ];
        action
    };
    for destination in destinations {
        let (protocol, priority) = match destination {
            IpNet::V4(_) => (ETH_P_IP, 1),
            IpNet::V6(_) => (ETH_P_IPV6, 2),
        };
        let mut selector = TcU32Selector::default();
        selector.flags = TcU32SelectorFlags::Terminal;
        selector.keys = u32_keys(*destination);
        selector.nkeys = selector.keys.len() as u8;
        let options = [
            TcFilterU32Option::Selector(selector),
            TcFilterU32Option::Action(vec![gact.clone()]),
        ];
        handle
            .traffic_filter(tap as i32)
            .add()
            .parent(INGRESS)
            .priority(priority)
            .protocol(protocol.to_be())
            .u32(&options)
            .map_err(other)?
            .execute()
            .await
            .map_err(other)?;
    }
    Ok(())
}

/// The part of an IP header that must match `destination`: words, with their offsets in the header.
fn u32_keys(destination: IpNet) -> Vec<TcU32Key> {
    let (bytes, first) = match destination {
        IpNet::V4(net) => (net.network().octets().to_vec(), 16),
        IpNet::V6(net) => (net.network().octets().to_vec(), 24),
    };
    let mut left = u32::from(destination.prefix_len());
    let mut keys = Vec::new();
    for (index, word) in bytes.chunks_exact(4).enumerate() {
        let bits = left.min(32);
        left -= bits;
        if bits == 0 {
            break;
        }
        let mut key = TcU32Key::default();
        key.mask = u32::MAX << (32 - bits);
        key.val = word
            .iter()
            .fold(0, |value, byte| value << 8 | u32::from(*byte));
        key.off = first + 4 * index as i32;
        keys.push(key);
    }
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_words_of_their_header() {
        let keys = |text: &str| -> Vec<(u32, u32, i32)> {
            let keys = u32_keys(text.parse().unwrap()).into_iter();
            keys.map(|key| (key.mask, key.val, key.off)).collect()
        };
        assert_eq!(keys("127.0.0.0/8"), [(0xff00_0000, 0x7f00_0000, 16)]);
        assert_eq!(keys("192.0.2.1/32"), [(u32::MAX, 0xc000_0201, 16)]);
        let mapped = keys("::ffff:0:0/96");
        assert_eq!(mapped[2], (u32::MAX, 0xffff, 32));
        assert_eq!(mapped.len(), 3);
        assert_eq!(keys("::1/128")[3], (u32::MAX, 1, 36));
    }

    #[test]
    fn the_host_itself_is_out_of_reach() {
        let own = ["198.51.100.2/24".parse().unwrap()];
        let further = ["203.0.113.9/32", "fe80::1/128", "127.0.0.1/32"];
        let further = further.map(|text| text.parse().unwrap());
        let all = destinations(&own, &further);
        let refused = |ip: &str| {
            let ip: IpAddr = ip.parse().unwrap();
            all.iter().any(|net| net.contains(&ip))
        };
        for ip in [
            "0.0.0.0",
            "127.0.0.1",
            "127.3.2.1",
            "198.51.100.2",
            "203.0.113.9",
            "::",
            "::1",
            "::ffff:192.0.2.1",
            "fe80::1",
        ] {
            assert!(refused(ip), "{ip}");
        }
        for ip in [
            "198.51.100.1",
            "203.0.113.8",
            "8.8.8.8",
            "fe80::2",
            "2001:db8::1",
        ] {
            assert!(!refused(ip), "{ip}");
        }
        // A network contained in another has no rule, and `::` and `::1` are merged.
        assert_eq!(all.len(), 7, "{all:?}");
    }

    /// As the kernel compares them: words of the header with keys.
    #[test]
    fn a_frame_is_refused_by_its_destination_alone() {
        let matches = |net: &str, ip: &str| {
            let mut header = [0x11; 64];
            let (at, bytes) = match ip.parse().unwrap() {
                IpAddr::V4(ip) => (16, ip.octets().to_vec()),
                IpAddr::V6(ip) => (24, ip.octets().to_vec()),
            };
            header[at..at + bytes.len()].copy_from_slice(&bytes);
            u32_keys(net.parse().unwrap()).iter().all(|key| {
                let at = key.off as usize;
                let word = u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
                word & key.mask == key.val
            })
        };
        assert!(matches("203.0.113.9/32", "203.0.113.9"));
        assert!(!matches("203.0.113.9/32", "203.0.113.8"));
        assert!(matches("203.0.113.8/30", "203.0.113.9"));
        assert!(!matches("203.0.113.8/30", "203.0.113.12"));
        assert!(matches("fe80::abcd/128", "fe80::abcd"));
        assert!(!matches("fe80::abcd/128", "fe80::1:abcd"));
        assert!(matches("2001:db8:0:40::/58", "2001:db8:0:7f::1"));
        assert!(!matches("2001:db8:0:40::/58", "2001:db8:0:80::1"));
    }

    #[test]
    fn the_hosts_addresses_are_found() {
        let all = host_addresses().unwrap();
        let has = |ip: &str| {
            let ip: IpAddr = ip.parse().unwrap();
            all.iter().any(|net| net.contains(&ip))
        };
        assert!(has("127.0.0.1") && has("127.200.0.1"), "{all:?}");
        // Cross-check: the list contains the source address of an outgoing connection.
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        if socket.connect("192.0.2.1:9").is_ok() {
            assert!(
                has(&socket.local_addr().unwrap().ip().to_string()),
                "{all:?}"
            );
        }
        assert!(!has("192.0.2.1") && !has("2001:db8::1"), "{all:?}");
    }

    #[test]
    fn of_a_link_between_two_the_hosts_end_is_its() {
        let [own, peer] = ["192.0.2.1", "192.0.2.2"].map(|ip| ip.parse::<IpAddr>().unwrap());
        let both = [
            AddressAttribute::Address(peer),
            AddressAttribute::Local(own),
        ];
        assert_eq!(address(&both), Some(own));
        assert_eq!(address(&both[..1]), Some(peer));
        assert_eq!(address(&[]), None);
    }

    #[test]
    fn routes_that_are_the_hosts_own_are_told_from_others() {
        let route = |table: u8, kind: RouteType, prefix: u8| {
            let mut message = RouteMessage::default();
            message.header.table = table;
            message.header.kind = kind;
            message.header.destination_prefix_length = prefix;
            let destination = RouteAddress::Inet6("2001:db8::".parse().unwrap());
            message.attributes = vec![RouteAttribute::Destination(destination)];
            local_route(&message).map(|net| net.to_string())
        };
        let local = RT_TABLE_LOCAL;
        let main = rtnetlink::packet_route::route::RouteHeader::RT_TABLE_MAIN;
        assert_eq!(route(local, RouteType::Local, 64).unwrap(), "2001:db8::/64");
        assert!(route(local, RouteType::Anycast, 128).is_some());
        assert!(route(local, RouteType::Local, 0).is_none());
        assert!(route(local, RouteType::Multicast, 8).is_none());
        assert!(route(100, RouteType::Local, 8).is_none());
        assert!(route(main, RouteType::Unicast, 24).is_none());
    }
}
