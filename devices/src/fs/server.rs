//! Decodes requests from descriptor chains, dispatches them and encodes the replies.
//!
//! A request consists of a header, an argument, and names or data; a reply of a header and a result. Data of
//! READ and WRITE is never copied to a buffer here.

#[cfg(test)]
mod confined_tests;

use super::Cache;
use super::passthrough::{Caller, Passthrough};
use super::wire::{self, InHeader, InitIn, InitOut, OutHeader, init, op};
use crate::virtio::{Chain, ChainError, Memory};
use rustix::io::Errno;
use serde::Serialize;
use std::ffi::CStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

const IN_HEADER: u32 = size_of::<InHeader>() as u32;
const OUT_HEADER: u32 = size_of::<OutHeader>() as u32;

/// Maximum size of a request other than WRITE: a header, an argument, a name and the largest extended
/// attribute; or a page of nodes to forget.
const MAX_REQUEST: u32 = 128 << 10;

/// Maximum number of background requests of the guest; it considers the host congested at three quarters of
/// it.
const MAX_BACKGROUND: u16 = 128;

/// The body of a reply.
enum Reply {
    Empty,
    Bytes(Vec<u8>),
    /// The body, of this length, is already in the chain.
    Written(u32),
    /// There is no reply at all.
    None,
}

fn reply<T: IntoBytes + Immutable>(value: &T) -> Reply {
    Reply::Bytes(value.as_bytes().to_vec())
}

/// The argument of a request, parsed from front to back.
struct Args<'a>(&'a [u8]);

impl<'a> Args<'a> {
    fn take<T: FromBytes + KnownLayout + Immutable>(&mut self) -> Result<T, Errno> {
        let (value, rest) = T::read_from_prefix(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = rest;
        Ok(value)
    }

    fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = &self.0[name.to_bytes_with_nul().len()..];
        Ok(name)
    }

    fn bytes(&mut self, len: u32) -> Result<&'a [u8], Errno> {
        let (bytes, rest) = self.0.split_at_checked(len as usize).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(bytes)
    }
}

/// Metrics of a file system.
#[derive(Debug, Default, Serialize)]
pub struct FsMetrics {
    /// Requests from the guest.
    pub requests: AtomicU64,
    /// Requests that failed with an error.
    pub errors: AtomicU64,
    /// Bytes read from files.
    pub read_bytes: AtomicU64,
    /// Bytes written to files.
    pub written_bytes: AtomicU64,
    /// Chains without a valid request, or without space for the reply.
    pub faults: AtomicU64,
}

/// The file server of a virtio-fs device.
pub struct Server {
    files: Passthrough,
    metrics: Arc<FsMetrics>,
    /// Whether requests to set an attribute have the longer argument (FUSE_SETXATTR_EXT).
    extended_setxattr: AtomicBool,
}

impl Server {
    /// A server for these files.
    pub fn new(files: Passthrough) -> Self {
        Self {
            files,
            metrics: Arc::default(),
            extended_setxattr: AtomicBool::new(false),
        }
    }

    /// Metrics of the server.
    pub fn metrics(&self) -> &Arc<FsMetrics> {
        &self.metrics
    }

    /// The files that it serves.
    pub fn files(&self) -> &Passthrough {
        &self.files
    }

    /// Drops all state of the guest, which is gone.
    pub fn clear(&self) {
        self.files.clear();
    }

    /// Serves one request; returns the number of bytes written to the chain.
    ///
    /// # Errors
    /// If the chain has no valid request, or no space for a reply.
    pub fn serve(&self, chain: &Chain, memory: &Memory) -> Result<u32, ChainError> {
        self.metrics.requests.fetch_add(1, Ordering::Relaxed);
        let served = self.try_serve(chain, memory);
        if served.is_err() {
            self.metrics.faults.fetch_add(1, Ordering::Relaxed);
        }
        served
    }

