//! What words of the command line mean: disks, volumes, limits, signals, sizes, environment variables.

use koya::{Cache, DiskConfig, Rlimit, Volume};
use std::path::{Path, PathBuf};

pub(super) fn parse_disk(text: &str) -> Result<DiskConfig, String> {
    let known = |words: &str| words.split(',').all(|w| matches!(w, "ro" | "rw" | "raw"));
    let (mut path, mut disk) = (text, DiskConfig::new(""));
    // A path may have colons of its own.
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
            _ => return Err(format!("{text:?}: the option {option:?} is not supported")),
        }
    }
    Ok(volume)
}

/// One `--security-opt`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Security {
    /// A profile, or none at all.
    Seccomp(Option<PathBuf>),
    NoNewPrivileges,
}

impl Security {
    pub(super) fn seccomp(&self) -> Option<Option<&Path>> {
        match self {
            Self::Seccomp(profile) => Some(profile.as_deref()),
            Self::NoNewPrivileges => None,
        }
    }
}

pub(super) fn parse_security(text: &str) -> Result<Security, String> {
    match text.strip_prefix("seccomp=") {
        Some("unconfined") => Ok(Security::Seccomp(None)),
        Some(path) if !path.is_empty() => Ok(Security::Seccomp(Some(path.into()))),
        None if text == "no-new-privileges" => Ok(Security::NoNewPrivileges),
        _ => Err(format!(
            "{text:?} is none of seccomp=FILE, seccomp=unconfined, no-new-privileges"
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
            "{text:?} is none of never, auto, always, writeback"
        )),
    }
}

/// `K=V` as it is, `K` with this environment's value.
pub(super) fn expand_env(env: &[String]) -> Vec<String> {
    env.iter()
        .filter_map(|entry| match entry.contains('=') {
            true => Some(entry.clone()),
            false => Some(format!("{entry}={}", std::env::var(entry).ok()?)),
        })
        .collect()
}

/// `env`, and what `base` has beside it.
pub(super) fn merge_env(mut env: Vec<String>, base: &[String]) -> Vec<String> {
    for entry in base {
        let name = entry.split('=').next();
        if !env.iter().any(|e| e.split('=').next() == name) {
            env.push(entry.clone());
        }
    }
    env
}

/// A signal by its number or name: `9`, `TERM`, `SIGHUP`, `RTMIN+3`.
pub(super) fn parse_signal(text: &str) -> Result<i32, String> {
    /// The first and the last real-time signal, as Docker and glibc count them.
    const RTMIN: i32 = 34;
    const RTMAX: i32 = 64;
    if let Ok(number) = text.parse::<i32>() {
        return match number {
            1..=RTMAX => Ok(number),
            _ => Err(format!(
                "there is no signal {number}; 1 to {RTMAX} can be sent"
            )),
        };
    }
    let name = text.to_uppercase();
    let name = name.trim_start_matches("SIG");
    let step = |rest: &str, sign: char| match rest {
        "" => Some(0),
        rest => rest.strip_prefix(sign)?.parse::<u8>().ok().map(i32::from),
    };
    let real_time = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) => step(rest, '+').map(|n| RTMIN + n),
        (_, Some(rest)) => step(rest, '-').map(|n| RTMAX - n),
        _ => None,
    };
    let named = || {
        (1..=31).find(|n| {
            signal_hook::low_level::signal_name(*n).is_some_and(|s| s == format!("SIG{name}"))
        })
    };
    real_time
        .filter(|number| (RTMIN..=RTMAX).contains(number))
        .or_else(named)
        .ok_or_else(|| format!("there is no signal {text}"))
}

/// A size with a unit: `512m`, `2g`, `1024` (MiB when there is no unit).
pub(super) fn parse_mib(text: &str) -> Result<u64, String> {
    let lower = text.trim().to_lowercase();
    let digits: String = lower.chars().take_while(char::is_ascii_digit).collect();
    let number: u64 = digits.parse().map_err(|_| format!("{text:?} is no size"))?;
    let mib = match lower[digits.len()..]
        .trim_end_matches("ib")
        .trim_end_matches('b')
    {
        "" | "m" => Some(number),
        "g" => number.checked_mul(1024),
        "k" => Some(number / 1024),
        unit => return Err(format!("{unit:?} is no unit of size; use k, m or g")),
    };
    mib.ok_or_else(|| format!("{text:?} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

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
        for bad in ["/a", "/a:b", ":/b", "/a:/b:rx", "/a:/b:ro:x"] {
            assert!(parse_volume(bad).is_err(), "{bad}");
        }
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
        assert!(parse_signal("0").is_err());
        assert!(parse_signal("99").is_err());
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_mib("512"), Ok(512));
        assert_eq!(parse_mib("512M"), Ok(512));
        assert_eq!(parse_mib("2GiB"), Ok(2048));
        assert_eq!(parse_mib("2gb"), Ok(2048));
        assert!(parse_mib("2x").is_err());
        assert!(parse_mib("m").is_err());
        assert!(parse_mib("99999999999999999999").is_err());
    }
}
