//! Duration of `ctr run` under Koya, runc and crun, alternating, with the steps of Koya's start.
//!
//! `containers ROUNDS DIRECTORY`: DIRECTORY contains containerd and ctr. Run by `cargo xtask bench containers`, in the rig.
//! Rows are printed as JSON on standard output, and a table on standard error.

use koya_benches::{median, print_table, row};
use serde_json::Value;
use std::error::Error;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The compared runtimes: name, and options of ctr.
const RUNTIMES: &[(&str, &[&str])] = &[
    ("koya", &["--runtime", "io.containerd.koya.v2"]),
    ("runc", &["--runtime", "io.containerd.runc.v2"]),
    (
        "crun",
        &[
            "--runtime",
            "io.containerd.runc.v2",
            "--runc-binary",
            "/usr/bin/crun",
        ],
    ),
];
/// The steps reported by the shim, in order.
const STEPS: &[&str] = &[
    "devices", "machine", "kernel", "agent", "settings", "create", "start",
];
/// Time limit for the start of containerd.
const LIMIT: Duration = Duration::from_secs(60);

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let [_, rounds, directory] = args.as_slice() else {
        return Err("say ROUNDS DIRECTORY".into());
    };
    let rounds: u32 = rounds.parse()?;
    let containerd = Containerd::start(Path::new(directory))?;
    let mut times = vec![Vec::new(); RUNTIMES.len()];
    for round in 0..=rounds {
        for (runtime, times) in RUNTIMES.iter().zip(&mut times) {
            let took = containerd.run(runtime.1, &format!("{}-{round}", runtime.0))?;
            // The first of each fills caches.
            if round > 0 {
                eprintln!("round {round}: {}: {took:.1} ms", runtime.0);
                times.push(took);
            }
        }
    }
    let rows = rows(&times, &fs::read_to_string(containerd.dir.join("log"))?);
    print_table(&rows);
    println!("{}", serde_json::to_string_pretty(&rows)?);
    Ok(())
}

fn rows(times: &[Vec<f64>], log: &str) -> Vec<Value> {
    let [koya, peers @ ..] = times else {
        return Vec::new();
    };
    let whole = median(koya);
    let beside = RUNTIMES[1..].iter().zip(peers);
    let beside = beside.map(|((name, _), times)| ((*name).to_owned(), median(times)));
    let mut rows = vec![row("ctr run: to its end", "ms", true, whole, beside)];
    let mut known = 0.0;
    for step in STEPS {
        // The first start is not counted, as above.
        let values: Vec<f64> = steps(log, step).skip(1).collect();
        if !values.is_empty() {
            known += median(&values);
            rows.push(row(
                &format!("of it {step}"),
                "ms",
                true,
                median(&values),
                [],
            ));
        }
    }
    let rest = "of it ctr, containerd, the shim, and the end";
    rows.push(row(rest, "ms", true, whole - known, []));
    rows
}

/// Parses the shim's log line: `the start of NAME: devices 3.1 ms, machine 20.4 ms, ...`.
fn steps<'a>(log: &'a str, step: &'a str) -> impl Iterator<Item = f64> + 'a {
    let lines = log
        .lines()
        .filter_map(|line| line.split_once("the start of "));
    let parts = lines.flat_map(|(_, rest)| rest.split_once(": ").into_iter());
    let parts = parts.flat_map(|(_, parts)| parts.split(", "));
    parts.filter_map(move |part| {
        let value = part.strip_prefix(step)?.trim().strip_suffix(" ms")?;
        value.parse().ok()
    })
}

struct Containerd {
    dir: PathBuf,
    bin: PathBuf,
    rootfs: PathBuf,
    daemon: Child,
}

impl Containerd {
    fn start(bin: &Path) -> Result<Self> {
        // On the rig's disk, if there is one.
        let base = match Path::new("/run/scratch").is_dir() {
            true => PathBuf::from("/run/scratch"),
            false => std::env::temp_dir(),
        };
        let dir = base.join(format!("koya-bench-{}", std::process::id()));
        let rootfs = dir.join("rootfs");
        fs::create_dir_all(rootfs.join("bin"))?;
        fs::copy("/bin/busybox", rootfs.join("bin/busybox"))?;
        for name in ["sh", "true", "echo"] {
            symlink("busybox", rootfs.join("bin").join(name))?;
        }
        let at = dir.display();
        let config = format!(
            "version = 2\nroot = \"{at}/root\"\nstate = \"{at}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \
             \"io.containerd.internal.v1.opt\"]\n[grpc]\naddress = \"{at}/c.sock\"\n"
        );
        fs::write(dir.join("config.toml"), config)?;
        let log = File::create(dir.join("log"))?;
        let path = std::env::var("PATH")?;
        let daemon = Command::new(bin.join("containerd"))
            .arg("--config")
            .arg(dir.join("config.toml"))
            .env("PATH", format!("{}:{path}", bin.display()))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let containerd = Self {
            dir,
            bin: bin.into(),
            rootfs,
            daemon,
        };
        let started = Instant::now();
        while !containerd.ctr(&["version"]).output()?.status.success() {
            if started.elapsed() > LIMIT {
                return Err("containerd does not come".into());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(containerd)
    }

    fn ctr(&self, args: &[&str]) -> Command {
        let mut ctr = Command::new(self.bin.join("ctr"));
        ctr.arg("--address").arg(self.dir.join("c.sock")).args(args);
        ctr.stdin(Stdio::null());
        ctr
    }

    /// Duration of `ctr run` in milliseconds.
    fn run(&self, runtime: &[&str], name: &str) -> Result<f64> {
        let mut ctr = self.ctr(&["run", "--rm", "--env", "PATH=/bin"]);
        ctr.args(runtime).arg("--rootfs").arg(&self.rootfs);
        ctr.args([name, "/bin/echo", "hello"]);
        let started = Instant::now();
        let output = ctr.output()?;
        let took = started.elapsed();
        if output.stdout != b"hello\n" {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("{name}: {}: {said}", output.status).into());
        }
        Ok(took.as_secs_f64() * 1e3)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.daemon.kill().ok();
        self.daemon.wait().ok();
        fs::remove_dir_all(&self.dir).ok();
    }
}
