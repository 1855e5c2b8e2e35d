//! An installation: programs, guest kernel and agent, manual pages, completions, and snippets for the
//! configuration of engines.

use crate::arch::Arch;
use crate::build::{self, Products};
use crate::proc;
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// List of the installed files, one per line, below the prefix, for `--remove`.
const MANIFEST: &str = "share/koya/installed";
const PACKAGING: &str = "runtime/packaging";

#[derive(clap::Args)]
pub(crate) struct InstallArgs {
    /// Install below this directory
    #[arg(long, value_name = "DIR", default_value = "/usr/local")]
    prefix: PathBuf,
    /// Put the files below DIR instead of the root of the file system, for packaging
    #[arg(long, value_name = "DIR")]
    destdir: Option<PathBuf>,
    /// Remove the files of an earlier installation below the same prefix
    #[arg(long)]
    remove: bool,
}

/// `cargo xtask install`
pub(crate) fn run(args: &InstallArgs) -> Result<()> {
    if !args.prefix.is_absolute() {
        bail!("--prefix {} is not an absolute path", args.prefix.display());
    }
    let place = match &args.destdir {
        Some(dir) => dir.join(args.prefix.strip_prefix("/")?),
        None => args.prefix.clone(),
    };
    if args.remove {
        return remove(&place);
    }
    let files = lay_out(Arch::of_this_machine(), &args.prefix)?;
    if place.join(MANIFEST).exists() {
        // An earlier version may have had other files.
        remove(&place)?;
    }
    let names: Vec<&str> = files.iter().map(|file| file.at.as_str()).collect();
    write(&place, MANIFEST, names.join("\n").as_bytes(), 0o644)?;
    for file in &files {
        write(&place, &file.at, &file.content()?, file.mode)?;
    }
    println!("installed {} files in {}", files.len(), place.display());
    if args.destdir.is_none() {
        println!(
            "`{}/bin/koya check` says whether this machine can run it",
            place.display()
        );
    }
    Ok(())
}

/// A file of an installation.
pub(crate) struct Installed {
    /// Path below the prefix.
    pub(crate) at: String,
    pub(crate) mode: u32,
    from: From,
}

/// Source of its contents.
enum From {
    File(PathBuf),
    Text(String),
}

impl Installed {
    pub(crate) fn content(&self) -> Result<Vec<u8>> {
        match &self.from {
            From::File(path) => {
                fs::read(path).with_context(|| format!("cannot read {}", path.display()))
            }
            From::Text(text) => Ok(text.clone().into_bytes()),
        }
    }
}

/// Builds outdated products, and returns the files of an installation below `prefix`.
pub(crate) fn lay_out(arch: Arch, prefix: &Path) -> Result<Vec<Installed>> {
    let products = build::ensure_for(arch)?;
    let mut files = programs(&products)?;
    files.extend(pages(prefix)?);
    files.extend(documents(prefix)?);
    Ok(files)
}

fn programs(products: &Products) -> Result<Vec<Installed>> {
    let mut files = Vec::new();
    for program in build::PROGRAMS {
        files.push(Installed {
            at: format!("bin/{program}"),
            mode: 0o755,
            from: From::File(products.bin.join(program)),
        });
    }
    for name in ["vmlinux", "initramfs", "vmlinux-full"] {
        let path = products.share.join(name);
        // The full kernel is included if it has been built.
        if path.exists() || name != "vmlinux-full" {
            files.push(Installed {
                at: format!("share/koya/{name}"),
                mode: 0o644,
                from: From::File(path),
            });
        }
    }
    Ok(files)
}

/// Manual pages and completions.
fn pages(prefix: &Path) -> Result<Vec<Installed>> {
    let out = proc::checkout().join("target/pages");
    if out.exists() {
        fs::remove_dir_all(&out)?;
    }
    eprintln!("writing manual pages and completions");
    let mut cargo = proc::cargo();
    cargo.args(["run", "--quiet", "--package", "koya-pages", "--"]);
    proc::run(cargo.arg(&out))?;
    let mut files = Vec::new();
    for path in below(&out)? {
        let place = path.strip_prefix(&out)?.display().to_string();
        // Debian's zsh has different directories for packages and for local installations.
        let place = match prefix == Path::new("/usr") {
            true => place,
            false => place.replace("zsh/vendor-completions", "zsh/site-functions"),
        };
        files.push(Installed {
            at: format!("share/{place}"),
            mode: 0o644,
            from: From::File(path),
        });
    }
    let shim = "containerd-shim-koya-v2.8";
    files.push(Installed {
        at: format!("share/man/man8/{shim}"),
        mode: 0o644,
        from: From::Text(for_prefix(&packaging(shim)?, prefix)),
    });
    Ok(files)
}

