//! `koya run --net`: the network of the guest.
//!
//! `user` needs no privilege. The process moves into a new network namespace (and, without root, a user namespace), and
//! pasta gives that namespace an interface whose traffic it forwards by ordinary sockets on the host. The guest takes the
//! place of that interface.

use super::datagrams::{self, Receiver};
use super::link_local::{self, LinkLocalNetwork};
use super::programs;
use super::publish::{self, Ports};
use anyhow::{Context, Result, bail};
use clap::Args;
use ipnet::IpNet;
use koya::vmm::devices::net::MacAddr;
use koya::vmm::devices::vsock::muxer::MAX_CONNECTIONS;
use koya::vmm::guest_text::Warnings;
use koya::vmm::host::sync::{Counted, Counter};
use koya::vmm::host::threads;
use koya::{HostEnd, NetConfig, NetworkConfig, Route, Sandbox, host_addresses};
use nix::sched::{CloneFlags, unshare};
use rustix::process::{Resource, getrlimit};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Name of pasta's interface in the namespace.
const PASTA_INTERFACE: &str = "eth0";
/// Address of the name server for guests with `--net user`; pasta forwards it to the host's resolver. A link-local address,
/// so that it is not in use elsewhere; if the host uses it, the next one is taken.
const RESOLVER: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

#[derive(Args)]
pub(super) struct NetArgs {
    /// Set the network: none, user (pasta, unprivileged), tap, or tap:NAME with --ip
    #[arg(long, value_name = "NETWORK", default_value = "none", value_parser = parse_kind)]
    net: Kind,
    /// Publish a port of the guest, or a range (8000-8010:8000-8010), on all addresses of the host or on ADDRESS (--net user)
    #[arg(long, short, value_name = "[ADDRESS:]HOST:GUEST[/udp]")]
    publish: Vec<Ports>,
    /// Set the IP address of the guest (--net tap; default: a link-local pair with the host)
    #[arg(long, value_name = "ADDRESS/PREFIX")]
    ip: Option<IpNet>,
    /// Set the gateway (--net tap; default: the address of the tap on the host)
    #[arg(long, value_name = "ADDRESS")]
    gateway: Option<IpAddr>,
    /// Set the MAC address (--net tap; default: random)
    #[arg(long, value_name = "ADDRESS")]
    mac: Option<MacAddr>,
    /// Set the MTU, in bytes (--net tap and user)
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(68..))]
    mtu: Option<u16>,
    /// Properties of the host, read before this process changed its namespace.
    #[arg(skip)]
    host: OnceLock<HostNetwork>,
    /// Sockets for published UDP ports, opened before this process changed its namespace.
    #[arg(skip)]
    receivers: OnceLock<Vec<Receiver>>,
}

/// Properties of the host that a guest with `--net user` depends on.
#[derive(Clone, Debug)]
struct HostNetwork {
    /// Addresses of the host.
    addresses: Vec<IpNet>,
    /// Address of the name server for the guest.
    resolver: Ipv4Addr,
    /// The guest's network if the host has no default route.
    link_local: Option<LinkLocalNetwork>,
}

