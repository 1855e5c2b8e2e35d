//! virtio-blk: disks of the host in containers.

use crate::tool::{Background, koya, run_in, scratch, stdout};
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
    an_image_is_a_root,
    disks_come_and_go_while_a_container_runs,
    a_block_volume_is_a_containers_own,
];

fn image(dir: &Path, mib: u64) -> Result<PathBuf> {
    let path = dir.join("disk.img");
    File::create(&path)?.set_len(mib << 20)?;
    Ok(path)
}

/// Runs a script with this machine's tools and these disks.
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
    // Another sandbox reads the same bytes.
    let again = with_disks(
        &["--cap-add", "sys_admin"],
        &[&format!("{disk}:ro")],
        "mkdir /mnt/d; mount -o ro,noload /dev/vda /mnt/d; cd /mnt/d; sha256sum file* direct; echo clean",
    )?;
    ensure!(again == said, "{again}\n---\n{said}");
    Ok(())
}

fn a_block_volume_is_a_containers_own() -> Result<()> {
    let dir = scratch("block-volume")?;
    let file = dir.join("kept.img");
    // overlayfs accepts it as its upper layer, unlike virtio-fs.
    let kept = format!("/srv:size=1g,file={}", file.display());
    let volumes = ["--block-volume", "/mnt:size=2g", "--block-volume", &kept];
    let options = [&["--privileged", "--read-only"][..], &volumes].concat();
    let said = stdout(run_in(
        Path::new("/"),
        &options,
        &[
            "sh",
            "-ec",
            "mkdir -p /mnt/u /mnt/w /mnt/m; mount -t overlay -o lowerdir=/etc,upperdir=/mnt/u,workdir=/mnt/w none /mnt/m
             echo mine > /mnt/m/passwd; head -n 1 /mnt/u/passwd; cp /mnt/u/passwd /srv/
             head -c 40000000 /dev/urandom > /mnt/big; sync; rm /mnt/big
             stat -f -c %T /mnt; df -k --output=size /mnt | tail -n 1",
        ],
    )?)?;
    let lines: Vec<_> = said.lines().collect();
    let size: u64 = lines[2].trim().parse()?;
    ensure!(
        lines[..2] == ["mine", "ext2/ext3"] && (1_900_000..2 << 20).contains(&size),
        "{said}"
    );
    // The persistent data is there in the next container, the rest is gone, and the file is sparse.
    let again = stdout(run_in(
        Path::new("/"),
        &options,
        &["sh", "-c", "cat /srv/passwd; ls /mnt"],
    )?)?;
    ensure!(again.trim() == "mine\nlost+found", "{again}");
    let taken = file.metadata()?.blocks() * 512;
    ensure!(taken < 32 << 20, "{taken} bytes");
    let here = std::fs::read_dir(&dir)?.count();
    ensure!(here == 1, "{here} files");
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

fn disks_come_and_go_while_a_container_runs() -> Result<()> {
    let name = "disk-hot";
    let dir = scratch(name)?;
    let options = ["--read-only", "--tmpfs", "/mnt", "--cap-add", "sys_admin"];
    let mut run = koya(["run", "-d", "--name", name, "--rootfs", "/"]);
    run.args(options).args(["--", "sleep", "1000"]);
    stdout(run.output()?)?;
    let container = Background { name: name.into() };
    let exec =
        |script: &str| -> Result<String> { stdout(container.exec(&[], &["sh", "-ec", script])?) };
    let disk = |arguments: &[&str]| koya(["disk"]).args(arguments).output();
    let mut images = Vec::new();
    for (n, mib) in [16, 24].into_iter().enumerate() {
        let path = dir.join(format!("{n}.img"));
        File::create(&path)?.set_len(mib << 20)?;
        images.push(path.to_str().context("a path in UTF-8")?.to_owned());
    }
    // Twice: a used slot is reusable.
    for round in ["first", "second"] {
        ensure!(stdout(disk(&["attach", name, &images[0]])?)? == "/dev/vda");
        ensure!(stdout(disk(&["attach", name, &images[1]])?)? == "/dev/vdb");
        let sizes = "cat /sys/block/vda/size /sys/block/vdb/size";
        ensure!(exec(sizes)? == "32768\n49152", "{}", exec(sizes)?);
        exec(&format!(
            "mkfs.ext4 -q -F /dev/vda; mkdir -p /mnt/d; mount /dev/vda /mnt/d; echo {round} > /mnt/d/file"
        ))?;
        let busy = disk(&["detach", name, "/dev/vda"])?;
        let said = String::from_utf8_lossy(&busy.stderr);
        ensure!(said.contains("vda is in use"), "{said}");
        exec("umount /mnt/d")?;
        for device in ["/dev/vda", "/dev/vdb"] {
            stdout(disk(&["detach", name, device])?)?;
        }
        ensure!(exec("ls /dev | grep -c ^vd || true")? == "0");
        let check = Command::new("/sbin/e2fsck")
            .args(["-fn", &images[0]])
            .output()?;
        ensure!(check.status.success(), "{check:?}");
    }
    // A disk that grows, a read-only one, and one too many.
    ensure!(stdout(disk(&["attach", name, &images[0]])?)? == "/dev/vda");
    File::options()
        .write(true)
        .open(&images[0])?
        .set_len(20 << 20)?;
    stdout(disk(&["refresh", name, "/dev/vda"])?)?;
    ensure!(exec("cat /sys/block/vda/size")? == "40960");
    stdout(disk(&["attach", name, &format!("{}:ro", images[1])])?)?;
    let written = exec("dd if=/dev/zero of=/dev/vdb count=1 2>&1 || echo refused")?;
    ensure!(written.ends_with("refused"), "{written}");
    for n in 2..5 {
        let path = dir.join(format!("{n}.img"));
        File::create(&path)?.set_len(1 << 20)?;
        let got = disk(&["attach", name, &path.to_string_lossy()])?;
        ensure!(got.status.success() == (n < 4), "{got:?}");
        let said = String::from_utf8_lossy(&got.stderr);
        ensure!(n < 4 || said.contains("all 4 slots"), "{said}");
    }
    Ok(())
}

/// A root file system in an image file: erofs and ext4. Changes by the container are discarded.
fn an_image_is_a_root() -> Result<()> {
    let dir = scratch("disk-root")?;
    let tree = dir.join("tree");
    crate::tool::busybox(&tree)?;
    std::fs::write(tree.join("etc/motd"), "from the image\n")?;
    // Dangling links on the paths of volumes.
    std::fs::remove_file(tree.join("etc/resolv.conf"))?;
    std::os::unix::fs::symlink("../stub/resolv.conf", tree.join("etc/resolv.conf"))?;
    std::os::unix::fs::symlink("/run2", tree.join("link"))?;
    let own = dir.join("own");
    std::fs::create_dir(&own)?;
    std::fs::write(own.join("file"), "of a volume\n")?;
    let directory = format!("{}:/link/sub", own.display());
    let file = format!("{}:/etc/resolv.conf", own.join("file").display());
    let (ext4, erofs) = (dir.join("root.ext4"), dir.join("root.erofs"));
    let made = Command::new("/sbin/mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .args([tree.as_os_str(), ext4.as_os_str(), "32m".as_ref()])
        .output()?;
    stdout(made)?;
    stdout(Command::new("mkfs.erofs").args([&erofs, &tree]).output()?)?;
    for image in [&ext4, &erofs] {
        let before = std::fs::read(image)?;
        let script = "cat /etc/motd; id -un; echo new > /etc/motd; rm /bin/vi; mkdir /new; touch /new/file
                      cat /etc/motd; ls /bin/vi /new 2> /dev/null; df / | tail -n 1 | cut -d ' ' -f 1";
        let said = stdout(run_in(image, &["-u", "web"], &["id", "-u"])?)?;
        ensure!(said == "33", "{said}");
        let said = stdout(run_in(image, &[], &["sh", "-c", script])?)?;
        ensure!(
            said == "from the image\nroot\nnew\n/new:\nfile\nroot",
            "{image:?}: {said}"
        );
        let read_only = stdout(run_in(
            image,
            &["--read-only"],
            &["sh", "-c", "touch /x || cat /etc/motd"],
        )?)?;
        ensure!(read_only == "from the image", "{read_only}");
        let volumes = ["-v", &directory, "-v", &file];
        let places = ["cat", "/run2/sub/file", "/stub/resolv.conf"];
        let said = stdout(run_in(image, &volumes, &places)?)?;
        ensure!(said == "of a volume\nof a volume", "{image:?}: {said}");
        ensure!(std::fs::read(image)? == before, "{image:?} was written to");
    }
    // A container runs from it, and a second process in it resolves its users.
    let name = "disk-root";
    let mut run = koya(["run", "-d", "--name", name, "--rootfs"]);
    run.arg(&erofs).args(["--", "sleep", "1000"]);
    stdout(run.output()?)?;
    let container = Background { name: name.into() };
    ensure!(stdout(container.exec(&["-u", "web"], &["id", "-u"])?)? == "33");
    let text = dir.join("text");
    std::fs::write(&text, "no file system.\n".repeat(1024))?;
    let refused = run_in(&text, &[], &["true"])?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(said.contains("neither erofs nor ext4"), "{said}");
    ensure!(!said.contains("stays attached"), "{said}");
    // File systems that the guest kernel refuses, without a reason except in its log: compressed ones, and those that a crash
    // left with a journal to be replayed.
    let packed = dir.join("packed.erofs");
    let mut make = Command::new("mkfs.erofs");
    stdout(make.arg("-zlz4").args([&packed, &tree]).output()?)?;
    let mut crash = Command::new("/sbin/debugfs");
    let crash = crash.args(["-w", "-R", "feature needs_recovery"]);
    stdout(crash.arg(&ext4).output()?)?;
    for (image, reason) in [(&packed, "compressed erofs"), (&ext4, "e2fsck -p")] {
        let refused = run_in(image, &[], &["true"])?;
        let said = String::from_utf8_lossy(&refused.stderr);
        ensure!(refused.status.code() == Some(125), "{refused:?}");
        ensure!(said.contains(reason) && said.lines().count() == 1, "{said}");
    }
    Ok(())
}
