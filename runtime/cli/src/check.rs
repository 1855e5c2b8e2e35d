//! `koya check`: checks whether this machine can run Koya, by running a tiny guest.

use super::Outcome;
use super::output::say;
use super::programs;
use clap::Args;
use koya::vmm::{ExitReason, Spec, Vm, kvm};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[derive(Args)]
pub(super) struct CheckArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Iterations of the tiny guest's loop of two instructions at first: 0.1 ms on hardware, a fraction of a second if each
/// instruction is emulated.
const ROUNDS: u32 = 60_000;

/// A run has to take this many times as long as that of a guest which does nothing: on emulated hosts, the latter takes
/// milliseconds, and not always the same number of them.
const LEAST_MULTIPLE: u32 = 4;

/// Factor by which a run that was too short is repeated, and the limit: seconds on an emulated host.
const GROWTH: u32 = 8;
const MAX_ROUNDS: u32 = ROUNDS * GROWTH.pow(4);

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
    let findings = run_checks();
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

impl Finding {
    fn of(what: &'static str, checked: Result<String, String>) -> Self {
        let (well, text) = match checked {
            Ok(text) => (true, text),
            Err(text) => (false, text),
        };
        Self { what, well, text }
    }
}

/// Checks everything that a sandbox needs; without KVM, nothing else.
fn run_checks() -> Vec<Finding> {
    let kvm = Finding::of("kvm", check_kvm());
    if !kvm.well {
        return vec![kvm];
    }
    vec![
        kvm,
        Finding::of("guest", check_speed()),
        Finding::of("files", check_files()),
        programs(),
    ]
}

fn check_kvm() -> Result<String, String> {
    let kvm = kvm::open().map_err(|error| error.to_string())?;
    let features = kvm::host_features(&kvm).map_or(String::new(), |what| format!("; {what}"));
    Ok(format!(
        "{} is there, API 12, with all that is needed{features}",
        kvm::DEVICE
    ))
}

/// Checks that KVM runs a guest, and fast enough for Linux.
fn check_speed() -> Result<String, String> {
    let rate = fastest(measure)?;
    let shown = millions(rate);
    match rate >= SLOWEST {
        true => Ok(format!("a tiny guest ran {shown} instructions a second")),
        false => Err(format!(
            "a tiny guest ran only {shown} instructions a second: this KVM emulates guest kernels in software. Use a machine \
             with hardware virtualization, or `cargo xtask rig` for an emulated one"
        )),
    }
}

fn check_files() -> Result<String, String> {
    let files = koya::files::Files::find(None, None).map_err(|error| error.to_string())?;
    let full = koya::files::Files::full_kernel();
    let full = full.map_or(String::new(), |full| format!(" and {}", full.display()));
    Ok(format!(
        "kernel {}{full}, agent {}",
        files.kernel.display(),
        files.initramfs.display()
    ))
}

/// One of Koya's other programs, by the name that engines use.
struct Program {
    name: &'static str,
    /// Option that prints its version.
    version: &'static str,
    purpose: &'static str,
    /// The consequence if it is not on the usual search path.
    elsewhere: &'static str,
}

const PROGRAMS: [Program; 2] = [
    Program {
        name: "containerd-shim-koya-v2",
        version: "-v",
        purpose: "for containerd, Docker and Kubernetes",
        elsewhere: "containerd and Docker do not find it unless that directory is on their PATH",
    },
    Program {
        name: "koya-runtime",
        version: "--version",
        purpose: "for podman",
        elsewhere: "engines need its whole path",
    },
];

/// Checks that Koya's other programs are installed, and have this version.
fn programs() -> Finding {
    let found = PROGRAMS.map(|program| {
        let beside = programs::beside(program.name);
        about(&program, beside, programs::find(program.name), version_of)
    });
    let texts: Vec<_> = found
        .iter()
        .flatten()
        .map(|(_, text)| text.as_str())
        .collect();
    Finding {
        what: "programs",
        well: found.iter().flatten().all(|(well, _)| *well),
        text: texts.join("; "),
    }
}

/// Texts on the program beside this one and on that of the search path, usually the same, each with whether all is well.
fn about(
    program: &Program,
    beside: Option<PathBuf>,
    on_path: Option<PathBuf>,
    version_of: impl Fn(&Path, &str) -> Result<String, String>,
) -> Vec<(bool, String)> {
    let mut places: Vec<PathBuf> = beside.into_iter().collect();
    if let Some(path) = &on_path
        && !places.iter().any(|place| is_same(place, path))
    {
        places.push(path.clone());
    }
    if places.is_empty() {
        // Without these engines, they are not needed.
        let Program { name, purpose, .. } = program;
        return vec![(true, format!("{name} ({purpose}) is not installed"))];
    }
    let texts = places.into_iter().map(|place| {
        let at = place.display();
        match version_of(&place, program.version) {
            Ok(version) if version == env!("CARGO_PKG_VERSION") => {
                let text = match on_path {
                    Some(_) => at.to_string(),
                    None => format!("{at} ({})", program.elsewhere),
                };
                (true, text)
            }
            Ok(version) => {
                let own = env!("CARGO_PKG_VERSION");
                let text = format!(
                    "{at} is of version {version}, this is {own}: install both of one build"
                );
                (false, text)
            }
            Err(error) => (false, format!("{at} does not start: {error}")),
        }
    });
    texts.collect()
}

