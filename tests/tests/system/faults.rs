//! Faults of the host: the guest sees an error or waits, no flushed data is lost, and everything else goes on.

use crate::calls::with_numbers;
use crate::tool::{Background, koya, run, run_in, scratch, stdout, until};
use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

crate::trials![
    a_tap_that_goes_away_takes_down_a_link,
    a_full_host_is_an_error_of_one_disk,
    a_disk_that_fails_loses_nothing_that_was_flushed,
    a_disk_that_hangs_is_waited_for,
    a_share_that_hangs_is_waited_for,
    files_that_shrink_are_the_readers_errors,
    a_share_whose_directory_is_deleted_is_empty,
];

/// Duration of a hang: longer than any unintended time limit along the path.
const HANG: Duration = Duration::from_secs(30);

fn host(program: &str, args: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    // There is no udev in the rig.
    command.args(args).env("DM_DISABLE_UDEV", "1");
    let output = command.output().with_context(|| program.to_owned())?;
    stdout(output).with_context(|| format!("{program} {args:?}"))
}

/// A container with this machine's tools, in the background.
fn start(name: &str, options: &[&str]) -> Result<Background> {
    let mut command = koya(["run", "-d", "--name", name, "--rootfs", "/"]);
    command.args(["--read-only", "--tmpfs", "/mnt", "--tmpfs", "/tmp"]);
    command.args(["--cap-add", "sys_admin", "--cap-add", "net_admin"]);
    stdout(
        command
            .args(options)
            .args(["--", "sleep", "1000"])
            .output()?,
    )?;
    Ok(Background { name: name.into() })
}

fn exec(container: &Background, script: &str) -> Result<String> {
    stdout(container.exec(&[], &["sh", "-c", script])?)
}

/// The container responds, and its process does not spin.
fn is_well(container: &Background) -> Result<()> {
    ensure!(exec(container, "echo well")? == "well");
    let ticks = || -> Result<u64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", container.pid()?))?;
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or("").split(' ').collect();
        Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
    };
    let before = ticks()?;
    std::thread::sleep(Duration::from_secs(1));
    let used = ticks()? - before;
    ensure!(
        used < 60,
        "{used} hundredths of a second of CPU time in one second of rest"
    );
    Ok(())
}

fn a_tap_that_goes_away_takes_down_a_link() -> Result<()> {
    host("ip", &["tuntap", "add", "fault0", "mode", "tap"])?;
    host("ip", &["addr", "add", "198.51.100.1/24", "dev", "fault0"])?;
    host("ip", &["link", "set", "fault0", "up"])?;
    let options = ["--net", "tap:fault0", "--ip", "198.51.100.2/24"];
    let container = start("fault-tap", &options)?;
    let ping = "busybox ping -c 1 -W 5 198.51.100.1 > /dev/null && echo there || echo gone";
    ensure!(exec(&container, ping)? == "there");
    host("ip", &["link", "delete", "fault0"])?;
    until("the link is down", || {
        let state = exec(&container, "cat /sys/class/net/eth0/carrier")?;
        Ok((state == "0").then_some(()))
    })?;
    ensure!(exec(&container, ping)? == "gone");
    is_well(&container)
}

/// Two images: one on a file system that gets full.
fn a_full_host_is_an_error_of_one_disk() -> Result<()> {
    let dir = scratch("fault-full")?;
    let small = dir.join("small");
    std::fs::create_dir(&small)?;
    let place = small.to_str().context("a path in UTF-8")?;
    host("mount", &["-t", "tmpfs", "-o", "size=8m", "small", place])?;
    let images = [small.join("disk"), dir.join("disk")];
    for image in &images {
        File::create(image)?.set_len(32 << 20)?;
    }
    let disks = images.each_ref().map(|image| image.to_string_lossy());
    let container = start("fault-full", &["--disk", &disks[0], "--disk", &disks[1]])?;
    let fill = |disk: &str| {
        let write = format!("dd if=/dev/zero of={disk} bs=1M count=16 oflag=direct 2>&1; true");
        exec(&container, &write)
    };
    let said = fill("/dev/vda")?;
    ensure!(
        said.contains("Input/output error") || said.contains("No space"),
        "{said}"
    );
    ensure!(fill("/dev/vdb")?.contains("16777216 bytes"));
    // With free space, the disk works again.
    host("mount", &["-o", "remount,size=64m", place])?;
    ensure!(fill("/dev/vda")?.contains("16777216 bytes"));
    is_well(&container)?;
    drop(container);
    host("umount", &[place])?;
    Ok(())
}

/// A block device that can be made to fail: device mapper on a loop device. Removed on drop.
struct Mapped {
    name: &'static str,
    loop_device: String,
    sectors: u64,
}

