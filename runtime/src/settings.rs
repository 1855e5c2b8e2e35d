//! Settings of sandboxes under containerd and other engines: `/etc/koya/config.toml` and drop-ins.
//!
//! They are read for each sandbox. docs/configuration.md is generated from this file.

use crate::block_volume::{self, BlockVolume};
use crate::files::{FULL_KERNEL, Files};
use crate::{Cache, Error, SandboxConfig, Size, enable_core_scheduling};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The host's settings file.
pub const FILE: &str = "/etc/koya/config.toml";
/// Directory of further files, which end in `.toml` and are read after it, in the order of their names.
pub const DROP_INS: &str = "/etc/koya/config.d";
/// Prefix of pod annotations that are settings.
pub const ANNOTATIONS: &str = "io.koya.";

/// Keys that only the host's files can set: they are read before there is a pod, or determine what a pod can set.
const MACHINES_OWN: [&str; 2] = ["selinux", "annotations"];

/// The name in `annotations` that allows [`block_volume::ANNOTATION`].
const BLOCK_VOLUMES: &str = "block_volumes";

/// Defaults and limits of sandboxes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Virtual CPUs of a container without a CPU limit, 1 to 32. With a limit, as many as the limit requires.
    pub cpus: u32,
    /// Memory in MiB of a container without a memory limit, 32 or more. With a limit, that limit plus 32 MiB for the agent
    /// and the kernel's tables.
    pub memory_mib: u64,
    /// Maximum number of virtual CPUs of a sandbox, `cpus` to 32. Default: for a pod, the number of CPUs of the host;
    /// otherwise, the number at its start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus_max: Option<u32>,
    /// Maximum memory of a sandbox in MiB. Default: the memory of the host; on a host that does not overcommit memory
    /// (`vm.overcommit_memory` is 2), the memory at its start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_max_mib: Option<u64>,
    /// Whether guests have the Scalable Vector Extension (SVE) of an aarch64 host. A host without it refuses to start them.
    pub sve: bool,
    /// Cache policy of the guest for shared files: `never`, `auto`, `always` or `writeback` (docs/devices.md).
    #[cfg_attr(test, schemars(with = "String"))]
    pub cache: Cache,
    /// Whether processes of a sandbox's containers may open vsock sockets (AF_VSOCK). If not, Koya's guest kernel refuses
    /// them, also for privileged containers (docs/devices.md).
    pub vsock: bool,
    /// Whether the threads of a sandbox that serve the guest have the AppArmor profile in the configuration of its first
    /// container (`docs/containerd.md`).
    pub apparmor: bool,
    /// Whether the process of a sandbox has the SELinux label in the configuration of its first container, on a host with
    /// SELinux. Read from the host's files only: the process exists before containerd passes other settings.
    pub selinux: bool,
    /// Whether the threads of a sandbox that serve the guest are confined: a seccomp filter for each kind of thread, and no
    /// capabilities except those for serving files (`docs/security.md`). In the host's files, also whether its process
    /// gives up the privileges that it does not need.
    pub seccomp: bool,
    /// Whether a CPU core with several hyperthreads runs threads of only one sandbox at a time (core scheduling;
    /// docs/security.md). containerd's environment variable `SCHED_CORE` enables it, too.
    pub core_scheduling: bool,
    /// The guest kernel: a file, or `full` for `vmlinux-full` in the directories that are searched for Koya's files
    /// (docs/guest-kernel.md). Default: `vmlinux` there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// The agent's initramfs. Default: `initramfs` in the directories that are searched for Koya's files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// Kernel parameters appended to the guest kernel's command line.
    pub cmdline: String,
    /// The keys of this table that a pod may set for itself, by an annotation `io.koya.KEY`. Other annotations are
    /// refused by name. `block_volumes` allows the annotation `io.koya.block_volumes`, which requests block volumes for
    /// containers (docs/devices.md); their size on the host's disk is set by the annotation. `selinux` and `annotations`
    /// cannot be allowed.
    pub annotations: Vec<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            cpus: 1,
            memory_mib: 512,
            cpus_max: None,
            memory_max_mib: None,
            sve: false,
            cache: Cache::default(),
            vsock: false,
            apparmor: true,
            selinux: true,
            seccomp: true,
            core_scheduling: false,
            kernel: None,
            initramfs: None,
            cmdline: "quiet".into(),
            annotations: Vec::new(),
        }
    }
}

