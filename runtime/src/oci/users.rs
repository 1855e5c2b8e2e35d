//! Mounts with mapped users: `uidMappings` and `gidMappings`, and the options `idmap` and `ridmap`, which by themselves mean
//! the mapping of the container's user namespace. crun's form with ranges (`idmap=uids=0-1-10#10-11-10;gids=0-100-10`) is
//! supported, too.

use crate::Error;
use koya_vmm::devices::fs::{IdRange, MappedUsers};
use oci_spec::runtime::{LinuxIdMapping, Mount, Spec};

/// The mapping of a mount; `None` without one.
///
/// # Errors
/// An invalid or incomplete mapping.
pub(super) fn of(spec: &Spec, mount: &Mount) -> Result<Option<MappedUsers>, Error> {
    let option = mount
        .options()
        .iter()
        .flatten()
        .find_map(|text| parse(text));
    let own = (mount.uid_mappings(), mount.gid_mappings());
    if option.is_none() && own == (&None, &None) {
        return Ok(None);
    }
    let wrong = |why: String| {
        let destination = mount.destination().display();
        Error::invalid("mounts", format!("{destination}: {why}"))
    };
    let linux = spec.linux().as_ref();
    let container = [
        ranges(linux.and_then(|linux| linux.uid_mappings().as_ref())),
        ranges(linux.and_then(|linux| linux.gid_mappings().as_ref())),
    ];
    let (recursive, text) = option.unwrap_or((false, None));
    let [users, groups] = match (own, text) {
        ((None, None), None) => container,
        ((None, None), Some(text)) => written(text, &container).map_err(wrong)?,
        ((users, groups), _) => [ranges(users.as_ref()), ranges(groups.as_ref())],
    };
    if users.is_empty() || groups.is_empty() {
        let why = "id-mapped mounts must have both uid and gid mappings specified";
        return Err(wrong(why.into()));
    }
    let mapped = MappedUsers::new(users, groups, recursive);
    mapped.map(Some).map_err(wrong)
}

/// Removes the mapping from a mount of the guest, whose files have these owners already.
pub(super) fn remove(mount: &mut Mount) {
    let mut options = mount.options().clone().unwrap_or_default();
    options.retain(|option| parse(option).is_none());
    mount.set_options(Some(options));
    mount.set_uid_mappings(None);
    mount.set_gid_mappings(None);
}

/// Whether the option is recursive, and its ranges; `None` for other options.
fn parse(option: &str) -> Option<(bool, Option<&str>)> {
    let (name, ranges) = match option.split_once('=') {
        Some((name, ranges)) => (name, Some(ranges)),
        None => (option, None),
    };
    match name {
        "idmap" => Some((false, ranges)),
        "ridmap" => Some((true, ranges)),
        _ => None,
    }
}

fn ranges(mappings: Option<&Vec<LinuxIdMapping>>) -> Vec<IdRange> {
    let mappings = mappings.into_iter().flatten();
    let mappings = mappings.map(|mapping| IdRange {
        host: mapping.container_id(),
        guest: mapping.host_id(),
        count: mapping.size(),
    });
    mappings.collect()
}

