//! Docker's networks.

use super::{Docker, Kind};
use crate::daemon::ended;
use crate::tool::until;
use anyhow::{Result, ensure};
use std::io::{Read as _, Write as _};
use std::net::{TcpStream, UdpSocket};
use std::sync::mpsc;
use std::time::Duration;

/// Docker's own networks: the default one with a published port, one with names, none; and unsupported options.
pub(super) fn networks_are_dockers(docker: &Docker) -> Result<()> {
    docker.serve("web", &["-p", "18080:80"])?;
    let address = docker.inspect(
        "web",
        "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}",
    )?;
    until("its address to answer", || fetch(&format!("{address}:80")))?;
    until("its port to answer", || fetch("127.0.0.1:18080"))?;
    let said = docker.sh(
        &[],
        &format!("{PAGE}; page {address}; ping -c 1 -W 20 10.89.0.1 >/dev/null && echo out"),
    )?;
    ensure!(said == "pong\nout", "{said}");
    docker.said(["rm", "-f", "web"])?;

    names_are_dockers(docker)?;

    let said = docker.sh(&["--network", "none"], "ls /sys/class/net")?;
    ensure!(said == "lo", "{said}");
    // By path it is a network namespace that is refused.
    docker.refused(&["--network", "host"], "the host's network")?;
    docker.serve("other", &[])?;
    let shared = ["--network", "container:other"];
    match docker.kind {
        Kind::Shim => {
            docker.refused(&shared, "the network of another container can't be shared")?
        }
        // Both are in one virtual machine.
        Kind::Path => {
            let script = format!("{PAGE}; page 127.0.0.1; cat /proc/sys/kernel/random/boot_id");
            let said = docker.sh(&shared, &script)?;
            let boot = docker.exec("other", "cat /proc/sys/kernel/random/boot_id")?;
            ensure!(said == format!("pong\n{boot}"), "{said} and not {boot}");
        }
    }
    docker.said(["rm", "-f", "other"])?;
    let socket = format!("{}/sock:/var/run/docker.sock", docker.dir.display());
    docker.refused(
        &["-v", &socket],
        "a socket of the host's can't be used in a guest",
    )?;
    docker.nothing_is_left()
}

/// Checks for the page of [`Docker::serve`]. Not by the machine's busybox: its static C library needs shared libraries for
/// name lookups, and may crash.
fn fetch(address: &str) -> Result<Option<()>> {
    let said = page(address).unwrap_or_default();
    Ok(said.ends_with("pong\n").then_some(()))
}

/// Response of an HTTP server.
pub(crate) fn page(address: &str) -> Result<String> {
    let limit = Duration::from_secs(5);
    let mut stream = TcpStream::connect_timeout(&address.parse()?, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    Ok(said)
}

/// The same in a container's shell.
pub(crate) const PAGE: &str =
    r"page() { printf 'GET / HTTP/1.0\r\n\r\n' | nc -w 20 $1 80 | tail -n 1; }";

/// Names of containers, and external names from another name server in the container's network.
fn names_are_dockers(docker: &Docker) -> Result<()> {
    let gateway = "10.91.0.1";
    let create = [
        "network",
        "create",
        "--subnet",
        "10.91.0.0/24",
        "--gateway",
        gateway,
        "names",
    ];
    docker.said(create)?;
    docker.serve("web", &["--network", "names", "--network-alias", "alias"])?;
    let server = UdpSocket::bind((gateway, 53))?;
    server.set_read_timeout(Some(Duration::from_secs(1)))?;
    // Its end ends the thread: the same test with another version needs the address.
    let (asking, asked) = mpsc::channel::<()>();
    let answers = std::thread::spawn(move || answer_names(&server, &asked));
    let script = format!("{PAGE}; grep ^nameserver /etc/resolv.conf
        for name in web alias; do page $(nslookup -type=a $name | sed -n 's/^Address: //p'); done
        nslookup -type=a outside.example | grep 10.1.2.3; nslookup -type=a nowhere.example | grep NXDOMAIN");
    let options = ["--rm", "--network", "names", "--dns", gateway];
    let (code, said) = ended(&docker.run(&options, &["sh", "-c", &script]).output()?);
    let lines: Vec<_> = said.lines().collect();
    let asked = lines.get(..3) == Some(&["nameserver 127.0.0.11", "pong", "pong"]);
    ensure!(code == Some(0) && asked, "{code:?} {said}");
    ensure!(
        said.contains("10.1.2.3") && said.contains("NXDOMAIN"),
        "{said}"
    );
    drop(asking);
    ensure!(answers.join().is_ok(), "the name server panicked");
    docker.said(["rm", "-f", "web"])?;
    docker.said(["network", "rm", "names"])?;
    Ok(())
}

/// A name server for the address of `outside.example` only (RFC 1035, section 4.1).
fn answer_names(socket: &UdpSocket, end: &mpsc::Receiver<()>) {
    let mut question = [0; 512];
    while end.try_recv() != Err(mpsc::TryRecvError::Disconnected) {
        let Ok((len, peer)) = socket.recv_from(&mut question) else {
            continue;
        };
        let asked = &question[..len];
        let is_known = asked.windows(8).any(|label| label == b"\x07outside");
        let (code, count) = if is_known { (0x80, 1) } else { (0x83, 0) };
        // The name, its terminator, type and class; the rest is not answered.
        let end = 12 + asked[12..].iter().position(|byte| *byte == 0).unwrap_or(0) + 5;
        let mut answer = [
            &asked[..2],
            &[0x81, code, 0, 1, 0, count, 0, 0, 0, 0],
            &asked[12..end],
        ]
        .concat();
        if is_known {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 1, 2, 3]);
        }
        socket.send_to(&answer, peer).ok();
    }
}

/// Networks of a running container: a new interface appears in the guest and answers, and goes again.
pub(super) fn networks_come_and_go(docker: &Docker) -> Result<()> {
    docker.said(["network", "create", "--subnet", "10.92.0.0/24", "more"])?;
    docker.serve("web", &[])?;
    let first = docker.inspect("web", "{{.NetworkSettings.IPAddress}}")? + ":80";
    until("its address to answer", || fetch(&first))?;
    for _ in 0..2 {
        docker.said(["network", "connect", "more", "web"])?;
        let of = |property: &str| {
            let format = format!("{{{{(index .NetworkSettings.Networks \"more\").{property}}}}}");
            docker.inspect("web", &format)
        };
        let address = of("IPAddress")?;
        ensure!(address.starts_with("10.92.0."), "{address}");
        until("the new address to answer", || {
            fetch(&format!("{address}:80"))
        })?;
        let outside = of("MacAddress")?;
        // An interface whose properties change once more is replaced once more. Docker numbers them without reuse.
        until("the MAC address", || {
            let own = docker.exec("web", "cat /sys/class/net/eth[1-9]*/address; true")?;
            Ok((own == outside).then_some(()))
        })?;
        docker.said(["network", "disconnect", "more", "web"])?;
        until("the interface to vanish", || {
            let names = docker.exec("web", "echo /sys/class/net/*")?;
            Ok((names == "/sys/class/net/eth0 /sys/class/net/lo").then_some(()))
        })?;
        until("the first address to answer", || fetch(&first))?;
    }
    docker.said(["rm", "-f", "web"])?;
    docker.said(["network", "rm", "more"])?;
    docker.nothing_is_left()
}
