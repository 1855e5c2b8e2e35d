//! Confinement of host threads driven by the guest.

use crate::calls::with_numbers;
use crate::life::koya_as;
use crate::tool::{Background, busybox, koya, run_in, scratch, stdout, until};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

crate::trials![
    threads_that_a_guest_drives_are_confined,
    confinement_can_be_turned_off,
    device_operations_of_all_kinds_pass_the_filters,
    rarer_operations_pass_the_filters,
    a_users_files_are_served_from_the_shares_only,
];

/// Threads driven by the guest, by prefixes of their names.
const DRIVEN: [&str; 7] = [
    "koya-vcpu",
    "koya-loop",
    "koya-starter",
    "koya-fs",
    "koya-blk",
    "koya-vsock",
    "koya-vsock-out",
];

/// The capabilities of `koya-fs`, by their bits: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, MKNOD, SETFCAP.
const OF_FILES: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 27 | 1 << 31;

struct Thread {
    seccomp: bool,
    no_new_privileges: bool,
    capabilities: u64,
    /// Root directory.
    root: PathBuf,
}

/// The threads of a process, by name.
fn threads(pid: u32) -> Result<BTreeMap<String, Thread>> {
    let mut found = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.path();
        let status = fs::read_to_string(task.join("status"))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.map(str::trim).with_context(|| format!("no {name}"))
        };
        let thread = Thread {
            seccomp: field("Seccomp:")? == "2",
            no_new_privileges: field("NoNewPrivs:")? == "1",
            capabilities: u64::from_str_radix(field("CapEff:")?, 16)?,
            root: task.join("root"),
        };
        found.insert(field("Name:")?.to_owned(), thread);
    }
    Ok(found)
}

fn names(directory: &Path) -> Result<Vec<String>> {
    let names = fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name().display().to_string()));
    names.collect()
}

/// Open directories of a process on mounts of its namespace.
fn directories_of_the_host(pid: u32) -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let mounts: Vec<_> = mounts
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    let mut found = Vec::new();
    for number in names(format!("/proc/{pid}/fd").as_ref())? {
        let link = PathBuf::from(format!("/proc/{pid}/fd/{number}"));
        // Other descriptors may be closed meanwhile.
        if link.metadata().is_ok_and(|data| data.is_dir()) {
            let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}"))?;
            let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
            if mounts.contains(&mount.context("no mnt_id")?.trim()) {
                found.push(link.read_link()?);
            }
        }
    }
    Ok(found)
}

/// A container with a disk and a vsock socket.
fn start(name: &str, more: &[&str]) -> Result<Background> {
    let dir = scratch(name)?;
    let (disk, socket) = (dir.join("disk"), dir.join("v.sock"));
    File::create(&disk)?.set_len(16 << 20)?;
    let (disk, socket) = (disk.to_string_lossy(), socket.to_string_lossy());
    let options = [&["--disk", &disk, "--vsock", &socket], more].concat();
    let container = Background::start(name, &options, &["sh", "-c", "echo ready; sleep 1000"])?;
    container.wait_until("the container", |said| said.contains("ready"))?;
    // Threads of a disk start with its driver, those of vsock clients with a client.
    let _client = UnixStream::connect(&*socket)?;
    Ok(container)
}

