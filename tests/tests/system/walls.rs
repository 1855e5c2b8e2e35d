//! Confinement of host threads driven by the guest.

use crate::tool::{Background, koya, scratch, stdout};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

crate::trials![
    threads_that_a_guest_drives_are_confined,
    confinement_can_be_turned_off,
    device_operations_of_all_kinds_pass_the_filters,
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
        let has_own_root = matches!(*driven, "koya-fs" | "koya-starter");
        let root = if has_own_root { "own" } else { "host" };
        ensure!(thread["root"] == root, "{thread}");
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
