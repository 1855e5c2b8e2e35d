//! Interfaces of a network namespace that appear, change or vanish while the guest runs (`podman network connect`, `docker
//! network disconnect`): the guest gets them, or loses them.
//!
//! The kernel reports changes of the namespace by rtnetlink(7). A report only says that something changed: after a quiet moment,
//! the namespace is compared with what the guest has. So Koya's own changes of the namespace, bursts and lost reports need no
//! attention. A new interface takes a hot-plug slot, like a disk.

use crate::Error;
use crate::network::{GuestInterface, NetworkConfig, Routing, Slot, disconnect, index_of, restore};
use crate::sandbox::{Inner, Sandbox};
use crate::sync::lock;
use koya_vmm::host::threads;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::{BTreeMap, HashSet};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Multicast groups of rtnetlink(7): links, IPv4 addresses, routes and rules, IPv6 addresses and routes
/// (`RTMGRP_*` of linux/rtnetlink.h).
const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400;
/// An engine makes several changes for an interface: time without a change before the namespace is looked at.
const QUIET: Duration = Duration::from_millis(100);
/// Maximum time for which changes are waited for.
const UNREST: Duration = Duration::from_secs(2);

/// While this lives, a guest gets the interfaces that a network namespace gets, and loses those that vanish.
pub struct InterfaceChanges {
    // Its end ends the thread.
    _alive: UnixStream,
}

impl InterfaceChanges {
    /// Maximum number of interfaces of a guest.
    pub const MAX_INTERFACES: usize = 8;

    /// Follows the calling thread's network namespace. `wanted` returns the networks that the guest is to have: those of the
    /// namespace's interfaces ([`HostEnd::Join`](crate::HostEnd::Join)). The taps of the sandbox, which are among them, are
    /// ignored.
    ///
    /// # Errors
    /// If the kernel does not report changes.
    pub fn follow(
        sandbox: &Sandbox,
        wanted: impl Fn() -> io::Result<Vec<NetworkConfig>> + Send + 'static,
    ) -> Result<Self, Error> {
        let followed = || -> io::Result<Self> {
            let reports = subscribe()?;
            let (alive, ended) = UnixStream::pair()?;
            let inner = Arc::downgrade(&sandbox.inner);
            let work = move || {
                let mut follower = Follower {
                    inner,
                    wanted: Box::new(wanted),
                    failed: None,
                };
                follower.run(&reports, &ended);
            };
            threads::spawn("koya-interfaces", work)?;
            Ok(Self { _alive: alive })
        };
        followed().map_err(Error::host("follow changes of the network namespace"))
    }
}

impl Sandbox {
    /// Whether the guest has these interfaces of its network namespace. The taps of the sandbox, which are among them, are
    /// ignored.
    pub fn has_interfaces(&self, names: &[String]) -> bool {
        let taps = self.inner.taps();
        let has = self.inner.guest_interfaces().unwrap_or_default();
        let is_there = |name: &String| {
            has.iter()
                .any(|own| own.network.takeover() == Some(name.as_str()))
        };
        names
            .iter()
            .all(|name| taps.contains(name) || is_there(name))
    }
}

/// A socket that receives reports about changes of the calling thread's network namespace.
fn subscribe() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (family, kind) = (AddressFamily::Netlink, SockType::Raw);
    let socket = socket(family, kind, flags, SockProtocol::NetlinkRoute)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
    Ok(socket)
}

/// Discards the reports that have arrived; those that did not fit are lost (ENOBUFS), which does not matter.
fn drain(reports: &OwnedFd) {
    let mut buffer = [0; 4096];
    // Bounded, because somebody may be making changes all the time.
    for _ in 0..1024 {
        let received = recv(reports.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT);
        if received == Err(nix::Error::EAGAIN) {
            return;
        }
    }
}

/// What became of a wait.
#[derive(Debug, PartialEq, Eq)]
enum Waited {
    Report,
    Quiet,
    End,
}

fn wait(reports: &OwnedFd, ended: &UnixStream, limit: Option<Duration>) -> Waited {
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    let mut fds = [
        PollFd::new(reports, PollFlags::IN),
        PollFd::new(ended, PollFlags::IN),
    ];
    match poll(&mut fds, limit.as_ref()) {
        Ok(0) => return Waited::Quiet,
        Ok(_) => {}
        Err(rustix::io::Errno::INTR) => return Waited::Report,
        Err(_) => return Waited::End,
    }
    match fds[1].revents().is_empty() {
        true => Waited::Report,
        false => Waited::End,
    }
}