fn threads_that_a_guest_drives_are_confined() -> Result<()> {
    let container = start("walls", &[])?;
    let threads = threads(container.pid()?)?;
    for driven in DRIVEN {
        let mut of_it = threads.iter().filter(|(name, _)| name.starts_with(driven));
        let (_, thread) = of_it.next().with_context(|| format!("no {driven}"))?;
        ensure!(thread.seccomp, "{driven} has no filter");
        ensure!(thread.no_new_privileges, "{driven}");
        let allowed = match driven {
            "koya-fs" | "koya-starter" => OF_FILES,
            _ => 0,
        };
        let has = thread.capabilities;
        ensure!(has & !allowed == 0, "{driven} has {has:#x}");
        if matches!(driven, "koya-fs" | "koya-starter") {
            let names = names(&thread.root)?;
            ensure!(
                names.iter().all(|name| name.parse::<u32>().is_ok()),
                "{names:?}"
            );
        }
    }
    let left = directories_of_the_host(container.pid()?)?;
    ensure!(left.is_empty(), "koya-fs can leave its root by {left:?}");
    let record = fs::read_to_string("/var/lib/koya/containers/walls/walls.json")?;
    let record: serde_json::Value = serde_json::from_str(&record)?;
    let recorded = record["threads"].as_array().context("no threads")?;
    for driven in &DRIVEN[..5] {
        let is_it = |thread: &&serde_json::Value| {
            let role = thread["role"].as_str();
            role.is_some_and(|role| role.starts_with(driven))
        };
        let thread = recorded.iter().find(is_it);
        let thread = thread.with_context(|| format!("no {driven} in {record}"))?;
        ensure!(thread["seccomp"] == "filter", "{thread}");
        // The starter's own root is also that of the threads that it creates.
        if matches!(*driven, "koya-fs" | "koya-starter") {
            ensure!(thread["root"] == "own", "{thread}");
        }
    }
    let of_owner = &threads["koya-watch"];
    ensure!(!of_owner.seccomp && of_owner.no_new_privileges);
    Ok(())
}

fn confinement_can_be_turned_off() -> Result<()> {
    let container = start("no-walls", &["--no-seccomp"])?;
    for (name, thread) in threads(container.pid()?)? {
        ensure!(!thread.seccomp && !thread.no_new_privileges, "{name}");
        ensure!(names(&thread.root)?.contains(&"proc".to_owned()), "{name}");
    }
    let listed = stdout(koya(["ps", "--json"]).output()?)?;
    ensure!(listed.contains("\"confined\": false"), "{listed}");
    let listed = stdout(koya(["ps"]).output()?)?;
    ensure!(listed.contains("running (no seccomp)"), "{listed}");
    let said = stdout(koya(["env", "--json"]).output()?)?;
    ensure!(
        said.contains("\"confinement\": \"seccomp filters"),
        "{said}"
    );
    ensure!(said.contains("\"role\": \"koya-vcpu\""), "{said}");
    Ok(())
}

/// File operations of a guest, in a shell. Each line is a separate request to the host.
const FILE_OPERATIONS: &str = "set -e; cd /data
    echo one > a; cat a; ln a b; ln -s a c; readlink c; mv b d; mkdir e; rmdir e; mkfifo f
    mknod g c 1 3; chmod 600 a; chown 5:6 a; touch -d 2020-01-01 a; truncate -s 9 a; stat a
    dd if=/dev/zero of=h bs=4096 count=4 conv=fsync 2>/dev/null; cp h i; sync; sync -f h
    fallocate -l 65536 j; ls -la; df .; rm -f a c d f g h i j; ls -A";

fn device_operations_of_all_kinds_pass_the_filters() -> Result<()> {
    let dir = scratch("operations")?;
    let volume = format!("{}:/data", dir.display());
    let options = ["--volume", &volume, "--cpus", "1", "--cpus-max", "2"];
    let options = [
        &options[..],
        &["--memory", "128m", "--memory-max", "512m", "--privileged"],
    ];
    let command = ["sh", "-c", "echo ready; sleep 1000"];
    let container = Background::start("operations", &options.concat(), &command)?;
    container.wait_until("the container", |said| said.contains("ready"))?;
    let done = container.exec(&[], &["sh", "-c", FILE_OPERATIONS])?;
    ensure!(done.status.success(), "{done:?}");
    ensure!(fs::read_dir(&dir)?.next().is_none(), "something is left");
    // Memory and CPUs are added and removed.
    for (memory, cpus) in [("512m", "2"), ("128m", "1"), ("256m", "2")] {
        let update = ["update", "operations", "--memory", memory, "--cpus", cpus];
        // The guest may not return all of it at once.
        koya(update).output()?;
    }
    let alive = container.exec(&[], &["echo", "alive"])?;
    ensure!(alive.stdout == b"alive\n", "{alive:?}");
    Ok(())
}

