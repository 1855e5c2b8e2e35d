//! System call filters of containers: Koya's default, or a profile in the format of Docker and podman
//! (`seccomp/default.json`), converted to the OCI format for one container.

use crate::Error;
use crate::json::or_null;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

/// Maximum size of a profile in bytes; Docker's has some 15 KiB.
const MAX_PROFILE: u64 = 1 << 20;

/// The system call filter of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Seccomp {
    /// All system calls except those that are useless in a container and reach deep into the guest kernel. A privileged
    /// container may make all.
    #[default]
    Default,
    /// All system calls.
    Unconfined,
    /// The system calls of a profile.
    Profile(Profile),
}

/// A profile in Docker's format, read and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    top: Map<String, Value>,
    architectures: Vec<String>,
    rules: Vec<Rule>,
}

/// One entry of a profile's `syscalls`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Rule {
    /// A single system call, as in profiles from before Docker 17.
    name: Option<String>,
    #[serde(default, deserialize_with = "or_null")]
    names: Vec<String>,
    action: String,
    errno_ret: Option<u32>,
    args: Option<Vec<Argument>>,
    #[serde(default, deserialize_with = "or_null")]
    includes: Condition,
    #[serde(default, deserialize_with = "or_null")]
    excludes: Condition,
    // For readers; podman also writes the name of `errnoRet`.
    #[serde(default, rename = "comment")]
    _comment: Option<String>,
    #[serde(default, rename = "errno")]
    _errno: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Argument {
    index: u32,
    value: u64,
    #[serde(default, deserialize_with = "or_null")]
    value_two: u64,
    op: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Condition {
    #[serde(default, deserialize_with = "or_null")]
    caps: Vec<String>,
    #[serde(default, deserialize_with = "or_null")]
    arches: Vec<String>,
    /// Satisfied by every guest kernel of Koya: profiles ask for 4.8 at most.
    min_kernel: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mapped {
    architecture: String,
    #[serde(default, deserialize_with = "or_null")]
    sub_architectures: Vec<String>,
}

/// Names of this architecture in profiles: Go's and libseccomp's.
fn native() -> (&'static str, &'static str) {
    match std::env::consts::ARCH {
        "aarch64" => ("arm64", "SCMP_ARCH_AARCH64"),
        _ => ("amd64", "SCMP_ARCH_X86_64"),
    }
}

impl Profile {
    /// Reads a profile.
    ///
    /// # Errors
    /// If the file can't be read or contains unknown parts: a filter must not be applied partially.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let wrong =
            |why: String| Error::invalid("seccomp profile", format!("{}: {why}", path.display()));
        let by = || Error::invalid_by("seccomp profile", path.display().to_string());
        // Not by its size: it may be a pipe of a shell, or a device without an end.
        let mut text = Vec::new();
        let file = File::open(path).map_err(by())?;
        let read = file.take(MAX_PROFILE + 1).read_to_end(&mut text);
        read.map_err(by())?;
        if text.len() as u64 > MAX_PROFILE {
            return Err(wrong(format!("it has more than {MAX_PROFILE} bytes")));
        }
        Self::parse(&text).map_err(wrong)
    }

    fn parse(text: &[u8]) -> Result<Self, String> {
        let mut top: Map<String, Value> =
            serde_json::from_slice(text).map_err(|e| e.to_string())?;
        let mut take = |name: &str| top.remove(name).unwrap_or(Value::Null);
        let rules: Option<Vec<Rule>> =
            serde_json::from_value(take("syscalls")).map_err(|e| format!("syscalls: {e}"))?;
        let mut rules = rules.unwrap_or_default();
        for rule in &mut rules {
            match (rule.name.take(), rule.names.is_empty()) {
                (Some(name), true) => rule.names.push(name),
                (Some(name), false) => {
                    return Err(format!("syscalls: a rule has both name ({name}) and names"));
                }
                (None, _) => {}
            }
        }
        let map: Option<Vec<Mapped>> =
            serde_json::from_value(take("archMap")).map_err(|e| format!("archMap: {e}"))?;
        let plain: Option<Vec<String>> = serde_json::from_value(take("architectures"))
            .map_err(|e| format!("architectures: {e}"))?;
        take("defaultErrno");
        for name in top.keys() {
            if !["defaultAction", "defaultErrnoRet", "flags"].contains(&name.as_str()) {
                return Err(format!("{name} is not supported"));
            }
        }
        if !top.contains_key("defaultAction") {
            return Err("defaultAction is missing".into());
        }
        let mapped = map.unwrap_or_default().into_iter();
        let mapped = mapped
            .filter(|m| m.architecture == native().1)
            .flat_map(|m| [vec![m.architecture], m.sub_architectures].concat());
        Ok(Self {
            top,
            architectures: plain
                .unwrap_or_default()
                .into_iter()
                .chain(mapped)
                .collect(),
            rules,
        })
    }

    fn for_capabilities(&self, capabilities: &[String]) -> Value {
        let applies = |rule: &&Rule| {
            let has = |cap: &String| capabilities.contains(cap);
            let here = |arch: &String| arch == native().0;
            let (includes, excludes) = (&rule.includes, &rule.excludes);
            includes.caps.iter().all(has)
                && (includes.arches.is_empty() || includes.arches.iter().any(here))
                && !excludes.caps.iter().any(has)
                && !excludes.arches.iter().any(here)
                && excludes.min_kernel.is_none()
        };
        let call = |rule: &Rule| {
            let mut call = json!({"names": rule.names, "action": rule.action});
            if let Some(number) = rule.errno_ret {
                call["errnoRet"] = number.into();
            }
            let argument = |a: &Argument| json!({"index": a.index, "value": a.value, "valueTwo": a.value_two, "op": a.op});
            let arguments = rule.args.iter().flatten().map(argument);
            call["args"] = arguments.collect();
            call
        };
        let mut profile = self.top.clone();
        profile.insert("architectures".into(), json!(self.architectures));
        let calls = self.rules.iter().filter(applies).map(call);
        profile.insert("syscalls".into(), calls.collect());
        profile.into()
    }
}

/// Calls that require a capability are not repeated.
const REFUSED_CALLS: &[&str] = &[
    "acct",
    "add_key",
    "bpf",
    "delete_module",
    "finit_module",
    "init_module",
    "ioperm",
    "iopl",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "open_by_handle_at",
    "perf_event_open",
    "quotactl",
    "reboot",
    "request_key",
    "swapoff",
    "swapon",
    "userfaultfd",
];

impl Seccomp {
    /// `linux.seccomp` of the OCI configuration for a container with these capabilities; null for no filter.
    pub(crate) fn oci(&self, privileged: bool, capabilities: &[String]) -> Value {
        let architectures: &[&str] = match native().1 {
            arm @ "SCMP_ARCH_AARCH64" => &[arm, "SCMP_ARCH_ARM"],
            x86 => &[x86, "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        };
        match self {
            Self::Default if !privileged => json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": architectures,
                "syscalls": [{"names": REFUSED_CALLS, "action": "SCMP_ACT_ERRNO", "errnoRet": 1}],
            }),
            Self::Default | Self::Unconfined => Value::Null,
            Self::Profile(profile) => profile.for_capabilities(capabilities),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROFILE: &str = r#"{
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38, "defaultErrno": "ENOSYS",
        "archMap": [
            {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
            {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
            {"architecture": "SCMP_ARCH_S390X"}
        ],
        "syscalls": [
            {"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": null, "comment": "all"},
            {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["setns"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["s390_runtime_instr"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["s390x"]}},
            {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]}
        ]
    }"#;

    fn names(value: &Value) -> Vec<&str> {
        let calls = value["syscalls"].as_array().unwrap();
        calls
            .iter()
            .map(|c| c["names"][0].as_str().unwrap())
            .collect()
    }

    #[test]
    fn a_profile_follows_capabilities_and_architecture() {
        let profile = Seccomp::Profile(Profile::parse(PROFILE.as_bytes()).unwrap());
        let plain = profile.oci(false, &[]);
        assert_eq!(names(&plain), ["read", "setns", "ptrace", "personality"]);
        assert_eq!(plain["defaultErrnoRet"], 38);
        assert_eq!(plain["architectures"][0], native().1);
        assert_eq!(plain["architectures"].as_array().unwrap().len(), 2);
        let admin = profile.oci(false, &["CAP_SYS_ADMIN".into()]);
        assert_eq!(names(&admin), ["read", "mount", "ptrace", "personality"]);
        // The result is valid for the OCI types.
        serde_json::from_value::<oci_spec::runtime::LinuxSeccomp>(plain).unwrap();
    }

    /// As in profiles from before Docker 17, or written by Go.
    #[test]
    fn older_profiles_name_one_call_a_rule() {
        let text = r#"{"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64"], "archMap": null,
            "syscalls": [
                {"name": "accept", "action": "SCMP_ACT_ALLOW", "args": []},
                {"name": "clone", "names": null, "action": "SCMP_ACT_ALLOW", "comment": null, "errno": null,
                 "args": [{"index": 0, "value": 8, "valueTwo": null, "op": "SCMP_CMP_EQ"}],
                 "includes": null, "excludes": {"caps": null, "arches": null}}]}"#;
        let profile = Profile::parse(text.as_bytes()).unwrap();
        let all = Seccomp::Profile(profile).oci(false, &[]);
        assert_eq!(names(&all), ["accept", "clone"]);
        let both = text.replace("\"names\": null", "\"names\": [\"read\"]");
        let error = Profile::parse(both.as_bytes()).unwrap_err();
        assert!(error.contains("clone"), "{error}");
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name() {
        for (from, to, name) in [
            ("\"args\": null", "\"until\": 3", "until"),
            ("\"minKernel\"", "\"maxKernel\"", "maxKernel"),
            ("\"defaultErrno\"", "\"listenerPath\"", "listenerPath"),
            ("\"defaultAction\"", "\"flags\"", "defaultAction"),
        ] {
            let text = PROFILE.replace(from, to);
            let error = Profile::parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(name), "{error}");
        }
    }
}
