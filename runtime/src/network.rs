//! Networks of a sandbox: the host's end of each, and the configuration of the guest's.
//!
//! Every network of a guest is a tap interface on the host. [`HostEnd`] is the other side of the tap: the host itself, or an
//! existing interface (a container network's veth, pasta's tap) whose traffic is exchanged with the guest by two
//! redirections (tc's `mirred`). All of it happens in the network namespace of the thread that starts the sandbox.

use crate::Error;
use crate::egress_filter::{Verdict, decide, destinations};
use futures::{Future, StreamExt as _, TryStreamExt as _};
use ipnet::IpNet;
use koya_protocol::messages;
use koya_vmm::NetConfig;
use koya_vmm::devices::net::MacAddr;
use koya_vmm::host::threads;
use nix::sched::CloneFlags;
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState};
use rtnetlink::packet_route::route::{RouteMessage, RouteScope, RouteType};
use rtnetlink::packet_route::rule::RuleAction;
use rtnetlink::packet_route::tc::{TcHandle, TcMessage};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::pin::Pin;

mod host_access;
mod routing;
#[cfg(test)]
pub(crate) mod test_namespace;

pub(crate) use routing::Routing;

/// `ETH_P_ALL` in network byte order.
const ALL_PROTOCOLS: u16 = 0x0003_u16.to_be();
/// The parent of filters for arriving frames (`TC_H_INGRESS`).
pub(crate) const INGRESS: u32 = 0xffff_0000;
/// The priority of the filter that sends frames to a guest.
const REDIRECTION: u16 = 9;

/// The routing table that is consulted first (`RT_TABLE_LOCAL`).
const LOCAL_TABLE: u32 = 255;

/// The other side of a network's tap on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostEnd {
    /// The host itself.
    Tap {
        /// Name of the tap, existing or new; if empty, the kernel chooses one.
        name: String,
        /// Address of the host on it.
        address: Option<IpNet>,
    },
    /// An interface of the namespace: the guest takes its place, with its MAC address, MTU,
    /// addresses and routes.
    Join {
        /// Its name.
        interface: String,
    },
}

/// A network of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    /// The other side of the tap.
    pub host: HostEnd,
    /// The interface's name in the guest. Default: `eth0`.
    pub name: String,
    /// The tap and its device: MAC address, MTU, queues, limits. The name of the tap comes from `host`.
    pub device: NetConfig,
    /// Addresses of the guest.
    pub addresses: Vec<IpNet>,
    /// Routes of the guest, in addition to those of an interface that is taken over.
    pub routes: Vec<Route>,
    /// Static neighbours: no address resolution is needed for them.
    pub neighbours: Vec<Neighbour>,
    /// Destinations that the guest's frames must not have, in addition to the host's loopback and the guest's own addresses:
    /// for [`HostEnd::Join`], whose other side may be a process that connects to any destination of a frame. See
    /// [`host_addresses`](crate::host_addresses). Default: none.
    pub blocked_destinations: Vec<IpNet>,
    /// For [`HostEnd::Join`]: whether processes in the network namespace on the host can connect to the guest by its IPv4
    /// addresses. The source of their connections is a link-local address, to which the guest gets a route; the guest can
    /// connect to it, and so to programs in the namespace that listen on all addresses. Default: if the interface is a
    /// tap (Ethernet).
    pub host_access: Option<bool>,
}

/// A static neighbour of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// IP address.
    pub ip: IpAddr,
    /// MAC address.
    pub mac: MacAddr,
}

/// A route of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Destination.
    pub destination: IpNet,
    /// Gateway; `None` if the destination is on the link itself.
    pub gateway: Option<IpAddr>,
    /// Metric: of several routes to one destination the lowest is preferred. 0 is the kernel's default.
    pub metric: u32,
    /// Source address of packets, one of the guest's; `None` leaves it to the kernel.
    pub source: Option<IpAddr>,
}

