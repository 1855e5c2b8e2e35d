//! What is known of containers between commands: a folder each, under `/run/koya` (as root) or
//! `$XDG_RUNTIME_DIR/koya`.
//!
//! The sandbox's process holds a lock on its folder's `lock` file as long as it lives. A folder
//! whose lock is free belongs to a container that has ended: in order, if it says with which
//! status; else it was killed, and whatever command comes next clears it away.

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// What is written down of a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) name: String,
    pub(super) pid: u32,
    pub(super) created: SystemTime,
    pub(super) command: Vec<String>,
    pub(super) rootfs: PathBuf,
    /// A root file system that was unpacked for it and goes with it.
    pub(super) unpacked: Option<PathBuf>,
    /// Kept after its end until it is removed.
    pub(super) keep: bool,
    /// The exit status, once it has ended in order.
    pub(super) status: Option<i32>,
}

/// A container's folder.
#[derive(Clone, Debug)]
pub(super) struct Folder(PathBuf);

/// A folder that this process owns: locked while it lives.
pub(super) struct Owned {
    pub(super) folder: Folder,
    _lock: File,
}

fn root() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return "/run/koya".into();
    }
    if let Some(dir) = std::env::var_os("XDG_RUNTIME_DIR") {
        return PathBuf::from(dir).join("koya");
    }
    std::env::temp_dir().join(format!("koya-{}", rustix::process::geteuid().as_raw()))
}

/// Where images are unpacked: `/var/lib/koya` as root, else under the user's data.
pub(super) fn storage() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return "/var/lib/koya".into();
    }
    let home = std::env::var_os("HOME").unwrap_or_default();
    std::env::var_os("XDG_DATA_HOME")
        .map_or_else(|| PathBuf::from(home).join(".local/share"), PathBuf::from)
        .join("koya")
}

/// A name that is one component of a path.
fn check_name(name: &str) -> Result<()> {
    let proper = !name.is_empty()
        && name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    if !proper {
        bail!("{name:?} can't name a container: use letters, digits, '-', '_' and '.'");
    }
    Ok(())
}

impl Folder {
    /// The folder of a container that exists.
    pub(super) fn find(name: &str) -> Result<Self> {
        check_name(name)?;
        let path = root().join(name);
        if !path.join("record.json").exists() {
            bail!("container {name} does not exist");
        }
        Ok(Self(path))
    }

    /// Every container's folder.
    pub(super) fn all() -> Vec<Self> {
        let mut all: Vec<PathBuf> = fs::read_dir(root())
            .map(|entries| entries.filter_map(|e| Some(e.ok()?.path())).collect())
            .unwrap_or_default();
        all.sort();
        all.into_iter().filter(|p| p.is_dir()).map(Self).collect()
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(super) fn control(&self) -> PathBuf {
        self.path("control.sock")
    }

    pub(super) fn log(&self) -> PathBuf {
        self.path("log")
    }

    pub(super) fn read(&self) -> Result<Record> {
        let path = self.path("record.json");
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(serde_json::from_slice(&text)?)
    }

    pub(super) fn write(&self, record: &Record) -> Result<()> {
        let new = self.path("record.new");
        fs::write(&new, serde_json::to_vec(record)?)?;
        fs::rename(&new, self.path("record.json"))?;
        Ok(())
    }

    /// Whether its process lives.
    pub(super) fn is_running(&self) -> bool {
        let Ok(lock) = File::open(self.path("lock")) else {
            return false;
        };
        flock(&lock, FlockOperation::NonBlockingLockShared).is_err()
    }

    /// Removes what is known of the container, and what was unpacked for it.
    pub(super) fn remove(&self) {
        if let Ok(Record {
            unpacked: Some(root),
            ..
        }) = self.read()
        {
            fs::remove_dir_all(root).ok();
        }
        fs::remove_dir_all(&self.0).ok();
    }
}

/// Takes a name, or makes one, and its folder.
pub(super) fn create(name: Option<&str>) -> Result<(String, Owned)> {
    let root = root();
    make_private(&root)?;
    loop {
        let name = match name {
            Some(name) => {
                check_name(name)?;
                name.to_owned()
            }
            None => random_name()?,
        };
        let path = root.join(&name);
        match fs::create_dir(&path) {
            Ok(()) => {
                let lock = File::create(path.join("lock"))?;
                flock(&lock, FlockOperation::LockExclusive)?;
                let owned = Owned {
                    folder: Folder(path),
                    _lock: lock,
                };
                return Ok((name, owned));
            }
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                if !name.starts_with("koya-") || path.join("record.json").exists() {
                    bail!("a container named {name} exists; remove it with `koya rm {name}`");
                }
            }
            Err(e) => {
                return Err(e).with_context(|| format!("cannot create {}", path.display()));
            }
        }
    }
}

/// Others may not look into it: control sockets lie there.
fn make_private(root: &Path) -> Result<()> {
    use std::os::unix::fs::{DirBuilderExt, MetadataExt};
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(root)
        .with_context(|| format!("cannot create {}", root.display()))?;
    let owner = fs::symlink_metadata(root)?.uid();
    if owner != rustix::process::geteuid().as_raw() {
        bail!("{} belongs to user {owner}", root.display());
    }
    Ok(())
}

fn random_name() -> Result<String> {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(format!("koya-{:08x}", u32::from_le_bytes(bytes)))
}

/// Clears away what killed containers left.
pub(super) fn sweep() {
    for folder in Folder::all() {
        let killed = match folder.read() {
            Ok(record) => record.status.is_none(),
            // Made, and killed before anything was written down; or about to be written down.
            Err(_) => folder.path("lock").exists(),
        };
        if killed && !folder.is_running() {
            folder.remove();
        }
    }
}
