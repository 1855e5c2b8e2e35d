//! User-defined mounts: volumes and tmpfs, each at its path, independent of the order of the options.

use crate::container_config::{Tmpfs, Volume};
use crate::oci::paths::{absolute, text};
use crate::{ContainerConfig, Error};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// All mounts, outer ones first: a mount would cover earlier mounts below it.
///
/// # Errors
/// The mount that is not possible.
pub(super) fn of(config: &ContainerConfig) -> Result<Vec<Value>, Error> {
    let memory = config.tmpfs.iter().map(|tmpfs| {
        let place = place("tmpfs", &tmpfs.destination)?;
        Ok::<_, Error>((place, "tmpfs", in_memory(tmpfs)?))
    });
    let volumes = config.volumes.iter().map(|volume| {
        let place = place("volume", &volume.destination)?;
        Ok::<_, Error>((place, "volume", bind(volume)?))
    });
    let mut all: Vec<(PathBuf, Value)> = Vec::new();
    let blocks = config.block_volumes.iter().map(|volume| {
        let place = place("block volume", &volume.destination)?;
        let mount = serde_json::to_value(volume.mount());
        let mount = mount.map_err(Error::invalid_by(
            "block volume",
            place.display().to_string(),
        ))?;
        Ok::<_, Error>((place, "block volume", mount))
    });
    for mount in memory.chain(volumes).chain(blocks) {
        let (place, field, mut mount) = mount?;
        mount["destination"] = json!(text(field, &place)?);
        match all.iter().find(|(other, _)| *other == place) {
            // An exact repetition, as scripts produce it, is allowed.
            Some((_, other)) if *other == mount => {}
            Some(_) => {
                let reason = format!("two mounts at {}", place.display());
                return Err(Error::invalid(field, reason));
            }
            None => all.push((place, mount)),
        }
    }
    all.sort_by_key(|(place, _)| place.components().count());
    Ok(all.into_iter().map(|(_, mount)| mount).collect())
}

/// Normalized destination of a mount.
fn place(field: &'static str, path: &Path) -> Result<PathBuf, Error> {
    let plain = koya_rootfs::plain(Path::new(absolute(field, path)?));
    if plain == Path::new("/") {
        let reason = format!("{} is the root; --rootfs or --image is", path.display());
        return Err(Error::invalid(field, reason));
    }
    Ok(plain)
}

fn bind(volume: &Volume) -> Result<Value, Error> {
    let source = text("volume", &volume.source)?;
    let propagation = if volume.follow_mounts {
        "rslave"
    } else {
        "rprivate"
    };
    let mut options = vec!["rbind", propagation];
    if volume.read_only {
        // An option for one flag clears all others, and a volume is meant to be restricted further.
        options.push("ro");
        options.extend(crate::oci::mounts::flags_of(&volume.source));
    }
    Ok(json!({"type": "bind", "source": source, "options": options}))
}

fn in_memory(tmpfs: &Tmpfs) -> Result<Value, Error> {
    let mut options = vec!["nosuid".to_owned(), "nodev".to_owned()];
    if !tmpfs.options.iter().any(|own| own.starts_with("mode=")) {
        options.push("mode=1777".to_owned());
    }
    for option in &tmpfs.options {
        if !is_option(option) {
            let place = tmpfs.destination.display();
            let reason = format!("{place}: the option {option:?} is not supported");
            return Err(Error::unsupported("tmpfs", reason));
        }
        options.push(option.clone());
    }
    Ok(json!({"type": "tmpfs", "source": "tmpfs", "options": options}))
}

