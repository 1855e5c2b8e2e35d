//! Routes and rules, sent by the host as rtnetlink messages.

use super::with_kernel;
use anyhow::{Context, Result};
use futures::TryStreamExt as _;
use koya_protocol::messages::UpdateRoutesRequest;
use rtnetlink::Handle;
use rtnetlink::packet_core::Parseable;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use rtnetlink::packet_route::rule::RuleMessage;
use rustix::io::Errno;
use std::io::ErrorKind;

fn parse(routes: &[Vec<u8>]) -> Result<Vec<RouteMessage>> {
    let routes = routes.iter();
    let routes = routes.map(|bytes| RouteMessage::parse(bytes).context("not a route"));
    routes.collect()
}

fn parse_rules(rules: &[Vec<u8>]) -> Result<Vec<RuleMessage>> {
    let rules = rules.iter();
    let rules = rules.map(|bytes| RuleMessage::parse(bytes).context("not a rule"));
    rules.collect()
}

/// Removes routes and rules, then adds routes and rules in order.
pub(crate) async fn update(request: &UpdateRoutesRequest) -> Result<()> {
    let removed = parse(&request.removed_routes)?;
    let routes = parse(&request.routes)?;
    let removed_rules = parse_rules(&request.removed_rules)?;
    let rules = parse_rules(&request.rules)?;
    with_kernel(async |handle| {
        let mut indices = Vec::new();
        for name in &request.interfaces {
            indices.push(index_of(&handle, name).await?);
        }
        for mut route in removed {
            let what = describe(&route, &request.interfaces);
            place(&mut route, &indices)?;
            match handle.route().del(route).execute().await {
                // There is none.
                Err(rtnetlink::Error::NetlinkError(error))
                    if error.to_io().raw_os_error() == Some(Errno::SRCH.raw_os_error()) => {}
                deleted => deleted.with_context(|| format!("cannot remove the route {what}"))?,
            }
        }
        for rule in removed_rules {
            let what = format!("{rule:?}");
            match handle.rule().del(rule).execute().await {
                // There is none.
                Err(rtnetlink::Error::NetlinkError(error))
                    if error.to_io().kind() == ErrorKind::NotFound => {}
                deleted => deleted.with_context(|| format!("cannot remove the rule {what}"))?,
            }
        }
        for mut route in routes {
            let what = describe(&route, &request.interfaces);
            place(&mut route, &indices)?;
            let added = handle.route().add(route).replace().execute().await;
            added.with_context(|| format!("cannot route {what}"))?;
        }
        for rule in rules {
            let what = format!("{rule:?}");
            let mut add = handle.rule().add();
            *add.message_mut() = rule;
            match add.execute().await {
                Err(rtnetlink::Error::NetlinkError(error))
                    if error.to_io().kind() == ErrorKind::AlreadyExists => {}
                added => added.with_context(|| format!("cannot add the rule {what}"))?,
            }
        }
        Ok(())
    })
    .await
}

async fn index_of(handle: &Handle, name: &str) -> Result<u32> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    let link = links.try_next().await?;
    let link = link.with_context(|| format!("the guest has no interface {name}"))?;
    Ok(link.header.index)
}

/// Replaces positions by the guest's interface indexes.
fn place(route: &mut RouteMessage, indices: &[u32]) -> Result<()> {
    let index = |position: u32| {
        let index = indices.get((position as usize).wrapping_sub(1));
        index
            .copied()
            .with_context(|| format!("no interface {position}"))
    };
    for attribute in &mut route.attributes {
        match attribute {
            RouteAttribute::Oif(position) => *position = index(*position)?,
            RouteAttribute::MultiPath(hops) => {
                for hop in hops {
                    hop.interface_index = index(hop.interface_index)?;
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// Describes a route in the style of ip-route(8): the part that identifies it.
fn describe(route: &RouteMessage, interfaces: &[String]) -> String {
    let ip = |address: &RouteAddress| match address {
        RouteAddress::Inet(ip) => ip.to_string(),
        RouteAddress::Inet6(ip) => ip.to_string(),
        other => format!("{other:?}"),
    };
    let mut destination = match route.header.address_family {
        AddressFamily::Inet6 => "::".to_owned(),
        _ => "0.0.0.0".to_owned(),
    };
    let mut by = String::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address),
            RouteAttribute::Gateway(address) => by += &format!(" via {}", ip(address)),
            RouteAttribute::Table(table) => by += &format!(" table {table}"),
            RouteAttribute::Oif(position) => {
                let name = interfaces.get((*position as usize).wrapping_sub(1));
                by += &format!(" dev {}", name.map_or("?", String::as_str));
            }
            _ => {}
        }
    }
    let kind = match route.header.kind {
        RouteType::Unicast => String::new(),
        kind => format!("{kind:?} ").to_lowercase(),
    };
    format!(
        "{kind}{destination}/{}{by}",
        route.header.destination_prefix_length
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use rtnetlink::RouteMessageBuilder;
    use rtnetlink::packet_core::Emitable;
    use rtnetlink::packet_route::route::RouteNextHop;
    use std::net::{IpAddr, Ipv4Addr};

    #[test]
    fn a_route_is_placed_by_the_guests_indices() {
        let message = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(Ipv4Addr::new(10, 1, 0, 0).into(), 16)
            .unwrap()
            .gateway(Ipv4Addr::new(10, 9, 0, 1).into())
            .unwrap()
            .table_id(1000)
            .output_interface(2)
            .build();
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        let mut route = RouteMessage::parse(&bytes[..]).unwrap();
        let names = ["eth0".to_owned(), "net1".to_owned()];
        let described = describe(&route, &names);
        assert!(described.starts_with("10.1.0.0/16"), "{described}");
        for part in [" via 10.9.0.1", " dev net1", " table 1000"] {
            assert!(described.contains(part), "{described}");
        }
        place(&mut route, &[4, 7]).unwrap();
        assert!(route.attributes.contains(&RouteAttribute::Oif(7)));
        for position in [0, 3] {
            let mut hop = RouteNextHop::default();
            hop.interface_index = position;
            route.attributes = vec![RouteAttribute::MultiPath(vec![hop])];
            assert!(place(&mut route, &[4, 7]).is_err());
        }
    }
}
