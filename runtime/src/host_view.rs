//! A container's files for tools of the host that enter the mount namespace of the container's process.
//!
//! `podman cp` reaches the files of a running container in this way, as does nsenter(1). The process on the host is not the
//! container's, so such a tool would read and write files of the host instead. Therefore that process (a thread of it) gets
//! a mount namespace with the container's root mounted over `/`. Whoever enters it starts at the topmost mount of `/`.
//!
//! `nerdctl cp` and others use `/proc/PID/root` instead. Therefore the thread's root directory is the container's, too: it has
//! to leave work with files of the host to other threads.
//!
//! Mounts that only the guest has are empty and read-only here: a file copied there would not appear in the container.

use crate::oci::{self, OnHost};
use crate::{Bundle, Error};
use koya_rootfs::{Kind, Rootfs, make_read_only};
use koya_vmm::devices::fs::{ShareOptions, protect_mount};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount,
    open_tree,
};
use rustix::process::{chroot, fchdir};
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Files of the host's `/proc` that tools need for a list of the container's processes.
const OF_PROC: [&str; 2] = ["stat", "uptime"];

/// And those of this process. Not `root`, `cwd`, `fd` and others that lead to files of the host: a tool would follow a link
/// of the container to them.
const OF_PROCESS: [&str; 8] = [
    "attr", "cgroup", "cmdline", "gid_map", "ns", "stat", "status", "uid_map",
];

/// A mount namespace with a container's files. The thread that made it is in it until it drops this, and has an empty root
/// directory then.
#[derive(Debug)]
#[must_use = "the files are shown until this is dropped"]
pub struct HostView {
    before: File,
    /// Namespaces and root directories are per thread.
    thread: PhantomData<*const ()>,
}

impl HostView {
    /// Moves the calling thread into a mount namespace of its own, where the container's root is its root directory: so it is
    /// for whoever enters it by `/proc/TID/ns/mnt`, or uses `/proc/TID/root`. The container's mount points must exist. If
    /// its files can't be shown, the log says why, and the namespace has no files: tools must not find the host's instead.
    ///
    /// # Errors
    /// If the calling thread may not have a mount namespace, or it can't be changed. The host's files are shown then.
    pub fn enter(bundle: &Bundle) -> io::Result<Self> {
        let before = File::open("/proc/thread-self/ns/mnt")?;
        unshare(CloneFlags::CLONE_NEWNS)?;
        let view = Self {
            before,
            thread: PhantomData,
        };
        // Later mounts of the host appear here, but not vice versa.
        let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        mount_change("/", flags)?;
        if let Err(error) = show(bundle) {
            log::warn!("tools of the host (podman cp, nsenter) find no files: {error}");
            let nothing = empty()?;
            attach(&nothing, CWD, "/")?;
            make_read_only(&nothing)?;
            enter_root(&nothing)?;
        }
        Ok(view)
    }
}

impl Drop for HostView {
    fn drop(&mut self) {
        // The mounts are gone when this returns: what they are of can be unmounted.
        let left = setns(&self.before, CloneFlags::CLONE_NEWNS).map_err(io::Error::from);
        // Tools that still use the PID must not find the host's files instead.
        let left = left.and_then(|()| enter_root(&empty()?));
        if let Err(error) = left {
            log::warn!("cannot leave the mount namespace with the container's files: {error}");
        }
    }
}

/// Makes the container's files those of the mount namespace, and its root that of the calling thread.
fn show(bundle: &Bundle) -> Result<(), Error> {
    let mounts = oci::mounts_on_host(bundle)?;
    let root = bundle.spec.root().as_ref();
    let is_read_only = root.and_then(|root| root.readonly()).unwrap_or(false);
    let shown = show_mounts(&bundle.rootfs, is_read_only, &mounts);
    shown.map_err(Error::invalid_by(
        "mounts",
        "the container's files can't be shown on the host",
    ))
}

