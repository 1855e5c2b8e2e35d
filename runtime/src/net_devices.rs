//! Network devices of the host that a configuration gives to a container (`linux.netDevices`). They are moved to the network
//! namespace of its sandbox, whose interfaces the guest takes over.

use crate::Error;
use crate::network::{address_of, in_namespace, index_of, link, other, with_kernel};
use futures::TryStreamExt as _;
use ipnet::IpNet;
use rtnetlink::packet_route::address::{AddressHeaderFlags, AddressScope};
use rtnetlink::packet_route::link::{LinkLayerType, LinkMessage};
use rtnetlink::{Handle, LinkUnspec};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

/// Maximum number in a name made from a template, as in the kernel (`__dev_alloc_name`).
const MAX_NUMBER: u32 = 32_768;

/// A network device of the host that a container gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetDevice {
    /// Its name on the host.
    pub name: String,
    /// Its name in the container. `%d` in it, as in `eth%d`, is the lowest number for which the name is not in use.
    pub new_name: String,
}

/// A device in its new namespace.
struct Moved {
    name: String,
    addresses: Vec<IpNet>,
}

/// Moves devices of the network namespace `host` to that of the calling thread. They keep their MAC address, MTU, and permanent
/// addresses of global scope, and are up then. Nothing is moved if one of them is missing or its new name is in use. Whatever
/// else fails leaves those moved before in the new namespace.
///
/// # Errors
/// The device, and the error from the kernel.
pub fn move_net_devices(host: &File, devices: &[NetDevice]) -> Result<(), Error> {
    let moved = || -> io::Result<()> {
        let here = File::open("/proc/thread-self/ns/net")?;
        let names = final_names(devices, |name| index_of(name).is_ok())?;
        let target = here.as_raw_fd();
        let moved = in_namespace(Some(host), move |handle| {
            Box::pin(leave(handle, names, target))
        })?;
        with_kernel(|handle| Box::pin(arrive(handle, moved)))
    };
    moved().map_err(Error::host("move the devices of linux.netDevices"))
}

/// The names of devices on the host and in their new namespace. Those that are given come before those made from templates.
fn final_names(
    devices: &[NetDevice],
    is_used: impl Fn(&str) -> bool,
) -> io::Result<Vec<(String, String)>> {
    let (templates, plain): (Vec<_>, Vec<_>) = devices
        .iter()
        .partition(|device| device.new_name.contains("%d"));
    let mut names: Vec<(String, String)> = Vec::new();
    for device in plain.into_iter().chain(templates) {
        let is_free = |new: &String| !is_used(new) && names.iter().all(|(_, other)| other != new);
        let new = match device.new_name.split_once("%d") {
            None => Some(device.new_name.clone()).filter(is_free),
            Some((before, after)) => (0..MAX_NUMBER)
                .map(|number| format!("{before}{number}{after}"))
                .find(is_free),
        };
        let Some(new) = new else {
            let NetDevice { name, new_name } = device;
            let text = format!(
                "fail to move network device {name} to network namespace: it has a device {new_name} already"
            );
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        };
        names.push((device.name.clone(), new));
    }
    Ok(names)
}

/// An error with the operation that failed.
fn failed(operation: String) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{operation}: {error}"))
}

