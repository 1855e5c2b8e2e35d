//! The command line in containerd's form: Go flags, then an action.

use anyhow::{Context, Result, bail};
use std::path::PathBuf;

pub(crate) const HELP: &str = "\
containerd-shim-koya-v2: containers in virtual machines of their own, for containerd

containerd starts this program by itself, for containers whose runtime is io.containerd.koya.v2:

    ctr run --runtime io.containerd.koya.v2 --rm -t IMAGE NAME sh

It must be on containerd's PATH, beside containerd, or be named by an absolute path. The guest's
kernel and agent are looked for as koya does (see `koya env`); settings are in /etc/koya/config.toml.

Usage of the shim itself: [-namespace N] [-address SOCKET] [-publish-binary P] [-id ID] [-bundle DIR]
[-debug] start|delete, or -v, -info
";

/// The action of a call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Action {
    #[default]
    None,
    Help,
    Version,
    Info,
    Start,
    Delete,
    /// The long-lived process, started by `start`.
    Serve,
}

/// The flags of a call.
#[derive(Clone, Debug, Default)]
pub(crate) struct Flags {
    pub(crate) action: Action,
    pub(crate) namespace: String,
    /// Socket of containerd.
    pub(crate) address: String,
    pub(crate) id: String,
    /// The container's bundle; the working directory if not given.
    pub(crate) bundle: Option<PathBuf>,
    pub(crate) debug: bool,
}

impl Flags {
    pub(crate) fn parse(args: impl Iterator<Item = String>) -> Result<Self> {
        let mut flags = Self::default();
        let mut args = args;
        while let Some(arg) = args.next() {
            let Some(flag) = arg.strip_prefix('-') else {
                flags.action = match arg.as_str() {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    "serve" => Action::Serve,
                    other => bail!("there is no action {other:?}; see --help"),
                };
                continue;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let mut value = || {
                value
                    .clone()
                    .or_else(|| args.next())
                    .with_context(|| format!("-{name} lacks a value"))
            };
            match name {
                "namespace" => flags.namespace = value()?,
                "address" => flags.address = value()?,
                "id" => flags.id = value()?,
                "bundle" => flags.bundle = Some(value()?.into()),
                // containerd's program for publishing events, which is not used: events are sent over its socket.
                "publish-binary" | "socket" => drop(value()?),
                "debug" => flags.debug = true,
                "v" | "version" => flags.action = Action::Version,
                "info" => flags.action = Action::Info,
                "h" | "help" => flags.action = Action::Help,
                _ => bail!("there is no flag -{name}; see --help"),
            }
        }
        let needs_id = matches!(flags.action, Action::Start | Action::Delete | Action::Serve);
        if needs_id && (flags.id.is_empty() || flags.namespace.is_empty()) {
            bail!("-id and -namespace are needed");
        }
        Ok(flags)
    }

    /// The container's bundle directory.
    pub(crate) fn bundle(&self) -> Result<PathBuf> {
        match &self.bundle {
            Some(bundle) if !bundle.as_os_str().is_empty() => Ok(bundle.clone()),
            _ => std::env::current_dir().context("no working directory"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Flags> {
        Flags::parse(line.split(' ').map(String::from))
    }

    #[test]
    fn containerds_lines_are_read() {
        let flags = parse(
            "-namespace default -address /run/c.sock -publish-binary /bin/c -id foo -debug start",
        )
        .unwrap();
        assert_eq!(flags.action, Action::Start);
        assert_eq!(
            (flags.namespace.as_str(), flags.id.as_str()),
            ("default", "foo")
        );
        assert!(flags.debug);
        let flags = parse("--namespace=k8s.io --id=a --bundle=/b delete").unwrap();
        assert_eq!(flags.action, Action::Delete);
        assert_eq!(flags.bundle, Some("/b".into()));
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert!(parse("-id x start").is_err());
        assert!(parse("-id x -namespace y fly").is_err());
        assert!(parse("-wings start").is_err());
    }
}