    fn try_serve(&self, chain: &Chain, memory: &Memory) -> Result<u32, ChainError> {
        let mut header = InHeader::default();
        chain.read(memory, 0, header.as_mut_bytes())?;
        let dispatch = || self.dispatch(&header, chain, memory);
        let result = self.files.removals.retry(dispatch);
        let (error, body) = match result {
            Ok(Reply::None) => return Ok(0),
            Ok(Reply::Empty) => (0, 0),
            Ok(Reply::Written(len)) => (0, len),
            Ok(Reply::Bytes(bytes)) => match chain.write(memory, OUT_HEADER, &bytes) {
                Ok(()) => (0, bytes.len() as u32),
                Err(_) => (Errno::INVAL.raw_os_error(), 0),
            },
            Err(errno) => (errno.raw_os_error(), 0),
        };
        if error != 0 {
            self.metrics.errors.fetch_add(1, Ordering::Relaxed);
        }
        let out = OutHeader {
            len: OUT_HEADER + body,
            error: -error,
            unique: header.unique,
        };
        chain.write(memory, 0, out.as_bytes())?;
        Ok(out.len)
    }

    fn dispatch(&self, header: &InHeader, chain: &Chain, memory: &Memory) -> Result<Reply, Errno> {
        match header.opcode {
            op::READ => return self.read(header, chain, memory),
            op::WRITE => return self.write(header, chain, memory),
            _ => {}
        }
        let len = chain.readable_len() - IN_HEADER;
        if len > MAX_REQUEST {
            return Err(Errno::TOOBIG);
        }
        let mut bytes = vec![0; len as usize];
        chain
            .read(memory, IN_HEADER, &mut bytes)
            .map_err(|_| Errno::INVAL)?;
        let mut args = Args(&bytes);
        let node = header.nodeid;
        match header.opcode {
            op::INIT => self.init(&mut args),
            op::DESTROY => {
                self.files.clear();
                Ok(Reply::Empty)
            }
            op::FORGET => {
                let arg: wire::ForgetIn = args.take()?;
                self.forget(node, arg.nlookup);
                Ok(Reply::None)
            }
            op::BATCH_FORGET => self.batch_forget(&mut args),
            op::INTERRUPT => Ok(Reply::None),
            op::LOOKUP => Ok(reply(&self.files.lookup_or_absent(node, args.name()?)?)),
            op::GETATTR => Ok(reply(&self.files.getattr(node, &args.take()?)?)),
            op::SETATTR => Ok(reply(&self.files.setattr(node, &args.take()?)?)),
            op::STATX => Ok(reply(&self.files.statx(node, &args.take()?)?)),
            op::STATFS => Ok(reply(&self.files.statfs(node)?)),
            op::READLINK => Ok(Reply::Bytes(self.files.readlink(node)?.into_bytes())),
            _ => self.dispatch_names(header, &mut args),
        }
    }

    /// Operations on names.
    fn dispatch_names(&self, header: &InHeader, args: &mut Args<'_>) -> Result<Reply, Errno> {
        let node = header.nodeid;
        let caller = Caller {
            uid: header.uid,
            gid: header.gid,
        };
        match header.opcode {
            op::SYMLINK => {
                let name = args.name()?;
                let target = args.name()?;
                Ok(reply(&self.files.symlink(node, name, target, caller)?))
            }
            op::MKNOD => {
                let arg = args.take()?;
                Ok(reply(&self.files.mknod(
                    node,
                    args.name()?,
                    &arg,
                    caller,
                )?))
            }
            op::MKDIR => {
                let arg = args.take()?;
                Ok(reply(&self.files.mkdir(
                    node,
                    args.name()?,
                    &arg,
                    caller,
                )?))
            }
            op::UNLINK | op::RMDIR => {
                let directory = header.opcode == op::RMDIR;
                self.files.unlink(node, args.name()?, directory)?;
                Ok(Reply::Empty)
            }
            op::RENAME => {
                let arg: wire::RenameIn = args.take()?;
                let (old, new) = (args.name()?, args.name()?);
                self.files.rename(node, old, arg.newdir, new, 0)?;
                Ok(Reply::Empty)
            }
            op::RENAME2 => {
                let arg: wire::Rename2In = args.take()?;
                let (old, new) = (args.name()?, args.name()?);
                self.files.rename(node, old, arg.newdir, new, arg.flags)?;
                self.files.give_whiteout(node, old, arg.flags, caller);
                Ok(Reply::Empty)
            }
            op::LINK => {
                let arg = args.take()?;
                Ok(reply(&self.files.link(node, args.name()?, &arg)?))
            }
            op::CREATE => {
                let arg = args.take()?;
                let name = args.name()?;
                let (entry, open) = self.files.create(node, name, &arg, caller)?;
                Ok(Reply::Bytes([entry.as_bytes(), open.as_bytes()].concat()))
            }
            op::TMPFILE => {
                let arg = args.take()?;
                let (entry, open) = self.files.tmpfile(node, &arg, caller)?;
                Ok(Reply::Bytes([entry.as_bytes(), open.as_bytes()].concat()))
            }
            _ => self.dispatch_files(header, args),
        }
    }

