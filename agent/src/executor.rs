//! The last step of a container's process: finding the program and executing it.
//!
//! libcontainer's own executor loses the reason of a failure, and does not apply all of the confinement to exec processes.
//! This one does both.

use crate::affinity::Affinity;
use crate::cgroup;
use crate::console;
use crate::privileges::Privileges;
use crate::start_hooks::StartHooks;
use crate::user_namespace::UserNamespace;
use koya_protocol::ErrorReason;
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

/// A shell's exit status for a missing program, and for one that can't be executed.
const NOT_FOUND: i32 = 127;
pub(crate) const CANNOT_RUN: i32 = 126;

/// Maximum length of a reason in characters: less than the capacity of a pipe, so that writing it does not block.
const MAX_REASON: usize = 2048;

/// Executes the container's program.
#[derive(Clone)]
pub(crate) struct Program {
    /// Pipe to the helper, which reads the reason of a failure after libcontainer has returned.
    reason: Arc<PipeWriter>,
    /// For an exec process, applied before it gives up its privileges, which this requires.
    confinement: Option<Confinement>,
    /// Privileges that libcontainer leaves to the process to give up.
    privileges: Privileges,
    /// Hooks that run before the program of a container.
    hooks: Option<StartHooks>,
}

/// The helper's end of the pipe.
pub(crate) struct Reason(PipeReader);

impl Reason {
    /// The reason why the program can't be executed, if there is one.
    pub(crate) fn read(mut self) -> Option<ErrorReason> {
        // Other holders of the other end write nothing any more.
        rustix::io::ioctl_fionbio(&self.0, true).ok()?;
        let mut bytes = Vec::new();
        // Ends with an error at the end of the data, since the other end is still open.
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

    /// The program of a container, after these hooks.
    pub(crate) fn after(self, hooks: Option<StartHooks>) -> Self {
        Self { hooks, ..self }
    }

    /// Called in the container's process, which shares the pipe with the helper.
    fn report_failure(&self, exit_status: i32, reason: &str) {
        let told = ErrorReason::NotExecutable {
            exit_status,
            reason: reason.chars().take(MAX_REASON).collect(),
        };
        if let Ok(text) = serde_json::to_vec(&told) {
            (&*self.reason).write_all(&text).ok();
        }
    }
}

/// Confinement of exec processes that libcontainer does not apply.
#[derive(Clone)]
pub(crate) struct Confinement {
    /// The files by which it joins the container's control group.
    pub(crate) groups: Vec<Arc<File>>,
    /// The CPU affinity in that group.
    pub(crate) affinity: Affinity,
    /// The user that owns its streams, as mapped by the container's user namespace.
    pub(crate) uid: u32,
    /// The container's user namespace, if it has one.
    pub(crate) users: Option<UserNamespace>,
    /// Settings of its terminal, if it has one: it must not start before they are set.
    pub(crate) terminal: Option<console::Settings>,
}

/// Finds the program; on failure returns the exit status and reason of a shell.
fn find(spec: &Spec) -> Result<PathBuf, (i32, String)> {
    let process = spec.process().as_ref();
    let args = process.and_then(|p| p.args().as_ref());
    let Some(name) = args.and_then(|a| a.first()).filter(|n| !n.is_empty()) else {
        return Err((NOT_FOUND, "no command was given".into()));
    };
    if name.contains('/') {
        return usable(Path::new(name)).map_err(|(code, why)| match code {
            // The prefix used by runc and crun.
            CANNOT_RUN => (code, format!("exec {name}: {why}")),
            _ => (code, format!("{name}: {why}")),
        });
    }
    let env = process.and_then(|p| p.env().as_ref());
    let path = env
        // Of several, the last one counts.
        .and_then(|e| e.iter().rev().find_map(|v| v.strip_prefix("PATH=")))
        .unwrap_or(DEFAULT_PATH);
    let mut unusable = None;
    // An empty entry is not the current directory, unlike in a shell: runc and crun find no program by it.
    for directory in path.split(':').filter(|directory| !directory.is_empty()) {
        match usable(&Path::new(directory).join(name)) {
            Ok(found) => return Ok(found),
            Err((CANNOT_RUN, why)) => _ = unusable.get_or_insert(why),
            Err(_) => {}
        }
    }
    if let Some(why) = unusable {
        return Err((CANNOT_RUN, format!("exec {name}: {why}")));
    }
    // Docker derives its exit status from this wording, which is runc's.
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
        Err(e) if e.kind() == ErrorKind::PermissionDenied => {
            Err((CANNOT_RUN, "permission denied".into()))
        }
        Err(e) => Err((CANNOT_RUN, e.to_string())),
        // podman and Docker derive the exit status from the first words.
        Ok(data) if data.is_dir() => {
            Err((CANNOT_RUN, "permission denied: it is a directory".into()))
        }
        Ok(data) if data.permissions().mode() & 0o111 == 0 || is_denied(path) => {
            Err((CANNOT_RUN, "permission denied".into()))
        }
        Ok(_) => Ok(path.to_path_buf()),
    }
}

