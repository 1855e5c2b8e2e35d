//! Files of timelines: one for each sandbox; the newest ones are kept.

use super::{Timeline, VERSION};
use crate::directories::{user_data, variable};
use serde::Deserialize;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Maximum number of files; each writer removes older ones.
pub const KEPT: usize = 64;
/// Maximum size of a file that is read, in bytes: several times the usual size.
const MAX_SIZE: u64 = 1 << 20;

/// Directory of the files: `/run/koya/timelines` for root; otherwise in `XDG_RUNTIME_DIR`, or in the user's data directory.
pub fn directory() -> Option<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Some("/run/koya/timelines".into());
    }
    let base = variable("XDG_RUNTIME_DIR").or_else(user_data)?;
    base.is_absolute().then(|| base.join("koya/timelines"))
}

/// All readable timelines, newest first.
///
/// # Errors
/// If the directory can't be read; a missing directory is not an error.
pub fn all() -> io::Result<Vec<Timeline>> {
    match directory() {
        Some(directory) => all_in(&directory),
        None => Ok(Vec::new()),
    }
}

pub(super) fn write(timeline: &Timeline) -> io::Result<()> {
    let directory =
        directory().ok_or_else(|| io::Error::other("no directory of this user's is known"))?;
    write_in(&directory, timeline)
}

fn all_in(directory: &Path) -> io::Result<Vec<Timeline>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_none_or(|e| e != "json") {
            continue;
        }
        match read(&path) {
            Ok(timeline) => found.push(timeline),
            Err(error) => log::warn!("{}: {error}", path.display()),
        }
    }
    found.sort_by_key(|timeline| std::cmp::Reverse(timeline.began_unix_ms));
    Ok(found)
}

fn read(path: &Path) -> io::Result<Timeline> {
    /// Fields common to all versions.
    #[derive(Deserialize)]
    struct Any {
        version: u32,
    }
    if fs::metadata(path)?.len() > MAX_SIZE {
        return Err(io::Error::other("too large for a timeline"));
    }
    let text = fs::read(path)?;
    let Any { version } = serde_json::from_slice(&text)?;
    if version != VERSION {
        let reason = format!("it has version {version}, and this is version {VERSION}");
        return Err(io::Error::other(reason));
    }
    Ok(serde_json::from_slice(&text)?)
}

fn write_in(directory: &Path, timeline: &Timeline) -> io::Result<()> {
    let id = &timeline.id;
    let proper = id.len() <= 128
        && id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && id
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    if !proper {
        return Err(io::Error::other(format!("{id:?} can't name a file")));
    }
    let mut text = serde_json::to_vec(timeline)?;
    text.push(b'\n');
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)?;
    let data = fs::symlink_metadata(directory)?;
    let own = data.uid() == rustix::process::geteuid().as_raw();
    if !own || !data.is_dir() || data.mode() & 0o077 != 0 {
        let reason = format!("{} is not this user's alone", directory.display());
        return Err(io::Error::other(reason));
    }
    // Written atomically. Two processes with the same name do not share a temporary file.
    let new = directory.join(format!(".{id}.{}", std::process::id()));
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)?;
    file.write_all(&text)?;
    fs::rename(&new, directory.join(format!("{id}.json")))?;
    prune(directory)
}

/// Removes the oldest files of any kind, including partial files of killed processes.
fn prune(directory: &Path) -> io::Result<()> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory)? {
        paths.push(entry?.path());
    }
    let Some(surplus) = paths.len().checked_sub(KEPT).filter(|n| *n > 0) else {
        return Ok(());
    };
    // Others may prune at the same time.
    let age = |path: PathBuf| Some((fs::symlink_metadata(&path).ok()?.modified().ok()?, path));
    let mut files: Vec<_> = paths.into_iter().filter_map(age).collect();
    files.sort();
    for (_, path) in files.into_iter().take(surplus) {
        fs::remove_file(path).ok();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::time::{Duration, SystemTime};

    fn timeline(id: &str, began_unix_ms: u64) -> Timeline {
        Timeline {
            version: VERSION,
            id: id.into(),
            began_unix_ms,
            steps: Vec::new(),
            marks: Vec::new(),
            exits: None,
        }
    }

    #[test]
    fn what_is_written_is_read_and_is_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("koya/timelines");
        assert_eq!(all_in(&directory).unwrap(), []);
        write_in(&directory, &timeline("old", 1)).unwrap();
        write_in(&directory, &timeline("new", 3)).unwrap();
        write_in(&directory, &timeline("old", 2)).unwrap();
        let found = all_in(&directory).unwrap();
        assert_eq!(found, [timeline("new", 3), timeline("old", 2)]);
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(mode(&directory), 0o700);
        assert_eq!(mode(&directory.join("old.json")), 0o600);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 2);
    }

    #[test]
    fn names_stay_in_the_directory_and_the_directory_is_private() {
        let dir = tempfile::tempdir().unwrap();
        for bad in ["", "..", "../x", "a/b", ".x", &"n".repeat(129)] {
            assert!(write_in(dir.path(), &timeline(bad, 0)).is_err(), "{bad:?}");
        }
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        assert!(write_in(dir.path(), &timeline("x", 0)).is_err());
    }

    #[test]
    fn the_oldest_go() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("t");
        for number in 0..KEPT as u64 + 3 {
            write_in(&directory, &timeline(&format!("c{number}"), number)).unwrap();
            // As if written a second apart.
            let file = fs::File::open(directory.join(format!("c{number}.json"))).unwrap();
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(number);
            file.set_modified(time).unwrap();
        }
        let found = all_in(&directory).unwrap();
        assert_eq!(found.len(), KEPT);
        assert_eq!(found[0].id, format!("c{}", KEPT + 2));
        assert_eq!(found.last().unwrap().id, "c3");
    }

    #[test]
    fn what_is_not_of_this_version_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.json"), r#"{"version": 2, "steps": 7}"#).unwrap();
        fs::write(dir.path().join("b.json"), "{").unwrap();
        // With an additional field of a later release.
        let text = r#"{"version": 1, "id": "c", "began_unix_ms": 5, "marks": [], "exits": null,
            "steps": [{"name": "kernel", "lane": "kernel", "from_us": 1, "to_us": null}], "new": 1}"#;
        fs::write(dir.path().join("c.json"), text).unwrap();
        let found = all_in(dir.path()).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].steps[0].name, "kernel");
    }
}
