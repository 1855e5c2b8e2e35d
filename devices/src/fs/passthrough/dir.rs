//! Directories: opendir, readdir, readdirplus.

use super::Passthrough;
use super::cookies::Cookies;
use crate::fs::watch::{ChangeGuard, kind};
use crate::fs::wire::{Dirent, EntryOut, OpenOut, ROOT_ID, fopen};
use crate::fs::{Cache, handles::Handle, inodes::Inode};
use rustix::fs::{FileType, OFlags, RawDir, SeekFrom, fcntl_getfl, seek};
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use zerocopy::IntoBytes;

/// Handle of the synthetic root, which is not a directory on the host.
const ROOT_HANDLE: u64 = 0;

/// Buffer size for getdents64 in bytes.
const BUFFER: usize = 32 << 10;

/// A directory listing in wire format: entries until the guest's buffer is full.
pub struct Listing {
    bytes: Vec<u8>,
    room: usize,
    plus: bool,
}

impl Listing {
    fn new(room: u32, plus: bool) -> Self {
        let room = room.min(crate::fs::wire::MAX_DATA) as usize;
        Self {
            bytes: Vec::with_capacity(room.min(BUFFER)),
            room,
            plus,
        }
    }

    fn size(&self, name: &CStr) -> usize {
        let entry = size_of::<Dirent>() + name.to_bytes().len();
        let plus = if self.plus { size_of::<EntryOut>() } else { 0 };
        plus + entry.next_multiple_of(8)
    }

    fn has_room(&self, name: &CStr) -> bool {
        self.bytes.len() + self.size(name) <= self.room
    }

    /// A size for the getdents64(2) buffer such that all its entries fit into the reply: those with the shortest names grow
    /// most.
    fn sure_to_fit(&self) -> usize {
        /// An entry of getdents64(2) with the longest name.
        const LONGEST: usize = 280;
        const SHORTEST: usize = 24;
        (self.room * SHORTEST / self.size(c"a")).clamp(LONGEST, BUFFER)
    }

    fn push(&mut self, entry: &EntryOut, dirent: &Dirent, name: &CStr) {
        if self.plus {
            self.bytes.extend_from_slice(entry.as_bytes());
        }
        self.bytes.extend_from_slice(dirent.as_bytes());
        self.bytes.extend_from_slice(name.to_bytes());
        let padded = self.bytes.len().next_multiple_of(8);
        self.bytes.resize(padded, 0);
    }

