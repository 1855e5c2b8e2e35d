//! Locations of the guest kernel and the agent's initramfs.

use crate::Error;
use std::path::PathBuf;

/// The files that a guest is booted from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The initial RAM file system, which holds the agent.
    pub initramfs: PathBuf,
}

impl Files {
    /// Searches in this order: the given paths; `KOYA_KERNEL` and `KOYA_INITRAMFS`; `vmlinux` and `initramfs` in
    /// `KOYA_SHARE`, in `../share/koya` beside this program, in `/usr/local/share/koya` and in `/usr/share/koya`. If the
    /// kernel is [`FULL_KERNEL`], `vmlinux-full` is searched in these directories.
    ///
    /// # Errors
    /// [`Error::Missing`] with all searched places.
    pub fn find(kernel: Option<PathBuf>, initramfs: Option<PathBuf>) -> Result<Self, Error> {
        let named = kernel.or_else(|| from_environment("KOYA_KERNEL"));
        let initramfs = initramfs.or_else(|| from_environment("KOYA_INITRAMFS"));
        // Explicit paths are used as they are, so that errors name them.
        Ok(Self {
            kernel: match named {
                Some(name) if name.as_os_str() == FULL_KERNEL => Self::full_kernel()?,
                Some(path) => path,
                None => find(&KERNEL)?,
            },
            initramfs: match initramfs {
                Some(path) => path,
                None => find(&INITRAMFS)?,
            },
        })
    }

    /// Location of the full kernel.
    ///
    /// # Errors
    /// [`Error::Missing`] with all searched places.
    pub fn full_kernel() -> Result<PathBuf, Error> {
        find(&FULL)
    }
}

/// The name of the kernel with network file systems, tracing and more (docs/guest-kernel.md).
pub const FULL_KERNEL: &str = "full";

/// A file to search for, and how to obtain it.
struct Wanted {
    what: &'static str,
    name: &'static str,
    remedy: &'static str,
}

const KERNEL: Wanted = Wanted {
    what: "guest kernel",
    name: "vmlinux",
    remedy: "build it with `cargo xtask build`, or set KOYA_KERNEL",
};
const FULL: Wanted = Wanted {
    what: "full guest kernel (vmlinux-full)",
    name: "vmlinux-full",
    remedy: "build it with `cargo xtask kernel --full`",
};
const INITRAMFS: Wanted = Wanted {
    what: "agent initramfs",
    name: "initramfs",
    remedy: "build it with `cargo xtask build`, or set KOYA_INITRAMFS",
};

fn from_environment(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).map(PathBuf::from)
}

fn find(wanted: &Wanted) -> Result<PathBuf, Error> {
    find_in(directories(), wanted)
}

fn find_in(directories: Vec<PathBuf>, wanted: &Wanted) -> Result<PathBuf, Error> {
    let names = directories.into_iter().map(|d| d.join(wanted.name));
    let looked: Vec<PathBuf> = names.collect();
    match looked.iter().find(|p| p.exists()) {
        Some(found) => Ok(found.clone()),
        None => Err(Error::Missing {
            what: wanted.what,
            remedy: wanted.remedy,
            looked,
        }),
    }
}

fn directories() -> Vec<PathBuf> {
    let mut all = Vec::new();
    if let Some(share) = std::env::var_os("KOYA_SHARE") {
        all.push(share.into());
    }
    if let Ok(program) = std::env::current_exe()
        && let Some(prefix) = program.parent().and_then(|bin| bin.parent())
    {
        all.push(prefix.join("share/koya"));
    }
    all.push("/usr/local/share/koya".into());
    all.push("/usr/share/koya".into());
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_full_kernel_is_refused_by_its_name_where_it_is_not() {
        let found = find_in(vec!["/not/there".into()], &FULL);
        assert_eq!(
            found.unwrap_err().to_string(),
            "no full guest kernel (vmlinux-full) found; looked in: /not/there/vmlinux-full; build it with \
             `cargo xtask kernel --full`"
        );
    }

    #[test]
    fn a_file_is_taken_as_it_is_named() {
        let files = Files::find(Some("./full".into()), Some("i".into())).unwrap();
        assert_eq!(files.kernel, PathBuf::from("./full"));
        assert_eq!(files.initramfs, PathBuf::from("i"));
    }
}