    /// Operations on open files, and extended attributes.
    fn dispatch_files(&self, header: &InHeader, args: &mut Args<'_>) -> Result<Reply, Errno> {
        let node = header.nodeid;
        match header.opcode {
            op::OPEN => {
                let arg: wire::OpenIn = args.take()?;
                Ok(reply(&self.files.open(node, &arg)?))
            }
            op::OPENDIR => Ok(reply(&self.files.opendir(node)?)),
            op::RELEASE | op::RELEASEDIR => {
                let arg: wire::ReleaseIn = args.take()?;
                self.files.release(node, arg.fh);
                Ok(Reply::Empty)
            }
            op::READDIR | op::READDIRPLUS => {
                let arg: wire::ReadIn = args.take()?;
                let plus = header.opcode == op::READDIRPLUS;
                let listing = self
                    .files
                    .readdir(node, arg.fh, arg.offset, arg.size, plus)?;
                Ok(Reply::Bytes(listing.into_bytes()))
            }
            op::FLUSH => {
                let arg: wire::FlushIn = args.take()?;
                self.files.flush(node, arg.fh)?;
                Ok(Reply::Empty)
            }
            op::FSYNC | op::FSYNCDIR => {
                self.files.fsync(node, &args.take()?)?;
                Ok(Reply::Empty)
            }
            op::SYNCFS => {
                self.files.syncfs(node)?;
                Ok(Reply::Empty)
            }
            op::FALLOCATE => {
                self.files.fallocate(node, &args.take()?)?;
                Ok(Reply::Empty)
            }
            op::LSEEK => {
                let offset = self.files.lseek(node, &args.take()?)?;
                Ok(reply(&wire::LseekOut { offset }))
            }
            op::IOCTL => {
                let flags = self.files.ioctl(node, &args.take()?)?;
                let out = wire::IoctlOut::default();
                Ok(Reply::Bytes([out.as_bytes(), flags.as_bytes()].concat()))
            }
            op::COPY_FILE_RANGE => {
                let size = self.files.copy_file_range(node, &args.take()?)?;
                Ok(reply(&wire::WriteOut { size, padding: 0 }))
            }
            _ => self.dispatch_attributes(header, args),
        }
    }

    fn dispatch_attributes(&self, header: &InHeader, args: &mut Args<'_>) -> Result<Reply, Errno> {
        let node = header.nodeid;
        match header.opcode {
            op::SETXATTR => {
                let arg: wire::SetxattrIn = args.take()?;
                let more = match self.extended_setxattr.load(Ordering::Relaxed) {
                    true => args.take()?,
                    false => wire::SetxattrExtIn::default(),
                };
                let name = args.name()?;
                let value = args.bytes(arg.size)?;
                self.files.setxattr(node, name, value, arg.flags)?;
                if more.setxattr_flags & wire::SETXATTR_ACL_KILL_SGID != 0 {
                    self.files.clear_set_group_id(node)?;
                }
                Ok(Reply::Empty)
            }
            op::GETXATTR => {
                let arg: wire::GetxattrIn = args.take()?;
                let value = self.files.getxattr(node, args.name()?, arg.size)?;
                Ok(sized(value, arg.size))
            }
            op::LISTXATTR => {
                let arg: wire::GetxattrIn = args.take()?;
                let list = self.files.listxattr(node, arg.size)?;
                Ok(sized(list, arg.size))
            }
            op::REMOVEXATTR => {
                self.files.removexattr(node, args.name()?)?;
                Ok(Reply::Empty)
            }
            op::HOST_WATCH if self.files.watches_host() => {
                self.files.watch(node, &args.take()?)?;
                Ok(Reply::Empty)
            }
            // Locks and permission checks are handled by the guest kernel; polling and block mapping are not
            // supported. The guest kernel does without them.
            _ => Err(Errno::NOSYS),
        }
    }

