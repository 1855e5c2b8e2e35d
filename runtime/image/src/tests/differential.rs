//! Randomly generated stacks of layers, unpacked by Koya and by umoci: the trees must be the same.
//!
//! `KOYA_TEST_IMAGES=N` tests N stacks. Past failures are in [`kept`]; a new failure also leaves its seed
//! in `proptest-regressions`, for the time being.

use super::writer::{GNU, Item, Tar, dir, file, hardlink, item, sparse, symlink};
use super::{Layout, OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, gzip, snapshot, unpack};
use proptest::prelude::*;
use proptest::test_runner::{FileFailurePersistence, TestCaseError, TestRunner};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

/// Minimum number of stacks with each feature.
const EACH: u32 = 50;
/// Number of stacks of a short run.
const SHORT: u32 = 600;

/// Features of stacks, each of them a source of bugs in other implementations.
const FEATURES: [&str; 38] = [
    "directory",
    "file",
    "symbolic link",
    "hard link in the layer",
    "hard link to a lower layer",
    "hard link to a symbolic link",
    "whiteout before",
    "whiteout after",
    "whiteout of nothing",
    "whiteout that is a hard link",
    "opaque mark before",
    "opaque mark after",
    "opaque mark with implied directories",
    "absolute name",
    "dotted name",
    "name that leads up",
    "root entry",
    "duplicate entry",
    "directory over symbolic link",
    "symbolic link over directory",
    "directory over file",
    "file over directory",
    "through a symbolic link",
    "missing parent directories",
    "device node",
    "FIFO",
    "set-ID and sticky bits",
    "user attribute with line ends",
    "capability",
    "owner in a pax record",
    "owner in base 256",
    "time with nanoseconds",
    "long name in pax",
    "long name of GNU",
    "sparse file",
    "attributes of a directory replaced",
    "empty layer",
    "compressed layer",
];

/// One step: a feature, and numbers that choose its parameters.
type Step = (usize, u16, u16);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Dir,
    File,
    Link,
}

/// An approximate model of the existing names: links in paths are not followed.
#[derive(Default)]
struct Model {
    names: BTreeMap<String, Kind>,
    /// Names of the current layer.
    made: BTreeSet<String>,
    features: BTreeSet<usize>,
    tar: Tar,
}

impl Model {
    fn pick(&self, number: u16, fits: impl Fn(&str, Kind) -> bool) -> Option<String> {
        let all: Vec<_> = self
            .names
            .iter()
            .filter(|(name, kind)| fits(name, **kind))
            .collect();
        let at = usize::from(number) % all.len().max(1);
        all.get(at).map(|(name, _)| (*name).clone())
    }

    /// Chooses a parent directory for a new entry.
    fn parent(&self, number: u16) -> String {
        let found = self.pick(number, |_, kind| kind == Kind::Dir);
        match number % 4 {
            0 => String::new(),
            _ => found.map(|name| name + "/").unwrap_or_default(),
        }
    }

    fn fresh(&self, a: u16, b: u16) -> String {
        let names = ["a", "b", "c", "f", "g", "usr", "lib", "a name"];
        format!("{}{}", self.parent(a), names[usize::from(b) % names.len()])
    }

    fn remove(&mut self, name: &str) {
        let below = format!("{name}/");
        self.names
            .retain(|other, _| other != name && !other.starts_with(&below));
        self.made
            .retain(|other| other != name && !other.starts_with(&below));
    }

    fn add(&mut self, name: &str, kind: Kind, mut item: Item) {
        let is_same = kind == Kind::Dir && self.names.get(name) == Some(&Kind::Dir);
        if !is_same {
            self.remove(name);
        }
        let mut at = 0;
        while let Some(next) = name[at..].find('/') {
            let parent = name[..at + next].to_owned();
            self.names.entry(parent.clone()).or_insert(Kind::Dir);
            self.made.insert(parent);
            at += next + 1;
        }
        self.names.insert(name.into(), kind);
        self.made.insert(name.into());
        item.mtime = 1_500_000_000 + self.tar.0.len() as u64;
        self.tar.add(&item);
    }

