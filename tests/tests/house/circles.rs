//! Circles of files: two files of a crate that use each other, directly or through others. What is in a circle can only be
//! understood together, so there are few, small ones, each with its reason.

use super::{files, read, without_tests};
use std::collections::{BTreeMap, BTreeSet};

/// The circles that are meant, by crate: their files, and why these belong together.
const MEANT: &[(&str, &[&str], &str)] = &[
    (
        "agent",
        &["enosys_filter", "sys"],
        "a filter, and the call that installs it",
    ),
    (
        "agent",
        &["configuration", "disks"],
        "a disk is found in a configuration, and changes it",
    ),
    (
        "devices",
        &[
            "blk",
            "blk::disk",
            "blk::engine",
            "blk::request",
            "blk::worker",
        ],
        "a device, its requests, and what carries them out",
    ),
    (
        "devices",
        &[
            "fs::export",
            "fs::inodes",
            "fs::node",
            "fs::origin",
            "fs::shares",
        ],
        "shares, and nodes that know their shares",
    ),
    (
        "devices",
        &[
            "fs::passthrough",
            "fs::passthrough::owners",
            "fs::passthrough::xattr",
        ],
        "owners are kept in an attribute, which is hidden",
    ),
    (
        "devices",
        &["mem", "mem::region"],
        "a device and its region",
    ),
    (
        "devices",
        &["net", "net::control", "net::queue_pair", "net::tap"],
        "a device and its queues",
    ),
    (
        "devices",
        &[
            "virtio",
            "virtio::mmio",
            "virtio::queue",
            "virtio::registers",
        ],
        "the device trait, and the transport that calls it",
    ),
    (
        "devices",
        &["vsock::connector", "vsock::ports"],
        "ports, and the thread that connects to them",
    ),
    (
        "devices/host",
        &["sys::violation", "walls", "walls::calls", "walls::program"],
        "filters, their lists of calls, their compiler, and what a violation says",
    ),
    (
        "runtime",
        &[
            "attachments",
            "container",
            "pending_streams",
            "sandbox",
            "size",
        ],
        "a sandbox has containers, which use its machine",
    ),
    (
        "runtime",
        &["egress_filter", "network", "network::host_access"],
        "a network and its rules",
    ),
    (
        "runtime/cli",
        &["client", "control", "disk", "run", "size", "stats"],
        "both ends of a protocol, and its commands",
    ),
    (
        "runtime/cli",
        &["timeline", "timeline::svg", "timeline::text"],
        "a timeline in two forms",
    ),
    (
        "runtime/image",
        &["archive", "archive::header", "archive::pax"],
        "a reader and what it reads",
    ),
    (
        "runtime/image",
        &["layer", "layer::walk"],
        "a layer, and the walk to its entries",
    ),
    (
        "runtime/image",
        &["lib", "manifest"],
        "the types of the crate, and their parser",
    ),
    (
        "runtime/oci-cli",
        &["create", "exec", "life", "member", "serve"],
        "a container, and the processes that represent it",
    ),
    (
        "runtime/oci-cli",
        &["ipc", "source", "state"],
        "state, and requests to its process",
    ),
    (
        "runtime/tasks",
        &[
            "create",
            "event",
            "exec",
            "hooks",
            "lifecycle",
            "machine",
            "notify",
            "pid_holder",
            "process",
            "relay",
            "resize",
            "set",
            "spec",
        ],
        "one type, the task set, with its methods in a file for each subject",
    ),
    (
        "vmm",
        &["arch", "config"],
        "a configuration is checked by the platform",
    ),
    (
        "vmm",
        &["arch::aarch64", "arch::aarch64::regs"],
        "a platform and its registers",
    ),
    (
        "vmm",
        &["builder", "hotplug", "standard_devices", "teardown", "vm"],
        "the parts of a machine, from its start to its end",
    ),
];

/// Path of a module from the crate; that of `lib.rs` is empty.
type Module = Vec<String>;

