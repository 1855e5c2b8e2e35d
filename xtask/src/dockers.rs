//! The versions of Docker that tests run with, unpacked from Debian's suites.

use crate::arch::Arch;
use crate::{apt, cache, setup};
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;

/// A tested version of Docker, from a suite of Debian.
struct Docker {
    version: &'static str,
    suite: &'static str,
    /// Those beside `docker.io` and `containerd`: the client, the init program, and Compose.
    packages: &'static [&'static str],
}

/// The first of them is that of benchmarks, too.
const DOCKERS: [Docker; 3] = [
    Docker {
        version: "26",
        suite: "trixie",
        packages: &["docker-cli", "tini", "docker-compose"],
    },
    Docker {
        version: "28",
        suite: "forky",
        packages: &["docker-cli", "tini-static", "docker-compose"],
    },
    // Its client is in docker.io, and its Compose is the first one, in Python.
    Docker {
        version: "20",
        suite: apt::RELEASE,
        packages: &[
            "tini",
            "docker-compose",
            "python3-attr",
            "python3-certifi",
            "python3-chardet",
            "python3-charset-normalizer",
            "python3-distro",
            "python3-docker",
            "python3-dockerpty",
            "python3-docopt",
            "python3-dotenv",
            "python3-idna",
            "python3-jsonschema",
            "python3-packaging",
            "python3-pkg-resources",
            "python3-pyrsistent",
            "python3-requests",
            "python3-six",
            "python3-texttable",
            "python3-urllib3",
            "python3-websocket",
            "python3-yaml",
        ],
    },
];

/// Selects versions of Docker: `first`, `all`, or versions separated by commas. Without it, these tests are left out, since
/// they take minutes.
const WHICH_DOCKERS: &str = "KOYA_TEST_DOCKERS";

/// The directories of the selected versions, separated by colons.
pub(crate) fn selected_for(arch: Arch) -> Result<OsString> {
    let which = std::env::var(WHICH_DOCKERS).unwrap_or_default();
    let directories = selected(&which)?.into_iter();
    let directories = directories.map(|docker| docker.directory(arch));
    Ok(std::env::join_paths(
        directories.collect::<Result<Vec<_>>>()?,
    )?)
}

fn selected(which: &str) -> Result<Vec<&'static Docker>> {
    match which {
        "" => Ok(Vec::new()),
        "first" => Ok(vec![&DOCKERS[0]]),
        "all" => Ok(DOCKERS.iter().collect()),
        versions => versions
            .split(',')
            .map(|version| {
                let mut all = DOCKERS.iter();
                all.find(|docker| docker.version == version)
                    .with_context(|| {
                        let known = DOCKERS.each_ref().map(|docker| docker.version);
                        format!(
                            "{WHICH_DOCKERS} is {which:?}, not `first`, `all` or some of {}",
                            known.join(",")
                        )
                    })
            })
            .collect(),
    }
}

/// The directory of the first one.
pub(crate) fn first() -> Result<PathBuf> {
    DOCKERS[0].directory(Arch::of_this_machine())
}

/// File of a directory with its version, by which tests choose.
const VERSION: &str = "version";

impl Docker {
    /// Its directory, unpacked once. Its runc is Debian 12's, which fits the machine's C library.
    fn directory(&self, arch: Arch) -> Result<PathBuf> {
        let suite = self.suite;
        if suite == apt::RELEASE {
            setup::ensure_these(&[
                ("libdevmapper1.02.1", "a library of Docker 20.10"),
                ("python3-distutils", "runs docker-compose 1"),
            ])?;
        }
        let packages = [&["docker.io", "containerd"], self.packages].concat();
        let key = arch.key(&[&[suite, "runc"], &packages[..]].concat());
        cache::ensure("docker", &key, |dir| {
            apt::unpack_for(arch, suite, &packages, dir)?;
            apt::unpack_for(arch, apt::RELEASE, &["runc"], dir)?;
            Ok(fs::write(dir.join(VERSION), self.version)?)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_selected_by_name() {
        let versions = |which| -> Vec<_> {
            let all = selected(which).unwrap();
            all.iter().map(|docker| docker.version).collect()
        };
        assert!(versions("").is_empty());
        assert_eq!(versions("first"), ["26"]);
        assert_eq!(versions("all"), ["26", "28", "20"]);
        assert_eq!(versions("20,28"), ["20", "28"]);
        let error = selected("20,21").err().unwrap().to_string();
        let expected = "KOYA_TEST_DOCKERS is \"20,21\", not `first`, `all` or some of 26,28,20";
        assert_eq!(error, expected);
    }
}
