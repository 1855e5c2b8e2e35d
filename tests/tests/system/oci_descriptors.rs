//! Descriptors inherited from the caller (`--preserve-fds`), and pidfds sent to the caller (`--pidfd-socket`).

use crate::oci::{Runtime, bundle, receive_descriptor, text};
use crate::tool::{feed, scratch, until};
use anyhow::{Context, Result, ensure};
use rustix::process::{Signal, pidfd_send_signal};
use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};

crate::trials!(
    pipes_and_sockets_are_preserved,
    files_are_preserved_one_way,
    devices_that_are_the_kernels_are_the_guests,
    descriptors_that_cannot_be_preserved_are_refused,
    a_descriptor_of_its_process_is_sent
);

/// A shell that executes `koya-runtime` with these arguments and redirections.
fn shell(runtime: &Runtime, words: &str) -> Command {
    let mut command = Command::new("sh");
    command.arg("-c");
    command.arg(format!(
        "exec koya-runtime --root '{}' {words}",
        runtime.root.display()
    ));
    command
}

fn pipes_and_sockets_are_preserved() -> Result<()> {
    let runtime = Runtime::koya()?;
    let reads = bundle("read line <&3; echo \"got $line\" >&4; cat <&3 >&4", |_| ())?;
    let words = format!(
        "run --preserve-fds 2 --bundle {} descriptors-p 3<&0 4>&1 </dev/null >/dev/null",
        text(&reads)?
    );
    let output = feed(shell(&runtime, &words), b"this\nthat")?;
    ensure!(output.stdout == b"got this\nthat", "{output:?}");

    // A detached runtime keeps no descriptor once the process has ended.
    let writes = bundle(
        "echo \"$LISTEN_FDS of $LISTEN_PID\" >&3; exec 3>&-; sleep 1",
        |_| (),
    )?;
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!(
        "LISTEN_PID=$$ LISTEN_FDS=1 exec koya-runtime --root '{}' run -d --bundle {} descriptors-d 3>&1 >/dev/null",
        runtime.root.display(),
        text(&writes)?
    ));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut said = String::new();
    let out = child.stdout.take();
    out.context("no output")?.read_to_string(&mut said)?;
    ensure!(child.wait()?.success() && said == "1 of 1\n", "{said:?}");
    runtime.ok(&["delete", "--force", "descriptors-d"])?;

    let long = bundle("exec sleep 1000", |_| ())?;
    runtime.ok(&["run", "-d", "--bundle", text(&long)?, "descriptors-e"])?;
    for detach in ["", "--detach"] {
        let (mut ours, theirs) = UnixStream::pair()?;
        let words = format!(
            "exec {detach} --preserve-fds 1 descriptors-e sh -c 'read line <&3; echo \"$line back\" >&3' 3<&0 </dev/null >/dev/null"
        );
        // The command, which has the other end, too, is dropped here: its end must end the reading.
        let mut exec = shell(&runtime, &words)
            .stdin(OwnedFd::from(theirs))
            .spawn()?;
        ours.write_all(b"there and\n")?;
        let mut said = String::new();
        ours.read_to_string(&mut said)?;
        ensure!(said == "there and back\n", "{detach}: {said:?}");
        ensure!(exec.wait()?.success(), "{detach}");
    }
    runtime.ok(&["delete", "--force", "descriptors-e"])?;
    Ok(())
}

/// Reads and writes use the file's current offset.
fn files_are_preserved_one_way() -> Result<()> {
    let runtime = Runtime::koya()?;
    let dir = scratch("preserved-files")?;
    let (from, to) = (dir.join("from"), dir.join("to"));
    let content = format!("first\n{}", "line\n".repeat(100_000));
    fs::write(&from, &content)?;
    fs::write(&to, "before\n")?;
    let copies = bundle("cat /proc/self/fd/3 >&4", |_| ())?;
    let words = format!(
        "run --preserve-fds 2 --bundle {} descriptors-f 3<&0 4>>{} </dev/null",
        text(&copies)?,
        text(&to)?
    );
    let mut file = fs::File::open(&from)?;
    file.read_exact(&mut [0; 6])?;
    let mut run = shell(&runtime, &words);
    ensure!(run.stdin(file).status()?.success());
    let expected = content.replacen("first", "before", 1);
    ensure!(fs::read_to_string(&to)? == expected, "{}", to.display());
    Ok(())
}

