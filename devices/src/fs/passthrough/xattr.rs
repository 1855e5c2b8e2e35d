//! Extended attributes.
//!
//! Names in `trusted.` and `security.` have a meaning for the host kernel: a guest that could set
//! `security.capability` on a shared file would grant privileges to any user who runs it on the host. They are
//! stored under [`PREFIX`] instead, and the guest sees them under their usual names. Attributes that the
//! host's files already have under those names are visible, but can't be changed.

use super::Passthrough;
use super::owners::ATTRIBUTE;
use crate::fs::inodes::Inode;
use crate::fs::watch::kind;
use crate::fs::wire::ROOT_ID;
use koya_host::descriptors;
use rustix::fs::{FileType, XattrFlags};
use rustix::io::Errno;
use std::borrow::Cow;
use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

/// Prefix under which the guest's privileged attributes are stored.
const PREFIX: &[u8] = b"user.koya.";

/// The capabilities of a program file (capabilities(7)).
const CAPABILITY: &CStr = c"security.capability";

/// Bits of a file mode (inode(7)).
const SET_USER_ID: u32 = 0o4000;
pub(super) const SET_GROUP_ID: u32 = 0o2000;
/// Without this bit, set-group-ID means mandatory locking.
const GROUP_MAY_RUN: u32 = 0o010;

/// Maximum size of a value (XATTR_SIZE_MAX) and of a list (XATTR_LIST_MAX) in bytes.
const SIZE_MAX: usize = 65536;

/// The mode bits that are cleared when a file changes.
pub(super) fn privileged_bits(mode: u32) -> u32 {
    match mode & GROUP_MAY_RUN {
        0 => mode & SET_USER_ID,
        _ => mode & (SET_USER_ID | SET_GROUP_ID),
    }
}

fn is_privileged(name: &CStr) -> bool {
    let bytes = name.to_bytes();
    bytes.starts_with(b"trusted.") || bytes.starts_with(b"security.")
}

fn mapped(name: &CStr) -> Result<CString, Errno> {
    let mut bytes = PREFIX.to_vec();
    bytes.extend_from_slice(name.to_bytes());
    CString::new(bytes).map_err(|_| Errno::INVAL)
}

/// Whether this is the name of an attribute used for storage.
fn is_stored(name: &[u8], has_owners: bool) -> bool {
    name.starts_with(PREFIX) || has_owners && name == ATTRIBUTE.to_bytes()
}

/// Whether this is an access control list, with IDs of users and groups.
fn is_acl(name: &CStr) -> bool {
    name.to_bytes().starts_with(b"system.posix_acl_")
}

/// Buffer size that is sufficient for most attributes, in bytes.
const SHORT: usize = 256;

impl Passthrough {
    /// Rejects names of stored attributes: a guest must not access those directly.
    fn check_attribute(&self, name: &CStr) -> Result<(), Errno> {
        match is_stored(name.to_bytes(), self.owners.is_some()) {
            true => Err(Errno::PERM),
            false => Ok(()),
        }
    }

    /// A path to a node's file: attributes can't be accessed through O_PATH descriptors.
    fn xattr_path(&self, inode: &Inode) -> Result<(String, impl AsFd + use<>), Errno> {
        let fd = self.inodes.fd(inode)?;
        Ok((descriptors::path(fd.as_fd()), fd))
    }

