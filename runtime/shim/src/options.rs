//! Settings: `/etc/koya/config.toml` and drop-ins, or what containerd's configuration names instead.

use anyhow::{Context, Result};
use koya::{Cache, SandboxConfig};
use protobuf::CodedInputStream;
use protobuf::well_known_types::any::Any;
use serde::Deserialize;
use std::fs;
use std::path::{Path, PathBuf};

const FILE: &str = "/etc/koya/config.toml";
const DROP_INS: &str = "/etc/koya/config.d";

/// The type of the options that are for any runtime; others are for other runtimes.
const TYPE: &str = "runtimeoptions.v1.Options";

/// What a sandbox is made of, where its containers do not say.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Settings {
    /// Virtual CPUs of a container without a CPU limit.
    pub(crate) cpus: u32,
    /// Memory in MiB of a container without a memory limit.
    pub(crate) memory_mib: u64,
    /// What the guest may remember of shared files.
    pub(crate) cache: Cache,
    /// The guest kernel; looked for if none is given.
    pub(crate) kernel: Option<PathBuf>,
    /// The agent's initramfs; looked for if none is given.
    pub(crate) initramfs: Option<PathBuf>,
    /// Words for the guest kernel's command line.
    pub(crate) cmdline: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            cpus: 1,
            memory_mib: 512,
            cache: Cache::default(),
            kernel: None,
            initramfs: None,
            cmdline: "quiet".into(),
        }
    }
}

impl Settings {
    /// Those of a container that came with these options.
    ///
    /// # Errors
    /// Which file, which key.
    pub(crate) fn load(options: Option<&Any>) -> Result<Self> {
        let given = match options.filter(|any| any.type_url.ends_with(TYPE)) {
            Some(any) => RuntimeOptions::parse(&any.value).context("the runtime's options")?,
            None => RuntimeOptions::default(),
        };
        if !given.config_path.is_empty() {
            return merge(&[read(Path::new(&given.config_path))?]);
        }
        if !given.config_body.is_empty() {
            let text = String::from_utf8(given.config_body).context("the runtime's options")?;
            return merge(&[("the runtime's options".into(), text)]);
        }
        let mut all = Vec::new();
        if Path::new(FILE).exists() {
            all.push(read(Path::new(FILE))?);
        }
        let drop_ins = fs::read_dir(DROP_INS).into_iter().flatten().flatten();
        let mut drop_ins: Vec<PathBuf> = drop_ins.map(|entry| entry.path()).collect();
        drop_ins.sort();
        let is_toml = |path: &PathBuf| path.extension().is_some_and(|e| e == "toml");
        for path in drop_ins.into_iter().filter(is_toml) {
            all.push(read(&path)?);
        }
        merge(&all)
    }

    /// A sandbox with room for these limits: bytes of memory, CPUs.
    pub(crate) fn sandbox(&self, memory: Option<u64>, cpus: Option<u32>) -> SandboxConfig {
        // What the agent, page tables and the like take is not the container's.
        const ROOM_MIB: u64 = 32;
        let memory = memory.map(|bytes| bytes.div_ceil(1 << 20).max(64) + ROOM_MIB);
        SandboxConfig {
            cpus: cpus.unwrap_or(self.cpus),
            memory_mib: memory.unwrap_or(self.memory_mib),
            cache: self.cache,
            kernel: self.kernel.clone(),
            initramfs: self.initramfs.clone(),
            cmdline: self.cmdline.clone(),
            ..SandboxConfig::default()
        }
    }
}

fn read(path: &Path) -> Result<(String, String)> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok((path.display().to_string(), text))
}

/// Later ones win, key by key.
fn merge(texts: &[(String, String)]) -> Result<Settings> {
    let mut all = toml::Table::new();
    for (name, text) in texts {
        let table: toml::Table = text.parse().with_context(|| name.clone())?;
        // Each on its own, so that an error is blamed on the right one.
        Settings::deserialize(table.clone()).with_context(|| name.clone())?;
        all.extend(table);
    }
    Ok(Settings::deserialize(all)?)
}

/// `runtimeoptions.v1.Options` of containerd.
#[derive(Debug, Default, PartialEq, Eq)]
struct RuntimeOptions {
    config_path: String,
    config_body: Vec<u8>,
}

impl RuntimeOptions {
    fn parse(bytes: &[u8]) -> Result<Self> {
        let mut options = Self::default();
        let mut stream = CodedInputStream::from_bytes(bytes);
        while let Some(tag) = stream.read_raw_tag_or_eof()? {
            // Field and wire type 2: a string, or bytes.
            match (tag >> 3, tag & 7) {
                (2, 2) => options.config_path = stream.read_string()?,
                (3, 2) => options.config_body = stream.read_bytes()?,
                (_, 2) => drop(stream.read_bytes()?),
                (field, kind) => anyhow::bail!("field {field} has wire type {kind}"),
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerds_options_are_read() {
        // As `ctr run --runtime-config-path /etc/koya.toml` sends them.
        let bytes = b"\x12\x0e/etc/koya.toml";
        let options = RuntimeOptions::parse(bytes).unwrap();
        assert_eq!(options.config_path, "/etc/koya.toml");
        let bytes = b"\x0a\x03abc\x1a\x08cpus = 2";
        assert_eq!(
            RuntimeOptions::parse(bytes).unwrap().config_body,
            b"cpus = 2"
        );
        assert!(RuntimeOptions::parse(b"\x12\xff").is_err());
    }

    #[test]
    fn later_files_win_and_unknown_keys_are_named() {
        let texts = [("a", "cpus = 2\nmemory_mib = 300"), ("b", "cpus = 3")];
        let texts = texts.map(|(name, text)| (name.to_owned(), text.to_owned()));
        let settings = merge(&texts).unwrap();
        assert_eq!((settings.cpus, settings.memory_mib), (3, 300));
        let wrong = [("/etc/x.toml".to_owned(), "cpsu = 2".to_owned())];
        let error = format!("{:#}", merge(&wrong).unwrap_err());
        assert!(
            error.contains("/etc/x.toml") && error.contains("cpsu"),
            "{error}"
        );
    }

    #[test]
    fn a_limit_is_what_the_guest_has() {
        let settings = Settings::default();
        assert_eq!(settings.sandbox(None, None).memory_mib, 512);
        assert_eq!(settings.sandbox(Some(256 << 20), Some(2)).memory_mib, 288);
    }
}
