//! Checks whether a container's program exists, as far as the host can tell.
//!
//! Only the guest knows for certain, but the container may be created in it only at `start`, and podman derives the exit
//! statuses 126 and 127 from the errors of `create`. So `create` checks, and reports nothing where it could be wrong: where
//! a mount, a hook or an image may provide the program.

use anyhow::{Result, bail};
use koya::DEFAULT_PATH;
use koya::oci_spec::runtime::Mount;
use koya_tasks::Spec;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

/// The kernel's limit (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// File systems with contents from the kernel, without links to programs.
const KERNELS: [&str; 7] = [
    "cgroup", "cgroup2", "devpts", "mqueue", "proc", "sysfs", "tmpfs",
];

/// The result of looking up a path of the container.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Found {
    /// An executable file.
    Usable,
    /// Does not exist.
    Nothing,
    /// Exists, but can't be executed.
    Unusable(&'static str),
    /// Only the guest knows.
    Unknown,
}

/// Checks that the program of a container exists. `bundle` is the directory of its configuration.
///
/// # Errors
/// If it certainly does not exist or can't be executed; in runc's wording, by which callers distinguish the two.
pub(crate) fn check(spec: &Spec, bundle: &Path) -> Result<()> {
    let config = spec.config();
    let Some(process) = config.process() else {
        return Ok(());
    };
    let hooks = config.hooks().as_ref();
    let has_hooks = hooks.is_some_and(|hooks| {
        let lists = [
            hooks.prestart(),
            hooks.create_runtime(),
            hooks.create_container(),
            hooks.start_container(),
        ];
        lists.into_iter().flatten().any(|list| !list.is_empty())
    });
    let (Some(root), false) = (config.root(), has_hooks) else {
        return Ok(());
    };
    let name = process.args().iter().flatten().next();
    let Some(name) = name.filter(|name| !name.is_empty()) else {
        return Ok(());
    };
    let mounts = config.mounts().iter().flatten();
    let Some(tree) = Tree::new(bundle.join(root.path()), mounts) else {
        return Ok(());
    };
    if name.contains('/') {
        return match tree.find(&process.cwd().join(name)) {
            Found::Nothing => bail!("{name}: no such file or directory"),
            Found::Unusable(why) => bail!("exec {name}: {why}"),
            Found::Usable | Found::Unknown => Ok(()),
        };
    }
    let env = process.env().iter().flatten();
    // Of several, the last one counts.
    let path = env
        .filter_map(|entry| entry.strip_prefix("PATH="))
        .next_back();
    let path = path.unwrap_or(DEFAULT_PATH);
    // An empty entry is not the current directory, as with runc.
    let entries = path.split(':').filter(|entry| !entry.is_empty());
    let places = entries.map(|dir| process.cwd().join(dir).join(name));
    let found: Vec<_> = places.map(|place| tree.find(&place)).collect();
    if found.contains(&Found::Usable) || found.contains(&Found::Unknown) {
        return Ok(());
    }
    if found.iter().any(|one| *one != Found::Nothing) {
        bail!("exec {name}: permission denied");
    }
    bail!("{name}: executable file not found in $PATH ({path})");
}

/// Checks, like runc, that proc and sysfs are mounted on directories of the root, and not through a symbolic link.
///
/// # Errors
/// The mount that is not.
pub(crate) fn check_mount_points(spec: &Spec, bundle: &Path) -> Result<()> {
    let Some(root) = spec.config().root() else {
        return Ok(());
    };
    for mount in spec.config().mounts().iter().flatten() {
        let kind = mount.typ().as_deref().unwrap_or_default();
        let within = mount.destination().strip_prefix("/");
        let within = within.unwrap_or(mount.destination());
        let place = bundle.join(root.path()).join(within);
        let is_other = || place.symlink_metadata().is_ok_and(|data| !data.is_dir());
        if matches!(kind, "proc" | "sysfs") && is_other() {
            bail!("filesystem {kind:?} must be mounted on ordinary directory");
        }
    }
    Ok(())
}