/// podman replaces its own standard streams by /dev/null, and passes on the descriptors after them.
fn devices_that_are_the_kernels_are_the_guests() -> Result<()> {
    let runtime = Runtime::koya()?;
    let script = "for fd in 3 4 5 6; do stat -Lc %t:%T /proc/self/fd/$fd; done; cat <&3; head -c 3 <&4 | wc -c; \
                  echo lost >&5 && echo \"got $(cat <&5)\"; cat <&6";
    let reads = bundle(script, |_| ())?;
    let words = format!(
        "run --preserve-fds 4 --bundle {} n 3</dev/null 4</dev/zero 5<>/dev/null 6<&0 </dev/null",
        text(&reads)?
    );
    let output = feed(shell(&runtime, &words), b"last")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<_> = said.lines().collect();
    ensure!(
        lines.len() == 7 && lines[..3] == ["1:3", "1:5", "1:3"],
        "{output:?}"
    );
    ensure!(lines[4..] == ["3", "got ", "last"], "{output:?}");
    Ok(())
}

fn descriptors_that_cannot_be_preserved_are_refused() -> Result<()> {
    let runtime = Runtime::koya()?;
    let bundle = bundle("true", |_| ())?;
    let bundle = text(&bundle)?;
    for (words, expected) in [
        (
            format!("run --preserve-fds 2 --bundle {bundle} r 3</dev/kmsg 4>&-"),
            "descriptor 3 can't be passed into a virtual machine: it is a device",
        ),
        (
            format!("create --preserve-fds 2 --bundle {bundle} r 3<&0 4<>{bundle}/config.json"),
            "descriptor 4 can't be passed into a virtual machine: it is a regular file that is open both ways",
        ),
        (
            // One that is not open is left out.
            "exec --preserve-fds 2 r true 3<&0 4<&-".to_owned(),
            "container does not exist: r",
        ),
    ] {
        let output = feed(shell(&runtime, &words), b"")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            said.lines().count() == 1 && said.contains(expected),
            "{said}"
        );
        ensure!(!output.status.success(), "{words}");
    }
    Ok(())
}

fn a_descriptor_of_its_process_is_sent() -> Result<()> {
    let runtime = Runtime::koya()?;
    let bundle = bundle("exec sleep 1000", |_| ())?;
    let socket = scratch("pidfd")?.join("socket");
    let listener = UnixListener::bind(&socket)?;
    let (bundle, socket) = (text(&bundle)?, text(&socket)?);
    runtime.ok(&[
        "create",
        "--pidfd-socket",
        socket,
        "--bundle",
        bundle,
        "descriptors-p",
    ])?;
    let process = receive_descriptor(&listener)?;
    runtime.ok(&["start", "descriptors-p"])?;
    let script = "exec sleep 1000";
    runtime.ok(&[
        "exec",
        "-d",
        "--pidfd-socket",
        socket,
        "descriptors-p",
        "sh",
        "-c",
        script,
    ])?;
    let added = receive_descriptor(&listener)?;
    let count = || runtime.ok(&["exec", "descriptors-p", "sh", "-c", "pidof sleep | wc -w"]);
    ensure!(
        count()?.trim() == "2",
        "the one that was added does not run"
    );
    pidfd_send_signal(&added, Signal::KILL)?;
    until("the end of the process that was added", || {
        Ok((count()?.trim() == "1").then_some(()))
    })?;
    pidfd_send_signal(&process, Signal::KILL)?;
    until("the end of the container", || {
        runtime.is("descriptors-p", "stopped")
    })?;
    runtime.ok(&["delete", "descriptors-p"])?;
    drop(listener);
    let refused = runtime.call(&[
        "create",
        "--pidfd-socket",
        socket,
        "--bundle",
        bundle,
        "descriptors-q",
    ])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(
        !refused.status.success() && said.contains("cannot connect to the pidfd socket"),
        "{said}"
    );
    ensure!(
        fs::read_dir(&runtime.root)?.next().is_none(),
        "something is left"
    );
    Ok(())
}
