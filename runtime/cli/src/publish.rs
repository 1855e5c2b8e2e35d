//! `koya run --publish`: ports of the guest that are published on the host.

use anyhow::{Context, Result, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::str::FromStr;

/// A range of host ports and the range of guest ports that they are mapped to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ports {
    /// The host address that they are published on; `None` means all.
    address: Option<IpAddr>,
    /// First port of each range, and their length.
    host: u16,
    guest: u16,
    count: u16,
    udp: bool,
}

/// `[ADDRESS:]HOST:GUEST[/tcp|/udp]`, with ports or ranges of equal length.
impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not [ADDRESS:]HOST:GUEST[/tcp|/udp]");
        let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let udp = match protocol.to_ascii_lowercase().as_str() {
            "tcp" => false,
            "udp" => true,
            _ => return Err(wrong()),
        };
        let (rest, guest) = ports.rsplit_once(':').ok_or_else(wrong)?;
        let (address, host) = match rest.rsplit_once(':') {
            None => (None, rest),
            Some((address, host)) => {
                let bare = address.strip_prefix('[').and_then(|a| a.strip_suffix(']'));
                let address = bare.unwrap_or(address).parse().map_err(|_| wrong())?;
                (Some(address), host)
            }
        };
        let (host, of_host) = range(host).ok_or_else(wrong)?;
        let (guest, of_guest) = range(guest).ok_or_else(wrong)?;
        if of_host != of_guest {
            return Err(format!(
                "{text:?}: {of_host} ports of the host for {of_guest} of the guest"
            ));
        }
        Ok(Self {
            address,
            host,
            guest,
            count: of_host,
            udp,
        })
    }
}

/// Parses a port or range into the first port and the length.
fn range(text: &str) -> Option<(u16, u16)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let first = first.parse::<u16>().ok().filter(|port| *port != 0)?;
    let more = last.parse::<u16>().ok()?.checked_sub(first)?;
    Some((first, more.checked_add(1)?))
}

impl Ports {
    /// The TCP ports of the guest.
    pub(super) fn tcp_of_guest(&self) -> impl Iterator<Item = u16> {
        let count = if self.udp { 0 } else { self.count };
        (0..count).map(|n| self.guest + n)
    }

    /// UDP ports that are published at the host's loopback: each address and port of the host with the port of the guest.
    pub(super) fn udp_at_loopback(&self) -> impl Iterator<Item = (SocketAddr, u16)> {
        let [v4, v6] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let addresses = match self.address {
            None => vec![v4, v6],
            Some(address) if address == EVERYWHERE[0] => vec![v4],
            Some(address) if address == EVERYWHERE[1] => vec![v6],
            Some(address) if address.is_loopback() => vec![address],
            Some(_) => Vec::new(),
        };
        let count = if self.udp { self.count } else { 0 };
        (0..count).flat_map(move |n| {
            let ports = (self.host + n, self.guest + n);
            let at = move |address: &IpAddr| (SocketAddr::new(*address, ports.0), ports.1);
            addresses.iter().map(at).collect::<Vec<_>>()
        })
    }

    /// Whether all datagrams to these ports are received without pasta.
    fn is_without_pasta(&self) -> bool {
        self.udp && self.address.is_some_and(|address| address.is_loopback())
    }

    /// A host port that `other` maps to a different guest port, at any address: pasta has only one guest port for each
    /// host port.
    fn conflict(&self, other: &Self) -> Option<u16> {
        let of_other = |host: u16| {
            let offset = host.checked_sub(other.host)?;
            (offset < other.count).then(|| other.guest + offset)
        };
        let mut ports = (0..self.count).map(|n| (self.host + n, self.guest + n));
        let found = ports.find(|(host, guest)| of_other(*host).is_some_and(|g| g != *guest));
        found
            .filter(|_| self.udp == other.udp)
            .map(|(host, _)| host)
    }

    /// The options for pasta.
    fn options(&self) -> [String; 2] {
        let option = match self.udp {
            true => "--udp-ports",
            false => "--tcp-ports",
        };
        let address = self.address.map_or_else(String::new, |a| format!("{a}/"));
        let range = |first: u16| match self.count {
            1 => first.to_string(),
            count => format!("{first}-{}", first + (count - 1)),
        };
        let ports = format!("{address}{}:{}", range(self.host), range(self.guest));
        [option.to_owned(), ports]
    }
}

