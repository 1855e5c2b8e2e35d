//! Tests that a document names.

use super::{files, read};
use std::collections::BTreeSet;

/// Names of tests are sentences: words with several underscores, after the name of a module.
#[test]
fn tests_that_the_security_page_names_exist() {
    let mut functions = BTreeSet::new();
    for file in files("rs") {
        for line in read(&file).lines() {
            let line = line.trim_start();
            let line = line.strip_prefix("pub(crate) ").unwrap_or(line);
            let name = line
                .strip_prefix("fn ")
                .and_then(|rest| rest.split('(').next());
            functions.extend(name.map(str::to_owned));
        }
    }
    let mut named = 0;
    for (number, line) in read("docs/security.md").lines().enumerate() {
        for word in line.split('`').skip(1).step_by(2) {
            let Some((_, name)) = word.rsplit_once("::") else {
                continue;
            };
            if name.matches('_').count() >= 2 {
                named += 1;
                let line = number + 1;
                assert!(functions.contains(name), "docs/security.md:{line}: {word}");
            }
        }
    }
    assert!(named > 20, "{named}");
}

/// The versions of the crates that read untrusted data are those that are built.
#[test]
fn crates_that_the_security_page_names_have_these_versions() {
    let (page, lock) = (read("docs/security.md"), read("Cargo.lock"));
    let (_, list) = page
        .split_once("Crates that read what a guest wrote")
        .expect("a list of crates");
    let (list, _) = list.split_once("\n### ").expect("a next section");
    let words: Vec<&str> = list
        .split_whitespace()
        .map(|word| word.trim_matches([',', '.', '|']))
        .collect();
    let is_version = |word: &str| {
        word.matches('.').count() == 2 && word.chars().all(|c| c == '.' || c.is_ascii_digit())
    };
    let mut named = 0;
    for pair in words.windows(2).filter(|pair| is_version(pair[1])) {
        named += 1;
        let entry = format!("name = \"{}\"\nversion = \"{}\"\n", pair[0], pair[1]);
        assert!(lock.contains(&entry), "Cargo.lock has no {pair:?}");
    }
    assert!(named > 10, "{named}");
}