impl Route {
    /// A route with this destination and gateway, and defaults for everything else.
    pub fn new(destination: IpNet, gateway: Option<IpAddr>) -> Self {
        Self {
            destination,
            gateway,
            metric: 0,
            source: None,
        }
    }
}

impl NetworkConfig {
    /// A network with this end on the host, and defaults for everything else.
    pub fn new(host: HostEnd) -> Self {
        Self {
            host,
            name: "eth0".into(),
            device: NetConfig::default(),
            addresses: Vec::new(),
            routes: Vec::new(),
            neighbours: Vec::new(),
            blocked_destinations: Vec::new(),
            host_access: None,
        }
    }

    /// The host interface that the guest takes over, if any.
    pub(crate) fn takeover(&self) -> Option<&str> {
        match &self.host {
            HostEnd::Join { interface } => Some(interface),
            HostEnd::Tap { .. } => None,
        }
    }

    /// Fills in the properties of a host interface, before the device is created.
    pub(crate) fn resolve(&self) -> Result<Self, Error> {
        let mut network = self.clone();
        if network.device.mac.is_none() {
            let mac = MacAddr::random().map_err(Error::host("make a MAC address"))?;
            network.device.mac = Some(mac);
        }
        match &self.host {
            HostEnd::Tap { name, .. } => network.device.tap.clone_from(name),
            HostEnd::Join { interface } => {
                let found = with_kernel(|handle| Box::pin(look_at(handle, interface.clone())))
                    .map_err(Error::host(format!("take over the interface {interface}")))?;
                network.device.mac = found.mac.or(network.device.mac);
                network.device.mtu = network.device.mtu.or(found.mtu);
                network.addresses.extend(found.addresses);
                network.neighbours.extend(found.neighbours);
                // At its other end is a program such as slirp4netns, whose ports podman publishes in the same way.
                let host_access = self
                    .host_access
                    .unwrap_or(found.is_tap && found.mac.is_some());
                network.host_access = Some(host_access);
                if host_access {
                    network.routes.push(host_access::route());
                    network.neighbours.push(host_access::CALLER);
                }
            }
        }
        Ok(network)
    }

    /// Connects the tap to its other side.
    pub(crate) fn connect(&self, tap: &str) -> Result<(), Error> {
        let (network, tap_name) = (self.clone(), tap.to_owned());
        with_kernel(|handle| Box::pin(connect(handle, network, tap_name)))
            .map_err(Error::host(format!("set up the tap {tap}")))
    }

    /// The interface configuration for the agent.
    pub(crate) fn interface(&self) -> messages::Interface {
        messages::Interface {
            hw_addr: self
                .device
                .mac
                .map(|mac| mac.to_string())
                .unwrap_or_default(),
            name: self.name.clone(),
            mtu: self.device.mtu.unwrap_or(0).into(),
            ip_addresses: self.addresses.iter().map(IpNet::to_string).collect(),
            neighbours: self.neighbours.iter().map(neighbour_message).collect(),
            ..Default::default()
        }
    }
}

fn neighbour_message(neighbour: &Neighbour) -> messages::Neighbour {
    messages::Neighbour {
        ip_address: neighbour.ip.to_string(),
        hw_addr: neighbour.mac.to_string(),
        ..Default::default()
    }
}

/// Properties read from an interface.
#[derive(Default)]
struct Found {
    mac: Option<MacAddr>,
    mtu: Option<u16>,
    addresses: Vec<IpNet>,
    neighbours: Vec<Neighbour>,
    is_tap: bool,
}

/// An interface of the namespace that the guest has.
#[derive(Clone, Debug)]
pub(crate) struct GuestInterface {
    /// Its index in the namespace.
    pub(crate) index: u32,
    /// With the interface's properties.
    pub(crate) network: NetworkConfig,
    /// The tap of the guest's device; empty if it has none yet.
    pub(crate) tap: String,
    /// The device, if it is in a hot-plug slot.
    pub(crate) slot: Option<Slot>,
}

/// Numbers of a hot-plug slot: among those slots, and all MMIO slots.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) slot: usize,
    pub(crate) mmio_slot: usize,
}

