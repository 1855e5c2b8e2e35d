//! Rules for dependencies: `deny.toml`, checked without an additional program.
//!
//! The file format is cargo-deny's. This checks everything that needs no database of advisories: licences, sources, and
//! duplicate versions of a crate.

use crate::proc;
use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use spdx::{Expression, Licensee, ParseMode};
use std::collections::BTreeMap;

/// The fields used of `deny.toml`.
#[derive(Deserialize)]
struct Rules {
    graph: Graph,
    licenses: Licenses,
    sources: Sources,
    bans: Bans,
}

#[derive(Deserialize)]
struct Graph {
    targets: Vec<String>,
}

#[derive(Deserialize)]
struct Licenses {
    allow: Vec<String>,
    exceptions: Vec<Exception>,
    clarify: Vec<Clarification>,
}

/// Additional licences for one crate.
#[derive(Deserialize)]
struct Exception {
    #[serde(rename = "crate")]
    name: String,
    allow: Vec<String>,
}

/// The licence of a crate whose manifest has none.
#[derive(Deserialize)]
struct Clarification {
    #[serde(rename = "crate")]
    name: String,
    expression: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Sources {
    allow_registry: Vec<String>,
}

#[derive(Deserialize)]
struct Bans {
    skip: Vec<Skip>,
}

/// An allowed duplicate version.
#[derive(Deserialize)]
struct Skip {
    /// `NAME@VERSION`
    #[serde(rename = "crate")]
    package: String,
}

/// The fields used of `cargo metadata`.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    /// `None` for a crate of this workspace.
    source: Option<String>,
}

/// Checks all dependencies of the workspace for its targets.
///
/// # Errors
/// One line for each violation.
pub(crate) fn check() -> Result<()> {
    let text = std::fs::read_to_string(proc::checkout().join("deny.toml"));
    let rules: Rules = toml::from_str(&text.context("cannot read deny.toml")?)?;
    let mut cargo = proc::cargo();
    cargo.args(["metadata", "--format-version", "1", "--locked"]);
    for target in &rules.graph.targets {
        cargo.args(["--filter-platform", target]);
    }
    let metadata: Metadata = serde_json::from_str(&proc::output(&mut cargo)?)?;
    let packages = &metadata.packages;
    let mut problems = rules.sources.problems(packages);
    problems.extend(rules.bans.problems(packages));
    problems.extend(rules.licenses.problems(packages)?);
    if !problems.is_empty() {
        bail!("deny.toml does not allow:\n  {}", problems.join("\n  "));
    }
    Ok(())
}

impl Licenses {
    fn problems(&self, packages: &[Package]) -> Result<Vec<String>> {
        let mut problems = Vec::new();
        for package in packages {
            let Package { name, version, .. } = package;
            let clarified = self.clarify.iter().find(|c| c.name == *name);
            let text = clarified
                .map(|c| &c.expression)
                .or(package.license.as_ref());
            let Some(text) = text else {
                problems.push(format!("{name} {version}: its manifest names no licence"));
                continue;
            };
            match Expression::parse_mode(text, ParseMode::LAX) {
                Ok(expression) => {
                    let allowed = self.allowed(name)?;
                    if !expression.evaluate(|one| allowed.iter().any(|l| l.satisfies(one))) {
                        problems.push(format!("{name} {version}: the licence {text}"));
                    }
                }
                Err(_) => problems.push(format!("{name} {version}: unknown licence {text:?}")),
            }
        }
        Ok(problems)
    }

    /// The licences that this crate may have.
    fn allowed(&self, name: &str) -> Result<Vec<Licensee>> {
        let exceptions = self.exceptions.iter().filter(|e| e.name == name);
        let all = self.allow.iter().chain(exceptions.flat_map(|e| &e.allow));
        all.map(|text| Licensee::parse(text).map_err(|e| anyhow!("deny.toml: {e}")))
            .collect()
    }
}

