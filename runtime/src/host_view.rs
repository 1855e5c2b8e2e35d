//! A container's files for tools of the host that enter the mount namespace of the container's process.
//!
//! `podman cp` reaches the files of a running container in this way, as does nsenter(1). The process on the host is not the
//! container's, so such a tool would read and write files of the host instead. Therefore that process (a thread of it) gets
//! a mount namespace with the container's root mounted over `/`. Whoever enters it starts at the topmost mount of `/`. The
//! thread itself keeps its root directory, which is the mount below, and sees the host's files as before.
//!
//! Mounts that only the guest has are empty and read-only here: a file copied there would not appear in the container.

use crate::oci::{self, OnHost};
use crate::{Bundle, Error};
use koya_rootfs::{Kind, Rootfs, make_read_only};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount,
    open_tree,
};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Files of the host's `/proc` that tools need for a list of the container's processes.
const OF_PROC: [&str; 2] = ["stat", "uptime"];

/// And those of this process. Not `root`, `cwd`, `fd` and others that lead to files of the host: a tool would follow a link
/// of the container to them.
const OF_PROCESS: [&str; 8] = [
    "attr", "cgroup", "cmdline", "gid_map", "ns", "stat", "status", "uid_map",
];

/// Moves the calling thread into a mount namespace of its own that shows the container's files to whoever enters it by
/// `/proc/TID/ns/mnt`. For the thread itself paths are those of the host, as before. The container's mount points must exist.
///
/// # Errors
/// If the bundle has an unsupported mount, or the calling thread may not mount. The namespace then shows no files at all,
/// if there is one.
pub fn show_files_on_host(bundle: &Bundle) -> Result<(), Error> {
    let failed = Error::invalid_by("mounts", "the container's files can't be shown on the host");
    let mounts = oci::mounts_on_host(bundle)?;
    let root = bundle.spec.root().as_ref();
    let is_read_only = root.and_then(|root| root.readonly()).unwrap_or(false);
    let shown = enter().and_then(|()| {
        let shown = show(&bundle.rootfs, is_read_only, &mounts);
        if shown.is_err() {
            // Without a root of the container, the host's would be shown.
            let nothing = empty()?;
            attach(&nothing, CWD, "/")?;
            make_read_only(&nothing)?;
        }
        shown
    });
    shown.map_err(failed)
}

fn enter() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    // Later mounts of the host appear here, but not vice versa.
    let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    Ok(mount_change("/", flags)?)
}

fn show(rootfs: &Path, is_read_only: bool, mounts: &[OnHost]) -> io::Result<()> {
    let root = tree(rootfs)?;
    attach(&root, CWD, "/")?;
    if is_read_only {
        make_read_only(&root)?;
    }
    let files = Rootfs::of(root);
    let mut covers: Vec<(&Path, OwnedFd)> = Vec::new();
    for mount in mounts {
        let is_covered = covers.iter().any(|(at, _)| mount.at.starts_with(at));
        let source = mount.source.as_deref().map(tree).transpose()?;
        let kind = source.as_ref().map_or(Ok(Kind::Directory), Kind::of)?;
        if is_covered {
            files.make(&mount.at, kind)?;
        }
        // What is not there is not in the container either.
        let Ok(place) = files.find(&mount.at) else {
            continue;
        };
        if Kind::of(&place)? != kind {
            continue;
        }
        let mounted = source.map_or_else(empty, Ok)?;
        attach(&mounted, &place, "")?;
        if mount.read_only {
            make_read_only(&mounted)?;
        }
        if mount.source.is_none() {
            covers.push((&mount.at, mounted));
        }
    }
    let proc = Path::new("/proc");
    if covers.iter().any(|(at, _)| *at == proc) {
        show_process(&files, proc)?;
    }
    for (_, cover) in &covers {
        make_read_only(cover)?;
    }
    Ok(())
}

/// Shows this process, which stands for the container on the host, in a cover of `/proc`: the only one in a list of the
/// container's processes.
fn show_process(files: &Rootfs, proc: &Path) -> io::Result<()> {
    // By its number in that file system, which may be another one than in its own pid namespace.
    let process = std::fs::read_link(proc.join("self"))?;
    let of_process = OF_PROCESS.iter().map(|name| process.join(name));
    for name in OF_PROC.iter().map(PathBuf::from).chain(of_process) {
        let at = proc.join(name);
        let shown = tree(&at)?;
        files.make(&at, Kind::of(&shown)?)?;
        attach(&shown, files.find(&at)?, "")?;
    }
    Ok(())
}

/// A copy of the mount at a path of the host with everything mounted in it, itself not mounted anywhere.
fn tree(path: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    Ok(open_tree(CWD, path, flags)?)
}

/// An empty directory, not mounted anywhere.
fn empty() -> io::Result<OwnedFd> {
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&tmpfs, "mode", "0755")?;
    fsconfig_create(&tmpfs)?;
    let flags = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, flags)?)
}

