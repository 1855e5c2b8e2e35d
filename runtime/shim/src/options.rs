//! Settings: those of the host, or a file named by containerd's configuration.

use anyhow::{Context, Result};
use koya::Settings;
use protobuf::CodedInputStream;
use protobuf::well_known_types::any::Any;
use std::path::PathBuf;

/// Type of the generic options; other types are for other runtimes.
const TYPE: &str = "runtimeoptions.v1.Options";

/// The settings for a container created with these options.
///
/// # Errors
/// The file and key at fault.
pub(crate) fn settings(options: Option<&Any>) -> Result<Settings> {
    let given = match options.filter(|any| any.type_url.ends_with(TYPE)) {
        Some(any) => RuntimeOptions::parse(&any.value).context("the runtime's options")?,
        None => RuntimeOptions::default(),
    };
    if !given.config_path.is_empty() {
        return Ok(Settings::read(&[PathBuf::from(given.config_path)])?);
    }
    if !given.config_body.is_empty() {
        let text = String::from_utf8(given.config_body).context("the runtime's options")?;
        return Ok(Settings::parse(&[("the runtime's options".into(), text)])?);
    }
    Ok(Settings::load()?)
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
        // As sent by `ctr run --runtime-config-path /etc/koya.toml`.
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
}
