//! Koya's directories on the host.

use std::io;
use std::path::PathBuf;

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
