//! The last step of a container's process: find the program and become it.
//!
//! libcontainer's own executor loses the reason when that fails, and a process that is added to a
//! container does not get all of its confinement from it. Here both are seen to.

use crate::affinity::Affinity;
use crate::cgroup;
use crate::console;
use crate::privileges::Privileges;
use crate::start_hooks::StartHooks;
use koya_protocol::Refused;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use oci_spec::runtime::Spec;
use rustix::fs::{Access, AtFlags, CWD, FileType, Uid, accessat, fchown, fstat};
use rustix::io::Errno;
use rustix::termios::isatty;
use std::ffi::CString;
use std::fs::File;
use std::io::{ErrorKind, PipeReader, PipeWriter, Read as _, Write as _, stderr, stdin, stdout};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a shell says of a program that is not there, and of one that can't be run.
const NOT_FOUND: i32 = 127;
pub(crate) const CANNOT_RUN: i32 = 126;

/// How much of a reason is told, in characters: less than what a pipe holds, so that who tells it does not wait.
const MAX_REASON: usize = 2048;

/// Becomes the container's program.
#[derive(Clone)]
pub(crate) struct Program {
    /// To the helper, which reads why the program can't be run once libcontainer has failed.
    reason: Arc<PipeWriter>,
    /// For a process that is added to a container, before it gives up its privileges, which all of it needs.
    confinement: Option<Confinement>,
    /// What libcontainer leaves for the process itself to give up.
    privileges: Privileges,
    /// What runs before the program of a container.
    hooks: Option<StartHooks>,
}

/// What the helper reads.
pub(crate) struct Reason(PipeReader);

impl Reason {
    /// Why the program can't be run, if that is why libcontainer has failed.
    pub(crate) fn read(mut self) -> Option<Refused> {
        // Whoever else has the other end says nothing any more.
        rustix::io::ioctl_fionbio(&self.0, true).ok()?;
        let mut bytes = Vec::new();
        // Ends with an error where there is no more, since the other end is open.
        self.0.read_to_end(&mut bytes).ok();
        serde_json::from_slice(&bytes).ok()
    }
}

impl Program {
    pub(crate) fn new(
        confinement: Option<Confinement>,
        privileges: Privileges,
    ) -> std::io::Result<(Self, Reason)> {
        let (reader, writer) = std::io::pipe()?;
        let program = Self {
            reason: Arc::new(writer),
            confinement,
            privileges,
            hooks: None,
        };
        Ok((program, Reason(reader)))
    }

    /// A container's own, which these run before.
    pub(crate) fn after(self, hooks: Option<StartHooks>) -> Self {
        Self { hooks, ..self }
    }

    /// In the container's own process, which shares the pipe with the helper.
    fn tell(&self, exit_status: i32, reason: &str) {
        let told = Refused::NotExecutable {
            exit_status,
            reason: reason.chars().take(MAX_REASON).collect(),
        };
        if let Ok(text) = serde_json::to_vec(&told) {
            (&*self.reason).write_all(&text).ok();
        }
    }
}

/// What libcontainer leaves to us for added processes.
#[derive(Clone)]
pub(crate) struct Confinement {
    /// The files by which it joins the container's control group.
    pub(crate) groups: Vec<Arc<File>>,
    /// The CPUs to have in there.
    pub(crate) affinity: Affinity,
    /// The user whose its streams are.
    pub(crate) uid: u32,
    /// How its terminal is to be, if it has one: nothing else holds it back until that is set.
    pub(crate) terminal: Option<console::Settings>,
}

/// The program's path, or the exit status and reason that a shell would give.
fn find(spec: &Spec) -> Result<PathBuf, (i32, String)> {
    let process = spec.process().as_ref();
    let args = process.and_then(|p| p.args().as_ref());
    let Some(name) = args.and_then(|a| a.first()).filter(|n| !n.is_empty()) else {
        return Err((NOT_FOUND, "no command was given".into()));
    };
    if name.contains('/') {
        return usable(Path::new(name)).map_err(|(code, why)| match code {
            // As runc and crun begin it.
            CANNOT_RUN => (code, format!("exec {name}: {why}")),
            _ => (code, format!("{name}: {why}")),
        });
    }
    let env = process.and_then(|p| p.env().as_ref());
    let path = env
        // Of several the process has the last one.
        .and_then(|e| e.iter().rev().find_map(|v| v.strip_prefix("PATH=")))
        .unwrap_or(DEFAULT_PATH);
    let mut denied = false;
    for directory in path.split(':') {
        match usable(&Path::new(directory).join(name)) {
            Ok(found) => return Ok(found),
            Err((code, _)) => denied |= code == CANNOT_RUN,
        }
    }
    if denied {
        return Err((CANNOT_RUN, format!("exec {name}: permission denied")));
    }
    // Docker takes its exit status from these words, which are runc's.
    Err((
        NOT_FOUND,
        format!("{name}: executable file not found in $PATH ({path})"),
    ))
}

