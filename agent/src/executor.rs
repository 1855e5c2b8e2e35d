//! The last step of a container's process: find the program and become it.
//!
//! libcontainer's own executor loses the reason when that fails, and a process that is added to a
//! container does not get the container's seccomp filter from it. Here both are seen to.

use crate::cgroup;
use koya_protocol::Refused;
use libcontainer::capabilities::drop_privileges;
use libcontainer::seccomp::initialize_seccomp;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use oci_spec::runtime::{LinuxCapabilities, LinuxSeccomp, Spec};
use rustix::fs::{FileType, Uid, fchown, fstat};
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
const CANNOT_RUN: i32 = 126;

/// How much of a reason is told, in characters: less than what a pipe holds, so that who tells it does not wait.
const MAX_REASON: usize = 2048;

/// Becomes the container's program.
#[derive(Clone)]
pub(crate) struct Program {
    /// To the helper, which reads why the program can't be run once libcontainer has failed.
    reason: Arc<PipeWriter>,
    /// For a process that is added to a container: the container's control group, its filter, and the
    /// capabilities to keep, in this order, since each needs what the next takes away.
    confinement: Option<Confinement>,
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
    pub(crate) fn new(confinement: Option<Confinement>) -> std::io::Result<(Self, Reason)> {
        let (reader, writer) = std::io::pipe()?;
        let program = Self {
            reason: Arc::new(writer),
            confinement,
        };
        Ok((program, Reason(reader)))
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
    pub(crate) seccomp: Option<LinuxSeccomp>,
    pub(crate) capabilities: Option<LinuxCapabilities>,
    /// The user whose its streams are.
    pub(crate) uid: u32,
}

/// The program's path, or the exit status and reason that a shell would give.
fn find(spec: &Spec) -> Result<PathBuf, (i32, String)> {
    let process = spec.process().as_ref();
    let args = process.and_then(|p| p.args().as_ref());
    let Some(name) = args.and_then(|a| a.first()).filter(|n| !n.is_empty()) else {
        return Err((NOT_FOUND, "no command was given".into()));
    };
    if name.contains('/') {
        return usable(Path::new(name)).map_err(|(code, why)| (code, format!("{name}: {why}")));
    }
    let env = process.and_then(|p| p.env().as_ref());
    let path = env
        .and_then(|e| e.iter().find_map(|v| v.strip_prefix("PATH=")))
        .unwrap_or(DEFAULT_PATH);
    let mut denied = false;
    for directory in path.split(':') {
        match usable(&Path::new(directory).join(name)) {
            Ok(found) => return Ok(found),
            Err((code, _)) => denied |= code == CANNOT_RUN,
        }
    }
    if denied {
        return Err((CANNOT_RUN, format!("{name}: permission denied")));
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
        Ok(data) if data.is_dir() => Err((CANNOT_RUN, "is a directory".into())),
        Ok(data) if data.permissions().mode() & 0o111 == 0 => {
            Err((CANNOT_RUN, "permission denied".into()))
        }
        Ok(_) => Ok(path.to_path_buf()),
    }
}

impl Executor for Program {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        find(spec).map(drop).map_err(|(code, why)| {
            self.tell(code, &why);
            ExecutorValidationError::ArgValidationError(why)
        })
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        if let Some(confinement) = &self.confinement {
            confine(confinement)?;
        }
        let path = find(spec).map_err(|(_, why)| ExecutorError::Other(why))?;
        let args: Vec<CString> = spec
            .process()
            .iter()
            .flat_map(|p| p.args().iter().flatten())
            .filter_map(|a| CString::new(a.as_str()).ok())
            .collect();
        let c_path = CString::new(path.as_os_str().as_encoded_bytes())
            .map_err(|_| ExecutorError::InvalidArg)?;
        let error = crate::sys::exec(&c_path, &args);
        // Nobody listens any more but who reads the program's own output.
        eprintln!("koya: cannot execute {}: {error}", path.display());
        let missing = error.kind() == ErrorKind::NotFound;
        std::process::exit(if missing { NOT_FOUND } else { CANNOT_RUN });
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
    cgroup::join(doors)
        .map_err(|e| ExecutorError::Other(format!("the container's control group: {e}")))?;
    give_streams(confinement.uid);
    if let Some(seccomp) = &confinement.seccomp {
        initialize_seccomp(seccomp).map_err(|e| ExecutorError::Other(format!("seccomp: {e}")))?;
    }
    if let Some(capabilities) = &confinement.capabilities {
        let syscall = create_syscall();
        drop_privileges(capabilities, syscall.as_ref())
            .map_err(|e| ExecutorError::Other(format!("capabilities: {e}")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_helper_reads_why_a_program_cannot_be_run() {
        let (program, reason) = Program::new(None).unwrap();
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
        let (program, reason) = Program::new(None).unwrap();
        assert!(program.validate(&spec("/proc/self/exe")).is_ok());
        assert_eq!(reason.read(), None);
        let (program, reason) = Program::new(None).unwrap();
        program.tell(CANNOT_RUN, &"x".repeat(1 << 20));
        assert!(matches!(
            reason.read(),
            Some(Refused::NotExecutable {
                exit_status: CANNOT_RUN,
                ..
            })
        ));
    }
}
