//! Conversion of OCI configurations for the guest.

use super::devices::{block_number, guest_node};
use super::*;
use crate::account::tests::rootfs;
use crate::{ContainerConfig, ProcessConfig, User, Volume};
use rustix::fs::FileType;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

mod devices;
mod places;

fn adapt_it(id: &str, bundle: Bundle) -> Result<Adapted, Error> {
    adapt(id, bundle, Root::Directory, &Accounts::default())
}

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
    let directory = dir.path().into();
    let bundle = Bundle {
        spec,
        directory,
        rootfs,
        shared: SharedNamespaces::default(),
    };
    (dir, bundle)
}

fn error(change: impl FnOnce(&mut Value)) -> String {
    let (_dir, bundle) = bundle(change);
    let adapted = adapt_it("c", bundle);
    adapted.err().expect("a refusal").to_string()
}

#[test]
fn what_is_the_hosts_becomes_the_guests() {
    let (dir, bundle) = bundle(|spec| {
        spec["linux"]["resources"]["unified"] =
            json!({"memory.high": "1", "cpuset.cpus.partition": "root", "io.max": "8:0 riops=5"});
        spec["mounts"].as_array_mut().unwrap().extend([
            json!({"destination": "/etc/hosts", "type": "bind", "source": "hosts",
                "options": ["rbind", "ro"]}),
            json!({"destination": "/dev/shm", "type": "bind", "source": "/dev/shm",
                "options": ["rbind"]}),
        ]);
    });
    std::fs::write(dir.path().join("hosts"), "").unwrap();
    let adapted = adapt_it("c", bundle).unwrap();
    let text = serde_json::to_string(&adapted.spec).unwrap();
    assert!(!text.contains(dir.path().to_str().unwrap()), "{text}");
    assert!(
        text.contains("/proc/1/ns/ipc") && !text.contains("\"network\""),
        "{text}"
    );
    assert!(!text.contains("apparmor"), "{text}");
    assert!(
        text.contains("\"cpus\":\"0-3\"") && text.contains("\"shares\":2"),
        "{text}"
    );
    let unified = r#""unified":{"memory.high":"1"}"#;
    assert!(text.contains(unified), "{text}");
    assert!(
        text.contains("HOME=/") && text.contains(r#""source":"/dev/shm""#),
        "{text}"
    );
    let names: Vec<_> = adapted
        .shares
        .iter()
        .map(|s| (s.name.as_str(), s.options.read_only))
        .collect();
    assert_eq!(names, [("c.root", true), ("c.mount1", true)]);
    assert!(
        adapted
            .mount_points
            .contains(&("/etc/hosts".into(), Some(true)))
    );
}

/// The kubelet requests this for a pod with a volume that follows the host's mounts.
#[test]
fn mounts_of_the_root_propagate_as_runc_names_it() {
    let with = |wanted: &str| {
        let (_dir, bundle) = bundle(|spec| {
            spec["linux"]["rootfsPropagation"] = wanted.into();
        });
        let adapted = adapt_it("c", bundle);
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

/// Devices of a privileged container with this list of devices: paths of its disks, and number of guest nodes.
fn privileged(devices: Value) -> (Vec<PathBuf>, usize) {
    let (_dir, bundle) = bundle(|spec| {
        spec["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
        spec["linux"]["devices"] = devices;
    });
    let adapted = adapt_it("c", bundle).unwrap();
    let nodes = adapted.spec.linux().as_ref().unwrap().devices().clone();
    let disks = adapted.disks.into_iter().map(|disk| disk.path);
    (disks.collect(), nodes.map_or(0, |nodes| nodes.len()))
}

#[test]
fn a_privileged_container_has_the_disks_that_are_named_and_not_the_hosts_list() {
    let block = |path: &Path, (major, minor): (i64, i64)| json!({"path": path, "type": "b", "major": major, "minor": minor});
    // A disk that the host does not have is a volume, whatever its path.
    let volume = block(Path::new("/dev/xvdz"), (4095, 7));
    assert_eq!(privileged(json!([volume])), (vec!["/dev/xvdz".into()], 0));
    // Second nodes of the same disk, where mknod is allowed.
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
fn a_device_at_a_relative_path_is_in_the_root() {
    let (_dir, bundle) = bundle(|spec| {
        let node = |path: &str| json!({"path": path, "type": "c", "major": 1, "minor": 3});
        spec["root"]["readonly"] = false.into();
        spec["linux"]["devices"] = json!([node("x"), node("/dev/y")]);
    });
    let adapted = adapt_it("c", bundle).unwrap();
    let nodes = adapted.spec.linux().as_ref().unwrap().devices().clone();
    let paths = nodes.unwrap().into_iter().map(|node| node.path().clone());
    assert_eq!(
        paths.collect::<Vec<_>>(),
        [Path::new("/dev/../x"), Path::new("/dev/y")]
    );
    let (_dir, read_only) = self::bundle(|spec| {
        spec["root"]["readonly"] = true.into();
        spec["linux"]["devices"] = json!([{"path": "x", "type": "c", "major": 1, "minor": 3}]);
    });
    let refused = adapt_it("c", read_only).err().unwrap().to_string();
    assert!(
        refused.contains("/x") && refused.contains("read-only"),
        "{refused}"
    );
}

/// The number of a character device that the host has, and the guest does not. Without sysfs any number is one.
fn device_of_the_host() -> (i64, i64) {
    let entries = std::fs::read_dir("/sys/dev/char").into_iter().flatten();
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut numbers = names.filter_map(|name| {
        let (major, minor) = name.split_once(':')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    });
    let found = numbers.find(|number| guest_node(*number).is_none());
    found.unwrap_or((195, 0))
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
            if namespaces.to_string().contains("user") {
                let all = json!([{"containerID": 0, "hostID": 1000, "size": 9}]);
                spec["linux"]["uidMappings"] = all.clone();
                spec["linux"]["gidMappings"] = all;
            }
            spec["linux"]["namespaces"] = namespaces;
        });
        let adapted = adapt_it("c", bundle).unwrap();
        serde_json::to_value(&adapted.spec.mounts().as_ref().unwrap()[0]).unwrap()
    };
    let own = with(json!([{"type": "network"}, {"type": "mount"}, {"type": "user"}]));
    assert_eq!(own["type"], "bind");
    assert_eq!(own["options"], json!(["rbind", "ro", "nosuid"]));
    let guests = with(json!([{"type": "network"}, {"type": "mount"}]));
    assert_eq!(guests["type"], "sysfs");
}

/// Options of the last of these mounts, which are not `/dev`, with a root file system prepared by `make`.
fn last_options(mounts: Value, make: impl FnOnce(&Path)) -> Vec<String> {
    let (dir, bundle) = bundle(|spec| spec["mounts"] = mounts);
    make(&dir.path().join("rootfs"));
    let adapted = adapt_it("c", bundle).unwrap();
    let mounts = adapted.spec.mounts().clone().unwrap();
    let mut own = mounts
        .iter()
        .filter(|m| m.destination() != Path::new("/dev"));
    let last = own.next_back().unwrap();
    last.options().clone().unwrap_or_default()
}

fn make_with_mode(directory: &Path, mode: u32) {
    std::fs::create_dir_all(directory).unwrap();
    std::fs::set_permissions(directory, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// podman uses it for `--tmpfs`.
#[test]
fn a_tmpfs_begins_with_a_copy_where_there_is_something() {
    let with = |kind: &str, make: &dyn Fn(&Path)| {
        let options = json!(["rw", "mode=755", "tmpcopyup"]);
        let mounts =
            json!([{"destination": "/run/x", "type": kind, "source": kind, "options": options}]);
        let left = last_options(mounts, make);
        left.iter().any(|option| option == "tmpcopyup")
    };
    assert!(!with("tmpfs", &|_| ()));
    assert!(!with("tmpfs", &|root| make_with_mode(
        &root.join("run/x"),
        0o755
    )));
    assert!(with("tmpfs", &|root| make_with_mode(
        &root.join("run/x/y"),
        0o755
    )));
    // A symbolic link is resolved within the root.
    let link = |root: &Path| std::os::unix::fs::symlink("/etc", root.join("run")).unwrap();
    assert!(!with("tmpfs", &link));
}

/// opencontainers/runc 4971.
#[test]
fn a_tmpfs_has_the_mode_of_what_it_covers() {
    let tmpfs = |at: &str, options: Value| json!({"destination": at, "type": "tmpfs", "source": "tmpfs", "options": options});
    let make = |root: &Path| make_with_mode(&root.join("x"), 0o1710);
    let of = |options: Value| last_options(json!([tmpfs("/x", options)]), make);
    assert_eq!(of(json!(["ro"])), ["ro", "mode=1710"]);
    assert_eq!(of(json!(["size=1k,mode=700"])), ["size=1k,mode=700"]);
    let elsewhere = last_options(json!([tmpfs("/y", json!([]))]), make);
    // Otherwise it would get the mode of the mount point, which is created for it.
    assert_eq!(elsewhere, ["mode=1777"]);
    // A path within an earlier mount does not count as covered.
    let within = json!([tmpfs("/", json!([])), tmpfs("/x", json!([]))]);
    assert_eq!(last_options(within, make), ["mode=1777"]);
    let bind = json!({"destination": "/b", "source": "rootfs", "options": ["bind"]});
    let bound = last_options(json!([bind, tmpfs("/b/x", json!([]))]), make);
    assert_eq!(bound, ["mode=1710"]);
}

#[test]
fn what_an_earlier_mount_put_into_the_root_is_the_guests() {
    let sources = |mounts: &dyn Fn(&str) -> Value| {
        let (_dir, mut bundle) = bundle(|_| ());
        let root = bundle.rootfs.to_str().unwrap().to_owned();
        std::fs::create_dir_all(bundle.rootfs.join("mnt/x")).unwrap();
        let mounts = serde_json::from_value(mounts(&root)).unwrap();
        bundle.spec.set_mounts(Some(mounts));
        let adapted = adapt_it("c", bundle).map_err(|error| error.to_string())?;
        let mounts = adapted.spec.mounts().iter().flatten();
        Ok::<_, String>(
            mounts
                .map(|mount| {
                    let source = mount.source().as_ref().unwrap();
                    let at = mount.destination();
                    format!("{} at {}", source.display(), at.display())
                })
                .collect::<Vec<_>>(),
        )
    };
    let tmpfs = json!({"destination": "/mnt", "type": "tmpfs", "source": "tmpfs"});
    let of_root = |root: &str, source: &str, options: Value| json!({"source": format!("{root}{source}"), "destination": format!("{root}/final"), "options": options});
    let guests = |root: &str| json!([tmpfs, of_root(root, "/mnt/x", json!(["bind", "ro"]))]);
    let own = "/run/koya/own-root/mnt/x at /final";
    assert_eq!(sources(&guests).unwrap()[1], own);
    let around = |root: &str| json!([tmpfs, of_root(root, "", json!(["rbind"]))]);
    assert_eq!(
        sources(&around).unwrap()[1],
        "/run/koya/own-root/ at /final"
    );
    // A path that no mount covers exists on the host.
    let hosts = |root: &str| json!([of_root(root, "/mnt/x", json!(["bind"])), tmpfs]);
    assert_eq!(
        sources(&hosts).unwrap()[0],
        "/run/koya/shared/c.mount0 at /final"
    );
    let odd = |root: &str| json!([tmpfs, of_root(root, "/mnt/x", json!(["bind", "noexec"]))]);
    assert!(sources(&odd).unwrap_err().contains("noexec"));
    let covered = |root: &str| json!([tmpfs, of_root(root, "/mnt/x", json!(["bind"])), tmpfs]);
    assert!(
        sources(&covered)
            .unwrap_err()
            .contains("a later mount over it (/mnt)")
    );
}

/// opencontainers/runc 3805: a directory that is mounted with `noexec` on the host is so in the guest.
#[test]
fn a_bind_mount_has_the_flags_of_its_sources_mount() {
    let source = tempfile::tempdir_in("/dev/shm").unwrap();
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let line = mounts.lines().find(|line| line.contains(" /dev/shm "));
    let flags = line.unwrap().split(' ').nth(3).unwrap();
    let flags: Vec<_> = flags.split(',').collect();
    let options = |said: &[&str]| {
        let mount = json!({"destination": "/data", "type": "bind", "source": source.path(), "options": said});
        last_options(json!([mount]), |_| ())
    };
    let kept = options(&["rbind", "rprivate"]);
    for flag in ["nosuid", "nodev", "noexec"] {
        let is_kept = kept.iter().any(|option| option == flag);
        assert_eq!(is_kept, flags.contains(&flag), "{kept:?} of {flags:?}");
    }
    assert_eq!(options(&["rbind", "rw"]), ["rbind", "rw"]);
    assert_eq!(options(&["bind", "nosymfollow"]), ["bind", "rnosymfollow"]);
}

#[test]
fn a_clock_of_its_own_is_made_where_it_is_to_show_another_time() {
    let has_clock = |offsets: Value| {
        let (_dir, bundle) = bundle(|spec| {
            spec["linux"]["namespaces"] =
                json!([{"type": "network"}, {"type": "mount"}, {"type": "time"}]);
            spec["linux"]["timeOffsets"] = offsets;
        });
        let adapted = adapt_it("c", bundle).unwrap();
        let linux = serde_json::to_value(adapted.spec.linux()).unwrap();
        let namespaces = linux["namespaces"].as_array().unwrap().clone();
        namespaces.contains(&json!({"type": "time"}))
    };
    assert!(has_clock(json!({"boottime": {"secs": 7}})));
    assert!(!has_clock(json!({})));
    assert!(!has_clock(Value::Null));
}

#[test]
fn hooks_of_the_containers_own_files_are_the_guests() {
    let hooks = json!({"startContainer": [{"path": "/bin/x", "args": ["x", "y"], "timeout": 3}]});
    let (_dir, bundle) = bundle(|spec| spec["hooks"] = hooks.clone());
    let adapted = adapt_it("c", bundle).unwrap();
    assert_eq!(serde_json::to_value(adapted.spec.hooks()).unwrap(), hooks);
}

#[test]
fn what_cannot_be_had_is_refused_by_name() {
    let network = |spec: &mut Value| spec["linux"]["namespaces"] = json!([{"type": "pid"}]);
    assert!(error(network).contains("network namespace"));
    let mounts = |spec: &mut Value| spec["linux"]["namespaces"] = json!([{"type": "network"}]);
    assert!(error(mounts).contains("mount namespace"));
    let hook = |spec: &mut Value| spec["hooks"] = json!({"prestart": [{"path": "/bin/x"}]});
    assert!(error(hook).contains("prestart"));
    let hook = |spec: &mut Value| spec["hooks"] = json!({"createContainer": [{"path": "/bin/x"}]});
    assert!(error(hook).contains("createContainer hooks are not supported"));
    let device = |spec: &mut Value| {
        let (major, minor) = device_of_the_host();
        spec["linux"]["devices"] =
            json!([{"path": "/dev/hosts", "type": "c", "major": major, "minor": minor}]);
    };
    assert!(error(device).contains("/dev/hosts"));
    let policy = |spec: &mut Value| {
        spec["linux"]["memoryPolicy"] = json!({"mode": "MPOL_BIND", "nodes": "0"});
    };
    assert!(error(policy).contains("linux.memoryPolicy"));
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

/// The options of the mount at this place, after its type and source.
pub(super) fn mount(spec: &Value, destination: &str) -> Vec<String> {
    let mounts = spec["mounts"].as_array().unwrap();
    let found = mounts.iter().find(|m| m["destination"] == destination);
    let found = found.unwrap_or_else(|| panic!("no mount at {destination}"));
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let own = [text(&found["type"]), text(&found["source"])];
    let options = found["options"].as_array().unwrap().iter().map(text);
    own.into_iter().chain(options).collect()
}

#[test]
fn the_guests_configuration_names_guest_paths_only() {
    let dir = rootfs();
    let mut config = ContainerConfig::new(dir.path(), ["true"]);
    config.volumes.push(Volume::new(dir.path(), "/data"));
    let bundle = from_config::bundle("c1", &config, &Accounts::default()).unwrap();
    let mut adapted = adapt_it("c1", bundle).unwrap();
    let text = serde_json::to_string(&adapted.spec).unwrap();
    assert!(!text.contains(dir.path().to_str().unwrap()), "{text}");
    // The host's own mount of the second share is read-only.
    let place = |(number, share): (usize, &Share)| {
        let path = format!("/place/{number}").into();
        (
            share.name.clone(),
            SharedPlace {
                path,
                read_only: number == 1,
            },
        )
    };
    let places: HashMap<_, _> = adapted.shares.iter().enumerate().map(place).collect();
    place_shares(&mut adapted.spec, &places);
    let spec = serde_json::to_value(&adapted.spec).unwrap();
    assert_eq!(spec["root"]["path"], "/place/0");
    assert_eq!(
        mount(&spec, "/data"),
        ["bind", "/place/1", "rbind", "rprivate", "ro"]
    );
    // A missing volume is an error before any request to the guest.
    config.volumes.push(Volume::new("/nonexistent", "/x"));
    let bundle = from_config::bundle("c1", &config, &Accounts::default()).unwrap();
    let missing = adapt_it("c1", bundle).err().unwrap().to_string();
    assert!(missing.contains("/nonexistent"), "{missing}");
}

#[test]
fn a_root_that_is_an_image_is_the_guests_to_mount() {
    let image = tempfile::NamedTempFile::new().unwrap();
    assert_eq!(Root::of(image.path()).unwrap(), Root::Image);
    let config = ContainerConfig::new(image.path(), ["true"]);
    let bundle = from_config::bundle("c1", &config, &Accounts::default()).unwrap();
    let adapted = adapt("c1", bundle, Root::Image, &Accounts::default()).unwrap();
    let root = adapted.spec.root().as_ref().unwrap().path().clone();
    assert_eq!(root, Path::new(&koya_protocol::image_root("c1")));
    assert!(adapted.shares.is_empty());
}

#[test]
fn a_bundle_keeps_what_it_says() {
    let (_dir, bundle) = bundle(|spec| {
        spec["hostname"] = "said".into();
        let namespaces = spec["linux"]["namespaces"].as_array_mut();
        namespaces.unwrap().push(json!({"type": "uts"}));
        spec["process"] = json!({"terminal": true, "user": {"uid": 5, "gid": 6, "additionalGids": [7], "umask": 63},
            "args": ["a", "b"], "cwd": "/w", "env": ["PATH=/p", "HOME=/h", "X=y"],
            "capabilities": {"bounding": ["CAP_KILL"], "ambient": ["CAP_KILL"]},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 9, "soft": 8}], "noNewPrivileges": true, "oomScoreAdj": 100});
        spec["mounts"][0]["options"] = json!(["nosuid", "hidepid=2"]);
        let dev = json!({"destination": "/dev", "type": "tmpfs", "source": "dev", "options": ["mode=755"]});
        spec["mounts"].as_array_mut().unwrap().push(dev);
        spec["linux"]["maskedPaths"] = json!(["/proc/x"]);
        spec["linux"]["sysctl"] = json!({"kernel.msgmax": "1"});
        spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]});
        spec["linux"]["resources"]["pids"] = json!({"limit": 17});
    });
    let said = serde_json::to_value(&bundle.spec).unwrap();
    let kept = serde_json::to_value(&adapt_it("c", bundle).unwrap().spec).unwrap();
    for path in [
        "/hostname",
        "/mounts",
        "/linux/maskedPaths",
        "/linux/sysctl",
        "/linux/seccomp",
        "/linux/resources/pids",
    ] {
        assert_eq!(kept.pointer(path), said.pointer(path), "{path}");
    }
    let mut process = said["process"].clone();
    assert_eq!(process["args"], json!(["a", "b"]));
    assert!(
        process
            .as_object_mut()
            .unwrap()
            .remove("apparmorProfile")
            .is_none()
    );
    assert_eq!(kept["process"], process);
}

