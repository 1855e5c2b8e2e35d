//! Values in OCI configurations that can't be parsed directly: capabilities that exist only in other kernels, and scheduler
//! flags, which the configuration library spells differently from the specification.

use anyhow::Context as _;
use koya::oci_spec::runtime as oci;
use serde::Deserialize as _;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Spelling in the specification, and in the library.
const FLAGS: [(&str, &str); 2] = [
    ("SCHED_FLAG_RESET_ON_FORK", "SCHED_RESET_ON_FORK"),
    ("SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_D_L_OVERRUN"),
];

/// Parses an exec process from its JSON.
///
/// # Errors
/// If it is invalid.
pub fn read_process(text: &[u8]) -> anyhow::Result<oci::Process> {
    read(text, "").context("the process is broken")
}

/// Parses a container's configuration.
pub(crate) fn read_spec(text: &[u8]) -> serde_json::Result<oci::Spec> {
    let mut spec: oci::Spec = read(text, "/process")?;
    if let Some(linux) = spec.linux_mut() {
        if let Some(resources) = linux.resources_mut() {
            drop_unset_pids(resources, text, "/linux/resources");
            complete_page_sizes(resources, text, "/linux/resources");
        }
        if linux.rootfs_propagation().as_deref() == Some("") {
            linux.set_rootfs_propagation(None);
        }
    }
    Ok(spec)
}

/// Parses limits: `linux.resources` of a configuration.
///
/// # Errors
/// If they are invalid.
pub fn read_resources(text: &[u8]) -> anyhow::Result<oci::LinuxResources> {
    let resources = read(text, "/process").context("the resources are broken");
    let mut resources: oci::LinuxResources = resources?;
    drop_unset_pids(&mut resources, text, "");
    complete_page_sizes(&mut resources, text, "");
    Ok(resources)
}

/// Removes a limit of processes that has no value: the library reads it as 0, which is a limit. `place` is the JSON path of
/// the resources in the text.
fn drop_unset_pids(resources: &mut oci::LinuxResources, text: &[u8], place: &str) {
    if resources.pids().is_none_or(|pids| pids.limit() != 0) {
        return;
    }
    let value: Value = serde_json::from_slice(text).unwrap_or_default();
    let limit = value.pointer(&format!("{place}/pids/limit"));
    if limit.is_none_or(Value::is_null) {
        resources.set_pids(None);
    }
}

/// Fills in sizes of huge pages whose name is written differently, as in `pagesize`: Go ignores the case of names.
fn complete_page_sizes(resources: &mut oci::LinuxResources, text: &[u8], place: &str) {
    let mut limits = resources.hugepage_limits().clone().unwrap_or_default();
    if limits.iter().all(|limit| !limit.page_size().is_empty()) {
        return;
    }
    let value: Value = serde_json::from_slice(text).unwrap_or_default();
    let written = value.pointer(&format!("{place}/hugepageLimits"));
    let written = written.and_then(Value::as_array).into_iter().flatten();
    for (limit, written) in limits.iter_mut().zip(written) {
        let mut members = written.as_object().into_iter().flatten();
        let size = members.find(|(name, _)| name.eq_ignore_ascii_case("pageSize"));
        if let Some(size) = size.and_then(|(_, size)| size.as_str()) {
            limit.set_page_size(size.into());
        }
    }
    resources.set_hugepage_limits(Some(limits));
}

/// Parses a document with a process at this JSON path. Most documents need no changes.
fn read<T: DeserializeOwned>(text: &[u8], process: &str) -> serde_json::Result<T> {
    serde_json::from_slice(text).or_else(|error| {
        let understood = || {
            let mut value: Value = serde_json::from_slice(text).ok()?;
            drop_nulls(&mut value);
            name_all_kinds(&mut value);
            drop_empty_filter(&mut value);
            if let Some(process) = value.pointer_mut(process) {
                complete_user(process);
                drop_unknown_capabilities(process);
                respell_flags(process);
                complete_priority(process);
            }
            serde_json::from_value(value).ok()
        };
        understood().ok_or(error)
    })
}

/// Removes members that are null, which Go treats as absent.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.retain(|_, member| !member.is_null());
            members.values_mut().for_each(drop_nulls);
        }
        Value::Array(all) => all.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// Removes empty types of device rules: they mean all types, as with runc.
fn name_all_kinds(spec: &mut Value) {
    let rules = spec.pointer_mut("/linux/resources/devices");
    let rules = rules.and_then(Value::as_array_mut);
    let rules = rules.into_iter().flatten().filter_map(Value::as_object_mut);
    for rule in rules {
        rule.retain(|name, word| name != "type" || word != "");
    }
}

