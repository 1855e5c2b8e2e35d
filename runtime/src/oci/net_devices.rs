//! Network devices of the host that a container gets (`linux.netDevices`). The guest has those of the sandbox's network
//! namespace: whoever makes that moves them there.

use super::namespaces;
use crate::Error;
use crate::net_devices::NetDevice;
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use std::collections::BTreeMap;

const FIELD: &str = "linux.netDevices";

/// Maximum length of an interface's name, which ends with a null byte in the kernel (`IFNAMSIZ`).
const MAX_NAME: usize = 15;

/// The network devices of the host that a configuration gives to its container, by their names. The wordings of errors are
/// those of runc, where it has any.
///
/// # Errors
/// If a name is invalid or given twice, or if the container has the network of the host.
pub fn net_devices_of(spec: &Spec) -> Result<Vec<NetDevice>, Error> {
    let linux = spec.linux().as_ref();
    let devices = linux.and_then(|linux| linux.net_devices().as_ref());
    // The order of a map is not fixed.
    let devices: BTreeMap<_, _> = devices.into_iter().flatten().collect();
    let has_network = namespaces::all(spec).any(|n| n.typ() == LinuxNamespaceType::Network);
    if !devices.is_empty() && !has_network {
        let reason = "unable to move network devices without a NET namespace";
        return Err(Error::invalid(FIELD, reason));
    }
    let mut all: Vec<NetDevice> = Vec::new();
    for (name, device) in devices {
        let renamed = device.name().as_ref().filter(|new| !new.is_empty());
        let new_name = renamed.unwrap_or(name);
        // Templates are filled in on the container's side only.
        let plain = new_name.replacen("%d", "", 1);
        if let Some(wrong) = [
            (name, is_valid(name) && !name.contains('%')),
            (new_name, is_valid(new_name) && !plain.contains('%')),
        ]
        .into_iter()
        .find_map(|(name, is_valid)| (!is_valid).then_some(name))
        {
            let reason = format!("invalid network device name {wrong:?}");
            return Err(Error::invalid(FIELD, reason));
        }
        let is_same = |other: &&NetDevice| other.new_name == *new_name && plain == *new_name;
        if let Some(other) = all.iter().find(is_same) {
            let reason = format!(
                "the network devices {} and {name} have the same name in the container: {new_name}",
                other.name
            );
            return Err(Error::invalid(FIELD, reason));
        }
        all.push(NetDevice {
            name: name.clone(),
            new_name: new_name.clone(),
        });
    }
    Ok(all)
}

/// The kernel's rule (`dev_valid_name`), without names that no terminal shows.
fn is_valid(name: &str) -> bool {
    let is_wrong = |c: char| ['/', ':'].contains(&c) || c.is_whitespace() || c.is_control();
    (1..=MAX_NAME).contains(&name.len()) && ![".", ".."].contains(&name) && !name.contains(is_wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// The names of the devices, or the error.
    fn devices(namespace: &str, devices: Value) -> Result<Vec<[String; 2]>, String> {
        let spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.3.0",
            "linux": {"namespaces": [{"type": namespace}], "netDevices": devices},
        }))
        .unwrap();
        match net_devices_of(&spec) {
            Ok(found) => Ok(found
                .into_iter()
                .map(|device| [device.name, device.new_name])
                .collect()),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn devices_keep_their_names_or_get_new_ones() {
        let all = json!({"eth1": {"name": ""}, "eth0": {}, "net0": {"name": "eth%d"}, "net1": {"name": "eth%d"}});
        let found = devices("network", all).unwrap();
        let expected = [
            ["eth0", "eth0"],
            ["eth1", "eth1"],
            ["net0", "eth%d"],
            ["net1", "eth%d"],
        ];
        assert_eq!(found, expected);
        let swapped = json!({"a": {"name": "b"}, "b": {"name": "a"}});
        assert_eq!(devices("network", swapped).unwrap().len(), 2);
        assert!(devices("network", json!({"fifteen-letters": {}})).is_ok());
        assert_eq!(devices("ipc", json!({})), Ok(Vec::new()));
    }

    #[test]
    fn names_that_no_device_can_have_are_refused() {
        for wrong in [
            "",
            "..",
            "a/b",
            "a:b",
            "a b",
            "a\tb",
            "sixteen--letters",
            "a%",
            "a%d%d",
            "a\0",
        ] {
            if !wrong.is_empty() {
                let refused = devices("network", json!({"eth0": {"name": wrong}})).unwrap_err();
                assert!(refused.contains(&format!("{wrong:?}")), "{refused}");
            }
            let refused = devices("network", json!({wrong: {}})).unwrap_err();
            assert!(
                refused.starts_with("linux.netDevices: invalid network device name"),
                "{refused}"
            );
        }
        let template = devices("network", json!({"eth%d": {}})).unwrap_err();
        assert!(template.contains("eth%d"), "{template}");
        let same = devices("network", json!({"a": {"name": "c"}, "b": {"name": "c"}}));
        let same = same.unwrap_err();
        assert!(
            same.contains("devices a and b have the same name"),
            "{same}"
        );
        let hosts = devices("ipc", json!({"eth0": {}})).unwrap_err();
        assert!(hosts.contains("without a NET namespace"), "{hosts}");
    }
}
