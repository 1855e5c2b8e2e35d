//! Tests of directories of containers.

use super::*;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

/// A newer koya lists containers of an older one, and vice versa: a record as written by version 0.1, with an additional
/// field of a later version.
#[test]
fn records_of_other_versions_are_read() {
    let text = r#"{"name": "web", "pid": 7, "created": {"secs_since_epoch": 1700000000,
        "nanos_since_epoch": 5}, "command": ["sh", "-c", "x"], "rootfs": "/srv/web", "keep": true,
        "status": null, "of_a_later_version": {"a": [1]}}"#;
    let record: Record = serde_json::from_str(text).unwrap();
    assert_eq!((record.name.as_str(), record.pid), ("web", 7));
    assert!(record.keep && record.confined && record.status.is_none());
}

/// A container whose process only holds the lock; returns the process, too.
pub(in super::super) fn hanging(dir: &Path, keep: bool) -> (Directory, std::process::Child) {
    let directory = Directory(dir.to_path_buf());
    let lock = File::create(directory.path("lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let mut sleep = std::process::Command::new("sleep");
    // Its standard input is the lock, which is released with it.
    let child = sleep.arg("1000").stdin(lock).spawn().unwrap();
    let record = Record {
        name: "hangs".into(),
        pid: child.id(),
        created: SystemTime::now(),
        command: Vec::new(),
        rootfs: PathBuf::new(),
        keep,
        confined: true,
        status: None,
    };
    directory.write(&record).unwrap();
    (directory, child)
}

#[test]
fn a_connection_that_nobody_takes_up_is_waited_for_no_longer_than_the_limit() {
    let dir = tempfile::tempdir().unwrap();
    let directory = Directory(dir.path().to_path_buf());
    let flags = SocketFlags::CLOEXEC;
    let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    let address = SocketAddrUnix::new(dir.path().join("control.sock")).unwrap();
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let limit = Duration::from_millis(100);
    let connected: Vec<_> = (0..4).map(|_| directory.connect(limit, limit)).collect();
    assert!(connected[0].is_ok());
    let last = connected[3].as_ref().unwrap_err();
    assert_eq!(last.kind(), std::io::ErrorKind::TimedOut);
}

#[test]
fn an_exit_status_is_kept_without_space_for_another_file() {
    let dir = tempfile::tempdir().unwrap();
    let (directory, mut child) = hanging(dir.path(), true);
    let mut record = directory.read().unwrap();
    // Nothing can be written beside the record.
    fs::create_dir(directory.path("record.new")).unwrap();
    for status in [137, 7, 0] {
        record.status = Some(status);
        directory.write(&record).unwrap();
        assert_eq!(directory.read().unwrap().status, Some(status));
    }
    record.command = vec!["long".repeat(100)];
    assert!(directory.write(&record).is_err());
    assert_eq!(directory.read().unwrap().status, Some(0));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_killed_container_keeps_its_log_if_it_was_detached_and_ran() {
    let dir = tempfile::tempdir().unwrap();
    for (keep, ran, is_kept) in [
        (true, true, true),
        (true, false, false),
        (false, true, false),
    ] {
        let path = dir.path().join("c");
        fs::create_dir(&path).unwrap();
        let (directory, mut child) = hanging(&path, keep);
        fs::write(directory.log(), "the last words").unwrap();
        let socket = ran.then(|| directory.listen().unwrap());
        drop(socket);
        child.kill().unwrap();
        child.wait().unwrap();
        directory.clear_away();
        assert_eq!(path.exists(), is_kept, "{keep} {ran}");
        if is_kept {
            assert_eq!(directory.read().unwrap().status, Some(KILLED));
            assert!(directory.log().exists());
            // A second command changes nothing.
            directory.clear_away();
            directory.remove();
        }
    }
}

#[test]
fn a_violation_is_the_reason_of_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let (directory, mut child) = hanging(dir.path(), true);
    fs::write(directory.log(), "").unwrap();
    drop(directory.listen().unwrap());
    let report = "koya: the thread koya-blk made system call 59 (execve); the sandbox is ended\n";
    fs::write(directory.path("violation"), report).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    directory.clear_away();
    assert_eq!(directory.read().unwrap().status, Some(VIOLATION_STATUS));
    assert!(
        directory
            .violation()
            .unwrap()
            .starts_with("the thread koya-blk")
    );
    let log = fs::read_to_string(directory.log()).unwrap();
    assert!(
        log.contains("stderr F koya: the thread koya-blk made"),
        "{log}"
    );
    // A second command changes nothing.
    directory.clear_away();
    assert_eq!(fs::read_to_string(directory.log()).unwrap(), log);
}

#[test]
fn what_a_loss_of_power_left_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let torn = |record: Option<&str>, has_lock: bool| {
        let path = dir.path().join("c");
        fs::create_dir(&path).unwrap();
        if let Some(text) = record {
            fs::write(path.join("record.json"), text).unwrap();
        }
        if has_lock {
            fs::write(path.join("lock"), "").unwrap();
        }
        let directory = Directory(path);
        let torn = directory.is_torn();
        directory.remove();
        torn
    };
    assert!(torn(Some(""), true) && torn(Some(r#"{"name": "c", "pi"#), true));
    assert!(torn(None, true));
    assert!(!torn(None, false), "that is not a container's");
    assert!(!torn(Some(r#"{"of": "a later version"}"#), true));
}

#[test]
fn directories_of_others_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    fs::create_dir(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    assert!(check_private(&path).is_err());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
    check_private(&path).unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(check_private(&link).is_err());
}

#[test]
fn a_control_socket_is_its_users_alone() {
    let dir = tempfile::tempdir().unwrap();
    let directory = Directory(dir.path().to_path_buf());
    let _listener = directory.listen().unwrap();
    let mode = fs::metadata(directory.path(CONTROL_SOCKET)).unwrap().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn names_are_single_components() {
    for good in ["a", "web-1", "x.y_z", &"n".repeat(64)] {
        check_name(good).unwrap();
    }
    for bad in ["", ".", "..", "a/b", "-a", ".new-a", "a b", &"n".repeat(65)] {
        assert!(check_name(bad).is_err(), "{bad:?}");
    }
}
