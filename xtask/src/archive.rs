//! A cpio archive in the initramfs format of the kernel.

use anyhow::Result;
use cpio::{NewcBuilder, newc};
use std::io::Write;

/// An archive under construction.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    inodes: u32,
}

impl Archive {
    pub(crate) fn dir(&mut self, name: &str) -> Result<()> {
        self.entry(name, 0o040_755, &[])
    }

    pub(crate) fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.entry(name, 0o100_000 | mode, content)
    }

    /// Adds a character device.
    pub(crate) fn node(&mut self, name: &str, mode: u32, device: (u32, u32)) -> Result<()> {
        let entry = NewcBuilder::new(name).mode(0o020_000 | mode);
        self.add(entry.rdev_major(device.0).rdev_minor(device.1), &[])
    }

    pub(crate) fn symlink(&mut self, name: &str, to: &str) -> Result<()> {
        self.entry(name, 0o120_777, to.as_bytes())
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        let name = format!("{name}{}", "\0".repeat(self.padding(name, content)));
        self.add(NewcBuilder::new(&name).mode(mode), content)
    }

    fn add(&mut self, entry: NewcBuilder, content: &[u8]) -> Result<()> {
        self.inodes += 1;
        let entry = entry.ino(self.inodes).nlink(1);
        let mut writer = entry.write(&mut self.bytes, u32::try_from(content.len())?);
        writer.write_all(content)?;
        writer.finish()?;
        Ok(())
    }

    /// Number of extra zeros after the name, so that the content begins on a page boundary: Koya's guest kernel then uses it
    /// in place instead of copying it.
    fn padding(&self, name: &str, content: &[u8]) -> usize {
        /// Size of an entry's header: `Documentation/driver-api/early-userspace/buffer-format.rst`.
        const HEADER: usize = 110;
        const PAGE: usize = 4096;
        /// Maximum length of a name in Linux, including the terminator.
        const PATH_MAX: usize = 4096;
        let named = self.bytes.len() + HEADER + name.len() + 1;
        let padding = named.next_multiple_of(PAGE) - named;
        if content.len() < PAGE || name.len() + 1 + padding > PATH_MAX {
            return 0;
        }
        padding
    }

    pub(crate) fn finish(mut self) -> Result<Vec<u8>> {
        newc::trailer(&mut self.bytes)?;
        // The kernel requires concatenated archives to start at a multiple of four bytes.
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_content_of_large_files_begins_on_a_page() {
        let mut archive = Archive::default();
        let large = vec![0x5a; 5000];
        archive.file("small", 0o644, b"few").unwrap();
        archive.file("one", 0o755, &large).unwrap();
        archive.file("two", 0o755, &large).unwrap();
        let bytes = archive.finish().unwrap();
        let begins: Vec<usize> = (1..bytes.len())
            .filter(|&at| bytes[at] == 0x5a && bytes[at - 1] != 0x5a)
            .collect();
        assert_eq!(begins, [4096, 12288]);
    }
}
