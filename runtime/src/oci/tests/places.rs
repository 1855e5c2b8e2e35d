//! Destinations of mounts.

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
    assert_eq!(places.collect::<Vec<_>>(), ["/c", "/a/b", "/x"]);
    let made = adapted.mount_points.iter().map(|(path, _)| path).take(3);
    assert!(made.eq(on_host.iter().map(|mount| &mount.at)));
    // Of contradicting options the last one counts.
    let shares = adapted.shares.iter().map(|share| share.options.read_only);
    assert_eq!(shares.collect::<Vec<_>>()[1..], [false, true]);
}
