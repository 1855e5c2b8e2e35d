//! Name servers of a container whose root and network configure none: those of the host.

use std::net::IpAddr;
use std::path::Path;

/// The upstream name servers of systemd-resolved; /etc/resolv.conf contains only its own address.
const UPSTREAM: &str = "/run/systemd/resolve/resolv.conf";

/// No real configuration is larger.
const MAX_SIZE: u64 = 64 << 10;

/// Contents of /etc/resolv.conf. Without a name server that a guest can reach, they are those of a host without a network.
pub(super) fn configuration() -> String {
    let own = read(Path::new("/etc/resolv.conf"));
    match reachable(&own) {
        (found, true) => found,
        (rest, false) => match reachable(&read(Path::new(UPSTREAM))) {
            (found, true) => found,
            _ => rest,
        },
    }
}

/// Search domains and options of the host's resolver configuration.
pub fn resolver_options() -> String {
    let (all, _) = reachable(&read(Path::new("/etc/resolv.conf")));
    let lines = all.lines();
    let others = lines.filter(|line| !line.starts_with("nameserver"));
    others.map(|line| format!("{line}\n")).collect()
}

/// Content of a small file, in which comments may have any encoding.
fn read(path: &Path) -> String {
    let is_small = path.metadata().is_ok_and(|data| data.len() <= MAX_SIZE);
    let content = is_small.then(|| std::fs::read(path).ok());
    String::from_utf8_lossy(&content.flatten().unwrap_or_default()).into_owned()
}

/// The lines that are valid outside the host, and whether they contain a name server.
fn reachable(configuration: &str) -> (String, bool) {
    let mut has_server = false;
    let mut kept = String::new();
    for line in configuration.lines() {
        let mut words = line.split_whitespace();
        let keep = match (words.next(), words.next()) {
            (Some("nameserver"), Some(address)) => {
                // A zone names an interface of the host.
                let reachable = address
                    .parse::<IpAddr>()
                    .is_ok_and(|address| !address.is_loopback() && !address.is_unspecified());
                has_server |= reachable;
                reachable
            }
            (Some("search" | "domain" | "options" | "sortlist"), Some(_)) => true,
            _ => false,
        };
        if keep {
            kept.push_str(line.trim());
            kept.push('\n');
        }
    }
    (kept, has_server)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comment_of_another_encoding_hides_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"# Z\xfcrich\nnameserver 192.0.2.1\n").unwrap();
        let (kept, _) = reachable(&read(file.path()));
        assert_eq!(kept, "nameserver 192.0.2.1\n");
    }

    #[test]
    fn only_servers_that_a_guest_can_reach_are_left() {
        let all = "# by a program\nnameserver 127.0.0.53\n nameserver 192.0.2.1\nnameserver ::1\nnameserver fe80::1%eth0\n\
                   nameserver 2001:db8::1\nsearch a.example b.example\noptions edns0\nnameserver\nlookup file\n";
        let kept = "nameserver 192.0.2.1\nnameserver 2001:db8::1\nsearch a.example b.example\noptions edns0\n";
        assert_eq!(reachable(all), (kept.to_owned(), true));
        let alone = "nameserver 127.0.0.53\nsearch lan\n";
        assert_eq!(reachable(alone), ("search lan\n".to_owned(), false));
        assert_eq!(reachable(""), (String::new(), false));
    }
}