/// The same ports without duplicates, as pasta requires: each port once for each address, and only for the wildcard
/// address (`0.0.0.0`, `::`) if that is included.
fn merged(publish: &[Ports]) -> Vec<Ports> {
    let mut all = BTreeMap::new();
    for ports in publish {
        for n in 0..ports.count {
            let one: &mut (u16, BTreeSet<_>) = all.entry((ports.udp, ports.host + n)).or_default();
            one.0 = ports.guest + n;
            one.1.insert(ports.address);
        }
    }
    let mut merged: Vec<Ports> = Vec::new();
    for ((udp, host), (guest, mut addresses)) in all {
        let [every_v4, every_v6] = EVERYWHERE.map(|address| addresses.contains(&Some(address)));
        if addresses.contains(&None) || every_v4 && every_v6 {
            addresses = BTreeSet::from([None]);
        }
        addresses.retain(|address| match address {
            Some(IpAddr::V4(one)) => !every_v4 || one.is_unspecified(),
            Some(IpAddr::V6(one)) => !every_v6 || one.is_unspecified(),
            None => true,
        });
        for address in addresses {
            let next = |ports: &&mut Ports| {
                (ports.udp, ports.address) == (udp, address)
                    && host.checked_sub(ports.host) == Some(ports.count)
                    && guest.checked_sub(ports.guest) == Some(ports.count)
            };
            match merged.iter_mut().rev().take(MOST_ADDRESSES).find(next) {
                Some(ports) => ports.count += 1,
                None => merged.push(Ports {
                    address,
                    host,
                    guest,
                    count: 1,
                    udp,
                }),
            }
        }
    }
    merged
}

/// The wildcard addresses.
const EVERYWHERE: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    IpAddr::V6(Ipv6Addr::UNSPECIFIED),
];

/// Number of preceding ranges searched for one that can be extended. A longer search would find few more.
const MOST_ADDRESSES: usize = 8;

/// The options for pasta for all published ports.
pub(super) fn options(publish: &[Ports]) -> Vec<String> {
    let mut all = merged(publish);
    all.retain(|ports| !ports.is_without_pasta());
    let mut options: Vec<String> = all.iter().flat_map(Ports::options).collect();
    for option in ["--tcp-ports", "--udp-ports"] {
        // Its default is all ports in use.
        if !options.iter().any(|word| word == option) {
            options.extend([option, "none"].map(str::to_owned));
        }
    }
    options
}

