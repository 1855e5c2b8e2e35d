//! Listening sockets inherited from the caller (`LISTEN_FDS`, `--preserve-fds`): services that are started by their first
//! client.

use crate::debian::debian;
use crate::oci::{Runtime, bundle, text};
use crate::tool::scratch;
use anyhow::{Result, ensure};
use serde_json::json;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::time::Duration;

crate::trials!(a_service_is_started_by_its_clients);

/// Time for the answer of an emulated host.
const LIMIT: Duration = Duration::from_secs(300);

/// Serves a client of the first socket, one of the second, and another one of the first. It says by which name.
const SERVES: &str = r#"
my @sockets = map { open(my $socket, '+<&=', $_) or die "descriptor $_: $!"; $socket } 3, 4;
my $path = substr(getsockname($sockets[0]), 2);
$path =~ s/\0.*//s;
my $port = unpack('x2n', getsockname($sockets[1]));
for my $number (0, 1, 0) {
    accept(my $client, $sockets[$number]) or die "accept: $!";
    my $line = <$client>;
    my $name = $number ? $port : $path;
    syswrite($client, "$name of $ENV{LISTEN_FDS} got $line");
    close($client);
}
"#;

/// Says something that is answered with this.
fn ask(mut stream: impl Read + Write, question: &str, answer: &str) -> Result<()> {
    stream.write_all(question.as_bytes())?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    ensure!(said == answer, "{said:?}, not {answer:?}");
    Ok(())
}

fn a_service_is_started_by_its_clients() -> Result<()> {
    let runtime = Runtime::koya()?;
    let path = scratch("listeners")?.join("socket");
    let unix = UnixListener::bind(&path)?;
    let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = tcp.local_addr()?;
    let root = debian()?;
    let serves = bundle("true", |config| {
        config["root"]["path"] = json!(root);
        config["process"]["args"] = json!(["perl", "-e", SERVES]);
    })?;
    // Before there is a process that could accept them.
    let first = UnixStream::connect(&path)?;
    let second = TcpStream::connect(address)?;
    first.set_read_timeout(Some(LIMIT))?;
    second.set_read_timeout(Some(LIMIT))?;
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!(
        "LISTEN_PID=$$ LISTEN_FDS=2 exec koya-runtime --root '{}' run --bundle {} listeners-a \
         3<&0 4<&1 </dev/null >/dev/null",
        runtime.root.display(),
        text(&serves)?
    ));
    let mut run = command
        .stdin(OwnedFd::from(unix.try_clone()?))
        .stdout(OwnedFd::from(tcp.try_clone()?))
        .spawn()?;
    let (path_name, port) = (text(&path)?, address.port());
    ask(first, "first\n", &format!("{path_name} of 2 got first\n"))?;
    ask(second, "second\n", &format!("{port} of 2 got second\n"))?;
    let third = UnixStream::connect(&path)?;
    third.set_read_timeout(Some(LIMIT))?;
    ask(third, "third\n", &format!("{path_name} of 2 got third\n"))?;
    ensure!(run.wait()?.success());
    // From now on, clients are those of whoever starts it again.
    let mut late = UnixStream::connect(&path)?;
    late.write_all(b"late")?;
    let (mut accepted, _) = unix.accept()?;
    let mut said = [0; 4];
    accepted.read_exact(&mut said)?;
    ensure!(&said == b"late", "{said:?}");
    Ok(())
}
