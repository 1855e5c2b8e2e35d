//! Small files that another user may have put in place, such as the source of a mount: read with a limit.

use koya_rootfs::read;
use rustix::fs::{CWD, Mode, OFlags, openat};
use std::io;
use std::path::Path;

/// Contents of a regular file, also through symbolic links. Other kinds are not opened: a FIFO would block, and a device node
/// could start something.
///
/// # Errors
/// If it can't be read, is not a regular file, or is larger than `limit` bytes.
pub fn read_small_file(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let found = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let content = read(&found, limit.saturating_add(1))?;
    let content = content.ok_or_else(|| wrong("it is not a regular file".into()))?;
    match content.len() as u64 > limit {
        true => Err(wrong(format!("it has more than {limit} bytes"))),
        false => Ok(content),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{FileType, mknodat};
    use std::fs::{self, File};
    use std::os::unix::fs::symlink;

    #[test]
    fn only_regular_files_within_the_limit_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "text").unwrap();
        symlink(at("file"), at("link")).unwrap();
        symlink("/dev/zero", at("device")).unwrap();
        mknodat(
            CWD,
            at("fifo"),
            FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        // Sparse, of 100 GB.
        File::create(at("sparse"))
            .unwrap()
            .set_len(100_000_000_000)
            .unwrap();
        let read = |name: &str, limit| {
            read_small_file(&at(name), limit).map_err(|error| error.to_string())
        };
        assert_eq!(read("file", 4).unwrap(), b"text");
        assert_eq!(read("link", 4).unwrap(), b"text");
        assert!(read("file", 3).unwrap_err().contains("more than 3 bytes"));
        assert!(read("sparse", 65_536).unwrap_err().contains("more than"));
        for other in ["fifo", "device", "."] {
            let error = read(other, 4).unwrap_err();
            assert!(error.contains("not a regular file"), "{other}: {error}");
        }
        assert!(read("missing", 4).is_err());
    }
}