    /// Removes the capabilities of a file that changes, and with `bits` also set-user-ID and set-group-ID:
    /// the guest leaves that to the server (FUSE_HANDLE_KILLPRIV_V2). The host itself does this for
    /// attributes of its own.
    ///
    /// # Errors
    /// The error from the host; the file must then not be changed.
    pub(super) fn drop_privileges(&self, inode: &Inode, bits: bool) -> Result<(), Errno> {
        // Other files have neither; `user.` attributes are not permitted on symbolic links and device nodes.
        if inode.kind != FileType::RegularFile {
            return Ok(());
        }
        let is_known = inode.has_no_capabilities.swap(true, Ordering::SeqCst);
        // With mapped users, a file has a node for each mapping, and each knows of its own changes only.
        if !is_known || self.inodes.maps_users() {
            let (path, _fd) = self.xattr_path(inode)?;
            let name = mapped(CAPABILITY)?;
            // The host checks for write permission before it looks for the attribute: a file that is open for
            // writing may have a mode that forbids it.
            let there = || rustix::fs::getxattr(&*path, name.as_c_str(), &mut [0u8; 0][..]).is_ok();
            if let Err(error) = rustix::fs::removexattr(&*path, name.as_c_str())
                && !matches!(error, Errno::NODATA | Errno::OPNOTSUPP)
                && there()
            {
                inode.has_no_capabilities.store(false, Ordering::SeqCst);
                return Err(error);
            }
        }
        if !bits {
            return Ok(());
        }
        let fd = self.inodes.fd(inode)?;
        let mode = u32::from(self.stat_of(&fd)?.stx_mode);
        let kill = privileged_bits(mode);
        if kill == 0 {
            return Ok(());
        }
        self.chmod(&fd, mode & !kill)
    }

