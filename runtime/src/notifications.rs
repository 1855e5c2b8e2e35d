//! Messages of a container to its service manager (sd_notify(3)), as far as they may leave a guest: its state, in known
//! forms. What concerns processes, descriptors and time limits of the host is not the guest's to say.

use koya_protocol::notify::{HEADER_LEN, MAX_LEN, parse_header};
use koya_vmm::devices::rate_limit::{Rate, RateLimiter};
use koya_vmm::guest_text::{self, Warnings};
use rustix::time::{ClockId, clock_gettime};
use std::io::{ErrorKind, Read as _};
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// Messages accepted of a guest: each is work for the service manager. A guest that sends more has to wait.
const RATE: Rate = Rate {
    per_second: 10,
    burst: Some(100),
};

/// Assignments that are passed on as they are.
const STATES: [&str; 5] = [
    "READY=1",
    "RELOADING=1",
    "STOPPING=1",
    "WATCHDOG=1",
    "WATCHDOG=trigger",
];

/// Maximum length of the name of a D-Bus error.
const MAX_NAME: usize = 255;

/// A guest may send nonsense all the time.
static IGNORED: Warnings = Warnings::new();

/// Messages of a container to its service manager, in the form of sd_notify(3), from a guest that is not trusted. Only
/// `READY=1`, `RELOADING=1`, `STOPPING=1`, `WATCHDOG=1`, `WATCHDOG=trigger`, `STATUS=`, `ERRNO=`, `BUSERROR=` and
/// `MONOTONIC_USEC=` are among them, the last with a time of the host; the rest is left out.
///
/// As an iterator it waits for the next message; it ends with the container.
#[derive(Debug)]
pub struct Notifications {
    stream: UnixStream,
    limiter: RateLimiter,
}

impl Notifications {
    pub(crate) fn new(stream: UnixStream) -> Self {
        let limiter = RateLimiter::of_operations(RATE);
        Self { stream, limiter }
    }

    /// The next message as it comes from the guest; `None` at the end.
    fn receive(&mut self) -> Option<Vec<u8>> {
        let mut header = [0; HEADER_LEN];
        if let Err(error) = self.stream.read_exact(&mut header) {
            if error.kind() != ErrorKind::UnexpectedEof {
                IGNORED.debug(format_args!("notifications of a container: {error}"));
            }
            return None;
        }
        let Some(len) = parse_header(header) else {
            IGNORED.warn(format_args!(
                "notifications of a container end: the guest sent a message that is too long"
            ));
            return None;
        };
        let mut message = vec![0; len];
        self.stream.read_exact(&mut message).ok()?;
        Some(message)
    }
}

impl Iterator for Notifications {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        loop {
            while let Some(wait) = self.limiter.start(Instant::now()) {
                std::thread::sleep(wait);
            }
            let message = self.receive()?;
            let allowed = allowed(&message, monotonic_usec());
            if !allowed.is_empty() {
                return Some(allowed);
            }
        }
    }
}

/// The host's CLOCK_MONOTONIC in microseconds.
fn monotonic_usec() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
}

/// The lines of a message that are passed on; for each variable the first one, as in systemd.
fn allowed(message: &[u8], now_usec: u64) -> String {
    let mut lines: Vec<String> = Vec::new();
    for line in message.split(|byte| *byte == b'\n') {
        let Some(line) = allowed_line(line, now_usec) else {
            continue;
        };
        let name = line.split('=').next();
        if !lines.iter().any(|other| other.split('=').next() == name) {
            lines.push(line);
        }
    }
    let all = lines.join("\n");
    // The time of the host may be longer than that of the guest.
    match all.len() <= MAX_LEN {
        true => all,
        false => String::new(),
    }
}

