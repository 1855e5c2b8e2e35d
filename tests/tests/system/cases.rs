//! Known problems of other container runtimes, as far as a test needs a guest: listed in `docs/cases.md`.

use crate::tool::{
    Background, Mounted, architecture, busybox, koya, run_in, scratch, sh, shared_rootfs, stdout,
    until,
};
use anyhow::{Result, ensure};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

crate::trials![
    mounts_are_as_they_were_asked_for,
    a_callers_umask_and_closed_streams_shut_nobody_out,
    users_and_programs_are_found_as_the_container_has_them,
    a_user_serves_low_ports_and_may_ping,
];

/// Writes a file, for a container to run or read.
fn write(at: &Path, mode: u32, content: &[u8]) -> Result<()> {
    fs::write(at, content)?;
    Ok(fs::set_permissions(at, fs::Permissions::from_mode(mode))?)
}

/// Checks lines of a script's output, each in the form `CASE: RESULT`.
fn expect(said: &str, wanted: &[(&str, &str)]) -> Result<()> {
    for (case, result) in wanted {
        let line = format!("{case}: {result}");
        ensure!(
            said.lines().any(|said| said == line),
            "no {line:?} in {said}"
        );
    }
    Ok(())
}

fn mounts_are_as_they_were_asked_for() -> Result<()> {
    let (data, tree) = (scratch("cases-data")?, scratch("cases-tree")?);
    let blank = scratch("cases blank \\ ünd")?;
    for dir in [data.join("cache"), data.join("sub"), tree.join("inner")] {
        fs::create_dir(dir)?;
    }
    write(&data.join("cache/hidden"), 0o644, b"")?;
    write(&data.join("config.json"), 0o644, b"of the volume\n")?;
    write(&data.join("marker"), 0o644, b"")?;
    write(&blank.join("file"), 0o644, b"found\n")?;
    let inner = tree.join("inner");
    let _mounted = Mounted::at(&inner)?;
    stdout(
        Command::new("mount")
            .args(["-o", "remount,noexec"])
            .arg(&inner)
            .output()?,
    )?;
    write(&tree.join("inner/file"), 0o755, b"#!/bin/sh\n")?;
    let volume = |from: &Path, to: &str| format!("{}:{to}", from.display());
    let options = [
        "--tmpfs".into(),
        "/data/cache:size=64k,mode=0711,noexec".into(),
        // The directory exists in the root, with another mode.
        "--tmpfs".into(),
        "/root:mode=0750,uid=33".into(),
        "-v".into(),
        volume(&data.join("config.json"), "/data/config.json:ro"),
        "-v".into(),
        volume(&data, "/data"),
        "-v".into(),
        volume(&tree, "/tree:ro"),
        "-v".into(),
        volume(&blank, "/with blank \\ ünd"),
        "-v".into(),
        volume(&inner, "/kept"),
        "-v".into(),
        volume(&inner, "/kept-ro:ro"),
    ];
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    // `t` prints whether a command succeeded.
    let script = "t() { if \"$@\" 2>/dev/null; then echo done; else echo refused; fi; }
        echo tmpfs-in-volume: $(ls /data/cache | wc -l) $(stat -f -c %T /data/cache)
        head -c 1m /dev/zero > /data/cache/big 2>/dev/null
        echo tmpfs-size: $(($(wc -c < /data/cache/big) / 1024))
        cp /bin/busybox /root; echo tmpfs-exec: $(t /root/busybox true)
        echo '#!/bin/sh' > /data/cache/x; chmod 755 /data/cache/x; echo tmpfs-noexec: $(t /data/cache/x)
        echo tmpfs-mode: $(stat -c %a:%u /data/cache /root)
        echo file-in-volume: $(ls /data | sort | xargs) $(cat /data/config.json)
        echo file-read-only: $(t sh -c 'echo x >> /data/config.json') $(t touch /data/new)
        echo submount-read-only: $(ls /tree/inner) $(t touch /tree/x) $(t touch /tree/inner/x)
        echo flags-of-source: $(t /kept/file) $(t /kept-ro/file) $(t touch /kept-ro/x) $(t touch /kept/y)
        echo blanks: $(cat '/with blank \\ ünd/file')";
    let said = sh(&options, script)?;
    expect(
        &said,
        &[
            ("tmpfs-in-volume", "0 tmpfs"),
            ("tmpfs-size", "64"),
            ("tmpfs-exec", "done"),
            ("tmpfs-noexec", "refused"),
            ("tmpfs-mode", "711:0 750:33"),
            (
                "file-in-volume",
                "cache config.json marker sub of the volume",
            ),
            ("file-read-only", "refused done"),
            ("submount-read-only", "file refused refused"),
            ("flags-of-source", "refused refused refused done"),
            ("blanks", "found"),
        ],
    )?;
    ensure!(!tree.join("inner/x").exists() && data.join("new").exists());
    // A mount that cannot be made is refused before the machine is created.
    let root = run_in(shared_rootfs(), &["-v", "/srv:/"], &["true"])?;
    let said = String::from_utf8_lossy(&root.stderr).into_owned();
    ensure!(
        root.status.code() == Some(125)
            && said.contains("is the root")
            && said.lines().count() == 1,
        "{said}"
    );
    Ok(())
}

