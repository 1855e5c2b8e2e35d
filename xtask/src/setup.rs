//! The Debian packages and parts of Rust that builds and tests need.

use crate::proc;
use anyhow::{Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A package, and the reason why it is needed.
const PACKAGES: &[(&str, &str)] = &[
    ("gcc", "the guest kernel, linking"),
    ("make", "the guest kernel"),
    ("patch", "the guest kernel's changes"),
    ("flex", "the guest kernel's configuration"),
    ("bison", "the guest kernel's configuration"),
    ("bc", "the guest kernel"),
    ("libelf-dev", "the guest kernel's objtool"),
    ("xz-utils", "unpacking sources and modules"),
    ("zstd", "the bzImage"),
    ("kmod", "the rig's module dependencies"),
    ("linux-source-6.12", "the guest kernel's source"),
    ("libseccomp-dev", "the agent's seccomp filters"),
    (
        "qemu-system-x86",
        "the libraries and firmware of the rig's QEMU",
    ),
    ("busybox-static", "the rig's init and the demo's container"),
    ("e2fsprogs", "the rig's scratch disk"),
    ("dmsetup", "the tests' disks that fail"),
    ("erofs-utils", "the tests' image of a root file system"),
    ("squashfs-tools", "the tests' images of squashfs"),
    ("iptables", "the tests' packet filters"),
    ("debootstrap", "the tests' Debian root file system"),
    ("iproute2", "the tests' networks"),
    ("socat", "the tests' tap that a program serves"),
    ("passt", "networks without root (`koya run --net user`)"),
    (
        "protobuf-compiler",
        "the tests' client of Kubernetes' interface",
    ),
    ("apparmor", "the tests' profiles"),
    ("runc", "what the tests compare `koya-runtime` with"),
    ("crun", "the same"),
    ("podman", "the tests' client of `koya-runtime`"),
    ("conmon", "the same: what creates podman's containers"),
    ("catatonit", "the same: the init of its pods"),
    ("netavark", "the same: its networks"),
    ("aardvark-dns", "the same: names in its networks"),
    ("slirp4netns", "the same: networks without root"),
    ("uidmap", "the same: users without root"),
    ("umoci", "the tests' other unpacker of images"),
    ("containernetworking-plugins", "the tests' pods' networks"),
    ("iptables", "the tests' Docker"),
    ("stress-ng", "the tests' file-system load"),
    ("strace", "the tests whose system calls fail"),
    (
        "golang-github-containers-common",
        "the tests' seccomp profile",
    ),
];

/// Installs missing packages if root; otherwise prints the command.
pub(crate) fn run() -> Result<()> {
    let missing = missing(PACKAGES)?;
    if missing.is_empty() {
        eprintln!("setup: every package is there");
        return Ok(());
    }
    install(PACKAGES, &missing)
}

/// As [`run`], but silent if nothing is missing: the first step of other commands.
pub(crate) fn ensure() -> Result<()> {
    ensure_these(PACKAGES)
}

/// As [`ensure`], for packages needed by one command, each with the reason.
pub(crate) fn ensure_these(packages: &[(&'static str, &str)]) -> Result<()> {
    let missing = missing(packages)?;
    if missing.is_empty() {
        return Ok(());
    }
    install(packages, &missing)
}

/// Whether the Rust standard library for `target` is installed; otherwise installs it with rustup, and prints the reason.
pub(crate) fn rust_target(target: &str, why: &str) -> bool {
    let there = Command::new("rustc")
        .args(["--print", "target-libdir", "--target", target])
        .stderr(Stdio::null())
        .output()
        .is_ok_and(|out| Path::new(String::from_utf8_lossy(&out.stdout).trim()).is_dir());
    if there {
        return true;
    }
    eprintln!("setup: getting Rust's library for {target} ({why})");
    // A few seconds of downloads; without a network, rustup would retry for a long time.
    let got = Command::new("timeout")
        .args(["120", "rustup", "target", "add", target])
        .status();
    got.is_ok_and(|status| status.success())
}

/// Makes apt fetch its package lists if there are none, as in images without them.
pub(crate) fn package_lists() -> Result<()> {
    let there = std::fs::read_dir("/var/lib/apt/lists").is_ok_and(|lists| {
        lists
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .any(|name| name.contains("_Packages"))
    });
    if there {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        bail!("apt has no lists of packages; as root: apt-get update");
    }
    let log = log();
    update(&log)?;
    Ok(std::fs::remove_file(&log)?)
}

fn log() -> PathBuf {
    std::env::temp_dir().join(format!("koya-setup-{}.log", std::process::id()))
}

fn update(log: &Path) -> Result<()> {
    let mut apt = Command::new("apt-get");
    proc::long("apt-get update", apt.args(["-q", "update"]), log)
}

fn missing(packages: &[(&'static str, &str)]) -> Result<Vec<&'static str>> {
    let mut missing = Vec::new();
    for (package, _) in packages {
        let out = Command::new("dpkg-query")
            .args(["-W", "-f=${db:Status-Status}", package])
            .stderr(Stdio::null())
            .output();
        match out {
            Ok(out) if out.stdout == b"installed" => {}
            Ok(_) => missing.push(*package),
            Err(error) => bail!("cannot run dpkg-query (Koya's builds expect Debian 12): {error}"),
        }
    }
    Ok(missing)
}

fn install(packages: &[(&str, &str)], missing: &[&str]) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!(
            "packages are missing; as root: apt-get update && apt-get install --no-install-recommends {}",
            missing.join(" ")
        );
    }
    for (package, why) in packages.iter().filter(|(p, _)| missing.contains(p)) {
        eprintln!("setup: {package} is missing ({why})");
    }
    let log = log();
    update(&log)?;
    proc::long(
        "apt-get install",
        Command::new("apt-get")
            .args(["-q", "-y", "install", "--no-install-recommends"])
            .args(missing)
            .env("DEBIAN_FRONTEND", "noninteractive"),
        &log,
    )?;
    std::fs::remove_file(&log).ok();
    Ok(())
}