/// Removes unknown capabilities with a warning, like runc.
fn drop_unknown_capabilities(process: &mut Value) {
    let sets = process.pointer_mut("/capabilities");
    let sets = sets.and_then(Value::as_object_mut);
    let sets = sets.into_iter().flat_map(|sets| sets.values_mut());
    let mut unknown = BTreeSet::new();
    for names in sets.filter_map(Value::as_array_mut) {
        names.retain(|name| {
            let is_known = oci::Capability::deserialize(name).is_ok();
            if !is_known {
                let word = name.as_str().map(String::from);
                unknown.insert(word.unwrap_or_else(|| name.to_string()));
            }
            is_known
        });
    }
    if !unknown.is_empty() {
        log::warn!("{}", ignored(unknown));
    }
}

/// The warning, in runc's wording.
fn ignored(unknown: BTreeSet<String>) -> String {
    let unknown: Vec<_> = unknown.into_iter().collect();
    format!(
        "ignoring unknown or unavailable capabilities: [{}]",
        unknown.join(" ")
    )
}

fn respell_flags(process: &mut Value) {
    let flags = process.pointer_mut("/scheduler/flags");
    let flags = flags.and_then(Value::as_array_mut);
    for flag in flags.into_iter().flatten() {
        let known = FLAGS.iter().find(|(word, _)| flag == word);
        if let Some((_, known)) = known {
            *flag = (*known).into();
        }
    }
}

/// Without a number, a priority is 0, as with Go. IOPRIO_CLASS_IDLE has no other.
fn complete_priority(process: &mut Value) {
    if let Some(priority) = process.get_mut("ioPriority").and_then(Value::as_object_mut) {
        priority.entry("priority").or_insert_with(|| 0.into());
    }
}

/// A process without a user is root's, as with runc and crun.
fn complete_user(process: &mut Value) {
    if let Some(process) = process.as_object_mut() {
        let user = process.entry("user").or_insert_with(|| json!({}));
        if let Some(user) = user.as_object_mut() {
            for id in ["uid", "gid"] {
                user.entry(id).or_insert_with(|| 0.into());
            }
        }
    }
}

