//! Environment variables of processes: `--env` and `--env-file`.

use anyhow::{Context, Result, bail};
use clap::Args;
use std::path::{Path, PathBuf};

#[derive(Args)]
pub(super) struct EnvArgs {
    /// Set an environment variable; without a value, pass on that of the current environment, or remove the variable
    #[arg(long, short, value_name = "K[=V]", value_parser = parse_env)]
    env: Vec<String>,
    /// Read environment variables from a file, each in a line K[=V], with everything after = as its value. Lines that begin
    /// with # are comments. --env overrides them
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
}

impl EnvArgs {
    /// The variables in the order in which they apply: `K=V`, or `K` for one that is to be removed.
    ///
    /// # Errors
    /// If a file can't be read, with the offending line.
    pub(super) fn read(&self) -> Result<Vec<String>> {
        let mut all = Vec::new();
        for path in &self.env_file {
            let text = std::fs::read(path);
            let text = text.with_context(|| format!("cannot read {}", path.display()))?;
            all.extend(parse_file(path, &text)?);
        }
        all.extend(expand_env(&self.env));
        Ok(all)
    }
}

/// The variables of a file in Docker's format: no quotes, no continuation lines. One without a value is taken from the current
/// environment, or left as it is.
fn parse_file(path: &Path, text: &[u8]) -> Result<Vec<String>> {
    // Some editors begin a file with a byte order mark.
    let text = text.strip_prefix("\u{feff}".as_bytes()).unwrap_or(text);
    let text = std::str::from_utf8(text);
    let text = text.with_context(|| format!("{} is not UTF-8", path.display()))?;
    let mut all = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let place = || format!("{}, line {}", path.display(), number + 1);
        let name = line.split('=').next().unwrap_or_default();
        if name.is_empty() {
            bail!("{}: {line:?} has no name", place());
        }
        if name.contains(char::is_whitespace) {
            bail!("{}: the name {name:?} has spaces in it", place());
        }
        if line.contains('=') {
            all.push(line.to_owned());
        } else if std::env::var_os(line).is_some() {
            all.extend(expand_env(&[line.to_owned()]));
        }
    }
    Ok(all)
}

/// `K[=V]`
fn parse_env(text: &str) -> Result<String, String> {
    match text.split('=').next() {
        None | Some("") => Err(format!("{text:?} has no name")),
        Some(_) => Ok(text.to_owned()),
    }
}

/// `K=V` is unchanged; `K` gets the value of the current environment, or is unchanged if it has none. Bytes that are not
/// UTF-8 become U+FFFD, as with Docker: an OCI configuration can't hold them.
fn expand_env(env: &[String]) -> Vec<String> {
    let expand = |entry: &String| match (entry.contains('='), std::env::var_os(entry)) {
        (false, Some(value)) => format!("{entry}={}", value.to_string_lossy()),
        _ => entry.clone(),
    };
    env.iter().map(expand).collect()
}

/// Applies `env` to `base`: the last of several values of a variable counts, and a name without a value removes the
/// variable. Entries without a name are kept, to be refused later.
pub(super) fn merge_env(env: Vec<String>, base: &[String]) -> Vec<String> {
    let mut merged: Vec<String> = Vec::new();
    for entry in base.iter().cloned().chain(env) {
        let name = |entry: &str| entry.split('=').next().map(str::to_owned);
        let place = merged.iter().position(|other| name(other) == name(&entry));
        match (entry.contains('='), place) {
            (true, Some(place)) => merged[place] = entry,
            (true, None) => merged.push(entry),
            (false, Some(place)) => drop(merged.remove(place)),
            (false, None) => {}
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    /// apple/container 1212, containerd/containerd 7348.
    #[test]
    fn of_two_values_of_a_variable_the_last_one_counts() {
        let merged = merge_env(
            words("A=1 B=1 A=2 C=c=c"),
            &words("B=0 PATH=/image B=00 D="),
        );
        assert_eq!(merged, words("B=1 PATH=/image D= A=2 C=c=c"));
    }

    /// moby/moby 10141, docker/cli 1780.
    #[test]
    fn a_variable_without_a_value_is_the_callers_or_gone() {
        let merge = |env: &str| {
            merge_env(
                expand_env(&words(env)),
                &words("UNSET_HERE=image B=b NOVALUE"),
            )
        };
        assert_eq!(merge("UNSET_HERE"), ["B=b"]);
        assert_eq!(merge("UNSET_HERE= B"), ["UNSET_HERE="]);
        assert_eq!(merge("UNSET_HERE UNSET_HERE=x"), ["B=b", "UNSET_HERE=x"]);
        let path = format!("PATH={}", std::env::var("PATH").unwrap());
        assert!(merge("PATH").contains(&path));
        for nameless in ["", "=", "=x"] {
            assert!(parse_env(nameless).is_err(), "{nameless:?}");
        }
        assert_eq!(parse_env("A").unwrap() + &parse_env("B=").unwrap(), "AB=");
    }

    /// docker/cli 5057, docker/cli 3630.
    #[test]
    fn a_file_of_variables_is_read_as_by_docker() {
        let read = |text: &str| parse_file(Path::new("/f"), text.as_bytes());
        let text = "\u{feff}A=1\r\n\n# comment\n  B= \"x\" # y \nC==\nUNSET_HERE\nD=\n";
        let expected = ["A=1", "B= \"x\" # y ", "C==", "D="];
        assert_eq!(read(text).unwrap(), expected);
        let long = format!("L={}", "x".repeat(200_000));
        assert_eq!(read(&long).unwrap(), [long]);
        let path = format!("PATH={}", std::env::var("PATH").unwrap());
        assert_eq!(read("PATH").unwrap(), [path]);
        for (text, expected) in [
            (
                "A=1\nexport B=2",
                "/f, line 2: the name \"export B\" has spaces in it",
            ),
            ("=x", "/f, line 1: \"=x\" has no name"),
        ] {
            assert_eq!(read(text).unwrap_err().to_string(), expected);
        }
        let error = parse_file(Path::new("/f"), b"A=\xff").unwrap_err();
        assert_eq!(error.to_string(), "/f is not UTF-8");
    }
}