fn wrong(place: &str, reason: impl ToString) -> Error {
    Error::Settings {
        place: place.into(),
        reason: reason.to_string().trim_end().into(),
    }
}

impl Settings {
    /// The host's settings: those of [`FILE`] and the drop-ins.
    ///
    /// # Errors
    /// The file and key at fault.
    pub fn load() -> Result<Self, Error> {
        Self::read(&Self::files())
    }

    /// The host's settings files that exist.
    pub fn files() -> Vec<PathBuf> {
        let drop_ins = fs::read_dir(DROP_INS).into_iter().flatten().flatten();
        let mut drop_ins: Vec<PathBuf> = drop_ins.map(|entry| entry.path()).collect();
        drop_ins.retain(|path| path.extension().is_some_and(|e| e == "toml"));
        drop_ins.sort();
        let first = Path::new(FILE);
        let first = first.exists().then(|| first.to_owned());
        first.into_iter().chain(drop_ins).collect()
    }

    /// Reads settings from these files: later ones win, key by key.
    ///
    /// # Errors
    /// The file and key at fault.
    pub fn read(files: &[PathBuf]) -> Result<Self, Error> {
        let mut texts = Vec::new();
        for path in files {
            let place = path.display().to_string();
            let text = fs::read_to_string(path).map_err(|error| wrong(&place, error))?;
            texts.push((place, text));
        }
        Self::parse(&texts)
    }

    /// Parses settings from these texts, each with its origin: later ones win, key by key.
    ///
    /// # Errors
    /// The text and key at fault.
    pub fn parse(texts: &[(String, String)]) -> Result<Self, Error> {
        let mut all = toml::Table::new();
        let mut last = "the settings";
        for (place, text) in texts {
            let table: toml::Table = text.parse().map_err(|error| wrong(place, error))?;
            // Each text separately, so that an error names the right one.
            Self::deserialize(table.clone()).map_err(|error| wrong(place, error))?;
            all.extend(table);
            last = place;
        }
        let settings = Self::deserialize(all).map_err(|error| wrong(last, error))?;
        settings.check().map_err(|reason| wrong(last, reason))?;
        Ok(settings)
    }