    fn read(&self, header: &InHeader, chain: &Chain, memory: &Memory) -> Result<Reply, Errno> {
        let mut arg = wire::ReadIn::default();
        let invalid = |_: ChainError| Errno::INVAL;
        chain
            .read(memory, IN_HEADER, arg.as_mut_bytes())
            .map_err(invalid)?;
        let room = chain.writable_len().saturating_sub(OUT_HEADER);
        let size = arg.size.min(room).min(wire::MAX_DATA);
        let into = chain
            .writable_slices(memory, OUT_HEADER, size as usize)
            .map_err(invalid)?;
        let read = self.files.read(header.nodeid, &arg, &into)?;
        let bytes = &self.metrics.read_bytes;
        bytes.fetch_add(read as u64, Ordering::Relaxed);
        Ok(Reply::Written(read as u32))
    }

    fn write(&self, header: &InHeader, chain: &Chain, memory: &Memory) -> Result<Reply, Errno> {
        let mut arg = wire::WriteIn::default();
        let invalid = |_: ChainError| Errno::INVAL;
        chain
            .read(memory, IN_HEADER, arg.as_mut_bytes())
            .map_err(invalid)?;
        if arg.size > wire::MAX_DATA {
            return Err(Errno::INVAL);
        }
        let data = IN_HEADER + size_of::<wire::WriteIn>() as u32;
        let from = chain
            .readable_slices(memory, data, arg.size as usize)
            .map_err(invalid)?;
        let written = self.files.write(header.nodeid, &arg, &from)?;
        let bytes = &self.metrics.written_bytes;
        bytes.fetch_add(written as u64, Ordering::Relaxed);
        Ok(reply(&wire::WriteOut {
            size: written as u32,
            padding: 0,
        }))
    }

    fn batch_forget(&self, args: &mut Args<'_>) -> Result<Reply, Errno> {
        let arg: wire::BatchForgetIn = args.take()?;
        for _ in 0..arg.count {
            // A count larger than the list ends with the list.
            let Ok(one) = args.take::<wire::ForgetOne>() else {
                break;
            };
            self.forget(one.nodeid, one.nlookup);
        }
        Ok(Reply::None)
    }

    fn forget(&self, node: u64, count: u64) {
        if self.files.watches_host() && count & wire::HOST_UNWATCH != 0 {
            self.files.unwatch(node, count & !wire::HOST_UNWATCH);
        } else {
            self.files.forget(node, count);
        }
    }

    fn init(&self, args: &mut Args<'_>) -> Result<Reply, Errno> {
        let arg: InitIn = args.take()?;
        if arg.major != wire::MAJOR {
            return Err(Errno::PROTO);
        }
        let offered = u64::from(arg.flags) | u64::from(arg.flags2) << 32;
        let mut wanted = init::ASYNC_READ
            | init::ATOMIC_O_TRUNC
            | init::BIG_WRITES
            | init::DONT_MASK
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::ASYNC_DIO
            | init::PARALLEL_DIROPS
            | init::POSIX_ACL
            | init::MAX_PAGES
            | init::HANDLE_KILLPRIV_V2
            | init::SETXATTR_EXT
            | init::INIT_EXT
            | init::DIRECT_IO_ALLOW_MMAP
            | init::HOST_DEVICES;
        match self.files.options().cache {
            Cache::Never => {}
            Cache::Auto => wanted |= init::AUTO_INVAL_DATA,
            Cache::Always => wanted |= init::CACHE_SYMLINKS,
            Cache::Writeback => wanted |= init::CACHE_SYMLINKS | init::WRITEBACK_CACHE,
        }
        if self.files.watches_host() {
            wanted |= init::HOST_WATCH;
        }
        let flags = wanted & offered;
        self.extended_setxattr
            .store(flags & init::SETXATTR_EXT != 0, Ordering::Relaxed);
        self.files.set_has_devices(flags & init::HOST_DEVICES != 0);
        Ok(reply(&InitOut {
            major: wire::MAJOR,
            minor: wire::MINOR,
            max_readahead: arg.max_readahead,
            flags: flags as u32,
            flags2: (flags >> 32) as u32,
            max_background: MAX_BACKGROUND,
            congestion_threshold: MAX_BACKGROUND / 4 * 3,
            max_write: wire::MAX_DATA,
            time_gran: 1,
            max_pages: wire::MAX_PAGES,
            ..InitOut::default()
        }))
    }
}