    fn whiteout(&mut self, name: &str) {
        let (parent, last) = name.rsplit_once('/').map_or(("", name), |(p, l)| (p, l));
        let slash = if parent.is_empty() { "" } else { "/" };
        self.tar
            .add(&file(&format!("{parent}{slash}.wh.{last}"), ""));
        self.forget(name);
    }

    /// Removes names of lower layers under this name.
    fn forget(&mut self, name: &str) {
        let below = format!("{name}/");
        let made = self.made.clone();
        self.names
            .retain(|other, _| made.contains(other) || other != name && !other.starts_with(&below));
    }

    fn opaque(&mut self, name: &str) {
        self.tar.add(&file(&format!("{name}/.wh..wh..opq"), ""));
        let below = format!("{name}/");
        let made = self.made.clone();
        self.names
            .retain(|other, _| made.contains(other) || !other.starts_with(&below));
    }

    /// Adds the feature; `None` if that is not possible.
    fn step(&mut self, (feature, a, b): Step) -> Option<()> {
        let fresh = self.fresh(a, b);
        let text = format!("{a} {b}");
        let plain = file(&fresh, &text);
        match FEATURES[feature] {
            "directory" => {
                let item = Item {
                    mode: 0o700 | (u32::from(b) % 0o100),
                    ..dir(&format!("{fresh}/"))
                };
                self.add(&fresh, Kind::Dir, item);
            }
            "file" => self.add(&fresh, Kind::File, plain),
            "symbolic link" => {
                let targets = ["/", "..", "a", "../b", "/usr/lib", "nowhere", "./a/../c"];
                let item = symlink(&fresh, targets[usize::from(b) % targets.len()]);
                self.add(&fresh, Kind::Link, item);
            }
            name if name.starts_with("hard link") => self.hard_link(name, &fresh, a)?,
            name if name.starts_with("whiteout") => self.hide(name, &fresh, a, plain)?,
            name if name.starts_with("opaque") => self.hide_all(name, a, b)?,
            name if name.contains("over") => self.replace(name, a, b)?,
            "absolute name" => self.add(&fresh, Kind::File, file(&format!("//{fresh}"), &text)),
            "dotted name" => self.add(&fresh, Kind::File, file(&format!("./{fresh}"), &text)),
            "name that leads up" => self.add(
                &fresh,
                Kind::File,
                file(&format!("../x/../../{fresh}"), &text),
            ),
            "root entry" => {
                let name = ["./", "/", "."][usize::from(b) % 3];
                self.tar.add(
                    &Item {
                        mode: 0o711,
                        ..dir(name)
                    }
                    .pax("mtime", "1234567890.5"),
                );
            }
            "duplicate entry" => {
                self.add(&fresh, Kind::File, plain.clone());
                self.add(&fresh, Kind::File, file(&fresh, "again"));
            }
            "through a symbolic link" => {
                let link = self.pick(a, |_, kind| kind == Kind::Link)?;
                let name = format!("{link}/through");
                self.tar.add(&file(&name, &text));
            }
            "missing parent directories" => {
                let name = format!("{}new{}/deep/{b}", self.parent(a), b % 3);
                self.add(&name, Kind::File, file(&name, &text));
            }
            "attributes of a directory replaced" => {
                let name = self.pick(a, |_, kind| kind == Kind::Dir)?;
                let item = Item {
                    mode: 0o750,
                    ..dir(&name)
                };
                self.add(
                    &name,
                    Kind::Dir,
                    item.clone().pax("SCHILY.xattr.user.first", "1"),
                );
                self.add(&name, Kind::Dir, item.pax("SCHILY.xattr.user.second", "2"));
            }
            _ => self.special(FEATURES[feature], &fresh, b, plain)?,
        }
        self.features.insert(feature);
        Some(())
    }

