//! Rules of the repository, as tests: permitted dependencies between crates, permitted places for `unsafe`, and names in
//! documents that must exist.

#[path = "house/circles.rs"]
mod circles;
#[path = "house/documents.rs"]
mod documents;
#[path = "../../xtask/src/unsafe_blocks.rs"]
mod unsafe_blocks;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests is a directory of the checkout")
        .to_path_buf()
}

/// Every file of the repository with this extension, as a path from the root.
fn files(extension: &str) -> Vec<String> {
    fn walk(dir: &Path, extension: &str, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).expect("a readable directory").flatten() {
            let path = entry.path();
            let name = entry.file_name();
            if path.is_dir() && name != "target" && name != ".git" {
                walk(&path, extension, found);
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root(), extension, &mut found);
    let root = root();
    let mut names: Vec<String> = found
        .iter()
        .filter_map(|p| Some(p.strip_prefix(&root).ok()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    names
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Crates of this workspace in a manifest, except dev-dependencies.
fn dependencies(manifest: &str) -> Vec<String> {
    let mut section = String::new();
    let mut found = Vec::new();
    for line in read(manifest).lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']').to_owned();
        }
        let name = line.split(['.', ' ', '=']).next().unwrap_or_default();
        if section == "dependencies" && name.starts_with("koya") {
            found.push(name.to_owned());
        }
    }
    found
}

#[test]
fn crates_depend_only_on_those_below_them() {
    let arrows: &[(&str, &[&str])] = &[
        ("devices/host/Cargo.toml", &[]),
        ("devices/Cargo.toml", &["koya-host"]),
        ("agent/protocol/Cargo.toml", &[]),
        ("agent/rootfs/Cargo.toml", &[]),
        ("vmm/Cargo.toml", &["koya-devices", "koya-host"]),
        ("agent/Cargo.toml", &["koya-protocol", "koya-rootfs"]),
        ("runtime/image/Cargo.toml", &[]),
        (
            "runtime/Cargo.toml",
            &["koya-image", "koya-vmm", "koya-protocol", "koya-rootfs"],
        ),
        ("runtime/tasks/Cargo.toml", &["koya"]),
        ("runtime/cli/Cargo.toml", &["koya", "koya-tasks"]),
        ("runtime/oci-cli/Cargo.toml", &["koya", "koya-tasks"]),
        ("runtime/shim/Cargo.toml", &["koya", "koya-tasks"]),
        ("runtime/pages/Cargo.toml", &["koya-cli", "koya-oci"]),
        (
            "benches/Cargo.toml",
            &["koya-devices", "koya-vmm", "koya", "koya-protocol"],
        ),
    ];
    for (manifest, allowed) in arrows {
        for name in dependencies(manifest) {
            assert!(
                allowed.contains(&name.as_str()),
                "{manifest} depends on {name}"
            );
        }
    }
}

#[test]
fn unsafe_code_is_where_and_as_much_as_recorded() {
    if let Err(problem) = unsafe_blocks::check(&root()) {
        panic!("{problem}");
    }
}

#[test]
fn every_unsafe_block_says_why_it_is_sound() {
    for file in files("rs") {
        let text = read(&file);
        let lines: Vec<&str> = text.lines().collect();
        for used in unsafe_blocks::uses(&text).iter().filter(|u| u.is_block) {
            let before = &lines[used.line.saturating_sub(11)..used.line];
            assert!(
                before.iter().any(|l| l.contains("SAFETY:")),
                "{file}:{}: no SAFETY comment",
                used.line
            );
        }
    }
}

#[test]
fn documents_name_paths_that_exist() {
    let tops: Vec<String> = fs::read_dir(root())
        .expect("the checkout")
        .filter_map(|e| Some(e.ok()?.file_name().to_str()?.to_owned()))
        .filter(|name| name != "target")
        .collect();
    for file in files("md") {
        for (number, line) in read(&file).lines().enumerate() {
            for word in line.split('`').skip(1).step_by(2) {
                let first = word.split('/').next().unwrap_or_default();
                let is_path = word.contains('/') && !word.contains([' ', '<', '*', '{', '$']);
                if is_path && tops.iter().any(|top| top == first) {
                    let path = word.trim_end_matches('/');
                    assert!(
                        root().join(path).exists(),
                        "{file}:{}: {word} does not exist",
                        number + 1
                    );
                }
            }
        }
    }
}

#[test]
fn files_stay_small_enough_to_read() {
    for file in files("rs") {
        let lines = read(&file).lines().count();
        assert!(lines <= 600, "{file} has {lines} lines");
    }
}

#[test]
fn architecture_is_asked_for_in_one_place() {
    let word = ["target", "_arch"].concat();
    // The table of system calls includes those of a single architecture.
    let allowed = [
        "vmm/src/arch/mod.rs",
        "vmm/src/kvm/",
        "devices/host/src/walls/calls.rs",
    ];
    for file in files("rs") {
        // Tests may be specific to an architecture.
        let code = read(&file);
        let code = without_tests(&code);
        let named = code
            .lines()
            .any(|l| l.contains(&word) && !l.trim_start().starts_with("//"));
        assert!(
            !named || allowed.iter().any(|a| file.starts_with(a)) || file.contains("/tests/"),
            "{file} asks for the architecture"
        );
    }
}

/// Text before a file's inline module of tests; a declaration of one in another file does not end it.
fn without_tests(text: &str) -> &str {
    let begins = |at: &usize| {
        let item = text[*at..].split_inclusive(['{', ';']).next();
        item.is_some_and(|item| item.contains("mod ") && item.ends_with('{'))
    };
    let marks = ["#[cfg(test)]", "#[cfg(all(test"];
    let marks = marks.iter().flat_map(|mark| text.match_indices(mark));
    let end = marks.map(|(at, _)| at).filter(begins).min();
    &text[..end.unwrap_or(text.len())]
}

/// Names specific to platforms with a 16550.
const OF_A_16550: &[&str] = &["ttyS0", "8250"];

/// Names specific to a PC, as used in code.
const OF_A_PC: &[&str] = &[
    "0x3f8",
    "0x60..",
    "i8042",
    "I8042",
    "virtio_mmio.device",
    "mptable",
    "e820",
    "ioapic",
    "lapic",
    "BzImage",
];

#[test]
fn what_is_of_one_platform_stays_with_it() {
    let files = files("rs");
    let ours = files
        .iter()
        .filter(|file| file.starts_with("vmm/src/") || file.starts_with("devices/"))
        .filter(|file| !file.starts_with("vmm/src/arch/x86_64/"))
        .filter(|file| !file.starts_with("vmm/src/kvm/"));
    for file in ours {
        let text = read(file);
        // Tests contain small guests, which are code of one architecture.
        let code = without_tests(&text);
        for (number, line) in code.lines().enumerate() {
            for name in OF_A_PC {
                assert!(
                    !line.contains(name),
                    "{file}:{}: {name} belongs into vmm/src/arch/x86_64",
                    number + 1
                );
            }
            let is_platform = file.starts_with("vmm/src/arch/");
            for name in OF_A_16550.iter().filter(|_| !is_platform) {
                assert!(
                    !line.contains(name),
                    "{file}:{}: {name} belongs into vmm/src/arch",
                    number + 1
                );
            }
        }
    }
}

/// Places for code of one architecture. Other code asks for the name of the architecture at most (`std::env::consts::ARCH`).
const OF_ONE_ARCHITECTURE: &[&str] = &[
    "vmm/src/arch/",
    "vmm/src/kvm/",
    "devices/host/src/walls/calls.rs",
];

#[test]
fn code_of_one_architecture_is_in_its_places() {
    let is_its = |file: &str| {
        let mut places = OF_ONE_ARCHITECTURE.iter();
        places.any(|place| file.starts_with(*place))
    };
    for file in files("rs") {
        let is_test = file.starts_with("tests/") || file.contains("/tests/");
        let text = read(&file);
        let has_some = without_tests(&text).contains("target_arch");
        assert!(is_test || is_its(&file) || !has_some, "{file}");
    }
}

/// Modules of `devices/src` that are devices and independent of one another.
const DEVICES: &[&str] = &[
    "balloon", "blk", "fs", "mem", "net", "rng", "serial", "vsock",
];

#[test]
fn devices_know_what_they_share_and_not_each_other() {
    for file in files("rs") {
        let Some(path) = file.strip_prefix("devices/src/") else {
            continue;
        };
        let module = path.split(['/', '.']).next().unwrap_or_default();
        if ["lib", "test_utils"].contains(&module) {
            continue;
        }
        let text = read(&file);
        if path.contains("/tests") || path.ends_with("tests.rs") {
            continue;
        }
        let code = without_tests(&text);
        for line in code.lines().filter(|l| !l.trim_start().starts_with("//")) {
            for other in DEVICES.iter().filter(|other| **other != module) {
                let named = line.contains(&format!("crate::{other}::"));
                assert!(!named, "{file} uses {other}: {line}");
            }
        }
    }
}

#[test]
fn a_device_has_little_to_implement() {
    let text = read("devices/src/virtio/mod.rs");
    let body = text.split("pub trait VirtioDevice").nth(1);
    let body = body.and_then(|rest| rest.split("\n}").next());
    let methods = body.expect("the trait").matches("\n    fn ").count();
    assert!((1..=12).contains(&methods), "{methods} methods");
}

/// Names of threads started outside tests: `Role::new("...")`, or a literal as the first argument of a `spawn` function.
fn thread_names() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for file in files("rs") {
        let is_ours = ["devices/", "vmm/src/", "runtime/"]
            .iter()
            .any(|dir| file.starts_with(dir));
        if !is_ours || file.contains("/tests") || file.ends_with("tests.rs") {
            continue;
        }
        let text = read(&file);
        let code = without_tests(&text);
        for (at, _) in code.match_indices("\"koya-") {
            let before = code[..at].trim_end();
            let before = before.strip_suffix("scope,").unwrap_or(before).trim_end();
            let starts = [
                "spawn(",
                "spawn_scoped(",
                "lend_first_thread(",
                "Role::new(",
                ".thread_name(",
            ];
            if starts.iter().any(|start| before.ends_with(start)) {
                let name = code[at + 1..].split('"').next();
                found.extend(name.map(str::to_owned));
            }
        }
    }
    found
}