/// README.md, the pages that it links to, and the examples for engines.
fn documents(prefix: &Path) -> Result<Vec<Installed>> {
    let checkout = proc::checkout();
    let mut pages = vec![checkout.join("README.md"), checkout.join("CHANGELOG.md")];
    pages.extend(below(&checkout.join("docs"))?);
    let mut files = Vec::new();
    for page in pages {
        let name = page.strip_prefix(&checkout)?.to_string_lossy().into_owned();
        files.push(Installed {
            at: format!("share/doc/koya/{name}"),
            mode: 0o644,
            from: From::File(page),
        });
    }
    for example in below(&proc::checkout().join(PACKAGING).join("examples"))? {
        let name = example.file_name().unwrap_or_default().to_string_lossy();
        files.push(Installed {
            at: format!("share/doc/koya/examples/{name}"),
            mode: 0o644,
            from: From::Text(for_prefix(&fs::read_to_string(&example)?, prefix)),
        });
    }
    Ok(files)
}

/// A file that is the same in every installation except for its paths.
pub(crate) fn packaging(name: &str) -> Result<String> {
    let path = proc::checkout().join(PACKAGING).join(name);
    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// Replaces the paths in a file, which are those of a package, by those below a prefix.
fn for_prefix(text: &str, prefix: &Path) -> String {
    let own = prefix.display();
    text.replace("/usr/bin/", &format!("{own}/bin/"))
        .replace("/usr/share/", &format!("{own}/share/"))
}

/// The files below a directory.
fn below(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let entries = fs::read_dir(directory);
    for entry in entries.with_context(|| format!("cannot read {}", directory.display()))? {
        let path = entry?.path();
        match path.is_dir() {
            true => files.extend(below(&path)?),
            false => files.push(path),
        }
    }
    files.sort();
    Ok(files)
}

/// Writes a file atomically; running programs keep the old one.
pub(crate) fn write(place: &Path, at: &str, content: &[u8], mode: u32) -> Result<()> {
    let path = place.join(at);
    let directory = path.parent().context("a file without a directory")?;
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot create {}", directory.display()))?;
    build::replace(&path, content)?;
    Ok(fs::set_permissions(
        &path,
        fs::Permissions::from_mode(mode),
    )?)
}

/// Removes the files of an installation, and the directories that it leaves empty.
fn remove(place: &Path) -> Result<()> {
    let manifest = place.join(MANIFEST);
    let names = fs::read_to_string(&manifest)
        .with_context(|| format!("nothing was installed there: {}", manifest.display()))?;
    for name in names.lines().chain([MANIFEST]) {
        let path = place.join(name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).with_context(|| format!("cannot remove {}", path.display()));
            }
            _ => {}
        }
        let ours = path.ancestors().skip(1).take_while(|dir| *dir != place);
        for directory in ours {
            // A directory with other contents is kept, and so are its parents.
            if fs::remove_dir(directory).is_err() {
                break;
            }
        }
    }
    println!("removed what was installed in {}", place.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_installed_is_removed_and_nothing_else() {
        let place = tempfile::tempdir().unwrap();
        let place = place.path();
        write(place, "share/koya/vmlinux", b"kernel", 0o644).unwrap();
        write(place, "bin/koya", b"program", 0o755).unwrap();
        write(place, "bin/other", b"somebody else's", 0o755).unwrap();
        write(
            place,
            MANIFEST,
            b"bin/koya\nshare/koya/vmlinux\nshare/gone",
            0o644,
        )
        .unwrap();
        assert_eq!(
            fs::metadata(place.join("bin/koya"))
                .unwrap()
                .permissions()
                .mode()
                & 0o777,
            0o755
        );
        remove(place).unwrap();
        assert_eq!(below(place).unwrap(), [place.join("bin/other")]);
        assert!(!place.join("share").exists());
        assert!(
            remove(place)
                .unwrap_err()
                .to_string()
                .starts_with("nothing was installed")
        );
    }

    #[test]
    fn snippets_name_the_programs_where_they_are() {
        let text = for_prefix("[\"/usr/bin/koya-runtime\"]", Path::new("/usr/local"));
        assert_eq!(text, "[\"/usr/local/bin/koya-runtime\"]");
        let snippets = below(&proc::checkout().join(PACKAGING).join("examples")).unwrap();
        assert_eq!(snippets.len(), 4, "{snippets:?}");
    }
}
