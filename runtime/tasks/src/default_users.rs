//! Mappings of a user namespace whose configuration has none.
//!
//! As with crun, they are those that the caller may use: its own ID is that of the container's process, and the other users
//! are from its ranges in `/etc/subuid` and `/etc/subgid`, as far as it has any.

use koya::oci_spec::runtime::{
    self as oci, LinuxIdMapping, LinuxIdMappingBuilder, LinuxNamespaceType,
};

/// The ID of files of the caller in a guest.
const OWN: u32 = 0;

/// What the host knows about the caller. Missing files are empty.
struct Caller {
    uid: u32,
    passwd: String,
    subuid: String,
    subgid: String,
}

/// Adds the mappings that a new user namespace lacks.
pub(crate) fn fill_in(spec: &mut oci::Spec) {
    let read = |path: &str| {
        let text = std::fs::read(path).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    };
    fill_in_for(spec, || Caller {
        uid: rustix::process::geteuid().as_raw(),
        passwd: read("/etc/passwd"),
        subuid: read("/etc/subuid"),
        subgid: read("/etc/subgid"),
    });
}

fn fill_in_for(spec: &mut oci::Spec, caller: impl FnOnce() -> Caller) {
    let user = spec
        .process()
        .as_ref()
        .map(|process| process.user().clone());
    let Some(linux) = spec.linux_mut() else {
        return;
    };
    let mut namespaces = linux.namespaces().iter().flatten();
    let is_new = namespaces.any(|namespace| {
        let path = namespace.path().as_ref();
        namespace.typ() == LinuxNamespaceType::User
            && path.is_none_or(|path| path.as_os_str().is_empty())
    });
    let is_empty = |list: &Option<Vec<LinuxIdMapping>>| list.iter().flatten().next().is_none();
    let (no_users, no_groups) = (
        is_empty(linux.uid_mappings()),
        is_empty(linux.gid_mappings()),
    );
    if !is_new || !(no_users || no_groups) {
        return;
    }
    let caller = caller();
    let (uid, gid) = user.map_or((0, 0), |user| (user.uid(), user.gid()));
    // subuid(5) has users by name or number.
    let mut names = vec![caller.uid.to_string()];
    names.extend(user_name(&caller.passwd, caller.uid).map(str::to_owned));
    if no_users {
        linux.set_uid_mappings(Some(mappings(uid, range_of(&caller.subuid, &names))));
    }
    if no_groups {
        linux.set_gid_mappings(Some(mappings(gid, range_of(&caller.subgid, &names))));
    }
}

/// The name of a user in the contents of `/etc/passwd` (passwd(5)).
pub fn user_name(passwd: &str, uid: u32) -> Option<&str> {
    let mut lines = passwd.lines().map(|line| line.split(':'));
    lines.find_map(|mut fields| {
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then_some(name)
    })
}

/// The first ID and the size of a user's first range of subordinate IDs (subuid(5)). Ranges that contain the ID mapped to the
/// caller are skipped: no ID can be mapped twice.
fn range_of(ranges: &str, names: &[String]) -> Option<(u32, u32)> {
    ranges.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        if !names.iter().any(|own| own == name) {
            return None;
        }
        let from: u32 = fields.next()?.trim().parse().ok()?;
        let count: u32 = fields.next()?.trim().parse().ok()?;
        (from > OWN && count > 0 && from.checked_add(count).is_some()).then_some((from, count))
    })
}

