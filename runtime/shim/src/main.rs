//! `containerd-shim-koya-v2`: the program that containerd starts to run a container or a pod with Koya.
//!
//! containerd calls `start` once for each container. For the first one of a sandbox, that creates the shim, a long-lived
//! process ([`daemon`]): it contains the virtual machine, and serves containerd's task API ([`service`]) until the last
//! container is gone. `delete` cleans up ([`cleanup`]).
//!
//! The calls are described in containerd's `core/runtime/v2/README.md`.

mod cleanup;
mod daemon;
mod events;
mod flags;
mod launch;
mod metrics;
mod options;
mod selinux;
mod service;
mod sink;

use anyhow::{Result, bail};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use flags::{Action, Flags};
use protobuf::Message as _;
use std::io::Write as _;
use std::process::ExitCode;

/// Name of this runtime in containerd.
const RUNTIME: &str = "io.containerd.koya.v2";

/// As in the `koya` command.
#[cfg(target_env = "musl")]
#[global_allocator]
static HEAP: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    koya::prepare_process();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        // containerd shows this to its user, with a prefix.
        Err(error) => {
            eprintln!("koya: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let flags = Flags::parse(std::env::args().skip(1))?;
    match flags.action {
        Action::Help => {
            print!("{}", flags::HELP);
            Ok(())
        }
        Action::Version => {
            println!("containerd-shim-koya-v2 {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        Action::Info => info(),
        Action::Start => launch::start(&flags),
        Action::Delete => cleanup::delete(&flags),
        Action::Serve => daemon::serve(&flags),
        Action::None => bail!("containerd starts this program; see --help"),
    }
}

/// `-info`: containerd 2 queries a runtime's features. Without features, containerd assumes only the usual ones.
fn info() -> Result<()> {
    let info = RuntimeInfo {
        name: RUNTIME.into(),
        version: Some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    Ok(std::io::stdout().write_all(&info.write_to_bytes()?)?)
}