/// A container's root file system on the host, without the mounts in it.
struct Tree {
    root: PathBuf,
    /// Paths of mount points.
    mounts: Vec<PathBuf>,
    /// Mount points with arbitrary contents, which may include links.
    foreign: Vec<PathBuf>,
}

impl Tree {
    /// `None` if the root is not a directory, or mount points can't be determined.
    fn new<'a>(root: PathBuf, mounts: impl Iterator<Item = &'a Mount>) -> Option<Self> {
        let mut tree = Self {
            root,
            mounts: Vec::new(),
            foreign: Vec::new(),
        };
        if !tree.root.is_dir() {
            return None;
        }
        for mount in mounts {
            let place = tree.resolve(mount.destination(), &tree.foreign)?;
            let kind = mount.typ().as_deref().unwrap_or_default();
            if !KERNELS.contains(&kind) {
                tree.foreign.push(place.clone());
            }
            tree.mounts.push(place);
        }
        Some(tree)
    }

    fn find(&self, path: &Path) -> Found {
        let Some(place) = self.resolve(path, &self.mounts) else {
            return Found::Unknown;
        };
        match self.at(&place).symlink_metadata() {
            Ok(data) if data.is_dir() => Found::Unusable("permission denied: it is a directory"),
            Ok(data) if data.permissions().mode() & 0o111 == 0 => {
                Found::Unusable("permission denied")
            }
            Ok(_) => Found::Usable,
            Err(error) => match error.kind() {
                ErrorKind::NotFound | ErrorKind::NotADirectory => Found::Nothing,
                _ => Found::Unknown,
            },
        }
    }

    fn at(&self, place: &Path) -> PathBuf {
        self.root.join(place)
    }

    /// Resolves symbolic links in a path relative to the root; missing components are kept as they are. `None` if the path
    /// enters one of `mounts`, or can't be resolved.
    fn resolve(&self, path: &Path, mounts: &[PathBuf]) -> Option<PathBuf> {
        let mut left: VecDeque<OsString> = parts(path);
        let mut place = PathBuf::new();
        let mut links = 0;
        loop {
            if mounts.contains(&place) {
                return None;
            }
            let Some(part) = left.pop_front() else {
                return Some(place);
            };
            if part == ".." {
                place.pop();
                continue;
            }
            place.push(part);
            let data = match self.at(&place).symlink_metadata() {
                Ok(data) => data,
                Err(error) if is_absent(error.kind()) => continue,
                Err(_) => return None,
            };
            if data.is_symlink() {
                links += 1;
                let target = self.at(&place).read_link().ok()?;
                if links > MAX_LINKS {
                    return None;
                }
                place.pop();
                if target.is_absolute() {
                    place.clear();
                }
                for part in parts(&target).into_iter().rev() {
                    left.push_front(part);
                }
            }
        }
    }
}

