//! Parsers for arguments: disks, volumes, limits, signals, sizes.

use koya::vmm::host::security_modules::has_selinux;
use koya::{Cache, DiskConfig, GuestDevice, Rlimit, Tmpfs, Volume};
use koya_tasks::signal::{LAST, by_name};
use std::path::{Path, PathBuf};

pub(super) fn parse_disk(text: &str) -> Result<DiskConfig, String> {
    let known = |words: &str| words.split(',').all(|w| matches!(w, "ro" | "rw" | "raw"));
    let (mut path, mut disk) = (text, DiskConfig::new(""));
    // A path may contain colons.
    while let Some((before, words)) = path.rsplit_once(':').filter(|(_, words)| known(words)) {
        for word in words.split(',') {
            match word {
                "raw" => disk.raw = true,
                word => disk.read_only |= word == "ro",
            }
        }
        path = before;
    }
    if path.is_empty() {
        return Err("the disk has no path".into());
    }
    disk.path = path.into();
    Ok(disk)
}

pub(super) fn parse_volume(text: &str) -> Result<Volume, String> {
    let parts: Vec<&str> = text.split(':').collect();
    let (source, destination, options) = match parts.as_slice() {
        [source, destination] => (source, destination, ""),
        [source, destination, options] => (source, destination, *options),
        _ => return Err(format!("{text:?} is not SRC:DST[:OPTIONS]")),
    };
    if source.is_empty() || !destination.starts_with('/') {
        return Err(format!("{text:?}: DST must be an absolute path"));
    }
    let mut volume = Volume::new(source, destination);
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option {
            "ro" => volume.read_only = true,
            "rw" => volume.read_only = false,
            "rslave" | "slave" => volume.follow_mounts = true,
            "rprivate" | "private" => volume.follow_mounts = false,
            // These are the default, or settings for file sharing in Docker on a Mac.
            "bind" | "rbind" | "cached" | "delegated" | "consistent" => {}
            // Labels for files, which have no meaning without SELinux.
            "z" | "Z" if !has_selinux() => {}
            _ => return Err(format!("{text:?}: the option {option:?} is not supported")),
        }
    }
    Ok(volume)
}

/// `DST[:OPTIONS]`; the options are validated later.
pub(super) fn parse_tmpfs(text: &str) -> Result<Tmpfs, String> {
    let (destination, options) = text.split_once(':').unwrap_or((text, ""));
    if !destination.starts_with('/') {
        return Err(format!("{text:?}: DST must be an absolute path"));
    }
    let options = options.split(',').filter(|option| !option.is_empty());
    Ok(Tmpfs {
        destination: destination.into(),
        options: options.map(str::to_owned).collect(),
    })
}

/// One `--security-opt`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Security {
    /// A profile, or `None` for unconfined.
    Seccomp(Option<PathBuf>),
    NoNewPrivileges(bool),
    /// No confinement by a security module: guests have none.
    NoModule,
}

impl Security {
    pub(super) fn seccomp(&self) -> Option<Option<&Path>> {
        match self {
            Self::Seccomp(profile) => Some(profile.as_deref()),
            Self::NoNewPrivileges(_) | Self::NoModule => None,
        }
    }

    fn no_new_privileges(&self) -> Option<bool> {
        match self {
            Self::NoNewPrivileges(wanted) => Some(*wanted),
            Self::Seccomp(_) | Self::NoModule => None,
        }
    }

    /// Whether new privileges are forbidden: of several such options the last one counts.
    pub(super) fn forbids_new(all: &[Self]) -> bool {
        let mut said = all.iter().rev();
        said.find_map(Self::no_new_privileges).unwrap_or(false)
    }
}

/// Parses an option like Docker: `:` is accepted for `=`, as before version 1.11, since scripts still use it.
pub(super) fn parse_security(text: &str) -> Result<Security, String> {
    let (name, value) = match text.split_once(['=', ':']) {
        Some((name, value)) => (name, Some(value)),
        None => (text, None),
    };
    match (name, value) {
        ("seccomp", Some("unconfined")) => Ok(Security::Seccomp(None)),
        ("seccomp", Some(path)) if !path.is_empty() => Ok(Security::Seccomp(Some(path.into()))),
        ("no-new-privileges", None | Some("true")) => Ok(Security::NoNewPrivileges(true)),
        ("no-new-privileges", Some("false")) => Ok(Security::NoNewPrivileges(false)),
        ("apparmor", Some("unconfined")) | ("label", Some("disable")) => Ok(Security::NoModule),
        _ => Err(format!(
            "{text:?} is not one of seccomp=FILE, seccomp=unconfined, no-new-privileges, apparmor=unconfined, label=disable"
        )),
    }
}

