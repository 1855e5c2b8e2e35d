//! What an OCI configuration becomes in the guest.

use super::*;
use serde_json::{Value, json};

fn bundle(change: impl FnOnce(&mut Value)) -> (tempfile::TempDir, Bundle) {
    let dir = tempfile::tempdir().unwrap();
    let rootfs = dir.path().join("rootfs");
    std::fs::create_dir(&rootfs).unwrap();
    let mut spec = json!({
        "ociVersion": "1.0.2-dev",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/",
            "apparmorProfile": "cri-containerd.apparmor.d"},
        "root": {"path": "rootfs", "readonly": true},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {
            "cgroupsPath": "/default/x",
            "resources": {"cpu": {"shares": 2, "cpus": "0-3"}, "hugepageLimits": []},
            "namespaces": [{"type": "pid"}, {"type": "network", "path": "/proc/1/ns/net"},
                {"type": "ipc", "path": "/proc/1/ns/ipc"}, {"type": "mount"}],
        },
    });
    change(&mut spec);
    let spec = serde_json::from_value(spec).unwrap();
    let folder = dir.path().into();
    let bundle = Bundle {
        spec,
        folder,
        rootfs,
        pids: SharedPids::Unknown,
    };
    (dir, bundle)
}

fn error(change: impl FnOnce(&mut Value)) -> String {
    let (_dir, bundle) = bundle(change);
    let adapted = adapt("c", &bundle, &Accounts::default());
    adapted.err().expect("a refusal").to_string()
}

