//! The backing of a block device: a raw image or a block device of the host.

use super::{ID_SIZE, SECTOR_SIZE, foreign_format};
use rustix::fs::{
    AtFlags, FlockOperation, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, flock, statx,
};
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Options for opening a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskOptions {
    /// Whether the disk is read-only.
    pub read_only: bool,
    /// Bypass the host page cache (O_DIRECT). The guest's logical block size is then the one that direct I/O
    /// requires on the host: 512 bytes on most disks, 4096 on some.
    pub direct: bool,
    /// Serial number that the guest sees: up to 20 bytes. Default: empty.
    pub serial: String,
    /// Treat a file as a raw image whatever it contains. Otherwise files that look like qcow2, VHDX, VMDK and
    /// similar images, or are compressed, are refused: the guest would see the container format itself, and
    /// its writes would destroy the image. Block devices are always raw.
    pub raw: bool,
}

/// An open disk.
#[derive(Debug)]
pub struct Disk {
    file: Arc<File>,
    read_only: bool,
    direct: bool,
    id: [u8; ID_SIZE],
    memory_alignment: u32,
    block_size: u32,
    sectors: AtomicU64,
}

impl Disk {
    /// Opens a raw image or a block device and locks it: a disk that is open for writing must not be open
    /// elsewhere through Koya, or two writers would destroy its contents.
    ///
    /// # Errors
    /// The error from the host, or the reason why the file cannot be used as a disk, with a remedy.
    pub fn open(path: &Path, options: DiskOptions) -> io::Result<Self> {
        let direct = if options.direct {
            OFlags::DIRECT
        } else {
            OFlags::empty()
        };
        let file = OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            // Opening a FIFO by mistake must not block.
            .custom_flags((direct | OFlags::CLOEXEC | OFlags::NONBLOCK).bits() as i32)
            .open(path)
            .map_err(|error| match error.kind() {
                ErrorKind::InvalidInput if options.direct => io::Error::new(
                    ErrorKind::Unsupported,
                    "its file system has no direct I/O (O_DIRECT)",
                ),
                _ => error,
            })?;
        Self::from_file(file, options)
    }

    /// As [`open`](Self::open), for a file that is already open, with O_DIRECT if `options` require it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_file(file: File, options: DiskOptions) -> io::Result<Self> {
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let text = "it is neither a file nor a block device";
            return Err(io::Error::new(ErrorKind::InvalidInput, text));
        }
        let mut id = [0; ID_SIZE];
        match id.get_mut(..options.serial.len()) {
            Some(place) => place.copy_from_slice(options.serial.as_bytes()),
            None => {
                let text = format!("the serial number is longer than {ID_SIZE} bytes");
                return Err(io::Error::new(ErrorKind::InvalidInput, text));
            }
        }
        if kind.is_file() && !options.raw {
            check_format(&file)?;
        }
        let lock = match options.read_only {
            true => FlockOperation::NonBlockingLockShared,
            false => FlockOperation::NonBlockingLockExclusive,
        };
        flock(&file, lock).map_err(|error| match error {
            rustix::io::Errno::WOULDBLOCK => io::Error::new(
                ErrorKind::ResourceBusy,
                "somebody else has it in use (flock)",
            ),
            other => other.into(),
        })?;
        let [memory_alignment, direct] = direct_alignment(&file);
        let block_size = if kind.is_block_device() {
            rustix::fs::ioctl_blksszget(&file)?
        } else if options.direct {
            direct
        } else {
            SECTOR_SIZE as u32
        };
        let disk = Self {
            file: Arc::new(file),
            read_only: options.read_only,
            direct: options.direct,
            id,
            memory_alignment,
            block_size,
            sectors: AtomicU64::new(0),
        };
        disk.refresh()?;
        Ok(disk)
    }

    /// Updates the size of the disk; true if it changed.
    ///
    /// # Errors
    /// The error from the host, or if the size is not a whole number of blocks.
    pub fn refresh(&self) -> io::Result<bool> {
        // The metadata of block devices has no length.
        let bytes = (&*self.file).seek(SeekFrom::End(0))?;
        let block = u64::from(self.block_size);
        if !bytes.is_multiple_of(block) {
            let rounded = bytes.next_multiple_of(block);
            return Err(io::Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "its size of {bytes} bytes is not a multiple of {block}; `truncate -s {rounded}` would make it one"
                ),
            ));
        }
        let sectors = bytes / SECTOR_SIZE;
        Ok(self.sectors.swap(sectors, Ordering::SeqCst) != sectors)
    }

    /// Size in sectors of [`SECTOR_SIZE`] bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::SeqCst)
    }

    /// Logical block size in bytes.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Whether the disk is read-only.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    pub(super) fn id(&self) -> &[u8; ID_SIZE] {
        &self.id
    }

    pub(super) fn is_direct(&self) -> bool {
        self.direct
    }

    /// Memory alignment that direct I/O requires, in bytes.
    pub(super) fn memory_alignment(&self) -> usize {
        self.memory_alignment as usize
    }

    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }
}

