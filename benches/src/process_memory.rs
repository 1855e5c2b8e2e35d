//! Host memory used by a process in addition to its guest's, by kind.

use koya_vmm::host::threads;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

/// Sizes of thread stacks, in KiB: Koya's own, and Rust's default for those of libraries.
const STACKS_KIB: [u64; 2] = [(threads::STACK >> 10) as u64, 2048];
/// Additional size of a stack's mapping in musl, for thread-local variables.
const BESIDE_STACK_KIB: u64 = 64;

fn is_stack(kib: u64) -> bool {
    let mut sizes = STACKS_KIB.into_iter();
    sizes.any(|size| (size..=size + BESIDE_STACK_KIB).contains(&kib))
}

/// Memory of one process, in KiB.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessMemory {
    /// Private pages, without the guest's.
    pub private: u64,
    /// The same by kind.
    pub kinds: BTreeMap<&'static str, u64>,
    /// Resident pages, including shared ones and the guest's.
    pub rss: u64,
    /// The guest's pages.
    pub guest: u64,
    /// Page tables of the process, including those for the guest's memory.
    pub page_tables: u64,
}

/// Memory of a process whose guest has this much memory (KiB).
///
/// # Errors
/// If the process has ended, or is not accessible.
pub fn of(pid: u32, guest_kib: u64) -> io::Result<ProcessMemory> {
    let proc = Path::new("/proc").join(pid.to_string());
    let mut held = sum(&fs::read_to_string(proc.join("smaps"))?, guest_kib);
    let status = fs::read_to_string(proc.join("status"))?;
    let tables = status.lines().find_map(|line| line.strip_prefix("VmPTE:"));
    held.page_tables = tables.map_or(0, first_number);
    Ok(held)
}

fn first_number(text: &str) -> u64 {
    let word = text.split_whitespace().next();
    word.and_then(|word| word.parse().ok()).unwrap_or(0)
}

fn sum(smaps: &str, guest_kib: u64) -> ProcessMemory {
    let mut held = ProcessMemory::default();
    let (mut name, mut kind, mut is_guest) = (String::new(), "", false);
    for line in smaps.lines() {
        let Some((field, rest)) = line.split_once(':') else {
            continue;
        };
        // `7f00-7f10 rw-p 00000000 00:00 0 [heap]`: the device's numbers have a colon too.
        if field.contains(' ') {
            name = line.split_whitespace().nth(5).unwrap_or("").to_owned();
            continue;
        }
        let kib = first_number(rest);
        match field {
            "Size" => {
                is_guest = name.is_empty() && kib >= guest_kib;
                kind = match name.as_str() {
                    "" if is_stack(kib) => "thread stacks",
                    "[stack]" => "thread stacks",
                    "" | "[heap]" => "heap",
                    other if other.starts_with('/') => "program and libraries",
                    _ => "other",
                };
            }
            "Rss" => {
                held.rss += kib;
                held.guest += if is_guest { kib } else { 0 };
            }
            "Private_Clean" | "Private_Dirty" if !is_guest => {
                held.private += kib;
                let kind = match (kind, field) {
                    ("program and libraries", "Private_Dirty") => "program and libraries, written",
                    (kind, _) => kind,
                };
                *held.kinds.entry(kind).or_default() += kib;
            }
            _ => {}
        }
    }
    held
}

/// A separate control group for a process, to measure the kernel's memory for it.
pub struct Group(std::path::PathBuf);

impl Group {
    /// Creates the group and moves the process into it.
    ///
    /// # Errors
    /// If there is no accessible cgroup2 with a memory controller.
    pub fn with(pid: u32) -> io::Result<Self> {
        let root = Path::new("/sys/fs/cgroup");
        fs::write(root.join("cgroup.subtree_control"), "+memory")?;
        let group = Self(root.join(format!("koya-bench-{pid}")));
        fs::create_dir(&group.0)?;
        fs::write(group.0.join("cgroup.procs"), pid.to_string())?;
        Ok(group)
    }

    /// The kernel's memory for it, page tables included, in KiB.
    ///
    /// # Errors
    /// If the host does not provide the figure.
    pub fn kernel(&self) -> io::Result<u64> {
        let stat = fs::read_to_string(self.0.join("memory.stat"))?;
        let kernel = stat.lines().find_map(|line| line.strip_prefix("kernel "));
        Ok(kernel.map_or(0, first_number) / 1024)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        fs::remove_dir(&self.0).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_apart_and_the_guest_is_none() {
        let smaps = "1000-2000 r--p 00000000 08:01 7 /bin/koya\nSize: 4 kB\nRss: 4 kB\n\
                     Private_Clean: 4 kB\nPrivate_Dirty: 0 kB\nVmFlags: rd mr\n\
                     2000-3000 rw-p 00000000 08:01 7 /bin/koya\nSize: 4 kB\nRss: 4 kB\n\
                     Private_Clean: 0 kB\nPrivate_Dirty: 4 kB\n\
                     3000-4000 rw-p 00000000 00:00 0 [heap]\nSize: 64 kB\nRss: 20 kB\n\
                     Private_Dirty: 20 kB\n\
                     7000-8000 rw-p 00000000 00:00 0 \nSize: 2048 kB\nRss: 4 kB\nPrivate_Dirty: 4 kB\n\
                     8000-9000 rw-p 00000000 00:00 0 \nSize: 1032 kB\nRss: 8 kB\nPrivate_Dirty: 8 kB\n\
                     9000-a000 rw-p 00000000 00:00 0 \nSize: 131072 kB\nRss: 500 kB\n\
                     Private_Dirty: 500 kB\n";
        let held = sum(smaps, 131_072);
        assert_eq!((held.private, held.guest, held.rss), (40, 500, 540));
        let kinds: Vec<_> = held.kinds.into_iter().filter(|kind| kind.1 > 0).collect();
        let expected = [
            ("heap", 20),
            ("program and libraries", 4),
            ("program and libraries, written", 4),
            ("thread stacks", 12),
        ];
        assert_eq!(kinds, expected);
    }
}