fn usable(path: &Path) -> Result<PathBuf, (i32, String)> {
    match path.metadata() {
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Err((NOT_FOUND, "no such file or directory".into()))
        }
        Err(e) => Err((CANNOT_RUN, e.to_string())),
        // podman and Docker take the exit status from the first words.
        Ok(data) if data.is_dir() => {
            Err((CANNOT_RUN, "permission denied: it is a directory".into()))
        }
        Ok(data) if data.permissions().mode() & 0o111 == 0 || is_denied(path) => {
            Err((CANNOT_RUN, "permission denied".into()))
        }
        Ok(_) => Ok(path.to_path_buf()),
    }
}

/// Whether this user may not run a program: further on in PATH there may be one that it may. What a filter of system
/// calls does not let us ask for is found out by trying.
fn is_denied(path: &Path) -> bool {
    accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS) == Err(Errno::ACCESS)
}

/// Why a program that is there is not found: what the kernel misses is what it names to be run by.
fn missing(path: &Path) -> Option<String> {
    // As much as the kernel looks at (BINPRM_BUF_SIZE).
    let mut start = Vec::new();
    File::open(path)
        .ok()?
        .take(256)
        .read_to_end(&mut start)
        .ok()?;
    if start.starts_with(b"\x7fELF") {
        return Some("the loader that it names is not there".into());
    }
    let line = start
        .strip_prefix(b"#!")?
        .split(|byte| *byte == b'\n')
        .next()?;
    let is_blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    let mut words = line.split(is_blank).filter(|word| !word.is_empty());
    let interpreter = String::from_utf8_lossy(words.next()?);
    // A carriage return at its end, as editors on Windows leave it, is to be seen.
    Some(format!("its interpreter {interpreter:?} is not there"))
}

/// What execve(2) refused, as runc says it, and what of the program is missing.
fn cannot_execute(path: &Path, error: &std::io::Error, lacks: Option<&str>) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let (first, rest) = text.split_at(text.len().min(1));
    let why = format!("{}{rest}", first.to_lowercase());
    let lacks = lacks.map_or_else(String::new, |lacks| format!(": {lacks}"));
    format!("exec {}: {why}{lacks}", path.display())
}

impl Executor for Program {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let found = match &self.confinement {
            Some(_) => self.privileges.as_if_given_up(|| find(spec)),
            // It may wait for its start for long, seen by others.
            None => {
                let given_up = self.privileges.give_up();
                given_up.map_err(|e| ExecutorValidationError::ArgValidationError(e.to_string()))?;
                find(spec)
            }
        };
        found.map(drop).map_err(|(code, why)| {
            self.tell(code, &why);
            ExecutorValidationError::ArgValidationError(why)
        })
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        if let Some(confinement) = &self.confinement {
            let confined = confine(confinement).and_then(|()| self.privileges.give_up());
            if let Err(ExecutorError::Other(why)) = &confined {
                // As below.
                eprintln!("koya: {why}");
            }
            confined?;
        }
        if let Some(Err(error)) = self.hooks.as_ref().map(StartHooks::run) {
            // As below.
            eprintln!("koya: {error:#}");
            std::process::exit(1);
        }
        // As its user, who may run less than what was validated.
        let path = find(spec).map_err(|(code, why)| {
            self.tell(code, &why);
            ExecutorError::Other(why)
        })?;
        let args: Vec<CString> = spec
            .process()
            .iter()
            .flat_map(|p| p.args().iter().flatten())
            .filter_map(|a| CString::new(a.as_str()).ok())
            .collect();
        let c_path = CString::new(path.as_os_str().as_encoded_bytes())
            .map_err(|_| ExecutorError::InvalidArg)?;
        let error = crate::sys::exec(&c_path, &args);
        let is_missing = error.kind() == ErrorKind::NotFound;
        let lacks = is_missing.then(|| missing(&path)).flatten();
        // Nobody listens any more but who reads the program's own output.
        eprintln!("{}", cannot_execute(&path, &error, lacks.as_deref()));
        std::process::exit(if is_missing { NOT_FOUND } else { CANNOT_RUN });
    }
}

/// A process's streams are its user's, who may open them by other names (/dev/stdout), as runc has it: pipes and
/// terminals that were made for it, and no devices. In a user namespace what is not its own stays as it is.
pub(crate) fn give_streams(uid: u32) {
    let streams = [
        stdin().as_fd().try_clone_to_owned(),
        stdout().as_fd().try_clone_to_owned(),
        stderr().as_fd().try_clone_to_owned(),
    ];
    for stream in streams.into_iter().flatten() {
        let is_its_own = fstat(&stream).is_ok_and(|found| {
            FileType::from_raw_mode(found.st_mode) == FileType::Fifo || isatty(&stream)
        });
        if is_its_own {
            fchown(&stream, Some(Uid::from_raw(uid)), None).ok();
        }
    }
}

