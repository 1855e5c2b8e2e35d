//! Networks that are there before and after their containers: `ctr` lends them by a namespace.

use crate::daemon::Containerd;
use crate::tool::stdout;
use anyhow::{Result, ensure};
use std::process::Command;

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
    containerd.kill_and_remove("dies")?;
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
