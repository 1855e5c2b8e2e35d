//! Directories that are used again by the next input: only the parts that an input may change are made anew.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// The contents of a directory.
pub(crate) struct Contents {
    pub(crate) name: &'static str,
    /// Subdirectories that an input may change.
    pub(crate) changing: &'static [&'static str],
    /// Makes everything else, once.
    pub(crate) set_up: fn(&Path) -> io::Result<()>,
    /// Fills the subdirectories that change, which are empty.
    pub(crate) fill: fn(&Path) -> io::Result<()>,
}

struct Kept {
    dir: TempDir,
    is_filled: bool,
}

thread_local! {
    static FREE: RefCell<HashMap<&'static str, Kept>> = RefCell::default();
}

/// A directory with these contents.
pub(crate) struct Directory {
    contents: &'static Contents,
    kept: Option<Kept>,
}

impl Directory {
    /// # Panics
    /// If the host cannot create it.
    pub(crate) fn take(contents: &'static Contents) -> Self {
        let kept = FREE.with_borrow_mut(|free| free.remove(contents.name));
        let mut kept = kept.unwrap_or_else(|| {
            let dir = tempfile::tempdir().expect("a directory");
            for name in contents.changing {
                // The file server sets the umask to 0, and sockets are refused where every user may write.
                let mut private = fs::DirBuilder::new();
                private
                    .mode(0o700)
                    .create(dir.path().join(name))
                    .expect("a directory");
            }
            (contents.set_up)(dir.path()).expect("a directory");
            Kept {
                dir,
                is_filled: false,
            }
        });
        if !kept.is_filled {
            (contents.fill)(kept.dir.path()).expect("a directory");
        }
        kept.is_filled = false;
        Self {
            contents,
            kept: Some(kept),
        }
    }

    /// Records that nothing was changed.
    pub(crate) fn set_unchanged(&mut self) {
        if let Some(kept) = &mut self.kept {
            kept.is_filled = true;
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.kept
            .as_ref()
            .map_or(Path::new("/"), |kept| kept.dir.path())
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let Some(kept) = self.kept.take() else {
            return;
        };
        let emptied = self
            .contents
            .changing
            .iter()
            .try_for_each(|name| match kept.is_filled {
                true => Ok(()),
                false => empty(&kept.dir.path().join(name)),
            });
        // After a failure it is removed, as far as possible. In a panic it shows what happened, until the process ends.
        if emptied.is_ok() && !std::thread::panicking() {
            FREE.with_borrow_mut(|free| free.insert(self.contents.name, kept));
        }
    }
}

/// Removes everything in a directory. The directory itself must still be one, and not a link.
fn empty(directory: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(directory)?.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => fs::remove_dir_all(entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    static PLAN: Contents = Contents {
        name: "test",
        changing: &["a"],
        set_up: |dir| fs::write(dir.join("fixed"), "fixed"),
        fill: |dir| fs::write(dir.join("a/file"), "text"),
    };

    #[test]
    fn what_changed_is_made_anew() {
        let first = Directory::take(&PLAN);
        let place = first.path().to_owned();
        fs::write(first.at("a/file"), "other").expect("a file");
        fs::create_dir_all(first.at("a/b/c")).expect("a directory");
        std::os::unix::fs::symlink("/", first.at("a/link")).expect("a link");
        // One that is in use is not given to another.
        assert_ne!(Directory::take(&PLAN).path(), place);
        drop(first);
        let mut second = Directory::take(&PLAN);
        assert_eq!(second.path(), place);
        assert_eq!(fs::read(second.at("a/file")).expect("a file"), b"text");
        assert_eq!(
            fs::read_dir(second.at("a")).expect("a directory").count(),
            1
        );
        assert_eq!(fs::read(second.at("fixed")).expect("a file"), b"fixed");
        fs::write(second.at("a/kept"), "").expect("a file");
        second.set_unchanged();
        drop(second);
        assert!(Directory::take(&PLAN).at("a/kept").exists());
    }

    #[test]
    fn a_directory_that_became_a_link_is_not_followed() {
        let directory = Directory::take(&PLAN);
        let place = directory.path().to_owned();
        let other = tempfile::tempdir().expect("a directory");
        fs::write(other.path().join("file"), "").expect("a file");
        fs::remove_dir_all(directory.at("a")).expect("a directory");
        std::os::unix::fs::symlink(other.path(), directory.at("a")).expect("a link");
        drop(directory);
        assert!(other.path().join("file").exists());
        assert!(!place.exists());
    }
}
