//! Roots that are file system images: a disk of the guest, mounted read-only, with an overlayfs layer in memory for the
//! changes of the container.
//!
//! An image is not trusted by the host, which never mounts it: only the guest kernel does.

use anyhow::{Context, Result, bail};
use koya_protocol::{ErrorReason, MAX_ACCOUNTS, image_root};
use koya_rootfs::Rootfs;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::ffi::CString;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Mount points of the parts of a container's root.
struct Parts {
    /// The image.
    lower: PathBuf,
    /// Memory for changes, with `upper` and `work`.
    memory: PathBuf,
    root: PathBuf,
}

impl Parts {
    fn of(id: &str) -> Self {
        let root = PathBuf::from(image_root(id));
        let beside = |name| root.with_file_name(name);
        Self {
            lower: beside("lower"),
            memory: beside("memory"),
            root,
        }
    }

    /// All parts, in mount order.
    fn all(&self) -> [&Path; 3] {
        [&self.lower, &self.memory, &self.root]
    }
}

/// Mounts a disk's file system as a container's root.
pub(crate) fn mount_image(id: &str, disk: &str) -> Result<()> {
    let parts = Parts::of(id);
    if parts.root.exists() {
        bail!(ErrorReason::AlreadyExists(format!(
            "container {id} has a root already"
        )));
    }
    let mounted = try_mount(&parts, disk);
    if mounted.is_err() {
        unmount_image(id).ok();
    }
    mounted
}

fn try_mount(parts: &Parts, disk: &str) -> Result<()> {
    for part in parts.all() {
        fs::create_dir_all(part)?;
    }
    let device = format!("/dev/{disk}");
    let head = head(&device)?;
    let Some(kind) = kind_of(&head) else {
        bail!(ErrorReason::Unsupported(
            "the image is neither erofs nor ext4".into()
        ));
    };
    let no_options = c"";
    match mount(&*device, &parts.lower, kind, MountFlags::RDONLY, no_options) {
        // The kernel says which part it does not support only in its log.
        Err(Errno::OPNOTSUPP | Errno::INVAL) if is_compressed(&head) => {
            bail!(ErrorReason::Unsupported(
                "the image is a compressed erofs file system, which this guest kernel can't read; make it without \
                 compression (mkfs.erofs without -z)"
                    .into()
            ));
        }
        // The disk is read-only, so that the kernel can't replay the journal.
        Err(Errno::ROFS) if kind == "ext4" => {
            bail!(ErrorReason::Unsupported(
                "the image's ext4 file system was not unmounted cleanly; repair it first (e2fsck -p FILE)"
                    .into()
            ));
        }
        mounted => {
            mounted.with_context(|| format!("cannot mount the {kind} file system of {disk}"))?;
        }
    }
    mount(
        "memory",
        &parts.memory,
        "tmpfs",
        MountFlags::empty(),
        c"mode=0755",
    )
    .context("cannot mount a tmpfs")?;
    let (upper, work) = (parts.memory.join("upper"), parts.memory.join("work"));
    for dir in [&upper, &work] {
        fs::create_dir(dir)?;
    }
    // The root directory itself is that of the upper layer: it gets the attributes of the lower one.
    let like = fs::metadata(&parts.lower)?;
    std::os::unix::fs::chown(&upper, Some(like.uid()), Some(like.gid()))?;
    fs::set_permissions(&upper, like.permissions())?;
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        parts.lower.display(),
        upper.display(),
        work.display()
    );
    mount(
        "root",
        &parts.root,
        "overlay",
        MountFlags::empty(),
        &*CString::new(options)?,
    )
    .context("cannot mount an overlay")
}

/// The beginning of an image, with the superblock.
fn head(device: &str) -> Result<[u8; 2048]> {
    let mut head = [0; 2048];
    let file = File::open(device).with_context(|| format!("the guest has no {device}"))?;
    file.read_exact_at(&mut head, 0)
        .context("the image is too small for a file system")?;
    Ok(head)
}

/// Whether an erofs has compressed files: by its features (LZ4_0PADDING, COMPR_CFGS), or as an old one by the distance of its
/// matches (erofs_fs.h).
fn is_compressed(head: &[u8; 2048]) -> bool {
    const FEATURES: u8 = 0x3;
    let superblock = &head[1024..];
    kind_of(head) == Some("erofs")
        && (superblock[80] & FEATURES != 0 || superblock[84..86] != [0, 0])
}

/// The file system, by the magic numbers of the superblocks, both at offset 1024.
fn kind_of(head: &[u8; 2048]) -> Option<&'static str> {
    let superblock = &head[1024..];
    if superblock.starts_with(&0xe0f5_e1e2u32.to_le_bytes()) {
        return Some("erofs");
    }
    (superblock[56..58] == 0xef53u16.to_le_bytes()).then_some("ext4")
}

/// Unmounts a container's root; a container that still uses it keeps it until it ends.
pub(crate) fn unmount_image(id: &str) -> Result<()> {
    let parts = Parts::of(id);
    for part in parts.all().into_iter().rev() {
        // Errors for parts that are not mounted are ignored.
        unmount(part, UnmountFlags::DETACH).ok();
        fs::remove_dir(part).ok();
    }
    let directory = parts.root.parent().context("no directory")?;
    match fs::remove_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.with_context(|| format!("the root of container {id} is still there")),
    }
}

/// A file in a container's root, empty if missing. Links are followed inside the root only.
pub(crate) fn read(id: &str, name: &str) -> Result<Vec<u8>> {
    let root = Rootfs::open(&Parts::of(id).root);
    let root = root.with_context(|| format!("container {id} has no image"))?;
    let Ok(found) = root.find(Path::new(name)) else {
        return Ok(Vec::new());
    };
    Ok(koya_rootfs::read(&found, MAX_ACCOUNTS)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_are_told_apart() {
        let mut head = [0; 2048];
        assert_eq!(kind_of(&head), None);
        (head[1080], head[1081]) = (0x53, 0xef);
        assert_eq!(kind_of(&head), Some("ext4"));
        head[1024..1028].copy_from_slice(&[0xe2, 0xe1, 0xf5, 0xe0]);
        assert_eq!(kind_of(&head), Some("erofs"));
        assert!(!is_compressed(&head));
        // By mkfs.erofs -zlz4, and with -C65536.
        for (features, distance) in [(0x1, 0xffff_u16), (0x3, 1), (0, 0xffff)] {
            head[1104] = features;
            head[1108..1110].copy_from_slice(&distance.to_le_bytes());
            assert!(is_compressed(&head), "{features}");
        }
    }
}