/// Operations on files that few programs use, and on a disk. Those after `may` need not be supported.
const RARER_OPERATIONS: &str = r#"
    use Fcntl qw(:DEFAULT :flock); use IO::Handle;
    my $here = -100;
    # Numbers are passed by value and strings by address, which must be those of variables.
    sub may { my ($n, @a) = @_; syscall($n, @a) }
    sub must { my $got = may(@_); $got >= 0 or die "$_[0]: $!"; $got }
    open(F, '+>', 'f') or die $!; syswrite(F, 'text' x 2000) == 8000 or die $!;
    for my $key ('user.a', 'trusted.b') {
        my $room = "\0" x 100;
        must(SYS_setxattr, 'f', $key, 'one', 3, 0); must(SYS_getxattr, 'f', $key, $room, 100);
        must(SYS_getxattr, 'f', $key, $room, 0); must(SYS_listxattr, 'f', $room, 100); must(SYS_removexattr, 'f', $key);
    }
    must(SYS_lseek, fileno F, 0, 3); must(SYS_lseek, fileno F, 0, 4);
    must(SYS_fallocate, fileno F, 0, 0, 1 << 20); must(SYS_fallocate, fileno F, 3, 4096, 4096);
    may(SYS_fallocate, fileno F, 16, 0, 4096); may(SYS_fallocate, fileno F, 8, 0, 4096);
    open(G, '+>', 'g') or die $!; my ($in, $out) = (pack('q', 0), pack('q', 0));
    must(SYS_copy_file_range, fileno F, $in, fileno G, $out, 4096, 0);
    my $unnamed = must(SYS_openat, $here, '.', O_TMPFILE | O_RDWR, 0600);
    if (may(SYS_linkat, $here, "/proc/self/fd/$unnamed", $here, 'named', 0x400) < 0) { open(T, '>', 'named') or die $! }
    must(SYS_renameat2, $here, 'named', $here, 'other', 1); must(SYS_renameat2, $here, 'other', $here, 'g', 2);
    must(SYS_renameat2, $here, 'other', $here, 'third', 4); -c 'other' or die 'no whiteout';
    my $room = "\0" x 256; must(SYS_statx, $here, 'f', 0, 0xfff, $room); must(SYS_statx, $here, 'f', 0x2000, 0xfff, $room);
    flock(F, LOCK_EX) or die $!; flock(F, LOCK_UN) or die $!;
    # F_SETLK, and F_OFD_SETLK of a write lock.
    for my $kind (6, 37) { my $lock = pack('s s x4 q q i x4', 1, 0, $kind, 1, 0); fcntl(F, $kind, $lock) or die "lock: $!" }
    # FS_IOC_GETFLAGS and FIBMAP.
    ioctl(F, 0x80086601, $room); ioctl(F, 1, $room); may(SYS_fadvise64, fileno F, 0, 0, 4);
    my $set = ''; vec($set, fileno F, 1) = 1; select($set, undef, undef, 0);
    link('f', 'hard') or die $!; symlink('f', 'soft') or die $!; readlink('soft') eq 'f' or die $!;
    my $f = \*F; chmod(06755, $f) or die $!; chown(5, 6, $f) or die $!;
    utime(undef, undef, $f) or die $!; utime(1, 2, $f) or die $!;
    truncate(F, 10) or die $!; F->sync or die $!; must(SYS_fdatasync, fileno F); must(SYS_syncfs, fileno F);
    mkdir('d') or die $!; open(D, '<', 'd') or die $!; D->sync; must(SYS_fdatasync, fileno D);
    opendir(E, '.') or die $!; my @names = readdir E; rewinddir E; closedir E; @names > 8 or die "@names";
    rename('f', 'd/f') or die $!; unlink('d/f') or die $!; (stat F)[3] == 1 or die 'links';
    for my $size (512, 4096) {
        sysopen(H, 'direct', O_RDWR | O_CREAT | O_SYNC) or die $!; syswrite(H, "\0" x $size) == $size or die $!;
    }
    unlink(glob('*')); rmdir('d') or die $!; print "files\n";
    system('dd if=/dev/zero of=/dev/vda bs=1M count=4 oflag=direct conv=fsync 2> /dev/null') == 0 or die 'dd';
    system('blkdiscard -l 1M /dev/vda && blkdiscard -z -o 1M -l 1M /dev/vda && blockdev --flushbufs /dev/vda') == 0 or die 'disk';
    system('head -c 64 /dev/hwrng > /dev/null 2>&1'); print "disk\n";
