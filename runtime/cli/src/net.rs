//! `koya run --net`: which network the guest has.
//!
//! `user` needs no privilege. The process moves into a network namespace of its own (and, without
//! root, a user namespace), and pasta gives that namespace an interface whose traffic it speaks for
//! with ordinary sockets on the host. The guest takes the place of that interface.

use super::alone::{self, Alone};
use super::programs;
use super::publish::{self, Ports};
use super::state::Directory;
use anyhow::{Context, Result, bail};
use clap::Args;
use ipnet::IpNet;
use koya::vmm::devices::net::MacAddr;
use koya::vmm::devices::vsock::muxer::MAX_CONNECTIONS;
use koya::vmm::guest_text::Warnings;
use koya::vmm::host::threads;
use koya::{HostEnd, NetConfig, NetworkConfig, Route, Sandbox, Volume, host_addresses};
use nix::sched::{CloneFlags, unshare};
use rustix::process::{Resource, getrlimit};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// What pasta calls its interface in the namespace.
const PASTA_INTERFACE: &str = "eth0";
/// Where guests with `--net user` ask for names; pasta passes it on to the host's resolver. A
/// link-local address, so that it is nobody's; if it is the host's, the next one.
const RESOLVER: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

const RESOLV_CONF: &str = "/etc/resolv.conf";

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
    /// What was learnt of the host before this process moved away.
    #[arg(skip)]
    host: OnceLock<Outside>,
}

/// The host, as a guest with `--net user` has to know it.
#[derive(Clone, Debug)]
struct Outside {
    /// Addresses that are the host's own.
    addresses: Vec<IpNet>,
    /// Where the guest asks for names.
    resolver: Ipv4Addr,
    /// The network that the guest has if the host has no route to others.
    alone: Option<Alone>,
}

impl Outside {
    /// Of a host with these addresses, and with a default route or without.
    fn of(addresses: Vec<IpNet>, is_routed: bool) -> Result<Self> {
        let is_free = |ip: &Ipv4Addr| !addresses.iter().any(|net| net.contains(&IpAddr::V4(*ip)));
        let alone = match is_routed {
            true => None,
            false => Some(Alone::find(is_free)?),
        };
        let candidates = (0..254).map(|n| Ipv4Addr::from(u32::from(RESOLVER) + n));
        let resolver = candidates.into_iter().find(is_free);
        Ok(Self {
            resolver: resolver.context("all of 169.254.1.0/24 is the host's own")?,
            alone,
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
        _ => Err(format!("{text:?} is none of none, user, tap, tap:NAME")),
    }
}

impl NetArgs {
    /// Makes what the network needs of this process, which must have one thread.
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
                "--net tap:NAME needs --ip: the network behind a tap of your own is yours to know"
            );
        }
        match self.net {
            Kind::User => {
                let outside = Outside::of(host_addresses()?, alone::has_default_route())?;
                let host = self.host.get_or_init(|| outside);
                enter_user(&self.publish, host)
            }
            Kind::None | Kind::Tap(_) => Ok(()),
        }
    }

    /// What the sandbox is to have.
    pub(super) fn networks(&self) -> Vec<NetworkConfig> {
        let network = match &self.net {
            Kind::None => return Vec::new(),
            Kind::User => NetworkConfig {
                out_of_reach: self.host.get().map_or(Vec::new(), |h| h.addresses.clone()),
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
            // Who gives the guest's address knows the network; the host's end is theirs.
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

    /// Serves published ports for those who call from the host itself: pasta brings what comes from
    /// outside straight to the guest, but what is addressed to the host's loopback to the loopback of
    /// our namespace, where we listen.
    pub(super) fn serve_ports(&self, sandbox: &Arc<Sandbox>) -> Result<()> {
        let ports: BTreeSet<u16> = self.publish.iter().flat_map(Ports::tcp_of_guest).collect();
        let connections = Connections::new(connection_limit(getrlimit(Resource::Nofile).current));
        for guest in ports {
            // Which of the namespace's addresses pasta calls differs between its versions; what comes
            // from the network never arrives here, since it is redirected before.
            let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, guest))
                .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, guest)))
                .with_context(|| format!("cannot listen at port {guest}"))?;
            // The standard library's own is 128.
            rustix::net::listen(&listener, BACKLOG)?;
            let (sandbox, connections) = (sandbox.clone(), connections.clone());
            threads::spawn("koya-port", move || {
                accept(&listener, guest, &sandbox, &connections);
            })?;
        }
        Ok(())
    }

    /// The guest's /etc/resolv.conf, where its network has a resolver of its own.
    pub(super) fn resolver(
        &self,
        rootfs: &Path,
        volumes: &[Volume],
        directory: &Directory,
    ) -> Result<Option<Volume>> {
        let own = volumes
            .iter()
            .any(|v| v.destination == Path::new(RESOLV_CONF));
        if self.net != Kind::User || own {
            return Ok(None);
        }
        let etc = rootfs.join("etc");
        // In an image's own layer of memory one can always be made; a link leads to a file, or one is made where it leads.
        let there = !rootfs.is_dir()
            || match etc.join("resolv.conf").symlink_metadata() {
                Ok(data) => data.is_file() || data.is_symlink(),
                Err(_) => rustix::fs::access(&etc, rustix::fs::Access::WRITE_OK).is_ok(),
            };
        if !there {
            log::warn!(
                "names may not be resolved: {} has no file resolv.conf, and none can be made; use -v",
                etc.display()
            );
            return Ok(None);
        }
        let path = directory.resolver();
        let resolver = self.host.get().map_or(RESOLVER, |host| host.resolver);
        // Short names are looked for where the host looks for them.
        let content = format!("nameserver {resolver}\n{}", koya::search_and_options());
        std::fs::write(&path, content)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Some(Volume::new(path, RESOLV_CONF)))
    }
}