fn is_absent(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// The components of a path, including `..`.
fn parts(path: &Path) -> VecDeque<OsString> {
    let parts = path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    });
    parts.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::fs;
    use std::os::unix::fs::symlink;

    /// A bundle with `/bin/sh`, `/bin/data`, which is not executable, and the link `/usr/bin` to `/bin`.
    fn bundle(change: impl FnOnce(&mut Value, &Path)) -> Result<(), String> {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("rootfs");
        fs::create_dir_all(root.join("bin")).unwrap();
        fs::create_dir_all(root.join("usr")).unwrap();
        fs::write(root.join("bin/sh"), "").unwrap();
        fs::write(root.join("bin/data"), "").unwrap();
        let executable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(root.join("bin/sh"), executable).unwrap();
        symlink("/bin", root.join("usr/bin")).unwrap();
        let mut config = json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": {"cwd": "/", "user": {"uid": 0, "gid": 0}, "args": ["sh"], "env": ["PATH=/usr/bin"]},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        });
        change(&mut config, &root);
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let spec = Spec::read(dir.path()).unwrap();
        let checked = check_mount_points(&spec, dir.path());
        let checked = checked.and_then(|()| check(&spec, dir.path()));
        checked.map_err(|error| error.to_string())
    }

    fn runs(program: &str) -> Result<(), String> {
        bundle(|config, _| config["process"]["args"] = json!([program]))
    }

    #[test]
    fn a_program_is_found_as_in_the_guest() {
        for program in [
            "sh",
            "/bin/sh",
            "/usr/bin/sh",
            "bin/sh",
            "usr/../bin/sh",
            "",
        ] {
            assert_eq!(runs(program), Ok(()), "{program}");
        }
    }

    #[test]
    fn of_several_paths_the_last_one_counts() {
        let with = |env: Value| bundle(|config, _| config["process"]["env"] = env);
        assert_eq!(with(json!(["PATH=/none", "PATH=/bin"])), Ok(()));
        let said = with(json!(["PATH=/bin", "PATH=/none"])).unwrap_err();
        assert!(said.ends_with("not found in $PATH (/none)"), "{said}");
    }

    /// podman recognizes 127 and 126 by this wording.
    #[test]
    fn one_that_is_not_there_is_told_in_runcs_words() {
        let cases = [
            (
                "nope",
                "nope: executable file not found in $PATH (/usr/bin)",
            ),
            ("/nope", "/nope: no such file or directory"),
            ("/bin/sh/x", "/bin/sh/x: no such file or directory"),
            ("data", "exec data: permission denied"),
            ("/usr/bin/data", "exec /usr/bin/data: permission denied"),
            ("/bin", "exec /bin: permission denied: it is a directory"),
        ];
        for (program, why) in cases {
            assert_eq!(runs(program), Err(why.into()), "{program}");
        }
    }

    #[test]
    fn nothing_is_said_where_only_the_guest_knows() {
        let hook = json!([{"path": "/bin/true"}]);
        type Change<'a> = &'a dyn Fn(&mut Value, &Path);
        let cases: [Change<'_>; 8] = [
            // A mount at the program, above it, and above it through a link.
            &|c, _| c["mounts"][0] = json!({"destination": "/usr/bin/nope", "type": "tmpfs"}),
            &|c, _| c["mounts"][0] = json!({"destination": "/usr", "type": "tmpfs"}),
            &|c, root| {
                symlink("../bin", root.join("usr/sbin")).unwrap();
                c["mounts"][0] = json!({"destination": "/usr/sbin", "type": "tmpfs"});
            },
            // A mount that may contain a link, and one at the place of that link.
            &|c, _| {
                c["mounts"] = json!([
                    {"destination": "/a", "type": "bind", "source": "/a"},
                    {"destination": "/a/x", "type": "bind", "source": "/x"},
                ]);
            },
            &|c, _| c["hooks"] = json!({"createContainer": hook}),
            &|c, _| c["hooks"] = json!({"startContainer": hook}),
            // An image, and an endless chain of links.
            &|c, _| c["root"]["path"] = "rootfs/bin/data".into(),
            &|c, root| {
                symlink("loop", root.join("loop")).unwrap();
                c["process"]["args"][0] = "/loop".into();
            },
        ];
        for (index, change) in cases.into_iter().enumerate() {
            let said = bundle(|config, root| {
                config["process"]["args"] = json!(["nope"]);
                change(config, root);
            });
            assert_eq!(said, Ok(()), "{index}");
        }
    }

    #[test]
    fn proc_is_mounted_on_a_directory() {
        let directory = bundle(|_, root| fs::create_dir(root.join("proc")).unwrap());
        assert_eq!(directory, Ok(()));
        let link = bundle(|_, root| symlink("/bin", root.join("proc")).unwrap());
        let expected = "filesystem \"proc\" must be mounted on ordinary directory";
        assert_eq!(link, Err(expected.into()));
    }

    /// Nothing outside the root is accessed.
    #[test]
    fn links_lead_nowhere_else() {
        let said = bundle(|config, root| {
            symlink("/etc/passwd", root.join("bin/passwd")).unwrap();
            symlink("../../../../../bin", root.join("up")).unwrap();
            config["process"]["args"] = json!(["/bin/passwd"]);
        });
        assert_eq!(said, Err("/bin/passwd: no such file or directory".into()));
    }
}