    /// These settings with the annotations of a pod, where allowed.
    ///
    /// # Errors
    /// The annotation that is not allowed or has an invalid value.
    pub fn with_annotations<'a>(
        self,
        annotations: impl IntoIterator<Item = (&'a String, &'a String)>,
    ) -> Result<Self, Error> {
        let mut all = toml::Table::try_from(&self).map_err(|error| wrong("settings", error))?;
        let mut last = None;
        for (name, value) in annotations {
            let Some(key) = name.strip_prefix(ANNOTATIONS) else {
                continue;
            };
            self.allow(name, key)?;
            if name == block_volume::ANNOTATION {
                // This one is for a container, not for its sandbox.
                continue;
            }
            // Values that are not valid TOML are strings.
            let parsed = format!("value = {value}").parse::<toml::Table>();
            let parsed = parsed.ok().and_then(|mut table| table.remove("value"));
            let value = parsed.unwrap_or_else(|| toml::Value::String(value.clone()));
            let mut one = toml::Table::new();
            one.insert(key.into(), value);
            Self::deserialize(one.clone()).map_err(|error| wrong(name, error))?;
            all.extend(one);
            last = Some(name);
        }
        let Some(last) = last else {
            return Ok(self);
        };
        let settings = Self::deserialize(all).map_err(|error| wrong(last, error))?;
        settings.check().map_err(|reason| wrong(last, reason))?;
        Ok(settings)
    }

    /// The block volumes requested by the annotations of a container.
    ///
    /// # Errors
    /// If they are not allowed or invalid.
    pub fn block_volumes(
        &self,
        annotations: Option<&HashMap<String, String>>,
    ) -> Result<Vec<BlockVolume>, Error> {
        let name = block_volume::ANNOTATION;
        let Some(text) = annotations.and_then(|all| all.get(name)) else {
            return Ok(Vec::new());
        };
        self.allow(name, BLOCK_VOLUMES)?;
        let volumes = text.split_whitespace().map(str::parse);
        volumes.collect()
    }

    /// Checks that an annotation is allowed.
    fn allow(&self, name: &str, key: &str) -> Result<(), Error> {
        if self.annotations.iter().any(|allowed| allowed == key) {
            return Ok(());
        }
        let reason = format!("{key:?} is not among the `annotations` of {FILE}");
        Err(wrong(name, reason))
    }

    /// Checks that the types do not make.
    fn check(&self) -> Result<(), String> {
        let in_range = |key: &str, value: u64, least: u64, most: u64| {
            let fits = (least..=most).contains(&value);
            let reason = || format!("{key} = {value} is outside {least} to {most}");
            if fits { Ok(()) } else { Err(reason()) }
        };
        let most = koya_vmm::MAX_MEMORY_MIB;
        let cpus = u64::from(koya_vmm::MAX_CPUS);
        in_range("cpus", self.cpus.into(), 1, cpus)?;
        in_range(
            "memory_mib",
            self.memory_mib,
            koya_vmm::MIN_MEMORY_MIB,
            most,
        )?;
        if let Some(max) = self.cpus_max {
            in_range("cpus_max", max.into(), self.cpus.into(), cpus)?;
        }
        if let Some(max) = self.memory_max_mib {
            in_range("memory_max_mib", max, self.memory_mib, most)?;
        }
        for (key, path) in [("kernel", &self.kernel), ("initramfs", &self.initramfs)] {
            let named = path.as_ref().filter(|path| !path.is_file());
            match named {
                Some(name) if key == "kernel" && name.as_os_str() == FULL_KERNEL => {
                    Files::full_kernel().map_err(|error| format!("{key}: {error}"))?;
                }
                Some(path) => return Err(format!("{key}: there is no file {}", path.display())),
                None => {}
            }
        }
        let known = toml::Table::try_from(Self {
            cpus_max: Some(1),
            memory_max_mib: Some(1),
            kernel: Some(PathBuf::new()),
            initramfs: Some(PathBuf::new()),
            ..Self::default()
        });
        let known = known.unwrap_or_default();
        for key in &self.annotations {
            if !known.contains_key(key) && key != BLOCK_VOLUMES {
                return Err(format!("annotations: there is no key {key:?}"));
            }
            if MACHINES_OWN.contains(&key.as_str()) {
                return Err(format!("annotations: {key:?} cannot be allowed for pods"));
            }
        }
        Ok(())
    }

    /// Applies the process-wide settings (`core_scheduling`), which libraries leave to their program.
    ///
    /// # Errors
    /// If the host has no core scheduling.
    pub fn prepare_process(&self) -> Result<(), Error> {
        match self.core_scheduling {
            true => enable_core_scheduling().map_err(|error| wrong("core_scheduling", error)),
            false => Ok(()),
        }
    }

    /// The configuration of a sandbox of this size, with room for more memory; `grows` leaves room for more CPUs and disks,
    /// too.
    pub fn sandbox(&self, size: Size, grows: bool) -> SandboxConfig {
        let cpus_max = self.cpus_max.or_else(|| grows.then(host_cpus));
        // More CPUs than the host has, or than the maximum, are of no use.
        let most = cpus_max.unwrap_or(koya_vmm::MAX_CPUS).max(self.cpus);
        let cpus = size.cpus.unwrap_or(self.cpus).min(most);
        let memory_mib = size.memory_mib.unwrap_or(self.memory_mib);
        let memory_max_mib = self.memory_max_mib.or_else(room_for_memory);
        SandboxConfig {
            cpus,
            cpus_max: cpus_max.map(|max| max.max(cpus)),
            memory_mib,
            memory_max_mib: memory_max_mib.map(|max| max.max(memory_mib)),
            sve: self.sve,
            cache: self.cache,
            containers_vsock: self.vsock,
            confined: self.seccomp,
            kernel: self.kernel.clone(),
            initramfs: self.initramfs.clone(),
            cmdline: self.cmdline.clone(),
            // Volumes are attached with their containers.
            disk_slots: match grows {
                true => koya_vmm::MAX_DISK_SLOTS,
                false => SandboxConfig::default().disk_slots,
            },
            ..SandboxConfig::default()
        }
    }
}

