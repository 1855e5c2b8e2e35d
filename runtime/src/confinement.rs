//! What confines the threads of a sandbox: for this host, for a sandbox that runs (a file beside its other state), and for one
//! that was ended because a thread made a system call that its filter does not allow (`docs/security.md`).

use crate::read_small_file;
use koya_vmm::guest_text::sanitize_line;
use koya_vmm::host::security_modules::has_selinux;
use koya_vmm::host::walls::landlock::{self, Opens};
use koya_vmm::host::walls::{Filter, check_host};
use koya_vmm::host::{descriptors, sys};
use rustix::fs::{OFlags, statfs};
use rustix::process::getpid;
use rustix::thread::{CapabilitySet, CoreSchedulingScope, capabilities, core_scheduling_cookie};
use serde_json::{Value, json};
use std::fs::{self, File, Metadata};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

/// The file that names the confinement of each thread of a sandbox.
pub const RECORD: &str = "walls.json";
/// The file with the report of a violation; empty without one.
const VIOLATION: &str = "violation";

/// A report has one line.
const MAX_REPORT: u64 = 4096;

/// Exit status of a sandbox that was ended because of a violation: as if SIGSYS had killed it.
pub const VIOLATION_STATUS: i32 = sys::VIOLATION_STATUS;

/// Makes this process report a violation also in a file of this directory, which [`violation`] reads. Concerns the whole
/// process: libraries must leave it to the program.
///
/// # Errors
/// If the file can't be created.
pub fn report_violations_in(directory: &Path) -> io::Result<()> {
    let file = create(&directory.join(VIOLATION))?;
    sys::report_violations_in(file.into());
    Ok(())
}

/// The thread and the system call because of which the process that reports in this directory was ended.
pub fn violation(directory: &Path) -> Option<String> {
    // Written by a process that an attacker may have controlled.
    let text = read_small_file(&directory.join(VIOLATION), MAX_REPORT).ok()?;
    let line = text.split(|byte| *byte == b'\n').next()?;
    let line = sanitize_line(line);
    let reason = line.strip_prefix("koya: ").unwrap_or(&line);
    (!reason.is_empty()).then(|| reason.to_owned())
}

/// Writes [`RECORD`] in this directory: the threads of this process, as the kernel reports them, and the options of the
/// sandbox. `is_confined` is [`SandboxConfig::confined`](crate::SandboxConfig::confined).
///
/// # Errors
/// If the threads can't be read, or the file can't be written.
pub fn record(directory: &Path, is_confined: bool) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(&of_this_process(is_confined)?)?;
    let new = directory.join("walls.new");
    create(&new)?.write_all(&text)?;
    fs::rename(new, directory.join(RECORD))
}

/// The threads of a sandbox that a guest drives, with the confinement that each would have if the calling thread started it on
/// this host.
pub fn expected() -> Value {
    let has_filters = check_host().is_ok();
    let has_own_root = descriptors::check_own_root().is_ok();
    let own = capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.permitted);
    let expected = Filter::ALL.map(|filter| {
        let names = (filter.capabilities() & own).iter_names();
        let names: Vec<_> = names.map(|(name, _)| name).collect();
        json!({
            "role": role(filter),
            "seccomp": if has_filters { "filter" } else { "not supported" },
            "system_calls": filter.call_names().len(),
            "capabilities": names,
            "no_new_privileges": true,
            "root": if has_own_root && filter.has_own_root() { "own" } else { "host" },
            "landlock": expected_opens(filter, has_own_root).map(opens),
        })
    });
    Value::from(expected.to_vec())
}

/// What Landlock would permit threads with this filter to open, if all places that containers share are known at the start.
fn expected_opens(filter: Filter, has_own_root: bool) -> Option<Opens> {
    match filter.is_of_starter() {
        true if has_own_root || !landlock::has_places() => None,
        true => Some(Opens::Places),
        false => landlock::abi().map(|_| Opens::Nothing),
    }
}

fn opens(what: Opens) -> &'static str {
    match what {
        Opens::Nothing => "no files",
        Opens::Places => "shared files",
    }
}

/// The name of the threads with this filter.
fn role(filter: Filter) -> &'static str {
    match filter {
        Filter::Vcpu => "koya-vcpu",
        Filter::EventLoop => "koya-loop",
        Filter::Starter => "koya-starter",
        Filter::Block => "koya-blk",
        Filter::Net => "koya-net",
        Filter::VsockSockets => "koya-vsock",
        Filter::VsockConnector => "koya-vsock-out",
        Filter::Files => "koya-fs",
    }
}

/// Creates a file that only this user can read, or empties the one that is there.
fn create(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.create(true).write(true).truncate(true).mode(0o600);
    let flags = OFlags::NOFOLLOW.bits() as i32;
    options.custom_flags(flags).open(path)
}

fn of_this_process(is_confined: bool) -> io::Result<Value> {
    let root = fs::metadata("/")?;
    let has_selinux = has_selinux();
    let mut threads = Vec::new();
    for task in fs::read_dir("/proc/self/task")? {
        // One that ends meanwhile is left out.
        threads.extend(thread(&task?.path(), &root, has_selinux));
    }
    let cookie = core_scheduling_cookie(getpid(), CoreSchedulingScope::Thread);
    Ok(json!({
        "pid": std::process::id(),
        "options": {
            "seccomp": is_confined,
            "core_scheduling": cookie.is_ok_and(|cookie| cookie != 0),
        },
        "threads": threads,
    }))
}

