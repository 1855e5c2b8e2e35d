//! The kubelet's volumes for a pod, over the real containerd.

use crate::daemon::Containerd;
use crate::pod::Pod;
use crate::tool::{koya, stdout, until};
use anyhow::{Result, ensure};
use koya_test_cri::{Cri, v1};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

/// A directory in the kubelet's format for a ConfigMap: files are read through a link that is replaced.
fn write_config(dir: &Path, version: &str) -> Result<()> {
    let versioned = dir.join(format!("..{version}"));
    fs::create_dir_all(&versioned)?;
    fs::write(versioned.join("key"), version)?;
    symlink(format!("..{version}"), dir.join("..data_tmp"))?;
    fs::rename(dir.join("..data_tmp"), dir.join("..data"))?;
    if !dir.join("key").exists() {
        symlink("..data/key", dir.join("key"))?;
    }
    Ok(())
}

pub(crate) fn volumes_of_every_kind(containerd: &Containerd) -> Result<()> {
    let kubelet = containerd.dir.join("kubelet");
    let (config, disk) = (kubelet.join("config"), kubelet.join("disk"));
    let memory = kubelet.join("volumes/kubernetes.io~empty-dir/memory");
    let part = kubelet.join("volume-subpaths/memory/two/0");
    // The kubelet creates directories of volumes (subPath) before they are used.
    for dir in [&config, &disk.join("sub"), &memory, &part] {
        fs::create_dir_all(dir)?;
    }
    write_config(&config, "one")?;
    let mount =
        |words: &[&str], at: &Path| stdout(Command::new("mount").args(words).arg(at).output()?);
    mount(
        &["-t", "tmpfs", "-o", "size=1m,mode=0777", "tmpfs"],
        &memory,
    )?;
    fs::create_dir(memory.join("part"))?;
    mount(&["--bind", &memory.join("part").to_string_lossy()], &part)?;
    let image = kubelet.join("image");
    fs::File::create(&image)?.set_len(8 << 20)?;
    let device = stdout(
        Command::new("losetup")
            .args(["-f", "--show"])
            .arg(&image)
            .output()?,
    )?;

    // A marker path for a file system on the guest's own disk.
    let (direct, own) = (kubelet.join("direct"), kubelet.join("own.ext4"));
    fs::create_dir_all(&direct)?;
    fs::File::create(&own)?.set_len(16 << 20)?;
    stdout(
        Command::new("/sbin/mkfs.ext4")
            .arg("-q")
            .arg(&own)
            .output()?,
    )?;
    stdout(koya(["volume", "add"]).arg(&direct).arg(&own).output()?)?;
    let listed = stdout(koya(["volume", "ls"]).output()?)?;
    ensure!(listed.contains(&*own.to_string_lossy()), "{listed}");

    let cri = Cri::connect(&containerd.socket())?;
    let pod = Pod::start(&cri, containerd, "volumes", |_| {})?;
    let bind = |host: &Path, at: &str, readonly: bool| v1::Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: at.into(),
        readonly,
        ..Default::default()
    };
    let one = pod.run("one", &["sleep", "1000"], |all| {
        all.mounts = vec![
            bind(&config, "/config", true),
            bind(&disk, "/disk", false),
            bind(&memory, "/memory", false),
            bind(&direct, "/direct", false),
        ];
        all.devices = vec![v1::Device {
            container_path: "/dev/block".into(),
            host_path: device.clone(),
            permissions: "rwm".into(),
        }];
    })?;
    let two = pod.run("two", &["sleep", "1000"], |all| {
        all.mounts = vec![
            bind(&disk.join("sub"), "/sub", false),
            bind(&part, "/part", false),
            bind(&memory, "/dev/shm", false),
            bind(&direct, "/direct", false),
        ];
    })?;
    // Changes by the host are visible.
    ensure!(pod.exec(&one, "cat /config/key")? == "one");
    write_config(&config, "two")?;
    until("the new version", || {
        Ok((pod.exec(&one, "cat /config/key")? == "two").then_some(()))
    })?;
    ensure!(
        pod.exec(&one, "touch /config/x 2>&1 || echo refused")?
            .ends_with("refused")
    );
    // On the host's disk, with a subdirectory in another container.
    pod.exec(&one, "echo shared > /disk/sub/file")?;
    ensure!(pod.exec(&two, "cat /sub/file")? == "shared");
    ensure!(fs::read_to_string(disk.join("sub/file"))? == "shared\n");
    // In the guest's memory: shared, and within its size limit.
    pod.exec(&one, "echo fast > /memory/part/file")?;
    ensure!(pod.exec(&two, "cat /part/file /dev/shm/part/file")? == "fast\nfast");
    let size = pod.exec(&two, "df -k /dev/shm | awk 'END { print $2 }'")?;
    ensure!(size == "1024", "/dev/shm has {size} KiB");
    ensure!(
        !memory.join("part/file").exists(),
        "it is in the host's memory"
    );
    let full = pod.exec(&one, "head -c 2m /dev/zero > /memory/x; wc -c < /memory/x")?;
    let bytes = full
        .lines()
        .last()
        .and_then(|line| line.trim().parse::<u64>().ok());
    ensure!(bytes.is_some_and(|bytes| bytes <= 1 << 20), "{full}");
    let mode = pod.exec(&one, "stat -c %a /memory")?;
    ensure!(mode == "777" || mode == "1777", "{mode}");
    // A block device.
    pod.exec(&one, "echo block data > /dev/block; sync")?;
    ensure!(pod.exec(&one, "head -n 1 /dev/block")? == "block data");
    // The guest's own file system, on a single disk for both.
    ensure!(
        pod.exec(&one, "grep ' /direct ' /proc/mounts")?
            .contains("ext4")
    );
    pod.exec(&one, "echo its own > /direct/file; sync")?;
    ensure!(pod.exec(&two, "cat /direct/file")? == "its own");
    ensure!(fs::read_dir(&direct)?.next().is_none(), "it is on the host");
    cri.stop(&two, 0)?;
    cri.remove(&two)?;
    ensure!(pod.exec(&one, "cat /direct/file")? == "its own");
    pod.remove()?;
    stdout(koya(["volume", "rm"]).arg(&direct).output()?)?;
    let looked = Command::new("/sbin/debugfs")
        .args(["-R", "cat /file"])
        .arg(&own)
        .output()?;
    ensure!(stdout(looked)? == "its own");
    stdout(Command::new("/sbin/e2fsck").arg("-fn").arg(&own).output()?)?;
    ensure!(fs::read(&image)?.starts_with(b"block data\n"));
    stdout(Command::new("losetup").args(["-d", &device]).output()?)?;
    for at in [&part, &memory] {
        stdout(Command::new("umount").arg(at).output()?)?;
    }
    containerd.nothing_is_left()
}