/// How many connections may wait to be taken up: as many as the host's kernel keeps by default.
const BACKLOG: i32 = 4096;

/// The most connections through published ports from the host itself at a time: an eighth of the process's
/// descriptors, of which each takes three, up to what the guest's vsock has room for.
fn connection_limit(descriptors: Option<u64>) -> usize {
    let share = descriptors.map_or(MAX_CONNECTIONS, |all| {
        usize::try_from(all / 8).unwrap_or(MAX_CONNECTIONS)
    });
    share.clamp(1, MAX_CONNECTIONS)
}

/// What all published ports have in common.
#[derive(Clone)]
struct Connections {
    limit: usize,
    live: Arc<AtomicUsize>,
    refused: Arc<Warnings>,
}

/// One of them, as long as it lives.
struct Held(Arc<AtomicUsize>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Connections {
    fn new(limit: usize) -> Self {
        Self {
            limit,
            live: Arc::default(),
            refused: Arc::new(Warnings::new()),
        }
    }

    /// One more; nothing if there are too many.
    fn take(&self) -> Option<Held> {
        self.live.fetch_add(1, Ordering::SeqCst);
        let held = Held(self.live.clone());
        (self.live.load(Ordering::SeqCst) <= self.limit).then_some(held)
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
                // No descriptors, say: others may go.
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
                // Most often nobody listens there.
                Err(error) => log::debug!("port {port}: {error}"),
            }
        });
        if let Err(error) = spawned {
            refuse(&format_args!("no thread for it: {error}"));
        }
    }
}

/// Copies both ways until both have ended.
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

/// Two link-local addresses of a network of their own, for the host and for a guest: from the
/// process's number, so that sandboxes of one host differ.
fn pair(process: u32) -> [IpNet; 2] {
    // 169.254.0.0/24 and 169.254.255.0/24 are reserved (RFC 3927).
    let block = 64 + process % (254 * 64);
    let first = u32::from(Ipv4Addr::new(169, 254, 0, 0)) + 4 * block;
    [1, 2].map(|n| IpNet::new_assert(Ipv4Addr::from(first + n).into(), 30))
}

/// Moves this process into a network namespace with pasta's interface in it.
fn enter_user(publish: &[Ports], host: &Outside) -> Result<()> {
    publish::check(publish)?;
    let mut pasta = Pasta::prepare(publish, host)?;
    let root = rustix::process::geteuid().is_root();
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    let flags = match root {
        true => CloneFlags::CLONE_NEWNET,
        false => CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET,
    };
    unshare(flags).context(match root {
        true => "cannot make a network namespace (CAP_SYS_ADMIN is missing)",
        false => "cannot make a network namespace (are user namespaces switched off?)",
    })?;
    if !root {
        // We stay who we are; one user and one group is all that is allowed without privilege.
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

/// Waits for our namespace outside of it, runs pasta there, and ends it when our end of its input is
/// closed, however we ended: pasta itself would stay.
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

/// How long pasta may take to set up its interface.
const PASTA_LIMIT: Duration = Duration::from_secs(20);

const PID_FILE: &str = "pasta.pid";

/// pasta and what keeps it.
struct Pasta {
    keeper: Child,
    /// It writes its number there once the interface is there. In /tmp: Debian's AppArmor profile lets
    /// pasta write there and to the user's home.
    ready: TempDir,
}

impl Pasta {
    fn prepare(publish: &[Ports], host: &Outside) -> Result<Self> {
        let Some(program) = programs::find("pasta") else {
            bail!("--net user needs pasta, which is not there; `apt-get install passt` has it");
        };
        let shell = programs::find("sh").context("--net user needs sh, which is not there")?;
        let ready =
            TempDir::with_prefix_in("koya-pasta-", "/tmp").context("no directory in /tmp")?;
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
            .args(host.alone.iter().flat_map(Alone::options))
            .args(publish::options(publish))
            .args(["--tcp-ns", "none", "--udp-ns", "none", "--pid"])
            .arg(ready.path().join(PID_FILE))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // The terminal's signals are for the container.
            .process_group(0)
            .spawn()
            .context("cannot start pasta")?;
        Ok(Self { keeper, ready })
    }

    /// Lets it join our namespace, and waits for its interface.
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
                        "this version of pasta publishes a port at one address, or at all of them"
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
        // It stays open as long as this process lives; its end is pasta's.
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
            Outside::of(nets.collect(), true)
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
        assert_eq!(all.live.load(Ordering::SeqCst), 299);
    }

    #[test]
    fn the_default_route_is_everywhere() {
        let route = default_route(Ipv4Addr::new(192, 0, 2, 1).into());
        assert_eq!(route.destination.to_string(), "0.0.0.0/0");
    }
}
