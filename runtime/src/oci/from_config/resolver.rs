//! Name resolution of a container: that of the host, except for what its configuration sets.

use crate::{Error, Resolver, read_small_file};
use std::net::IpAddr;
use std::path::Path;

/// The configuration of the host.
const HOST: &str = "/etc/resolv.conf";

/// The upstream name servers of systemd-resolved; /etc/resolv.conf contains only its own address.
const UPSTREAM: &str = "/run/systemd/resolve/resolv.conf";

/// No real configuration is larger.
const MAX_SIZE: u64 = 64 << 10;

/// Contents of /etc/resolv.conf.
///
/// # Errors
/// The search domain or the option that is not a word.
pub(super) fn configuration(wanted: &Resolver) -> Result<String, Error> {
    let base = match wanted.name_servers.is_empty() {
        true => host(),
        false => reachable(&read(Path::new(HOST))).0,
    };
    change(&base, wanted)
}

/// Configuration of the host. Without a name server that a guest can reach, it is that of a host without a network.
fn host() -> String {
    match reachable(&read(Path::new(HOST))) {
        (found, true) => found,
        (rest, false) => match reachable(&read(Path::new(UPSTREAM))) {
            (found, true) => found,
            _ => rest,
        },
    }
}

/// Checks a word for a line of a configuration file.
///
/// # Errors
/// If it is empty, or more than one word.
pub(super) fn check_word(field: &'static str, word: &str) -> Result<(), Error> {
    if word.is_empty() || word.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(Error::invalid(field, format!("{word:?} is not a word")));
    }
    Ok(())
}

/// Replaces the lines of each kind that is set.
fn change(base: &str, wanted: &Resolver) -> Result<String, Error> {
    for word in wanted.search.iter().chain(&wanted.options) {
        check_word("resolver", word)?;
    }
    let (servers, search) = (&wanted.name_servers, &wanted.search);
    let replaced = |line: &str| match line.split_whitespace().next() {
        Some("nameserver") => !servers.is_empty(),
        Some("search" | "domain") => !search.is_empty(),
        Some("options") => !wanted.options.is_empty(),
        _ => false,
    };
    let mut lines: Vec<String> = servers
        .iter()
        .map(|ip| format!("nameserver {ip}"))
        .collect();
    let kept = base.lines().filter(|line| !replaced(line));
    lines.extend(kept.map(str::to_owned));
    if !search.is_empty() && *search != ["."] {
        lines.push(format!("search {}", search.join(" ")));
    }
    if !wanted.options.is_empty() {
        lines.push(format!("options {}", wanted.options.join(" ")));
    }
    Ok(lines.into_iter().map(|line| line + "\n").collect())
}

/// Content of a small file, in which comments may have any encoding.
fn read(path: &Path) -> String {
    let content = read_small_file(path, MAX_SIZE).unwrap_or_default();
    String::from_utf8_lossy(&content).into_owned()
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

    #[test]
    fn what_is_set_replaces_what_the_host_has() {
        let base = "nameserver 192.0.2.1\nsearch lan\noptions edns0\n";
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let of = |servers: &[&str], search: &[&str], options: &[&str]| {
            let wanted = Resolver {
                name_servers: servers.iter().map(|ip| ip.parse().unwrap()).collect(),
                search: words(search),
                options: words(options),
            };
            change(base, &wanted).map_err(|error| error.to_string())
        };
        assert_eq!(of(&[], &[], &[]).unwrap(), base);
        assert_eq!(
            of(&["::1", "8.8.8.8"], &[], &[]).unwrap(),
            "nameserver ::1\nnameserver 8.8.8.8\nsearch lan\noptions edns0\n"
        );
        assert_eq!(
            of(&[], &["a.example", "b.example"], &["ndots:2", "rotate"]).unwrap(),
            "nameserver 192.0.2.1\nsearch a.example b.example\noptions ndots:2 rotate\n"
        );
        // Docker's way to have no search domain.
        assert_eq!(
            of(&[], &["."], &[]).unwrap(),
            "nameserver 192.0.2.1\noptions edns0\n"
        );
        for wrong in ["", "a b", "x\nnameserver 192.0.2.9"] {
            assert!(
                of(&[], &[wrong], &[]).unwrap_err().contains("not a word"),
                "{wrong:?}"
            );
            assert!(of(&[], &[], &[wrong]).is_err(), "{wrong:?}");
        }
    }
}