/// Removes a filter of system calls without a default action and without calls: it is none, as with runc.
fn drop_empty_filter(spec: &mut Value) {
    let Some(linux) = spec.get_mut("linux").and_then(Value::as_object_mut) else {
        return;
    };
    let is_empty = linux.get("seccomp").is_some_and(|filter| {
        let action = filter.get("defaultAction").and_then(Value::as_str);
        let calls = filter.get("syscalls").and_then(Value::as_array);
        action.unwrap_or_default().is_empty() && calls.is_none_or(Vec::is_empty)
    });
    if is_empty {
        linux.remove("seccomp");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(more: Value) -> Value {
        let mut process = json!({"cwd": "/", "user": {"uid": 0, "gid": 0}, "args": ["sh"]});
        process
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        process
    }

    #[test]
    fn null_is_nothing_as_for_go() {
        let rules = json!([{"allow": false, "type": "", "access": "rwm"}]);
        let seccomp = json!({"defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": null, "errnoRet": null}]});
        let text = json!({"ociVersion": "1.2.0", "process": null, "hooks": {"prestart": null},
            "linux": {"seccomp": seccomp, "resources": {"devices": rules, "pids": {"limit": null}}}});
        let spec = read_spec(text.to_string().as_bytes()).unwrap();
        let linux = spec.linux().as_ref().unwrap();
        let resources = linux.resources().as_ref().unwrap();
        assert_eq!(resources.devices().as_ref().unwrap()[0].typ(), None);
        assert!(spec.process().is_none());
        assert!(resources.pids().is_none(), "no limit is none");
    }

    #[test]
    fn what_is_left_out_has_the_value_that_go_gives_it() {
        let read = |process: Value, seccomp: Value| {
            let linux = json!({"rootfsPropagation": "", "seccomp": seccomp});
            let text = json!({"ociVersion": "1.0.2", "process": process, "linux": linux});
            read_spec(text.to_string().as_bytes())
        };
        let nobody = json!({"cwd": "/", "args": ["sh"]});
        let spec = read(nobody.clone(), json!({})).unwrap();
        let user = spec.process().as_ref().unwrap().user();
        assert_eq!((user.uid(), user.gid()), (0, 0));
        let linux = spec.linux().as_ref().unwrap();
        assert!(linux.seccomp().is_none() && linux.rootfs_propagation().is_none());
        let group = process(json!({"user": {"gid": 5}}));
        let spec = read(group, json!({"defaultAction": "", "syscalls": []})).unwrap();
        let user = spec.process().as_ref().unwrap().user();
        assert_eq!((user.uid(), user.gid()), (0, 5));
        let call = json!({"names": ["read"], "action": "SCMP_ACT_ALLOW"});
        let refused = read(nobody, json!({"syscalls": [call]}));
        assert!(refused.is_err(), "calls need a default action");
    }

    #[test]
    fn no_limit_of_processes_is_not_a_limit_of_0() {
        let of = |text: &str| {
            let resources = read_resources(text.as_bytes()).unwrap();
            resources.pids().map(|pids| pids.limit())
        };
        assert_eq!(of(r#"{"pids": {}}"#), None);
        assert_eq!(of(r#"{"pids": {"limit": null}}"#), None);
        assert_eq!(of(r#"{"pids": {"limit": 0}}"#), Some(0));
        assert_eq!(of(r#"{"pids": {"limit": -1}}"#), Some(-1));
        assert_eq!(of(r#"{"cpu": {"shares": null}}"#), None);
        assert!(read_resources(br#"{"pids": {"limit": "x"}}"#).is_err());
    }

    #[test]
    fn the_size_of_pages_may_be_written_in_small_letters() {
        let text = br#"{"hugepageLimits": [{"pagesize": "2MB", "limit": 1}, {"pageSize": "1GB", "limit": 2}]}"#;
        let resources = read_resources(text).unwrap();
        let limits = resources.hugepage_limits().as_ref().unwrap();
        let sizes: Vec<_> = limits.iter().map(|limit| limit.page_size()).collect();
        assert_eq!(sizes, ["2MB", "1GB"]);
    }

    #[test]
    fn capabilities_of_other_kernels_are_ignored() {
        let sets = json!({"bounding": ["CAP_NEW", "CAP_KILL", "NEW"], "effective": ["CAP_KILL"]});
        let mut process = process(json!({"capabilities": sets}));
        let config = |process: &Value| {
            json!({"ociVersion": "1.0.2", "root": {"path": "rootfs"}, "process": process})
                .to_string()
        };
        let spec = read_spec(config(&process).as_bytes()).unwrap();
        let added = read_process(process.to_string().as_bytes()).unwrap();
        for kept in [spec.process().as_ref().unwrap(), &added] {
            let bounding = kept.capabilities().as_ref().unwrap().bounding().clone();
            let expected = [oci::Capability::Kill].into_iter().collect();
            assert_eq!(bounding, Some(expected));
        }
        process["args"] = json!(7);
        assert!(
            read_spec(config(&process).as_bytes()).is_err(),
            "something else is wrong"
        );
    }

    #[test]
    fn ignored_capabilities_are_told_in_runcs_words() {
        let unknown = ["CAP_NEW", "CAP_FLY"].map(String::from);
        assert_eq!(
            ignored(unknown.into_iter().collect()),
            "ignoring unknown or unavailable capabilities: [CAP_FLY CAP_NEW]"
        );
    }

    #[test]
    fn a_process_without_a_user_is_roots() {
        for user in [None, Some(Value::Null), Some(json!({}))] {
            let mut process = json!({"cwd": "/", "args": ["sh"]});
            if let Some(user) = user {
                process["user"] = user;
            }
            let added = read_process(process.to_string().as_bytes()).unwrap();
            let config = json!({"ociVersion": "1.2.0", "process": process}).to_string();
            let spec = read_spec(config.as_bytes()).unwrap();
            for process in [&added, spec.process().as_ref().unwrap()] {
                assert_eq!((process.user().uid(), process.user().gid()), (0, 0));
            }
        }
        // Not a process at all: the error is that of the library.
        assert!(read_spec(br#"{"ociVersion": "1.2.0", "process": 5}"#).is_err());
    }

    #[test]
    fn a_priority_without_a_number_is_0() {
        let priority = |value: Value| {
            let text = process(json!({"ioPriority": value})).to_string();
            let read = read_process(text.as_bytes()).unwrap();
            read.io_priority().as_ref().unwrap().priority()
        };
        assert_eq!(priority(json!({"class": "IOPRIO_CLASS_IDLE"})), 0);
        assert_eq!(
            priority(json!({"class": "IOPRIO_CLASS_BE", "priority": 3})),
            3
        );
    }

    #[test]
    fn flags_of_schedulers_are_spelt_as_the_specification_has_them() {
        // https://github.com/opencontainers/runtime-spec/blob/v1.2.0/config.md#process
        let flags = [
            "SCHED_FLAG_RESET_ON_FORK",
            "SCHED_FLAG_RECLAIM",
            "SCHED_FLAG_DL_OVERRUN",
            "SCHED_FLAG_KEEP_POLICY",
            "SCHED_FLAG_KEEP_PARAMS",
            "SCHED_FLAG_UTIL_CLAMP_MIN",
            "SCHED_FLAG_UTIL_CLAMP_MAX",
        ];
        let with = |flags: Value| {
            let scheduler = json!({"policy": "SCHED_DEADLINE", "flags": flags});
            let text = process(json!({"scheduler": scheduler})).to_string();
            read_process(text.as_bytes())
        };
        let read = with(json!(flags)).unwrap();
        let scheduler = read.scheduler().as_ref().unwrap();
        assert_eq!(scheduler.flags().as_ref().unwrap().len(), flags.len());
        let error = format!("{:#}", with(json!(["SCHED_FLAG_NEW"])).unwrap_err());
        assert!(error.starts_with("the process is broken: "), "{error}");
    }
}
