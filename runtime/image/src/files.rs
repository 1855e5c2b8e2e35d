//! The files of an image: in a directory, or in an archive, whose entries are read in place by offset instead of being
//! unpacked. No name in an archive becomes a name on the host.

use crate::Error;
use crate::archive::{Entry, Kind, Reader, Source};
use crate::compression::Decoder;
use crate::error::{cut_short, invalid};
use crate::limits::{Budget, Limits, Metered};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// Maximum number of links followed to a file.
const MAX_LINKS: usize = 16;
/// Maximum number of entries in an image's archive: a few for each layer, for each image in it.
const MAX_ENTRIES: usize = 100_000;
/// Maximum total size of their names in bytes: they are kept in memory.
const MAX_NAMES: u64 = 32 << 20;

/// A file of the image.
#[derive(Clone, Debug)]
pub(crate) struct Blob {
    file: Arc<File>,
    at: u64,
    pub(crate) size: u64,
}

impl Blob {
    pub(crate) fn reader(&self) -> Section {
        Section {
            file: self.file.clone(),
            at: self.at,
            end: self.at + self.size,
        }
    }

    /// The whole file, if it is within the size limit of documents.
    pub(crate) fn document(&self, name: &str, limits: &Limits) -> Result<Vec<u8>, Error> {
        if self.size > limits.document {
            let text = format!(
                "{name} has {} bytes; up to {} are read",
                self.size, limits.document
            );
            return Err(Error::invalid(text));
        }
        let mut text = Vec::new();
        let read = self.reader().read_to_end(&mut text);
        read.map_err(Error::reading(name))?;
        Ok(text)
    }
}

/// Reads a part of a file.
pub(crate) struct Section {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let most = buffer.len().min(most);
        let count = self.file.read_at(&mut buffer[..most], self.at)?;
        if count == 0 && most > 0 {
            return Err(cut_short());
        }
        self.at += count as u64;
        Ok(count)
    }
}

impl Source for Section {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        let at = self.at.checked_add(count);
        self.at = at.filter(|at| *at <= self.end).ok_or_else(cut_short)?;
        Ok(())
    }
}

enum Location {
    Data(Blob),
    Link(PathBuf),
}

/// The files of an image.
pub(crate) struct Files(Kept);

enum Kept {
    Directory(OwnedFd),
    Archive(HashMap<PathBuf, Location>),
}

impl Files {
    /// Opens a directory, or an archive. An archive is read in place, or, if it is compressed as a whole or not a regular
    /// file, copied to `scratch`.
    pub(crate) fn open(path: &Path, scratch: &Path, limits: &Limits) -> Result<Self, Error> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(CWD, path, flags, Mode::empty());
        let opened =
            opened.map_err(|e| Error::host(format!("open {}", path.display()))(e.into()))?;
        let kind = rustix::fs::fstat(&opened)
            .map(|stat| FileType::from_raw_mode(stat.st_mode))
            .map_err(|e| Error::host(format!("open {}", path.display()))(e.into()))?;
        if kind == FileType::Directory {
            return Ok(Self(Kept::Directory(opened)));
        }
        let name = path.display().to_string();
        let file =
            plain(File::from(opened), kind, scratch, limits).map_err(Error::reading(&name))?;
        let entries = index(file, scratch, limits).map_err(Error::reading(&name))?;
        Ok(Self(Kept::Archive(without_top(entries))))
    }

    /// The file with this name, if it exists. Links are resolved inside.
    pub(crate) fn find(&self, name: &str) -> Result<Option<Blob>, Error> {
        self.look_up(name, ResolveFlags::IN_ROOT)
    }

    fn look_up(&self, name: &str, within: ResolveFlags) -> Result<Option<Blob>, Error> {
        let found = match &self.0 {
            Kept::Directory(dir) => in_directory(dir, name, within),
            Kept::Archive(entries) => in_archive(entries, name),
        };
        found.map_err(Error::reading(name))
    }

    /// A file that is named by the digest of its content, which is verified. In a directory, links to it or to the directory
    /// that it is in may lead anywhere: layouts share blobs with others, or with a store.
    ///
    /// # Errors
    /// If there is no such file.
    pub(crate) fn get_by_digest(&self, name: &str) -> Result<Blob, Error> {
        let found = self.look_up(name, ResolveFlags::empty())?;
        found.ok_or_else(|| missing(name))
    }

    /// # Errors
    /// If there is no such file.
    pub(crate) fn get(&self, name: &str) -> Result<Blob, Error> {
        self.find(name)?.ok_or_else(|| missing(name))
    }
}

fn missing(name: &str) -> Error {
    Error::invalid(format!("{name} is missing"))
}

