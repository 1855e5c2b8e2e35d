//! The user namespace of another container: a new one with the same mappings, since it is in another virtual machine.

use crate::spec::Spec;
use koya::oci_spec::runtime::{self as oci, LinuxIdMapping, LinuxNamespaceType};
use serde::{Deserialize, Serialize};

/// Mappings of a container's user namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserMappings {
    users: Vec<LinuxIdMapping>,
    groups: Vec<LinuxIdMapping>,
}

fn is_user(namespace: &oci::LinuxNamespace) -> bool {
    namespace.typ() == LinuxNamespaceType::User
}

impl Spec {
    /// The mappings of its user namespace, if it has a new one.
    pub fn user_mappings(&self) -> Option<UserMappings> {
        let linux = self.0.linux().as_ref()?;
        let mut namespaces = linux.namespaces().iter().flatten();
        let own = namespaces.find(|namespace| is_user(namespace))?;
        let path = own.path().as_ref();
        let is_new = path.is_none_or(|path| path.as_os_str().is_empty());
        is_new.then(|| UserMappings {
            users: linux.uid_mappings().clone().unwrap_or_default(),
            groups: linux.gid_mappings().clone().unwrap_or_default(),
        })
    }

    /// Gives it a new user namespace with these mappings, in place of the one that its configuration names.
    pub fn set_user_mappings(&mut self, mappings: &UserMappings) {
        let Some(linux) = self.0.linux_mut() else {
            return;
        };
        let mut namespaces = linux.namespaces().clone().unwrap_or_default();
        for namespace in &mut namespaces {
            if is_user(namespace) {
                namespace.set_path(None);
            }
        }
        linux.set_namespaces(Some(namespaces));
        linux.set_uid_mappings(Some(mappings.users.clone()));
        linux.set_gid_mappings(Some(mappings.groups.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(user: Value, mappings: Value) -> Spec {
        let linux = json!({"namespaces": [{"type": "pid"}, user],
            "uidMappings": mappings, "gidMappings": mappings});
        Spec(serde_json::from_value(json!({"ociVersion": "1.2.0", "linux": linux})).unwrap())
    }

    #[test]
    fn the_mappings_are_those_of_the_other_container() {
        let mappings = json!([{"containerID": 0, "hostID": 100_000, "size": 65_534}]);
        let other = spec(json!({"type": "user"}), mappings);
        let mappings = other.user_mappings().unwrap();
        let mut joining = spec(
            json!({"type": "user", "path": "/proc/9/ns/user"}),
            json!([]),
        );
        assert_eq!(joining.user_mappings(), None);
        joining.set_user_mappings(&mappings);
        assert_eq!(joining.user_mappings(), Some(mappings));
        assert!(joining.named_processes().is_empty());
        let none = spec(json!({"type": "ipc"}), json!([]));
        assert_eq!(none.user_mappings(), None);
    }
}
