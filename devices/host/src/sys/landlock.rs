//! The system calls of Landlock (`linux/landlock.h`), for which no C library has functions.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// LANDLOCK_CREATE_RULESET_VERSION.
const VERSION: libc::c_uint = 1;
/// LANDLOCK_RULE_PATH_BENEATH.
const PATH_BENEATH: libc::c_int = 1;
const NO_FLAGS: libc::c_uint = 0;

/// `struct landlock_ruleset_attr`: the operations that are denied unless a rule allows them. Older kernels accept it as long
/// as the fields that they do not know are zero.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Handled {
    /// `LANDLOCK_ACCESS_FS_*`.
    pub(crate) files: u64,
    /// `LANDLOCK_ACCESS_NET_*`.
    pub(crate) network: u64,
    /// `LANDLOCK_SCOPE_*`.
    pub(crate) scoped: u64,
}

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct PathBeneath {
    allowed: u64,
    parent: libc::c_int,
}

/// The ABI version that the kernel supports.
///
/// # Errors
/// If the kernel has no Landlock, or it is not enabled.
pub(crate) fn landlock_abi() -> io::Result<libc::c_int> {
    let (nothing, size) = (std::ptr::null::<Handled>(), 0_usize);
    // SAFETY: with this flag the kernel reads no memory.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, size, VERSION) };
    checked(abi)
}

/// A ruleset without rules.
///
/// # Errors
/// The error from the kernel.
pub(crate) fn create_ruleset(handled: Handled) -> io::Result<OwnedFd> {
    let (attribute, size) = (&raw const handled, size_of::<Handled>());
    // SAFETY: the kernel reads `size` bytes of the structure, which lives until the call returns.
    let created =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, attribute, size, NO_FLAGS) };
    let fd = checked(created)?;
    // SAFETY: the kernel has just opened this descriptor, and nothing else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Adds a rule to a ruleset: these operations on files are allowed at `parent` and below it.
///
/// # Errors
/// The error from the kernel.
pub(crate) fn allow_beneath(
    ruleset: BorrowedFd<'_>,
    parent: BorrowedFd<'_>,
    allowed: u64,
) -> io::Result<()> {
    let rule = PathBeneath {
        allowed,
        parent: parent.as_raw_fd(),
    };
    let (number, rule) = (ruleset.as_raw_fd(), &raw const rule);
    // SAFETY: the kernel reads the structure, which lives until the call returns.
    let added = unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            number,
            PATH_BENEATH,
            rule,
            NO_FLAGS,
        )
    };
    checked(added).map(drop)
}

/// Restricts the calling thread, and those that it creates, for good.
///
/// # Errors
/// The error from the kernel: EPERM without `no_new_privs`.
pub(crate) fn restrict_self(ruleset: BorrowedFd<'_>) -> io::Result<()> {
    let number = ruleset.as_raw_fd();
    // SAFETY: only integers are passed; the calling thread loses permissions, and no memory is affected.
    let restricted = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, number, NO_FLAGS) };
    checked(restricted).map(drop)
}

fn checked(result: libc::c_long) -> io::Result<libc::c_int> {
    match libc::c_int::try_from(result) {
        Ok(value) if value >= 0 => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}
