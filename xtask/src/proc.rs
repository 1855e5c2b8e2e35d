//! Running other programs, with output to a log or to the terminal, and with clear errors.

use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The root of the checkout.
pub(crate) fn checkout() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent()
        .expect("xtask is a directory of the checkout")
        .to_path_buf()
}

/// The cargo that runs this program, at the root of the checkout.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(checkout());
    cargo
}

/// The command line as typed in a shell, for messages.
fn shown(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    text
}

/// Runs `command` with its output on the terminal; an error if it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status})", shown(command));
    }
    Ok(())
}

/// Runs `command` and returns its output, without the final newline.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let out = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    if !out.status.success() {
        bail!("`{}` failed ({})", shown(command), out.status);
    }
    Ok(String::from_utf8_lossy(&out.stdout).trim_end().to_owned())
}

/// Runs a long `command` with its output in `log`; shows a progress line meanwhile, and the end of the log on failure.
pub(crate) fn long(what: &str, command: &mut Command, log: &Path) -> Result<()> {
    let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    let started = Instant::now();
    let live = std::io::stderr().is_terminal();
    let mut told = Instant::now();
    eprintln!("  {what} (log: {})", log.display());
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::sleep(Duration::from_millis(100));
        let every = if live { 1 } else { 30 };
        if told.elapsed() >= Duration::from_secs(every) {
            told = Instant::now();
            let at = last_line(log);
            let seconds = started.elapsed().as_secs();
            if live {
                eprint!("\r\x1b[K  {what}: {seconds} s, {at}");
                std::io::stderr().flush()?;
            } else {
                eprintln!("  {what}: {seconds} s, {at}");
            }
        }
    };
    if live {
        eprint!("\r\x1b[K");
    }
    if !status.success() {
        bail!(
            "{what}: `{}` failed ({status}); the end of {}:\n{}",
            shown(command),
            log.display(),
            tail(log, 20)
        );
    }
    eprintln!("  {what}: done in {:.0?}", started.elapsed());
    Ok(())
}

fn last_line(log: &Path) -> String {
    let line = tail(log, 1);
    line.chars().take(70).collect()
}

/// The last `lines` lines of a file, as far as it can be read.
pub(crate) fn tail(file: &Path, lines: usize) -> String {
    let bytes = std::fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