"#;

fn rarer_operations_pass_the_filters() -> Result<()> {
    let dir = scratch("rarer-operations")?;
    let (shared, disk) = (dir.join("shared"), dir.join("disk"));
    fs::create_dir(&shared)?;
    File::create(&disk)?.set_len(16 << 20)?;
    let (volume, disk) = (format!("{}:/mnt", shared.display()), disk.to_string_lossy());
    let options = ["--read-only", "--privileged", "--workdir", "/mnt"];
    let options = [&options[..], &["-v", &volume, "--disk", &disk]].concat();
    let command = ["perl", "-e", &with_numbers(RARER_OPERATIONS)];
    let said = stdout(run_in(Path::new("/"), &options, &command)?)?;
    ensure!(said == "files\ndisk", "{said}");
    ensure!(fs::read_dir(&shared)?.next().is_none(), "something is left");
    Ok(())
}

/// Without root and a network, files are served from the shares alone: Landlock denies everything else to `koya-fs`, so that
/// a directory that the host moves out of a share can no longer be used.
fn a_users_files_are_served_from_the_shares_only() -> Result<()> {
    const USER: u32 = 65534;
    let home = scratch("user-walls")?;
    for name in ["data/a", "data/b", "data/moved", "sealed"] {
        fs::create_dir_all(home.join(name))?;
    }
    for name in ["data/a/file", "data/moved/file", "sealed/file", "alone"] {
        fs::write(home.join(name), "inside\n")?;
    }
    let rootfs = home.join("rootfs");
    busybox(&rootfs)?;
    let owner = format!("{USER}:{USER}");
    let mut chown = Command::new("chown");
    stdout(chown.args(["-hR", &owner]).arg(&home).output()?)?;
    let as_user = |arguments: &[&str]| -> Result<String> {
        stdout(koya_as(USER, &home).args(arguments).output()?)
    };
    let volumes = ["data:/data", "sealed:/sealed:ro", "alone:/alone"];
    let volumes = volumes.map(|volume| format!("{}/{volume}", home.display()));
    let [data, sealed, alone] = &volumes;
    let rootfs = rootfs.to_string_lossy();
    let script =
        "set -e; cat /sealed/file /alone; mv /data/a/file /data/b; ln /data/b/file /data/a/file
        cat /data/a/file; echo more >> /alone; cd /data/moved; cat file; echo ready
        until [ -e /data/go ]; do sleep 1; done
        cat file 2> /dev/null || echo denied; (echo more > new) 2> /dev/null || echo denied
        echo done; sleep 1000";
    let run = ["run", "-d", "--name", "user-walls", "--rootfs", &rootfs];
    let volumes = ["-v", data, "-v", sealed, "-v", alone];
    as_user(&[&run[..], &volumes, &["--", "sh", "-c", script]].concat())?;
    let says = |word: &str| {
        until(word, || {
            let said = as_user(&["logs", "user-walls"])?;
            Ok(said.contains(word).then_some(said))
        })
    };
    says("ready")?;
    fs::rename(home.join("data/moved"), home.join("moved"))?;
    fs::write(home.join("data/go"), "")?;
    let said = says("done")?;
    let host: serde_json::Value = serde_json::from_str(&as_user(&["env", "--json"])?)?;
    as_user(&["rm", "--force", "user-walls"])?;
    let (before, after) = said.split_once("ready\n").context("not ready")?;
    ensure!(before == "inside\n".repeat(4), "{said}");
    let version = host["host"]["landlock"].as_i64();
    if version.is_some_and(|version| version >= 2) {
        ensure!(after.trim_end() == "denied\ndenied\ndone", "{said}");
    }
    Ok(())
}
