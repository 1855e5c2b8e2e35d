//! Routes and rules of a sandbox's interfaces, for the guest.
//!
//! If an interface is taken over, its routes are the kernel's own messages (rtnetlink(7)), without attributes that are
//! meaningful only on the host. So a guest has all tables, metrics, next hops and MTUs of a container.

use super::{LOCAL_TABLE, NetworkConfig, Route, link, other, routes_of, with_kernel};
use crate::Error;
use futures::TryStreamExt as _;
use koya_protocol::messages::UpdateRoutesRequest;
use rtnetlink::packet_core::Emitable;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHopFlags, RouteProtocol,
    RouteScope, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::{Handle, IpVersion, RouteMessageBuilder};
use std::collections::{HashMap, HashSet};
use std::io;
use std::net::IpAddr;

/// Tables that exist in every namespace (including `RT_TABLE_DEFAULT`).
const STANDARD_TABLES: [u32; 3] = [253, RouteHeader::RT_TABLE_MAIN as u32, LOCAL_TABLE];

/// The loopback has the same name everywhere.
const LOOPBACK: &str = "lo";

/// Routes in an order in which gateways are reachable when they are used, and rules. An interface index in a route is the
/// position of its network, from 1.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Routing {
    interfaces: Vec<String>,
    routes: Vec<RouteMessage>,
    rules: Vec<RuleMessage>,
}

impl Routing {
    /// The routing of these networks: configured routes, and those of interfaces in the calling thread's network namespace.
    ///
    /// # Errors
    /// The error from the kernel.
    pub(crate) fn of(networks: &[NetworkConfig]) -> Result<Self, Error> {
        let mut routing = Self {
            interfaces: networks.iter().map(|n| n.name.clone()).collect(),
            ..Self::default()
        };
        let joined = networks.iter().zip(1..).filter_map(|(network, index)| {
            Some(Interface {
                interface: network.takeover()?.to_owned(),
                name: network.name.clone(),
                index,
            })
        });
        let joined: Vec<_> = joined.collect();
        if !joined.is_empty() {
            let found = with_kernel(|handle| Box::pin(look(handle, joined)));
            (routing.routes, routing.rules) = found.map_err(Error::host("read the routes"))?;
        }
        for (network, index) in networks.iter().zip(1..) {
            for route in &network.routes {
                routing.routes.push(message(route, index)?);
            }
        }
        routing.routes.sort_by_key(comes_later);
        Ok(routing)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.routes.is_empty() && self.rules.is_empty()
    }

    /// The routes of `old` that are not among these, and whose interfaces still exist: the guest kernel removes others itself.
    fn removed(&self, old: &Self) -> Vec<RouteMessage> {
        let mut indices = HashMap::new();
        for (name, index) in old.interfaces.iter().zip(1..) {
            let now = self.interfaces.iter().position(|own| own == name);
            indices.extend(now.map(|now| (index, now as u32 + 1)));
        }
        let routes = old.routes.iter().cloned();
        let routes = routes.filter_map(|route| renumbered(route, &indices));
        routes
            .filter(|route| !self.routes.contains(route))
            .collect()
    }

    /// The request for the agent of a guest that has got `old`.
    pub(crate) fn change_request(&self, old: &Self) -> UpdateRoutesRequest {
        // The guest kernel keeps the rules of interfaces that have vanished.
        let rules = old.rules.iter();
        let removed_rules = rules.filter(|rule| !self.rules.contains(rule));
        UpdateRoutesRequest {
            removed_routes: self.removed(old).iter().map(bytes).collect(),
            removed_rules: removed_rules.map(bytes).collect(),
            ..self.request()
        }
    }

    /// The request for the agent.
    pub(crate) fn request(&self) -> UpdateRoutesRequest {
        UpdateRoutesRequest {
            interfaces: self.interfaces.clone(),
            routes: self.routes.iter().map(bytes).collect(),
            rules: self.rules.iter().map(bytes).collect(),
            ..Default::default()
        }
    }
}

/// An interface that the guest takes over.
struct Interface {
    interface: String,
    /// Name, and index in the guest's routes.
    name: String,
    index: u32,
}

fn bytes(message: &impl Emitable) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes
}

/// The message for a route through the interface with this index.
fn message(route: &Route, index: u32) -> Result<RouteMessage, Error> {
    let build = || -> Result<_, Box<dyn std::error::Error + Send + Sync>> {
        let net = route.destination;
        let mut message = RouteMessageBuilder::<IpAddr>::new()
            .output_interface(index)
            .destination_prefix(net.network(), net.prefix_len())?;
        if route.metric > 0 {
            message = message.priority(route.metric);
        }
        if let Some(source) = route.source {
            message = message.pref_source(source)?;
        }
        Ok(match route.gateway {
            // The gateway may be outside of every prefix of the guest.
            Some(gateway) => message.gateway(gateway)?.onlink(),
            None => message.scope(RouteScope::Link),
        })
    };
    let route = build()
        .map_err(|error| Error::invalid_by("routes", format!("{route:?}: {error}"))(error))?;
    Ok(route.build())
}

/// Whether a route, or one of several next hops, has a gateway.
fn has_gateway(attributes: &[RouteAttribute]) -> bool {
    use RouteAttribute::{Gateway, Via};
    attributes.iter().any(|a| matches!(a, Gateway(_) | Via(_)))
}

