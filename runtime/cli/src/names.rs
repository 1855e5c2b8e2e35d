//! `koya run --add-host`, `--dns`: names in a container.

use clap::Args;
use koya::{ContainerConfig, Resolver};
use rustix::fs::{Access, access};
use std::net::IpAddr;
use std::path::Path;

#[derive(Args)]
pub(super) struct NameArgs {
    /// Add a line to /etc/hosts (which then replaces that of the root file system)
    #[arg(long, value_name = "NAME:IP", value_parser = parse_host)]
    add_host: Vec<(String, IpAddr)>,
    /// Set a name server (default: that of --net user, otherwise those of the host). --net user reaches no address of the
    /// host itself
    #[arg(long, value_name = "IP")]
    dns: Vec<IpAddr>,
    /// Set a search domain for short names, or none with `.` (default: those of the host)
    #[arg(long, value_name = "DOMAIN")]
    dns_search: Vec<String>,
    /// Set an option of resolv.conf(5), such as ndots:2 (default: those of the host)
    #[arg(long, value_name = "OPTION")]
    dns_option: Vec<String>,
}

impl NameArgs {
    pub(super) fn hosts(&self) -> Vec<(String, IpAddr)> {
        self.add_host.clone()
    }

    /// The resolver's configuration, on a network with or without a name server.
    pub(super) fn resolver(&self, of_network: Option<IpAddr>) -> Resolver {
        let mut name_servers = self.dns.clone();
        if name_servers.is_empty() {
            name_servers.extend(of_network);
        }
        Resolver {
            name_servers,
            search: self.dns_search.clone(),
            options: self.dns_option.clone(),
        }
    }
}

/// Warns of files that the container will not get, because the root directory has no place for them. With an image, they can
/// be created in the writable layer in memory; a link leads to a file, or to the place where one is created.
pub(super) fn warn_without_place(config: &ContainerConfig) {
    let has_resolver = config.resolver != Resolver::default();
    let wanted = [
        ("hosts", !config.extra_hosts.is_empty()),
        ("resolv.conf", has_resolver),
    ];
    let missing = wanted.iter().filter(|(name, is_wanted)| {
        *is_wanted && !has_place(&config.rootfs, name) && !is_covered(config, name)
    });
    for (name, _) in missing {
        let etc = config.rootfs.join("etc");
        log::warn!(
            "names may not be resolved: {} has no file {name}, and none can be made; use -v",
            etc.display()
        );
    }
}

/// Whether a volume provides the file.
fn is_covered(config: &ContainerConfig, name: &str) -> bool {
    let file = Path::new("/etc").join(name);
    let mut volumes = config.volumes.iter();
    volumes.any(|volume| file.starts_with(&volume.destination))
}

fn has_place(rootfs: &Path, name: &str) -> bool {
    let etc = rootfs.join("etc");
    !rootfs.is_dir()
        || match etc.join(name).symlink_metadata() {
            Ok(data) => data.is_file() || data.is_symlink(),
            Err(_) => access(&etc, Access::WRITE_OK).is_ok(),
        }
}

/// `NAME:IP`, or `NAME=IP` as in newer versions of Docker; an IPv6 address may be in brackets.
fn parse_host(text: &str) -> Result<(String, IpAddr), String> {
    let wrong = || format!("{text:?} is not NAME:IP");
    let (name, address) = text.split_once(['=', ':']).ok_or_else(wrong)?;
    let plain = address
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    let address = plain.unwrap_or(address).parse().map_err(|_| wrong())?;
    match name.is_empty() {
        true => Err(wrong()),
        false => Ok((name.to_owned(), address)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_written_as_for_docker() {
        for (text, name, address) in [
            ("db:10.0.0.1", "db", "10.0.0.1"),
            ("db=10.0.0.1", "db", "10.0.0.1"),
            ("v6:::1", "v6", "::1"),
            ("v6=[2001:db8::1]", "v6", "2001:db8::1"),
        ] {
            let wanted = (name.to_owned(), address.parse().unwrap());
            assert_eq!(parse_host(text), Ok(wanted), "{text}");
        }
        for text in ["db", "db:", ":10.0.0.1", "db:host-gateway", "db:10.0.0.1:5"] {
            assert!(parse_host(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_root_has_a_place_for_a_file_or_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let has = || has_place(dir.path(), "hosts");
        assert!(!has(), "no /etc");
        let etc = dir.path().join("etc");
        std::fs::create_dir_all(etc.join("hosts")).unwrap();
        assert!(!has(), "a directory");
        std::fs::remove_dir(etc.join("hosts")).unwrap();
        assert!(has());
        std::os::unix::fs::symlink("/nowhere", etc.join("hosts")).unwrap();
        assert!(has());
        assert!(has_place(&etc.join("image"), "hosts"), "not a directory");
        let mut config = ContainerConfig::new(dir.path(), ["true"]);
        assert!(!is_covered(&config, "hosts"));
        config.volumes = vec![koya::Volume::new("/x", "/etc")];
        assert!(is_covered(&config, "hosts"));
    }

    #[test]
    fn name_servers_of_the_user_come_before_that_of_the_network() {
        let network: IpAddr = "169.254.1.1".parse().unwrap();
        let own: IpAddr = "192.0.2.1".parse().unwrap();
        let of = |dns: Vec<IpAddr>, network| {
            let args = NameArgs {
                add_host: Vec::new(),
                dns,
                dns_search: Vec::new(),
                dns_option: Vec::new(),
            };
            args.resolver(network).name_servers
        };
        assert_eq!(of(vec![], None), Vec::<IpAddr>::new());
        assert_eq!(of(vec![], Some(network)), [network]);
        assert_eq!(of(vec![own], Some(network)), [own]);
    }
}