/// Whether two paths lead to one file.
fn is_same(a: &Path, b: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().ok();
    a == b || real(a).is_some_and(|one| real(b) == Some(one))
}

fn version_of(program: &Path, option: &str) -> Result<String, String> {
    let asked = programs::command(program).arg(option).output();
    let said = asked.map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&said.stdout);
    Ok(version_in(&said).unwrap_or("unknown").to_owned())
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

/// Instructions per second of a guest that only counts.
fn measure() -> Result<f64, String> {
    rate(time_of)
}

/// The rate without the time of an empty run: from a run long enough for that time not to matter.
fn rate(mut time_of: impl FnMut(u32) -> Result<Duration, String>) -> Result<f64, String> {
    let mut rounds = ROUNDS;
    let mut empty = Duration::MAX;
    loop {
        empty = empty.min(time_of(1)?);
        let full = time_of(rounds)?;
        if full >= empty.saturating_mul(LEAST_MULTIPLE) || rounds >= MAX_ROUNDS {
            let counting = full.saturating_sub(empty);
            if counting.is_zero() {
                return Err(format!(
                    "a tiny guest took no longer for {rounds} rounds ({full:?}) than for one: \
                     try again when the machine is less busy"
                ));
            }
            return Ok(2.0 * f64::from(rounds) / counting.as_secs_f64());
        }
        rounds = rounds.saturating_mul(GROWTH).min(MAX_ROUNDS);
    }
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

    /// What is said of a program at these places, all of one version.
    fn said_of(beside: Option<&str>, on_path: Option<&str>, version: &str) -> Vec<(bool, String)> {
        let [beside, on_path] = [beside, on_path].map(|path| path.map(PathBuf::from));
        about(&PROGRAMS[0], beside, on_path, |_, _| Ok(version.to_owned()))
    }

    #[test]
    fn a_program_is_found_beside_this_one_and_on_the_search_path() {
        let own = env!("CARGO_PKG_VERSION");
        let said = said_of(None, None, own);
        assert!(said[0].0 && said[0].1.ends_with("is not installed"));
        let said = said_of(Some("/opt/shim"), None, own);
        assert!(
            said[0].0 && said[0].1.contains("unless that directory"),
            "{said:?}"
        );
        for (beside, on_path) in [
            (Some("/bin/shim"), Some("/bin/shim")),
            (None, Some("/bin/shim")),
        ] {
            let said = said_of(beside, on_path, own);
            assert_eq!(said, [(true, "/bin/shim".to_owned())]);
        }
        // Engines start the one on the search path, whichever is beside.
        let said = said_of(Some("/opt/shim"), Some("/bin/shim"), "0.0.0");
        assert_eq!(said.len(), 2);
        for ((well, text), place) in said.iter().zip(["/opt/shim", "/bin/shim"]) {
            assert!(!well && text.starts_with(place), "{text}");
            assert!(text.contains("is of version 0.0.0"), "{text}");
        }
    }

    /// `rate` on a machine where a guest takes `start` beyond its instructions, and the number of runs.
    fn rate_with(start: Duration, per_second: f64) -> (Result<f64, String>, usize) {
        let mut runs = 0;
        let rate = rate(|rounds| {
            runs += 1;
            // The empty runs, every other one, take twice as long to start.
            let start = if runs % 2 == 0 { start / 2 } else { start };
            Ok(start + Duration::from_secs_f64(2.0 * f64::from(rounds) / per_second))
        });
        (rate, runs)
    }

    #[test]
    fn the_start_of_a_guest_is_not_counted() {
        for (start, per_second) in [
            (Duration::from_micros(100), 3e9),
            (Duration::from_millis(30), 200e6),
            (Duration::from_millis(5), 0.5e6),
        ] {
            let (rate, runs) = rate_with(start, per_second);
            let error = (rate.unwrap() / per_second - 1.0).abs();
            assert!(error < 0.5 && runs <= 10, "{error} after {runs} runs");
        }
        // As slow a KVM as there is needs no second run.
        assert_eq!(rate_with(Duration::from_millis(5), 0.5e6).1, 2);
    }

    #[test]
    fn a_time_that_is_none_is_no_rate() {
        let refused = rate(|_| Ok(Duration::from_millis(1))).unwrap_err();
        assert!(refused.contains("less busy"), "{refused}");
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
