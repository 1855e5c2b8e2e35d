//! Network devices of the host that configurations of `koya-runtime` give to containers (`linux.netDevices`). Most cases are
//! those of runc's tests.

use crate::oci::{Runtime, bundle, text};
use crate::tool::{ip, scratch};
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use std::fs;

crate::trials!(
    a_device_keeps_its_properties,
    devices_stay_in_a_network_namespace_that_exists,
    a_moved_device_carries_the_containers_traffic,
    a_container_that_joins_another_brings_its_devices,
    devices_that_cannot_be_moved_are_refused,
);

const MAC: &str = "00:11:22:33:44:55";

/// A network namespace or a device, removed on drop.
struct Removed(&'static [&'static str]);

impl Drop for Removed {
    fn drop(&mut self) {
        ip(self.0).ok();
    }
}

fn device(name: &'static str, removal: &'static [&'static str]) -> Result<Removed> {
    ip(&["link", "add", name, "type", "dummy"])?;
    Ok(Removed(removal))
}

/// Gives a device an MTU, a MAC address, and addresses of IPv4 and IPv6; one of them is not global.
fn configure(name: &str) -> Result<()> {
    ip(&["link", "set", name, "mtu", "1789", "address", MAC, "up"])?;
    for address in ["169.254.169.77/32", "2001:db8::77/64", "127.0.0.33/8"] {
        ip(&["address", "add", address, "dev", name])?;
    }
    Ok(())
}

/// Checks the properties in the output of `ip address show`.
fn check(said: &str) -> Result<()> {
    for wanted in ["mtu 1789", MAC, "169.254.169.77/32", "2001:db8::77/64"] {
        ensure!(said.contains(wanted), "no {wanted}: {said}");
    }
    ensure!(!said.contains("127.0.0.33"), "{said}");
    Ok(())
}

/// Sets the path of the network namespace.
fn use_network(config: &mut Value, name: &str) {
    let namespaces = config["linux"]["namespaces"].as_array_mut();
    for namespace in namespaces.into_iter().flatten() {
        if namespace["type"] == "network" {
            namespace["path"] = format!("/run/netns/{name}").into();
        }
    }
}

/// In a new network namespace, with which a virtual device ends.
fn a_device_keeps_its_properties() -> Result<()> {
    let _device = device("koya-nd0", &["link", "del", "koya-nd0"])?;
    configure("koya-nd0")?;
    let runtime = Runtime::koya()?;
    let shown = bundle("ip address show dev koya-nd0", |config| {
        config["linux"]["netDevices"] = json!({"koya-nd0": {}});
    })?;
    let said = runtime.ok(&["run", "--bundle", text(&shown)?, "nd-new"])?;
    check(&said)?;
    ensure!(said.contains(",UP"), "{said}");
    ensure!(ip(&["link", "show", "koya-nd0"]).is_err(), "it is back");
    Ok(())
}

/// With new names, and in a user namespace: hooks find them there, and they remain after the container.
fn devices_stay_in_a_network_namespace_that_exists() -> Result<()> {
    let _first = device("koya-nd1", &["link", "del", "koya-nd1"])?;
    let _second = device("koya-nd2", &["link", "del", "koya-nd2"])?;
    ip(&["netns", "add", "koya-nd"])?;
    let _namespace = Removed(&["netns", "del", "koya-nd"]);
    configure("koya-nd1")?;
    let runtime = Runtime::koya()?;
    let seen = scratch("nd-hook")?.join("seen");
    let hook = format!(
        "ip -n koya-nd -o link show > {}; cat > /dev/null",
        text(&seen)?
    );
    let script = "ip address show dev ctr0; ip link show dev net0";
    let shown = bundle(script, |config| {
        use_network(config, "koya-nd");
        config["linux"]["netDevices"] =
            json!({"koya-nd1": {"name": "ctr0"}, "koya-nd2": {"name": "net%d"}});
        config["hooks"] = json!({"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", hook],
                "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}]});
        if let Some(namespaces) = config["linux"]["namespaces"].as_array_mut() {
            namespaces.push(json!({"type": "user"}));
        }
        let all = json!([{"containerID": 0, "hostID": 0, "size": 65536}]);
        config["linux"]["uidMappings"] = all.clone();
        config["linux"]["gidMappings"] = all;
    })?;
    let said = runtime.ok(&["run", "--bundle", text(&shown)?, "nd-path"])?;
    check(&said)?;
    ensure!(said.contains("net0"), "{said}");
    let seen = fs::read_to_string(seen)?;
    ensure!(seen.contains("ctr0") && seen.contains("net0"), "{seen}");
    check(&ip(&["-n", "koya-nd", "address", "show", "dev", "ctr0"])?)?;
    // As their owner takes them back.
    let back = ["link", "set", "net0", "netns", "1", "name", "koya-nd2"];
    ip(&[&["-n", "koya-nd"], &back[..]].concat())?;
    ip(&["link", "show", "koya-nd2"])?;
    Ok(())
}

fn a_moved_device_carries_the_containers_traffic() -> Result<()> {
    ip(&["netns", "add", "koya-ndfar"])?;
    let _namespace = Removed(&["netns", "del", "koya-ndfar"]);
    let pair = ["link", "add", "koya-nd3", "type", "veth", "peer", "name"];
    ip(&[&pair[..], &["far0", "netns", "koya-ndfar"]].concat())?;
    let far = |words: &[&str]| ip(&[&["-n", "koya-ndfar"], words].concat());
    far(&["address", "add", "198.51.100.1/24", "dev", "far0"])?;
    far(&["link", "set", "far0", "up"])?;
    ip(&["address", "add", "198.51.100.2/24", "dev", "koya-nd3"])?;
    let runtime = Runtime::koya()?;
    let script = "ping -c 1 -w 20 198.51.100.1 > /dev/null && echo reached";
    let pings = bundle(script, |config| {
        config["linux"]["netDevices"] = json!({"koya-nd3": {"name": "eth0"}});
        let sets = ["bounding", "effective", "permitted"];
        for set in sets {
            config["process"]["capabilities"][set] = json!(["CAP_NET_RAW"]);
        }
    })?;
    let said = runtime.ok(&["run", "--bundle", text(&pings)?, "nd-veth"])?;
    ensure!(said == "reached", "{said}");
    Ok(())
}

fn a_container_that_joins_another_brings_its_devices() -> Result<()> {
    let _device = device("koya-nd5", &["link", "del", "koya-nd5"])?;
    configure("koya-nd5")?;
    let runtime = Runtime::koya()?;
    let first = bundle("exec sleep 1000", |_| ())?;
    runtime.ok(&["run", "-d", "--bundle", text(&first)?, "nd-first"])?;
    let state: Value = serde_json::from_str(&runtime.ok(&["state", "nd-first"])?)?;
    let joins = bundle("ip address show dev net5", |config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut();
        for namespace in namespaces.into_iter().flatten() {
            if namespace["type"] == "network" {
                namespace["path"] = format!("/proc/{}/ns/net", state["pid"]).into();
            }
        }
        config["linux"]["netDevices"] = json!({"koya-nd5": {"name": "net5"}});
    })?;
    let said = runtime.ok(&["run", "--bundle", text(&joins)?, "nd-joins"])?;
    check(&said)?;
    // It is the machine's until that ends.
    runtime.ok(&["exec", "nd-first", "ip", "link", "show", "dev", "net5"])?;
    runtime.ok(&["delete", "--force", "nd-first"])?;
    Ok(())
}

/// Nothing is moved, and there is no container.
fn devices_that_cannot_be_moved_are_refused() -> Result<()> {
    let _device = device("koya-nd4", &["link", "del", "koya-nd4"])?;
    ip(&["netns", "add", "koya-ndused"])?;
    let _namespace = Removed(&["netns", "del", "koya-ndused"]);
    let there = ["link", "add", "ctr0", "type", "dummy"];
    ip(&[&["-n", "koya-ndused"], &there[..]].concat())?;
    let runtime = Runtime::koya()?;
    for (devices, expected) in [
        (
            json!({"koya-nd4": {}, "koya-none": {}}),
            "link not found for interface koya-none on runtime namespace",
        ),
        (
            json!({"koya-nd4": {"name": "ctr0"}}),
            "it has a device ctr0 already",
        ),
        (
            json!({"koya-nd4": {}, "lo": {"name": "lo1"}}),
            "lo is not an Ethernet device",
        ),
        (
            json!({"koya-nd4": {"name": "a/b"}}),
            "invalid network device name \"a/b\"",
        ),
        (
            json!({"koya-nd4": {"name": "same"}, "other": {"name": "same"}}),
            "have the same name in the container: same",
        ),
    ] {
        let refused = bundle("true", |config| {
            use_network(config, "koya-ndused");
            config["linux"]["netDevices"] = devices;
        })?;
        refuse(&runtime, text(&refused)?, expected)?;
    }
    let hosts = bundle("true", |config| {
        config["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "uts"}]);
        config["linux"]["netDevices"] = json!({"koya-nd4": {}});
    })?;
    let expected = "unable to move network devices without a NET namespace";
    refuse(&runtime, text(&hosts)?, expected)
}

fn refuse(runtime: &Runtime, bundle: &str, expected: &str) -> Result<()> {
    let output = runtime.call(&["create", "--bundle", bundle, "nd-refused"])?;
    let said = String::from_utf8_lossy(&output.stderr);
    let is_one_line = said.lines().count() == 1;
    ensure!(
        !output.status.success() && is_one_line && said.contains(expected),
        "{expected}: {output:?}"
    );
    ip(&["link", "show", "koya-nd4"])?;
    ensure!(runtime.ok(&["list", "--quiet"])?.is_empty());
    Ok(())
}