/// The index of an interface in the calling thread's network namespace.
pub(crate) fn index_of(interface: &str) -> io::Result<u32> {
    Ok(nix::net::if_::if_nametoindex(interface)?)
}

/// The interfaces of a network namespace that were taken over by guests; dropping this gives them back, for the next user of
/// the namespace.
pub(crate) struct Takeover {
    namespace: File,
    pub(crate) interfaces: Vec<GuestInterface>,
    /// Routes and rules that the guest has got.
    pub(crate) routing: Routing,
}

impl Takeover {
    /// The interfaces of these networks, each with its tap, in the calling thread's network namespace.
    pub(crate) fn of<'a>(
        networks: impl Iterator<Item = (&'a NetworkConfig, &'a str)>,
        routing: Routing,
    ) -> Result<Self, Error> {
        let takeover = networks.filter_map(|(network, tap)| {
            let index = index_of(network.takeover()?);
            Some(index.map(|index| GuestInterface {
                index,
                network: network.clone(),
                tap: tap.to_owned(),
                slot: None,
            }))
        });
        let interfaces: io::Result<Vec<_>> = takeover.collect();
        let namespace = File::open("/proc/thread-self/ns/net");
        Ok(Self {
            namespace: namespace.map_err(Error::host("open the network namespace"))?,
            interfaces: interfaces.map_err(Error::host("find the network interfaces"))?,
            routing,
        })
    }
}

impl Drop for Takeover {
    fn drop(&mut self) {
        let interfaces = std::mem::take(&mut self.interfaces);
        if !interfaces.is_empty() {
            restore(Some(&self.namespace), interfaces);
        }
    }
}

/// Restores interfaces of a network namespace (default: the calling thread's) for its own use, if they still exist.
pub(crate) fn restore(namespace: Option<&File>, interfaces: Vec<GuestInterface>) {
    let restored = in_namespace(namespace, |handle| {
        Box::pin(async move {
            for GuestInterface { network, .. } in interfaces {
                let name = network.takeover().unwrap_or_default();
                if let Ok(link) = link(&handle, name).await {
                    stop_redirection(&handle, link.header.index).await?;
                    if network.host_access == Some(true) {
                        host_access::restore_routes(&handle, &network, link.header.index).await?;
                    }
                }
            }
            Ok(())
        })
    });
    if let Err(error) = restored {
        log::debug!("interfaces keep their redirections: {error}");
    }
}

/// Disconnects a tap of the calling thread's network namespace, which remains: frames of the guest lead nowhere. Its verdicts,
/// which are for the guest's addresses, go with the redirection.
pub(crate) fn disconnect(tap: &str) -> Result<(), Error> {
    let name = tap.to_owned();
    let work = with_kernel(|handle| {
        Box::pin(async move {
            let index = link(&handle, &name).await?.header.index;
            let mut removal = handle.qdisc().del(index as i32);
            removal.message_mut().header.parent = TcHandle::INGRESS;
            match removal.execute().await.map_err(other) {
                // It has none.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
                result => result,
            }
        })
    });
    work.map_err(Error::host(format!("disconnect the tap {tap}")))
}

/// Runs `work` with an rtnetlink(7) connection to the kernel on a separate thread, because the caller may be in an
/// asynchronous runtime. The thread is in the caller's network namespace.
pub(crate) fn with_kernel<T: Send>(
    work: impl FnOnce(Handle) -> Pin<Box<dyn Future<Output = io::Result<T>>>> + Send,
) -> io::Result<T> {
    in_namespace(None, work)
}

/// As [`with_kernel`], in another network namespace.
pub(crate) fn in_namespace<T: Send>(
    namespace: Option<&File>,
    work: impl FnOnce(Handle) -> Pin<Box<dyn Future<Output = io::Result<T>>>> + Send,
) -> io::Result<T> {
    let run = || {
        if let Some(namespace) = namespace {
            nix::sched::setns(namespace, CloneFlags::CLONE_NEWNET)?;
        }
        on_this_thread(work)
    };
    std::thread::scope(|scope| {
        let thread = threads::spawn_scoped(scope, "koya-network", run)?.join();
        thread.unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
    })
}

