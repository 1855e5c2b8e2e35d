//! Mount points of a container in a root that is a directory of the host.
//!
//! A read-only root is read-only for the whole guest, so the host creates missing mount points before it shares the tree, as
//! runc does. The tree is not trusted: symbolic links cannot lead out of it.

use crate::Error;
use crate::oci::Link;
use koya_rootfs::{Kind, Rootfs};
use oci_spec::runtime::Mount;
use std::path::Path;

/// Creates the mount points that `rootfs` lacks. `mounts` are destinations in the container in mount order, each with a
/// flag for files (instead of directories); `None` accepts both.
///
/// # Errors
/// The mount point that can't be created or has the wrong type, and the reason.
pub(crate) fn make<P: AsRef<Path>>(
    rootfs: &Path,
    mounts: &[(P, Option<bool>)],
) -> Result<(), Error> {
    let root = open(rootfs)?;
    for (destination, is_file) in in_the_root(mounts) {
        let kind = if is_file == Some(true) {
            Kind::File
        } else {
            Kind::Directory
        };
        root.make(destination, kind).map_err(|error| {
            let place = destination.display();
            let what = format!("make {place}, which is not in the root file system");
            Error::host(what)(error.into())
        })?;
        check_type(&root, destination, is_file)?;
    }
    Ok(())
}

/// Creates links in `rootfs`. One that is there already must have the same target.
///
/// # Errors
/// The link that can't be created, and the reason.
pub(crate) fn make_links(rootfs: &Path, links: &[Link]) -> Result<(), Error> {
    let root = open(rootfs)?;
    links.iter().try_for_each(|Link { at, target }| {
        root.make_link(at, target).map_err(|error| {
            let what = format!("make the link {} to {}", at.display(), target.display());
            Error::host(what)(error.into())
        })
    })
}

/// Checks the types of the mount points that `rootfs` has, without creating others.
///
/// # Errors
/// The mount point of the wrong type.
pub(crate) fn check<P: AsRef<Path>>(
    rootfs: &Path,
    mounts: &[(P, Option<bool>)],
) -> Result<(), Error> {
    let root = open(rootfs)?;
    in_the_root(mounts)
        .try_for_each(|(destination, is_file)| check_type(&root, destination, is_file))
}

/// Checks that no process or device information (`proc`, `sysfs`) is to be mounted at a symbolic link, which the guest would
/// refuse as runc does, but without the reason.
///
/// # Errors
/// The mount point that is a link.
pub(crate) fn check_ordinary(rootfs: &Path, mounts: &[Mount]) -> Result<(), Error> {
    let root = open(rootfs)?;
    for (index, mount) in mounts.iter().enumerate() {
        let at = mount.destination();
        let is_within = mounts[..index]
            .iter()
            .any(|earlier| at.starts_with(earlier.destination()));
        let is_own = matches!(mount.typ().as_deref(), Some("proc" | "sysfs"));
        if let Some(target) = root.link(at).filter(|_| is_own && !is_within) {
            let reason = format!(
                "{} is a symbolic link to {} in the root file system, but has to be a directory",
                at.display(),
                target.display()
            );
            return Err(Error::invalid("mounts", reason));
        }
    }
    Ok(())
}

fn open(rootfs: &Path) -> Result<Rootfs, Error> {
    let root = Rootfs::open(rootfs);
    root.map_err(|e| Error::host(format!("open {}", rootfs.display()))(e.into()))
}

/// The mount points in the root itself: one within an earlier mount is not.
fn in_the_root<P: AsRef<Path>>(
    mounts: &[(P, Option<bool>)],
) -> impl Iterator<Item = (&Path, Option<bool>)> {
    let all = mounts.iter().enumerate();
    all.filter_map(|(index, (destination, is_file))| {
        let destination = destination.as_ref();
        let mut earlier = mounts[..index].iter();
        let is_within = earlier.any(|(earlier, _)| destination.starts_with(earlier));
        (!is_within).then_some((destination, *is_file))
    })
}