/// Whether the route's gateway must be reachable before the route is added.
fn comes_later(route: &RouteMessage) -> bool {
    let mut all = route.attributes.iter();
    has_gateway(&route.attributes) || all.any(|a| matches!(a, RouteAttribute::MultiPath(_)))
}

async fn look(
    handle: Handle,
    joined: Vec<Interface>,
) -> io::Result<(Vec<RouteMessage>, Vec<RuleMessage>)> {
    let mut indices = HashMap::new();
    for one in &joined {
        indices.insert(link(&handle, &one.interface).await?.header.index, one.index);
    }
    let mut routes = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let all = routes_of(&handle, family).await?;
        routes.extend(all.into_iter().filter_map(|r| guests_route(r, &indices)));
    }
    let tables: HashSet<u32> = routes.iter().map(table).chain(STANDARD_TABLES).collect();
    let guests: HashMap<&str, &str> = joined
        .iter()
        .map(|one| (one.interface.as_str(), one.name.as_str()))
        .chain([(LOOPBACK, LOOPBACK)])
        .collect();
    let mut rules = Vec::new();
    for version in [IpVersion::V4, IpVersion::V6] {
        let all: Vec<_> = handle
            .rule()
            .get(version)
            .execute()
            .try_collect()
            .await
            .map_err(other)?;
        rules.extend(
            all.into_iter()
                .filter_map(|r| guests_rule(r, &tables, &guests)),
        );
    }
    Ok((routes, rules))
}

/// The table of a route: 32 bits in an attribute, eight in the header.
fn table(route: &RouteMessage) -> u32 {
    let mut attributes = route.attributes.iter();
    let long = attributes.find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    long.unwrap_or_else(|| route.header.table.into())
}

/// A route with other interface indexes; `None` if it has one that is not among them.
fn renumbered(mut route: RouteMessage, indices: &HashMap<u32, u32>) -> Option<RouteMessage> {
    for attribute in &mut route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => *index = *indices.get(index)?,
            RouteAttribute::MultiPath(hops) => {
                for hop in hops {
                    hop.interface_index = *indices.get(&hop.interface_index)?;
                }
            }
            _ => {}
        }
    }
    Some(route)
}

/// Converts a route of the namespace for the guest; `None` if it belongs to another interface, or if the guest kernel
/// creates it by itself. `indices` maps interface indexes to the guest's.
fn guests_route(mut route: RouteMessage, indices: &HashMap<u32, u32>) -> Option<RouteMessage> {
    let is_made_there = table(&route) == LOCAL_TABLE
        || route.header.protocol == RouteProtocol::Kernel
        || route.header.flags.contains(RouteFlags::Cloned);
    if is_made_there {
        return None;
    }
    // These have no next hop; IPv6 names the loopback's.
    let is_end = match route.header.kind {
        RouteType::Unicast => false,
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Throw => {
            true
        }
        _ => return None,
    };
    route.attributes.retain(|attribute| {
        use RouteAttribute::{
            Destination, Encap, EncapType, Gateway, Metrics, MultiPath, Oif, PrefSource,
            Preference, Priority, Realm, Source, Table, Via,
        };
        match attribute {
            Destination(_) | Source(_) | Priority(_) | Table(_) => true,
            Gateway(_) | Via(_) | Oif(_) | MultiPath(_) | PrefSource(_) | Preference(_)
            | Realm(_) | Metrics(_) | Encap(_) | EncapType(_) => !is_end,
            // Counters, ages, and IDs of next-hop objects, which are also resolved in other attributes.
            _ => false,
        }
    });
    // Gateways may be outside of every prefix of the guest.
    route.header.flags = match has_gateway(&route.attributes) {
        true => RouteFlags::Onlink,
        false => RouteFlags::empty(),
    };
    let mut is_known = is_end;
    for attribute in &mut route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => {
                *index = *indices.get(index)?;
                is_known = true;
            }
            RouteAttribute::MultiPath(hops) => {
                for hop in hops {
                    hop.interface_index = *indices.get(&hop.interface_index)?;
                    hop.flags = match has_gateway(&hop.attributes) {
                        true => RouteNextHopFlags::Onlink,
                        false => RouteNextHopFlags::empty(),
                    };
                }
                is_known = true;
            }
            _ => {}
        }
    }
    is_known.then_some(route)
}

/// Converts a rule of the namespace for the guest; `None` if it is the kernel's, or concerns another interface or a table
/// that the guest does not get. `names` maps interface names to the guest's.
fn guests_rule(
    mut rule: RuleMessage,
    tables: &HashSet<u32>,
    names: &HashMap<&str, &str>,
) -> Option<RuleMessage> {
    let mut table = u32::from(rule.header.table);
    for attribute in &mut rule.attributes {
        match attribute {
            RuleAttribute::Protocol(RouteProtocol::Kernel) | RuleAttribute::L3MDev(true) => {
                return None;
            }
            RuleAttribute::Iifname(name) | RuleAttribute::Oifname(name) => {
                *name = (*names.get(name.as_str())?).to_owned();
            }
            RuleAttribute::Table(long) => table = *long,
            _ => {}
        }
    }
    // The guest kernel sets the flags for missing interfaces itself.
    rule.header.flags &= RuleFlags::Invert;
    let is_answered = rule.header.action != RuleAction::ToTable || tables.contains(&table);
    is_answered.then_some(rule)
}

#[cfg(test)]
mod tests;