/// As [`with_kernel`], on the calling thread and in its network namespace; no other thread is started.
pub(crate) fn on_this_thread<T>(
    work: impl FnOnce(Handle) -> Pin<Box<dyn Future<Output = io::Result<T>>>>,
) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        let task = tokio::spawn(connection);
        let result = work(handle).await;
        task.abort();
        result
    })
}

/// Makes all IPv4 addresses local to the calling thread's network namespace, also those for which interfaces have more
/// specific routes: the kernel searches the tables of local addresses and of these routes together until a namespace has a
/// rule, so it gets one, which has no other effect.
pub(crate) fn own_all_addresses() -> io::Result<()> {
    with_kernel(|handle| {
        Box::pin(async move {
            let loopback = link(&handle, "lo").await?.header.index;
            let all = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(Ipv4Addr::UNSPECIFIED, 0)
                .kind(RouteType::Local)
                .table_id(LOCAL_TABLE)
                // The kernel accepts no wider scope for local addresses.
                .scope(RouteScope::Host)
                .output_interface(loopback)
                .build();
            let added = handle.route().add(all).replace().execute().await;
            added.map_err(other)?;
            let rule = handle.rule().add().v4().priority(1).table_id(LOCAL_TABLE);
            let rule = rule.action(RuleAction::ToTable).replace();
            rule.execute().await.map_err(other)
        })
    })
}

pub(crate) fn other(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        error => io::Error::other(error),
    }
}

pub(crate) async fn link(handle: &Handle, name: &str) -> io::Result<LinkMessage> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    let found = links.try_next().await.map_err(other)?;
    found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no interface {name}")))
}

/// All routes of an address family, from all tables.
pub(crate) async fn routes_of(
    handle: &Handle,
    family: AddressFamily,
) -> io::Result<Vec<RouteMessage>> {
    let question = match family {
        AddressFamily::Inet => RouteMessageBuilder::<Ipv4Addr>::new().build(),
        _ => RouteMessageBuilder::<Ipv6Addr>::new().build(),
    };
    let routes = handle.route().get(question).execute();
    routes.try_collect().await.map_err(other)
}

async fn look_at(handle: Handle, name: String) -> io::Result<Found> {
    let mut found = Found::default();
    let link = link(&handle, &name).await?;
    let index = link.header.index;
    for attribute in link.attributes {
        match attribute {
            LinkAttribute::Address(bytes) => found.mac = bytes.try_into().ok().map(MacAddr),
            LinkAttribute::Mtu(mtu) => found.mtu = u16::try_from(mtu).ok(),
            LinkAttribute::LinkInfo(all) => {
                found.is_tap = all.contains(&LinkInfo::Kind(InfoKind::Tun));
            }
            _ => {}
        }
    }
    let mut addresses = handle
        .address()
        .get()
        .set_link_index_filter(index)
        .execute();
    while let Some(message) = addresses.try_next().await.map_err(other)? {
        // The guest assigns link-local addresses itself.
        let own = |net: &IpNet| matches!(net, IpNet::V6(net) if net.addr().is_unicast_link_local());
        found
            .addresses
            .extend(address_of(&message).filter(|net| !own(net)));
    }
    let mut neighbours = handle.neighbours().get().execute();
    while let Some(message) = neighbours.try_next().await.map_err(other)? {
        if message.header.ifindex == index && message.header.state == NeighbourState::Permanent {
            found.neighbours.extend(neighbour(&message.attributes));
        }
    }
    Ok(found)
}

/// The address in a message of the kernel, with its prefix.
pub(crate) fn address_of(message: &AddressMessage) -> Option<IpNet> {
    let mut attributes = message.attributes.iter();
    let ip = attributes.find_map(|attribute| match attribute {
        AddressAttribute::Local(ip) => Some(*ip),
        AddressAttribute::Address(ip) if ip.is_ipv6() => Some(*ip),
        _ => None,
    });
    IpNet::new(ip?, message.header.prefix_len).ok()
}

