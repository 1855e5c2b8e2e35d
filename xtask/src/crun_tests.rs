//! `cargo xtask crun-tests`: crun's own tests (Python programs) with `koya-runtime` in crun's place, as root and without
//! systemd.

use crate::bats::{BatsArgs, Files, Project, RuntimeArgs};
use crate::{cache, proc, setup};
use anyhow::{Context, Result};
use clap::Args;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const PACKAGES: [(&str, &str); 2] = [
    ("python3", "runs the tests"),
    (
        "libc6-dev",
        "is what their container's program is linked with",
    ),
];

/// The program that their containers run, and the file that its build expects from crun's configuration.
const INIT: &str = "init.c";
const CONFIG: &str = "#define HAVE_ERROR_H 1
#define HAVE_LINUX_IOPRIO_H 1
#define HAVE_SECCOMP 1
";

/// Replaces Python's module of this name, which Debian does not package: the parts that the tests use.
const LIBMOUNT: &str = "class Mount:
    def __init__(self, fields):
        self.target, self.vfs_options, self.fs_options = fields[4], fields[5], fields[-1]


class Table:
    def __init__(self, mountinfo):
        with open(mountinfo) as lines:
            self.all = [Mount(line.split()) for line in lines if ' - ' in line]

    def find_target(self, path):
        return next((mount for mount in reversed(self.all) if mount.target == path), None)
";

/// Loaded by Python before a test: a wait for a connection that the runtime does not make, or for the end of a program, ends
/// as a failure of this test, and the next ones are run.
const LIMITS: &str = "import socket
import subprocess

LIMIT = 180
Popen = subprocess.Popen
wait, communicate = Popen.wait, Popen.communicate
Popen.wait = lambda self, timeout=None: wait(self, LIMIT if timeout is None else timeout)
Popen.communicate = lambda self, input=None, timeout=None: communicate(self, input, LIMIT if timeout is None else timeout)
socket.setdefaulttimeout(60)
";

/// Preparation in the rig: a runtime named crun, and a working directory on a disk, where the tests make their containers.
const PREPARE: &str = "mkdir -p /run/scratch/bin /run/scratch/tmp
ln -s \"$(command -v \"$4\")\" /run/scratch/bin/crun
export OCI_RUNTIME=/run/scratch/bin/crun INIT=\"$1/init\" TMPDIR=/run/scratch/tmp LANG=C PYTHONPATH=\"$1\"
cd /run/scratch
";

/// Tests of terminals are skipped unless standard output is one. Their output is passed on line by line, so that none is lost
/// with a rig that hangs.
const PYTHON: Files = Files {
    prefix: "test_",
    extension: ".py",
    run: "export RUN_TEST=\"/usr/bin/python3 $1/$2\"
[ -z \"$3\" ] || export RUN_TESTS=\"$3\"
script --quiet --return --command \"$RUN_TEST\" /dev/null | sed -u 's/\\r*$//'
",
};

#[derive(Args)]
pub(crate) struct CrunTestsArgs {
    #[command(flatten)]
    bats: BatsArgs,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

pub(crate) fn run(args: &CrunTestsArgs) -> Result<()> {
    setup::ensure_these(&PACKAGES)?;
    let project = Project {
        name: &args.runtime.results_of("crun-tests"),
        tests: tests(&args.bats.source)?,
        files: PYTHON,
        script: PREPARE,
        further: &|_| vec![args.runtime.runtime.clone()],
    };
    project.run(&args.bats)
}

/// crun's tests, with their program, built once.
fn tests(source: &Path) -> Result<PathBuf> {
    let tests = source.join("tests");
    let program = fs::read_to_string(tests.join(INIT))
        .with_context(|| format!("{} is no checkout of crun", source.display()))?;
    let mut texts = vec![
        program,
        CONFIG.to_owned(),
        LIBMOUNT.to_owned(),
        LIMITS.to_owned(),
    ];
    let mut files = Vec::new();
    for entry in fs::read_dir(&tests)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "py") {
            files.push(path);
        }
    }
    files.sort();
    for file in &files {
        texts.push(fs::read_to_string(file)?);
    }
    cache::ensure("crun-tests", &cache::key(&texts), |dir| {
        for file in &files {
            fs::copy(file, dir.join(file.file_name().unwrap_or_default()))?;
        }
        fs::write(dir.join("libmount.py"), LIBMOUNT)?;
        fs::write(dir.join("sitecustomize.py"), LIMITS)?;
        fs::write(dir.join("config.h"), CONFIG)?;
        let mut compiler = Command::new("gcc");
        compiler.args(["-O2", "-w", "-static", "-I"]).arg(dir);
        compiler.arg("-o").arg(dir.join("init"));
        proc::run(compiler.arg(tests.join(INIT)))
    })
}