/// # Errors
/// If the file is recognized as a format other than a raw image.
fn check_format(file: &File) -> io::Result<()> {
    // Direct I/O would require aligned memory.
    let flags = fcntl_getfl(file)?;
    if flags.contains(OFlags::DIRECT) {
        fcntl_setfl(file, flags - OFlags::DIRECT)?;
    }
    let found = foreign_format(file);
    if flags.contains(OFlags::DIRECT) {
        fcntl_setfl(file, flags)?;
    }
    let Some(found) = found? else { return Ok(()) };
    let text = format!("it is {found}, and only raw images are supported");
    Err(io::Error::new(ErrorKind::InvalidInput, text))
}

/// Alignment of memory, offsets and lengths for direct I/O if the host does not report it.
const DIRECT_ALIGNMENT: u32 = 4096;

/// Alignment that direct I/O requires: of memory, and of offsets and lengths (statx(2), since Linux 6.1).
fn direct_alignment(file: &File) -> [u32; 2] {
    let asked = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    let said = asked.map(|stat| [stat.stx_dio_mem_align, stat.stx_dio_offset_align]);
    let proper = |align: &u32| align.is_power_of_two() && *align <= DIRECT_ALIGNMENT;
    match said {
        Ok(said) if said.iter().all(proper) => [said[0], said[1].max(SECTOR_SIZE as u32)],
        _ => [DIRECT_ALIGNMENT; 2],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_only() -> DiskOptions {
        DiskOptions {
            read_only: true,
            ..DiskOptions::default()
        }
    }

    fn image(bytes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        file
    }

    #[test]
    fn a_disk_has_one_writer_or_many_readers() {
        let file = image(4096);
        let first = Disk::open(file.path(), read_only()).unwrap();
        let second = Disk::open(file.path(), read_only()).unwrap();
        let writer = Disk::open(file.path(), DiskOptions::default()).unwrap_err();
        assert!(writer.to_string().contains("in use"), "{writer}");
        drop((first, second));
        let _writer = Disk::open(file.path(), DiskOptions::default()).unwrap();
        assert!(Disk::open(file.path(), read_only()).is_err());
    }

    #[test]
    fn files_that_are_no_disks_are_refused_with_a_reason() {
        let odd = Disk::open(image(1000).path(), read_only()).unwrap_err();
        assert!(odd.to_string().contains("truncate -s 1024"), "{odd}");
        let none = Disk::open(Path::new("/dev/null"), read_only()).unwrap_err();
        assert!(none.to_string().contains("neither"), "{none}");
    }

    #[test]
    fn an_image_of_another_format_is_raw_only_on_request() {
        use std::os::unix::fs::FileExt;
        let file = image(4096);
        file.as_file().write_all_at(b"QFI\xfb", 0).unwrap();
        for direct in [false, true] {
            let options = DiskOptions {
                direct,
                ..DiskOptions::default()
            };
            let refused = match Disk::open(file.path(), options.clone()) {
                // The temporary directory may not support direct I/O.
                Err(error) if error.kind() == ErrorKind::Unsupported => continue,
                other => other.unwrap_err(),
            };
            assert!(refused.to_string().contains("qcow2"), "{refused}");
            let raw = DiskOptions {
                raw: true,
                ..options
            };
            let disk = Disk::open(file.path(), raw).unwrap();
            let flags = fcntl_getfl(&**disk.file()).unwrap();
            assert_eq!(flags.contains(OFlags::DIRECT), direct);
        }
    }

    #[test]
    fn a_grown_disk_is_noticed() {
        let file = image(4096);
        let disk = Disk::open(file.path(), read_only()).unwrap();
        assert_eq!(disk.sectors(), 8);
        file.as_file().set_len(8192).unwrap();
        assert!(disk.refresh().unwrap());
        assert!(!disk.refresh().unwrap());
        assert_eq!(disk.sectors(), 16);
    }
}