/// Maps this ID of the container to the caller, and those before and after it to its range. Without a range there is only
/// the caller.
fn mappings(id: u32, range: Option<(u32, u32)>) -> Vec<LinuxIdMapping> {
    let (from, count) = range.unwrap_or_default();
    let before = id.min(count);
    // The last ID is none.
    let after = (count - before).min(u32::MAX - 1 - id.min(u32::MAX - 1));
    let all = [
        (0, from, before),
        (id, OWN, 1),
        (id.saturating_add(1), from + before, after),
    ];
    let present = all.into_iter().filter(|(_, _, count)| *count > 0);
    let mappings = present.map(|(container, host, count)| {
        let builder = LinuxIdMappingBuilder::default();
        let mapping = builder.container_id(container).host_id(host).size(count);
        mapping.build().unwrap_or_default()
    });
    mappings.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(namespaces: &Value, linux: &Value) -> oci::Spec {
        let mut all = json!({"namespaces": namespaces});
        for (field, value) in linux.as_object().into_iter().flatten() {
            all[field] = value.clone();
        }
        let process = json!({
            "user": {"uid": 10, "gid": 0}, "args": ["true"], "cwd": "/",
        });
        let spec = json!({"ociVersion": "1.2.0", "process": process, "linux": all});
        serde_json::from_value(spec).unwrap()
    }

    fn filled(spec: &mut oci::Spec, subuid: &str) -> [Vec<(u32, u32, u32)>; 2] {
        fill_in_for(spec, || Caller {
            uid: 1000,
            passwd: "root:x:0:0::/:\nbroken\nana:x:1000:1000::/home/ana:/bin/sh\n".into(),
            subuid: subuid.into(),
            subgid: "ana:200000:65536\n".into(),
        });
        let linux = spec.linux().as_ref().unwrap();
        [linux.uid_mappings(), linux.gid_mappings()].map(|list| {
            let list = list.iter().flatten();
            list.map(|one| (one.container_id(), one.host_id(), one.size()))
                .collect()
        })
    }

    #[test]
    fn a_new_user_namespace_has_the_ids_of_the_caller() {
        let new = json!([{"type": "user"}]);
        let groups = vec![(0, 0, 1), (1, 200_000, 65536)];
        for (subuid, users) in [
            ("", vec![(10, 0, 1)]),
            ("bob:1:5\n", vec![(10, 0, 1)]),
            ("ana:x:5\nana:100000\n", vec![(10, 0, 1)]),
            ("ana:4294967295:5\n", vec![(10, 0, 1)]),
            ("ana:0:65536\n", vec![(10, 0, 1)]),
            ("1000:100000:4\n", vec![(0, 100_000, 4), (10, 0, 1)]),
            ("ana:100000:4\n", vec![(0, 100_000, 4), (10, 0, 1)]),
            (
                "root:1:9\nana:100000:65536\nana:1:1\n",
                vec![(0, 100_000, 10), (10, 0, 1), (11, 100_010, 65526)],
            ),
        ] {
            let found = filled(&mut spec(&new, &json!({})), subuid);
            assert_eq!(found, [users, groups.clone()], "{subuid:?}");
        }
    }

    #[test]
    fn mappings_of_the_configuration_are_kept() {
        let own = json!([{"containerID": 0, "hostID": 5, "size": 9}]);
        let new = json!([{"type": "user", "path": ""}]);
        let both = json!({"uidMappings": own, "gidMappings": own});
        let kept = vec![(0, 5, 9)];
        let found = filled(&mut spec(&new, &both), "ana:1:9");
        assert_eq!(found, [kept.clone(), kept.clone()]);
        let found = filled(&mut spec(&new, &json!({"gidMappings": own})), "");
        assert_eq!(found, [vec![(10, 0, 1)], kept]);
        for namespaces in [
            json!([]),
            json!([{"type": "pid"}, {"type": "user", "path": "/proc/1/ns/user"}]),
        ] {
            let found = filled(&mut spec(&namespaces, &json!({})), "ana:1:9");
            assert_eq!(found, [vec![], vec![]], "{namespaces}");
        }
    }

    #[test]
    fn no_range_reaches_beyond_the_last_id() {
        let of = |id, range| {
            let all = mappings(id, Some(range));
            let of = |one: &LinuxIdMapping| (one.container_id(), one.host_id(), one.size());
            all.iter().map(of).collect::<Vec<_>>()
        };
        let last = u32::MAX - 1;
        assert_eq!(of(last, (1, 9)), [(0, 1, 9), (last, 0, 1)]);
        let most = u32::MAX - 1;
        assert_eq!(of(0, (1, most)), [(0, 0, 1), (1, 1, most)]);
        assert_eq!(
            of(1, (2, most - 1)),
            [(0, 2, 1), (1, 0, 1), (2, 3, most - 2)]
        );
    }
}
