//! Block volumes: private ext4 file systems of a container, in a sparse file on the host, mounted by the guest.
//!
//! They support features that virtio-fs lacks: overlayfs, as used by Docker and podman, requires trusted extended attributes
//! for its upper layers. In an OCI configuration, a block volume is a mount of type `ext4` with options for its creation
//! (`x-koya.size`, `x-koya.file`); without these options, the source is a block device or an image.

use crate::Error;
use crate::direct_volume::DirectVolume;
use crate::directories;
use crate::units::{parse_size, unit_shift};
use oci_spec::runtime::Mount;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use tempfile::NamedTempFile;

/// The annotation of a container that requests block volumes: a list of words, each in the syntax of
/// [`BlockVolume::from_str`]. Settings must allow it, like other annotations.
pub const ANNOTATION: &str = "io.koya.block_volumes";

const FILE_SYSTEM: &str = "ext4";
/// Mount options: mount(8) ignores those that begin with `x-`.
const SIZE: &str = "x-koya.size=";
const FILE: &str = "x-koya.file=";
const PROGRAM: &str = "mkfs.ext4";

const DEFAULT_SIZE: u64 = 32 << 30;
/// mke2fs creates no smaller journal.
const MIN_SIZE: u64 = 16 << 20;
/// Maximum size of ext4 with blocks of 4 KiB on every kernel.
const MAX_SIZE: u64 = 16 << 40;

/// A private file system of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockVolume {
    /// Mount point in the container.
    pub destination: PathBuf,
    /// Size in bytes, 16 MiB to 16 TiB. On the host it takes only the space in use; deleted data is released.
    pub size: u64,
    /// The backing file on the host; created if missing, otherwise it keeps its size. Without a file, the volume is removed
    /// with its container.
    pub file: Option<PathBuf>,
}

impl BlockVolume {
    /// A volume of 32 GiB that is removed with its container.
    pub fn new(destination: impl Into<PathBuf>) -> Self {
        Self {
            destination: destination.into(),
            size: DEFAULT_SIZE,
            file: None,
        }
    }

    /// The mount for an OCI configuration.
    pub fn mount(&self) -> Mount {
        let mut options = vec![format!("{SIZE}{}", self.size)];
        let file = self.file.as_ref();
        options.extend(file.map(|file| format!("{FILE}{}", file.display())));
        let mut mount = Mount::default();
        mount.set_destination(self.destination.clone());
        mount.set_typ(Some(FILE_SYSTEM.into()));
        mount.set_source(Some("none".into()));
        mount.set_options(Some(options));
        mount
    }

    /// The block volume that a mount requests; `None` for other mounts, and for existing devices or images.
    fn of(mount: &Mount) -> Result<Option<Self>, Error> {
        let option = |name: &str| {
            let mut options = mount.options().iter().flatten();
            options.find_map(|option| option.strip_prefix(name))
        };
        let Some(size) = option(SIZE) else {
            return Ok(None);
        };
        let wrong = || Error::invalid("mounts", format!("{size:?} is not a number of bytes"));
        let volume = Self {
            destination: mount.destination().clone(),
            size: size.parse().map_err(|_| wrong())?,
            file: option(FILE).map(PathBuf::from),
        };
        volume.check()?;
        Ok(Some(volume))
    }

    /// Validates the volume, as far as possible before it is created.
    ///
    /// # Errors
    /// If it is invalid.
    pub fn check(&self) -> Result<(), Error> {
        let wrong = |reason: String| Err(Error::invalid("block volume", reason));
        let destination = self.destination.display();
        if !self.destination.is_absolute() {
            return wrong(format!("{destination} is not an absolute path"));
        }
        if !(MIN_SIZE..=MAX_SIZE).contains(&self.size) {
            let size = self.size;
            return wrong(format!(
                "{destination}: {size} bytes are outside 16m to 16t"
            ));
        }
        match &self.file {
            Some(file) if !file.is_absolute() => {
                wrong(format!("{} is not an absolute path", file.display()))
            }
            Some(file) if !file.parent().is_some_and(Path::is_dir) => {
                wrong(format!("there is no directory for {}", file.display()))
            }
            _ => Ok(()),
        }
    }