fn allowed_line(line: &[u8], now_usec: u64) -> Option<String> {
    let line = std::str::from_utf8(line).ok()?;
    if STATES.contains(&line) {
        return Some(line.to_owned());
    }
    let (name, value) = line.split_once('=')?;
    match name {
        "STATUS" => Some(format!("STATUS={}", guest_text::sanitize_line(value))),
        "ERRNO" => {
            let number: u16 = value.parse().ok()?;
            Some(format!("ERRNO={number}"))
        }
        "BUSERROR" => {
            let valid = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            let is_name = value.len() <= MAX_NAME && value.chars().all(valid);
            is_name.then(|| line.to_owned())
        }
        // The guest's clock began with the guest, and managers compare it with theirs.
        "MONOTONIC_USEC" => Some(format!("MONOTONIC_USEC={now_usec}")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use koya_protocol::notify::frame;
    use std::io::Write as _;
    use std::time::Duration;

    #[test]
    fn only_the_state_of_the_container_is_passed_on() {
        let cases: &[(&[u8], &str)] = &[
            (b"READY=1", "READY=1"),
            (b"READY=1\nSTATUS=up\nMAINPID=1\n", "READY=1\nSTATUS=up"),
            (
                b"RELOADING=1\nMONOTONIC_USEC=5",
                "RELOADING=1\nMONOTONIC_USEC=77",
            ),
            (b"WATCHDOG=1\nWATCHDOG=trigger", "WATCHDOG=1"),
            (b"STOPPING=1\nERRNO=2", "STOPPING=1\nERRNO=2"),
            (
                b"BUSERROR=org.example.Error-1\nSTATUS=a\nSTATUS=b",
                "BUSERROR=org.example.Error-1\nSTATUS=a",
            ),
            (b"STATUS=", "STATUS="),
            (b"STATUS=\x1b[2Jcleared\tby\x07", "STATUS=cleared by"),
            (b"STATUS=\xff", ""),
            (b"READY=2", ""),
            (b" READY=1", ""),
            (b"READY=1\r", ""),
            (b"READY=1\0", ""),
            (b"ERRNO=-1\nERRNO=1x", ""),
            (b"BUSERROR=a b", ""),
            (b"MAINPID=1\nMAINPIDFDID=1\nMAINPIDFD=1", ""),
            (b"FDSTORE=1\nFDNAME=x\nFDSTOREREMOVE=1\nFDPOLL=0", ""),
            (b"WATCHDOG_USEC=1\nEXTEND_TIMEOUT_USEC=9999999999", ""),
            (b"NOTIFYACCESS=all\nBARRIER=1\nX_OWN=1", ""),
            (b"\n\n=\n", ""),
        ];
        for (message, expected) in cases {
            let text = String::from_utf8_lossy(message);
            assert_eq!(allowed(message, 77), *expected, "{text:?}");
        }
        let mut long = b"STATUS=".to_vec();
        long.resize(MAX_LEN, b'x');
        assert_eq!(allowed(&long, 77).len(), MAX_LEN);
        long.truncate(MAX_LEN - 20);
        long.extend(b"\nMONOTONIC_USEC=1");
        assert_eq!(allowed(&long, u64::MAX), "");
    }

    #[test]
    fn messages_come_one_by_one_until_the_end() {
        let (mut guest, ours) = UnixStream::pair().unwrap();
        for message in ["MAINPID=1", "STATUS=a", "READY=1\nFDSTORE=1"] {
            guest
                .write_all(&frame(message.as_bytes()).unwrap())
                .unwrap();
        }
        drop(guest);
        let got: Vec<_> = Notifications::new(ours).collect();
        assert_eq!(got, ["STATUS=a", "READY=1"]);
    }

    #[test]
    fn a_guest_that_breaks_the_protocol_is_not_heard_any_more() {
        let (mut guest, ours) = UnixStream::pair().unwrap();
        guest.write_all(&[0xff; 4096]).unwrap();
        assert_eq!(Notifications::new(ours).next(), None);
    }

    #[test]
    fn a_guest_that_sends_all_the_time_has_to_wait() {
        let (mut guest, ours) = UnixStream::pair().unwrap();
        let messages = 110;
        for _ in 0..messages {
            guest.write_all(&frame(b"WATCHDOG=1").unwrap()).unwrap();
        }
        drop(guest);
        let began = Instant::now();
        assert_eq!(Notifications::new(ours).count(), messages);
        // All but the first hundred.
        assert!(began.elapsed() >= Duration::from_millis(900));
    }
}