/// Number of online CPUs: those that a process may use differ, and may change.
fn host_cpus() -> u32 {
    let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    let ranges = online.trim().split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(last.parse::<u32>().ok()? + 1 - first.parse::<u32>().ok()?)
    });
    ranges.sum::<u32>().clamp(1, koya_vmm::MAX_CPUS)
}

/// Memory of the host in MiB. `None` if it does not overcommit: then address space counts as memory in use
/// (Linux, mm/overcommit-accounting).
fn room_for_memory() -> Option<u64> {
    let policy = fs::read_to_string("/proc/sys/vm/overcommit_memory").unwrap_or_default();
    if policy.trim() == "2" {
        return None;
    }
    let host = rustix::system::sysinfo();
    let bytes = (host.totalram as u64).saturating_mul(host.mem_unit.into());
    Some((bytes >> 20).min(koya_vmm::MAX_MEMORY_MIB))
}

/// In the format of a settings file.
impl std::fmt::Display for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = toml::to_string(self).map_err(|_| std::fmt::Error)?;
        f.write_str(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(texts: &[(&str, &str)]) -> Result<Settings, String> {
        let texts = texts.iter();
        let texts: Vec<_> = texts
            .map(|(place, text)| ((*place).to_owned(), (*text).to_owned()))
            .collect();
        Settings::parse(&texts).map_err(|error| error.to_string())
    }

    #[test]
    fn volumes_of_annotations_are_allowed_by_name() {
        let asked = HashMap::from([(
            block_volume::ANNOTATION.to_owned(),
            "/var/lib/docker:size=1g /data".to_owned(),
        )]);
        let refused = Settings::default();
        let error = refused.block_volumes(Some(&asked)).unwrap_err().to_string();
        assert!(error.contains("\"block_volumes\" is not among"), "{error}");
        assert!(refused.clone().with_annotations(&asked).is_err());
        let allowed = parse(&[("a", "annotations = ['block_volumes']")]).unwrap();
        let volumes = allowed.block_volumes(Some(&asked)).unwrap();
        assert_eq!((volumes.len(), volumes[0].size), (2, 1 << 30));
        assert_eq!(allowed.clone().with_annotations(&asked).unwrap(), allowed);
        assert_eq!(allowed.block_volumes(None).unwrap(), []);
    }

    #[test]
    fn later_files_win_and_what_is_wrong_is_named() {
        let settings = parse(&[("a", "cpus = 2\nmemory_mib = 300"), ("b", "cpus = 3")]).unwrap();
        assert_eq!((settings.cpus, settings.memory_mib), (3, 300));
        for (text, named) in [
            ("cpsu = 2", "cpsu"),
            ("cpus = 0", "cpus = 0"),
            ("memory_mib = \"512\"", "memory_mib"),
            ("memory_max_mib = 100", "memory_max_mib"),
            ("kernel = \"/not/there\"", "/not/there"),
            ("annotations = [\"cpsu\"]", "cpsu"),
            ("annotations = [\"selinux\"]", "selinux"),
            ("annotations = [\"cpus\", \"annotations\"]", "annotations"),
            ("cache = \"some\"", "some"),
        ] {
            let error = parse(&[("/etc/x.toml", text)]).unwrap_err();
            assert!(
                error.contains("/etc/x.toml") && error.contains(named),
                "{error}"
            );
        }
    }

    #[test]
    fn pods_set_what_they_may() {
        let settings = parse(&[("a", "annotations = [\"memory_mib\", \"cache\"]")]).unwrap();
        let with = |name: &str, value: &str| {
            let annotations = [(name.to_owned(), value.to_owned())];
            let annotations = HashMap::from(annotations);
            settings
                .clone()
                .with_annotations(&annotations)
                .map_err(|e| e.to_string())
        };
        assert_eq!(with("io.koya.memory_mib", "700").unwrap().memory_mib, 700);
        assert_eq!(
            with("io.koya.cache", "always").unwrap().cache,
            Cache::Always
        );
        assert_eq!(with("other.org/cpus", "7").unwrap(), settings);
        let refused = with("io.koya.cpus", "7").unwrap_err();
        assert!(refused.contains("io.koya.cpus"), "{refused}");
        let broken = with("io.koya.memory_mib", "much").unwrap_err();
        assert!(broken.contains("io.koya.memory_mib"), "{broken}");
        assert!(with("io.koya.memory_mib", "1").is_err());
    }

    #[test]
    fn containers_open_vsock_sockets_only_where_that_is_asked_for() {
        let sandbox = |settings: Settings| settings.sandbox(Size::default(), true);
        assert!(!sandbox(parse(&[("a", "")]).unwrap()).containers_vsock);
        assert!(sandbox(parse(&[("a", "vsock = true")]).unwrap()).containers_vsock);
        let annotations = HashMap::from([("io.koya.vsock".to_owned(), "true".to_owned())]);
        let refused = parse(&[("a", "")]).unwrap().with_annotations(&annotations);
        assert!(refused.unwrap_err().to_string().contains("vsock"));
        let allowed = parse(&[("a", "annotations = [\"vsock\"]")]).unwrap();
        assert!(sandbox(allowed.with_annotations(&annotations).unwrap()).containers_vsock);
    }

    #[test]
    fn what_is_printed_is_read_again() {
        let settings = parse(&[("a", "cpus = 2\ncpus_max = 4\ncache = \"never\"")]).unwrap();
        assert_eq!(parse(&[("b", &settings.to_string())]).unwrap(), settings);
    }

    /// `KOYA_WRITE_DOCS=1 cargo test -p koya settings` regenerates it.
    #[test]
    fn the_reference_page_is_made_from_this_file() {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
        let text = fs::read_to_string(&page).unwrap();
        let (before, rest) = text.split_once("<!-- keys -->\n").unwrap();
        let (_, after) = rest.split_once("<!-- end -->\n").unwrap();
        let made = format!("{before}<!-- keys -->\n{}<!-- end -->\n{after}", table());
        if std::env::var_os("KOYA_WRITE_DOCS").is_some() {
            fs::write(&page, &made).unwrap();
        }
        assert_eq!(fs::read_to_string(&page).unwrap(), made);
    }

    fn table() -> String {
        let schema = schemars::schema_for!(Settings).to_value();
        let defaults = serde_json::to_value(Settings::default()).unwrap();
        // In the order of the code.
        let source = include_str!("settings.rs");
        let mut keys: Vec<_> = schema["properties"].as_object().unwrap().iter().collect();
        keys.sort_by_key(|(key, _)| source.find(&format!("pub {key}:")));
        let mut table = String::from("| key | type | default | what |\n|---|---|---|---|\n");
        for (key, about) in keys {
            let kind = match &about["type"] {
                serde_json::Value::Array(kinds) => kinds[0].clone(),
                kind => kind.clone(),
            };
            let kind = match kind.as_str().unwrap() {
                "array" => "list of strings",
                kind => kind,
            };
            let default = match defaults.get(key) {
                Some(value) => format!("`{value}`"),
                None => "none".into(),
            };
            let what = about["description"].as_str().unwrap().replace('\n', " ");
            table += &format!("| `{key}` | {kind} | {default} | {what} |\n");
        }
        table
    }
}
