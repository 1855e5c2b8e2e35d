//! `koya run -v`, `--mount`, `--tmpfs`: mounts of a container.

use super::parse::{parse_bytes, parse_tmpfs, parse_volume};
use anyhow::{Context, Result};
use clap::Args;
use koya::block_volume::BlockVolume;
use koya::{ContainerConfig, Tmpfs, Volume};
use std::path::Path;

#[derive(Args)]
pub(super) struct MountArgs {
    /// Bind mount a host directory or file. Options, separated by commas: ro; rslave (later mounts of the host below it
    /// propagate to the container)
    #[arg(long, short, value_name = "SRC:DST[:OPTIONS]", value_parser = parse_volume)]
    volume: Vec<Volume>,
    /// Mount as --volume or --tmpfs do, in Docker's format: type=bind,source=SRC,target=DST[,readonly]
    /// [,bind-propagation=rslave], or type=tmpfs,target=DST[,tmpfs-size=SIZE][,tmpfs-mode=OCTAL][,readonly]
    #[arg(long, value_name = "KEY=VALUE,...", value_parser = parse_mount)]
    mount: Vec<Mount>,
    /// Mount a private ext4 file system in a sparse file of the host, for example for the layers of Docker or podman.
    /// Options, separated by commas: size=SIZE[k|m|g|t] (default: 32g); file=PATH (the backing file, created if missing;
    /// without it the volume is removed with the container)
    #[arg(long, value_name = "DST[:OPTIONS]")]
    block_volume: Vec<BlockVolume>,
    /// Mount a tmpfs. Options, separated by commas: size=BYTES[k|m|g|%], mode=OCTAL, uid=ID, gid=ID, ro, noexec and others
    /// of mount(8)
    #[arg(long, value_name = "DST[:OPTIONS]", value_parser = parse_tmpfs)]
    tmpfs: Vec<Tmpfs>,
    /// Set the size of /dev/shm, in bytes or with a unit (64m, 1g) (default: half of the memory)
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    shm_size: Option<u64>,
}

impl MountArgs {
    /// Checks that all sources exist.
    pub(super) fn check(&self) -> Result<()> {
        Ok(self.volumes().try_for_each(Volume::check)?)
    }

    fn volumes(&self) -> impl Iterator<Item = &Volume> {
        let mounts = self.mount.iter().filter_map(|mount| match mount {
            Mount::Volume(volume) => Some(volume),
            Mount::Tmpfs(_) => None,
        });
        self.volume.iter().chain(mounts)
    }

    /// Adds the mounts to a container, with absolute sources.
    pub(super) fn set(&self, config: &mut ContainerConfig) -> Result<()> {
        config.volumes = self.volumes().cloned().collect();
        for volume in &mut config.volumes {
            volume.source = absolute(&volume.source)?;
        }
        let mounts = self.mount.iter().filter_map(|mount| match mount {
            Mount::Volume(_) => None,
            Mount::Tmpfs(tmpfs) => Some(tmpfs),
        });
        config.tmpfs = self.tmpfs.iter().chain(mounts).cloned().collect();
        config.block_volumes = self.block_volume.clone();
        // As with Docker, where 0 is the default.
        config.shm_size = self.shm_size.filter(|bytes| *bytes > 0);
        Ok(())
    }
}

pub(super) fn absolute(path: &Path) -> Result<std::path::PathBuf> {
    std::path::absolute(path).with_context(|| format!("no path: {}", path.display()))
}

/// One `--mount`.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Mount {
    Volume(Volume),
    Tmpfs(Tmpfs),
}