#[test]
fn every_thread_has_a_row_in_the_table() {
    let text = read("docs/architecture.md");
    let rows = text.lines().filter(|line| line.starts_with("| `koya-"));
    let first = rows.filter_map(|line| line.split('|').nth(1));
    let named: BTreeSet<String> = first
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .map(|name| name.trim_end_matches('N').to_owned())
        .collect();
    let started = thread_names();
    assert!(started.contains("koya-vcpu"), "{started:?}");
    let unnamed: Vec<_> = started.difference(&named).collect();
    assert!(
        unnamed.is_empty(),
        "not in docs/architecture.md: {unnamed:?}"
    );
    let gone: Vec<_> = named.difference(&started).collect();
    assert!(gone.is_empty(), "in docs/architecture.md alone: {gone:?}");
}

#[test]
fn threads_are_started_by_their_role() {
    // Concatenated here, so that this file does not match itself.
    let forms = ["thread::spawn(", "thread::Builder"].map(|form| format!("std::{form}"));
    for file in files("rs") {
        let is_library = ["devices/", "vmm/src/"]
            .iter()
            .any(|dir| file.starts_with(dir));
        if !is_library || file.starts_with("devices/host/") || file.contains("test") {
            continue;
        }
        let text = read(&file);
        let code = without_tests(&text);
        for form in &forms {
            assert!(
                !code.contains(form),
                "{file} starts a thread without a role"
            );
        }
    }
}