/// Checks that published ports are free: pasta reports an error only if none of them is.
pub(super) fn check(publish: &[Ports]) -> Result<()> {
    for (index, ports) in publish.iter().enumerate() {
        // pasta would use only the last mapping.
        let mut others = publish[..index].iter();
        if let Some(port) = others.find_map(|other| ports.conflict(other)) {
            bail!("port {port} of the host is published twice, for different ports of the guest");
        }
    }
    for ports in publish {
        let address = ports.address.unwrap_or(Ipv4Addr::UNSPECIFIED.into());
        for port in (0..ports.count).map(|n| ports.host + n) {
            let free = match ports.udp {
                true => UdpSocket::bind((address, port)).map(drop),
                false => TcpListener::bind((address, port)).map(drop),
            };
            free.with_context(|| match ports.address {
                Some(address) => format!("cannot publish port {port} at {address}"),
                None => format!("cannot publish port {port} of the host"),
            })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Ports {
        text.parse().unwrap()
    }

    #[test]
    fn ports_are_parsed() {
        let plain = parse("8080:80");
        assert_eq!(
            (plain.host, plain.guest, plain.count, plain.udp),
            (8080, 80, 1, false)
        );
        assert_eq!(plain, parse("8080:80/tcp"));
        assert_eq!(plain, parse("8080:80/TCP"));
        assert_eq!(plain.tcp_of_guest().collect::<Vec<_>>(), [80]);
        let names = parse("53:5353/udp");
        assert!(names.udp && names.tcp_of_guest().count() == 0);
        assert_eq!(plain.udp_at_loopback().count(), 0);
        let at_loopback = |text: &str| -> Vec<String> {
            let of = |(at, guest)| format!("{at} {guest}");
            parse(text).udp_at_loopback().map(of).collect()
        };
        let both = ["127.0.0.1:53 5353", "[::1]:53 5353"];
        assert_eq!(at_loopback("53:5353/udp"), both);
        assert_eq!(at_loopback("0.0.0.0:53:5353/udp"), both[..1]);
        assert_eq!(at_loopback("[::]:53:5353/udp"), both[1..]);
        let two = ["127.0.0.2:1 3", "127.0.0.2:2 4"];
        assert_eq!(at_loopback("127.0.0.2:1-2:3-4/udp"), two);
        assert!(at_loopback("192.0.2.1:53:53/udp").is_empty());
        let range = parse("8000-8002:9000-9002");
        assert_eq!(range.tcp_of_guest().collect::<Vec<_>>(), [9000, 9001, 9002]);
        assert_eq!(
            parse("65535:65535").tcp_of_guest().collect::<Vec<_>>(),
            [65535]
        );
        for bad in [
            "80",
            "80:",
            "0:80",
            "80:70000",
            "80:80/sctp",
            "x:80",
            "x:80:80",
            "1-2:80",
            "2-1:2-1",
            "::1:80:80:x",
        ] {
            assert!(bad.parse::<Ports>().is_err(), "{bad}");
        }
    }

    #[test]
    fn pasta_is_told_of_addresses_and_ranges() {
        let all = [
            "127.0.0.1:8080:80",
            "[::1]:8080:80",
            "53:53/udp",
            "8000-8002:9000-9002",
        ];
        let all = all.map(parse);
        assert_eq!(
            options(&all).join(" "),
            "--tcp-ports 8000-8002:9000-9002 --tcp-ports 127.0.0.1/8080:80 --tcp-ports ::1/8080:80 --udp-ports 53:53"
        );
        let none = "--tcp-ports none --udp-ports none";
        assert_eq!(options(&[]).join(" "), none);
        assert_eq!(options(&[parse("127.0.0.1:53:53/udp")]).join(" "), none);
    }

    #[test]
    fn a_port_that_is_taken_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = check(&[parse(&format!("127.0.0.1:{port}:80"))]).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("cannot publish port {port} at 127.0.0.1")
        );
    }

    #[test]
    fn a_port_of_the_host_leads_to_one_of_the_guest() {
        let conflict = |one: &str, other: &str| parse(one).conflict(&parse(other));
        assert_eq!(conflict("8080:80", "8080:81"), Some(8080));
        let other_address = conflict("127.0.0.1:8080:80", "8000-8100:8000-8100");
        assert_eq!(other_address, Some(8080));
        assert_eq!(conflict("8080:80", "8080:81/udp"), None);
        assert_eq!(conflict("127.0.0.1:8080:80", "[::1]:8080:80"), None);
        assert_eq!(conflict("8000-8010:9000-9010", "8005:9005"), None);
        let twice = [parse("8080:80"), parse("8080:81")];
        let error = check(&twice).unwrap_err();
        assert!(error.to_string().contains("published twice"), "{error}");
    }

    /// pasta rejects duplicate ports.
    #[test]
    fn a_port_that_is_named_again_is_published_once() {
        for (publish, expected) in [
            (&["80:80", "80:80"][..], "80:80"),
            (&["8000-8010:9000-9010", "8005:9005"], "8000-8010:9000-9010"),
            (&["8000-8002:80-82", "8001-8005:81-85"], "8000-8005:80-85"),
            (&["127.0.0.1:80:80", "80:80"], "80:80"),
            (&["0.0.0.0:80:80", "[::]:80:80"], "80:80"),
            (&["0.0.0.0:80:80", "127.0.0.1:80:80"], "0.0.0.0/80:80"),
        ] {
            let all: Vec<_> = publish.iter().copied().map(parse).collect();
            let expected = format!("--tcp-ports {expected} --udp-ports none");
            assert_eq!(options(&all).join(" "), expected, "{publish:?}");
        }
        let most = options(&[parse("1-65535:1-65535"), parse("[::1]:1-65535:1-65535")]);
        assert_eq!(
            most.join(" "),
            "--tcp-ports 1-65535:1-65535 --udp-ports none"
        );
    }
}