/// Mounts a tree that is not mounted anywhere at a path, or at the open directory or file itself.
fn attach(mounted: &OwnedFd, place: impl AsFd, path: &str) -> io::Result<()> {
    let mut flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    if path.is_empty() {
        flags |= MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    }
    Ok(move_mount(mounted, "", place, path, flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;
    use serde_json::{Value, json};
    use std::fs;
    use std::os::unix::fs::MetadataExt as _;
    use std::sync::mpsc::channel;
    use std::thread;

    /// The result of `work` on a thread that has entered the mount namespace of another one.
    fn within<T: Send + 'static>(thread: i32, work: impl FnOnce() -> T + Send + 'static) -> T {
        let joined = thread::spawn(move || {
            let namespace = fs::File::open(format!("/proc/self/task/{thread}/ns/mnt")).unwrap();
            unshare(CloneFlags::CLONE_FS).unwrap();
            nix::sched::setns(namespace, CloneFlags::CLONE_NEWNS).unwrap();
            work()
        });
        joined.join().unwrap()
    }

    fn bundle(dir: &Path, mounts: Value) -> Bundle {
        let root = json!({"path": "rootfs"});
        let spec = json!({"ociVersion": "1.0.2", "root": root, "mounts": mounts});
        Bundle {
            spec: serde_json::from_value(spec).unwrap(),
            directory: dir.into(),
            rootfs: dir.join("rootfs"),
            shared: Default::default(),
        }
    }

    #[test]
    fn mounts_of_the_guest_alone_have_no_source_on_the_host() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        fs::create_dir(&data).unwrap();
        let mounts = json!([
            {"destination": "/data", "type": "bind", "source": "data", "options": ["rbind", "ro"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/sys/x", "type": "bind", "source": "/sys/fs", "options": ["bind"]},
            {"destination": "/dev/null", "type": "bind", "source": "/dev/null", "options": ["bind"]},
        ]);
        let found = oci::mounts_on_host(&bundle(dir.path(), mounts)).unwrap();
        let all = found.iter().map(|mount| mount.source.as_deref());
        let all: Vec<_> = all.collect();
        assert_eq!(all, [Some(data.as_path()), None, None, None]);
        assert!(found[0].read_only && !found[1].read_only);
    }

    #[test]
    fn who_enters_the_namespace_finds_the_containers_files() {
        // Only root may mount.
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let rootfs = dir.path().join("rootfs");
        for made in [
            "rootfs/etc",
            "rootfs/data",
            "rootfs/tmp",
            "rootfs/proc",
            "data",
        ] {
            fs::create_dir_all(dir.path().join(made)).unwrap();
        }
        fs::write(dir.path().join("data/of-the-volume"), "v").unwrap();
        fs::write(rootfs.join("tmp/hidden"), "h").unwrap();
        let volume = dir.path().join("data");
        let mounts = json!([
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/tmp/within", "type": "devpts", "source": "devpts"},
            {"destination": "/data", "type": "bind", "source": volume, "options": ["ro", "rbind"]},
            {"destination": "/missing", "type": "bind", "source": volume, "options": ["rbind"]},
        ]);
        let bundle = bundle(dir.path(), mounts);
        let (sender, receiver) = channel();
        let (done, end) = channel::<()>();
        let host = fs::metadata("/").unwrap().ino();
        let shows = thread::spawn(move || {
            let shown = show_files_on_host(&bundle);
            assert_eq!(fs::metadata("/").unwrap().ino(), host, "its own root");
            sender.send((rustix::thread::gettid(), shown)).unwrap();
            end.recv().ok();
        });
        let (thread, shown) = receiver.recv().unwrap();
        shown.unwrap();
        let thread = thread.as_raw_nonzero().get();
        within(thread, move || {
            fs::write("/etc/copied", "c").unwrap();
            assert_eq!(fs::read_to_string("/data/of-the-volume").unwrap(), "v");
            for denied in ["/data/a", "/tmp/a", "/proc/a"] {
                let error = fs::write(denied, "").unwrap_err().raw_os_error();
                assert_eq!(error, Some(Errno::ROFS.raw_os_error()), "{denied}");
            }
            assert!(!Path::new("/tmp/hidden").exists() && !Path::new("/missing").exists());
            assert!(fs::read_dir("/tmp/within").unwrap().next().is_none());
            let numbers = fs::read_dir("/proc").unwrap().flatten();
            let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
            let own = std::process::id();
            assert_eq!(numbers.collect::<Vec<u32>>(), [own]);
            let status = fs::read_to_string(format!("/proc/{own}/status")).unwrap();
            assert!(status.starts_with("Name:"), "{status}");
            for way_out in ["root", "cwd", "exe", "fd", "task"] {
                assert!(!Path::new(&format!("/proc/{own}/{way_out}")).exists());
            }
        });
        assert_eq!(fs::read_to_string(rootfs.join("etc/copied")).unwrap(), "c");
        drop(done);
        shows.join().unwrap();
    }
}
