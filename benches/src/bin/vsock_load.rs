//! vsock measurements in a guest, with the server in `devices`: prints `RESULT name value`.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::time::Instant;
use vsock::{VMADDR_CID_HOST, VsockStream};

const PORT: u32 = 7000;
/// Amount of data in each direction, in MiB.
const MIB: u8 = 96;
const ROUND_TRIPS: u32 = 2000;
const CONNECTIONS: u32 = 300;

fn main() -> io::Result<()> {
    report("vsock-send", f64::from(MIB) / timed(send)?);
    report("vsock-receive", f64::from(MIB) / timed(receive)?);
    report(
        "vsock-round-trip",
        round_trips()? / f64::from(ROUND_TRIPS) * 1e6,
    );
    report(
        "vsock-connect",
        f64::from(CONNECTIONS) / timed(connections)?,
    );
    Ok(())
}

fn report(name: &str, value: f64) {
    println!("RESULT {name} {value}");
}

fn timed(work: impl FnOnce() -> io::Result<()>) -> io::Result<f64> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed().as_secs_f64())
}

fn connect(wish: u8, mib: u8) -> io::Result<VsockStream> {
    let mut stream = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, PORT)?;
    stream.write_all(&[wish, mib])?;
    Ok(stream)
}

/// Shuts this side down and waits until the other side has received everything.
fn finish(mut stream: VsockStream) -> io::Result<()> {
    stream.shutdown(Shutdown::Write)?;
    stream.read_exact(&mut [0])
}

fn send() -> io::Result<()> {
    let mut stream = connect(b's', 0)?;
    let buffer = vec![1; 256 << 10];
    for _ in 0..u32::from(MIB) * 4 {
        stream.write_all(&buffer)?;
    }
    finish(stream)
}

fn receive() -> io::Result<()> {
    let mut stream = connect(b'r', MIB)?;
    let mut buffer = vec![0; 256 << 10];
    let mut left = usize::from(MIB) << 20;
    while left > 0 {
        match stream.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => left = left.saturating_sub(count),
        }
    }
    Ok(())
}

fn round_trips() -> io::Result<f64> {
    let mut stream = connect(b'e', 0)?;
    let seconds = timed(|| {
        for _ in 0..ROUND_TRIPS {
            stream.write_all(b"x")?;
            stream.read_exact(&mut [0])?;
        }
        Ok(())
    })?;
    finish(stream)?;
    Ok(seconds)
}

fn connections() -> io::Result<()> {
    for _ in 0..CONNECTIONS {
        finish(connect(b's', 0)?)?;
    }
    Ok(())
}