/// Options set to `y` by the fragments in a directory, without `CONFIG_`.
fn kernel_options(directory: &str) -> BTreeSet<String> {
    let fragments = files("config");
    let fragments = fragments.iter().filter(|f| f.starts_with(directory));
    let text: String = fragments.map(|file| read(file) + "\n").collect();
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("CONFIG_")?.strip_suffix("=y"))
        .map(str::to_owned)
        .collect()
}

/// Cells of rows for an option, in tables with this many columns.
fn option_rows(text: &str, columns: usize) -> Vec<Vec<String>> {
    text.lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| line.trim_matches('|').split('|'))
        .map(|cells| cells.map(|cell| cell.trim().to_owned()).collect())
        .filter(|row: &Vec<String>| row.len() == columns)
        .collect()
}

/// Compares the table of options needed by container engines with the configuration.
#[test]
fn the_guest_kernel_has_the_options_that_its_table_says() {
    let set = kernel_options("guest-kernel/config/");
    let text = read("docs/guest-kernel.md");
    let (text, full) = text.split_once("\n## The full kernel\n").unwrap();
    let asked = option_rows(text, 3);
    for (engine, options) in [("Docker", 83), ("Kubernetes", 22), ("k3s", 62)] {
        let rows = asked
            .iter()
            .filter(|row| row[1].split(", ").any(|e| e == engine));
        assert_eq!(rows.count(), options, "{engine}");
    }
    for row in &asked {
        let (option, here) = (row[0].trim_matches('`'), row[2].as_str());
        if here == "set" {
            assert!(set.contains(option), "{option} is not in the fragments");
        } else if let Some(by) = here.strip_prefix("by ") {
            assert!(set.contains(by.trim_matches('`')), "{option}: {here}");
        } else {
            let why = here.strip_prefix("left out: ").unwrap_or_default();
            assert!(!why.is_empty(), "{option} has no reason: {here}");
            assert!(!set.contains(option), "{option} is there");
        }
    }
    let only_full = kernel_options("guest-kernel/config-full/");
    for row in option_rows(text, 2) {
        let option = row[0].trim_matches('`');
        assert!(!set.contains(option) && !row[1].is_empty(), "{option}");
        assert!(
            !only_full.contains(option),
            "{option} is in the full kernel"
        );
    }
    let rows = option_rows(full, 2);
    let named = rows.iter().map(|row| row[0].trim_matches('`').to_owned());
    assert_eq!(named.collect::<BTreeSet<_>>(), only_full);
    assert!(only_full.is_disjoint(&set));
}

