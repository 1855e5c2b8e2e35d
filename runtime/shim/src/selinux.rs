//! SELinux on the host: the label of the sandbox's process.

use anyhow::{Context, Result};
use std::fs;
use std::path::Path;

/// The label for the next execve(2) of this thread and its children (proc_pid_attr(5)).
const NEXT_EXEC: &str = "/proc/thread-self/attr/exec";
/// Configuration with the name of the policy, and directory of policies.
const CONFIG: &str = "/etc/selinux/config";
const POLICIES: &str = "/etc/selinux";
/// File of a policy with the types for containers, and for virtual machines that act as containers.
const CONTEXTS: &str = "contexts/lxc_contexts";

/// Sets the label for the next execve(2).
///
/// # Errors
/// If the policy does not contain the label, or does not allow this process to set it.
pub(crate) fn label_next_exec(label: &str) -> Result<()> {
    let label = for_virtual_machine(label, &contexts().unwrap_or_default());
    fs::write(NEXT_EXEC, &label).with_context(|| {
        format!(
            "cannot give the sandbox the SELinux label {label:?} (`selinux = false` in {} runs it \
             with containerd's)",
            koya::settings::FILE
        )
    })
}

/// The policy's list of contexts.
fn contexts() -> Option<String> {
    let config = fs::read_to_string(CONFIG).ok()?;
    let name = config
        .lines()
        .find_map(|line| line.trim().strip_prefix("SELINUXTYPE="))?;
    fs::read_to_string(Path::new(POLICIES).join(name.trim()).join(CONTEXTS)).ok()
}

/// The type of a label: `system_u:system_r:container_t:s0:c1,c2`.
fn type_of(label: &str) -> Option<&str> {
    label.split(':').nth(2)
}

/// containerd uses the container type for runtimes that it does not know as virtual machines; the policy has another type
/// for those, which may use /dev/kvm. User, role and categories stay.
fn for_virtual_machine(label: &str, contexts: &str) -> String {
    let context = |key: &str| {
        let mut lines = contexts.lines().filter_map(|line| line.split_once('='));
        let (_, value) = lines.find(|(name, _)| name.trim() == key)?;
        type_of(value.trim().trim_matches('"'))
    };
    let mut parts: Vec<&str> = label.split(':').collect();
    if let (Some(container), Some(machine)) = (context("process"), context("kvm_process"))
        && type_of(label) == Some(container)
    {
        parts[2] = machine;
    }
    parts.join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    const FEDORA: &str = "process = \"system_u:system_r:container_t:s0\"\n\
                          content = \"system_u:object_r:virt_var_lib_t:s0\"\n\
                          kvm_process = \"system_u:system_r:container_kvm_t:s0\"\n";

    #[test]
    fn a_containers_type_becomes_a_virtual_machines_and_its_categories_stay() {
        let label = "system_u:system_r:container_t:s0:c12,c34";
        let machine = "system_u:system_r:container_kvm_t:s0:c12,c34";
        assert_eq!(for_virtual_machine(label, FEDORA), machine);
        assert_eq!(for_virtual_machine(machine, FEDORA), machine);
        // A label chosen by the user, and a policy without such a type.
        let own = "system_u:system_r:my_t:s0";
        assert_eq!(for_virtual_machine(own, FEDORA), own);
        assert_eq!(for_virtual_machine(label, ""), label);
        assert_eq!(for_virtual_machine("no label", FEDORA), "no label");
    }
}