    /// FUSE_SETXATTR
    ///
    /// # Errors
    /// The error from the host; EPERM for names that the guest must not use.
    pub fn setxattr(
        &self,
        nodeid: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> Result<(), Errno> {
        let inode = self.writable(nodeid)?;
        self.check_attribute(name)?;
        let _change = self.change_of(&inode, kind::ATTRIB);
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let (path, _fd) = self.xattr_path(&inode)?;
        if is_privileged(name) {
            let name = mapped(name)?;
            let set = self.opening_up(&[&inode], || {
                rustix::fs::setxattr(path.as_str(), name.as_c_str(), value, flags)
            });
            inode.has_no_capabilities.store(false, Ordering::SeqCst);
            return set;
        }
        let mut value = Cow::Borrowed(value);
        if let Some(users) = inode.users.as_ref().filter(|_| is_acl(name)) {
            users.host_acl(value.to_mut())?;
        }
        self.opening_up(&[&inode], || {
            rustix::fs::setxattr(path.as_str(), name, &value, flags)
        })
    }

    /// FUSE_SETXATTR_ACL_KILL_SGID: after an ACL was set by a process that is not in the file's group, which must not lend that
    /// group by a program.
    ///
    /// # Errors
    /// The error from the host.
    pub fn clear_set_group_id(&self, nodeid: u64) -> Result<(), Errno> {
        let inode = self.writable(nodeid)?;
        let _change = self.change_of(&inode, kind::ATTRIB);
        let fd = self.inodes.fd(&inode)?;
        let mode = u32::from(self.stat_of(&fd)?.stx_mode);
        match mode & SET_GROUP_ID {
            0 => Ok(()),
            _ => self.chmod(&fd, mode & !SET_GROUP_ID),
        }
    }

    /// FUSE_GETXATTR: the value, of at most `room` bytes
    ///
    /// # Errors
    /// The error from the host; ERANGE if the value is larger.
    pub fn getxattr(&self, nodeid: u64, name: &CStr, room: u32) -> Result<Vec<u8>, Errno> {
        if nodeid == ROOT_ID {
            return Err(Errno::NODATA);
        }
        let inode = self.inodes.get(nodeid)?;
        self.check_attribute(name)?;
        let (path, _fd) = self.xattr_path(&inode)?;
        let read = |room: usize| -> Result<Vec<u8>, Errno> {
            let mut value = vec![0; room];
            let mut get = |name: &CStr| rustix::fs::getxattr(path.as_str(), name, &mut value[..]);
            let len = if is_privileged(name) {
                match get(&mapped(name)?) {
                    Err(Errno::NODATA | Errno::OPNOTSUPP) => get(name)?,
                    other => other?,
                }
            } else {
                get(name)?
            };
            value.truncate(len);
            if let Some(users) = inode.users.as_ref().filter(|_| is_acl(name)) {
                users.guest_acl(&mut value);
            }
            Ok(value)
        };
        self.opening_up(&[&inode], || {
            if room > 0 {
                return read(SIZE_MAX.min(room as usize));
            }
            // The guest asks for the size. Most values are short.
            match read(SHORT) {
                Err(Errno::RANGE) => read(SIZE_MAX),
                other => other,
            }
        })
    }

    /// FUSE_LISTXATTR: the names, each with its terminator
    ///
    /// # Errors
    /// The error from the host; ERANGE if the list is longer than `room` bytes.
    pub fn listxattr(&self, nodeid: u64, room: u32) -> Result<Vec<u8>, Errno> {
        if nodeid == ROOT_ID {
            return Ok(Vec::new());
        }
        let inode = self.inodes.get(nodeid)?;
        let (path, _fd) = self.xattr_path(&inode)?;
        let mut list = vec![0; SIZE_MAX];
        let len = rustix::fs::listxattr(path, &mut list)?;
        let names = guest_names(&list[..len], self.owners.is_some());
        // Zero means that the guest asks for the size.
        if room != 0 && names.len() > room as usize {
            return Err(Errno::RANGE);
        }
        Ok(names)
    }

    /// FUSE_REMOVEXATTR
    ///
    /// # Errors
    /// The error from the host.
    pub fn removexattr(&self, nodeid: u64, name: &CStr) -> Result<(), Errno> {
        let inode = self.writable(nodeid)?;
        self.check_attribute(name)?;
        let _change = self.change_of(&inode, kind::ATTRIB);
        let (path, _fd) = self.xattr_path(&inode)?;
        if is_privileged(name) {
            let mapped = mapped(name)?;
            let removed = self.opening_up(&[&inode], || rustix::fs::removexattr(&*path, &*mapped));
            // The guest must not remove the host's own attribute. The host removes capabilities itself when
            // the file changes; to the guest kernel, which would do the same before each change, they must
            // appear to be absent.
            let host_has = || rustix::fs::getxattr(&*path, name, &mut [0u8; 0][..]).is_ok();
            return match removed {
                Err(Errno::NODATA) if host_has() => Err(Errno::OPNOTSUPP),
                other => other,
            };
        }
        self.opening_up(&[&inode], || rustix::fs::removexattr(&*path, name))
    }
}

/// The host's attribute names as seen by the guest, each once.
fn guest_names(list: &[u8], has_owners: bool) -> Vec<u8> {
    // A guest may give a file many thousands of names.
    let mut seen: HashSet<&[u8]> = HashSet::new();
    let mut names = Vec::new();
    for name in list.split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let name = name.strip_prefix(PREFIX).unwrap_or(name);
        if !is_stored(name, has_owners) && seen.insert(name) {
            names.extend_from_slice(name);
            names.push(0);
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_names_are_listed_once_under_the_guests_names() {
        let list = b"user.a\0user.koya.trusted.overlay.opaque\0trusted.overlay.opaque\0";
        assert_eq!(guest_names(list, true), b"user.a\0trusted.overlay.opaque\0");
        let owned = b"user.containers.override_stat\0user.a\0";
        assert_eq!(guest_names(owned, true), b"user.a\0");
        assert_eq!(guest_names(owned, false), owned);
    }

    /// More names than a file has: each is not compared with all others.
    #[test]
    fn the_time_for_a_list_grows_with_its_length() {
        let names = (0..200_000).flat_map(|number| format!("user.{number}\0").into_bytes());
        let list: Vec<u8> = names.collect();
        assert_eq!(guest_names(&list, false), list);
    }

    #[test]
    fn the_guest_cannot_name_the_prefix() {
        assert!(is_stored(b"user.koya.security.capability", false));
        assert!(!is_stored(b"user.mine", true));
    }
}
