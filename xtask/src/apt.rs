//! Packages of another suite of Debian, unpacked into a directory: newer programs than the machine's
//! own, whose package configuration stays as it is.

use crate::{proc, setup};
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Downloads `packages` of `suite` from the mirror that the machine's own Debian packages come
/// from, and unpacks them into `out`. What they depend on is not looked for.
pub(crate) fn unpack(suite: &str, packages: &[&str], out: &Path) -> Result<()> {
    let own = out.join("apt");
    for dir in ["lists", "cache/archives/partial"] {
        fs::create_dir_all(own.join(dir))?;
    }
    let mirror = mirror()?;
    let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let sources = own.join("sources.list");
    fs::write(
        &sources,
        format!("deb [signed-by={keys}] {mirror} {suite} main\n"),
    )?;
    let config = own.join("apt.conf");
    let text = format!(
        "Dir::State::Lists \"{0}/lists\";\nDir::Cache \"{0}/cache\";\n\
         Dir::Etc::SourceList \"{0}/sources.list\";\nDir::Etc::SourceParts \"-\";\n\
         APT::Sandbox::User \"root\";\n",
        own.display()
    );
    fs::write(&config, text)?;
    let log = out.with_extension("log");
    let apt = |args: &[&str]| {
        let mut apt = Command::new("apt-get");
        apt.arg("-q").args(args).env("APT_CONFIG", &config);
        apt.current_dir(&own);
        apt
    };
    proc::long(
        &format!("the package list of {suite}"),
        &mut apt(&["update"]),
        &log,
    )?;
    let wanted = [&["download"], packages].concat();
    proc::long(
        &format!("downloading {} of {suite} (once)", packages.join(", ")),
        &mut apt(&wanted),
        &log,
    )?;
    for entry in fs::read_dir(&own)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "deb") {
            proc::run(Command::new("dpkg").arg("-x").arg(&path).arg(out))?;
        }
    }
    Ok(fs::remove_dir_all(&own)?)
}

/// The address of the machine's own Debian mirror.
fn mirror() -> Result<String> {
    setup::package_lists()?;
    let listed = proc::output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(CODENAME) $(REPO_URI)",
        "Created-By: Packages",
        "Label: Debian",
    ]))?;
    listed
        .lines()
        .find_map(|line| line.strip_prefix("bookworm "))
        .map(str::to_owned)
        .context("apt-get names no source of Debian 12 (bookworm) packages")
}
