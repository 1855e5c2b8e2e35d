//! The places at which a container's mounts go in a root that is a directory of the host.
//!
//! A read-only root is read-only for the whole guest, so the host makes what is missing before it shares the
//! tree, as runc does. The tree is not trusted: no link in it leads out of it.

use crate::Error;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, fchmod, mkdirat, openat, openat2, readlinkat};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

const PATH_ONLY: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

/// How many links that lead nowhere one path may have, as the kernel follows no more of others.
const LINKS: usize = 40;

/// Makes the mount points that `rootfs` lacks. `mounts` are destinations in the container in the
/// order in which they are mounted, each with whether a file goes there, not a directory.
///
/// # Errors
/// Which is missing and why it can't be made.
pub(crate) fn make(rootfs: &Path, mounts: &[(&Path, bool)]) -> Result<(), Error> {
    let root = openat(CWD, rootfs, PATH_ONLY | OFlags::DIRECTORY, Mode::empty());
    let root = root.map_err(|e| Error::host(format!("open {}", rootfs.display()))(e.into()))?;
    for (index, (destination, is_file)) in mounts.iter().enumerate() {
        // What lies in an earlier mount is not in this tree.
        if mounts[..index]
            .iter()
            .any(|(earlier, _)| destination.starts_with(earlier))
        {
            continue;
        }
        make_it(&root, destination, *is_file).map_err(|error| {
            let place = destination.display();
            let what = format!("make {place}, which is not in the root file system");
            Error::host(what)(error.into())
        })?;
    }
    Ok(())
}

/// Another container of the same tree may make the same at the same time.
fn make_it(root: &OwnedFd, destination: &Path, is_file: bool) -> Result<(), Errno> {
    // One look for each part of a path; what is always in the way is no directory.
    const LOOKS: usize = 64;
    let mut made = Err(Errno::EXIST);
    for _ in 0..LOOKS {
        made = make_one(root, destination, is_file);
        if made != Err(Errno::EXIST) {
            break;
        }
    }
    made
}

fn make_one(root: &OwnedFd, destination: &Path, is_file: bool) -> Result<(), Errno> {
    let open = |path: &Path| openat2(root, path, PATH_ONLY, Mode::empty(), ResolveFlags::IN_ROOT);
    match open(destination) {
        Err(Errno::NOENT) => {}
        other => return other.map(drop),
    }
    let mut names = Vec::new();
    for component in destination.components() {
        match component {
            Component::Normal(name) => names.push(name.to_owned()),
            Component::ParentDir => drop(names.pop()),
            _ => {}
        }
    }
    let mut left = VecDeque::from(names);
    let (mut path, mut links) = (PathBuf::from("/"), 0);
    while let Some(name) = left.pop_front() {
        let parent = open(&path)?;
        path.push(&name);
        match open(&path) {
            Err(Errno::NOENT) => {}
            found => {
                found?;
                continue;
            }
        }
        if let Ok(target) = readlinkat(&parent, &name, Vec::new()) {
            // A link that leads nowhere: what it names is made, inside the tree.
            links += 1;
            if links > LINKS {
                return Err(Errno::LOOP);
            }
            let target = Path::new(OsStr::from_bytes(target.as_bytes()));
            path.pop();
            if target.is_absolute() {
                path = PathBuf::from("/");
            }
            for component in target.components().rev() {
                match component {
                    Component::Normal(name) => left.push_front(name.to_owned()),
                    Component::ParentDir => left.push_front("..".into()),
                    _ => {}
                }
            }
        } else if is_file && left.is_empty() {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::WRONLY;
            let made = openat(&parent, &name, flags, Mode::RUSR | Mode::WUSR)?;
            fchmod(made, Mode::from_raw_mode(0o644))?;
        } else {
            // The caller's umask is not the container's: others in it may have to come through.
            mkdirat(&parent, &name, Mode::RWXU)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let made = openat(&parent, &name, flags, Mode::empty())?;
            fchmod(made, Mode::from_raw_mode(0o755))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_of_one_tree_do_not_mind_each_other() {
        for _ in 0..50 {
            let dir = tempfile::tempdir().unwrap();
            let together = std::sync::Barrier::new(4);
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        together.wait();
                        let mounts = [
                            (Path::new("/a/b/c"), false),
                            (Path::new("/etc/hosts"), true),
                        ];
                        make(dir.path(), &mounts).unwrap();
                    });
                }
            });
            assert!(dir.path().join("a/b/c").is_dir());
        }
    }

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
        // The link's target is looked for inside the tree, and made there.
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