impl Sources {
    fn problems(&self, packages: &[Package]) -> Vec<String> {
        let is_allowed = |source: &String| {
            let registry = source.strip_prefix("registry+");
            registry.is_some_and(|url| self.allow_registry.iter().any(|allowed| allowed == url))
        };
        let foreign = packages
            .iter()
            .filter_map(|p| Some((p, p.source.as_ref()?)));
        foreign
            .filter(|(_, source)| !is_allowed(source))
            .map(|(p, source)| format!("{} {}: the source {source}", p.name, p.version))
            .collect()
    }
}

impl Bans {
    fn problems(&self, packages: &[Package]) -> Vec<String> {
        let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        let mut skipped = Vec::new();
        for package in packages {
            let id = format!("{}@{}", package.name, package.version);
            match self.skip.iter().any(|skip| skip.package == id) {
                true => skipped.push(id),
                false => versions
                    .entry(&package.name)
                    .or_default()
                    .push(&package.version),
            }
        }
        let several = versions.iter().filter(|(_, versions)| versions.len() > 1);
        let several = several.map(|(name, v)| format!("{name}: the versions {}", v.join(" and ")));
        let unused = self.skip.iter().filter(|s| !skipped.contains(&s.package));
        let unused = unused.map(|s| format!("{}: skipped, but not used any more", s.package));
        several.chain(unused).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: &str = "https://github.com/rust-lang/crates.io-index";

    fn package(name: &str, version: &str, license: Option<&str>) -> Package {
        Package {
            name: name.into(),
            version: version.into(),
            license: license.map(str::to_owned),
            source: Some(format!("registry+{INDEX}")),
        }
    }

    #[test]
    fn each_licence_is_an_allowed_one() {
        let licenses = Licenses {
            allow: vec!["MIT".into(), "Apache-2.0".into()],
            exceptions: vec![Exception {
                name: "excepted".into(),
                allow: vec!["MPL-2.0".into()],
            }],
            clarify: vec![Clarification {
                name: "clarified".into(),
                expression: "MIT".into(),
            }],
        };
        let allowed = |name: &str, license: Option<&str>| {
            let problems = licenses.problems(&[package(name, "1.0.0", license)]);
            problems.unwrap().is_empty()
        };
        assert!(allowed("one", Some("MIT/Apache-2.0")));
        assert!(allowed("one", Some("GPL-3.0-only OR MIT")));
        assert!(!allowed("one", Some("GPL-3.0-only AND MIT")));
        assert!(!allowed("one", Some("MIT WITH LLVM-exception")));
        assert!(!allowed("one", Some("no licence")));
        assert!(!allowed("one", None));
        assert!(allowed("clarified", None));
        assert!(allowed("excepted", Some("MPL-2.0")) && !allowed("one", Some("MPL-2.0")));
    }

    #[test]
    fn each_source_is_an_allowed_one() {
        let sources = Sources {
            allow_registry: vec![INDEX.into()],
        };
        let mut one = package("one", "1.0.0", None);
        assert!(
            sources
                .problems(&[package("one", "1.0.0", None)])
                .is_empty()
        );
        for source in [
            "git+https://example.com/one",
            "registry+https://example.com",
        ] {
            one.source = Some(source.into());
            let problems = sources.problems(std::slice::from_ref(&one));
            assert_eq!(problems, [format!("one 1.0.0: the source {source}")]);
        }
        one.source = None;
        assert!(sources.problems(&[one]).is_empty());
    }

    #[test]
    fn a_crate_has_one_version_but_for_those_that_are_named() {
        let bans = |skip: &[&str]| Bans {
            skip: skip
                .iter()
                .map(|package| Skip {
                    package: (*package).into(),
                })
                .collect(),
        };
        let packages = ["1.0.0", "2.0.0"].map(|version| package("one", version, None));
        assert_eq!(
            bans(&[]).problems(&packages),
            ["one: the versions 1.0.0 and 2.0.0"]
        );
        assert!(bans(&["one@1.0.0"]).problems(&packages).is_empty());
        let problems = bans(&["one@1.0.0"]).problems(&packages[1..]);
        assert_eq!(problems, ["one@1.0.0: skipped, but not used any more"]);
    }
}
