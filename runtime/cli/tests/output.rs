//! Commands whose output can't be written. These tests need no guest.

use std::fs::File;
use std::process::{Command, Output, Stdio};

/// Commands that print something on every host.
const COMMANDS: &[&[&str]] = &[
    &["ps", "--all"],
    &["ps", "--json"],
    &["stats"],
    &["env"],
    &["env", "--json"],
    &["config", "show"],
    &["timeline", "--list", "--json"],
    &["--help"],
    &["run", "--help"],
    &["--version"],
];

/// Runs koya as a user without containers.
fn koya(arguments: &[&str], stdout: Stdio) -> Output {
    let home = tempfile::tempdir().unwrap();
    Command::new(env!("CARGO_BIN_EXE_koya"))
        .args(arguments)
        .env("HOME", home.path())
        .env_remove("XDG_DATA_HOME")
        .env_remove("XDG_RUNTIME_DIR")
        .stdin(Stdio::null())
        .stdout(stdout)
        .output()
        .unwrap()
}

#[test]
fn a_reader_that_has_gone_ends_a_command_quietly() {
    for command in COMMANDS {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = koya(command, writer.into());
        assert_eq!(output.status.code(), Some(141), "{command:?}: {output:?}");
        assert!(output.stderr.is_empty(), "{command:?}: {output:?}");
    }
}

#[test]
fn a_full_disk_is_an_error_with_its_reason() {
    for command in COMMANDS {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = koya(command, full.into());
        assert_eq!(output.status.code(), Some(125), "{command:?}: {output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("No space left"), "{command:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{command:?}: {said}");
    }
}

#[test]
fn a_wrong_option_is_the_commands_own_failure() {
    for command in [&["run", "--foo"][..], &["exec"], &["nonsense"], &[]] {
        let output = koya(command, Stdio::piped());
        assert_eq!(output.status.code(), Some(125), "{command:?}: {output:?}");
    }
}

/// Errors may contain words of an image or a guest, and go to the user's terminal.
#[test]
fn errors_have_no_control_characters() {
    let rootfs = "/none\x1b]0;title\x07\u{9b}2J\u{202e}\r";
    let output = koya(&["run", "--rootfs", rootfs, "true"], Stdio::piped());
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("/none"), "{said:?}");
    let is_plain = |char: char| char == '\n' || !char.is_control() && char != '\u{202e}';
    assert!(said.chars().all(is_plain), "{said:?}");
}

#[test]
fn what_is_not_there_may_be_removed_by_force() {
    let output = koya(&["rm", "--force", "koya-test-none"], Stdio::piped());
    assert!(
        output.status.success() && output.stdout.is_empty(),
        "{output:?}"
    );
    let output = koya(&["rm", "koya-test-none"], Stdio::piped());
    assert_eq!(output.status.code(), Some(125), "{output:?}");
}

#[test]
fn an_error_that_nobody_reads_is_one_all_the_same() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let ended = Command::new(env!("CARGO_BIN_EXE_koya"))
        .args(["logs", "nobody-of-that-name"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(writer)
        .status()
        .unwrap();
    assert_eq!(ended.code(), Some(125));
}

#[test]
fn what_is_missing_is_one_line_with_its_option() {
    let empty = tempfile::tempdir().unwrap();
    let rootfs = empty.path().to_str().unwrap();
    for (options, option) in [
        (["--rootfs", "/nonexistent", "--read-only"], "rootfs"),
        (["--rootfs", rootfs, "--volume=/nonexistent:/x"], "volume"),
    ] {
        let arguments = [&["run"], &options[..], &["--", "true"]].concat();
        let output = koya(&arguments, Stdio::null());
        assert_eq!(output.status.code(), Some(125), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            said.contains(option) && said.contains("/nonexistent"),
            "{said}"
        );
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn a_limit_of_file_sizes_is_an_error() {
    let home = tempfile::tempdir().unwrap();
    let output = Command::new("sh")
        .args(["-c", "ulimit -f 0; exec \"$0\" ps > \"$HOME/out\""])
        .arg(env!("CARGO_BIN_EXE_koya"))
        .env("HOME", home.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert!(said.contains("cannot write to standard output"), "{said}");
}
