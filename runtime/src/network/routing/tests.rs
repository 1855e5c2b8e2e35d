use super::*;
use rtnetlink::packet_core::Parseable as _;
use rtnetlink::packet_route::route::{RouteMetric, RouteNextHop};
use std::net::Ipv4Addr;

fn ip(last: u8) -> IpAddr {
    Ipv4Addr::new(192, 0, 2, last).into()
}

fn gateway(last: u8) -> RouteAttribute {
    RouteAttribute::Gateway(ip(last).into())
}

/// A default route as reported by the kernel.
fn told(attributes: Vec<RouteAttribute>) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = RouteType::Unicast;
    message.header.flags = RouteFlags::Linkdown;
    message.attributes = attributes;
    message
}

fn indices() -> HashMap<u32, u32> {
    HashMap::from([(12, 1), (14, 2)])
}

#[test]
fn a_route_keeps_what_the_guest_can_know() {
    let metrics = RouteAttribute::Metrics(vec![RouteMetric::Mtu(1300)]);
    let has = [
        gateway(1),
        RouteAttribute::Oif(14),
        RouteAttribute::Priority(50),
        RouteAttribute::Table(1000),
        metrics,
    ];
    let host = [RouteAttribute::NhId(7), RouteAttribute::Expires(90)];
    let route = told([&has[..], &host[..]].concat());
    let route = guests_route(route, &indices()).unwrap();
    let mut wanted = has.to_vec();
    wanted[1] = RouteAttribute::Oif(2);
    assert_eq!(route.attributes, wanted);
    assert_eq!(route.header.flags, RouteFlags::Onlink);
    assert_eq!(RouteMessage::parse(&bytes(&route)[..]).unwrap(), route);
}

#[test]
fn all_next_hops_are_the_sandboxs_or_there_is_no_route() {
    let route = |second| {
        let hops = [(12, 1), (second, 9)].map(|(index, last)| {
            let mut hop = RouteNextHop::default();
            hop.interface_index = index;
            hop.attributes = vec![gateway(last)];
            hop
        });
        told(vec![RouteAttribute::MultiPath(hops.to_vec())])
    };
    let found = guests_route(route(14), &indices()).unwrap();
    let RouteAttribute::MultiPath(hops) = &found.attributes[0] else {
        panic!("{found:?}");
    };
    let hops: Vec<_> = hops
        .iter()
        .map(|hop| (hop.interface_index, hop.flags))
        .collect();
    let onlink = RouteNextHopFlags::Onlink;
    assert_eq!(hops, [(1, onlink), (2, onlink)]);
    assert!(found.header.flags.is_empty());
    assert_eq!(guests_route(route(13), &indices()), None);
}

#[test]
fn routes_of_the_kernel_and_of_others_are_left_out() {
    let by = |index| told(vec![RouteAttribute::Oif(index)]);
    assert!(guests_route(by(12), &indices()).is_some());
    assert_eq!(guests_route(by(13), &indices()), None);
    let mut kernels = by(12);
    kernels.header.protocol = RouteProtocol::Kernel;
    assert_eq!(guests_route(kernels, &indices()), None);
    let mut local = by(12);
    local.attributes.push(RouteAttribute::Table(LOCAL_TABLE));
    assert_eq!(guests_route(local, &indices()), None);
    let mut dark = by(1);
    dark.header.kind = RouteType::BlackHole;
    assert_eq!(guests_route(dark, &indices()).unwrap().attributes, []);
}

#[test]
fn rules_follow_their_tables_and_interfaces() {
    let names = HashMap::from([("vethab", "eth0"), (LOOPBACK, LOOPBACK)]);
    let tables = HashSet::from([254, 1000]);
    let rule = |attributes: &[RuleAttribute]| {
        let mut rule = RuleMessage::default();
        rule.header.action = RuleAction::ToTable;
        rule.header.flags = RuleFlags::Invert | RuleFlags::IifDetached;
        rule.attributes = attributes.to_vec();
        guests_rule(rule, &tables, &names)
    };
    let by = RuleAttribute::Iifname("vethab".into());
    let found = rule(&[RuleAttribute::Table(1000), by]).unwrap();
    assert_eq!(found.attributes[1], RuleAttribute::Iifname("eth0".into()));
    assert_eq!(found.header.flags, RuleFlags::Invert);
    assert_eq!(rule(&[RuleAttribute::Table(1001)]), None);
    let kernels = RuleAttribute::Protocol(RouteProtocol::Kernel);
    assert_eq!(rule(&[RuleAttribute::Table(254), kernels]), None);
    let other = RuleAttribute::Oifname("docker0".into());
    assert_eq!(rule(&[RuleAttribute::Table(254), other]), None);
}

#[test]
fn a_route_of_two_families_is_refused() {
    let net = "2001:db8::/32".parse().unwrap();
    let error = message(&Route::new(net, Some(ip(1))), 1).unwrap_err();
    assert!(error.to_string().contains("192.0.2.1"), "{error}");
    let route = Route {
        metric: 3,
        ..Route::new("0.0.0.0/0".parse().unwrap(), Some(ip(1)))
    };
    let route = message(&route, 2).unwrap();
    assert!(comes_later(&route));
    assert!(route.attributes.contains(&RouteAttribute::Oif(2)));
}

#[test]
fn a_route_that_vanished_is_removed_unless_its_interface_did_too() {
    let by = |interface, last| told(vec![gateway(last), RouteAttribute::Oif(interface)]);
    let old = Routing {
        interfaces: vec!["eth0".into(), "eth1".into()],
        routes: vec![by(1, 1), by(2, 2), by(2, 3)],
        ..Routing::default()
    };
    // eth0 is gone, and eth1 has another index.
    let new = Routing {
        interfaces: vec!["eth1".into()],
        routes: vec![by(1, 3), by(1, 4)],
        ..Routing::default()
    };
    assert_eq!(new.removed(&old), [by(1, 2)]);
    let request = new.change_request(&old);
    assert_eq!(request.removed_routes, [bytes(&by(1, 2))]);
    assert_eq!(request.routes.len(), 2);
    assert!(new.removed(&new).is_empty());
}

#[test]
fn a_rule_that_vanished_is_removed() {
    let rule = |table| {
        let mut rule = RuleMessage::default();
        rule.header.table = table;
        rule
    };
    let with = |rules: &[RuleMessage]| Routing {
        rules: rules.to_vec(),
        ..Routing::default()
    };
    let (old, new) = (with(&[rule(1), rule(2)]), with(&[rule(2), rule(3)]));
    let request = new.change_request(&old);
    assert_eq!(request.removed_rules, [bytes(&rule(1))]);
    assert_eq!(request.rules.len(), 2);
    assert!(new.change_request(&new).removed_rules.is_empty());
}