/// A source file, without comments, texts and tests.
struct Source {
    defined: BTreeSet<String>,
    /// Names that it exports from elsewhere, with their paths.
    exported: BTreeMap<String, Vec<String>>,
    /// Paths that it uses.
    used: Vec<Vec<String>>,
}

fn tokens(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in text.lines() {
        let code = line.split("//").next().unwrap_or_default();
        // Every second part is within a text.
        for (index, part) in code.split('"').enumerate() {
            if index % 2 == 1 {
                continue;
            }
            let mut word = String::new();
            for c in part.chars().chain([' ']) {
                if c.is_alphanumeric() || c == '_' {
                    word.push(c);
                    continue;
                }
                if !word.is_empty() {
                    found.push(std::mem::take(&mut word));
                }
                match c {
                    ' ' => {}
                    ':' if found.last().is_some_and(|last| last == ":") => {
                        *found.last_mut().expect("it has one") = "::".into();
                    }
                    c => found.push(c.into()),
                }
            }
        }
    }
    found
}

/// The paths of a tree of imports, without the names that it gives them. Returns the position after it.
fn imports(
    tokens: &[String],
    mut at: usize,
    prefix: &[String],
    found: &mut Vec<Vec<String>>,
) -> usize {
    let mut path = prefix.to_vec();
    while let Some(token) = tokens.get(at) {
        match token.as_str() {
            "{" => {
                at += 1;
                while tokens.get(at).is_some_and(|token| token != "}") {
                    let before = at;
                    at = imports(tokens, at, &path, found);
                    at += usize::from(tokens.get(at).is_some_and(|token| token == ","));
                    if at == before {
                        // The word `use` in a text of several lines.
                        return at;
                    }
                }
                return at + 1;
            }
            "," | "}" | ";" => break,
            // The name that follows is the importer's own.
            "as" => at += 1,
            "::" => {}
            name => path.push(name.into()),
        }
        at += 1;
    }
    if path.last().is_some_and(|last| last == "self") {
        path.pop();
    }
    found.push(path);
    at
}

impl Source {
    fn parse(text: &str) -> Self {
        let tokens = tokens(without_tests(text));
        let kinds = [
            "struct",
            "enum",
            "trait",
            "fn",
            "const",
            "static",
            "type",
            "union",
            "macro_rules",
        ];
        let mut source = Self {
            defined: BTreeSet::new(),
            exported: BTreeMap::new(),
            used: Vec::new(),
        };
        let mut at = 0;
        while at < tokens.len() {
            let token = tokens[at].as_str();
            if kinds.contains(&token) {
                let name = tokens[at + 1..].iter().find(|next| *next != "!");
                source.defined.extend(name.cloned());
            }
            if token == "use" {
                let mut paths = Vec::new();
                let is_exported = tokens[..at]
                    .last()
                    .is_some_and(|last| last == "pub" || last == ")");
                at = imports(&tokens, at + 1, &[], &mut paths);
                for path in paths {
                    match (is_exported, path.last()) {
                        (true, Some(name)) => drop(source.exported.insert(name.clone(), path)),
                        _ => source.used.push(path),
                    }
                }
                continue;
            }
            let begins = tokens.get(at + 1).is_some_and(|next| next == "::")
                && (at == 0 || tokens[at - 1] != "::");
            if begins {
                let mut path = vec![token.to_owned()];
                while tokens.get(at + 1).is_some_and(|next| next == "::") && at + 2 < tokens.len() {
                    path.push(tokens[at + 2].clone());
                    at += 2;
                }
                source.used.push(path);
            }
            at += 1;
        }
        source
    }
}