impl HostNetwork {
    /// For a host with these addresses, with or without a default route.
    fn of(addresses: Vec<IpNet>, is_routed: bool) -> Result<Self> {
        let is_free = |ip: &Ipv4Addr| !addresses.iter().any(|net| net.contains(&IpAddr::V4(*ip)));
        let link_local = match is_routed {
            true => None,
            false => Some(LinkLocalNetwork::find(is_free)?),
        };
        let candidates = (0..254).map(|n| Ipv4Addr::from(u32::from(RESOLVER) + n));
        let resolver = candidates.into_iter().find(is_free);
        Ok(Self {
            resolver: resolver.context(
                "no free address for the name server: the host uses all of 169.254.1.0/24",
            )?,
            link_local,
            addresses,
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    None,
    User,
    Tap(String),
}

fn parse_kind(text: &str) -> Result<Kind, String> {
    match text.split_once(':') {
        None if text == "none" => Ok(Kind::None),
        None if text == "user" => Ok(Kind::User),
        None if text == "tap" => Ok(Kind::Tap(String::new())),
        Some(("tap", name)) if !name.is_empty() => Ok(Kind::Tap(name.to_owned())),
        _ => Err(format!("{text:?} is not one of none, user, tap, tap:NAME")),
    }
}

impl NetArgs {
    /// Prepares this process, which must be single-threaded, for the network.
    pub(super) fn enter(&self) -> Result<()> {
        if self.net != Kind::User && !self.publish.is_empty() {
            bail!("--publish needs --net user");
        }
        if !matches!(self.net, Kind::Tap(_)) {
            let given = [
                ("--ip", self.ip.is_some()),
                ("--gateway", self.gateway.is_some()),
                ("--mac", self.mac.is_some()),
            ];
            if let Some((option, _)) = given.iter().find(|(_, given)| *given) {
                bail!("{option} needs --net tap");
            }
        }
        if self.net == Kind::None && self.mtu.is_some() {
            bail!("--mtu needs --net tap or user");
        }
        if matches!(&self.net, Kind::Tap(name) if !name.is_empty()) && self.ip.is_none() {
            bail!(
                "--net tap:NAME requires --ip: Koya cannot know the network behind an existing tap"
            );
        }
        match self.net {
            Kind::User => {
                let outside = HostNetwork::of(host_addresses()?, link_local::has_default_route())?;
                let host = self.host.get_or_init(|| outside);
                publish::check(&self.publish)?;
                let receivers = datagrams::receivers(&self.publish)?;
                self.receivers.get_or_init(|| receivers);
                enter_user(&self.publish, host)
            }
            Kind::None | Kind::Tap(_) => Ok(()),
        }
    }

    /// Whether the guest has none.
    pub(super) fn is_none(&self) -> bool {
        self.net == Kind::None
    }

    /// The networks for the sandbox.
    pub(super) fn networks(&self) -> Vec<NetworkConfig> {
        let network = match &self.net {
            Kind::None => return Vec::new(),
            Kind::User => NetworkConfig {
                blocked_destinations: self.host.get().map_or(Vec::new(), |h| h.addresses.clone()),
                host_access: Some(self.receivers.get().is_some_and(|all| !all.is_empty())),
                ..NetworkConfig::new(HostEnd::Join {
                    interface: PASTA_INTERFACE.into(),
                })
            },
            Kind::Tap(name) => self.tap(name.clone()),
        };
        let device = NetConfig {
            mac: self.mac,
            mtu: self.mtu,
            ..network.device
        };
        vec![NetworkConfig { device, ..network }]
    }

    fn tap(&self, name: String) -> NetworkConfig {
        let [host, guest] = pair(std::process::id());
        let address = match self.ip {
            // A user who sets the guest's address also configures the host's end.
            Some(_) => None,
            None => Some(host),
        };
        let gateway = match (self.gateway, self.ip) {
            (Some(gateway), _) => Some(gateway),
            (None, Some(_)) => None,
            (None, None) => Some(host.addr()),
        };
        let mut network = NetworkConfig::new(HostEnd::Tap { name, address });
        network.addresses = vec![self.ip.unwrap_or(guest)];
        network.routes = gateway.into_iter().map(default_route).collect();
        network
    }

    /// Serves published ports for connections from the host itself: pasta forwards connections from outside straight to the
    /// guest, but those to the host's loopback go to the loopback of this namespace, where this listens.
    pub(super) fn serve_ports(&self, sandbox: &Arc<Sandbox>) -> Result<()> {
        let ports: BTreeSet<u16> = self.publish.iter().flat_map(Ports::tcp_of_guest).collect();
        let connections = Connections::new(connection_limit(getrlimit(Resource::Nofile).current));
        for guest in ports {
            // pasta's destination address in the namespace depends on its version; connections from the network never arrive
            // here, since they are redirected before.
            let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, guest))
                .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, guest)))
                .with_context(|| format!("cannot listen at port {guest}"))?;
            // The backlog of the standard library is 128.
            rustix::net::listen(&listener, BACKLOG)?;
            let (sandbox, connections) = (sandbox.clone(), connections.clone());
            threads::spawn("koya-port", move || {
                accept(&listener, guest, &sandbox, &connections);
            })?;
        }
        let receivers = self.receivers.get().map_or(&[][..], Vec::as_slice);
        datagrams::serve(receivers, PASTA_INTERFACE)
    }

    /// Address of the name server of the guest, if its network has one.
    pub(super) fn name_server(&self) -> Option<IpAddr> {
        let resolver = || self.host.get().map_or(RESOLVER, |host| host.resolver);
        (self.net == Kind::User).then(|| resolver().into())
    }
}