/// Whether this user may not execute a program: a later directory in PATH may contain one that it may. If a seccomp filter
/// denies the check, the program is tried.
fn is_denied(path: &Path) -> bool {
    accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS) == Err(Errno::ACCESS)
}

/// Why an existing program is reported as missing: the kernel did not find its loader or interpreter.
fn missing(path: &Path) -> Option<String> {
    // The part read by the kernel (BINPRM_BUF_SIZE).
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
    // Quoted, so that a carriage return at its end, from an editor on Windows, is visible.
    Some(format!("its interpreter {interpreter:?} is not there"))
}

/// Error message for a failed execve(2) in runc's wording, with the missing part of the program.
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
            Some(_) => self.privileges.with_dropped_privileges(|| find(spec)),
            // The process may wait for its start for a long time, visible to others.
            None => {
                let given_up = self.privileges.drop_all();
                given_up.map_err(|e| ExecutorValidationError::ArgValidationError(e.to_string()))?;
                find(spec)
            }
        };
        found.map(drop).map_err(|(code, why)| {
            self.report_failure(code, &why);
            ExecutorValidationError::ArgValidationError(why)
        })
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        if let Some(confinement) = &self.confinement {
            let confined = confine(confinement).and_then(|()| self.privileges.drop_all());
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
        // Repeated with the final user, who may have fewer permissions than at the validation.
        let path = find(spec).map_err(|(code, why)| {
            self.report_failure(code, &why);
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
        // The error can now only be printed to the program's own output.
        eprintln!("{}", cannot_execute(&path, &error, lacks.as_deref()));
        std::process::exit(if is_missing { NOT_FOUND } else { CANNOT_RUN });
    }
}

/// Gives the streams of a process to its user, who may open them by other names (/dev/stdout), as runc does: only pipes and
/// terminals created for it, not devices. In a user namespace, foreign files stay as they are.
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
    let files = confinement.groups.iter().map(|file| &**file);
    cgroup::join(files).map_err(|e| {
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
    let entered = confinement
        .users
        .as_ref()
        .map_or(Ok(()), UserNamespace::enter);
    entered.map_err(|e| ExecutorError::Other(format!("user namespace: {e}")))
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
        let told = ErrorReason::NotExecutable {
            exit_status: NOT_FOUND,
            reason: "nope: executable file not found in $PATH (/none)".into(),
        };
        assert_eq!(reason.read(), Some(told));
        // No reason was written, and the other end is still open.
        let (program, reason) = Program::new(None, Privileges::default()).unwrap();
        assert!(program.validate(&spec("/proc/self/exe")).is_ok());
        assert_eq!(reason.read(), None);
        let (program, reason) = Program::new(None, Privileges::default()).unwrap();
        program.report_failure(CANNOT_RUN, &"x".repeat(1 << 20));
        assert!(matches!(
            reason.read(),
            Some(ErrorReason::NotExecutable {
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
        // A file of the current directory, without an executable bit: it is not even found.
        for path in ["PATH=", "PATH=:/none:"] {
            let (status, _) = find(&spec_of("Cargo.toml", &[path.into()])).unwrap_err();
            assert_eq!(status, NOT_FOUND, "{path}");
        }
        let (status, why) = find(&spec_of(&first, &[])).unwrap_err();
        let directory = format!("exec {first}: permission denied: it is a directory");
        assert_eq!((status, why), (CANNOT_RUN, directory));
        let (status, why) = find(&spec_of("tool", &[format!("PATH={closed}")])).unwrap_err();
        assert_eq!(
            (status, why.as_str()),
            (CANNOT_RUN, "exec tool: permission denied")
        );
        let looped = dir.path().join("4");
        std::fs::create_dir(&looped).unwrap();
        std::os::unix::fs::symlink("tool", looped.join("tool")).unwrap();
        let path = format!("PATH={}:{closed}", looped.display());
        let (status, why) = find(&spec_of("tool", &[path])).unwrap_err();
        assert_eq!(status, CANNOT_RUN);
        assert!(why.starts_with("exec tool: Too many levels"), "{why}");
    }
}
