//! Removes a directory with any contents left by a container's processes: directories without permissions, which a user
//! other than root can't read, and directories nested to any depth.

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, renameat, statat, unlinkat};
use rustix::io::Errno;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// Removes `path` and its contents. A missing path is not an error.
///
/// No more than two directories are open at once, and the stack does not grow with their depth:
/// directories inside others are moved to `path` first.
///
/// # Errors
/// The error from the host: a mount point, or a file that this user may not remove.
pub(super) fn remove_tree(path: &Path) -> io::Result<()> {
    let top = match open(CWD, path) {
        Err(Errno::NOENT) => return Ok(()),
        other => other?,
    };
    let mut moved = 0;
    empty(&top, |name| {
        let inner = open_fully(&top, name)?;
        empty(&inner, |child| {
            open_fully(&inner, child)?;
            loop {
                match renameat(&inner, child, &top, format!(".{moved}")) {
                    // Left by an interrupted removal.
                    Err(Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR) => moved += 1,
                    other => return other,
                }
            }
        })?;
        unlinkat(&top, name, AtFlags::REMOVEDIR)
    })?;
    Ok(unlinkat(CWD, path, AtFlags::REMOVEDIR)?)
}

/// Removes all files in a directory, and calls `directory` to remove its subdirectories.
fn empty(
    dir: &OwnedFd,
    mut directory: impl FnMut(&CStr) -> Result<(), Errno>,
) -> Result<(), Errno> {
    loop {
        // Entries that change during the read may be skipped.
        let mut is_empty = true;
        for entry in Dir::read_from(dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            is_empty = false;
            let kind = match entry.file_type() {
                FileType::Unknown => {
                    let stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
                    FileType::from_raw_mode(stat.st_mode)
                }
                kind => kind,
            };
            match kind {
                FileType::Directory => directory(name)?,
                _ => unlinkat(dir, name, AtFlags::empty())?,
            }
        }
        if is_empty {
            return Ok(());
        }
    }
}

fn open(dir: impl AsFd, path: impl rustix::path::Arg) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(dir, path, flags, Mode::empty())
}

/// Opens a directory after giving its owner all permissions, which moving it also requires.
fn open_fully(dir: &OwnedFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let mode = Mode::from_raw_mode(statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode);
    if !mode.contains(Mode::RWXU) {
        rustix::fs::chmodat(dir, name, mode | Mode::RWXU, AtFlags::empty())?;
    }
    open(dir, name)
}

#[cfg(test)]
mod tests {
    use super::remove_tree;
    use rustix::fs::{Mode, OFlags, mkdirat, openat};
    use std::error::Error;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn what_is_deep_or_closed_goes_and_what_links_lead_to_stays() -> Result<(), Box<dyn Error>> {
        let dir = tempfile::tempdir()?;
        let (top, outside) = (dir.path().join("top"), dir.path().join("outside"));
        fs::create_dir_all(top.join("root/closed/inner"))?;
        fs::create_dir_all(top.join(".0/left"))?;
        fs::create_dir(&outside)?;
        fs::write(outside.join("file"), "")?;
        symlink(&outside, top.join("root/link"))?;
        symlink(&outside, top.join("link"))?;
        let closed = top.join("root/closed");
        for file in 0..1000 {
            fs::write(closed.join(file.to_string()), "")?;
        }
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o000))?;

        // Much deeper than the limits of a path, or of open descriptors.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut deep = openat(rustix::fs::CWD, top.join("root"), flags, Mode::empty())?;
        for _ in 0..5000 {
            mkdirat(&deep, "d", Mode::RWXU)?;
            deep = openat(&deep, "d", flags, Mode::empty())?;
        }
        remove_tree(&top)?;
        assert!(!top.exists());
        assert!(outside.join("file").exists());
        remove_tree(&top)?;
        Ok(())
    }
}