/// Backlog of listening sockets: the default of the host kernel.
const BACKLOG: i32 = 4096;

/// Maximum number of concurrent connections from the host itself through published ports: an eighth of the process's
/// descriptors, three per connection, up to the capacity of the guest's vsock.
fn connection_limit(descriptors: Option<u64>) -> usize {
    let share = descriptors.map_or(MAX_CONNECTIONS, |all| {
        usize::try_from(all / 8).unwrap_or(MAX_CONNECTIONS)
    });
    share.clamp(1, MAX_CONNECTIONS)
}

/// State shared by all published ports.
#[derive(Clone)]
struct Connections {
    limit: usize,
    live: Counter,
    refused: Arc<Warnings>,
}

impl Connections {
    fn new(limit: usize) -> Self {
        Self {
            limit,
            live: Counter::default(),
            refused: Arc::new(Warnings::new()),
        }
    }

    /// Counts one more connection; `None` if there are too many.
    fn take(&self) -> Option<Counted> {
        self.live.add_below(self.limit)
    }
}

fn accept(listener: &TcpListener, port: u16, sandbox: &Arc<Sandbox>, connections: &Connections) {
    let refuse = |why: &dyn std::fmt::Display| {
        let refused = &connections.refused;
        refused.warn(format_args!(
            "a connection to port {port} is refused: {why}"
        ));
    };
    for socket in listener.incoming() {
        let socket = match socket {
            Ok(socket) => socket,
            Err(error) => {
                refuse(&error);
                // Out of descriptors, for example: other connections may end.
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let Some(held) = connections.take() else {
            let limit = connections.limit;
            refuse(&format_args!(
                "{limit} are open (the descriptor limit allows no more)"
            ));
            continue;
        };
        let sandbox = sandbox.clone();
        let spawned = threads::spawn("koya-port", move || {
            let _held = held;
            match sandbox.connect(port) {
                Ok(stream) => join(&socket, &stream),
                // Usually nothing listens on that port.
                Err(error) => log::debug!("port {port}: {error}"),
            }
        });
        if let Err(error) = spawned {
            refuse(&format_args!("no thread for it: {error}"));
        }
    }
}

/// Copies in both directions until both have ended.
fn join(socket: &TcpStream, stream: &UnixStream) {
    socket.set_nodelay(true).ok();
    std::thread::scope(|scope| {
        let there = || {
            std::io::copy(&mut &*socket, &mut &*stream).ok();
            stream.shutdown(Shutdown::Write).ok();
        };
        if let Err(error) = threads::spawn_scoped(scope, "koya-port", there) {
            log::warn!("no thread for a connection to a port: {error}");
            return;
        }
        std::io::copy(&mut &*stream, &mut &*socket).ok();
        socket.shutdown(Shutdown::Write).ok();
    });
}

fn default_route(gateway: IpAddr) -> Route {
    let everywhere = match gateway {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    Route::new(IpNet::new_assert(everywhere, 0), Some(gateway))
}

/// Two link-local addresses in a separate network, for the host and for a guest: derived from the process ID, so that they
/// differ between sandboxes.
fn pair(process: u32) -> [IpNet; 2] {
    // 169.254.0.0/24 and 169.254.255.0/24 are reserved (RFC 3927).
    let block = 64 + process % (254 * 64);
    let first = u32::from(Ipv4Addr::new(169, 254, 0, 0)) + 4 * block;
    [1, 2].map(|n| IpNet::new_assert(Ipv4Addr::from(first + n).into(), 30))
}

/// Moves this process into a network namespace with pasta's interface in it. Without root, that takes a user namespace; in a
/// mount namespace of that one, detached mounts are possible, and so are root directories of threads without files of the
/// host. Later mounts of the host still propagate there.
fn enter_user(publish: &[Ports], host: &HostNetwork) -> Result<()> {
    let mut pasta = Pasta::prepare(publish, host)?;
    let root = rustix::process::geteuid().is_root();
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    let flags = match root {
        true => CloneFlags::CLONE_NEWNET,
        false => CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS,
    };
    unshare(flags).context(match root {
        true => "cannot make a network namespace (CAP_SYS_ADMIN is missing)",
        false => "cannot make a network namespace (are user namespaces switched off?)",
    })?;
    if !root {
        // The user stays the same; only one user and one group can be mapped without privileges.
        for (file, text) in [
            ("setgroups", "deny".to_owned()),
            ("uid_map", format!("{0} {0} 1", uid.as_raw())),
            ("gid_map", format!("{0} {0} 1", gid.as_raw())),
        ] {
            std::fs::write(format!("/proc/self/{file}"), text)
                .with_context(|| format!("cannot set up the user namespace ({file})"))?;
        }
    }
    pasta.join()
}

/// Waits outside our namespace for it to exist, runs pasta in it, and ends pasta when our end of its input is closed for any
/// reason: pasta itself would stay.
const KEEPER: &str = r#"
    exec 3<&0
    program=$1
    shift
    read -r target || exit 0
    if [ "$(id -u)" = 0 ]; then
        # As root pasta gives up the privilege to look for it.
        "$program" "$@" --runas 0:0 --netns-only --netns /proc/self/fd/0 < "/proc/$target/ns/net" &
    else
        "$program" "$@" "$target" &
    fi
    pasta=$!
    (read -r _ <&3; kill $pasta) 2> /dev/null &
    watch=$!
    wait $pasta
    status=$?
    kill $watch
    exit $status"#;

/// Time limit for pasta to set up its interface.
const PASTA_LIMIT: Duration = Duration::from_secs(20);

const PID_FILE: &str = "pasta.pid";

/// Beginning of the names of directories with such a file.
const READY: &str = "koya-pasta-";

/// Removes those directories that this user's killed commands have left.
fn remove_left_behind(parent: &Path, limit: Duration) {
    let Ok(entries) = std::fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if !name.as_encoded_bytes().starts_with(READY.as_bytes()) {
            continue;
        }
        // Of a link, not of what it names.
        let Ok(data) = entry.metadata() else {
            continue;
        };
        let own = data.is_dir() && data.uid() == rustix::process::geteuid().as_raw();
        let age = data.modified().ok().and_then(|made| made.elapsed().ok());
        if own && age.is_some_and(|age| age > limit) {
            std::fs::remove_dir_all(entry.path()).ok();
        }
    }
}

/// pasta and its supervisor.
struct Pasta {
    keeper: Child,
    /// File to which pasta writes its PID once the interface exists. In /tmp: Debian's AppArmor profile only lets pasta
    /// write there and to the user's home.
    ready: TempDir,
}

impl Pasta {
    fn prepare(publish: &[Ports], host: &HostNetwork) -> Result<Self> {
        let Some(program) = programs::find("pasta") else {
            bail!("--net user needs pasta, which is not there; `apt-get install passt` has it");
        };
        let shell = programs::find("sh").context("--net user needs sh, which is not there")?;
        remove_left_behind(Path::new("/tmp"), 2 * PASTA_LIMIT);
        let ready = TempDir::with_prefix_in(READY, "/tmp").context("no directory in /tmp")?;
        let keeper = programs::command(&shell)
            .args(["-c", KEEPER, "koya-pasta"])
            .arg(program)
            .args(["--foreground", "--stderr", "--quiet"])
            .args([
                "--config-net",
                "--no-map-gw",
                "--ns-ifname",
                PASTA_INTERFACE,
            ])
            .args(["--dns-forward", &host.resolver.to_string()])
            .args(host.link_local.iter().flat_map(LinkLocalNetwork::options))
            .args(publish::options(publish))
            .args(["--tcp-ns", "none", "--udp-ns", "none", "--pid"])
            .arg(ready.path().join(PID_FILE))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // Signals from the terminal are for the container.
            .process_group(0)
            .spawn()
            .context("cannot start pasta")?;
        Ok(Self { keeper, ready })
    }

    /// Makes pasta join our namespace, and waits for its interface.
    fn join(&mut self) -> Result<()> {
        let mut input = self.keeper.stdin.take().context("pasta has no input")?;
        writeln!(input, "{}", std::process::id())?;
        let deadline = Instant::now() + PASTA_LIMIT;
        let number = self.ready.path().join(PID_FILE);
        while std::fs::read(&number).map_or(true, |number| number.is_empty()) {
            if let Some(status) = self.keeper.try_wait()? {
                let mut said = String::new();
                if let Some(mut stderr) = self.keeper.stderr.take() {
                    stderr.read_to_string(&mut said).ok();
                }
                if said.contains("Overlapping port") {
                    bail!(
                        "this version of pasta can't publish a port at several addresses, only at one or at all"
                    );
                }
                bail!(
                    "pasta failed ({status}): {}",
                    said.trim().replace('\n', "; ")
                );
            }
            if Instant::now() > deadline {
                bail!("pasta made no interface in {} s", PASTA_LIMIT.as_secs());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        // It stays open as long as this process lives; closing it ends pasta.
        std::mem::forget(input);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_parsed() {
        assert_eq!(parse_kind("tap:koya0"), Ok(Kind::Tap("koya0".into())));
        assert_eq!(parse_kind("user"), Ok(Kind::User));
        for bad in ["", "tap:", "bridge", "none:x"] {
            assert!(parse_kind(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn directories_of_killed_commands_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("koya-pasta-x")).unwrap();
        std::fs::write(at("koya-pasta-x/pasta.pid"), "").unwrap();
        std::fs::create_dir(at("other")).unwrap();
        std::os::unix::fs::symlink("other", at("koya-pasta-link")).unwrap();
        remove_left_behind(dir.path(), Duration::from_secs(60));
        assert!(at("koya-pasta-x").exists(), "it may be in use");
        std::thread::sleep(Duration::from_millis(20));
        remove_left_behind(dir.path(), Duration::from_millis(1));
        assert!(!at("koya-pasta-x").exists());
        assert!(at("koya-pasta-link").exists() && at("other").exists());
    }

    #[test]
    fn a_pair_is_one_network_outside_what_is_reserved() {
        for process in [1, 2, 16_255, 16_256, 4_194_304] {
            let [host, guest] = pair(process);
            assert!(host.contains(&guest.addr()) && host != guest);
            let IpAddr::V4(ip) = host.addr() else {
                panic!()
            };
            assert!(
                ip.is_link_local() && !matches!(ip.octets()[2], 0 | 255),
                "{ip}"
            );
        }
    }

    #[test]
    fn names_are_asked_for_where_nobody_else_is() {
        let of = |nets: &[&str]| {
            let nets = nets.iter().map(|net| net.parse().unwrap());
            HostNetwork::of(nets.collect(), true)
        };
        assert_eq!(of(&["192.0.2.1/32"]).unwrap().resolver, RESOLVER);
        let next = of(&["169.254.1.0/31", "169.254.1.2/32"]).unwrap().resolver;
        assert_eq!(next.to_string(), "169.254.1.3");
        assert!(of(&["169.254.0.0/16"]).is_err());
    }

    #[test]
    fn as_many_connections_as_descriptors_allow() {
        assert_eq!(connection_limit(Some(1024)), 128);
        assert_eq!(connection_limit(Some(1 << 20)), MAX_CONNECTIONS);
        assert_eq!(connection_limit(Some(0)), 1);
        let all = Connections::new(300);
        let mut held: Vec<_> = (0..300).map(|_| all.take().unwrap()).collect();
        assert!(all.clone().take().is_none());
        held.pop();
        assert!(all.take().is_some());
        assert_eq!(all.live.get(), 299);
    }

    #[test]
    fn the_default_route_is_everywhere() {
        let route = default_route(Ipv4Addr::new(192, 0, 2, 1).into());
        assert_eq!(route.destination.to_string(), "0.0.0.0/0");
    }
}
