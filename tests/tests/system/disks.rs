//! virtio-blk: disks of the host in containers.

use crate::tool::{run_in, scratch, stdout};
use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

crate::trials![
    a_disk_holds_a_file_system,
    a_read_only_disk_stays_as_it_is,
    what_is_discarded_is_given_back,
    a_disk_is_for_one_writer,
];

fn image(dir: &Path, mib: u64) -> Result<PathBuf> {
    let path = dir.join("disk.img");
    File::create(&path)?.set_len(mib << 20)?;
    Ok(path)
}

/// A script with this machine's tools, and these disks.
fn with_disks(options: &[&str], disks: &[&str], script: &str) -> Result<String> {
    let mut all = vec!["--read-only", "--tmpfs", "/mnt", "--tmpfs", "/tmp"];
    all.extend(disks.iter().flat_map(|disk| ["--disk", disk]));
    all.extend(options);
    stdout(run_in(Path::new("/"), &all, &["sh", "-ec", script])?)
}

fn a_disk_holds_a_file_system() -> Result<()> {
    let dir = scratch("disk-ext4")?;
    let path = image(&dir, 96)?;
    let disk = path.to_str().context("a path in UTF-8")?;
    let said = with_disks(
        &["--cap-add", "sys_admin", "--cpus", "2"],
        &[disk],
        "mkfs.ext4 -q /dev/vda; mkdir /mnt/d; mount /dev/vda /mnt/d; cd /mnt/d
         for n in 1 2 3 4; do head -c 8000000 /dev/urandom > file$n & done; wait
         dd if=/dev/zero of=direct bs=4k count=100 oflag=direct 2> /dev/null
         sha256sum file* direct; cd /; umount /mnt/d; e2fsck -fn /dev/vda > /dev/null 2>&1; echo clean",
    )?;
    ensure!(
        said.lines().count() == 6 && said.ends_with("clean"),
        "{said}"
    );
    // The host sees the same files.
    let check = Command::new("/sbin/e2fsck")
        .arg("-fn")
        .arg(&path)
        .output()?;
    ensure!(check.status.success(), "{check:?}");
    // And another sandbox reads the same bytes.
    let again = with_disks(
        &["--cap-add", "sys_admin"],
        &[&format!("{disk}:ro")],
        "mkdir /mnt/d; mount -o ro,noload /dev/vda /mnt/d; cd /mnt/d; sha256sum file* direct; echo clean",
    )?;
    ensure!(again == said, "{again}\n---\n{said}");
    Ok(())
}

fn a_read_only_disk_stays_as_it_is() -> Result<()> {
    let dir = scratch("disk-ro")?;
    let path = image(&dir, 4)?;
    let disk = format!("{}:ro", path.display());
    let said = with_disks(
        &[],
        &[&disk],
        "cat /sys/block/vda/ro /sys/block/vda/size; if dd if=/dev/zero of=/dev/vda count=1 2> /dev/null; then echo written; fi
         if echo x 2> /dev/null > /dev/vda; then echo written; fi; head -c 4 /dev/vda | od -An -tx1",
    )?;
    let lines: Vec<&str> = said.lines().map(str::trim).collect();
    ensure!(lines == ["1", "8192", "00 00 00 00"], "{said}");
    Ok(())
}

fn what_is_discarded_is_given_back() -> Result<()> {
    let dir = scratch("disk-discard")?;
    let path = image(&dir, 32)?;
    let disk = path.to_str().context("a path in UTF-8")?;
    with_disks(
        &[],
        &[disk],
        "head -c 33554432 /dev/urandom > /dev/vda; sync",
    )?;
    let full = path.metadata()?.blocks();
    with_disks(
        &[],
        &[disk],
        "blkdiscard -o 0 -l 16777216 /dev/vda; blkdiscard -z -o 16777216 -l 8388608 /dev/vda
         test $(head -c 25165824 /dev/vda | tr -d '\\0' | wc -c) = 0
         test $(tail -c 8388608 /dev/vda | tr -d '\\0' | wc -c) != 0",
    )?;
    let left = path.metadata()?.blocks();
    ensure!(full >= 65536 && left <= 33000, "{full} blocks, then {left}");
    Ok(())
}

fn a_disk_is_for_one_writer() -> Result<()> {
    let dir = scratch("disk-lock")?;
    let path = image(&dir, 4)?;
    let disk = path.to_str().context("a path in UTF-8")?;
    let held = File::open(&path)?;
    held.lock_shared()?;
    let output = run_in(Path::new("/"), &["--disk", disk], &["true"])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(125), "{output:?}");
    ensure!(said.contains(disk) && said.contains("in use"), "{said}");
    let missing = run_in(Path::new("/"), &["--disk", "/nonexistent"], &["true"])?;
    let said = String::from_utf8_lossy(&missing.stderr).into_owned();
    ensure!(
        said.contains("/nonexistent") && said.lines().count() == 1,
        "{said}"
    );
    Ok(())
}