    fn hard_link(&mut self, feature: &str, fresh: &str, a: u16) -> Option<()> {
        let made = self.made.clone();
        let target = self.pick(a, |name, kind| {
            let outside = name != fresh && !name.starts_with(&format!("{fresh}/"));
            let of_kind = match feature {
                "hard link to a symbolic link" => kind == Kind::Link,
                "hard link in the layer" => kind == Kind::File && made.contains(name),
                _ => kind == Kind::File && !made.contains(name),
            };
            of_kind && outside
        })?;
        let kind = self.names[&target];
        self.add(fresh, kind, hardlink(fresh, &target));
        Some(())
    }

    fn hide(&mut self, feature: &str, fresh: &str, a: u16, plain: Item) -> Option<()> {
        let made = self.made.clone();
        let lower = self.pick(a, |name, _| !made.contains(name));
        match feature {
            "whiteout before" => self.whiteout(&lower?),
            "whiteout after" => {
                let name = lower.unwrap_or_else(|| fresh.to_owned());
                let inside = format!("{name}/kept");
                match self.names.get(&name) {
                    Some(Kind::Dir) => self.add(&inside, Kind::File, file(&inside, "kept")),
                    _ => self.add(
                        &name,
                        Kind::File,
                        Item {
                            name: name.clone().into(),
                            ..plain
                        },
                    ),
                }
                self.whiteout(&name);
            }
            "whiteout of nothing" => self.whiteout(&format!("{fresh}-not-there")),
            _ => {
                let target = self.pick(a, |_, kind| kind == Kind::File)?;
                let (parent, last) = target.rsplit_once('/').unwrap_or(("", &target));
                let slash = if parent.is_empty() { "" } else { "/" };
                self.tar
                    .add(&hardlink(&format!("{parent}{slash}.wh.{last}"), "none"));
                self.forget(&target);
            }
        }
        Some(())
    }

    fn hide_all(&mut self, feature: &str, a: u16, b: u16) -> Option<()> {
        let name = self.pick(a, |_, kind| kind == Kind::Dir)?;
        let inside = format!("{name}/{}", ["x", "y/z", "a"][usize::from(b) % 3]);
        match feature {
            "opaque mark before" => {
                self.add(&name, Kind::Dir, dir(&name));
                self.opaque(&name);
                self.add(&inside, Kind::File, file(&inside, "new"));
            }
            "opaque mark after" => {
                self.add(&name, Kind::Dir, dir(&name));
                self.add(&inside, Kind::File, file(&inside, "new"));
                self.opaque(&name);
            }
            _ => {
                let inside = format!("{name}/implied/{b}");
                self.add(&inside, Kind::File, file(&inside, "new"));
                self.opaque(&name);
            }
        }
        Some(())
    }

    fn replace(&mut self, feature: &str, a: u16, b: u16) -> Option<()> {
        let (from, to) = match feature {
            "directory over symbolic link" => (Kind::Link, Kind::Dir),
            "symbolic link over directory" => (Kind::Dir, Kind::Link),
            "directory over file" => (Kind::File, Kind::Dir),
            _ => (Kind::Dir, Kind::File),
        };
        let name = self.pick(a, |_, kind| kind == from)?;
        let item = match to {
            Kind::Dir => dir(&name),
            Kind::File => file(&name, "now a file"),
            Kind::Link => symlink(&name, ["/usr", "b", "."][usize::from(b) % 3]),
        };
        self.add(&name, to, item);
        Some(())
    }

