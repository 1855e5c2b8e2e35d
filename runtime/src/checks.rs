//! Validation that is possible before a virtual machine is created. A start repeats all of it; callers can get the errors
//! earlier, without a machine.

use crate::Error;
use crate::account::Accounts;
use crate::block_volume::BlockVolume;
use crate::config::SandboxConfig;
use crate::container_config::{ContainerConfig, Volume};
use crate::files::Files;
use crate::oci::{self, Root};
use koya_vmm::devices::blk::foreign_format;
use koya_vmm::{ConfigError, DiskConfig, NetConfig, Serial, VmConfig};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

impl SandboxConfig {
    /// Validates the configuration: kernel, agent and disks exist, and all numbers are in range. Networks are only checked
    /// at the start.
    ///
    /// # Errors
    /// The problem, with the offending field.
    pub fn check(&self) -> Result<(), Error> {
        self.machine(Vec::new())?.check()?;
        Ok(())
    }

    pub(crate) fn machine(&self, networks: Vec<NetConfig>) -> Result<VmConfig, Error> {
        let files = Files::find(self.kernel.clone(), self.initramfs.clone())?;
        let mut machine = VmConfig {
            initramfs: Some(files.initramfs),
            cmdline: self.whole_cmdline()?,
            serial: Serial::Messages,
            disks: self.disks.clone(),
            disk_slots: self.disk_slots,
            networks,
            ..VmConfig::new(files.kernel)
        };
        self.size(&mut machine)?;
        Ok(machine)
    }
}

impl ContainerConfig {
    /// Validates the resources on the host: root and volumes, and the user if the root is a directory.
    ///
    /// # Errors
    /// The problem, with the offending field.
    pub fn check(&self) -> Result<(), Error> {
        let root = self.check_places()?;
        oci::from_config::files("container", self)?;
        if root == Root::Directory {
            let accounts = Accounts::read(&self.rootfs).with(&self.volumes);
            oci::from_config::bundle("container", self, &accounts)?;
        }
        Ok(())
    }

    /// Checks only that everything exists.
    pub(crate) fn check_places(&self) -> Result<Root, Error> {
        let root = root(&self.rootfs)?;
        self.volumes.iter().try_for_each(Volume::check)?;
        self.block_volumes.iter().try_for_each(BlockVolume::check)?;
        Ok(root)
    }
}

impl Volume {
    /// Checks that the source exists on the host.
    ///
    /// # Errors
    /// If it does not.
    pub fn check(&self) -> Result<(), Error> {
        let found = self.source.metadata();
        found.map(drop).map_err(|error| {
            let reason = format!("{} can't be used", self.source.display());
            Error::invalid_by("volume", reason)(error)
        })
    }
}

/// Checks that a path can be a container's root: a directory, or a raw image or block device with a supported file system.
///
/// # Errors
/// If it can't.
pub fn check_root(path: &Path) -> Result<(), Error> {
    root(path).map(drop)
}

fn root(path: &Path) -> Result<Root, Error> {
    let root = Root::of(path)?;
    if root == Root::Image {
        let wrong = |reason| {
            let reason = format!("{} can't be a root: {reason}", path.display());
            Error::invalid("rootfs", reason)
        };
        check_file_system(path).map_err(|error| wrong(error.to_string()))?;
        let disk = DiskConfig {
            read_only: true,
            ..DiskConfig::new(path)
        };
        disk.probe().map_err(|error| match error {
            ConfigError::Disk { source, .. } => wrong(source.to_string()),
            other => other.into(),
        })?;
    }
    Ok(root)
}

/// Checks the magic numbers of the superblocks, both at offset 1024; the host reads nothing else of an image.
fn check_file_system(path: &Path) -> io::Result<()> {
    const EROFS: [u8; 4] = 0xe0f5_e1e2u32.to_le_bytes();
    const EXT4: [u8; 2] = 0xef53u16.to_le_bytes();
    let mut superblock = [0; 64];
    let file = File::open(path)?;
    if let Some(format) = foreign_format(&file)? {
        return Err(io::Error::other(format!("it is {format}")));
    }
    match file.read_exact_at(&mut superblock, 1024) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(io::Error::other("it is too small for a file system"))
        }
        Err(error) => Err(error),
        Ok(()) if superblock.starts_with(&EROFS) || superblock[56..58] == EXT4 => Ok(()),
        Ok(()) if has_partitions(&file)? => Err(io::Error::other(
            "it has a partition table; a root is a file system without one",
        )),
        Ok(()) => Err(io::Error::other(
            "its file system is neither erofs nor ext4",
        )),
    }
}