/// Whether the guest kernel accepts an option of tmpfs(5); otherwise the error would come late.
fn is_option(option: &str) -> bool {
    const FLAGS: &[&str] = &[
        "ro",
        "rw",
        "nosuid",
        "suid",
        "nodev",
        "dev",
        "noexec",
        "exec",
        "noatime",
        "relatime",
        "strictatime",
    ];
    let is_number = |text: &str, radix| {
        let digits = !text.is_empty() && text.bytes().all(|byte| char::from(byte).is_digit(radix));
        digits && u64::from_str_radix(text, radix).is_ok()
    };
    let is_size =
        |text: &str, units: &[char]| is_number(text.strip_suffix(units).unwrap_or(text), 10);
    match option.split_once('=') {
        None => FLAGS.contains(&option),
        Some(("size", value)) => is_size(value, &['k', 'K', 'm', 'M', 'g', 'G', '%']),
        Some(("nr_blocks" | "nr_inodes", value)) => is_size(value, &['k', 'K', 'm', 'M', 'g', 'G']),
        Some(("mode", value)) => is_number(value, 8) && value.len() <= 5,
        Some(("uid" | "gid", value)) => value.parse::<u32>().is_ok_and(|id| id != u32::MAX),
        Some(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(change: impl FnOnce(&mut ContainerConfig)) -> Result<Vec<String>, String> {
        let mut config = ContainerConfig::default();
        change(&mut config);
        let mounts = of(&config).map_err(|error| error.to_string())?;
        let place = |mount: Value| mount["destination"].as_str().unwrap().to_owned();
        Ok(mounts.into_iter().map(place).collect())
    }

    /// moby/moby 21916, containers/podman 28684.
    #[test]
    fn a_mount_covers_none_that_lies_in_it() {
        let found = places(|config| {
            config.tmpfs = ["/data/cache", "/run/lock", "/run"].map(Tmpfs::new).into();
            config.volumes = vec![
                Volume::new("/a", "/data/sub/deep/"),
                Volume::new("/b", "/data"),
                Volume::new("/c", "//run/./lock/../x/y"),
            ];
        });
        let wanted = [
            "/run",
            "/data",
            "/data/cache",
            "/run/lock",
            "/data/sub/deep",
            "/run/x/y",
        ];
        assert_eq!(found.unwrap(), wanted);
    }

    /// containerd/nerdctl 4954.
    #[test]
    fn no_mount_takes_the_roots_place() {
        for root in ["/", "//", "/.", "/a/.."] {
            let volume = places(|config| config.volumes = vec![Volume::new("/a", root)]);
            assert!(volume.unwrap_err().contains("is the root"), "{root}");
            let memory = places(|config| config.tmpfs = vec![Tmpfs::new(root)]);
            assert!(memory.unwrap_err().contains("is the root"), "{root}");
        }
    }

    /// moby/moby 10618, containers/podman 4217.
    #[test]
    fn two_mounts_at_one_place_are_refused_unless_they_are_one() {
        let two =
            |first: Volume, second: Volume| places(|config| config.volumes = vec![first, second]);
        let one = || Volume::new("/a", "/x");
        assert_eq!(two(one(), Volume::new("/a", "/x/")).unwrap(), ["/x"]);
        let other = two(one(), Volume::new("/b", "/x/"));
        assert!(other.unwrap_err().contains("two mounts at /x"));
        let read_only = Volume {
            read_only: true,
            ..one()
        };
        assert!(two(one(), read_only).is_err());
        let both = places(|config| {
            config.volumes = vec![one()];
            config.tmpfs = vec![Tmpfs::new("/x")];
        });
        assert!(both.is_err());
    }

    /// opencontainers/runc 3805, with a volume of the command line.
    #[test]
    fn a_volume_has_the_flags_of_its_sources_mount() {
        let source = tempfile::tempdir_in("/dev/shm").unwrap();
        let flags = crate::oci::mounts::flags_of(source.path());
        let options = |read_only| {
            let volume = Volume {
                read_only,
                ..Volume::new(source.path(), "/x")
            };
            let said = bind(&volume).unwrap()["options"].clone();
            serde_json::from_value::<Vec<String>>(said).unwrap()
        };
        // Without an option for any flag, the mount keeps them all.
        assert_eq!(options(false), ["rbind", "rprivate"]);
        let wanted = ["rbind", "rprivate", "ro"].into_iter().chain(flags);
        assert_eq!(options(true), wanted.collect::<Vec<_>>());
    }

    /// moby/moby 18853, docker/compose 3425.
    #[test]
    fn a_directory_in_memory_has_its_options() {
        let with = |options: &[&str]| {
            in_memory(&Tmpfs {
                destination: "/run".into(),
                options: options.iter().map(|option| (*option).to_owned()).collect(),
            })
        };
        let options = |words: &[&str]| with(words).unwrap()["options"].clone();
        assert_eq!(options(&[]), json!(["nosuid", "nodev", "mode=1777"]));
        let all = [
            "noexec",
            "rw",
            "size=5k",
            "mode=700",
            "uid=33",
            "nr_inodes=1k",
        ];
        let wanted = ["nosuid", "nodev"].iter().chain(&all).collect::<Vec<_>>();
        assert_eq!(options(&all), json!(wanted));
        for wrong in [
            "",
            "size",
            "size=",
            "size=1x",
            "mode=9",
            "mode=777777",
            "uid=-1",
            "huge=always",
            "noexec=1",
        ] {
            let said = with(&[wrong]).unwrap_err().to_string();
            assert!(
                said.contains("/run") && said.contains(&format!("{wrong:?}")),
                "{said}"
            );
        }
    }
}
