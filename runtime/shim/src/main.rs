//! `containerd-shim-koya-v2`: what containerd starts to run a container, or a pod, with Koya.
//!
//! containerd calls `start` once for each container. For the first one of a sandbox that makes the
//! shim itself, a process that stays ([`daemon`]): the virtual machine is in it, and it answers
//! containerd's task API ([`service`]) until the last container is gone. `delete` cleans up
//! ([`cleanup`]).
//!
//! Which calls mean what is containerd's `core/runtime/v2/README.md`.

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

/// The name by which containerd knows this runtime.
const RUNTIME: &str = "io.containerd.koya.v2";

/// As the `koya` command's.
#[cfg(target_env = "musl")]
#[global_allocator]
static HEAP: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    koya::prepare_process();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        // containerd shows this to its user, after words of its own.
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

/// `-info`: what containerd 2 asks of a runtime. That it says nothing of features means that containerd
/// assumes none beyond the usual ones.
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