    /// Files with special properties.
    fn special(&mut self, feature: &str, fresh: &str, b: u16, plain: Item) -> Option<()> {
        let long = format!("{fresh}-{}", "long".repeat(30));
        let item = match feature {
            "device node" => Item {
                device: (u32::from(b) % 300, u32::from(b) * 7),
                mode: 0o620,
                ..item(if b.is_multiple_of(2) { b'3' } else { b'4' }, fresh)
            },
            "FIFO" => item(b'6', fresh),
            "set-ID and sticky bits" => Item {
                mode: ((u32::from(b) % 8) << 9) | 0o755,
                uid: 7,
                ..plain
            },
            "user attribute with line ends" => plain
                .pax("SCHILY.xattr.user.n", "a\n12 uid=99\n=\0")
                .pax("uid", "31"),
            "capability" => {
                let value = [
                    1, 0, 0, 2, b'\n', 0, 0, 0, b as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                ];
                plain.pax("SCHILY.xattr.security.capability", value)
            }
            "owner in a pax record" => plain.pax("uid", "4294967294").pax("gid", "3000000"),
            "owner in base 256" => Item {
                uid: 4_000_000_000,
                gid: 1 << 22,
                ..plain
            },
            "time with nanoseconds" => plain.pax(
                "mtime",
                ["1.000000001", "1600000000.123456789", "-5.25"][usize::from(b) % 3],
            ),
            "long name in pax" => {
                self.add(&long, Kind::File, file(&long, "long"));
                return Some(());
            }
            "long name of GNU" => {
                self.add(
                    &long,
                    Kind::File,
                    Item {
                        magic: GNU,
                        ..file(&long, "long")
                    },
                );
                return Some(());
            }
            "sparse file" => {
                self.add(fresh, Kind::File, plain);
                // umoci does not support the old form.
                let form = ["0.0", "0.1", "1.0"][usize::from(b) % 3];
                let parts: [(u64, &[u8]); 3] = [(0, b"start"), (5000, b"middle"), (70_000, b"end")];
                sparse(&mut self.tar, form, fresh, 100_000 + u64::from(b), &parts);
                return Some(());
            }
            _ => return None,
        };
        self.add(fresh, Kind::File, item);
        Some(())
    }
}

/// A layer as stored, and its decompressed contents.
type Stored = (Vec<u8>, Vec<u8>);

/// The layers of a stack, and its features.
fn build(steps: &[(bool, Vec<Step>)]) -> (Vec<Stored>, BTreeSet<usize>) {
    let place = |name| FEATURES.iter().position(|f| *f == name).unwrap();
    let mut model = Model::default();
    let mut layers = Vec::new();
    for (compress, steps) in steps {
        model.made.clear();
        for step in steps {
            model.step(*step);
        }
        let is_empty = model.tar.0.is_empty();
        let tar = std::mem::take(&mut model.tar).end();
        if is_empty {
            model.features.insert(place("empty layer"));
        }
        let stored = match compress {
            true => gzip(&tar),
            false => tar.clone(),
        };
        if *compress {
            model.features.insert(place("compressed layer"));
        }
        layers.push((stored, tar));
    }
    (layers, model.features)
}

/// Checks that both trees are the same, unless umoci refuses the image.
fn compare(steps: &[(bool, Vec<Step>)], counts: &RefCell<Counts>) -> Result<(), TestCaseError> {
    let (layers, features) = build(steps);
    let layout = Layout::new();
    let kinds = [OCI_MANIFEST, OCI_CONFIG, OCI_LAYER];
    let gzipped = format!("{OCI_LAYER}+gzip");
    let layers: Vec<_> = layers
        .iter()
        .map(|(stored, tar)| (stored.clone(), tar.as_slice()))
        .collect();
    let mut manifest = layout.manifest(kinds, &layers, serde_json::json!({}));
    // umoci relies on the media type.
    let path = layout.blob_path(manifest["digest"].as_str().unwrap());
    let mut document: serde_json::Value =
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    for (layer, (compress, _)) in document["layers"]
        .as_array_mut()
        .unwrap()
        .iter_mut()
        .zip(steps)
    {
        if *compress {
            layer["mediaType"] = gzipped.clone().into();
        }
    }
    manifest = layout.blob(
        manifest["mediaType"].as_str().unwrap(),
        document.to_string().as_bytes(),
    );
    manifest["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": "t"});
    layout.index(&[manifest]);

    let began = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs() as i64;
    let theirs = tempfile::tempdir().unwrap();
    let root = theirs.path().join("root");
    let mut umoci = Command::new("umoci");
    umoci
        .args(["raw", "unpack", "--image"])
        .arg(format!("{}:t", layout.path().display()))
        .arg(&root);
    let output = umoci.output().unwrap();
    let ours = unpack(layout.path());
    let mut counts = counts.borrow_mut();
    if !output.status.success() {
        counts.refused += 1;
        return Ok(());
    }
    let (ours, _) =
        ours.map_err(|e| TestCaseError::fail(format!("umoci unpacks it, and here: {e}")))?;
    let (mut ours, mut theirs) = (snapshot::of(ours.path()), snapshot::of(&root));
    for (path, told) in &mut theirs {
        // Implied directories have the current time with umoci, and 0 here.
        if told.mtime.0 >= began - 1 {
            told.mtime = (0, 0);
            if let Some(own) = ours.get_mut(path) {
                prop_assert!(
                    own.mtime.0 < began - 1,
                    "{} has the time of day",
                    path.display()
                );
                own.mtime = (0, 0);
            }
        }
    }
    for path in ours.keys().chain(theirs.keys()) {
        prop_assert_eq!(ours.get(path), theirs.get(path), "{}", path.display());
    }
    counts.compared += 1;
    for feature in features {
        *counts.features.entry(FEATURES[feature]).or_default() += 1;
    }
    Ok(())
}

