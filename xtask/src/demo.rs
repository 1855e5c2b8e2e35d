//! `cargo xtask demo`: from a fresh clone to a container in a virtual machine.

use crate::arch::{Arch, ArchArgs};
use crate::rig::Model;
use crate::{build, proc, rig};
use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::{Duration, Instant};

#[derive(clap::Args)]
pub(crate) struct DemoArgs {
    #[command(flatten)]
    arch: ArchArgs,
}

/// Builds everything, then runs `uname -a` in a busybox container.
pub(crate) fn run(args: &DemoArgs) -> Result<u8> {
    let started = Instant::now();
    let arch = args.arch.arch();
    let products = build::ensure_for(arch)?;
    let built = started.elapsed();

    let rootfs = arch.target("demo-rootfs");
    make_busybox_rootfs(arch, &rootfs)?;

    let script = format!(
        "export KOYA_LOG=koya=info; start=$(date +%s%N); koya run --rootfs {} -- uname -a; code=$?; end=$(date +%s%N); \
         echo \"koya run took $(( (end - start) / 1000000 )) ms\" >&2; exit $code",
        rootfs.display()
    );
    let command = ["/bin/sh".to_owned(), "-c".to_owned(), script];
    let env = products.env();
    println!("host:  {}", proc::output(Command::new("uname").arg("-a"))?);
    println!("guest:");
    let running = Instant::now();
    let code = if rig::hardware_kvm(arch) {
        let status = Command::new(&command[0])
            .args(&command[1..])
            .envs(env)
            .status()?;
        status.code().map_or(128, |c| c as u8)
    } else {
        let limits = rig::Limits {
            timeout: Duration::from_secs(300),
            memory_mib: 4096,
            cpus: 2,
        };
        rig::boot(arch, Model::default(), &command, &env, &limits)?
    };
    eprintln!(
        "building: {built:.1?}; starting the host, the guest and the container: {:.1?}",
        running.elapsed()
    );
    Ok(code)
}

/// A root file system with a static busybox and links for its applets.
pub(crate) fn make_busybox_rootfs(arch: Arch, rootfs: &std::path::Path) -> Result<()> {
    if rootfs.join("bin/sh").exists() {
        return Ok(());
    }
    for dir in ["bin", "etc", "proc", "sys", "dev", "tmp", "root", "var"] {
        fs::create_dir_all(rootfs.join(dir))?;
    }
    let busybox = rootfs.join("bin/busybox");
    fs::copy(rig::busybox(arch)?, &busybox).context("busybox-static is not installed")?;
    fs::write(rootfs.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    fs::write(rootfs.join("etc/group"), "root:x:0:\n")?;
    // The same version in Debian has the same applets on all architectures.
    for name in proc::output(Command::new("/bin/busybox").arg("--list"))?.lines() {
        let link = rootfs.join("bin").join(name);
        if !link.exists() {
            symlink("busybox", link)?;
        }
    }
    Ok(())
}