#[test]
fn what_is_the_hosts_becomes_the_guests() {
    let (dir, bundle) = bundle(|spec| {
        spec["mounts"].as_array_mut().unwrap().extend([
            json!({"destination": "/etc/hosts", "type": "bind", "source": "hosts",
                "options": ["rbind", "ro"]}),
            json!({"destination": "/dev/shm", "type": "bind", "source": "/dev/shm",
                "options": ["rbind"]}),
        ]);
    });
    std::fs::write(dir.path().join("hosts"), "").unwrap();
    let adapted = adapt("c", &bundle, &Accounts::default()).unwrap();
    let text = serde_json::to_string(&adapted.spec).unwrap();
    assert!(!text.contains(dir.path().to_str().unwrap()), "{text}");
    assert!(
        text.contains("/proc/1/ns/ipc") && !text.contains("\"network\""),
        "{text}"
    );
    assert!(!text.contains("apparmor"), "{text}");
    assert!(
        !text.contains("0-3") && text.contains("\"shares\":2"),
        "{text}"
    );
    assert!(
        text.contains("HOME=/root") && text.contains(r#""source":"/dev/shm""#),
        "{text}"
    );
    let names: Vec<_> = adapted
        .shares
        .iter()
        .map(|s| (s.name.as_str(), s.options.read_only))
        .collect();
    assert_eq!(names, [("c.root", true), ("c.mount1", true)]);
    assert!(adapted.mount_points.contains(&("/etc/hosts".into(), true)));
}

/// The kubelet says so of a pod with a volume that follows the host's mounts.
#[test]
fn mounts_of_the_root_propagate_as_runc_names_it() {
    let with = |wanted: &str| {
        let (_dir, bundle) = bundle(|spec| {
            spec["linux"]["rootfsPropagation"] = wanted.into();
        });
        let adapted = adapt("c", &bundle, &Accounts::default());
        let spec = adapted.map(|adapted| serde_json::to_value(&adapted.spec).unwrap());
        spec.map(|spec| spec["linux"]["rootfsPropagation"].clone())
    };
    for (wanted, given) in [
        ("rslave", "slave"),
        ("rprivate", "private"),
        ("shared", "shared"),
    ] {
        assert_eq!(with(wanted).unwrap(), given);
    }
    assert!(
        with("sideways")
            .unwrap_err()
            .to_string()
            .contains("sideways")
    );
}

/// What a privileged container gets of a list of devices: disks by their paths, and nodes of the guest's.
fn privileged(devices: Value) -> (Vec<PathBuf>, usize) {
    let (_dir, bundle) = bundle(|spec| {
        spec["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
        spec["linux"]["devices"] = devices;
    });
    let adapted = adapt("c", &bundle, &Accounts::default()).unwrap();
    let nodes = adapted.spec.linux().as_ref().unwrap().devices().clone();
    let disks = adapted.disks.into_iter().map(|disk| disk.path);
    (disks.collect(), nodes.map_or(0, |nodes| nodes.len()))
}

#[test]
fn a_privileged_container_has_the_disks_that_are_named_and_not_the_hosts_list() {
    let block = |path: &Path, (major, minor): (i64, i64)| json!({"path": path, "type": "b", "major": major, "minor": minor});
    // A disk that the host does not have is a volume, whatever its path is.
    let volume = block(Path::new("/dev/xvdz"), (4095, 7));
    assert_eq!(privileged(json!([volume])), (vec!["/dev/xvdz".into()], 0));
    // Second nodes of the same disk, wherever this is allowed.
    let dir = tempfile::tempdir().unwrap();
    let node = dir.path().join("second");
    let made = rustix::fs::mknodat(
        rustix::fs::CWD,
        &node,
        FileType::BlockDevice,
        rustix::fs::Mode::from_raw_mode(0o600),
        rustix::fs::makedev(4095, 7),
    );
    match made {
        Ok(()) => {
            assert_eq!(block_number(&node), Some((4095, 7)));
            let listed = block(&node, (4095, 7));
            assert_eq!(privileged(json!([listed])), (vec![], 0));
            let other = block(&node, (4095, 8));
            assert_eq!(privileged(json!([other])).0, [node]);
        }
        Err(error) => eprintln!("no device can be made: {error}"),
    }
    assert_eq!(block_number(dir.path()), None);
}

#[test]
fn a_block_device_with_the_number_of_a_guests_character_device_is_none_of_the_guests() {
    let character = json!({"path": "/dev/null", "type": "c", "major": 1, "minor": 3});
    let ram = json!({"path": "/dev/xvdr", "type": "b", "major": 1, "minor": 3});
    assert_eq!(
        privileged(json!([character, ram])),
        (vec!["/dev/xvdr".into()], 1)
    );
}

#[test]
fn users_of_their_own_get_the_guests_sysfs() {
    let with = |namespaces: Value| {
        let (_dir, bundle) = bundle(|spec| {
            let sysfs = json!({"destination": "/sys", "type": "sysfs", "source": "sysfs",
                "options": ["ro", "nosuid"]});
            spec["mounts"] = json!([sysfs]);
            spec["linux"]["namespaces"] = namespaces;
        });
        let adapted = adapt("c", &bundle, &Accounts::default()).unwrap();
        serde_json::to_value(&adapted.spec.mounts().as_ref().unwrap()[0]).unwrap()
    };
    let own = with(json!([{"type": "network"}, {"type": "mount"}, {"type": "user"}]));
    assert_eq!(own["type"], "bind");
    assert_eq!(own["options"], json!(["rbind", "ro", "nosuid"]));
    let guests = with(json!([{"type": "network"}, {"type": "mount"}]));
    assert_eq!(guests["type"], "sysfs");
}

#[test]
fn what_cannot_be_had_is_refused_by_name() {
    let network = |spec: &mut Value| spec["linux"]["namespaces"] = json!([{"type": "pid"}]);
    assert!(error(network).contains("network namespace"));
    let mounts = |spec: &mut Value| spec["linux"]["namespaces"] = json!([{"type": "network"}]);
    assert!(error(mounts).contains("mount namespace"));
    let hook = |spec: &mut Value| spec["hooks"] = json!({"prestart": [{"path": "/bin/x"}]});
    assert!(error(hook).contains("prestart"));
    let device = |spec: &mut Value| {
        spec["linux"]["devices"] =
            json!([{"path": "/dev/nvidia0", "type": "c", "major": 195, "minor": 0}]);
    };
    assert!(error(device).contains("/dev/nvidia0"));
    let overlay = |spec: &mut Value| {
        spec["mounts"] = json!([{"destination": "/x", "type": "overlay", "source": "overlay"}]);
    };
    assert!(error(overlay).contains("overlay"));
    let pid = |spec: &mut Value| {
        spec["linux"]["namespaces"] = json!([{"type": "network"}, {"type": "mount"}, {"type": "pid", "path": "/proc/9/ns/pid"}]);
    };
    assert!(error(pid).contains("pid namespace"));
    let missing = |spec: &mut Value| {
        spec["mounts"] = json!([{"destination": "/x", "type": "bind", "source": "/nonexistent/y"}]);
    };
    assert!(error(missing).contains("/nonexistent/y"));
}
