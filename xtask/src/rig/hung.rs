//! Diagnosis of a hung rig, through QEMU's monitor.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Number of samples of the CPU: the same address each time means a halt or a short loop.
const LOOKS: usize = 4;
/// Time for a panic to reach the console.
const PANIC: Duration = Duration::from_secs(3);

/// Samples the address of its CPU a few times, as text. Then sends an NMI, which makes its kernel panic with a backtrace on
/// the console.
pub(crate) fn look(monitor: &Path) -> String {
    let mut text = String::new();
    let Ok(mut monitor) = UnixStream::connect(monitor) else {
        return text;
    };
    monitor
        .set_read_timeout(Some(Duration::from_millis(300)))
        .ok();
    for _ in 0..LOOKS {
        let said = ask(&mut monitor, "info registers");
        for line in said
            .lines()
            .filter(|l| l.contains("IP=") || l.contains("PC=") || l.starts_with("CR0"))
        {
            writeln!(text, "the rig's CPU: {}", line.trim()).ok();
        }
    }
    ask(&mut monitor, "nmi");
    std::thread::sleep(PANIC);
    text
}

/// Sends a command to QEMU and reads the reply until the stream's timeout.
fn ask(monitor: &mut UnixStream, command: &str) -> String {
    let mut answer = Vec::new();
    let mut part = [0; 4096];
    if writeln!(monitor, "{command}").is_ok() {
        while let Ok(length @ 1..) = monitor.read(&mut part) {
            answer.extend_from_slice(&part[..length]);
        }
    }
    String::from_utf8_lossy(&answer).into_owned()
}