fn in_directory(dir: &OwnedFd, name: &str, within: ResolveFlags) -> io::Result<Option<Blob>> {
    // The directory may contain a hostile symbolic link: to a FIFO, which would block, or to a device that starts something
    // when it is opened.
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let within = within | ResolveFlags::NO_MAGICLINKS;
    let found = match rustix::fs::openat2(dir, name, flags, Mode::empty(), within) {
        Ok(found) => found,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mode = rustix::fs::fstat(&found)?.st_mode;
    if FileType::from_raw_mode(mode) != FileType::RegularFile {
        return Err(invalid("it is no regular file"));
    }
    let file = File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
    let data = file.metadata()?;
    Ok(Some(Blob {
        file: Arc::new(file),
        at: 0,
        size: data.len(),
    }))
}

fn in_archive(entries: &HashMap<PathBuf, Location>, name: &str) -> io::Result<Option<Blob>> {
    let mut path = clean(Path::new(name));
    for _ in 0..MAX_LINKS {
        match entries.get(&path) {
            None => return Ok(None),
            Some(Location::Data(blob)) => return Ok(Some(blob.clone())),
            Some(Location::Link(target)) => path.clone_from(target),
        }
    }
    Err(invalid("links lead to links without end"))
}

/// Normalizes a path inside the archive: `..` cannot lead out of its root.
fn clean(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => {
                out.pop();
            }
            _ => {}
        }
    }
    out
}

/// The archive as an uncompressed regular file.
fn plain(mut file: File, kind: FileType, scratch: &Path, limits: &Limits) -> io::Result<File> {
    if kind != FileType::RegularFile {
        // The format is detected from the first bytes, which a pipe may return one by one.
        file = copy(file, &scratch.join("pipe"), limits)?;
        file.rewind()?;
    }
    let mut decoder = Decoder::new(BufReader::with_capacity(1 << 16, file.try_clone()?))?;
    match decoder.is_plain() {
        true => Ok(file),
        false => copy(&mut decoder, &scratch.join("archive"), limits),
    }
}

fn copy(source: impl Read, path: &Path, limits: &Limits) -> io::Result<File> {
    let mut options = File::options();
    let mut copy = options.read(true).write(true).create_new(true).open(path)?;
    let mut budget = Budget::new("bytes in all", limits.total);
    let mut metered = Metered {
        source,
        budget: &mut budget,
    };
    io::copy(&mut metered, &mut copy)?;
    Ok(copy)
}

/// Offsets of the archive's files. Of entries with the same name the last one counts.
fn index(file: File, scratch: &Path, limits: &Limits) -> io::Result<HashMap<PathBuf, Location>> {
    let file = Arc::new(file);
    let end = file.metadata()?.len();
    let section = Section {
        file: file.clone(),
        at: 0,
        end,
    };
    let mut reader = Reader::new(section, limits.header);
    let mut entries = HashMap::new();
    let mut spilled = Budget::new("bytes in all", limits.total);
    let mut named = Budget::new("bytes of names", MAX_NAMES);
    let mut count = 0;
    while let Some(entry) = reader.next_entry().map_err(|error| match count {
        0 => invalid(format!("it is no archive of an image: {error}")),
        _ => error,
    })? {
        count += 1;
        named.take(entry.name.len() as u64 + entry.link.len() as u64)?;
        if count > MAX_ENTRIES {
            return Err(invalid(format!("more than {MAX_ENTRIES} entries")));
        }
        let path = clean(Path::new(OsStr::from_bytes(&entry.name)));
        let link = Path::new(OsStr::from_bytes(&entry.link));
        let place = match entry.kind {
            Kind::Regular if entry.sparse.is_some() => {
                spilled.take(entry.size)?;
                let whole = scratch.join(format!("sparse-{count}"));
                Location::Data(expand(&mut reader, &entry, &whole)?)
            }
            Kind::Regular => Location::Data(Blob {
                file: file.clone(),
                at: reader.source().at,
                size: entry.size,
            }),
            Kind::Symlink => {
                let parent = path.parent().unwrap_or(Path::new(""));
                let from = if link.is_absolute() {
                    Path::new("")
                } else {
                    parent
                };
                Location::Link(clean(&from.join(link)))
            }
            Kind::HardLink => Location::Link(clean(link)),
            // Types of entries that images do not need.
            _ => continue,
        };
        entries.insert(path, place);
    }
    // Some programs leave out the mark of the end, and others do not miss it. If files are missing, too, they are reported
    // by their names: all that is used has a size and a digest.
    Ok(entries)
}

/// Extracts a sparse file of the archive, with its holes, to a separate file.
fn expand(reader: &mut Reader<Section>, entry: &Entry, path: &Path) -> io::Result<Blob> {
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)?;
    crate::layer::write_data(reader, entry, &mut file)?;
    Ok(Blob {
        file: Arc::new(file),
        at: 0,
        size: entry.size,
    })
}

/// Removes a single top directory, as in an archive made from a directory by its name.
fn without_top(entries: HashMap<PathBuf, Location>) -> HashMap<PathBuf, Location> {
    let marks = ["index.json", "manifest.json", "repositories"];
    if marks
        .iter()
        .any(|mark| entries.contains_key(Path::new(mark)))
    {
        return entries;
    }
    let top = |path: &Path| {
        path.components()
            .next()
            .map(|top| PathBuf::from(top.as_os_str()))
    };
    let Some(first) = entries.keys().find_map(|path| top(path)) else {
        return entries;
    };
    let strip = |path: &Path| path.strip_prefix(&first).ok().map(Path::to_path_buf);
    let inside = entries.keys().all(|path| path.starts_with(&first));
    if !inside
        || !marks
            .iter()
            .any(|mark| entries.contains_key(&first.join(mark)))
    {
        return entries;
    }
    let moved = entries.into_iter().filter_map(|(path, place)| {
        let place = match place {
            Location::Link(target) => Location::Link(strip(&target).unwrap_or(target)),
            data => data,
        };
        Some((strip(&path)?, place))
    });
    moved.collect()
}
