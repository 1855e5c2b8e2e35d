//! `koya config`: the settings of sandboxes under containerd and other engines.

use super::Outcome;
use super::output::{self, complain, say};
use clap::{Args, Subcommand};
use koya::Settings;
use koya::settings::{DROP_INS, FILE};
use std::path::PathBuf;

#[derive(Args)]
pub(super) struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Validate the configuration: exit status 0, or 1 with the errors
    Check(FilesArgs),
    /// Print the effective configuration, with defaults
    Show(FilesArgs),
}

#[derive(Args)]
struct FilesArgs {
    /// Read these files instead of /etc/koya/config.toml and /etc/koya/config.d/*.toml; later files take precedence
    files: Vec<PathBuf>,
}

impl FilesArgs {
    fn files(self) -> Vec<PathBuf> {
        match self.files.is_empty() {
            true => Settings::files(),
            false => self.files,
        }
    }
}

pub(super) fn main(args: ConfigArgs) -> Outcome {
    match args.command {
        ConfigCommand::Check(args) => check(&args.files()),
        ConfigCommand::Show(args) => {
            output::print(format_args!("{}", Settings::read(&args.files())?))?;
            Ok(0)
        }
    }
}

fn check(files: &[PathBuf]) -> Outcome {
    match Settings::read(files) {
        Ok(_) if files.is_empty() => {
            say!("neither {FILE} nor files in {DROP_INS}: the defaults")?;
            Ok(0)
        }
        Ok(_) => {
            for file in files {
                say!("{}: in order", file.display())?;
            }
            Ok(0)
        }
        Err(error) => {
            complain!("koya: {error}");
            Ok(1)
        }
    }
}
