//! Extended attributes.
//!
//! Names in `trusted.` and `security.` mean something to the host's kernel: a guest that could
//! set `security.capability` on a shared file would hand privileges to whoever runs it on the
//! host. They are kept under [`PREFIX`] instead, and the guest sees them by its own names. What
//! the host's files already have under those names shows through, but can't be changed.

use super::Passthrough;
use crate::fs::inodes::Inode;
use crate::fs::wire::ROOT_ID;
use crate::sys::proc_path;
use rustix::fs::XattrFlags;
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::os::fd::AsFd;

/// Where the guest's privileged attributes are kept.
const PREFIX: &[u8] = b"user.koya.";

/// The largest value (XATTR_SIZE_MAX) and list (XATTR_LIST_MAX), in bytes.
const SIZE_MAX: usize = 65536;

fn is_privileged(name: &CStr) -> bool {
    let bytes = name.to_bytes();
    bytes.starts_with(b"trusted.") || bytes.starts_with(b"security.")
}

fn mapped(name: &CStr) -> Result<CString, Errno> {
    let mut bytes = PREFIX.to_vec();
    bytes.extend_from_slice(name.to_bytes());
    CString::new(bytes).map_err(|_| Errno::INVAL)
}

/// A guest may not reach mapped names by their names on the host.
fn check(name: &CStr) -> Result<(), Errno> {
    if name.to_bytes().starts_with(PREFIX) {
        return Err(Errno::PERM);
    }
    Ok(())
}

impl Passthrough {
    /// The path of a node's file: attributes can't be reached through O_PATH descriptors.
    fn xattr_path(&self, inode: &Inode) -> Result<(String, impl AsFd + use<>), Errno> {
        let fd = self.inodes.fd(inode)?;
        Ok((proc_path(fd.as_fd()), fd))
    }

    /// FUSE_SETXATTR
    ///
    /// # Errors
    /// The host's; EPERM for names that are not the guest's.
    pub fn setxattr(
        &self,
        nodeid: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> Result<(), Errno> {
        let inode = self.writable(nodeid)?;
        check(name)?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let (path, _fd) = self.xattr_path(&inode)?;
        if is_privileged(name) {
            return rustix::fs::setxattr(path, &*mapped(name)?, value, flags);
        }
        rustix::fs::setxattr(path, name, value, flags)
    }

    /// FUSE_GETXATTR: the value, of at most `room` bytes
    ///
    /// # Errors
    /// The host's; ERANGE if it is larger.
    pub fn getxattr(&self, nodeid: u64, name: &CStr, room: u32) -> Result<Vec<u8>, Errno> {
        if nodeid == ROOT_ID {
            return Err(Errno::NODATA);
        }
        let inode = self.inodes.get(nodeid)?;
        check(name)?;
        let (path, _fd) = self.xattr_path(&inode)?;
        let mut value = vec![0; SIZE_MAX];
        let get = |name: &CStr, value: &mut [u8]| rustix::fs::getxattr(path.as_str(), name, value);
        let len = if is_privileged(name) {
            match get(&mapped(name)?, &mut value) {
                Err(Errno::NODATA | Errno::OPNOTSUPP) => get(name, &mut value)?,
                other => other?,
            }
        } else {
            get(name, &mut value)?
        };
        fitting(value, len, room)
    }

    /// FUSE_LISTXATTR: the names, each with its terminator
    ///
    /// # Errors
    /// The host's; ERANGE if they are more than `room` bytes.
    pub fn listxattr(&self, nodeid: u64, room: u32) -> Result<Vec<u8>, Errno> {
        if nodeid == ROOT_ID {
            return Ok(Vec::new());
        }
        let inode = self.inodes.get(nodeid)?;
        let (path, _fd) = self.xattr_path(&inode)?;
        let mut list = vec![0; SIZE_MAX];
        let len = rustix::fs::listxattr(path, &mut list)?;
        let names = guest_names(&list[..len]);
        let len = names.len();
        fitting(names, len, room)
    }

    /// FUSE_REMOVEXATTR
    ///
    /// # Errors
    /// The host's.
    pub fn removexattr(&self, nodeid: u64, name: &CStr) -> Result<(), Errno> {
        let inode = self.writable(nodeid)?;
        check(name)?;
        let (path, _fd) = self.xattr_path(&inode)?;
        if is_privileged(name) {
            return rustix::fs::removexattr(path, &*mapped(name)?);
        }
        rustix::fs::removexattr(path, name)
    }
}

/// The host's names as the guest knows them, each once.
fn guest_names(list: &[u8]) -> Vec<u8> {
    let mut names: Vec<&[u8]> = Vec::new();
    for name in list.split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let name = name.strip_prefix(PREFIX).unwrap_or(name);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.iter().flat_map(|n| [*n, b"\0"].concat()).collect()
}

/// With no room the caller only wants to know the size.
fn fitting(mut bytes: Vec<u8>, len: usize, room: u32) -> Result<Vec<u8>, Errno> {
    if room != 0 && len > room as usize {
        return Err(Errno::RANGE);
    }
    bytes.truncate(len);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_names_are_shown_by_the_guests_names_and_once() {
        let list = b"user.a\0user.koya.trusted.overlay.opaque\0trusted.overlay.opaque\0";
        assert_eq!(guest_names(list), b"user.a\0trusted.overlay.opaque\0");
    }

    #[test]
    fn the_guest_cannot_name_the_map() {
        assert_eq!(check(c"user.koya.security.capability"), Err(Errno::PERM));
        assert_eq!(check(c"user.mine"), Ok(()));
    }
}
