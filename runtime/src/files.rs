//! Where the guest kernel and the agent's initramfs are.

use crate::Error;
use std::path::PathBuf;

/// What a guest starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The initial RAM file system, which holds the agent.
    pub initramfs: PathBuf,
}

impl Files {
    /// Looks, in this order: at what is given; at `KOYA_KERNEL` and `KOYA_INITRAMFS`; for
    /// `vmlinux` and `initramfs` in `KOYA_SHARE`, in `../share/koya` beside this program, in
    /// `/usr/local/share/koya` and in `/usr/share/koya`.
    ///
    /// # Errors
    /// [`Error::Missing`] with every place.
    pub fn find(kernel: Option<PathBuf>, initramfs: Option<PathBuf>) -> Result<Self, Error> {
        Ok(Self {
            kernel: find("guest kernel", kernel, "KOYA_KERNEL", "vmlinux")?,
            initramfs: find("agent initramfs", initramfs, "KOYA_INITRAMFS", "initramfs")?,
        })
    }
}

fn find(
    what: &'static str,
    given: Option<PathBuf>,
    variable: &'static str,
    name: &str,
) -> Result<PathBuf, Error> {
    // What somebody names is taken as it is, so that an error names it too.
    if let Some(path) = given.or_else(|| std::env::var_os(variable).map(PathBuf::from)) {
        return Ok(path);
    }
    let looked: Vec<PathBuf> = directories().into_iter().map(|d| d.join(name)).collect();
    match looked.iter().find(|p| p.exists()) {
        Some(found) => Ok(found.clone()),
        None => Err(Error::Missing {
            what,
            variable,
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