    /// Creates the file if missing, and returns it open.
    fn open(&self) -> Result<File, Error> {
        let Some(path) = &self.file else {
            let directory = directory()?;
            let what = || format!("make a volume in {}", directory.display());
            return unnamed(&directory, self.size)
                .and_then(|file| format(&file, false).map(|()| file))
                .map_err(|error| Error::host(what())(error));
        };
        let what = || format!("make the volume {}", path.display());
        let open = || OpenOptions::new().read(true).write(true).open(path);
        match open() {
            Ok(file) => Ok(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                kept(path, self.size).map_err(|error| Error::host(what())(error))
            }
            Err(error) => Err(Error::host(what())(error)),
        }
    }
}

/// `DST[:OPTIONS]`, with options separated by commas: `size=20g` (bytes, or with k, m, g or t), `file=PATH`.
impl FromStr for BlockVolume {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let (destination, options) = text.split_once(':').unwrap_or((text, ""));
        let mut volume = Self::new(destination);
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                Some(("size", size)) => volume.size = bytes(size)?,
                Some(("file", file)) => volume.file = Some(file.into()),
                _ => {
                    let reason = format!(
                        "{text:?}: the options are size=SIZE and file=PATH, not {option:?}"
                    );
                    return Err(Error::invalid("block volume", reason));
                }
            }
        }
        volume.check()?;
        Ok(volume)
    }
}

fn bytes(text: &str) -> Result<u64, Error> {
    let bytes =
        parse_size(text).and_then(|(number, unit)| number.checked_mul(1 << unit_shift(&unit)?));
    bytes.ok_or_else(|| Error::invalid("block volume", format!("{text:?} is not a size")))
}

/// A file system that the guest mounts by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum GuestVolume {
    /// On a device or image of the host.
    Device(DirectVolume),
    /// In a file created for it.
    Made(BlockVolume),
}

impl GuestVolume {
    /// The volume of a mount whose type is a disk file system; `None` for other mounts.
    ///
    /// # Errors
    /// If it is invalid.
    pub(crate) fn of(directory: &Path, mount: &Mount) -> Result<Option<Self>, Error> {
        if mount.typ().as_deref() != Some(FILE_SYSTEM) {
            return Ok(None);
        }
        if let Some(volume) = BlockVolume::of(mount)? {
            return Ok(Some(Self::Made(volume)));
        }
        let destination = mount.destination().display();
        let Some(source) = mount.source() else {
            let reason = format!("{destination}: no source");
            return Err(Error::invalid("mounts", reason));
        };
        let mut volume = DirectVolume::new(directory.join(source), FILE_SYSTEM);
        let options = mount.options().iter().flatten();
        // Like mount(8), ignores these.
        volume.options = options.filter(|o| !o.starts_with("x-")).cloned().collect();
        Ok(Some(Self::Device(volume)))
    }

    /// Creates the file if missing. It must be kept open until the disk is attached, because it may be unnamed.
    ///
    /// # Errors
    /// If the host refuses.
    pub(crate) fn make(self) -> Result<(DirectVolume, Option<File>), Error> {
        let made = match self {
            Self::Device(volume) => return Ok((volume, None)),
            Self::Made(made) => made,
        };
        let file = made.open()?;
        let path = match made.file {
            Some(path) => path,
            None => format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
        };
        let mut volume = DirectVolume::new(path, FILE_SYSTEM);
        // The file is all zeroes: the kernel need not zero inode tables, which would allocate space.
        volume.options = ["discard", "noinit_itable"].map(str::to_owned).into();
        Ok((volume, Some(file)))
    }
}

/// Directory of unnamed volumes: below `/var/lib/koya`, or in the user's data directory.
fn directory() -> Result<PathBuf, Error> {
    let data = directories::data();
    let directory = data
        .map_err(Error::host("find a place for volumes"))?
        .join("volumes");
    let mut builder = DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(&directory);
    made.map_err(|error| Error::host(format!("create {}", directory.display()))(error))?;
    Ok(directory)
}

/// An unnamed file of zeroes: it is deleted with its last reference.
fn unnamed(directory: &Path, size: u64) -> io::Result<File> {
    let file = tempfile::tempfile_in(directory)?;
    file.set_len(size)?;
    Ok(file)
}