pub(super) fn parse_ulimit(text: &str) -> Result<Rlimit, String> {
    let wrong = || format!("{text:?} is not NAME=SOFT[:HARD], of numbers or unlimited");
    let (name, limits) = text.split_once('=').ok_or_else(wrong)?;
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    let number = |text: &str| match text {
        "unlimited" | "-1" => Some(u64::MAX),
        number => number.parse().ok(),
    };
    match (number(soft), number(hard)) {
        (Some(soft), Some(hard)) if !name.is_empty() => Ok(Rlimit {
            resource: name.into(),
            soft,
            hard,
        }),
        _ => Err(wrong()),
    }
}

pub(super) fn parse_cache(text: &str) -> Result<Cache, String> {
    match text {
        "never" => Ok(Cache::Never),
        "auto" => Ok(Cache::Auto),
        "always" => Ok(Cache::Always),
        "writeback" => Ok(Cache::Writeback),
        _ => Err(format!(
            "{text:?} is not one of never, auto, always, writeback"
        )),
    }
}

/// Parses a signal number or name: `9`, `TERM`, `SIGHUP`, `RTMIN+3`.
pub(super) fn parse_signal(text: &str) -> Result<i32, String> {
    match text.parse::<i32>() {
        Ok(number @ 1..=LAST) => Ok(number),
        Ok(number) => Err(format!(
            "there is no signal {number}; 1 to {LAST} can be sent"
        )),
        Err(_) => by_name(text).ok_or_else(|| format!("there is no signal {text}")),
    }
}

/// `NODE[:PATH[:ACCESS]]`, or `NODE:ACCESS`; what they are is validated later.
pub(super) fn parse_device(text: &str) -> Result<GuestDevice, String> {
    let is_access = |word: &str| !word.is_empty() && !word.starts_with('/');
    let parts: Vec<&str> = text.split(':').collect();
    let (node, path, access) = match parts.as_slice() {
        [node] => (node, node, "rwm"),
        [node, access] if is_access(access) => (node, node, *access),
        [node, path] => (node, path, "rwm"),
        [node, path, access] => (node, path, *access),
        _ => return Err(format!("{text:?} is not NODE[:PATH[:ACCESS]]")),
    };
    Ok(GuestDevice {
        node: node.into(),
        path: path.into(),
        access: access.into(),
    })
}

/// Parses a limit of processes; -1 and 0 are none, as for Docker.
pub(super) fn parse_pids(text: &str) -> Result<u32, String> {
    match text.parse::<i64>() {
        Ok(-1) => Ok(0),
        Ok(limit) => u32::try_from(limit).map_err(|_| format!("{limit} is out of range")),
        Err(_) => Err(format!("{text:?} is no number")),
    }
}

/// `NAME=VALUE` of a kernel parameter.
pub(super) fn parse_sysctl(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is not NAME=VALUE")),
    }
}

/// Parses a size in bytes: `65536`, `64m`, `1g`.
pub(super) fn parse_bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size");
    let (number, unit) = koya::parse_size(text.trim()).ok_or_else(wrong)?;
    let shift = koya::unit_shift(&unit).ok_or_else(wrong)?;
    let bytes = number.checked_mul(1 << shift);
    bytes.ok_or_else(|| format!("{text:?} is too large"))
}

/// Parses a size: `512m`, `2g`, `1.5g`, `1024` (MiB without a unit).
pub(super) fn parse_mib(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size");
    let (whole, fraction) = split_fraction(text.trim()).ok_or_else(wrong)?;
    let (number, unit) = koya::parse_size(&whole).ok_or_else(wrong)?;
    let (factor, divisor) = match unit.as_str() {
        "" | "m" => (1, 1),
        "g" => (1024, 1),
        "k" => (1, 1024),
        unit => return Err(format!("{unit:?} is no unit of size; use k, m or g")),
    };
    let scaled = number.checked_mul(factor);
    let more = (fraction * factor as f64) as u64;
    let mib = scaled.and_then(|mib| mib.checked_add(more));
    let mib = mib.ok_or_else(|| format!("{text:?} is too large"))?;
    Ok(mib / divisor)
}

