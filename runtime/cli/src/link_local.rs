//! `--net user` on a host without a default route, where published ports work too.
//!
//! pasta gives the guest the addresses of the host's interface with the default route, and fails without one (later versions
//! use link-local ones). Without a route it is given two link-local addresses that the host does not use.

use anyhow::{Context, Result};
use std::fs;
use std::net::Ipv4Addr;

/// First candidate pair, outside the network of the resolver (169.254.1.0/24).
const FIRST: Ipv4Addr = Ipv4Addr::new(169, 254, 2, 1);
/// MAC address of pasta's end, locally administered.
const GATEWAY_MAC: &str = "02:6b:6f:79:61:01";

/// A network between the guest and pasta.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LinkLocalNetwork {
    gateway: Ipv4Addr,
    guest: Ipv4Addr,
}

impl LinkLocalNetwork {
    /// A network with two free addresses.
    pub(super) fn find(is_free: impl Fn(&Ipv4Addr) -> bool) -> Result<Self> {
        let pairs = (0..253).map(|n| {
            let gateway = u32::from(FIRST) + (n << 8);
            Self {
                gateway: gateway.into(),
                guest: (gateway + 1).into(),
            }
        });
        let mut free = pairs.filter(|pair| is_free(&pair.gateway) && is_free(&pair.guest));
        free.next()
            .context("no free link-local network: the host uses all of 169.254.0.0/16")
    }

    /// The options for pasta.
    pub(super) fn options(&self) -> Vec<String> {
        let (guest, gateway) = (self.guest.to_string(), self.gateway.to_string());
        let words = [
            "--ipv4-only",
            "--interface",
            "lo",
            "--mac-addr",
            GATEWAY_MAC,
            "--address",
            &guest,
            "--netmask",
            "24",
            "--gateway",
            &gateway,
        ];
        words.map(str::to_owned).to_vec()
    }
}

/// Whether this network namespace has a default route.
pub(super) fn has_default_route() -> bool {
    let has = |path: &str, is_default: fn(&str) -> bool| {
        // Without IPv6 this file does not exist.
        let routes = fs::read_to_string(path).unwrap_or_default();
        routes.lines().any(is_default)
    };
    has("/proc/net/route", is_default_v4) || has("/proc/net/ipv6_route", is_default_v6)
}

/// `RTF_UP` and `RTF_REJECT` of linux/route.h.
const UP: u32 = 0x1;
const REJECT: u32 = 0x200;

fn is_usable(flags: &str) -> bool {
    u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & (UP | REJECT) == UP)
}

/// A line of `/proc/net/route`: interface, destination, gateway, flags, three counts, mask, ...
fn is_default_v4(line: &str) -> bool {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words.as_slice() {
        [_, "00000000", _, flags, _, _, _, "00000000", ..] => is_usable(flags),
        _ => false,
    }
}

/// A line of `/proc/net/ipv6_route`: destination, its prefix, source, its prefix, gateway, three counts, flags,
/// interface.
fn is_default_v6(line: &str) -> bool {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words.as_slice() {
        [to, "00", _, _, _, _, _, _, flags, name] => {
            to.bytes().all(|digit| digit == b'0') && is_usable(flags) && *name != "lo"
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_routes_are_told_from_others() {
        let head =
            "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT";
        assert!(!is_default_v4(head));
        let v4 = |to, flags, mask| {
            is_default_v4(&format!(
                "eth0\t{to}\t010011AC\t{flags}\t0\t0\t0\t{mask}\t0\t0\t0"
            ))
        };
        assert!(v4("00000000", "0003", "00000000"));
        assert!(!v4("00000000", "0201", "00000000"), "unreachable");
        assert!(!v4("000011AC", "0001", "0000FFFF"));
        let zero = "0".repeat(32);
        let v6 = |to: &str, prefix, flags, name| {
            is_default_v6(&format!(
                "{to} {prefix} {zero} 00 {zero} 00000400 00000001 00000000 {flags} {name}"
            ))
        };
        assert!(v6(&zero, "00", "00000003", "eth0"));
        assert!(
            !v6(&zero, "00", "00200200", "lo"),
            "every host has this one"
        );
        assert!(!v6(&zero, "80", "00000001", "eth0"));
    }

    #[test]
    fn a_network_alone_is_nobody_elses() {
        let first = LinkLocalNetwork::find(|_| true).unwrap();
        assert_eq!(first.gateway, FIRST);
        let taken = Ipv4Addr::new(169, 254, 2, 2);
        let next = LinkLocalNetwork::find(|ip| *ip != taken).unwrap();
        assert_eq!(next.guest, Ipv4Addr::new(169, 254, 3, 2));
        assert!(LinkLocalNetwork::find(|_| false).is_err());
        let last = LinkLocalNetwork::find(|ip| ip.octets()[2] == 254).unwrap();
        assert!(last.guest.is_link_local());
        let words = first.options().join(" ");
        assert!(
            words.contains("--address 169.254.2.2 ") && words.contains("--gateway 169.254.2.1")
        );
    }
}