/// Creates a file with a file system atomically.
fn kept(path: &Path, size: u64) -> io::Result<File> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let new = NamedTempFile::new_in(directory)?;
    new.as_file().set_len(size)?;
    format(new.as_file(), true)?;
    new.as_file().sync_all()?;
    // A file created by someone else meanwhile is not replaced.
    Ok(new.persist_noclobber(path)?)
}

/// Creates a file system in a file.
fn format(file: &File, journal: bool) -> io::Result<()> {
    let mut command = Command::new(PROGRAM);
    command.args([
        "-q",
        "-F",
        "-m",
        "0",
        "-E",
        "lazy_itable_init=1,lazy_journal_init=1,nodiscard",
    ]);
    if !journal {
        // The volume does not outlive the machine, so a journal would never be replayed.
        command.args(["-O", "^has_journal"]);
    }
    // Passed by descriptor, since the file may be unnamed.
    command.arg("/proc/self/fd/0").stdin(file.try_clone()?);
    let output = command.stdout(Stdio::null()).output();
    let output = output.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            io::Error::other(format!("{PROGRAM} is not installed (Debian: e2fsprogs)"))
        }
        _ => error,
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("{PROGRAM}: {}", said.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn words_are_read() {
        let volume: BlockVolume = "/var/lib/docker".parse().unwrap();
        assert_eq!(volume, BlockVolume::new("/var/lib/docker"));
        let volume: BlockVolume = "/data:size=64M,file=/tmp/data.img".parse().unwrap();
        assert_eq!(
            (volume.size, volume.file.as_deref()),
            (64 << 20, Some(Path::new("/tmp/data.img")))
        );
        assert_eq!("/d:size=1TiB".parse::<BlockVolume>().unwrap().size, 1 << 40);
        assert_eq!(
            "/d:size=16777216".parse::<BlockVolume>().unwrap().size,
            16 << 20
        );
        for wrong in [
            "data",
            "/d:size=1k",
            "/d:size=17t",
            "/d:size=",
            "/d:size=9x",
            "/d:file=a",
            "/d:file=/not/there/a",
            "/d:ro",
            "/d:size=99999999999t",
        ] {
            let error = wrong.parse::<BlockVolume>().unwrap_err().to_string();
            assert!(error.contains("block volume"), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_mount_stands_for_it_and_back() {
        let mut volume = BlockVolume::new("/data");
        volume.file = Some("/tmp/data.img".into());
        assert_eq!(BlockVolume::of(&volume.mount()).unwrap(), Some(volume));
        let mut other = Mount::default();
        other
            .set_typ(Some("ext4".into()))
            .set_source(Some("disk.img".into()));
        let found = GuestVolume::of(Path::new("/bundle"), &other).unwrap();
        let expected = DirectVolume::new("/bundle/disk.img", "ext4");
        assert_eq!(found, Some(GuestVolume::Device(expected)));
        other.set_typ(Some("bind".into()));
        assert_eq!(GuestVolume::of(Path::new("/"), &other).unwrap(), None);
    }

    /// The magic number of ext4 (Documentation/filesystems/ext4: `s_magic`).
    fn magic(file: &File) -> [u8; 2] {
        let mut magic = [0; 2];
        file.read_exact_at(&mut magic, 1024 + 0x38).unwrap();
        magic
    }

    #[test]
    fn files_are_made_sparse_and_kept_once_they_are_there() {
        let directory = tempfile::tempdir().unwrap();
        let mut volume = BlockVolume::new("/data");
        volume.file = Some(directory.path().join("data.img"));
        let file = volume.open().unwrap();
        assert_eq!(magic(&file), [0x53, 0xef]);
        let data = file.metadata().unwrap();
        assert_eq!(data.len(), 32 << 30);
        assert!(data.blocks() * 512 < 64 << 20, "{} blocks", data.blocks());
        file.write_all_at(b"mine", 1 << 20).unwrap();
        let again = volume.open().unwrap();
        let mut read = [0; 4];
        again.read_exact_at(&mut read, 1 << 20).unwrap();
        assert_eq!(&read, b"mine");
        let names = fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(names, 1);
    }

    #[test]
    fn one_without_a_name_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let file = unnamed(directory.path(), 64 << 20).unwrap();
        format(&file, false).unwrap();
        assert_eq!(magic(&file), [0x53, 0xef]);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