/// Stacks that were unpacked differently in the past. Seeds of proptest would change their meaning with the next feature.
fn kept() -> Vec<Vec<(bool, Vec<Step>)>> {
    let steps = |steps: &[(&str, u16, u16)]| {
        let place = |name| FEATURES.iter().position(|f| *f == name).unwrap();
        let steps = steps.iter().map(|(name, a, b)| (place(*name), *a, *b));
        (false, steps.collect::<Vec<_>>())
    };
    vec![
        // A link whose path leads through a device node and back out of it.
        vec![
            steps(&[("directory", 0, 36835), ("device node", 0, 0)]),
            steps(&[
                ("symbolic link", 21216, 23211),
                ("hard link to a symbolic link", 3865, 6558),
                ("missing parent directories", 0, 0),
                ("symbolic link", 1, 0),
            ]),
            steps(&[("through a symbolic link", 51475, 0)]),
        ],
        vec![
            steps(&[
                ("device node", 0, 0),
                ("directory", 0, 2),
                ("symbolic link", 0, 27),
            ]),
            steps(&[("through a symbolic link", 0, 0)]),
        ],
    ]
}

#[derive(Debug, Default)]
struct Counts {
    compared: u32,
    refused: u32,
    features: BTreeMap<&'static str, u32>,
}

#[test]
fn stacks_of_layers_are_what_umoci_makes_of_them() {
    let there = Command::new("umoci").arg("--version").output().is_ok();
    if !there || !rustix::process::geteuid().is_root() {
        println!("not run: this needs umoci (a package of Debian) and root");
        return;
    }
    let wanted = std::env::var("KOYA_TEST_IMAGES")
        .ok()
        .and_then(|n| n.parse().ok());
    let mut config = ProptestConfig::with_cases(wanted.unwrap_or(SHORT));
    config.failure_persistence = Some(Box::new(FileFailurePersistence::Direct(
        "proptest-regressions/layers.txt",
    )));
    let step = (0..FEATURES.len(), any::<u16>(), any::<u16>());
    let first = proptest::collection::vec(step.clone(), 14..24);
    let more = prop_oneof![
        1 => Just(Vec::new()),
        9 => proptest::collection::vec(step, 1..22),
    ];
    let stack = (
        (any::<bool>(), first),
        proptest::collection::vec((any::<bool>(), more), 2..4),
    );
    let counts = RefCell::new(Counts::default());
    for steps in kept() {
        compare(&steps, &counts).unwrap_or_else(|e| panic!("a stack that was kept: {e}"));
    }
    let mut runner = TestRunner::new(config);
    let run = runner.run(&stack, |(first, more)| {
        compare(&[vec![first], more].concat(), &counts)
    });
    let counts = counts.into_inner();
    println!(
        "{} stacks compared, {} refused by umoci",
        counts.compared, counts.refused
    );
    for (feature, count) in &counts.features {
        println!("{count:6} {feature}");
    }
    if let Err(error) = run {
        panic!("{error}");
    }
    for feature in FEATURES {
        let count = counts.features.get(feature).copied().unwrap_or(0);
        assert!(count >= EACH, "only {count} stacks have: {feature}");
    }
}
