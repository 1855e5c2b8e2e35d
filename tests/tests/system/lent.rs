//! Networks that are there before and after their containers: `ctr` lends them by a namespace.

use crate::daemon::Containerd;
use crate::tool::{scratch, stdout, until};
use anyhow::{Result, ensure};
use std::fs;
use std::process::{Child, Command};

/// A network namespace that is there before and after the container: what its interface has is the guest's,
/// and the interface is as it was afterwards.
pub(crate) fn a_network_is_lent(containerd: &Containerd) -> Result<()> {
    let name = format!("lent{}", containerd.number);
    let (inside, outside) = (
        format!("i{}", containerd.number),
        format!("o{}", containerd.number),
    );
    let ip = |words: &[&str]| stdout(Command::new("ip").args(words).output()?);
    ip(&["netns", "add", &name])?;
    ip(&[
        "link", "add", &outside, "type", "veth", "peer", "name", &inside,
    ])?;
    ip(&["link", "set", &inside, "netns", &name])?;
    let own = |words: &[&str]| ip(&[&["-n", &name], words].concat());
    own(&[
        "link",
        "set",
        &inside,
        "address",
        "02:00:00:00:00:42",
        "mtu",
        "1400",
        "up",
    ])?;
    own(&["address", "add", "192.0.2.2/24", "dev", &inside])?;
    own(&["route", "add", "198.51.100.0/24", "via", "192.0.2.9"])?;
    let neighbour = [
        "neigh",
        "add",
        "192.0.2.9",
        "lladdr",
        "02:00:00:00:00:09",
        "nud",
        "permanent",
    ];
    own(&[&neighbour[..], &["dev", &inside]].concat())?;

    let namespace = format!("network:/run/netns/{name}");
    let script = "ip link; ip address; ip route; ip neigh";
    let options = ["--rm", "--with-ns", &namespace];
    let said = stdout(
        containerd
            .run(&options, "lent", &["sh", "-c", script])
            .output()?,
    )?;
    for wanted in [
        "02:00:00:00:00:42",
        "mtu 1400",
        "192.0.2.2/24",
        "198.51.100.0/24 via 192.0.2.9",
        "02:00:00:00:00:09",
    ] {
        ensure!(said.contains(wanted), "no {wanted}: {said}");
    }
    containerd.nothing_is_left()?;
    let filters = [
        "netns", "exec", &name, "tc", "filter", "show", "dev", &inside, "ingress",
    ];
    let filters = ip(&filters)?;
    ensure!(filters.is_empty(), "{filters}");
    // A shim that dies can't take them back: the next one's come first.
    stdout(
        containerd
            .run(&["-d", "--with-ns", &namespace], "dies", &["sleep", "1000"])
            .output()?,
    )?;
    ensure!(
        Command::new("kill")
            .args(["-KILL", &containerd.pid("dies")?])
            .status()?
            .success()
    );
    until("its end", || {
        let state = containerd.state("dies")?;
        Ok(state.is_none_or(|state| state == "STOPPED").then_some(()))
    })?;
    containerd.ctr(["task", "rm", "-f", "dies"]).output()?;
    containerd.remove("dies")?;
    ip(&["address", "add", "192.0.2.1/24", "dev", &outside])?;
    ip(&["link", "set", &outside, "up"])?;
    let ping = [
        "sh",
        "-c",
        "ping -c 1 -w 20 192.0.2.1 > /dev/null && echo reached",
    ];
    let said = stdout(containerd.run(&options, "again", &ping).output()?)?;
    ensure!(said == "reached", "{said}");
    ip(&["netns", "del", &name])?;
    containerd.nothing_is_left()
}

/// Ends with the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// A tap whose other end is a program's, as the CNI plugin `tap` and slirp4netns leave them.
pub(crate) fn a_tap_is_lent(containerd: &Containerd) -> Result<()> {
    let name = format!("tap{}", containerd.number);
    let ip = |words: &[&str]| stdout(Command::new("ip").args(words).output()?);
    ip(&["netns", "add", &name])?;
    // Two programs, with a frame of the one's tap in each datagram to the other: no frame is there before
    // both have a socket, which they make behind their taps, since the taps are down.
    let sockets = scratch("tap")?;
    let carry = |own: &str, other: &str, tap: &str, enter: &[&str]| -> Result<Killed> {
        let tap = format!("TUN,tun-type=tap,iff-no-pi,tun-name={tap}");
        let socket = |name: &str| sockets.join(name).display().to_string();
        let carried = format!("UNIX-SENDTO:{},bind={}", socket(other), socket(own));
        let words = [enter, &["socat", &tap, &carried]].concat();
        Ok(Killed(Command::new(words[0]).args(&words[1..]).spawn()?))
    };
    let far = format!("far{}", containerd.number);
    let enter = ["ip", "netns", "exec", &name];
    let _inside = carry("inside", "outside", "eth0", &enter)?;
    let _outside = carry("outside", "inside", &far, &[])?;
    until("the programs' sockets", || {
        let both = ["inside", "outside"].map(|name| sockets.join(name).exists());
        Ok((both == [true, true]).then_some(()))
    })?;
    // Nor is there one until both taps are up: IPv6 would speak before.
    let mute = |tap: &str| format!("echo 1 > /proc/sys/net/ipv6/conf/{tap}/disable_ipv6");
    ip(&["netns", "exec", &name, "sh", "-c", &mute("eth0")])?;
    stdout(Command::new("sh").args(["-c", &mute(&far)]).output()?)?;
    ip(&[
        "-n",
        &name,
        "address",
        "add",
        "203.0.113.2/24",
        "dev",
        "eth0",
    ])?;
    ip(&["-n", &name, "link", "set", "eth0", "up"])?;
    ip(&["address", "add", "203.0.113.1/24", "dev", &far])?;
    ip(&["link", "set", &far, "up"])?;

    let namespace = format!("network:/run/netns/{name}");
    let script = "ip address show eth0; ping -c 10 -w 60 203.0.113.1 > /dev/null && echo reached";
    let options = ["--rm", "--with-ns", &namespace];
    let mut run = containerd.run(&options, "tapped", &["sh", "-c", script]);
    let said = stdout(run.output()?)?;
    ensure!(
        said.contains("203.0.113.2/24") && said.ends_with("reached"),
        "{said}"
    );
    ip(&["netns", "del", &name])?;
    fs::remove_dir_all(sockets)?;
    containerd.nothing_is_left()
}