/// The guest's error for the wrong type would not tell the reason.
fn check_type(root: &Rootfs, destination: &Path, is_file: Option<bool>) -> Result<(), Error> {
    let wrong = match (is_file, root.kind(destination)) {
        (Some(true), Ok(Kind::Directory)) => {
            "is a directory in the root file system, but a file is to be mounted there"
        }
        (Some(false), Ok(Kind::File)) => {
            "is not a directory in the root file system, but a directory is to be mounted there"
        }
        _ => return Ok(()),
    };
    let reason = format!("{} {wrong}", destination.display());
    Err(Error::invalid("mounts", reason))
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
            (Path::new("/proc"), Some(false)),
            (Path::new("/proc/sub"), Some(false)),
            (Path::new("/a/b/../c"), Some(false)),
            (Path::new("/link/in"), Some(false)),
            (Path::new("/etc/resolv.conf"), Some(true)),
        ];
        make(root, &mounts).unwrap();
        make(root, &mounts).unwrap();
        assert!(root.join("proc").is_dir() && !root.join("proc/sub").exists());
        assert!(root.join("a/c").is_dir() && !root.join("a/b").exists());
        assert!(root.join("there/in").is_dir());
        assert!(root.join("etc/resolv.conf").is_file());
        // The link's target is resolved inside the tree, and created there.
        make(root, &[(Path::new("/out/x"), Some(false))]).unwrap();
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
        let inside = outside.path().strip_prefix("/").unwrap();
        assert!(root.join(inside).join("x").is_dir());
    }

    #[test]
    fn links_are_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        std::fs::create_dir(root.join("there")).unwrap();
        std::os::unix::fs::symlink("/there", root.join("to-there")).unwrap();
        let made = |at: &str, target: &str| {
            let link = Link {
                at: at.into(),
                target: target.into(),
            };
            make_links(root, &[link]).map_err(|error| error.to_string())
        };
        for (at, found) in [("/a/b/link", "a/b/link"), ("/to-there/link", "there/link")] {
            made(at, "nowhere").unwrap();
            made(at, "nowhere").unwrap();
            assert_eq!(root.join(found).read_link().unwrap(), Path::new("nowhere"));
            let said = made(at, "elsewhere").unwrap_err();
            assert!(
                said.contains(&format!("make the link {at} to elsewhere")),
                "{said}"
            );
        }
        assert!(made("/there", "nowhere").is_err(), "a directory");
        assert!(made("/", "nowhere").is_err());
    }

    /// Docker's error for this is "Are you trying to mount a directory onto a file".
    #[test]
    fn files_and_directories_are_not_mounted_over_each_other() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("directory")).unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        std::os::unix::fs::symlink("file", dir.path().join("link")).unwrap();
        let of = |path: &str, is_file| {
            let points = [(Path::new(path), Some(is_file))];
            let checked = check(dir.path(), &points).map_err(|error| error.to_string());
            let made = make(dir.path(), &points).map_err(|error| error.to_string());
            assert_eq!(checked, made);
            made
        };
        assert!(
            of("/directory", true)
                .unwrap_err()
                .contains("/directory is a directory")
        );
        for file in ["/file", "/link"] {
            assert!(
                of(file, false).unwrap_err().contains("is not a directory"),
                "{file}"
            );
            of(file, true).unwrap();
        }
        of("/directory", false).unwrap();
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
            (Path::new("/var/run/secrets/token"), Some(false)),
            (Path::new("/etc/resolv.conf"), Some(true)),
            (Path::new("/short/link/in"), Some(false)),
            (Path::new("/up/in"), Some(false)),
            (Path::new("/var/run2/secrets"), Some(false)),
            (Path::new("/etc/localtime"), Some(true)),
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
        make(root, &[(Path::new("/a/x"), Some(false))]).unwrap_err();
    }

    #[test]
    fn proc_and_sysfs_are_not_mounted_at_links() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        std::os::unix::fs::symlink("/tmp", root.join("proc")).unwrap();
        std::fs::create_dir(root.join("sys")).unwrap();
        let mount = |at: &str, kind: &str| -> Mount {
            let mount = serde_json::json!({"destination": at, "type": kind, "source": kind});
            serde_json::from_value(mount).unwrap()
        };
        let check = |mounts: &[Mount]| check_ordinary(root, mounts).map_err(|e| e.to_string());
        let refused = check(&[mount("/sys", "sysfs"), mount("/proc", "proc")]).unwrap_err();
        let reason = "/proc is a symbolic link to /tmp in the root file system";
        assert!(refused.contains(reason), "{refused}");
        check(&[mount("/proc", "tmpfs"), mount("/proc", "proc")]).unwrap();
        check(&[mount("/sys", "sysfs"), mount("/missing", "proc")]).unwrap();
    }
}
