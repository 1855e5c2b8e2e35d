//! The log, in runc's formats: text, or a JSON object on each line.

use crate::cli::{Globals, LogFormat};
use anyhow::{Context, Result};
use chrono::{DateTime, SecondsFormat, Utc};
use koya::vmm::guest_text;
use log::{LevelFilter, Log, Metadata, Record};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::SystemTime;

static LOG: OnceLock<Lines> = OnceLock::new();

/// Configuration of the log, for long-lived processes.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct Config {
    file: Option<PathBuf>,
    is_json: bool,
    is_debug: bool,
}

impl Config {
    pub(crate) fn of(globals: &Globals) -> Result<Self> {
        let file = globals.log.as_ref().map(std::path::absolute);
        Ok(Self {
            file: file.transpose()?,
            is_json: globals.log_format == LogFormat::Json,
            is_debug: globals.debug,
        })
    }

    pub(crate) fn is_debug(&self) -> bool {
        self.is_debug
    }

    /// Starts the log.
    ///
    /// # Errors
    /// If the file can't be opened.
    pub(crate) fn start(&self) -> Result<()> {
        let open = |path: &PathBuf| {
            let file = OpenOptions::new().create(true).append(true).open(path);
            file.with_context(|| format!("cannot open {}", path.display()))
        };
        let lines = Lines {
            file: self.file.as_ref().map(open).transpose()?,
            is_json: self.is_json,
        };
        let level = match self.is_debug {
            true => LevelFilter::Debug,
            false => LevelFilter::Warn,
        };
        if LOG.set(lines).is_ok() {
            log::set_max_level(level);
            log::set_logger(LOG.get().context("the log")?).ok();
        }
        Ok(())
    }
}

pub(crate) fn start(globals: &Globals) -> Result<()> {
    Config::of(globals)?.start()
}

/// Whether the log goes to a file.
pub(crate) fn is_to_file() -> bool {
    LOG.get().is_some_and(|lines| lines.file.is_some())
}

struct Lines {
    file: Option<File>,
    is_json: bool,
}

impl Log for Lines {
    fn enabled(&self, of: &Metadata<'_>) -> bool {
        // The log often lies in memory (`/run`): a guest must not fill it.
        of.target() != koya::GUEST_LOG
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let level = match record.level() {
            log::Level::Warn => "warning".to_owned(),
            level => level.as_str().to_lowercase(),
        };
        let line = line(self.is_json, &level, &record.args().to_string());
        match &self.file {
            Some(file) => {
                let mut file = file;
                file.write_all(line.as_bytes()).ok()
            }
            None => std::io::stderr().write_all(line.as_bytes()).ok(),
        };
    }

    fn flush(&self) {}
}

/// The time.
pub(crate) fn now() -> DateTime<Utc> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let since = since.unwrap_or_default();
    DateTime::from_timestamp(since.as_secs() as i64, since.subsec_nanos()).unwrap_or_default()
}

fn line(is_json: bool, level: &str, message: &str) -> String {
    let now = now().to_rfc3339_opts(SecondsFormat::Secs, true);
    // JSON escapes only some control characters, and callers show the message on terminals.
    let message = guest_text::sanitize(message);
    let message_json = serde_json::Value::from(message.as_str());
    match is_json {
        true => {
            let line = serde_json::json!({"level": level, "msg": message, "time": now});
            format!("{line}\n")
        }
        false => format!("time=\"{now}\" level={level} msg={message_json}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_line() {
        let json = line(true, "error", "a \"b\"\nc");
        assert_eq!(json.matches('\n').count(), 1);
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(
            (value["level"].as_str(), value["msg"].as_str()),
            (Some("error"), Some("a \"b\"\nc"))
        );
        let text = line(false, "error", "a\nb");
        assert!(
            text.ends_with("level=error msg=\"a\\nb\"\n") && text.matches('\n').count() == 1,
            "{text}"
        );
        let text = line(true, "error", "a\u{9b}2J\u{7f}\u{202e}b");
        assert!(text.contains("\"ab\""), "{text}");
    }

    #[test]
    fn messages_that_a_guest_may_cause_at_will_are_left_out() {
        let lines = Lines {
            file: None,
            is_json: false,
        };
        let is_logged = |target| lines.enabled(&Metadata::builder().target(target).build());
        assert!(is_logged("koya::agent") && is_logged("ttrpc::sync::server"));
        assert!(!is_logged(koya::GUEST_LOG));
    }
}