    /// The reply.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

impl Passthrough {
    /// FUSE_OPENDIR
    ///
    /// # Errors
    /// The error from the host.
    pub fn opendir(&self, nodeid: u64) -> Result<OpenOut, Errno> {
        if nodeid == ROOT_ID {
            return Ok(OpenOut {
                fh: ROOT_HANDLE,
                ..OpenOut::default()
            });
        }
        let inode = self.inodes.get(nodeid)?;
        if inode.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let file = self.open_inode(&inode, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let open_flags = match self.options.cache {
            Cache::Never | Cache::Auto => 0,
            Cache::Always | Cache::Writeback => fopen::CACHE_DIR | fopen::KEEP_CACHE,
        };
        Ok(OpenOut {
            fh: self
                .handles
                .insert(&inode, self.inodes.fd(&inode)?, file, false)?,
            open_flags,
            backing_id: 0,
        })
    }

    /// FUSE_READDIR, or FUSE_READDIRPLUS with a lookup of each entry
    ///
    /// # Errors
    /// The error from the host.
    pub fn readdir(
        &self,
        nodeid: u64,
        fh: u64,
        offset: u64,
        room: u32,
        plus: bool,
    ) -> Result<Listing, Errno> {
        let mut listing = Listing::new(room, plus);
        if nodeid == ROOT_ID {
            self.list_root(offset, &mut listing);
            return Ok(listing);
        }
        let inode = self.inodes.get(nodeid)?;
        let handle = self.handles.get(fh, nodeid)?;
        self.list(&inode, &handle, offset, &mut listing)?;
        Ok(listing)
    }

    fn list(
        &self,
        inode: &Inode,
        handle: &Handle,
        offset: u64,
        listing: &mut Listing,
    ) -> Result<(), Errno> {
        let mut position = koya_host::sync::lock(&handle.position);
        if offset == 0 && position.cookies.take().is_some() {
            // A file system that merges directories reads its own again, and may have other cookies then.
            seek(&handle.file, SeekFrom::Start(0))?;
        }
        let cookies = match position.cookies {
            Some(cookies) => cookies,
            None => {
                position.at = None;
                *position.cookies.insert(Cookies::of(&handle.file))
            }
        };
        let start = match position.last {
            (shown, cookie) if shown == offset && offset > 0 => cookie,
            _ => cookies.host(offset),
        };
        // Not when the guest continues at the current position: cookies that are not offsets can't be sought.
        if position.at != Some(start) || start == 0 {
            position.at = None;
            seek(&handle.file, SeekFrom::Start(start))?;
        }
        let size = match position.seeks {
            true => BUFFER.min(listing.room.max(1024)),
            false => listing.sure_to_fit(),
        };
        let mut buffer = vec![MaybeUninit::uninit(); size];
        let mut directory = RawDir::new(&handle.file, &mut buffer);
        let (mut all_seek, mut before) = (true, start);
        while let Some(entry) = directory.next() {
            // Set again below if all entries read from the host were delivered.
            position.at = None;
            let entry = match entry {
                Ok(entry) => entry,
                // Returns the entries read so far; the next call returns the error.
                Err(_) if !listing.bytes.is_empty() => break,
                Err(error) => return Err(error),
            };
            let name = entry.file_name();
            if !listing.has_room(name) {
                break;
            }
            let cookie = entry.next_entry_cookie();
            let dirent = Dirent {
                ino: inode.number(entry.ino()),
                off: cookies.shown(cookie, before),
                namelen: name.to_bytes().len() as u32,
                kind: kind_number(entry.file_type()),
            };
            // Not for dots, entries that have vanished, or entries that must not be looked up: node 0 makes
            // the guest look them up itself.
            let found = if listing.plus && name != c"." && name != c".." {
                self.lookup(handle.nodeid, name).unwrap_or_default()
            } else {
                EntryOut::default()
            };
            let dirent = Dirent {
                kind: self.shown_kind(dirent.kind, &found),
                ..dirent
            };
            listing.push(&found, &dirent, name);
            all_seek &= i64::try_from(cookie).is_ok();
            position.last = (dirent.off, cookie);
            before = cookie;
            if directory.is_buffer_empty() {
                position.at = Some(cookie);
                if !std::mem::replace(&mut position.seeks, all_seek) {
                    break;
                }
            }
        }
        Ok(())
    }

    /// The type of an entry. Where owners are kept in attributes, a regular file may stand for another type, which is known
    /// only after a lookup.
    fn shown_kind(&self, host: u32, found: &EntryOut) -> u32 {
        match (&self.owners, found.nodeid) {
            (None, _) => host,
            (Some(_), 0) if host == kind_number(FileType::RegularFile) => {
                kind_number(FileType::Unknown)
            }
            (Some(_), 0) => host,
            (Some(_), _) => found.attr.mode >> 12,
        }
    }

    /// Shares may be added and removed between two calls, so the offset of an entry is its share's number.
    fn list_root(&self, offset: u64, listing: &mut Listing) {
        let dots = [(0, "."), (1, "..")].map(|(n, dot)| (n, dot.to_owned(), FileType::Directory));
        let shares = self.shares.names().into_iter();
        let shares = shares.map(|(number, name, kind)| (number + dots.len() as u64, name, kind));
        for (number, name, kind) in dots.iter().cloned().chain(shares) {
            if number < offset {
                continue;
            }
            let Ok(c_name) = CString::new(name) else {
                continue;
            };
            if !listing.has_room(&c_name) {
                return;
            }
            let found = if listing.plus && number >= dots.len() as u64 {
                self.lookup(ROOT_ID, &c_name).unwrap_or_default()
            } else {
                EntryOut::default()
            };
            let dirent = Dirent {
                ino: if found.attr.ino == 0 {
                    ROOT_ID
                } else {
                    found.attr.ino
                },
                off: number + 1,
                namelen: c_name.to_bytes().len() as u32,
                kind: kind_number(kind),
            };
            listing.push(&found, &dirent, &c_name);
        }
    }

    /// FUSE_RELEASEDIR and FUSE_RELEASE
    pub fn release(&self, nodeid: u64, fh: u64) {
        let _change = self.change_on_close(nodeid, fh);
        self.handles.remove(fh);
    }

    /// Closing a file that was open for writing is a change that watches report.
    fn change_on_close(&self, nodeid: u64, fh: u64) -> Option<ChangeGuard<'_>> {
        // The host is asked only if there are watches.
        if !self.watches.any() {
            return None;
        }
        let handle = self.handles.get(fh, nodeid).ok()?;
        let flags = fcntl_getfl(&handle.file).ok()?;
        let written = flags.intersects(OFlags::WRONLY | OFlags::RDWR);
        let inode = written.then(|| self.inodes.get(nodeid).ok())??;
        self.change_of(&inode, kind::CLOSE_WRITE)
    }
}

/// Numbers of `d_type` (dirent.h).
fn kind_number(kind: FileType) -> u32 {
    match kind {
        FileType::Unknown => 0,
        known => known.as_raw_mode() >> 12,
    }
}
