//! Preparation of an image unpacked for one container.

use koya_rootfs::Rootfs;
use koya_vmm::host::descriptors;
use rustix::fs::{FileType, fstat, symlinkat};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

/// Files that a container gets from Koya. Those of an image describe the machine that built it.
const OWN: [&str; 3] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];

/// Prepares the root of an image that no other container uses, as container engines do: files with host names and name
/// servers are emptied, so that the container's own replace them, and a missing `/etc/mtab` is created as a link to
/// `/proc/mounts`.
///
/// # Errors
/// The error from the host.
pub fn prepare_image_root(root: &Path) -> io::Result<()> {
    let root = Rootfs::open(root)?;
    for path in OWN {
        let found = match root.find(Path::new(path)) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
            found => found?,
        };
        let stat = fstat(&found)?;
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        // A file with several hard links may be in use under another name.
        if is_file && stat.st_size > 0 && stat.st_nlink == 1 {
            let mut options = File::options();
            let options = options.write(true).truncate(true);
            options.open(descriptors::path(found.as_fd()))?;
        }
    }
    let Ok(etc) = root.find(Path::new("/etc")) else {
        return Ok(());
    };
    match symlinkat("/proc/mounts", &etc, "mtab") {
        Err(Errno::EXIST | Errno::NOTDIR) => Ok(()),
        made => Ok(made?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_an_image_says_of_its_makers_machine_makes_way() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::NamedTempFile::new().unwrap();
        fs::write(outside.path(), "the host's").unwrap();
        let etc = dir.path().join("etc");
        prepare_image_root(dir.path()).unwrap();
        assert!(!etc.exists(), "nothing is created in an image without /etc");
        fs::create_dir(&etc).unwrap();
        fs::write(etc.join("hosts"), "127.0.0.1 builder\n").unwrap();
        fs::write(etc.join("passwd"), "root").unwrap();
        fs::hard_link(etc.join("passwd"), etc.join("hostname")).unwrap();
        symlink(outside.path(), etc.join("resolv.conf")).unwrap();
        prepare_image_root(dir.path()).unwrap();
        prepare_image_root(dir.path()).unwrap();
        assert_eq!(fs::read_to_string(etc.join("hosts")).unwrap(), "");
        assert_eq!(fs::read_to_string(etc.join("passwd")).unwrap(), "root");
        assert_eq!(fs::read_to_string(outside.path()).unwrap(), "the host's");
        let mtab = fs::read_link(etc.join("mtab")).unwrap();
        assert_eq!(mtab, Path::new("/proc/mounts"));
    }
}
