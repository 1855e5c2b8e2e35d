//! vsock between the guest and processes of the host, over Unix sockets.

use crate::debian::debian;
use crate::tool::{Background, LIMIT, koya, scratch, stdout, until};
use anyhow::{Context, Result, ensure};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

crate::trials![
    thousands_of_streams_at_once,
    both_sides_connect,
    containers_open_no_vsock_sockets_by_themselves,
];

/// The guest's side, in Perl, which is in Debian's smallest tree: 40 is AF_VSOCK, and the address is `struct sockaddr_vm`.
const GUEST: &str = r#"
    use Socket; $| = 1;
    sub address { pack("SSLLx4", 40, 0, @_) }
    sub dial { my $s; socket($s, 40, SOCK_STREAM, 0) && connect($s, address(@_)) or return; $s }
    sub serve { my ($port, $count) = @_;
        socket(my $l, 40, SOCK_STREAM, 0) or die "socket: $!";
        bind($l, address($port, 0xffffffff)) or die "bind: $!"; listen($l, 4096); print "ready\n";
        map { accept(my $c, $l) or die "accept: $!"; $c } 1..$count }
"#;

struct Guest(Background);

impl Guest {
    fn start(name: &str, socket: &Path, script: &str) -> Result<Self> {
        let (socket, root) = (socket.to_string_lossy(), debian()?);
        let script = format!("{GUEST}{script}");
        let shell = "ulimit -n 4096; exec perl -e \"$0\"";
        let mut run = koya(["run", "-d", "--name", name, "--vsock", &socket, "--rootfs"]);
        run.arg(root)
            .args(["--memory", "512m", "--", "sh", "-c", shell, &script]);
        stdout(run.output()?)?;
        Ok(Self(Background { name: name.into() }))
    }

    fn wait_for(&self, line: &str) -> Result<()> {
        self.0.wait_until(line, |said| said.contains(line))
    }
}

/// Connects to a port of the guest; returns once the guest has accepted.
fn connect(socket: &Path, port: u32) -> Result<BufReader<UnixStream>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(LIMIT))?;
    writeln!(stream, "CONNECT {port}")?;
    let mut stream = BufReader::with_capacity(64, stream);
    let mut line = String::new();
    stream.read_line(&mut line)?;
    ensure!(line.starts_with("OK "), "answered {line:?}");
    Ok(stream)
}

fn thousands_of_streams_at_once() -> Result<()> {
    const COUNT: usize = 2000;
    // This process has the other ends.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit {
        current: limit.maximum,
        ..limit
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised)?;
    let socket = scratch("vsock")?.join("v.sock");
    let script = format!(
        "my @c = serve(7000, {COUNT}); print \"all there\\n\";
         for my $c (@c) {{ my $line = <$c>; syswrite $c, \"got $line\" }} print \"done\\n\"; sleep 1000"
    );
    let guest = Guest::start("vsock-many", &socket, &script)?;
    guest.wait_for("ready")?;
    let mut streams = Vec::new();
    for n in 0..COUNT {
        let stream = connect(&socket, 7000);
        streams.push(stream.with_context(|| format!("stream {n}"))?);
    }
    guest.wait_for("all there")?;
    for (n, stream) in streams.iter_mut().enumerate() {
        writeln!(stream.get_mut(), "line {n}")?;
    }
    for (n, stream) in streams.iter_mut().enumerate() {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        ensure!(line == format!("got line {n}\n"), "stream {n}: {line:?}");
    }
    Ok(())
}

/// Regardless of its privileges and its seccomp filter; EAFNOSUPPORT is 97.
fn containers_open_no_vsock_sockets_by_themselves() -> Result<()> {
    let script = "print socket(my $s, 40, 1, 0) ? 0 : $! + 0, qq(\n)";
    let perl = ["perl", "-e", script];
    let socket = scratch("vsock")?.join("v.sock");
    let socket = socket.to_string_lossy();
    let kinds: [(&[&str], &str); 4] = [
        (&[], "97"),
        (&["--privileged"], "97"),
        (&["--security-opt", "seccomp=unconfined"], "97"),
        (&["--vsock", &socket], "0"),
    ];
    for (options, expected) in kinds {
        let mut run = koya(["run"]);
        run.args(options).arg("--rootfs").arg(debian()?);
        let said = stdout(run.arg("--").args(perl).output()?)?;
        ensure!(said.trim_end() == expected, "{options:?}: {said}");
    }
    let name = "vsock-none";
    let mut run = koya(["run", "-d", "--name", name, "--privileged", "--rootfs"]);
    run.arg(debian()?).args(["--", "sleep", "1000"]);
    stdout(run.output()?)?;
    let container = Background { name: name.into() };
    let said = stdout(container.exec(&[], &perl)?)?;
    ensure!(said.trim_end() == "97", "exec: {said}");
    Ok(())
}

/// The guest connects to two ports of the host, one of them without a listener, and echoes its input; the host connects to a
/// port without a listener.
fn both_sides_connect() -> Result<()> {
    const SIZE: usize = 8 << 20;
    let socket = scratch("vsock")?.join("v.sock");
    let listener = UnixListener::bind(socket.with_file_name("v.sock_52"))?;
    let script = r#"
        print "refused\n" unless dial(53, 2);
        my $s = dial(52, 2) or die "connect: $!"; print "connected\n";
        while (sysread $s, my $b, 65536) { for (my $o = 0; $o < length $b;) { $o += syswrite $s, $b, 65536, $o } }
        shutdown $s, 1; sleep 1000
    "#;
    let guest = Guest::start("vsock-both", &socket, script)?;
    guest.wait_for("refused\nconnected")?;
    let (mut stream, _) = listener.accept()?;
    let sent: Vec<u8> = (0..SIZE).map(|n| (n / 7) as u8).collect();
    let writer = {
        let (mut stream, sent) = (stream.try_clone()?, sent.clone());
        std::thread::spawn(move || {
            stream.write_all(&sent)?;
            stream.shutdown(std::net::Shutdown::Write)
        })
    };
    stream.set_read_timeout(Some(LIMIT))?;
    let mut got = Vec::new();
    stream.read_to_end(&mut got)?;
    writer.join().ok().context("the writer panicked")??;
    ensure!(got == sent, "{} bytes came back, or others", got.len());
    let nobody = connect(&socket, 99).err().context("port 99 answered")?;
    ensure!(
        format!("{nobody:#}").contains("answered \"\""),
        "{nobody:#}"
    );
    stdout(koya(["kill", &guest.0.name]).output()?)?;
    until(
        "the socket is gone",
        || Ok((!socket.exists()).then_some(())),
    )
}
