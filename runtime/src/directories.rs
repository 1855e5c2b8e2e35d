//! Koya's directories on the host.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Persistent data: `/var/lib/koya` for root, otherwise `koya` in `XDG_DATA_HOME` or `~/.local/share`.
///
/// # Errors
/// If there is no such directory, or its path is not absolute.
pub fn data() -> io::Result<PathBuf> {
    let base = match rustix::process::geteuid().is_root() {
        true => "/var/lib".into(),
        false => user_data().ok_or_else(|| {
            io::Error::other(
                "neither XDG_DATA_HOME nor HOME is set, and the user has no home directory",
            )
        })?,
    };
    if !base.is_absolute() {
        let reason = format!("{} is not an absolute path", base.display());
        return Err(io::Error::other(reason));
    }
    Ok(base.join("koya"))
}

/// Checks that a directory belongs to this user, and that its mode has none of the `forbidden` bits: then no other user has
/// put there what is in it. A link to a directory does not count as one.
///
/// # Errors
/// The owner and the mode.
pub fn check_own(directory: &Path, forbidden: u32) -> io::Result<()> {
    let shown = directory.display();
    let data = fs::symlink_metadata(directory)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot read {shown}: {error}")))?;
    let is_own = data.uid() == rustix::process::geteuid().as_raw();
    if !is_own || !data.is_dir() || data.mode() & forbidden != 0 {
        return Err(io::Error::other(format!(
            "{shown} must be a directory of this user with none of the mode bits {forbidden:04o}; it has owner {} and \
             mode {:04o}",
            data.uid(),
            data.mode() & 0o7777
        )));
    }
    Ok(())
}

/// The user's data directory.
pub(crate) fn user_data() -> Option<PathBuf> {
    // Without the variable, as under some supervisors, the home directory of the user's account.
    let home = || Some(std::env::home_dir()?.join(".local/share"));
    variable("XDG_DATA_HOME").or_else(home)
}

/// A directory named by an environment variable. An empty one counts as unset (XDG Base Directory Specification).
pub(crate) fn variable(name: &str) -> Option<PathBuf> {
    let value = std::env::var_os(name).filter(|value| !value.is_empty());
    value.map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn a_directory_is_own_unless_others_may_do_what_is_forbidden() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        assert!(check_own(&path, 0o077).is_err());
        fs::create_dir(&path).unwrap();
        let set_mode = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        set_mode(0o755);
        let error = check_own(&path, 0o077).unwrap_err().to_string();
        assert!(error.ends_with("and mode 0755"), "{error}");
        check_own(&path, 0o022).unwrap();
        set_mode(0o700);
        check_own(&path, 0o077).unwrap();
        let link = dir.path().join("link");
        symlink(&path, &link).unwrap();
        assert!(check_own(&link, 0o022).is_err());
    }
}