/// If the request allows no data, the reply is only the size.
fn sized(bytes: Vec<u8>, room: u32) -> Reply {
    if room == 0 {
        return reply(&wire::GetxattrOut {
            size: bytes.len() as u32,
            padding: 0,
        });
    }
    Reply::Bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::passthrough::Options;
    use crate::fs::shares::Shares;
    use crate::test_utils::{Buffer, Driver};

    /// A request in the form in which a guest makes it.
    pub(super) fn request(opcode: u32, nodeid: u64, body: &[&[u8]]) -> Vec<u8> {
        let header = InHeader {
            opcode,
            nodeid,
            ..InHeader::default()
        };
        [&[header.as_bytes()], body].concat().concat()
    }

    /// The reply of `server` to a request, after its header.
    fn ask(server: &Server, opcode: u32, nodeid: u64, body: &[&[u8]]) -> Vec<u8> {
        let mut driver = Driver::new(8);
        let request = request(opcode, nodeid, body);
        let head = driver.offer(&[Buffer::Readable(request), Buffer::Writable(256)]);
        let chain = driver.queue().pop().unwrap().unwrap();
        let len = server.serve(&chain, driver.memory()).unwrap();
        let reply = driver.written(head, len as usize);
        let (out, body) = OutHeader::read_from_prefix(&reply).unwrap();
        assert_eq!(out.error, 0, "{opcode}");
        body.to_vec()
    }

    fn greet(server: &Server, flags: u64) -> u64 {
        let init = InitIn {
            major: wire::MAJOR,
            flags: flags as u32,
            flags2: (flags >> 32) as u32,
            ..InitIn::default()
        };
        let reply = ask(server, op::INIT, 0, &[init.as_bytes()]);
        let (out, _) = InitOut::read_from_prefix(&reply).unwrap();
        u64::from(out.flags) | u64::from(out.flags2) << 32
    }

    /// xfstests generic/375: an ACL set by the owner of a file, who is not in its group, takes its set-group-ID bit.
    #[test]
    fn an_acl_may_take_the_set_group_id_bit() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "").unwrap();
        let shares = Shares::default();
        shares.add("s", dir.path(), false).unwrap();
        let server = Server::new(Passthrough::new(shares, Options::default()).unwrap());
        let root = server.files.lookup(wire::ROOT_ID, c"s").unwrap().nodeid;
        let node = server.files.lookup(root, c"file").unwrap().nodeid;
        let value = b"1";
        let arg = wire::SetxattrIn { size: 1, flags: 0 };
        let set = |flags: Option<u32>| {
            let mode = std::fs::Permissions::from_mode(0o2755);
            std::fs::set_permissions(&path, mode).unwrap();
            let more = flags.map(|setxattr_flags| wire::SetxattrExtIn {
                setxattr_flags,
                ..Default::default()
            });
            let more = more.as_ref().map_or(&[][..], IntoBytes::as_bytes);
            let body = [arg.as_bytes(), more, b"user.a\0", value];
            ask(&server, op::SETXATTR, node, &body);
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777
        };
        assert_eq!(greet(&server, 0) & init::SETXATTR_EXT, 0);
        assert_eq!(set(None), 0o2755);
        assert_ne!(greet(&server, u64::MAX) & init::SETXATTR_EXT, 0);
        assert_eq!(set(Some(0)), 0o2755);
        assert_eq!(set(Some(wire::SETXATTR_ACL_KILL_SGID)), 0o755);
    }

    /// FUSE_SUBMOUNTS: see `Inode::number`.
    #[test]
    fn submounts_are_never_announced() {
        const SUBMOUNTS: u64 = 1 << 27;
        let files = Passthrough::new(Shares::default(), Options::default()).unwrap();
        let flags = greet(&Server::new(files), u64::MAX);
        assert_eq!(flags & SUBMOUNTS, 0);
        assert_ne!(flags & init::ASYNC_READ, 0);
    }
}