/// Splits `1.5g` into `1g` and the fraction, 0.5.
fn split_fraction(text: &str) -> Option<(String, f64)> {
    let Some((whole, rest)) = text.split_once('.') else {
        return Some((text.to_owned(), 0.0));
    };
    let unit = rest.trim_start_matches(|c: char| c.is_ascii_digit());
    let fraction = &rest[..rest.len() - unit.len()];
    let whole = if whole.is_empty() { "0" } else { whole };
    Some((
        format!("{whole}{unit}"),
        format!("0.{fraction}").parse().ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn security_options_are_written_as_for_docker() {
        let no_new = |text: &str| parse_security(text).unwrap().no_new_privileges();
        for text in [
            "no-new-privileges",
            "no-new-privileges=true",
            "no-new-privileges:true",
        ] {
            assert_eq!(no_new(text), Some(true), "{text}");
        }
        assert_eq!(no_new("no-new-privileges=false"), Some(false));
        for text in ["seccomp=unconfined", "seccomp:unconfined"] {
            assert_eq!(parse_security(text), Ok(Security::Seccomp(None)), "{text}");
        }
        let profile = Security::Seccomp(Some("/a:b=c.json".into()));
        assert_eq!(parse_security("seccomp=/a:b=c.json"), Ok(profile));
        for text in [
            "apparmor=unconfined",
            "apparmor:unconfined",
            "label=disable",
        ] {
            assert_eq!(parse_security(text), Ok(Security::NoModule), "{text}");
        }
        for text in [
            "seccomp=",
            "no-new-privileges=yes",
            "apparmor=docker-default",
            "label=type:x",
            "",
        ] {
            assert!(parse_security(text).is_err(), "{text}");
        }
    }

    #[test]
    fn disks_are_parsed() {
        assert!(parse_disk("/a:ro").unwrap().read_only);
        let disk = parse_disk("/by-path/pci:0:1").unwrap();
        assert_eq!(
            (disk.path, disk.read_only),
            ("/by-path/pci:0:1".into(), false)
        );
        assert!(parse_disk(":ro").is_err());
        for both in ["/a:ro,raw", "/a:raw:ro"] {
            let disk = parse_disk(both).unwrap();
            assert!(disk.read_only && disk.raw && disk.path == Path::new("/a"));
        }
        let named = parse_disk("/a:ro,x").unwrap();
        assert_eq!((named.path, named.raw), ("/a:ro,x".into(), false));
    }

    #[test]
    fn limits_of_resources_are_parsed() {
        let of = |text| parse_ulimit(text).map(|limit| (limit.resource, limit.soft, limit.hard));
        assert_eq!(of("nofile=5:6"), Ok(("nofile".into(), 5, 6)));
        assert_eq!(
            of("core=unlimited"),
            Ok(("core".into(), u64::MAX, u64::MAX))
        );
        assert_eq!(of("cpu=1:-1"), Ok(("cpu".into(), 1, u64::MAX)));
        for wrong in ["nofile", "=1", "nofile=", "nofile=x", "nofile=1:"] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn volumes_are_parsed() {
        assert!(parse_volume("/a:/b:ro").unwrap().read_only);
        let follows = parse_volume("/a:/b:ro,rslave").unwrap();
        assert!(follows.follow_mounts && follows.read_only);
        assert!(parse_volume("/a:/b:rshared").is_err());
        assert!(!parse_volume("a:/b").unwrap().read_only);
        assert_eq!(parse_volume("/a:/b:cached,rbind"), parse_volume("/a:/b"));
        assert_eq!(parse_volume("/a:/b:Z").is_ok(), !has_selinux());
        for bad in ["/a", "/a:b", ":/b", "/a:/b:rx", "/a:/b:ro:x"] {
            assert!(parse_volume(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn directories_in_memory_are_parsed() {
        assert_eq!(parse_tmpfs("/run"), Ok(Tmpfs::new("/run")));
        let found = parse_tmpfs("/run:size=5k,,mode=700").unwrap();
        assert_eq!(found.destination, Path::new("/run"));
        assert_eq!(found.options, ["size=5k", "mode=700"]);
        assert!(parse_tmpfs("run").is_err() && parse_tmpfs("").is_err());
    }

    #[test]
    fn signals_have_names_and_numbers() {
        assert_eq!(parse_signal("9"), Ok(9));
        assert_eq!(parse_signal("term"), Ok(15));
        assert_eq!(parse_signal("SIGHUP"), Ok(1));
        assert_eq!(parse_signal("SIGRTMIN+3"), Ok(37));
        assert_eq!(parse_signal("rtmax-1"), Ok(63));
        for bad in ["nope", "RTMIN+31", "RTMIN-1", "RTMAX+1", "RTMIN+x"] {
            assert!(parse_signal(bad).is_err(), "{bad}");
        }
        // Used by Incus and LXC to stop containers (g-pape/runit 51).
        for (text, number) in [
            ("SIGPWR", 30),
            ("stkflt", 16),
            ("SIGIOT", 6),
            ("POLL", 29),
            ("SIGCLD", 17),
        ] {
            assert_eq!(parse_signal(text), Ok(number), "{text}");
        }
        for number in 1..32 {
            let name = signal_hook::low_level::signal_name(number);
            assert!(
                name.is_none_or(|name| parse_signal(name) == Ok(number)),
                "{name:?}"
            );
        }
        assert!(parse_signal("SIGSIGTERM").is_err());
        assert!(parse_signal("0").is_err());
        assert!(parse_signal("99").is_err());
    }

    #[test]
    fn devices_of_the_guest_are_parsed() {
        let of = |text| parse_device(text).map(|d| (d.node, d.path, d.access));
        let device = |node: &str, path: &str, access: &str| {
            Ok((node.into(), path.into(), access.to_owned()))
        };
        assert_eq!(of("/dev/fuse"), device("/dev/fuse", "/dev/fuse", "rwm"));
        assert_eq!(of("/dev/fuse:rw"), device("/dev/fuse", "/dev/fuse", "rw"));
        assert_eq!(of("/dev/fuse:/f"), device("/dev/fuse", "/f", "rwm"));
        assert_eq!(of("/dev/fuse:/f:r"), device("/dev/fuse", "/f", "r"));
        assert!(of("/a:/b:r:x").is_err());
    }

    #[test]
    fn limits_of_processes_and_kernel_parameters_are_parsed() {
        assert_eq!((parse_pids("-1"), parse_pids("0")), (Ok(0), Ok(0)));
        assert_eq!(parse_pids("100"), Ok(100));
        assert!(parse_pids("-2").is_err() && parse_pids("x").is_err());
        assert!(parse_pids("4294967296").is_err());
        let value = Ok(("kernel.sem".to_owned(), "1 2=3".to_owned()));
        assert_eq!(parse_sysctl("kernel.sem=1 2=3"), value);
        assert!(parse_sysctl("kernel.sem").is_err() && parse_sysctl("=1").is_err());
    }

    #[test]
    fn sizes_in_bytes_have_units() {
        assert_eq!(parse_bytes("65536"), Ok(65536));
        assert_eq!(parse_bytes("64m"), Ok(64 << 20));
        assert_eq!(parse_bytes("1GiB"), Ok(1 << 30));
        assert!(parse_bytes("m").is_err() && parse_bytes("1x").is_err());
        assert!(parse_bytes("99999999t").is_err());
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_mib("512"), Ok(512));
        assert_eq!(parse_mib("512M"), Ok(512));
        assert_eq!(parse_mib("2GiB"), Ok(2048));
        assert_eq!(parse_mib("2gb"), Ok(2048));
        assert_eq!(parse_mib("1.5g"), Ok(1536));
        assert_eq!(parse_mib(".25GiB"), parse_mib("256"));
        assert_eq!(parse_mib("2048.5k"), Ok(2));
        assert!(parse_mib("1.2.3g").is_err() && parse_mib("1.g5").is_err());
        assert!(parse_mib("2x").is_err());
        assert!(parse_mib("m").is_err());
        assert!(parse_mib("99999999999999999999").is_err());
    }
}