/// A thread by its directory in /proc, where each further file costs time; `host` is the root directory of the calling
/// thread.
fn thread(task: &Path, host: &Metadata, has_selinux: bool) -> Option<Value> {
    let status = read(&task.join("status"))?;
    let field = |name: &str| {
        let mut lines = status.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        Some(value.trim())
    };
    // Without seccomp, the kernel does not say so.
    let seccomp = match field("Seccomp").unwrap_or("0") {
        "0" => "none",
        "1" => "strict",
        _ => "filter",
    };
    let label = |file: &str| {
        let text = read(&task.join("attr").join(file))?;
        let text = text.trim_end_matches(['\n', '\0']).to_owned();
        (!text.is_empty()).then_some(text)
    };
    let id = field("Pid")?.parse::<u32>().ok()?;
    // The last one is that of the thread's own pid namespace.
    let own_id = field("NSpid").and_then(|ids| ids.split_whitespace().next_back()?.parse().ok());
    Some(json!({
        "role": field("Name")?,
        "id": id,
        "seccomp": seccomp,
        "capabilities": field("CapEff")?,
        "no_new_privileges": field("NoNewPrivs") == Some("1"),
        "root": root_of(&task.join("root"), host)?,
        // Not reported by the kernel.
        "landlock": landlock::opens(own_id.unwrap_or(id)).map(opens),
        "apparmor": label("apparmor/current"),
        "selinux": has_selinux.then(|| label("current")).flatten(),
    }))
}

/// What a thread has as its root directory.
fn root_of(root: &Path, host: &Metadata) -> Option<&'static str> {
    let found = fs::metadata(root).ok()?;
    if (found.dev(), found.ino()) == (host.dev(), host.ino()) {
        return Some("host");
    }
    // PROC_SUPER_MAGIC: the directory of descriptors.
    match statfs(root).is_ok_and(|found| found.f_type == 0x9fa0) {
        true => Some("own"),
        // A thread that shows a container's files to tools of the host.
        false => Some("container"),
    }
}

/// The text of a file in /proc, which has no size: by one read.
fn read(path: &Path) -> Option<String> {
    let mut text = String::with_capacity(4096);
    File::open(path).ok()?.read_to_string(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use koya_vmm::host::walls::confine_new_threads;

    #[test]
    fn threads_are_recorded_as_the_kernel_reports_them() {
        let dir = tempfile::tempdir().unwrap();
        let role = koya_vmm::host::threads::Role::new("koya-recorded")
            .guest_facing()
            .confined_by(Filter::Block);
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let confined = confine_new_threads(true).unwrap();
        let thread = koya_vmm::host::threads::spawn(role, move || {
            ready.send(()).unwrap();
            ended.recv().ok();
        });
        drop(confined);
        is_ready.recv().unwrap();
        record(dir.path(), true).unwrap();
        drop(end);
        thread.unwrap().join().unwrap();
        let text = fs::read(dir.path().join(RECORD)).unwrap();
        let all: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(all["options"]["seccomp"], true);
        let threads = all["threads"].as_array().unwrap();
        let found = threads.iter().find(|one| one["role"] == "koya-recorded");
        let found = found.unwrap_or_else(|| panic!("{all}"));
        assert_eq!(found["seccomp"], "filter");
        assert_eq!(found["no_new_privileges"], true);
        assert_eq!(found["capabilities"], "0000000000000000");
        assert_eq!(found["root"], "host");
        let wanted = landlock::abi().map(|_| "no files");
        assert_eq!(found["landlock"], json!(wanted));
        assert!(threads.iter().any(|one| one["id"] == std::process::id()));
        // A second sandbox of this directory replaces it.
        record(dir.path(), false).unwrap();
        assert!(!dir.path().join("walls.new").exists());
    }

    #[test]
    fn every_role_is_expected_once() {
        let expected = expected();
        let all = expected.as_array().unwrap();
        let roles: std::collections::HashSet<_> = all
            .iter()
            .map(|one| one["role"].as_str().unwrap())
            .collect();
        assert_eq!(roles.len(), Filter::ALL.len());
        let vcpu = all.iter().find(|one| one["role"] == "koya-vcpu").unwrap();
        assert_eq!(vcpu["capabilities"], json!([]));
        assert_eq!(vcpu["root"], "host");
        let wanted = landlock::abi().map(|_| "no files");
        assert_eq!(vcpu["landlock"], json!(wanted));
    }

    #[test]
    fn a_report_is_one_line_without_control_characters() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(violation(dir.path()), None);
        let with = |text: &str| {
            fs::write(dir.path().join(VIOLATION), text).unwrap();
            violation(dir.path())
        };
        assert_eq!(with(""), None);
        let said = with("koya: the thread koya-blk made\u{1b}[2J a call\nanother\n").unwrap();
        assert!(said.starts_with("the thread koya-blk made"), "{said}");
        assert!(
            !said.contains(['\u{1b}', '\n']) && !said.contains("another"),
            "{said}"
        );
        // One that is too long was not written by the handler.
        assert_eq!(with(&"x".repeat(5000)), None);
    }
}