#[test]
fn an_added_process_may_what_the_first_one_may() {
    let dir = rootfs();
    let accounts = Accounts::read(dir.path());
    let (_dir, bundle) = bundle(|spec| {
        spec["process"]["capabilities"] =
            json!({"bounding": ["CAP_KILL", "CAP_CHOWN"], "effective": []});
        spec["process"]["env"] = json!(["SECRET=1"]);
        spec["process"]["noNewPrivileges"] = true.into();
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NPROC", "hard": 9, "soft": 8}]);
    });
    let first = adapt_it("c", bundle)
        .unwrap()
        .spec
        .process()
        .clone()
        .unwrap();
    let like = |user: &str| {
        let config = ProcessConfig {
            args: vec!["ps".into()],
            user: User {
                text: user.into(),
                ..User::default()
            },
            ..ProcessConfig::default()
        };
        serde_json::to_value(process::with_privileges_of(&first, &config, &accounts).unwrap())
            .unwrap()
    };
    let root = like("");
    assert_eq!(
        root["capabilities"]["effective"].as_array().unwrap().len(),
        2
    );
    assert_eq!(root["rlimits"][0]["hard"], 9);
    assert_eq!(
        (&root["noNewPrivileges"], &root["args"]),
        (&json!(true), &json!(["ps"]))
    );
    assert!(!root["env"].to_string().contains("SECRET"));
    let web = like("web");
    assert_eq!(web["capabilities"]["effective"], json!([]));
    assert!(web["env"].to_string().contains("HOME=/var/www"));
    assert_eq!(web["user"]["additionalGids"], json!([33, 40]));
}

#[test]
fn network_devices_are_moved_by_the_host() {
    let (_dir, bundle) = bundle(|spec| spec["linux"]["netDevices"] = json!({"eth1": {}}));
    let adapted = adapt_it("c", bundle).unwrap();
    assert_eq!(*adapted.spec.linux().as_ref().unwrap().net_devices(), None);
    let wrong = |spec: &mut Value| spec["linux"]["netDevices"] = json!({"eth/1": {}});
    assert!(error(wrong).contains("invalid network device name"));
}

/// The guest creates it for its user; if the root is read-only, the host does.
#[test]
fn the_host_makes_a_working_directory_only_where_the_guest_cannot() {
    let points = |read_only: bool| {
        let (_dir, bundle) = bundle(|spec| {
            spec["root"]["readonly"] = read_only.into();
            spec["process"]["cwd"] = "/work".into();
        });
        let points = adapt_it("c", bundle).unwrap().mount_points;
        points.contains(&("/work".into(), None))
    };
    assert!(points(true) && !points(false));
}