/// The file of a crate that defines what a path of another one means; `None` for names that are not of the crate.
fn resolve(
    all: &BTreeMap<Module, Source>,
    from: &Module,
    path: &[String],
    depth: u32,
) -> Option<Module> {
    let mut path = path;
    let mut module = from.clone();
    match path.first()?.as_str() {
        "crate" => module.clear(),
        "self" => {}
        "super" => {
            module.pop();
            while path.get(1).is_some_and(|next| next == "super") {
                module.pop();
                path = &path[1..];
            }
        }
        name => {
            let child = [from.as_slice(), &[name.to_owned()]].concat();
            if !all.contains_key(&child) {
                return None;
            }
            module = child;
        }
    }
    path = &path[1..];
    while let Some(name) = path.first() {
        let child = [module.as_slice(), std::slice::from_ref(name)].concat();
        if !all.contains_key(&child) {
            break;
        }
        module = child;
        path = &path[1..];
    }
    let source = all.get(&module)?;
    let Some(name) = path.first() else {
        return Some(module);
    };
    if source.defined.contains(name) || name == "*" {
        return Some(module);
    }
    let exported = source.exported.get(name).filter(|_| depth < 6)?;
    resolve(all, &module, exported, depth + 1)
}

/// The circles of a crate: sets of files each of which reaches all others.
fn circles(directory: &str) -> BTreeSet<Vec<String>> {
    let src = format!("{directory}/src/");
    let mut all = BTreeMap::new();
    for file in files("rs") {
        let Some(name) = file
            .strip_prefix(&src)
            .and_then(|name| name.strip_suffix(".rs"))
        else {
            continue;
        };
        if name.contains("test") || name.starts_with("bin/") {
            continue;
        }
        let mut module: Module = name.split('/').map(str::to_owned).collect();
        if module.last().is_some_and(|last| last == "mod") || ["lib", "main"].contains(&name) {
            module.pop();
        }
        all.insert(module, Source::parse(&read(&file)));
    }
    assert!(!all.is_empty(), "{directory} has no files");
    let mut reached: BTreeMap<&Module, BTreeSet<Module>> = BTreeMap::new();
    for (module, source) in &all {
        let used = source
            .used
            .iter()
            .filter_map(|path| resolve(&all, module, path, 0));
        reached.insert(module, used.filter(|other| other != module).collect());
    }
    loop {
        let before: usize = reached.values().map(BTreeSet::len).sum();
        for module in all.keys() {
            let further: BTreeSet<_> = reached[module]
                .iter()
                .flat_map(|other| reached[other].clone())
                .collect();
            reached.entry(module).or_default().extend(further);
        }
        if reached.values().map(BTreeSet::len).sum::<usize>() == before {
            break;
        }
    }
    let name = |module: &Module| match module.is_empty() {
        true => "lib".to_owned(),
        false => module.join("::"),
    };
    let in_circle = all
        .keys()
        .filter(|module| reached[*module].contains(*module));
    in_circle
        .map(|module| {
            let with = reached[module]
                .iter()
                .filter(|other| reached[*other].contains(module));
            with.map(name).collect()
        })
        .collect()
}

#[test]
fn files_use_each_other_only_in_circles_that_are_meant() {
    let crates: BTreeSet<_> = MEANT.iter().map(|(name, ..)| *name).collect();
    let others = ["agent/protocol", "agent/rootfs", "runtime/shim"];
    let mut wrong = Vec::new();
    for name in crates.iter().chain(&others) {
        let meant = MEANT.iter().filter(|(of, ..)| of == name);
        let meant: BTreeSet<Vec<String>> = meant
            .map(|(_, files, _)| files.iter().map(|file| (*file).to_owned()).collect())
            .collect();
        let found = circles(name);
        wrong.extend(
            found
                .difference(&meant)
                .map(|files| format!("{name}: {files:?} is not meant")),
        );
        wrong.extend(
            meant
                .difference(&found)
                .map(|files| format!("{name}: {files:?} is none")),
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn imports_are_read() {
    let source = Source::parse(
        "use crate::{a::{self, B as C}, d};\npub(crate) use super::e::F;\nstruct G(H); // use crate::x;\nfn i() { j::k(\"crate::y\") }",
    );
    let used: Vec<_> = source.used.iter().map(|path| path.join("::")).collect();
    assert_eq!(used, ["crate::a", "crate::a::B", "crate::d", "j::k"]);
    assert_eq!(source.exported["F"], ["super", "e", "F"]);
    assert!(source.defined.contains("G") && source.defined.contains("i"));
}
