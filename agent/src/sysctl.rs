//! Sysctls of a pod, or of a container's network. They are on the kernel's command line, too, but at that time the kernel
//! ignores unknown ones and has no network interface except the loopback.

use anyhow::{Context, Result, bail};
use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::path::{Component, Path, PathBuf};

const ROOT: &str = "/proc/sys";

/// Sets sysctls by their names.
///
/// # Errors
/// The sysctl that can't be set.
pub(crate) fn set_all(values: &HashMap<String, String>) -> Result<()> {
    set_in(Path::new(ROOT), values)
}

fn set_in(root: &Path, values: &HashMap<String, String>) -> Result<()> {
    // Sorted, since maps have no fixed order: values for all interfaces (`conf.all`) are set before those for `eth0`.
    let mut names: Vec<_> = values.iter().collect();
    names.sort();
    for (name, value) in names {
        let place = root.join(path(name)?);
        let written = File::options().write(true).open(place);
        if let Err(error) = written.and_then(|mut file| file.write_all(value.as_bytes())) {
            if error.kind() == ErrorKind::NotFound {
                bail!("the guest's kernel has no sysctl {name}");
            }
            return Err(error)
                .with_context(|| format!("cannot set the sysctl {name} to {value:?}"));
        }
    }
    Ok(())
}

/// Path of a sysctl. The first `.` or `/` determines the separator; the other one is then part of a name, such as that of
/// an interface (sysctl.d(5)).
fn path(name: &str) -> Result<PathBuf> {
    let path = match name.find(['.', '/']) {
        Some(at) if name[at..].starts_with('.') => {
            let swapped = name.chars().map(|c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            });
            PathBuf::from(swapped.collect::<String>())
        }
        _ => PathBuf::from(name),
    };
    let is_name = |component| matches!(component, Component::Normal(_));
    match path.components().all(is_name) && !name.is_empty() {
        true => Ok(path),
        false => bail!("{name:?} is not the name of a sysctl"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn names_are_written_either_way() {
        for (name, expected) in [
            ("net.core.somaxconn", "net/core/somaxconn"),
            ("net/ipv4/ip_forward", "net/ipv4/ip_forward"),
            (
                "net/ipv4/conf/eth0.100/rp_filter",
                "net/ipv4/conf/eth0.100/rp_filter",
            ),
            (
                "net.ipv4.conf.eth0/100.rp_filter",
                "net/ipv4/conf/eth0.100/rp_filter",
            ),
        ] {
            assert_eq!(path(name).unwrap(), Path::new(expected));
        }
        for wrong in ["", "/net/core/somaxconn", "net/../../etc/passwd", "."] {
            assert!(path(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_not_there_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("net/core")).unwrap();
        let place = dir.path().join("net/core/somaxconn");
        fs::write(&place, "128").unwrap();
        let one = |name: &str| HashMap::from([(name.to_owned(), "4096".to_owned())]);
        set_in(dir.path(), &one("net.core.somaxconn")).unwrap();
        assert_eq!(fs::read_to_string(&place).unwrap(), "4096");
        let missing = set_in(dir.path(), &one("net.none.at_all")).unwrap_err();
        assert!(missing.to_string().contains("net.none.at_all"), "{missing}");
    }
}
