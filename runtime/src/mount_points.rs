//! Mount points of a container in a root that is a directory of the host.
//!
//! A read-only root is read-only for the whole guest, so the host creates missing mount points before it shares the tree, as
//! runc does. The tree is not trusted: symbolic links cannot lead out of it.

use crate::Error;
use koya_rootfs::{Kind, Rootfs};
use std::path::Path;

/// Creates the mount points that `rootfs` lacks. `mounts` are destinations in the container in mount order, each with a flag
/// for files (instead of directories).
///
/// # Errors
/// The mount point that can't be created, and the reason.
pub(crate) fn make(rootfs: &Path, mounts: &[(&Path, bool)]) -> Result<(), Error> {
    let root = Rootfs::open(rootfs);
    let root = root.map_err(|e| Error::host(format!("open {}", rootfs.display()))(e.into()))?;
    for (index, (destination, is_file)) in mounts.iter().enumerate() {
        // A destination within an earlier mount is not in this tree.
        if mounts[..index]
            .iter()
            .any(|(earlier, _)| destination.starts_with(earlier))
        {
            continue;
        }
        let kind = if *is_file {
            Kind::File
        } else {
            Kind::Directory
        };
        root.make(destination, kind).map_err(|error| {
            let place = destination.display();
            let what = format!("make {place}, which is not in the root file system");
            Error::host(what)(error.into())
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_made_inside_the_tree_only() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let root = dir.path();
        std::os::unix::fs::symlink(outside.path(), root.join("out")).unwrap();
        std::fs::create_dir(root.join("there")).unwrap();
        std::os::unix::fs::symlink("/there", root.join("link")).unwrap();
        let mounts = [
            (Path::new("/proc"), false),
            (Path::new("/proc/sub"), false),
            (Path::new("/a/b/../c"), false),
            (Path::new("/link/in"), false),
            (Path::new("/etc/resolv.conf"), true),
        ];
        make(root, &mounts).unwrap();
        make(root, &mounts).unwrap();
        assert!(root.join("proc").is_dir() && !root.join("proc/sub").exists());
        assert!(root.join("a/c").is_dir() && !root.join("a/b").exists());
        assert!(root.join("there/in").is_dir());
        assert!(root.join("etc/resolv.conf").is_file());
        // The link's target is resolved inside the tree, and created there.
        make(root, &[(Path::new("/out/x"), false)]).unwrap();
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
        let inside = outside.path().strip_prefix("/").unwrap();
        assert!(root.join(inside).join("x").is_dir());
    }

    #[test]
    fn what_a_link_names_is_made_where_it_leads_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let link = |to: &str, at: &str| {
            let at = root.join(at);
            std::fs::create_dir_all(at.parent().unwrap()).unwrap();
            std::os::unix::fs::symlink(to, at).unwrap();
        };
        link("/run", "var/run");
        link("../run/systemd/resolve/stub", "etc/resolv.conf");
        link("/deep/er", "short");
        std::fs::create_dir_all(root.join("deep/er")).unwrap();
        link("../../beside", "deep/er/link");
        link("../../../../above", "up");
        link("/run2", "var/run2");
        link("/tmp/run2", "run2");
        link("/usr/share/zoneinfo/Asia/Shanghai", "etc/localtime");
        link("b", "a");
        link("a", "b");
        let mounts = [
            (Path::new("/var/run/secrets/token"), false),
            (Path::new("/etc/resolv.conf"), true),
            (Path::new("/short/link/in"), false),
            (Path::new("/up/in"), false),
            (Path::new("/var/run2/secrets"), false),
            (Path::new("/etc/localtime"), true),
        ];
        make(root, &mounts).unwrap();
        for made in [
            "run/secrets/token",
            "beside/in",
            "above/in",
            "tmp/run2/secrets",
        ] {
            assert!(root.join(made).is_dir(), "{made}");
        }
        assert!(root.join("run/systemd/resolve/stub").is_file());
        assert!(root.join("etc/resolv.conf").is_symlink());
        make(root, &[(Path::new("/a/x"), false)]).unwrap_err();
    }
}