/// Waits for a report, and then for a quiet moment. False at the end.
fn wait_for_changes(reports: &OwnedFd, ended: &UnixStream) -> bool {
    if wait(reports, ended, None) == Waited::End {
        return false;
    }
    let first = Instant::now();
    while first.elapsed() < UNREST {
        drain(reports);
        match wait(reports, ended, Some(QUIET)) {
            Waited::Report => {
                // A report at a time is no quiet moment, however many there are.
                std::thread::sleep(QUIET / 10);
            }
            Waited::Quiet => return true,
            Waited::End => return false,
        }
    }
    true
}

struct Follower {
    inner: Weak<Inner>,
    wanted: Box<dyn Fn() -> io::Result<Vec<NetworkConfig>> + Send>,
    /// The networks that the guest could not be given: not tried again until they change. Otherwise the changes that a failed
    /// attempt makes would cause the next one.
    failed: Option<Vec<(u32, NetworkConfig)>>,
}

impl Follower {
    fn run(&mut self, reports: &OwnedFd, ended: &UnixStream) {
        // Something may have changed since the machine was configured.
        loop {
            let Some(inner) = self.inner.upgrade() else {
                return;
            };
            if inner.handle.ended().is_some() {
                return;
            }
            if let Err(error) = self.compare(&inner) {
                log::warn!(
                    "the guest's networks are not as those of its network namespace: {error}"
                );
            }
            drop(inner);
            if !wait_for_changes(reports, ended) {
                return;
            }
        }
    }

    /// Gives the guest what it lacks, and takes what it has no more.
    fn compare(&mut self, inner: &Inner) -> Result<(), Error> {
        let Some(has) = inner.guest_interfaces() else {
            return Ok(());
        };
        let read = (self.wanted)().map_err(Error::host("read the network interfaces"))?;
        let mut wanted = self.resolved(inner, read, &has);
        let most = InterfaceChanges::MAX_INTERFACES;
        if wanted.len() > most {
            log::warn!(
                "the guest gets {most} of {} network interfaces",
                wanted.len()
            );
            wanted.truncate(most);
        }
        let asked: Vec<_> = wanted
            .iter()
            .map(|own| (own.index, own.network.clone()))
            .collect();
        if self.failed.as_ref() == Some(&asked) {
            return Ok(());
        }
        let result = inner.change_networks(&wanted);
        self.failed = result.is_err().then_some(asked);
        result
    }

    /// The networks with the properties of their interfaces.
    fn resolved(
        &self,
        inner: &Inner,
        wanted: Vec<NetworkConfig>,
        has: &[GuestInterface],
    ) -> Vec<GuestInterface> {
        let taps: HashSet<String> = inner.taps();
        let mut all = Vec::new();
        for mut network in wanted {
            let Some(interface) = network.takeover().filter(|i| !taps.contains(*i)) else {
                continue;
            };
            let Ok(index) = index_of(interface) else {
                continue;
            };
            // Without an address of its own, the interface keeps the one that the guest has.
            if let Some(same) = has.iter().find(|own| own.index == index) {
                network.device.mac = same.network.device.mac;
            }
            match network.resolve() {
                Ok(network) => all.push(GuestInterface {
                    index,
                    network,
                    tap: String::new(),
                    slot: None,
                }),
                // It has vanished meanwhile, which is reported.
                Err(error) => log::debug!("{error}"),
            }
        }
        all
    }
}

/// Whether the guest can keep its device: the interface is the same one, with the same properties. Engines do not change those
/// while a container runs, but may be seen between two steps of theirs.
fn is_same(one: &GuestInterface, other: &GuestInterface) -> bool {
    one.index == other.index && one.network == other.network
}

/// Whether a sysctl is one of this interface: `net.ipv4.conf.eth0.forwarding`. The first `.` or `/` is the separator, and the
/// other one part of a name (sysctl.d(5)).
fn is_sysctl_of(name: &str, interface: &str) -> bool {
    let is_dotted = name
        .find(['.', '/'])
        .is_some_and(|at| name[at..].starts_with('.'));
    let parts = name.split(if is_dotted { '.' } else { '/' });
    let parts: Vec<_> = match is_dotted {
        true => parts.map(|part| part.replace('/', ".")).collect(),
        false => parts.map(str::to_owned).collect(),
    };
    match parts.as_slice() {
        [net, _, kind, of, ..] => {
            net == "net" && ["conf", "neigh"].contains(&kind.as_str()) && of == interface
        }
        _ => false,
    }
}