impl Mapped {
    fn new(name: &'static str, dir: &Path) -> Result<Self> {
        const SECTORS: u64 = 64 << 11;
        let image = dir.join("backing");
        File::create(&image)?.set_len(SECTORS * 512)?;
        let image = image.to_string_lossy();
        let mapped = Self {
            name,
            loop_device: host("losetup", &["--find", "--show", &image])?,
            sectors: SECTORS,
        };
        host("dmsetup", &["create", name, "--table", &mapped.linear()])?;
        Ok(mapped)
    }

    fn linear(&self) -> String {
        format!("0 {} linear {} 0", self.sectors, self.loop_device)
    }

    /// A table with which every write fails, but no read.
    fn failing(&self) -> String {
        let (sectors, device) = (self.sectors, &self.loop_device);
        format!("0 {sectors} flakey {device} 0 0 1000 1 error_writes")
    }

    fn become_(&self, table: &str) -> Result<()> {
        host(
            "dmsetup",
            &["suspend", "--noflush", "--nolockfs", self.name],
        )?;
        host("dmsetup", &["load", self.name, "--table", table])?;
        host("dmsetup", &["resume", self.name])?;
        Ok(())
    }

    fn path(&self) -> PathBuf {
        Path::new("/dev/mapper").join(self.name)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        host("dmsetup", &["resume", self.name]).ok();
        host("dmsetup", &["remove", "--retry", self.name]).ok();
        host("losetup", &["--detach", &self.loop_device]).ok();
    }
}

fn a_disk_that_fails_loses_nothing_that_was_flushed() -> Result<()> {
    let dir = scratch("fault-write")?;
    let device = Mapped::new("koya-flakey", &dir)?;
    let disk = device.path();
    {
        let container = start("fault-write", &["--disk", &disk.to_string_lossy()])?;
        let put = |at: u32, text: &str| {
            // Through the guest's page cache, then a flush.
            exec(
                &container,
                &format!(
                    "yes {text} | head -c 1048576 | dd of=/dev/vda bs=1M seek={at} conv=fsync,notrunc 2>&1; true"
                ),
            )
        };
        ensure!(put(1, "before")?.contains("1048576 bytes"));
        device.become_(&device.failing())?;
        let said = put(2, "during")?;
        ensure!(said.contains("Input/output error"), "{said}");
        device.become_(&device.linear())?;
        ensure!(put(3, "after")?.contains("1048576 bytes"));
        is_well(&container)?;
    }
    // The contents in a second sandbox.
    let options = ["--disk", &format!("{}:ro", disk.display()), "--read-only"];
    let script = "for at in 1 3; do dd if=/dev/vda bs=1M skip=$at count=1 2> /dev/null | uniq | head -n 1; done";
    let found = stdout(run_in(Path::new("/"), &options, &["sh", "-c", script])?)?;
    ensure!(found == "before\nafter", "{found}");
    Ok(())
}

fn a_disk_that_hangs_is_waited_for() -> Result<()> {
    let dir = scratch("fault-hang")?;
    let device = Mapped::new("koya-hang", &dir)?;
    let other = dir.join("other");
    File::create(&other)?.set_len(8 << 20)?;
    let disks = [device.path(), other].map(|path| path.to_string_lossy().into_owned());
    let container = start("fault-hang", &["--disk", &disks[0], "--disk", &disks[1]])?;
    host("dmsetup", &["suspend", "--nolockfs", device.name])?;
    exec(
        &container,
        "(dd if=/dev/zero of=/dev/vda bs=1M count=4 conv=fsync > /tmp/said 2>&1; echo done >> /tmp/said) &",
    )?;
    let started = Instant::now();
    while started.elapsed() < HANG {
        let write = "dd if=/dev/zero of=/dev/vdb bs=1M count=4 oflag=direct 2>&1 | tail -n 1";
        ensure!(exec(&container, write)?.contains("4194304 bytes"));
        std::thread::sleep(Duration::from_secs(3));
    }
    let early = exec(&container, "cat /tmp/said")?;
    ensure!(!early.contains("done"), "{early}");
    host("dmsetup", &["resume", device.name])?;
    until("the disk goes on", || {
        let said = exec(&container, "cat /tmp/said")?;
        Ok(said.ends_with("done").then_some(said))
    })
    .and_then(|said| {
        ensure!(said.contains("4194304 bytes"), "{said}");
        Ok(())
    })?;
    is_well(&container)
}

