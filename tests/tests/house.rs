//! The rules of the house, as tests: who may depend on whom, where `unsafe` may stand, and that
//! documents name what exists.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests is a folder of the checkout")
        .to_path_buf()
}

/// Every file of the repository with this extension, by its path from the root.
fn files(extension: &str) -> Vec<String> {
    fn walk(dir: &Path, extension: &str, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).expect("a readable folder").flatten() {
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

/// The crates of ours that a manifest names outside its dev-dependencies.
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
        ("devices/Cargo.toml", &[]),
        ("agent/protocol/Cargo.toml", &[]),
        ("vmm/Cargo.toml", &["koya-devices"]),
        ("agent/Cargo.toml", &["koya-protocol"]),
        ("runtime/image/Cargo.toml", &[]),
        (
            "runtime/Cargo.toml",
            &["koya-image", "koya-vmm", "koya-protocol"],
        ),
        ("runtime/shim/Cargo.toml", &["koya"]),
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
fn unsafe_stands_only_where_it_is_named() {
    let allowed = ["devices/src/sys/", "vmm/src/kvm/", "agent/src/sys.rs"];
    // Put together here, so that this file does not match itself.
    let word = ["un", "safe"].concat();
    for file in files("rs") {
        if allowed.iter().any(|a| file.starts_with(a)) {
            continue;
        }
        for (number, line) in read(&file).lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            for form in [" {", " fn", " impl", " extern"] {
                assert!(
                    !code.contains(&format!("{word}{form}")),
                    "{file}:{}: {line}",
                    number + 1
                );
            }
        }
    }
}

#[test]
fn every_unsafe_block_says_why_it_is_sound() {
    let word = ["un", "safe {"].concat();
    for file in files("rs") {
        let text = read(&file);
        let lines: Vec<&str> = text.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            if line
                .split("//")
                .next()
                .is_some_and(|code| code.contains(&word))
            {
                let before = &lines[number.saturating_sub(10)..=number];
                assert!(
                    before.iter().any(|l| l.contains("SAFETY:")),
                    "{file}:{}: no SAFETY comment",
                    number + 1
                );
            }
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
        assert!(lines <= 700, "{file} has {lines} lines");
    }
}

#[test]
fn architecture_is_asked_for_in_one_place() {
    let word = ["target", "_arch"].concat();
    let allowed = ["vmm/src/arch/mod.rs", "vmm/src/kvm/"];
    for file in files("rs") {
        // Tests of one architecture may say so.
        let code = read(&file);
        let code = code.split("#[cfg(test)]").next().unwrap_or_default();
        let named = code
            .lines()
            .any(|l| l.contains(&word) && !l.trim_start().starts_with("//"));
        assert!(
            !named || allowed.iter().any(|a| file.starts_with(a)) || file.contains("/tests/"),
            "{file} asks for the architecture"
        );
    }
}