impl Inner {
    /// The interfaces that the guest has; `None` after the end of the takeover.
    fn guest_interfaces(&self) -> Option<Vec<GuestInterface>> {
        let takeover = lock(&self.takeover);
        takeover
            .as_ref()
            .map(|takeover| takeover.interfaces.clone())
    }

    /// Names of the machine's taps.
    fn taps(&self) -> HashSet<String> {
        let attached = self.handle.attached_networks();
        let attached = attached.iter().map(|attached| &attached.network);
        let all = self.handle.networks().iter().chain(attached);
        all.map(|network| network.tap_name().to_owned()).collect()
    }

    /// Attaches and detaches networks until the guest has those that are wanted. A failure with one of them does not affect the
    /// others; the first one is returned.
    fn change_networks(&self, wanted: &[GuestInterface]) -> Result<(), Error> {
        let mut result = Ok(());
        let mut note = |failed: Result<(), Error>| {
            if let (true, Err(_)) = (result.is_ok(), &failed) {
                result = failed;
            }
        };
        let Some(has) = self.guest_interfaces() else {
            return Ok(());
        };
        let (kept, gone): (Vec<_>, Vec<_>) = has
            .into_iter()
            .partition(|own| wanted.iter().any(|other| is_same(own, other)));
        self.set_guest_interfaces(&kept);
        for interface in gone {
            log::info!("the guest loses the interface {}", interface.network.name);
            note(self.detach_network(&interface));
        }
        let mut all = kept;
        for new in wanted {
            if all.iter().any(|own| is_same(own, new)) {
                continue;
            }
            match self.attach_network(new) {
                Ok(attached) => {
                    log::info!("the guest gets the interface {}", new.network.name);
                    all.push(attached.clone());
                    if !self.set_guest_interfaces(&all) {
                        // The sandbox is being stopped, and has given back those that it had by then.
                        restore(None, vec![attached]);
                        return Ok(());
                    }
                }
                Err(error) => note(Err(error)),
            }
        }
        note(self.change_routes(&all));
        result
    }

    /// Records the interfaces that are given back at the end. False after the end of the takeover.
    fn set_guest_interfaces(&self, interfaces: &[GuestInterface]) -> bool {
        match &mut *lock(&self.takeover) {
            Some(takeover) => {
                takeover.interfaces = interfaces.to_vec();
                true
            }
            None => false,
        }
    }

    fn attach_network(&self, wanted: &GuestInterface) -> Result<GuestInterface, Error> {
        let network = &wanted.network;
        let attached = self.handle.attach_network(&network.device)?;
        let (slot, mmio_slot) = (attached.slot, attached.mmio_slot);
        let tap = attached.network.tap_name().to_owned();
        let attached = network
            .connect(&tap)
            .and_then(|()| self.agent.attach_network(mmio_slot))
            .and_then(|()| self.agent.update_interface(network.interface()))
            .and_then(|()| self.set_sysctls_of(&network.name));
        let interface = GuestInterface {
            slot: Some(Slot { slot, mmio_slot }),
            tap,
            ..wanted.clone()
        };
        match attached {
            Ok(()) => Ok(interface),
            Err(error) => {
                self.detach_network(&interface).ok();
                Err(self.explain(error))
            }
        }
    }

    /// Sets the sysctls of an interface, which the guest kernel has just made.
    fn set_sysctls_of(&self, interface: &str) -> Result<(), Error> {
        let own = self.sysctls.iter();
        let own = own.filter(|(name, _)| is_sysctl_of(name, interface));
        let own: BTreeMap<_, _> = own.map(|(k, v)| (k.clone(), v.clone())).collect();
        match own.is_empty() {
            true => Ok(()),
            false => self.agent.set_sysctls(&own),
        }
    }

