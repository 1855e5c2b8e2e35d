//! Writes the manual pages of `koya` and `koya-runtime`, and the shell completions of `koya`, from the definitions
//! of their command lines: `koya-pages DIRECTORY`, with a layout like `/usr/share`.

use anyhow::{Context, Result};
use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;
use std::fs;
use std::path::{Path, PathBuf};

/// Paths of completions for each shell, below `/usr/share`.
const COMPLETIONS: [(Shell, &str); 3] = [
    (Shell::Bash, "bash-completion/completions/koya"),
    (Shell::Fish, "fish/vendor_completions.d/koya.fish"),
    (Shell::Zsh, "zsh/vendor-completions/_koya"),
];

fn main() -> Result<()> {
    let out = std::env::args_os().nth(1).map(PathBuf::from);
    let out = out.context("usage: koya-pages DIRECTORY")?;
    write_all(&out)
}

fn write_all(out: &Path) -> Result<()> {
    let koya = koya_cli::command();
    // Its version output has further lines.
    let runtime = koya_oci::command().version(env!("CARGO_PKG_VERSION"));
    manual(&koya, "1", &out.join("man/man1"))?;
    manual(&runtime, "8", &out.join("man/man8"))?;
    for (shell, place) in COMPLETIONS {
        let place = out.join(place);
        let mut text = Vec::new();
        clap_complete::generate(shell, &mut koya.clone(), "koya", &mut text);
        create(&place, &text)?;
    }
    Ok(())
}

/// Writes the pages of a command and of its subcommands, each as `koya-run.1`.
fn manual(command: &Command, section: &str, out: &Path) -> Result<()> {
    let mut command = command.clone().disable_help_subcommand(true);
    command.build();
    pages(command, section, out)
}

fn pages(command: Command, section: &str, out: &Path) -> Result<()> {
    let below = command.get_subcommands().filter(|c| !c.is_hide_set());
    for subcommand in below.cloned() {
        pages(subcommand, section, out)?;
    }
    let man = Man::new(command).section(section);
    let mut text = Vec::new();
    man.render(&mut text)?;
    create(&out.join(man.get_filename()), &text)
}

fn create(path: &Path, text: &[u8]) -> Result<()> {
    let directory = path.parent().context("a file without a directory")?;
    fs::create_dir_all(directory)
        .and_then(|()| fs::write(path, text))
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_and_every_shell_its_completions() {
        let out = tempfile::tempdir().unwrap();
        write_all(out.path()).unwrap();
        let text = |name: &str| fs::read_to_string(out.path().join(name)).unwrap();
        for page in ["man1/koya.1", "man1/koya-run.1", "man1/koya-disk-attach.1"] {
            assert!(text(&format!("man/{page}")).contains(".SH SYNOPSIS"));
        }
        assert!(text("man/man1/koya-run.1").contains("\\-\\-rootfs"));
        assert!(text("man/man8/koya-runtime-create.8").contains("pid\\-file"));
        assert!(text("man/man8/koya-runtime.8").contains("koya\\-runtime"));
        for (_, place) in COMPLETIONS {
            assert!(text(place).contains("timeline"), "{place}");
        }
        // Commands that the programs only use internally are hidden.
        let hidden = koya_oci::command();
        let hidden = hidden.get_subcommands().find(|c| c.is_hide_set()).unwrap();
        let page = format!("man/man8/koya-runtime-{}.8", hidden.get_name());
        assert!(!out.path().join(page).exists());
    }
}
