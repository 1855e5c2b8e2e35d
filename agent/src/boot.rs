//! The start of the guest, as an ordered list of steps.

use anyhow::{Context, Result};
use koya_protocol::messages::{GuestMark, GuestTimes};
use koya_protocol::{MAX_OPEN_FILES, SHARED_DIR, SHARED_TAG};
use rustix::fs::{CWD, FileType, Mode, mknodat, symlink};
use rustix::mount::{MountFlags, mount, mount_bind, mount_move};
use rustix::process::{Resource, Rlimit, setrlimit};
use std::fs;
use std::path::Path;

/// Default limit of open files of a process: that of containerd.
const NOFILE: u64 = 1 << 20;

/// Maximum number of memory mappings of a process: databases and JVMs refuse to start with the kernel's 65530, and ask for a
/// higher setting on the host (Elasticsearch requires 262144; this is the value of Fedora and Ubuntu).
const MAX_MAP_COUNT: &str = "1048576";

/// Maximum number of open files in the guest: no limit, as set by systemd. The kernel's follows from the size of the guest, and
/// a process of a user in a small one would reach it at a fiftieth of its own limit.
const FILE_MAX: &str = "9223372036854775807";

/// Everything before connecting to the host.
pub(crate) fn set_up(times: &mut GuestTimes) -> Result<()> {
    leave_rootfs().context("cannot leave the initial root file system")?;
    mount_kernel_file_systems()?;
    mark(times, "file systems mounted");
    enable_cgroup_controllers()?;
    crate::cgroup::set_up().context("cannot make the containers' control group")?;
    mark(times, "control groups ready");
    raise_limits()?;
    fs::write("/proc/sys/vm/max_map_count", MAX_MAP_COUNT)
        .context("cannot set vm.max_map_count")?;
    fs::write("/proc/sys/fs/file-max", FILE_MAX).context("cannot set fs.file-max")?;
    fs::write("/proc/sys/fs/nr_open", MAX_OPEN_FILES.to_string())
        .context("cannot set fs.nr_open")?;
    crate::sys::bring_up_loopback().context("cannot bring up the loopback interface")?;
    mount_shares()?;
    mark(times, "shares mounted");
    Ok(())
}

/// Records a completed step, to be sent with the first reply; takes nanoseconds.
fn mark(times: &mut GuestTimes, name: &str) {
    times.marks.push(GuestMark {
        name: name.into(),
        at_ns: crate::details::uptime_ns(),
        ..Default::default()
    });
}

/// Containers use pivot_root(2), which is not possible from the kernel's initial root. It is possible from a bind mount of
/// it, moved over it.
fn leave_rootfs() -> Result<()> {
    fs::create_dir_all("/root")?;
    mount_bind("/", "/root")?;
    std::env::set_current_dir("/root")?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    std::env::set_current_dir("/")?;
    Ok(())
}

fn mount_kernel_file_systems() -> Result<()> {
    let plain = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let noexec = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount_at("proc", "/proc", "proc", plain, "")?;
    mount_at("sysfs", "/sys", "sysfs", plain, "")?;
    mount_at("devtmpfs", "/dev", "devtmpfs", noexec, "mode=0755")?;
    mount_at(
        "devpts",
        "/dev/pts",
        "devpts",
        noexec,
        "mode=0620,gid=5,ptmxmode=0666",
    )?;
    mount_at("shm", "/dev/shm", "tmpfs", plain, "mode=1777")?;
    mount_at(
        "run",
        "/run",
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        "mode=0755",
    )?;
    mount_at("cgroup2", "/sys/fs/cgroup", "cgroup2", plain, "")?;
    fs::create_dir_all("/tmp")?;
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        symlink(target, link).ok();
    }
    if !Path::new("/dev/null").exists() {
        let mode = Mode::from_raw_mode(0o666);
        mknodat(
            CWD,
            "/dev/null",
            FileType::CharacterDevice,
            mode,
            rustix::fs::makedev(1, 3),
        )?;
    }
    Ok(())
}

fn mount_at(source: &str, target: &str, kind: &str, flags: MountFlags, data: &str) -> Result<()> {
    fs::create_dir_all(target)?;
    let data = std::ffi::CString::new(data)?;
    mount(source, target, kind, flags, data.as_c_str())
        .with_context(|| format!("cannot mount {kind} at {target}"))
}

/// Containers have limits only for controllers that the root group enables.
fn enable_cgroup_controllers() -> Result<()> {
    let available = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")?;
    for controller in available.split_whitespace() {
        fs::write(
            "/sys/fs/cgroup/cgroup.subtree_control",
            format!("+{controller}"),
        )
        .with_context(|| format!("cannot enable the cgroup controller {controller}"))?;
    }
    Ok(())
}

/// The kernel derives the limits of PID 1 from the size of the guest: by default, a user would have at most 993 processes in
/// a small one. Containers are bounded by control groups instead.
fn raise_limits() -> Result<()> {
    let both = |most| Rlimit {
        current: most,
        maximum: most,
    };
    setrlimit(Resource::Nproc, both(None)).context("cannot set the limit of processes")?;
    setrlimit(Resource::Nofile, both(Some(NOFILE))).context("cannot set the limit of files")
}

fn mount_shares() -> Result<()> {
    mount_at(SHARED_TAG, SHARED_DIR, "virtiofs", MountFlags::empty(), "")
}