fn a_callers_umask_and_closed_streams_shut_nobody_out() -> Result<()> {
    let (root, own) = (scratch("cases-umask")?, scratch("cases-umask-volume")?);
    busybox(&root)?;
    // Only root may enter the working directory, which is entered before the change of user.
    fs::set_permissions(root.join("root"), fs::Permissions::from_mode(0o700))?;
    write(&own.join("file"), 0o644, b"read\n")?;
    let script = "pwd; cat /opt/deep/name/file /opt/one; umask; id -u";
    let mut shell = Command::new("sh");
    shell.args(["-c", "umask 077; exec koya \"$@\" 0<&-", "sh", "run", "-i"]);
    shell.args(["--read-only", "-w", "/root", "-u", "1000", "--rootfs"]);
    shell.arg(&root).arg("-v");
    shell.arg(format!("{}:/opt/deep/name:ro", own.display()));
    shell
        .arg("-v")
        .arg(format!("{}:/opt/one", own.join("file").display()));
    let said = stdout(shell.args(["--", "sh", "-c", script]).output()?)?;
    ensure!(said == "/root\nread\nread\n0022\n1000", "{said}");
    for (made, mode) in [("opt", 0o755), ("opt/deep/name", 0o755), ("opt/one", 0o644)] {
        let found = root.join(made).metadata()?.permissions().mode() & 0o777;
        ensure!(found == mode, "{made}: {found:o}");
    }
    Ok(())
}

/// A 32-bit program: write(1, "32 bits\n", 8) and exit(0), by `int 0x80`.
fn of_32_bits() -> Vec<u8> {
    const BASE: u32 = 0x0800_0000;
    const HEADERS: u32 = 52 + 32;
    let code = [
        &[0xb8, 4, 0, 0, 0, 0xbb, 1, 0, 0, 0, 0xb9][..],
        &(BASE + HEADERS + 34).to_le_bytes(),
        &[0xba, 8, 0, 0, 0, 0xcd, 0x80],
        &[0xb8, 1, 0, 0, 0, 0x31, 0xdb, 0xcd, 0x80, 0x90, 0x90, 0x90],
        b"32 bits\n",
    ]
    .concat();
    let size = HEADERS + code.len() as u32;
    // ELFCLASS32, little endian, executable, i386; one segment with the whole file.
    let mut elf = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0".to_vec();
    for word in [1, BASE + HEADERS, 52, 0, 0] {
        elf.extend(u32::to_le_bytes(word));
    }
    for half in [52, 32, 1, 40, 0, 0] {
        elf.extend(u16::to_le_bytes(half));
    }
    for word in [1, 0, BASE, BASE, size, size, 5, 0x1000] {
        elf.extend(u32::to_le_bytes(word));
    }
    [elf, code].concat()
}

