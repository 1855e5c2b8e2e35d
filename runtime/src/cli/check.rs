//! `koya check`: whether this machine can run Koya, found out by running a tiny guest.

use super::Outcome;
use clap::Args;
use koya::vmm::{ExitReason, Spec, Vm, kvm};
use serde_json::json;
use std::time::{Duration, Instant};

#[derive(Args)]
pub(super) struct CheckArgs {
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// How often the tiny guest goes round its loop of two instructions: 0.1 ms on hardware, a
/// fraction of a second where each instruction is emulated.
const ROUNDS: u32 = 60_000;

/// Below this rate (instructions a second) no Linux guest gets anywhere. Hardware does thousands
/// of millions, emulated hardware (nested in an emulator) hundreds of millions, a software KVM
/// half a million.
const SLOWEST: f64 = 20e6;

/// What was looked at, whether it is well, and what to do if not.
struct Finding {
    what: &'static str,
    well: bool,
    text: String,
}

pub(super) fn main(args: &CheckArgs) -> Outcome {
    let findings = look();
    let well = findings.iter().all(|f| f.well);
    if args.json {
        let all: Vec<_> = findings
            .iter()
            .map(|f| json!({"check": f.what, "ok": f.well, "text": f.text}))
            .collect();
        let all = json!({"ok": well, "findings": all});
        println!("{}", serde_json::to_string_pretty(&all)?);
    } else {
        for finding in &findings {
            let mark = if finding.well { "ok  " } else { "FAIL" };
            println!("{mark} {}: {}", finding.what, finding.text);
        }
        let verdict = if well { "can" } else { "can't" };
        println!("this machine {verdict} run Koya");
    }
    Ok(u8::from(!well))
}

fn look() -> Vec<Finding> {
    let mut findings = Vec::new();
    match kvm::open() {
        Ok(_) => findings.push(Finding {
            what: "kvm",
            well: true,
            text: format!("{} is there, API 12, with all that is needed", kvm::DEVICE),
        }),
        Err(error) => {
            findings.push(Finding {
                what: "kvm",
                well: false,
                text: error.to_string(),
            });
            return findings;
        }
    }
    findings.push(match measure() {
        Ok(rate) if rate >= SLOWEST => Finding {
            what: "guest",
            well: true,
            text: format!("a tiny guest ran {} instructions a second", millions(rate)),
        },
        Ok(rate) => Finding {
            what: "guest",
            well: false,
            text: format!(
                "a tiny guest ran only {} instructions a second: this KVM emulates guest kernels \
                 in software. Use a machine with hardware virtualization (VT-x or AMD-V), or \
                 `cargo xtask rig` for an emulated one",
                millions(rate)
            ),
        },
        Err(text) => Finding {
            what: "guest",
            well: false,
            text,
        },
    });
    findings.push(match koya::files::Files::find(None, None) {
        Ok(files) => Finding {
            what: "files",
            well: true,
            text: format!(
                "kernel {}, agent {}",
                files.kernel.display(),
                files.initramfs.display()
            ),
        },
        Err(error) => Finding {
            what: "files",
            well: false,
            text: error.to_string(),
        },
    });
    findings
}

fn millions(rate: f64) -> String {
    format!("{:.1} million", rate / 1e6)
}

/// Instructions a second of a guest that only counts. The time without any counting is taken off.
fn measure() -> Result<f64, String> {
    let empty = time_of(1)?;
    let full = time_of(ROUNDS)?;
    let counting = full.saturating_sub(empty).max(Duration::from_micros(10));
    Ok(2.0 * f64::from(ROUNDS) / counting.as_secs_f64())
}

fn time_of(rounds: u32) -> Result<Duration, String> {
    // mov ecx, rounds; l: dec ecx; jnz l; mov al, 0xfe; out 0x64, al; hlt
    let mut code = vec![0x66, 0xb9];
    code.extend(rounds.to_le_bytes());
    code.extend([0x66, 0x49, 0x75, 0xfc, 0xb0, 0xfe, 0xe6, 0x64, 0xf4]);
    let vm = Vm::builder(Spec::flat(code))
        .start_paused()
        .map_err(|e| format!("a tiny guest can't be made: {e}"))?;
    let handle = vm.handle();
    let started = Instant::now();
    handle.resume();
    let reason = handle.wait_ended();
    let took = started.elapsed();
    drop(vm);
    match reason {
        ExitReason::Reset => Ok(took),
        other => Err(format!("a tiny guest failed: {other}")),
    }
}