/// The users and groups of an option with ranges. Those after `@` are relative to the container's.
fn written(text: &str, container: &[Vec<IdRange>; 2]) -> Result<[Vec<IdRange>; 2], String> {
    let mut all = [Vec::new(), Vec::new()];
    for part in text.split(';') {
        let (kind, list) = match part.split_once('=') {
            Some(("uids", list)) => (0, list),
            Some(("gids", list)) => (1, list),
            _ => return Err(format!("{part:?} is no mapping, uids=... or gids=...")),
        };
        for range in list.split('#') {
            let wrong = || format!("invalid mapping specified {range:?}");
            let plain = range.strip_prefix('@');
            let mut numbers = plain.unwrap_or(range).split('-').map(str::parse);
            let mut next = || numbers.next().and_then(Result::ok).ok_or_else(wrong);
            let (host, mut guest, count) = (next()?, next()?, next()?);
            if numbers.next().is_some() {
                return Err(wrong());
            }
            if plain.is_some() {
                let within = |range: &&IdRange| {
                    let offset = u32::checked_sub(guest, range.host);
                    offset.is_some_and(|offset| offset < range.count)
                };
                let found = container[kind].iter().find(within).ok_or_else(|| {
                    format!("{range:?} is not within the mapping of the container's user namespace")
                })?;
                guest = (guest - found.host)
                    .checked_add(found.guest)
                    .ok_or_else(wrong)?;
            }
            all[kind].push(IdRange { host, guest, count });
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn mapping(host: u32, guest: u32, count: u32) -> Value {
        json!([{"containerID": host, "hostID": guest, "size": count}])
    }

    fn of_mount(more: Value, container: Option<Value>) -> Result<Option<MappedUsers>, String> {
        let mut mount = json!({"destination": "/x", "type": "bind", "source": "/y"});
        let more = more.as_object().unwrap().clone();
        mount.as_object_mut().unwrap().extend(more);
        let linux = match container {
            Some(mapping) => json!({"uidMappings": mapping, "gidMappings": mapping}),
            None => json!({}),
        };
        let spec = serde_json::from_value(json!({"ociVersion": "1.2.0", "linux": linux})).unwrap();
        let mut mount: Mount = serde_json::from_value(mount).unwrap();
        let found = of(&spec, &mount).map_err(|error| error.to_string());
        remove(&mut mount);
        assert_eq!(of(&spec, &mount).unwrap(), None);
        found
    }

    fn users(all: &[[u32; 3]], recursive: bool) -> MappedUsers {
        let ranges = all
            .iter()
            .map(|&[host, guest, count]| IdRange { host, guest, count });
        let ranges: Vec<_> = ranges.collect();
        MappedUsers::new(ranges.clone(), ranges, recursive).unwrap()
    }

    #[test]
    fn mappings_are_those_of_the_mount_or_of_the_container() {
        let own = json!({"uidMappings": mapping(0, 1000, 9), "gidMappings": mapping(0, 1000, 9)});
        let container = || Some(mapping(0, 100_000, 65536));
        let found = of_mount(own.clone(), container()).unwrap();
        assert_eq!(found, Some(users(&[[0, 1000, 9]], false)));
        let mut with_option = own;
        with_option["options"] = json!(["bind", "ridmap"]);
        let found = of_mount(with_option, container()).unwrap();
        assert_eq!(found, Some(users(&[[0, 1000, 9]], true)));
        let found = of_mount(json!({"options": ["rbind", "idmap"]}), container()).unwrap();
        assert_eq!(found, Some(users(&[[0, 100_000, 65536]], false)));
        assert_eq!(
            of_mount(json!({"options": ["rbind", "ro"]}), container()).unwrap(),
            None
        );
    }

    #[test]
    fn ranges_are_written_as_for_crun() {
        let option = "idmap=uids=0-1-10#10-21-5;gids=0-1-10#10-21-5";
        let found = of_mount(json!({"options": [option]}), None).unwrap();
        assert_eq!(found, Some(users(&[[0, 1, 10], [10, 21, 5]], false)));
        // The example of crun's manual.
        let container = json!([{"containerID": 0, "hostID": 0, "size": 1},
            {"containerID": 1, "hostID": 2, "size": 1000}]);
        let option = "ridmap=uids=@1-3-10;gids=@1-3-10";
        let found = of_mount(json!({"options": [option]}), Some(container)).unwrap();
        assert_eq!(found, Some(users(&[[1, 4, 10]], true)));
    }

    #[test]
    fn broken_mappings_are_refused() {
        let own = json!({"uidMappings": mapping(0, 1000, 9)});
        assert!(
            of_mount(own, None)
                .unwrap_err()
                .contains("both uid and gid")
        );
        for (option, expected) in [
            ("idmap", "both uid and gid"),
            ("idmap=uids=0-1-10", "both uid and gid"),
            ("idmap=users=0-1-10", "is no mapping"),
            ("idmap=uids=0-1", "invalid mapping specified \"0-1\""),
            ("idmap=uids=0-1-2-3", "invalid mapping"),
            ("idmap=uids=a-1-2", "invalid mapping"),
            ("idmap=uids=@0-1-2", "is not within"),
            ("idmap=uids=0-1-0;gids=0-1-2", "users: 0 1 0 is no range"),
        ] {
            let said = of_mount(json!({"options": [option]}), None).unwrap_err();
            assert!(said.contains(expected), "{option}: {said}");
        }
    }
}
