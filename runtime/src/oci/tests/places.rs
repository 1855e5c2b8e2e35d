//! Destinations of mounts, and mounts that say too little.

use super::*;

#[test]
fn destinations_are_plain_paths_from_the_root() {
    let (dir, bundle) = bundle(|spec| {
        spec["mounts"] = json!([
            {"destination": "/b/../c", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "a/./b//", "type": "bind", "source": "data", "options": ["bind", "ro", "rw"]},
            {"destination": "/../../x", "type": "bind", "source": "data", "options": ["bind", "rw", "ro"]},
        ]);
    });
    std::fs::create_dir(dir.path().join("data")).unwrap();
    let on_host = mounts_on_host(&bundle).unwrap();
    let adapted = adapt_it("c", bundle).unwrap();
    let mounts = adapted.spec.mounts().iter().flatten();
    let places = mounts.map(|mount| mount.destination().to_str().unwrap());
    assert_eq!(places.collect::<Vec<_>>(), ["/c", "/a/b", "/x", "/dev"]);
    let made = adapted.mount_points.iter().map(|(path, _)| path).take(4);
    assert!(made.eq(on_host.iter().map(|mount| &mount.at)));
    // Of contradicting options the last one counts.
    let shares = adapted.shares.iter().map(|share| share.options.read_only);
    assert_eq!(shares.collect::<Vec<_>>()[1..], [false, true]);
}

/// As in the configurations of crun's own tests.
#[test]
fn a_dev_in_memory_is_added_where_none_is_mounted() {
    let with = |mounts: Value| {
        let (_dir, bundle) = bundle(|spec| spec["mounts"] = mounts);
        let adapted = adapt_it("c", bundle).unwrap();
        let mounts = adapted.spec.mounts().clone().unwrap();
        let places = mounts.iter().map(|m| m.destination().display().to_string());
        (places.collect::<Vec<_>>(), adapted.mount_points)
    };
    let one = |at: &str| json!({"destination": at, "type": "tmpfs", "source": "tmpfs"});
    let (places, points) = with(json!([one("/a"), one("/dev/x"), one("/b"), one("/dev/y")]));
    assert_eq!(places, ["/a", "/dev", "/dev/x", "/b", "/dev/y"]);
    assert!(points.contains(&("/dev".into(), Some(false))), "{points:?}");
    let (places, _) = with(json!([one("/devices"), one("/dev/../dev/")]));
    assert_eq!(places, ["/devices", "/dev"]);
}

/// The configurations of crun's own tests mount proc like this.
#[test]
fn a_file_system_without_a_source_is_named_by_its_type() {
    let (_dir, bundle) = bundle(|spec| {
        spec["mounts"] = json!([
            {"destination": "/proc", "type": "proc"},
            {"destination": "/tmp", "type": "tmpfs", "source": ""},
            {"destination": "/run", "type": "tmpfs", "source": "run"},
            {"destination": "/dev", "type": "tmpfs", "source": "dev"},
        ]);
    });
    let adapted = adapt_it("c", bundle).unwrap();
    let mounts = adapted.spec.mounts().iter().flatten();
    let sources: Vec<_> = mounts
        .map(|mount| mount.source().clone().unwrap())
        .collect();
    assert_eq!(sources, ["proc", "tmpfs", "run", "dev"].map(PathBuf::from));
}

/// As with runc, a destination may begin with the path of the root.
#[test]
fn a_dev_at_its_path_on_the_host_is_the_containers() {
    let (dir, mut bundle) = bundle(|spec| spec["mounts"] = json!([]));
    let at = dir.path().join("rootfs/dev");
    let mount = json!([{"destination": at, "type": "tmpfs", "source": "own"}]);
    let mount: Vec<oci_spec::runtime::Mount> = serde_json::from_value(mount).unwrap();
    bundle.spec.set_mounts(Some(mount));
    let adapted = adapt_it("c", bundle).unwrap();
    let mounts = adapted.spec.mounts().iter().flatten();
    let all: Vec<_> = mounts
        .map(|mount| (mount.destination(), mount.source()))
        .collect();
    let own = Some(std::path::PathBuf::from("own"));
    assert_eq!(all, [(&"/dev".into(), &own)]);
}