/// Moves devices of the network namespace of `handle` to the namespace with this descriptor, under their new names.
async fn leave(
    handle: Handle,
    names: Vec<(String, String)>,
    target: RawFd,
) -> io::Result<Vec<Moved>> {
    let mut found = Vec::new();
    for (old, new) in names {
        let device = link(&handle, &old).await.map_err(failed(format!(
            "link not found for interface {old} on runtime namespace"
        )))?;
        if device.header.link_layer_type != LinkLayerType::Ether {
            let text = format!("{old} is not an Ethernet device: a guest can't have it");
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        let index = device.header.index;
        // Before it is down, and loses those of IPv6.
        let addresses = kept_addresses(&handle, index).await;
        let addresses = addresses.map_err(failed(format!("fail to get ip addresses of {old}")))?;
        let name = new;
        found.push((index, old, Moved { name, addresses }));
    }
    let mut moved = Vec::new();
    for (index, old, device) in found {
        let down = LinkUnspec::new_with_index(index).down().build();
        let set = change(&handle, down).await;
        set.map_err(failed(format!("fail to set link {old} down")))?;
        // In one request: its old name may be in use there.
        let there = LinkUnspec::new_with_index(index)
            .name(device.name.as_str())
            .setns_by_fd(target)
            .build();
        let set = change(&handle, there).await;
        set.map_err(failed(format!(
            "fail to move network device {old} to network namespace"
        )))?;
        moved.push(device);
    }
    Ok(moved)
}

/// The addresses that a device keeps: permanent ones of global scope. Others may mean nothing in another namespace.
async fn kept_addresses(handle: &Handle, index: u32) -> io::Result<Vec<IpNet>> {
    let all = handle
        .address()
        .get()
        .set_link_index_filter(index)
        .execute();
    let all: Vec<_> = all.try_collect().await.map_err(other)?;
    let kept = all.iter().filter(|message| {
        let header = &message.header;
        header.scope == AddressScope::Universe
            && header.flags.contains(AddressHeaderFlags::Permanent)
    });
    Ok(kept.filter_map(address_of).collect())
}

/// Sets up devices that have just been moved to the network namespace of `handle`.
async fn arrive(handle: Handle, devices: Vec<Moved>) -> io::Result<()> {
    for Moved { name, addresses } in devices {
        let device = link(&handle, &name).await.map_err(failed(format!(
            "link not found for interface {name} on the container's namespace"
        )))?;
        let index = device.header.index;
        for net in addresses {
            let add = handle.address().add(index, net.addr(), net.prefix_len());
            let added = add.replace().execute().await.map_err(other);
            added.map_err(failed(format!("fail to set up address {net} of {name}")))?;
        }
        let up = LinkUnspec::new_with_index(index).up().build();
        let set = change(&handle, up).await;
        set.map_err(failed(format!("fail to set up interface {name}")))?;
    }
    Ok(())
}

async fn change(handle: &Handle, wanted: LinkMessage) -> io::Result<()> {
    handle.link().set(wanted).execute().await.map_err(other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::{HostEnd, NetworkConfig, test_namespace};
    use nix::sched::{CloneFlags, unshare};
    use std::error::Error as _;
    use std::net::Ipv4Addr;

    fn device(name: &str, new_name: &str) -> NetDevice {
        NetDevice {
            name: name.into(),
            new_name: new_name.into(),
        }
    }

    #[test]
    fn a_template_is_filled_in_with_the_lowest_free_number() {
        let names = |devices: &[NetDevice]| {
            let used = |name: &str| ["lo", "eth0", "eth2"].contains(&name);
            final_names(devices, used)
        };
        let all = [
            device("a", "eth%d"),
            device("b", "eth%d"),
            device("c", "eth1"),
        ];
        let found = names(&all).unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|(old, new)| [old.as_str(), new.as_str()])
            .collect();
        assert_eq!(found, [["c", "eth1"], ["a", "eth3"], ["b", "eth4"]]);
        // Names of the host are not in use there.
        assert!(names(&[device("a", "b"), device("b", "a")]).is_ok());
        let refused = names(&[device("a", "b"), device("c", "eth2")]).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        let text = refused.to_string();
        assert!(
            text.contains("device c ") && text.contains("eth2 already"),
            "{text}"
        );
    }

    /// The properties of an interface of the calling thread's network namespace.
    fn properties(interface: &str) -> (Option<String>, Vec<String>) {
        let interface = interface.to_owned();
        let network = NetworkConfig::new(HostEnd::Join { interface });
        let network = network.resolve().unwrap();
        let addresses = network.addresses.iter().map(IpNet::to_string).collect();
        (network.device.mac.map(|mac| mac.to_string()), addresses)
    }

    /// Adds an address of this scope to an interface of the calling thread's network namespace.
    fn add_address(interface: &str, address: Ipv4Addr, scope: AddressScope) {
        let index = index_of(interface).unwrap();
        let added = with_kernel(move |handle| {
            Box::pin(async move {
                let mut add = handle.address().add(index, address.into(), 8);
                add.message_mut().header.scope = scope;
                add.execute().await.map_err(other)
            })
        });
        added.unwrap();
    }

    #[test]
    fn a_device_keeps_its_properties_in_another_namespace() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        // A thread, for network namespaces that end with it.
        let work = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            test_namespace::set_up(Ipv4Addr::new(192, 0, 2, 3), 24).unwrap();
            add_address("eth0", Ipv4Addr::new(127, 0, 0, 33), AddressScope::Host);
            let (mac, before) = properties("eth0");
            assert_eq!(before.len(), 2, "{before:?}");
            let host = File::open("/proc/thread-self/ns/net").unwrap();
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            // Nothing is moved if one of them is missing, or can't be a guest's.
            for (missing, said) in [
                ("none", "link not found for interface none"),
                ("lo", "lo is not an Ethernet device"),
            ] {
                let devices = [device("eth0", "eth0"), device(missing, "net1")];
                let error = move_net_devices(&host, &devices).unwrap_err();
                let text = error.source().unwrap().to_string();
                assert!(text.contains(said), "{text}");
                assert!(index_of("eth0").is_err());
            }
            move_net_devices(&host, &[device("eth0", "net%d")]).unwrap();
            assert_eq!(properties("net0"), (mac, vec!["192.0.2.3/24".to_owned()]));
            // Its name is in use now; that of another one is free.
            let again = move_net_devices(&host, &[device("peer", "net0")]).unwrap_err();
            let text = again.source().unwrap().to_string();
            assert!(text.contains("it has a device net0 already"), "{text}");
            move_net_devices(&host, &[device("peer", "eth0")]).unwrap();
            assert!(index_of("eth0").is_ok());
        };
        std::thread::spawn(work).join().unwrap();
    }
}