    /// A device that the guest does not release loses its tap nevertheless. One that it was started with has no hot-plug slot,
    /// and remains without an interface, with a tap that leads nowhere.
    fn detach_network(&self, interface: &GuestInterface) -> Result<(), Error> {
        let mmio_slot = interface.slot.map(|slot| slot.mmio_slot);
        let own = interface.network.interface();
        let released = self.agent.detach_network(own, mmio_slot);
        // An interface whose properties have changed still exists.
        restore(None, vec![interface.clone()]);
        match interface.slot {
            Some(Slot { slot, .. }) => self.handle.detach_network(slot, released.is_ok())?,
            None => disconnect(&interface.tap)?,
        }
        released.map_err(|error| self.explain(error))
    }

    fn change_routes(&self, interfaces: &[GuestInterface]) -> Result<(), Error> {
        let networks = interfaces.iter().map(|own| own.network.clone());
        let networks: Vec<_> = networks.collect();
        let routing = Routing::of(&networks)?;
        let old = match &*lock(&self.takeover) {
            Some(takeover) => takeover.routing.clone(),
            None => return Ok(()),
        };
        if routing == old {
            return Ok(());
        }
        self.agent.update_routes(&routing.change_request(&old))?;
        if let Some(takeover) = &mut *lock(&self.takeover) {
            takeover.routing = routing;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::{HostEnd, test_namespace};
    use std::io::Write as _;
    use std::net::Ipv4Addr;

    #[test]
    fn sysctls_of_an_interface_are_known_in_both_forms() {
        for own in [
            "net.ipv4.conf.eth1.rp_filter",
            "net/ipv6/neigh/eth1/gc_stale_time",
        ] {
            assert!(
                is_sysctl_of(own, "eth1") && !is_sysctl_of(own, "eth0"),
                "{own}"
            );
        }
        assert!(is_sysctl_of("net.ipv4.conf.eth0/7.forwarding", "eth0.7"));
        assert!(is_sysctl_of("net/ipv4/conf/eth0.7/forwarding", "eth0.7"));
        for other in [
            "net.core.somaxconn",
            "net.ipv4.conf.all.rp_filter",
            "eth1",
            "",
        ] {
            assert!(!is_sysctl_of(other, "eth1"), "{other}");
        }
    }

    #[test]
    fn a_tap_that_remains_leads_nowhere() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        // A thread, for a network namespace that ends with it.
        let work = || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            test_namespace::set_up(Ipv4Addr::new(192, 0, 2, 3), 24).unwrap();
            let interface = "eth0".to_owned();
            let network = NetworkConfig::new(HostEnd::Join { interface });
            let network = network.resolve().unwrap();
            // In the place of a tap. Kernels without such filters exist.
            if network.connect("peer").is_err() {
                return;
            }
            assert!(test_namespace::has_ingress("peer").unwrap());
            disconnect("peer").unwrap();
            assert!(!test_namespace::has_ingress("peer").unwrap());
            disconnect("peer").unwrap();
            assert!(disconnect("none").is_err());
        };
        std::thread::spawn(work).join().unwrap();
    }

    #[test]
    fn changes_are_looked_at_in_a_quiet_moment() {
        let (mut reporter, reports) = UnixStream::pair().unwrap();
        reports.set_nonblocking(true).unwrap();
        let reports = OwnedFd::from(reports);
        let (alive, ended) = UnixStream::pair().unwrap();
        assert_eq!(wait(&reports, &ended, Some(QUIET)), Waited::Quiet);
        for _ in 0..10 {
            reporter.write_all(&[0; 5000]).unwrap();
        }
        let began = Instant::now();
        assert!(wait_for_changes(&reports, &ended));
        assert!(began.elapsed() >= QUIET);
        assert_eq!(wait(&reports, &ended, Some(QUIET)), Waited::Quiet);
        drop(alive);
        assert!(!wait_for_changes(&reports, &ended));
    }

    #[test]
    fn changes_without_an_end_are_looked_at_nevertheless() {
        let (mut reporter, reports) = UnixStream::pair().unwrap();
        reports.set_nonblocking(true).unwrap();
        let reports = OwnedFd::from(reports);
        let (_alive, ended) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || {
            while reporter.write_all(&[0]).is_ok() {
                std::thread::sleep(QUIET / 20);
            }
        });
        let began = Instant::now();
        assert!(wait_for_changes(&reports, &ended));
        assert!(began.elapsed() >= UNREST);
        drop(reports);
        writer.join().unwrap();
    }
}
