//! The cache of costly results: `$KOYA_CACHE/KIND/KEY`, outside the checkout.
//!
//! A result is built in a separate directory and moved into place when it is complete, so an interrupted build leaves
//! nothing that looks finished. A lock file for each result prevents concurrent builds of the same result.

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};

/// Directory of the cache: `$KOYA_CACHE`, else `$XDG_CACHE_HOME/koya`, else `~/.cache/koya`.
pub(crate) fn root() -> PathBuf {
    if let Some(dir) = std::env::var_os("KOYA_CACHE") {
        return dir.into();
    }
    if let Some(dir) = std::env::var_os("XDG_CACHE_HOME") {
        return PathBuf::from(dir).join("koya");
    }
    let home = std::env::var_os("HOME").unwrap_or_else(|| "/root".into());
    PathBuf::from(home).join(".cache/koya")
}

/// A short name for a set of inputs.
pub(crate) fn key<I: AsRef<[u8]>>(inputs: impl IntoIterator<Item = I>) -> String {
    let mut hash = Sha256::new();
    for input in inputs {
        hash.update((input.as_ref().len() as u64).to_le_bytes());
        hash.update(input.as_ref());
    }
    hash.finalize()
        .iter()
        .take(6)
        .map(|b| format!("{b:02x}"))
        .collect()
}

/// Returns `$KOYA_CACHE/kind/key`, building it first if it is not there.
pub(crate) fn ensure(
    kind: &str,
    key: &str,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let shelf = root().join(kind);
    let ready = shelf.join(key);
    if ready.exists() {
        return Ok(ready);
    }
    fs::create_dir_all(&shelf).with_context(|| format!("cannot create {}", shelf.display()))?;
    let lock_path = shelf.join(format!("{key}.lock"));
    let lock = fs::File::create(&lock_path)
        .with_context(|| format!("cannot create {}", lock_path.display()))?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        eprintln!("  waiting for another build of {kind}/{key}");
        flock(&lock, FlockOperation::LockExclusive)?;
    }
    if ready.exists() {
        return Ok(ready);
    }
    let partial = shelf.join(format!("{key}.partial"));
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    fs::create_dir_all(&partial)?;
    build(&partial)?;
    fs::rename(&partial, &ready)?;
    Ok(ready)
}
