//! Networks that exist before and after their containers: `ctr` passes them by network namespace.

use crate::daemon::Containerd;
use crate::tool::{ip, scratch, stdout, until};
use anyhow::{Result, ensure};
use std::fs;
use std::process::{Child, Command, Stdio};

/// Removed on drop.
struct Namespace(String);

impl Drop for Namespace {
    fn drop(&mut self) {
        ip(&["netns", "del", &self.0]).ok();
    }
}

/// A namespace for the container, and one for the other end: in the host's own namespace, concurrent tests with the same
/// addresses would receive each other's replies.
fn namespaces(what: &str, containerd: &Containerd) -> Result<[Namespace; 2]> {
    let own = Namespace(format!("{what}{}", containerd.number));
    let far = Namespace(format!("{what}far{}", containerd.number));
    for Namespace(name) in [&own, &far] {
        ip(&["netns", "add", name])?;
    }
    Ok([own, far])
}

/// A network namespace that exists before and after the container: the guest takes over the addresses of its interface,
/// which is unchanged afterwards.
pub(crate) fn a_network_is_taken_over(containerd: &Containerd) -> Result<()> {
    let [Namespace(name), Namespace(far)] = &namespaces("lent", containerd)?;
    let (inside, outside) = ("eth0", "far0");
    let own = |words: &[&str]| ip(&[&["-n", name], words].concat());
    let fars = |words: &[&str]| ip(&[&["-n", far], words].concat());
    // Created before the other interface, as a network plugin may do.
    own(&[
        "link", "add", "eth1", "type", "veth", "peer", "name", "far1", "netns", far,
    ])?;
    let veth = ["link", "add", inside, "type", "veth", "peer", "name"];
    own(&[&veth[..], &[outside, "netns", far]].concat())?;
    own(&[
        "link",
        "set",
        inside,
        "address",
        "02:00:00:00:00:42",
        "mtu",
        "1400",
        "up",
    ])?;
    own(&["address", "add", "192.0.2.2/24", "dev", inside])?;
    own(&["address", "add", "192.0.2.77/24", "dev", inside])?;
    let by = [
        "198.51.100.0/24",
        "via",
        "192.0.2.9",
        "src",
        "192.0.2.77",
        "metric",
        "100",
    ];
    own(&[&["route", "add"], &by[..]].concat())?;
    // A second network, whose interface has the first one's name in the guest until both have their final names. Its route
    // to the same destination has a higher metric, and stays.
    own(&["link", "set", "eth1", "up"])?;
    own(&["address", "add", "203.0.113.2/24", "dev", "eth1"])?;
    let worse = ["198.51.100.0/24", "via", "203.0.113.9", "metric", "200"];
    own(&[&["route", "add"], &worse[..]].concat())?;
    let neighbour = [
        "neigh",
        "add",
        "192.0.2.9",
        "lladdr",
        "02:00:00:00:00:09",
        "nud",
        "permanent",
    ];
    own(&[&neighbour[..], &["dev", inside]].concat())?;

    let namespace = format!("network:/run/netns/{name}");
    let script = "ip link; ip address; ip route; ip neigh";
    let options = ["--rm", "--with-ns", &namespace];
    let said = stdout(
        containerd
            .run(&options, "lent", &["sh", "-c", script])
            .output()?,
    )?;
    let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
    for wanted in [
        "02:00:00:00:00:42",
        "mtu 1400",
        "192.0.2.2/24",
        "198.51.100.0/24 via 192.0.2.9 dev eth0 src 192.0.2.77 metric 100",
        "198.51.100.0/24 via 203.0.113.9 dev eth1 metric 200",
        "203.0.113.2/24 brd 203.0.113.255 scope global eth1",
        "02:00:00:00:00:09",
    ] {
        ensure!(said.contains(wanted), "no {wanted}: {said}");
    }
    containerd.nothing_is_left()?;
    let filters = [
        "netns", "exec", name, "tc", "filter", "show", "dev", inside, "ingress",
    ];
    let filters = ip(&filters)?;
    ensure!(filters.is_empty(), "{filters}");
    // A killed shim cannot remove its filters: those of the next one come first.
    stdout(
        containerd
            .run(&["-d", "--with-ns", &namespace], "dies", &["sleep", "1000"])
            .output()?,
    )?;
    containerd.kill_and_remove("dies")?;
    fars(&["address", "add", "192.0.2.1/24", "dev", outside])?;
    fars(&["link", "set", outside, "up"])?;
    let ping = [
        "sh",
        "-c",
        "ping -c 1 -w 20 192.0.2.1 > /dev/null && echo reached",
    ];
    let said = stdout(containerd.run(&options, "again", &ping).output()?)?;
    ensure!(said == "reached", "{said}");
    containerd.nothing_is_left()
}