/// moby/moby 41030: the container has its own network.
fn a_user_serves_low_ports_and_may_ping() -> Result<()> {
    let root = scratch("cases-ports")?;
    busybox(&root)?;
    let script = "echo served | nc -l -p 80 & sleep 2; nc 127.0.0.1 80 < /dev/null; cd /proc/sys; cat net/ipv4/ping_group_range fs/file-max";
    let said = stdout(run_in(&root, &["-u", "1000"], &["sh", "-c", script])?)?;
    let words: Vec<_> = said.split_whitespace().collect();
    let no_limit = i64::MAX.to_string();
    ensure!(words == ["served", "0", "2147483647", &no_limit], "{said}");
    Ok(())
}

fn users_and_programs_are_found_as_the_container_has_them() -> Result<()> {
    let (root, own) = (scratch("cases-users")?, scratch("cases-users-volume")?);
    busybox(&root)?;
    write(&root.join("bin/small"), 0o755, &of_32_bits())?;
    write(&root.join("bin/script"), 0o755, b"#!/bin/none -x\n")?;
    write(&root.join("bin/windows"), 0o755, b"#!/bin/sh\r\n")?;
    fs::create_dir(root.join("closed"))?;
    write(&root.join("closed/id"), 0o700, b"")?;
    let passwd = own.join("passwd");
    write(
        &passwd,
        0o644,
        b"root:x:0:0::/root:\nmounted:x:1234:33::/mnt:\n1000:x:0:0::/root:\n",
    )?;
    let volume = format!("{}:/etc/passwd", passwd.display());
    let name = "cases-users";
    let mut start = koya([
        "run",
        "-di",
        "--name",
        name,
        "--stop-signal",
        "SIGPWR",
        "--rootfs",
    ]);
    start
        .arg(&root)
        .args(["-v", &volume, "-u", "mounted", "--"]);
    // Its input stays open, and it has said no whole line after "up".
    let wait = "id -u; id -g; echo $HOME; trap 'echo power; exit 5' PWR; echo up; printf 'name? '; read name; echo closed";
    stdout(start.args(["sh", "-c", wait]).output()?)?;
    let container = Background { name: name.into() };
    container.wait_until("it asks", |said| said.ends_with("?"))?;
    ensure!(
        container.said()? == "1234\n33\n/mnt\nup\nname?",
        "{}",
        container.said()?
    );

    let exec = |options: &[&str], command: &[&str]| stdout(container.exec(options, command)?);
    // A user added after the start; a number, which is also the name of a user; and supplementary groups.
    let add = "echo later:x:77:33::/tmp: >> /etc/passwd";
    exec(&["-u", "0"], &["sh", "-c", add])?;
    ensure!(exec(&["-u", "later"], &["sh", "-c", "id -u; echo $HOME"])? == "77\n/tmp");
    let status = "id -u; awk '/^Groups/ { $1 = \"\"; print }' /proc/self/status";
    ensure!(exec(&["-u", "1000"], &["sh", "-c", status])? == "1000\n 0");
    ensure!(exec(&["-u", "later:40"], &["sh", "-c", status])? == "77\n 40");

    if architecture() == "amd64" {
        ensure!(exec(&[], &["small"])? == "32 bits");
    }
    // A program without permission in PATH does not hide a later one.
    ensure!(exec(&["-e", "PATH=/closed:/bin"], &["id", "-u"])? == "1234");
    let closed = container.exec(&["-e", "PATH=/closed"], &["id"])?;
    ensure!(closed.status.code() == Some(126), "{closed:?}");
    for (program, interpreter) in [("script", r#""/bin/none""#), ("windows", r#""/bin/sh\r""#)] {
        let output = container.exec(&[], &[program])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.code() == Some(127) && said.contains(interpreter),
            "{program}: {output:?}"
        );
    }
    let refused = run_in(&root, &["-w", "/bin/script"], &["true"])?;
    let why = String::from_utf8_lossy(&refused.stderr);
    ensure!(
        refused.status.code() == Some(126) && why.contains("directory /bin/script: it is not"),
        "{refused:?}"
    );
    stdout(koya(["stop", "-t", "60", name]).output()?)?;
    // It is no error to stop a container that has ended: in scripts `rm` follows.
    stdout(koya(["stop", name]).output()?)?;
    until("its last word", || {
        Ok(container.said()?.ends_with("power").then_some(()))
    })
}