fn neighbour(attributes: &[NeighbourAttribute]) -> Option<Neighbour> {
    let (mut ip, mut mac) = (None, None);
    for attribute in attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(four)) => {
                ip = Some((*four).into())
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(six)) => {
                ip = Some((*six).into())
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbour {
        ip: ip?,
        mac: MacAddr(mac?),
    })
}

async fn connect(handle: Handle, network: NetworkConfig, tap: String) -> io::Result<()> {
    let tap_link = link(&handle, &tap).await?;
    let index = tap_link.header.index;
    let mut change = LinkUnspec::new_with_index(index).up();
    if let Some(mtu) = network.device.mtu {
        change = change.mtu(mtu.into());
    }
    if !is_ready(&tap_link, network.device.mtu) {
        // The owner of a tap may use it, but not change it.
        let set = handle.link().set(change.build()).execute().await;
        set.map_err(other)?;
    }
    match &network.host {
        HostEnd::Tap { address, .. } => {
            if let Some(address) = address {
                let add = handle
                    .address()
                    .add(index, address.addr(), address.prefix_len());
                add.replace().execute().await.map_err(other)?;
            }
        }
        HostEnd::Join { interface } => {
            let there = link(&handle, interface).await?.header.index;
            let up = LinkUnspec::new_with_index(there).up().build();
            handle.link().set(up).execute().await.map_err(other)?;
            let refused = destinations(&network.addresses, &network.blocked_destinations);
            decide(&handle, index, &refused, Verdict::Dropped).await?;
            if network.host_access == Some(true)
                && let Err(error) =
                    host_access::set_up(&handle, &network, there, (&tap, index)).await
            {
                log::warn!("processes on the host can't reach the guest's {interface}: {error}");
            }
            redirect(&handle, there, index).await?;
            redirect(&handle, index, there).await?;
        }
    }
    Ok(())
}

/// Whether an interface is up and has this MTU.
fn is_ready(link: &LinkMessage, mtu: Option<u16>) -> bool {
    let same = |attribute: &LinkAttribute| match (attribute, mtu) {
        (LinkAttribute::Mtu(own), Some(mtu)) => *own == u32::from(mtu),
        _ => false,
    };
    let fits = mtu.is_none() || link.attributes.iter().any(same);
    fits && link.header.flags.contains(LinkFlags::Up)
}

/// Adds the ingress qdisc to an interface, for filters on arriving frames.
pub(crate) async fn ingress(handle: &Handle, index: u32) -> io::Result<()> {
    let added = handle.qdisc().add(index as i32).ingress().execute().await;
    match added.map_err(other) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

/// Sends frames that arrive at one interface out through another.
async fn redirect(handle: &Handle, from: u32, to: u32) -> io::Result<()> {
    ingress(handle, from).await?;
    // A leftover redirection of a killed sandbox would take precedence and lead nowhere.
    stop_redirection(handle, from).await?;
    handle
        .traffic_filter(from as i32)
        .add()
        .parent(INGRESS)
        .priority(REDIRECTION)
        .protocol(ALL_PROTOCOLS)
        .redirect(to)
        .map_err(other)?
        .execute()
        .await
        .map_err(other)
}

/// Removes the redirection of [`redirect`].
async fn stop_redirection(handle: &Handle, from: u32) -> io::Result<()> {
    let mut filter = TcMessage::with_index(from as i32);
    filter.header.parent = INGRESS.into();
    filter.header.info = u32::from(REDIRECTION) << 16 | u32::from(ALL_PROTOCOLS);
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::DelTrafficFilter(filter));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    let mut answers = handle.clone().request(request).map_err(other)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload
            && error.code.is_some()
        {
            let error = error.to_io();
            // There is no filter, or no qdisc for one.
            let none = [libc::ENOENT, libc::EINVAL];
            if !error
                .raw_os_error()
                .is_some_and(|code| none.contains(&code))
            {
                return Err(error);
            }
        }
    }
    Ok(())
}