/// Tables, rules, next hops, metrics and blackhole routes, as left by plugins for several networks.
pub(crate) fn routes_of_every_kind_are_taken_over(containerd: &Containerd) -> Result<()> {
    let [Namespace(name), Namespace(far)] = &namespaces("routes", containerd)?;
    for (inside, outside, address) in [
        ("eth0", "far0", "192.0.2.2/24"),
        ("net1", "far1", "203.0.113.2/24"),
    ] {
        let setup = format!(
            "link add {inside} type veth peer name {outside} netns {far}
            address add {address} dev {inside}
            link set {inside} up"
        );
        in_lines(name, &setup)?;
    }
    in_lines(
        name,
        "route add 10.50.0.0/16 via 192.0.2.9 advmss 1260
        route add blackhole 10.66.0.0/16
        route add 10.77.0.0/16 nexthop via 192.0.2.9 nexthop via 203.0.113.9
        route add default via 203.0.113.9 dev net1 table 1000
        rule add from 203.0.113.2 lookup 1000 priority 900
        rule add iif net1 lookup 1000 priority 901
        rule add from 198.51.100.0/24 lookup 1001 priority 902
        -6 address add 2001:db8::2/64 dev net1 nodad
        -6 route add 2001:db8:1::/48 via 2001:db8::9 metric 77 table 1000
        -6 rule add from 2001:db8::2 lookup 1000 priority 903",
    )?;
    let script = "cat /proc/net/route; ip route; ip route show table 1000; ip rule; ip -6 rule
        cat /proc/net/ipv6_route
        for i in $(seq 1 40); do ip route get 10.77.0.$i; done | grep -o 'dev [a-z0-9]*' | sort -u";
    let namespace = format!("network:/run/netns/{name}");
    let options = ["--rm", "--with-ns", &namespace];
    let mut run = containerd.run(&options, "routed", &["sh", "-c", script]);
    let said = stdout(run.output()?)?;
    let words = said.split_whitespace().collect::<Vec<_>>().join(" ");
    for wanted in [
        // The MTU column is the maximum segment size plus 40 for headers.
        "eth0 0000320A 090200C0 0003 0 0 0 0000FFFF 1300",
        "blackhole 10.66.0.0/16",
        "default via 203.0.113.9 dev net1",
        "from 203.0.113.2 lookup 1000",
        "from all iif net1 lookup 1000",
        "from 2001:db8::2 lookup 1000",
        // Destination, source, next hop, and metric, of all tables: busybox shows only the main one.
        "20010db8000100000000000000000000 30 00000000000000000000000000000000 00 \
         20010db8000000000000000000000009 0000004d",
        "dev eth0 dev net1",
    ] {
        ensure!(words.contains(wanted), "no {wanted}: {said}");
    }
    // Table 1001 has no routes, so its rule is not copied.
    ensure!(!words.contains("lookup 1001"), "{said}");
    containerd.nothing_is_left()
}

/// Runs ip-netns(8) with the arguments of each line.
fn in_lines(namespace: &str, lines: &str) -> Result<()> {
    for line in lines.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        ip(&[&["-n", namespace], &words[..]].concat())?;
    }
    Ok(())
}

/// Killed on drop.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// A tap with a program at its other end, as left by the CNI plugin `tap` and slirp4netns.
pub(crate) fn a_tap_is_taken_over(containerd: &Containerd) -> Result<()> {
    let [Namespace(name), Namespace(far)] = &namespaces("tap", containerd)?;
    // Two programs that exchange the frames of their taps in datagrams: no frame is lost, since the taps are down until both
    // have created their sockets.
    let sockets = scratch("tap")?;
    let carry = |namespace: &str, own: &str, other: &str| -> Result<Killed> {
        let socket = |name: &str| sockets.join(name).display().to_string();
        let mut socat = Command::new("ip");
        socat.args(["netns", "exec", namespace, "socat"]);
        socat.arg("TUN,tun-type=tap,iff-no-pi,tun-name=eth0");
        socat.arg(format!(
            "UNIX-SENDTO:{},bind={}",
            socket(other),
            socket(own)
        ));
        Ok(Killed(socat.spawn()?))
    };
    let _inside = carry(name, "inside", "outside")?;
    let _outside = carry(far, "outside", "inside")?;
    until("the programs' sockets", || {
        let both = ["inside", "outside"].map(|name| sockets.join(name).exists());
        Ok((both == [true, true]).then_some(()))
    })?;
    for (namespace, address) in [(name, "203.0.113.2/24"), (far, "203.0.113.1/24")] {
        let in_it = |words: &[&str]| ip(&[&["-n", namespace], words].concat());
        // IPv6 would send packets before both taps are up.
        let mute = "echo 1 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6";
        ip(&["netns", "exec", namespace, "sh", "-c", mute])?;
        in_it(&["address", "add", address, "dev", "eth0"])?;
        in_it(&["link", "set", "eth0", "up"])?;
    }

    let namespace = format!("network:/run/netns/{name}");
    let script = "ip address show eth0; ping -c 1 -w 60 203.0.113.1 > /dev/null && echo reached; \
                  echo served | nc -l -p 80";
    let options = ["--rm", "--with-ns", &namespace];
    let mut run = containerd.run(&options, "tapped", &["sh", "-c", script]);
    let run = run.stdin(Stdio::null());
    let run = run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // As podman's rootlessport connects to ports of a container with slirp4netns.
    let served = until("a connection from the namespace", || {
        let mut client = Command::new("ip");
        client.args(["netns", "exec", name, "timeout", "9"]);
        client.args(["busybox", "nc", "203.0.113.2", "80"]);
        let output = client.stdin(Stdio::null()).output()?;
        Ok(output.status.success().then_some(output.stdout))
    })?;
    ensure!(served == b"served\n", "{served:?}");
    let said = stdout(run.wait_with_output()?)?;
    ensure!(
        said.contains("203.0.113.2/24") && said.ends_with("reached"),
        "{said}"
    );
    fs::remove_dir_all(sockets)?;
    containerd.nothing_is_left()
}
