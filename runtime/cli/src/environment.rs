//! `koya env`: versions and paths.

use super::Outcome;
use super::output::say;
use anyhow::Result;
use clap::Args;
use koya::files::Files;
use serde_json::{Value, json};

#[derive(Args)]
pub(super) struct EnvArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn main(args: &EnvArgs) -> Outcome {
    let uname = rustix::system::uname();
    let files = Files::find(None, None);
    let file = |path: Option<&std::path::PathBuf>| -> Value {
        let Some(path) = path else { return Value::Null };
        let size = std::fs::metadata(path).map(|m| m.len()).ok();
        json!({"path": path, "bytes": size})
    };
    let kvm = koya::vmm::kvm::open();
    let confinement = koya::vmm::host::walls::check_host();
    let own_root = koya::vmm::host::descriptors::check_own_root();
    let has_places = koya::vmm::host::walls::landlock::has_places();
    let all = json!({
        "koya": {
            "version": env!("CARGO_PKG_VERSION"),
            "program": std::env::current_exe().ok(),
        },
        "kernel": file(files.as_ref().ok().map(|f| &f.kernel)),
        "full_kernel": file(Files::full_kernel().ok().as_ref()),
        "initramfs": file(files.as_ref().ok().map(|f| &f.initramfs)),
        "containers": super::state::root().ok(),
        "missing": files.as_ref().err().map(ToString::to_string),
        "host": {
            "kernel": uname.release().to_string_lossy(),
            "machine": uname.machine().to_string_lossy(),
            "kvm": match &kvm {
                Ok(_) => "usable".to_owned(),
                Err(error) => error.to_string(),
            },
            "confinement": match confinement {
                Ok(()) => match &own_root {
                    Ok(()) => {
                        "seccomp filters and capabilities by thread, no files of the host".to_owned()
                    }
                    Err(why) if has_places => format!(
                        "seccomp filters and capabilities by thread; under koya run only shared files of the host \
                         (Landlock), otherwise those that this user may open, since threads have no root directory of \
                         their own: {why}"
                    ),
                    Err(why) => format!(
                        "seccomp filters and capabilities by thread; files of the host as far as this user may \
                         open them, since threads have no root directory of their own: {why}"
                    ),
                },
                Err(error) => error.to_string(),
            },
            "own_root": own_root.is_ok(),
            "landlock": koya::vmm::host::walls::landlock::abi(),
        },
    });
    if args.json {
        let mut all = all;
        all["host"]["threads"] = koya::confinement::expected();
        say!("{}", serde_json::to_string_pretty(&all)?)?;
        return Ok(0);
    }
    print(&all, 0)?;
    Ok(0)
}

fn print(value: &Value, indent: usize) -> Result<()> {
    let Value::Object(fields) = value else {
        return Ok(());
    };
    for (name, value) in fields {
        match value {
            Value::Object(_) => {
                say!("{:indent$}{name}:", "")?;
                print(value, indent + 2)?;
            }
            Value::Null => {}
            Value::String(text) => say!("{:indent$}{name}: {text}", "")?,
            other => say!("{:indent$}{name}: {other}", "")?,
        }
    }
    Ok(())
}
