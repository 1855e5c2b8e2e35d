//! Device nodes of containers.

use super::*;

/// As in the tests of crun and of youki.
#[test]
fn a_node_of_no_device_is_only_a_node() {
    if !Path::new("/sys/dev/char").is_dir() {
        return;
    }
    let nodes = |namespaces: Value| {
        let (_dir, bundle) = bundle(|spec| {
            spec["root"]["readonly"] = false.into();
            let all = spec["linux"]["namespaces"].as_array_mut().unwrap();
            all.extend(namespaces.as_array().unwrap().clone());
            spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 0, "size": 9}]);
            spec["linux"]["gidMappings"] = spec["linux"]["uidMappings"].clone();
            if namespaces == json!([]) {
                let linux = spec["linux"].as_object_mut().unwrap();
                linux.retain(|name, _| !name.ends_with("Mappings"));
            }
            spec["linux"]["devices"] = json!([
                {"path": "/dev/none", "type": "c", "major": 4095, "minor": 666},
                {"path": "/mnt/", "type": "b", "major": 4095, "minor": 229},
            ]);
        });
        let adapted = adapt_it("c", bundle)?;
        assert!(adapted.disks.is_empty());
        let nodes = adapted.spec.linux().as_ref().unwrap().devices().clone();
        let paths = nodes.unwrap().into_iter().map(|node| node.path().clone());
        Ok::<_, Error>(paths.collect::<Vec<_>>())
    };
    let made = nodes(json!([])).unwrap();
    assert_eq!(made.len(), 2);
    assert_eq!(made[1].as_os_str(), "/dev/../mnt");
    // Nodes are then those of the guest's /dev.
    let refused = nodes(json!([{"type": "user"}])).unwrap_err().to_string();
    assert!(refused.contains("/dev/none"), "{refused}");
}

#[test]
fn who_is_given_all_of_the_hosts_devices_has_all_of_the_guests() {
    let devices = |devices: Value| {
        let (_dir, bundle) = bundle(|spec| {
            spec["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
            spec["linux"]["devices"] = devices;
        });
        let adapted = adapt_it("c", bundle).unwrap();
        (adapted.has_guest_devices, adapted.omits_terminals)
    };
    let node = |path: &str, major: i64, minor: i64| json!({"path": path, "type": "c", "major": major, "minor": minor});
    let fuse = node("/dev/fuse", 10, 229);
    let watchdog = node("/dev/watchdog", 10, 130);
    let (tty, tty1) = (node("/dev/tty", 5, 0), node("/dev/tty1", 4, 1));
    assert!(!devices(json!([fuse])).0);
    // As podman lists them for a container with systemd.
    assert_eq!(devices(json!([fuse, watchdog, tty])), (true, true));
    assert_eq!(devices(json!([fuse, tty1])), (true, false));
}