fn show_mounts(rootfs: &Path, is_read_only: bool, mounts: &[OnHost]) -> io::Result<()> {
    let options = ShareOptions {
        read_only: is_read_only,
        ..ShareOptions::default()
    };
    let root = tree(rootfs, &options)?;
    attach(&root, CWD, "/")?;
    let files = Rootfs::of(root);
    let mut covers: Vec<(&Path, OwnedFd)> = Vec::new();
    for mount in mounts {
        let is_covered = covers.iter().any(|(at, _)| mount.at.starts_with(at));
        let copied = |path| tree(path, &mount.options);
        let source = mount.source.as_deref().map(copied).transpose()?;
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
    enter_root(&files.find(Path::new("/"))?)
}

/// Makes a directory the root directory of the calling thread, which has one of its own.
fn enter_root(directory: &OwnedFd) -> io::Result<()> {
    fchdir(directory)?;
    Ok(chroot(".")?)
}

/// Shows this process, which stands for the container on the host, in a cover of `/proc`: the only one in a list of the
/// container's processes.
fn show_process(files: &Rootfs, proc: &Path) -> io::Result<()> {
    // By its number in that file system, which may be another one than in its own pid namespace.
    let process = std::fs::read_link(proc.join("self"))?;
    let of_process = OF_PROCESS.iter().map(|name| process.join(name));
    for name in OF_PROC.iter().map(PathBuf::from).chain(of_process) {
        let at = proc.join(name);
        // Some depend on the configuration of the host's kernel.
        if !at.exists() {
            continue;
        }
        let shown = copy(&at, false)?;
        files.make(&at, Kind::of(&shown)?)?;
        attach(&shown, files.find(&at)?, "")?;
    }
    Ok(())
}

/// A copy of the mounts at a path of the host, as the container has them, itself not mounted anywhere. Device nodes, which a
/// guest may have made, are not those of the host.
fn tree(path: &Path, options: &ShareOptions) -> io::Result<OwnedFd> {
    let copied = copy(path, !options.omit_mounts)?;
    match protect_mount(copied.as_fd(), options) {
        // Before Linux 5.12.
        Err(error) if error.kind() == io::ErrorKind::Unsupported && !options.read_only => {}
        protected => protected?,
    }
    Ok(copied)
}

fn copy(path: &Path, is_recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, is_recursive);
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
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/dev/null", "type": "bind", "source": "/dev/null", "options": ["bind"]},
        ]);
        let found = oci::mounts_on_host(&bundle(dir.path(), mounts)).unwrap();
        let all = found.iter().map(|mount| mount.source.as_deref());
        let all: Vec<_> = all.collect();
        assert_eq!(all, [Some(data.as_path()), None, None, None, None]);
        assert!(found[0].options.read_only && !found[1].options.read_only);
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
        let shows = thread::spawn(move || {
            let view = HostView::enter(&bundle).unwrap();
            assert!(fs::exists("/data/of-the-volume").unwrap(), "its own root");
            sender.send(rustix::thread::gettid()).unwrap();
            end.recv().ok();
            drop(view);
            assert_eq!(fs::read_dir("/").unwrap().count(), 0, "files of the host");
        });
        let thread = receiver.recv().unwrap().as_raw_nonzero().get();
        let root = format!("/proc/{thread}/root");
        let volume = fs::read_to_string(format!("{root}/data/of-the-volume"));
        assert_eq!(volume.unwrap(), "v");
        let above = fs::metadata(format!("{root}/..")).unwrap().ino();
        assert_eq!(above, fs::metadata(&root).unwrap().ino());
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

    #[test]
    fn files_that_cannot_be_shown_are_not_those_of_the_host() {
        // Only root may mount.
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        // There is no root.
        let bundle = bundle(dir.path(), json!([]));
        let shows = thread::spawn(move || {
            let view = HostView::enter(&bundle).unwrap();
            let found = fs::read_dir("/").unwrap().count();
            let error = fs::write("/a", "").unwrap_err().raw_os_error();
            drop(view);
            (found, error)
        });
        let read_only = Some(Errno::ROFS.raw_os_error());
        assert_eq!(shows.join().unwrap(), (0, read_only));
    }

    #[test]
    fn mounts_below_a_volume_are_those_of_the_container() {
        // Only root may mount.
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        for made in ["rootfs/plain", "rootfs/whole", "data/below"] {
            fs::create_dir_all(dir.path().join(made)).unwrap();
        }
        let volume = dir.path().join("data");
        let mounts = json!([
            {"destination": "/plain", "type": "bind", "source": volume, "options": ["bind"]},
            {"destination": "/whole", "type": "bind", "source": volume, "options": ["rbind", "ro"]},
        ]);
        let bundle = bundle(dir.path(), mounts);
        let shows = thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            mount_change("/", private).unwrap();
            let below = volume.join("below");
            attach(&empty().unwrap(), CWD, below.to_str().unwrap()).unwrap();
            fs::write(below.join("mounted"), "").unwrap();
            let view = HostView::enter(&bundle).unwrap();
            let found = ["/plain/below/mounted", "/whole/below/mounted"].map(|path| {
                let written = fs::write(path.replace("mounted", "new"), "");
                let error = written.err().and_then(|error| error.raw_os_error());
                (fs::exists(path).unwrap(), error)
            });
            drop(view);
            found
        });
        let read_only = Some(Errno::ROFS.raw_os_error());
        assert_eq!(shows.join().unwrap(), [(false, None), (true, read_only)]);
        assert!(
            dir.path().join("data/below/new").exists(),
            "below the mount"
        );
    }
}