fn confine(confinement: &Confinement) -> Result<(), ExecutorError> {
    let doors = confinement.groups.iter().map(|door| &**door);
    cgroup::join(doors).map_err(|e| {
        let pid = std::process::id();
        ExecutorError::Other(format!("adding pid {pid} to cgroups: {e}"))
    })?;
    let kept = confinement.affinity.end();
    kept.map_err(|e| ExecutorError::Other(format!("{e:#}")))?;
    give_streams(confinement.uid);
    if let Some(settings) = &confinement.terminal {
        let set = settings.apply(stdin());
        set.map_err(|e| ExecutorError::Other(format!("terminal: {e:#}")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_helper_reads_why_a_program_cannot_be_run() {
        let (program, reason) = Program::new(None, Privileges::default()).unwrap();
        let spec = |args: &str| -> Spec {
            let text = format!(
                r#"{{"ociVersion":"1.0.2","process":{{"cwd":"/","user":{{"uid":0,"gid":0}},"args":["{args}"],"env":["PATH=/none"]}}}}"#
            );
            serde_json::from_str(&text).unwrap()
        };
        assert!(program.validate(&spec("nope")).is_err());
        let told = Refused::NotExecutable {
            exit_status: NOT_FOUND,
            reason: "nope: executable file not found in $PATH (/none)".into(),
        };
        assert_eq!(reason.read(), Some(told));
        // Nothing was told, though the other end is still open.
        let (program, reason) = Program::new(None, Privileges::default()).unwrap();
        assert!(program.validate(&spec("/proc/self/exe")).is_ok());
        assert_eq!(reason.read(), None);
        let (program, reason) = Program::new(None, Privileges::default()).unwrap();
        program.tell(CANNOT_RUN, &"x".repeat(1 << 20));
        assert!(matches!(
            reason.read(),
            Some(Refused::NotExecutable {
                exit_status: CANNOT_RUN,
                ..
            })
        ));
    }

    fn spec_of(program: &str, env: &[String]) -> Spec {
        let process = serde_json::json!({"cwd": "/", "user": {"uid": 0, "gid": 0}, "args": [program], "env": env});
        serde_json::from_value(serde_json::json!({"ociVersion": "1.0.2", "process": process}))
            .unwrap()
    }

    /// moby/moby 29420, docker/cli 3993.
    #[test]
    fn what_a_program_lacks_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let lacks = |content: &[u8]| {
            let path = dir.path().join("program");
            std::fs::write(&path, content).unwrap();
            missing(&path)
        };
        let named = |name: &str| Some(format!("its interpreter {name} is not there"));
        assert_eq!(lacks(b"#!/bin/none -e\nexit"), named("\"/bin/none\""));
        assert_eq!(lacks(b"#! \t/bin/sh\r\n"), named(r#""/bin/sh\r""#));
        assert_eq!(lacks(b"#!/x"), named("\"/x\""));
        assert!(lacks(b"\x7fELF\x02").unwrap().contains("loader"));
        for other in [&b""[..], b"#!", b"#! \n", b"text"] {
            assert_eq!(lacks(other), None);
        }
        assert_eq!(missing(&dir.path().join("nothing")), None);
        let said = |error, lacks| {
            let error = std::io::Error::from_raw_os_error(error);
            cannot_execute(Path::new("/run.sh"), &error, lacks)
        };
        let expected = "exec /run.sh: no such file or directory: its loader";
        assert_eq!(said(libc::ENOENT, Some("its loader")), expected);
        let expected = "exec /run.sh: exec format error";
        assert_eq!(said(libc::ENOEXEC, None), expected);
    }

    /// apple/container 1212; opencontainers/runc 3926.
    #[test]
    fn a_program_is_looked_for_in_the_path_that_it_gets() {
        let dir = tempfile::tempdir().unwrap();
        let program = |place: &str, mode: u32| {
            let at = dir.path().join(place);
            std::fs::create_dir(&at).unwrap();
            std::fs::write(at.join("tool"), "").unwrap();
            std::fs::set_permissions(at.join("tool"), std::fs::Permissions::from_mode(mode))
                .unwrap();
            at.to_str().unwrap().to_owned()
        };
        let (first, second, closed) = (
            program("1", 0o755),
            program("2", 0o755),
            program("3", 0o644),
        );
        let found = |env: &[String]| find(&spec_of("tool", env)).unwrap();
        let both = [format!("PATH={first}"), format!("PATH={second}")];
        assert_eq!(found(&both), Path::new(&second).join("tool"));
        assert_eq!(
            found(&[format!("PATH={closed}:{first}")]),
            Path::new(&first).join("tool")
        );
        let (status, why) = find(&spec_of(&first, &[])).unwrap_err();
        let directory = format!("exec {first}: permission denied: it is a directory");
        assert_eq!((status, why), (CANNOT_RUN, directory));
        let (status, why) = find(&spec_of("tool", &[format!("PATH={closed}")])).unwrap_err();
        assert_eq!(
            (status, why.as_str()),
            (CANNOT_RUN, "exec tool: permission denied")
        );
    }
}
