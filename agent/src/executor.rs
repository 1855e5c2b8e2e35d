//! The last step of a container's process: find the program and become it.
//!
//! libcontainer's own executor loses the reason when that fails, and a process that is added to a
//! container does not get the container's seccomp filter from it. Here both are seen to.

use koya_protocol::NOT_EXECUTABLE;
use libcontainer::capabilities::drop_privileges;
use libcontainer::seccomp::initialize_seccomp;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use oci_spec::runtime::{LinuxCapabilities, LinuxSeccomp, Spec};
use std::ffi::CString;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a shell says of a program that is not there, and of one that can't be run.
const NOT_FOUND: i32 = 127;
const CANNOT_RUN: i32 = 126;

/// Becomes the container's program.
#[derive(Clone, Default)]
pub(crate) struct Program {
    /// For a process that is added to a container: the container's filter, and the capabilities
    /// to keep, in this order, since the first needs what the second takes away.
    pub(crate) confinement: Option<Confinement>,
}

/// What libcontainer leaves to us for added processes.
#[derive(Clone)]
pub(crate) struct Confinement {
    pub(crate) seccomp: Option<LinuxSeccomp>,
    pub(crate) capabilities: Option<LinuxCapabilities>,
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
    Err((NOT_FOUND, format!("{name}: not found in PATH ({path})")))
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
            ExecutorValidationError::ArgValidationError(format!("{NOT_EXECUTABLE} {code}: {why};"))
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
        eprintln!("koya: {NOT_EXECUTABLE} {}: {error}", path.display());
        let missing = error.kind() == ErrorKind::NotFound;
        std::process::exit(if missing { NOT_FOUND } else { CANNOT_RUN });
    }
}

fn confine(confinement: &Confinement) -> Result<(), ExecutorError> {
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