/// A frozen file system on the host: writers wait.
fn a_share_that_hangs_is_waited_for() -> Result<()> {
    let dir = scratch("fault-freeze")?;
    let image = dir.join("image");
    File::create(&image)?.set_len(32 << 20)?;
    let place = dir.join("mounted");
    std::fs::create_dir(&place)?;
    let (image, at) = (image.to_string_lossy(), place.to_string_lossy());
    host("/sbin/mkfs.ext4", &["-q", "-F", &image])?;
    host("mount", &["-o", "loop", &image, &at])?;
    let result = (|| {
        let container = start("fault-freeze", &["-v", &format!("{at}:/data")])?;
        std::fs::write(place.join("file"), "")?;
        host("fsfreeze", &["--freeze", &at])?;
        let frozen = exec(
            &container,
            "(echo text >> /data/file; echo done > /tmp/done) > /dev/null 2>&1 &",
        );
        let started = Instant::now();
        while frozen.is_ok() && started.elapsed() < HANG {
            // Other files, and reads of this directory, are served.
            exec(&container, "ls /data /bin > /dev/null")?;
            std::thread::sleep(Duration::from_secs(3));
        }
        let early = exec(&container, "cat /tmp/done 2> /dev/null; true");
        host("fsfreeze", &["--unfreeze", &at])?;
        frozen?;
        ensure!(early?.is_empty(), "it was written to a frozen file system");
        until("the write is done", || {
            Ok((exec(&container, "cat /tmp/done 2> /dev/null; true")? == "done").then_some(()))
        })?;
        ensure!(std::fs::read_to_string(place.join("file"))? == "text\n");
        is_well(&container)
    })();
    host("umount", &[&at])?;
    result
}

/// Has a file open and mapped, and on request reads beyond its end.
const LOOK: &str = r#"
    $| = 1; open(F, '<', shift) or die $!;
    my $at = syscall(SYS_mmap, 0, 1 << 20, 1, 1, fileno F, 0);
    sub byte { unpack('P1', pack('Q', $at + $_[0])) }
    print "mapped\n" if byte(0) eq 'a';
    select(undef, undef, undef, 0.1) until -e '/tmp/go';
    sysseek(F, 1000000, 0); print 'read ', sysread(F, my $buffer, 100), "\n";
    byte(1000000);
"#;

fn files_that_shrink_are_the_readers_errors() -> Result<()> {
    let dir = scratch("fault-shrink")?;
    let path = dir.join("file");
    let mut file = File::create(&path)?;
    file.write_all(&vec![b'a'; 1 << 20])?;
    let image = dir.join("disk");
    File::create(&image)?.set_len(8 << 20)?;
    let disk = image.to_string_lossy();
    let volume = format!("{}:/data", dir.display());
    let container = start("fault-shrink", &["-v", &volume, "--disk", &disk])?;
    let look = [
        "sh",
        "-c",
        "(perl -e \"$0\" /data/file > /tmp/said; echo ended $? >> /tmp/said) > /dev/null 2>&1 &",
        &with_numbers(LOOK),
    ];
    stdout(container.exec(&[], &look)?)?;
    until("the file is mapped", || {
        let said = exec(&container, "cat /tmp/said 2> /dev/null; true")?;
        Ok((said == "mapped").then_some(()))
    })?;
    file.set_len(10)?;
    File::options().write(true).open(&image)?.set_len(1 << 20)?;
    exec(&container, "touch /tmp/go")?;
    // 135: SIGBUS, as on any machine.
    until("the reader sees the end", || {
        let said = exec(&container, "cat /tmp/said")?;
        Ok((said == "mapped\nread 0\nended 135").then_some(()))
    })?;
    let beyond = "dd if=/dev/vda bs=1M skip=4 count=1 iflag=direct 2>&1; true";
    let said = exec(&container, beyond)?;
    ensure!(said.contains("Input/output error"), "{said}");
    let within = exec(
        &container,
        "dd if=/dev/vda bs=512k count=1 iflag=direct 2>&1",
    )?;
    ensure!(within.contains("524288 bytes"), "{within}");
    is_well(&container)
}

fn a_share_whose_directory_is_deleted_is_empty() -> Result<()> {
    let dir = scratch("fault-deleted")?;
    let shared = dir.join("shared");
    std::fs::create_dir_all(shared.join("below"))?;
    std::fs::write(shared.join("below/file"), "text")?;
    let volume = format!("{}:/data", shared.display());
    let container = start("fault-deleted", &["-v", &volume])?;
    ensure!(exec(&container, "cat /data/below/file")? == "text");
    std::fs::remove_dir_all(&shared)?;
    until("the guest sees that it is gone", || {
        let said = exec(
            &container,
            "ls /data | wc -l; cat /data/below/file 2>&1; true",
        )?;
        Ok((said.starts_with('0') && said.contains("No such file")).then_some(()))
    })?;
    let said = exec(&container, "echo new > /data/new 2>&1 || echo refused")?;
    ensure!(said.ends_with("refused"), "{said}");
    is_well(&container)?;
    drop(container);
    // The next machine is not affected.
    stdout(run(&[], &["true"])?).map(drop)
}
