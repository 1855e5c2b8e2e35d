//! Each option of a container appears in its OCI configuration.

use super::super::tests::mount;
use super::super::{Root, adapt};
use super::*;
use crate::account::tests::rootfs;
use crate::{GuestDevice, ProcessConfig, Rlimit, Seccomp, Stdio, Tmpfs, User, Volume};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The OCI configuration of a container as JSON.
fn of(change: impl FnOnce(&mut ContainerConfig)) -> Value {
    serde_json::to_value(bundle_of(change).unwrap().spec).unwrap()
}

fn bundle_of(change: impl FnOnce(&mut ContainerConfig)) -> Result<Bundle, Error> {
    let dir = rootfs();
    let mut config = ContainerConfig::new("/root-of-it", ["sh", "-c", "true"]);
    change(&mut config);
    bundle("c1", &config, &Accounts::read(dir.path()))
}

#[test]
fn a_containers_defaults_are_an_engines() {
    let spec = of(|_| {});
    assert_eq!(spec["root"], json!({"path": "rootfs", "readonly": false}));
    assert_eq!(spec["hostname"], "c1");
    let process = &spec["process"];
    assert_eq!(process["args"], json!(["sh", "-c", "true"]));
    assert_eq!(
        (&process["cwd"], &process["terminal"]),
        (&json!("/"), &json!(false))
    );
    assert_eq!(
        process["user"],
        json!({"uid": 0, "gid": 0, "additionalGids": [0]})
    );
    let env = process["env"].as_array().unwrap();
    assert!(env.contains(&"HOME=/root".into()), "{env:?}");
    assert!(
        env.iter()
            .any(|v| v.as_str().unwrap().starts_with("PATH=/usr/local/sbin:"))
    );
    assert!(!env.iter().any(|v| v.as_str().unwrap().starts_with("TERM=")));
    for set in ["bounding", "effective", "permitted"] {
        let set = process["capabilities"][set].as_array().unwrap();
        assert!(
            set.len() == 14 && set.contains(&"CAP_NET_RAW".into()),
            "{set:?}"
        );
    }
    for set in ["inheritable", "ambient"] {
        assert!(process["capabilities"][set].is_null(), "{set}");
    }
    let linux = &spec["linux"];
    let namespaces = linux["namespaces"].as_array().unwrap();
    let kinds: Vec<_> = namespaces
        .iter()
        .map(|n| n["type"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["pid", "mount", "uts", "ipc", "cgroup", "network"]);
    assert_eq!(linux["resources"]["devices"][0]["allow"], false);
    assert!(
        linux["maskedPaths"]
            .as_array()
            .unwrap()
            .contains(&"/proc/kcore".into())
    );
    assert!(
        linux["readonlyPaths"]
            .as_array()
            .unwrap()
            .contains(&"/proc/sys".into())
    );
    assert_eq!(linux["seccomp"]["defaultAction"], "SCMP_ACT_ALLOW");
    assert_eq!(mount(&spec, "/sys").last().unwrap(), "ro");
    for place in [
        "/proc",
        "/dev",
        "/dev/pts",
        "/dev/shm",
        "/dev/mqueue",
        "/sys/fs/cgroup",
    ] {
        mount(&spec, place);
    }
}

#[test]
fn each_option_of_a_process_is_in_the_configuration() {
    let spec = of(|config| {
        config.process = ProcessConfig {
            env: vec!["A=1".into(), "PATH=/own".into(), "HOME=/h".into()],
            // A directory that is only passed need not exist.
            cwd: Some("/none/.././srv/".into()),
            user: User {
                text: "web:log".into(),
                groups: vec!["root".into(), "1234".into(), "log".into()],
            },
            stdio: Stdio::Terminal {
                rows: 24,
                columns: 80,
                keep_newlines: false,
            },
            ..config.process.clone()
        };
        config.no_new_privileges = true;
    });
    let process = &spec["process"];
    assert_eq!(
        process["env"],
        json!(["A=1", "PATH=/own", "HOME=/h", "TERM=xterm"])
    );
    assert_eq!(
        (&process["cwd"], &process["terminal"]),
        (&json!("/srv"), &json!(true))
    );
    assert_eq!(
        (&process["user"]["uid"], &process["user"]["gid"]),
        (&json!(33), &json!(40))
    );
    assert_eq!(process["user"]["additionalGids"], json!([40, 0, 1234]));
    assert_eq!(process["noNewPrivileges"], true);
    // A user other than root has only the capabilities of program files.
    let capabilities = &process["capabilities"];
    assert_eq!(capabilities["bounding"].as_array().unwrap().len(), 14);
    assert_eq!(
        (&capabilities["effective"], &capabilities["permitted"]),
        (&json!([]), &json!([]))
    );
}

#[test]
fn each_option_of_a_container_is_in_the_configuration() {
    let spec = of(|config| {
        config.hostname = Some("other".into());
        config.read_only = true;
        config.tmpfs = vec![Tmpfs::new("/scratch")];
        config.capabilities = vec!["net_admin".into(), "CAP_SYS_PTRACE".into()];
        config.seccomp = Seccomp::Unconfined;
        config.shm_size = Some(1 << 20);
        config.pids_limit = Some(100);
        config.sysctls = [("kernel.msgmax".to_owned(), "5".to_owned())].into();
        config.guest_devices = vec![
            GuestDevice::new("/dev/fuse"),
            GuestDevice {
                path: "/dev/./tunnel".into(),
                access: "rw".into(),
                ..GuestDevice::new("/dev/net/tun")
            },
        ];
        config.volumes = vec![
            Volume::new("/a", "/b"),
            Volume {
                read_only: true,
                follow_mounts: true,
                ..Volume::new("/c", "/d")
            },
        ];
    });
    assert_eq!(
        (&spec["hostname"], &spec["root"]["readonly"]),
        (&json!("other"), &json!(true))
    );
    assert_eq!(
        mount(&spec, "/scratch"),
        ["tmpfs", "tmpfs", "nosuid", "nodev", "mode=1777"]
    );
    assert_eq!(mount(&spec, "/b"), ["bind", "/a", "rbind", "rprivate"]);
    assert_eq!(mount(&spec, "/d"), ["bind", "/c", "rbind", "rslave", "ro"]);
    assert_eq!(mount(&spec, "/dev/shm").last().unwrap(), "size=1048576");
    let linux = &spec["linux"];
    assert_eq!(linux["resources"]["pids"], json!({"limit": 100}));
    assert_eq!(linux["sysctl"], json!({"kernel.msgmax": "5"}));
    let nodes = linux["devices"].as_array().unwrap().iter();
    let nodes: Vec<_> = nodes
        .map(|d| (&d["path"], &d["major"], &d["minor"]))
        .collect();
    let node = |path, major, minor| (json!(path), json!(major), json!(minor));
    let wanted = [node("/dev/fuse", 10, 229), node("/dev/tunnel", 10, 200)];
    assert_eq!(nodes, wanted.each_ref().map(|(p, a, i)| (p, a, i)));
    let rules = linux["resources"]["devices"].as_array().unwrap();
    let last = json!({"allow": true, "type": "c", "major": 10, "minor": 200, "access": "rw"});
    assert_eq!((rules.len(), &rules[2]), (3, &last));
    let bounding = spec["process"]["capabilities"]["bounding"]
        .as_array()
        .unwrap();
    assert!(bounding.contains(&"CAP_NET_ADMIN".into()) && bounding.len() == 16);
    assert!(spec["linux"]["seccomp"].is_null());
    let all = of(|config| config.capabilities = vec!["all".into()]);
    assert_eq!(
        all["process"]["capabilities"]["bounding"]
            .as_array()
            .unwrap()
            .len(),
        41
    );
}

#[test]
fn a_privileged_container_is_root_of_its_guest() {
    let spec = of(|config| config.privileged = true);
    let linux = &spec["linux"];
    assert_eq!(linux["resources"]["devices"][0]["allow"], true);
    assert_eq!(
        (&linux["maskedPaths"], &linux["readonlyPaths"]),
        (&json!([]), &json!([]))
    );
    assert!(linux["seccomp"].is_null());
    assert_eq!(
        spec["process"]["capabilities"]["effective"]
            .as_array()
            .unwrap()
            .len(),
        41
    );
    assert_eq!(mount(&spec, "/sys").last().unwrap(), "rw");
    assert_eq!(mount(&spec, "/sys/fs/cgroup").last().unwrap(), "rw");
}

#[test]
fn what_is_wrong_with_a_container_is_named() {
    let error = |change: fn(&mut ContainerConfig)| bundle_of(change).unwrap_err().to_string();
    assert!(error(|config| config.capabilities = vec!["fly".into()]).contains("CAP_FLY"));
    assert!(error(|config| config.process.args.clear()).contains("command"));
    assert!(error(|config| config.process.args = vec!["".into()]).contains("command"));
    assert!(error(|config| config.process.user.text = "nobody".into()).contains("nobody"));
    assert!(error(|config| config.process.cwd = Some("work".into())).contains("work"));
    assert!(error(|config| config.tmpfs = vec![Tmpfs::new("x")]).contains("absolute"));
    assert!(error(|config| config.volumes = vec![Volume::new("/a", "b")]).contains("absolute"));
    let missing = Root::of(Path::new("/nonexistent")).unwrap_err().to_string();
    assert!(missing.starts_with("rootfs: /nonexistent"), "{missing}");
}

#[test]
fn limits_of_resources_are_an_engines() {
    let limits = |change: fn(&mut ContainerConfig)| of(change)["process"]["rlimits"].clone();
    let files = json!({"type": "RLIMIT_NOFILE", "soft": 1_048_576, "hard": 1_048_576});
    assert_eq!(limits(|_| {}), json!([files]));
    fn limit(resource: &str, soft: u64, hard: u64) -> Rlimit {
        Rlimit {
            resource: resource.into(),
            soft,
            hard,
        }
    }
    let changed = limits(|config| {
        config.rlimits = vec![limit("nofile", 5, 6), limit("RLIMIT_CORE", 0, u64::MAX)];
    });
    assert_eq!(
        changed,
        json!([{"type": "RLIMIT_CORE", "soft": 0, "hard": u64::MAX},
            {"type": "RLIMIT_NOFILE", "soft": 5, "hard": 6}])
    );
    for (wrong, named) in [
        (limit("nofiles", 1, 1), "nofiles"),
        (limit("cpu", 2, 1), "soft"),
        (limit("nofile", 1, u64::MAX), "at most 1073741816"),
    ] {
        let refused = bundle_of(|config| config.rlimits = vec![wrong]).unwrap_err();
        assert!(refused.to_string().contains(named), "{refused}");
    }
}

#[test]
fn a_container_knows_localhost_and_its_own_name() {
    let config = ContainerConfig::new("/", ["true"]);
    let files = files("c1", &config).unwrap();
    let text = |path: &str| {
        let file = files.iter().find(|file| file.path == path).unwrap();
        String::from_utf8(file.content.clone()).unwrap()
    };
    assert!(text("/etc/hosts").starts_with("127.0.0.1\tlocalhost\n"));
    assert!(text("/etc/hosts").contains("127.0.1.1\tc1\n"));
    assert_eq!(text("/etc/hostname"), "c1\n");
    assert!(files.iter().all(|file| !file.replace));
}

#[test]
fn hosts_and_name_servers_of_the_user_replace_those_of_the_root() {
    let mut config = ContainerConfig::new("/", ["true"]);
    config.extra_hosts = vec![("db".into(), "10.0.0.1".parse().unwrap())];
    config.resolver.name_servers = vec!["192.0.2.53".parse().unwrap()];
    let of = |config: &ContainerConfig| files("c1", config);
    let all = of(&config).unwrap();
    let text = |path: &str| {
        let file = all.iter().find(|file| file.path == path && file.replace);
        String::from_utf8(file.unwrap().content.clone()).unwrap()
    };
    assert!(text("/etc/hosts").ends_with("127.0.1.1\tc1\n10.0.0.1\tdb\n"));
    assert!(text("/etc/resolv.conf").starts_with("nameserver 192.0.2.53\n"));
    // Neither a line of its own nor no name at all.
    for name in ["", "a b", "a\n10.0.0.2"] {
        config.extra_hosts[0].0 = name.into();
        assert!(of(&config).unwrap_err().to_string().contains("not a word"));
    }
}

#[test]
fn a_device_that_no_guest_has_is_refused_with_those_it_has() {
    let refused = |device: GuestDevice| {
        let refused = bundle_of(|config| config.guest_devices = vec![device]);
        refused.unwrap_err().to_string()
    };
    let said = refused(GuestDevice::new("/dev/kvm"));
    assert!(
        said.contains("/dev/kvm is not one of") && said.contains("/dev/fuse"),
        "{said}"
    );
    let access = GuestDevice {
        access: "rx".into(),
        ..GuestDevice::new("/dev/fuse")
    };
    assert!(refused(access).contains("\"rx\""));
    let relative = GuestDevice {
        path: "fuse".into(),
        ..GuestDevice::new("/dev/fuse")
    };
    assert!(refused(relative).contains("absolute"));
    let twice = vec![GuestDevice::new("/dev/fuse"); 2];
    let twice = bundle_of(|config| config.guest_devices = twice).unwrap_err();
    assert!(twice.to_string().contains("/dev/fuse is taken"), "{twice}");
}

#[test]
fn a_users_volume_is_the_hosts_whatever_lies_there() {
    let volumes = ["/dev/shm", "/proc/sys", "/sys/fs"];
    let bundle = bundle_of(|config| {
        config.volumes = volumes.map(|path| Volume::new(path, path)).into();
    });
    let adapted = adapt(
        "a",
        bundle.unwrap(),
        Root::Directory,
        &Accounts::read(rootfs().path()),
    )
    .unwrap();
    let shared: Vec<_> = adapted
        .shares
        .iter()
        .map(|share| share.path.as_path())
        .collect();
    for path in volumes {
        assert!(shared.contains(&Path::new(path)), "{path} of {shared:?}");
    }
}

#[test]
fn a_root_whose_name_is_no_text_is_one_too() {
    let rootfs = PathBuf::from(OsStr::from_bytes(b"/root\xff"));
    let bundle = bundle_of(|config| config.rootfs = rootfs.clone()).unwrap();
    assert_eq!(bundle.rootfs, rootfs);
}

/// cri-o/cri-o 8268, CVE-2022-36109 of moby.
#[test]
fn a_users_own_group_is_among_its_groups() {
    let groups = |user: &str| {
        let spec = of(|config| config.process.user.text = user.into());
        spec["process"]["user"]["additionalGids"].clone()
    };
    assert_eq!(groups("web"), json!([33, 40]));
    assert_eq!(groups("web:log"), json!([40]));
    assert_eq!(groups("1000:50"), json!([50]));
}

/// moby/moby 21445.
#[test]
fn a_name_that_no_host_can_have_is_refused_before_a_start() {
    let name = |hostname: Option<&str>| {
        let set = bundle_of(|config| config.hostname = hostname.map(str::to_owned));
        set.map(|bundle| bundle.spec.hostname().clone().unwrap_or_default())
    };
    let long = "n".repeat(64);
    assert_eq!(name(Some(&long)).unwrap(), long);
    assert_eq!(name(Some("under_score")).unwrap(), "under_score");
    assert_eq!(name(Some("")).unwrap(), "c1");
    for wrong in [&*"n".repeat(65), "a b", "a\n192.0.2.1 bank.example"] {
        let said = name(Some(wrong)).unwrap_err().to_string();
        assert!(
            said.starts_with("hostname: ") && said.lines().count() == 1,
            "{said}"
        );
    }
    let config = ContainerConfig::default();
    let id = "é".repeat(33);
    assert_eq!(host_name(&id, &config).unwrap(), "é".repeat(32));
}

/// opencontainers/runc 4704; cloudfoundry/cloud_controller_ng 760.
#[test]
fn an_environment_is_one_that_a_process_can_have() {
    let env = |words: &[&str]| {
        let env = words.iter().map(|word| (*word).to_owned()).collect();
        let set = bundle_of(|config| config.process.env = env);
        set.map(|bundle| {
            bundle
                .spec
                .process()
                .clone()
                .unwrap()
                .env()
                .clone()
                .unwrap()
        })
    };
    let found = env(&["HOME=", "A="]).unwrap();
    assert!(
        found.contains(&"HOME=/root".into()) && found.contains(&"A=".into()),
        "{found:?}"
    );
    assert_eq!(
        found
            .iter()
            .filter(|word| word.starts_with("HOME="))
            .count(),
        1
    );
    assert!(
        env(&["HOME=/", "HOME=/own"])
            .unwrap()
            .contains(&"HOME=/own".into())
    );
    for nameless in ["=x", ""] {
        let error = env(&[nameless]).unwrap_err();
        assert!(error.to_string().contains("has no name"), "{error}");
    }
    assert!(env(&["A=\0"]).unwrap_err().to_string().contains("NUL"));
    let args = bundle_of(|config| config.process.args = vec!["sh".into(), "a\0b".into()]);
    assert!(args.unwrap_err().to_string().contains("NUL"));
}

/// moby/moby (`etchosts`): a service that looks up its own short name, and `hostname -s`, find it.
#[test]
fn a_host_name_with_a_domain_is_known_without_it_as_well() {
    let hosts = |name: &str| {
        let config = ContainerConfig {
            hostname: Some(name.into()),
            ..ContainerConfig::default()
        };
        let files = super::files("id", &config).unwrap();
        String::from_utf8(files[0].content.clone()).unwrap()
    };
    assert!(hosts("web.example.com").ends_with("127.0.1.1\tweb.example.com web\n"));
    assert!(hosts("web").ends_with("127.0.1.1\tweb\n"));
    assert!(hosts(".web").ends_with("127.0.1.1\t.web\n"));
}