/// The ledger lists each patch, and no other, with its gain, its risk and the condition for its removal.
#[test]
fn every_patch_of_the_guest_kernel_is_in_the_ledger() {
    let ledger = read("guest-kernel/README.md");
    let rows = ledger.lines().filter(|line| line.starts_with("| 00"));
    let rows: Vec<Vec<&str>> = rows
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    for row in &rows {
        assert!(
            row.len() == 4 && row.iter().all(|c| !c.is_empty()),
            "{row:?}"
        );
    }
    let listed: Vec<&str> = rows.iter().filter_map(|row| row[0].get(..4)).collect();
    let patches = files("patch");
    let there: Vec<&str> = patches
        .iter()
        .filter_map(|file| file.strip_prefix("guest-kernel/patches/")?.get(..4))
        .collect();
    assert_eq!(listed, there);
}

/// The complete public interface of koya-vmm, so that nothing becomes public by accident.
const OF_KOYA_VMM: &[&str] = &[
    "ArchError",
    "AttachError",
    "AttachedDisk",
    "AttachedNetwork",
    "BootEvent",
    "BootEvents",
    "ConfigError",
    "DeviceFailure",
    "DiskConfig",
    "ExitReason",
    "Exits",
    "HugePages",
    "MAX_CPUS",
    "MAX_DISK_QUEUES",
    "MAX_DISK_SLOTS",
    "MAX_MEMORY_MIB",
    "MAX_NET_QUEUES",
    "MIN_MEMORY_MIB",
    "MemoryBacking",
    "MemoryError",
    "MemoryUsage",
    "NetConfig",
    "Overlap",
    "Serial",
    "Spec",
    "StartError",
    "Vm",
    "VmBuilder",
    "VmConfig",
    "VmHandle",
    "VsockConfig",
    "devices",
    "devices::balloon",
    "devices::blk",
    "devices::fs",
    "devices::mem",
    "devices::net",
    "devices::rate_limit",
    "devices::rng",
    "devices::serial",
    "devices::virtio",
    "devices::vsock",
    "guest_text",
    "host",
    "internals",
    "kvm",
];

/// Names of `pub use` and `pub mod` items, with the module's name before those of an inline module. For `#[doc(hidden)]`
/// modules, the name but not the contents.
fn public_names(text: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut module: Option<String> = None;
    let code: String = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .map(|line| format!("{line}\n"))
        .collect();
    let mut rest = code.as_str();
    while let Some(at) = rest
        .find("pub ")
        .into_iter()
        .chain(rest.find("\n}\n"))
        .min()
    {
        if rest[at..].starts_with("\n}") {
            module = None;
            rest = &rest[at + 2..];
            continue;
        }
        let item = rest[at + 4..].trim_start();
        let within = |name: &str| match &module {
            Some(module) => format!("{module}::{name}"),
            None => name.to_owned(),
        };
        if let Some(used) = item.strip_prefix("use ") {
            let used = used.split(';').next().unwrap_or_default();
            let list = used.split_once('{').map(|(_, list)| list);
            let last = || used.rsplit("::").next().unwrap_or(used);
            for name in list.unwrap_or_else(last).split([',', '}']) {
                let name = name.rsplit(" as ").next().unwrap_or(name);
                let name = name.rsplit("::").next().unwrap_or(name).trim();
                if !name.is_empty() {
                    names.insert(within(name));
                }
            }
        } else if let Some(named) = item.strip_prefix("mod ") {
            let name = named.split([' ', ';']).next().unwrap_or_default();
            names.insert(within(name));
            let is_open = named.split(';').next().is_some_and(|m| m.contains('{'));
            module = is_open.then(|| name.to_owned());
        } else {
            let line = item.lines().next().unwrap_or_default();
            names.insert(format!("something else: {line}"));
        }
        rest = &rest[at + 4..];
    }
    names.retain(|name| !name.starts_with("internals::"));
    names
}

#[test]
fn the_monitor_shows_what_it_means_to() {
    let names = public_names(&read("vmm/src/lib.rs"));
    let wanted: BTreeSet<String> = OF_KOYA_VMM.iter().map(|name| (*name).to_owned()).collect();
    let more: Vec<_> = names.difference(&wanted).collect();
    let less: Vec<_> = wanted.difference(&names).collect();
    assert!(more.is_empty(), "public, and not meant to be: {more:?}");
    assert!(less.is_empty(), "meant to be public, and not: {less:?}");
}
