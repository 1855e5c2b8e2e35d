//! `cargo xtask deb --try`: trial of the package on a new Debian, from installation to purge.

use crate::arch::Arch;
use crate::{bats, cache, demo, proc, setup, suite};
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A release whose Docker (26) runs containers by shims of containerd.
const SUITE: &str = "trixie";

/// Packages beyond the minimal system.
const INCLUDE: &str = "--include=ca-certificates,docker-cli,docker.io,iptables,perl-base";

/// Packages that Koya's depends on or recommends, downloaded in advance since a rig has no internet access.
const NEEDS: [&str; 2] = ["e2fsprogs", "passt"];

/// Script that runs in the rig.
const TRY: &str = include_str!("deb-try.sh");

/// Tries a package for this machine's architecture in a rig.
pub(crate) fn run(package: &Path) -> Result<()> {
    let debian = debian()?;
    let work = proc::checkout().join("target/deb");
    let rootfs = work.join("busybox");
    if !rootfs.exists() {
        demo::make_busybox_rootfs(Arch::of_this_machine(), &rootfs)?;
    }
    let busybox = work.join("busybox.tar");
    bats::pack(&rootfs, &busybox)?;
    let mut rig = Command::new(std::env::current_exe()?);
    rig.args(["rig", "--no-build", "--cpus", "1", "--timeout", "3600"]);
    rig.args(["--", "sh", "-c", TRY, "sh"]);
    let ended = rig.args([&debian, package, &busybox]).status()?;
    if !ended.success() {
        bail!("the package does not work on Debian {SUITE}");
    }
    Ok(())
}

/// Tar archive of a Debian with Docker and without Koya, created once.
fn debian() -> Result<PathBuf> {
    setup::ensure_these(&[("debootstrap", "makes a Debian to install on")])?;
    let key = cache::key([&[SUITE, INCLUDE], &NEEDS[..]].concat());
    let dir = cache::ensure("debian-docker", &key, |dir| {
        let root = dir.join("root");
        let log = dir.with_extension("log");
        suite::debootstrap(Arch::of_this_machine(), SUITE, INCLUDE, &root, &log)?;
        // The cache of the installation is cleaned first, so that it holds only the packages that Koya needs.
        for words in [
            &["clean"][..],
            &["update"],
            &[&["install", "--download-only", "-y"], &NEEDS[..]].concat(),
        ] {
            let mut apt = Command::new("chroot");
            apt.arg(&root).args(["apt-get", "-q"]).args(words);
            proc::long("downloading what Koya needs (once)", &mut apt, &log)?;
        }
        let tar = File::create(dir.join("root.tar"))?;
        let mut pack = Command::new("tar");
        pack.args(["-c", "."]).current_dir(&root).stdout(tar);
        proc::run(&mut pack)?;
        fs::remove_dir_all(&root).context("cannot remove the packed directory")
    })?;
    Ok(dir.join("root.tar"))
}
