//! `koya check`: checks whether this machine can run Koya, by running a tiny guest.

use super::Outcome;
use super::output::say;
use super::programs;
use clap::Args;
use koya::vmm::{ExitReason, Spec, Vm, kvm};
use serde_json::json;
use std::time::{Duration, Instant};

#[derive(Args)]
pub(super) struct CheckArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Iterations of the tiny guest's loop of two instructions: 0.1 ms on hardware, a fraction of a second if each instruction
/// is emulated.
const ROUNDS: u32 = 60_000;

/// At a lower rate (instructions per second) no Linux guest is usable. Hardware reaches billions, emulated hardware (nested
/// in an emulator) hundreds of millions, a software KVM half a million: this is the geometric middle of the last two.
const SLOWEST: f64 = 10e6;

/// Maximum number of measurements before the rate counts as too low: on a busy machine another process may have had the CPU
/// during the first one.
const TRIES: usize = 3;

/// A result: description, success, and the remedy if it failed.
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
        say!("{}", serde_json::to_string_pretty(&all)?)?;
    } else {
        for finding in &findings {
            let mark = if finding.well { "ok  " } else { "FAIL" };
            say!("{mark} {}: {}", finding.what, finding.text)?;
        }
        let verdict = if well { "can" } else { "can't" };
        say!("this machine {verdict} run Koya")?;
    }
    Ok(u8::from(!well))
}

fn look() -> Vec<Finding> {
    let mut findings = Vec::new();
    match kvm::open() {
        Ok(kvm) => findings.push(Finding {
            what: "kvm",
            well: true,
            text: format!(
                "{} is there, API 12, with all that is needed{}",
                kvm::DEVICE,
                kvm::host_features(&kvm).map_or(String::new(), |what| format!("; {what}"))
            ),
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
    findings.push(match fastest(measure) {
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
                 in software. Use a machine with hardware virtualization, or \
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
                "kernel {}{}, agent {}",
                files.kernel.display(),
                match koya::files::Files::full_kernel() {
                    Ok(full) => format!(" and {}", full.display()),
                    Err(_) => String::new(),
                },
                files.initramfs.display()
            ),
        },
        Err(error) => Finding {
            what: "files",
            well: false,
            text: error.to_string(),
        },
    });
    findings.push(programs());
    findings
}

/// Koya's other programs, by the names that engines use, each with its version option.
const PROGRAMS: [(&str, &str, &str); 2] = [
    (
        "containerd-shim-koya-v2",
        "-v",
        "for containerd, Docker and Kubernetes",
    ),
    ("koya-runtime", "--version", "for podman"),
];

/// Checks that Koya's other programs are installed, and have this version.
fn programs() -> Finding {
    let mut texts = Vec::new();
    let mut well = true;
    for (name, option, purpose) in PROGRAMS {
        let Some(path) = programs::find(name) else {
            // Without these engines, they are not needed.
            texts.push(format!("{name} ({purpose}) is not installed"));
            continue;
        };
        let asked = programs::command(&path).arg(option).output();
        let said = asked.map(|out| String::from_utf8_lossy(&out.stdout).into_owned());
        match said.as_deref().map(version_in) {
            Ok(Some(env!("CARGO_PKG_VERSION"))) => {
                texts.push(path.display().to_string());
            }
            Ok(version) => {
                well = false;
                texts.push(format!(
                    "{} is of version {}, this is {}: install both of one build",
                    path.display(),
                    version.unwrap_or("unknown"),
                    env!("CARGO_PKG_VERSION")
                ));
            }
            Err(error) => {
                well = false;
                texts.push(format!("{} does not start: {error}", path.display()));
            }
        }
    }
    Finding {
        what: "programs",
        well,
        text: texts.join("; "),
    }
}

/// The version in a program's version output: the last word of the first line.
fn version_in(said: &str) -> Option<&str> {
    said.lines().next()?.split_whitespace().last()
}

fn millions(rate: f64) -> String {
    format!("{:.1} million", rate / 1e6)
}

/// The highest of up to [`TRIES`] rates; stops at the first one that is high enough.
fn fastest(mut measure: impl FnMut() -> Result<f64, String>) -> Result<f64, String> {
    let mut best = 0.0_f64;
    for _ in 0..TRIES {
        best = best.max(measure()?);
        if best >= SLOWEST {
            break;
        }
    }
    Ok(best)
}

/// Instructions per second of a guest that only counts, without the time of an empty run.
fn measure() -> Result<f64, String> {
    let empty = time_of(1)?;
    let full = time_of(ROUNDS)?;
    let counting = full.saturating_sub(empty).max(Duration::from_micros(10));
    Ok(2.0 * f64::from(ROUNDS) / counting.as_secs_f64())
}

fn time_of(rounds: u32) -> Result<Duration, String> {
    let vm = Vm::builder(Spec::probe_guest(rounds))
        .start_paused()
        .map_err(|e| format!("a tiny guest can't be made: {e}"))?;
    let handle = vm.handle();
    let started = Instant::now();
    handle.resume();
    let reason = handle.wait_exit();
    let took = started.elapsed();
    drop(vm);
    match reason {
        ExitReason::Reset => Ok(took),
        other => Err(format!("a tiny guest failed: {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_the_programs_print_them() {
        assert_eq!(version_in("containerd-shim-koya-v2 0.1.0\n"), Some("0.1.0"));
        assert_eq!(
            version_in("koya-runtime version 0.1.0\ncommit: 0.1.0\n"),
            Some("0.1.0")
        );
        assert_eq!(version_in(""), None);
    }

    /// `fastest` of these rates, and the number of measurements.
    fn fastest_of(rates: &[f64]) -> (f64, usize) {
        let mut asked = 0;
        let best = fastest(|| {
            asked += 1;
            Ok(rates[asked - 1])
        });
        (best.unwrap(), asked)
    }

    #[test]
    fn one_slow_moment_is_not_the_machines_rate() {
        assert_eq!(fastest_of(&[4e6, 300e6]), (300e6, 2));
        assert_eq!(fastest_of(&[0.5e6, 0.6e6, 0.4e6]), (0.6e6, 3));
        assert_eq!(fastest_of(&[300e6]), (300e6, 1));
    }

    #[test]
    fn a_guest_that_fails_is_not_tried_again() {
        let mut asked = 0;
        let failed = fastest(|| {
            asked += 1;
            Err("no memory".into())
        });
        assert_eq!((failed, asked), (Err("no memory".into()), 1));
    }
}