fn parse_mount(text: &str) -> Result<Mount, String> {
    let fields = text.split(',').map(|field| match field.split_once('=') {
        Some((key, value)) => (key, Some(value)),
        None => (field, None),
    });
    let (mut kind, mut source, mut target) = ("volume", None, None);
    let (mut rest, mut options) = (Vec::new(), Vec::new());
    for (key, value) in fields {
        match (key, value) {
            ("type", Some(value)) => kind = value,
            ("source" | "src", Some(value)) => source = Some(value),
            ("target" | "dst" | "destination", Some(value)) => target = Some(value),
            _ => rest.push((key, value)),
        }
    }
    let target = target.filter(|target| target.starts_with('/'));
    let target = target.ok_or_else(|| format!("{text:?}: target must be an absolute path"))?;
    let unknown = |key: &str| Err(format!("{text:?}: {key} is not supported"));
    let is_set = |value: Option<&str>| match value {
        None | Some("true" | "1") => Ok(true),
        Some("false" | "0") => Ok(false),
        Some(value) => Err(format!("{text:?}: {value:?} is neither true nor false")),
    };
    match kind {
        "bind" => {
            let source = source.filter(|source| !source.is_empty());
            let source = source.ok_or_else(|| format!("{text:?}: a bind mount needs a source"))?;
            let mut volume = Volume::new(source, target);
            for (key, value) in rest {
                match (key, value) {
                    ("readonly" | "ro", value) => volume.read_only = is_set(value)?,
                    ("bind-propagation", Some("rslave" | "slave")) => volume.follow_mounts = true,
                    ("bind-propagation", Some("rprivate" | "private")) => {
                        volume.follow_mounts = false;
                    }
                    ("consistency", Some(_)) => {}
                    _ => return unknown(key),
                }
            }
            Ok(Mount::Volume(volume))
        }
        "tmpfs" if source.is_some() => Err(format!("{text:?}: a tmpfs has no source")),
        "tmpfs" => {
            for (key, value) in rest {
                match (key, value) {
                    ("readonly" | "ro", value) => {
                        options.push(if is_set(value)? { "ro" } else { "rw" }.to_owned());
                    }
                    ("tmpfs-size", Some(size)) => {
                        options.push(format!("size={}", parse_bytes(size)?));
                    }
                    ("tmpfs-mode", Some(mode)) => options.push(format!("mode={mode}")),
                    _ => return unknown(key),
                }
            }
            Ok(Mount::Tmpfs(Tmpfs {
                destination: target.into(),
                options,
            }))
        }
        kind => Err(format!(
            "{text:?}: the type {kind} is not supported; bind and tmpfs are"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_written_as_for_docker() {
        let read_only = parse_volume("/a:/b:ro").unwrap();
        for text in [
            "type=bind,source=/a,target=/b,readonly",
            "type=bind,src=/a,dst=/b,ro=true",
            "readonly,destination=/b,src=/a,consistency=cached,type=bind",
        ] {
            let found = parse_mount(text);
            assert_eq!(found, Ok(Mount::Volume(read_only.clone())), "{text}");
        }
        let follows = parse_volume("/a:/b:rslave").unwrap();
        let text = "type=bind,src=/a,dst=/b,bind-propagation=rslave,readonly=false";
        assert_eq!(parse_mount(text), Ok(Mount::Volume(follows)));
        let memory = parse_tmpfs("/t:size=1048576,mode=0700,ro").unwrap();
        let text = "type=tmpfs,target=/t,tmpfs-size=1m,tmpfs-mode=0700,readonly";
        assert_eq!(parse_mount(text), Ok(Mount::Tmpfs(memory)));
        for (text, wanted) in [
            ("", "target"),
            ("type=bind,src=/a,dst=b", "target"),
            ("type=bind,dst=/b", "needs a source"),
            ("type=bind,src=/a,dst=/b,readonly=maybe", "neither"),
            (
                "type=bind,src=/a,dst=/b,bind-propagation=shared",
                "bind-propagation",
            ),
            ("type=bind,src=/a,dst=/b,tmpfs-size=1", "tmpfs-size"),
            ("type=tmpfs,src=/a,dst=/b", "no source"),
            ("type=tmpfs,dst=/b,tmpfs-size=x", "size"),
            ("src=name,dst=/b", "volume"),
            ("type=npipe,dst=/b", "npipe"),
        ] {
            let said = parse_mount(text).unwrap_err();
            assert!(said.contains(wanted), "{text}: {said}");
        }
    }
}