/// Whether a disk begins with a partition table: GPT, or an MBR with a first partition. Boot sectors of file systems, which
/// have the same signature, begin with a jump.
fn has_partitions(file: &File) -> io::Result<bool> {
    let mut start = [0; 520];
    file.read_exact_at(&mut start, 0)?;
    let is_mbr = start[510..512] == [0x55, 0xaa] && !matches!(start[0], 0xe9 | 0xeb);
    let first = &start[446..462];
    Ok(
        start[512..520] == *b"EFI PART"
            || (is_mbr && matches!(first[0], 0 | 0x80) && first[4] != 0),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn reason(outcome: Result<(), Error>) -> String {
        outcome.unwrap_err().to_string()
    }

    #[test]
    fn what_is_not_there_is_known_before_a_machine_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = ContainerConfig::new(dir.path().join("none"), ["true"]);
        let said = reason(config.check());
        assert!(
            said.starts_with("rootfs: ") && said.contains("/none"),
            "{said}"
        );
        config.rootfs = dir.path().to_owned();
        config.check().unwrap();
        config.volumes = vec![Volume::new(dir.path().join("gone"), "/data")];
        let said = reason(config.check());
        assert!(
            said.starts_with("volume: ") && said.contains("/gone"),
            "{said}"
        );
        config.volumes.clear();
        config.process.user.text = "nobody-of-that-name".into();
        assert!(config.check().is_err());
    }

    #[test]
    fn the_places_of_a_container_are_its_root_and_volumes() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "text").unwrap();
        let mut config = ContainerConfig::new(dir.path(), ["sh"]);
        config.read_only = true;
        config.volumes = vec![Volume::new(&file, "/a"), Volume::new("/dev/null", "/b")];
        let places = config.places();
        let shown = places
            .iter()
            .map(|place| (place.path.as_path(), place.read_only));
        let wanted = [(dir.path(), true), (file.as_path(), false)];
        assert_eq!(shown.collect::<Vec<_>>(), wanted);
        // A disk, which no thread opens by its path.
        config.rootfs = file;
        config.volumes.clear();
        assert!(config.places().is_empty());
    }

    #[test]
    fn a_root_is_a_raw_image_with_a_file_system() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let mut image = vec![0; 4096];
        let check = |image: &[u8]| {
            fs::write(&path, image).unwrap();
            check_root(&path)
        };
        assert!(reason(check(&image)).contains("neither erofs nor ext4"));
        assert!(reason(check(&[])).contains("too small"));
        assert!(reason(check(&image[..4000])).contains("neither erofs nor ext4"));
        let mut disk = image.clone();
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert!(reason(check(&disk)).contains("neither erofs nor ext4"));
        disk[450] = 0x83;
        assert!(reason(check(&disk)).contains("partition table"));
        disk[0] = 0xeb;
        assert!(reason(check(&disk)).contains("neither erofs nor ext4"));
        disk[512..520].copy_from_slice(b"EFI PART");
        assert!(reason(check(&disk)).contains("partition table"));
        image[1080..1082].copy_from_slice(&[0x53, 0xef]);
        check(&image).unwrap();
        assert!(reason(check(&image[..4000])).contains("truncate"));
        image[..4].copy_from_slice(b"QFI\xfb");
        assert!(reason(check(&image)).contains("qcow2"));
    }

    #[test]
    fn a_disk_that_is_not_there_is_known_too() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = dir.path().join(name);
            // The beginning of an ELF kernel: 64 bits, little endian, executable, x86-64.
            let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
            elf.resize(64, 0);
            (elf[16], elf[18]) = (2, 62);
            fs::write(&path, elf).unwrap();
            path
        };
        let config = SandboxConfig {
            kernel: Some(file("kernel")),
            initramfs: Some(file("initramfs")),
            disks: vec![DiskConfig::new(dir.path().join("none.img"))],
            ..SandboxConfig::default()
        };
        let said = reason(config.check());
        assert!(said.contains("none.img"), "{said}");
    }
}
