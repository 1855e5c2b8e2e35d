//! Roles of containers in their sandboxes, from the annotations of Kubernetes interfaces.

use koya::oci_spec::runtime::Spec;

/// The namespace of containerd that Docker uses. Its users may set annotations.
pub(crate) const DOCKERS_NAMESPACE: &str = "moby";

/// Role of a container in its sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// The only container.
    Single,
    /// A pod sandbox container, without processes: the sandbox is the virtual machine.
    Sandbox,
    /// A container of a pod.
    Member {
        /// The pod sandbox container.
        sandbox: String,
    },
}

impl Role {
    /// The role of a container with this ID.
    pub(crate) fn of(spec: &Spec, id: &str) -> Self {
        let annotation = |name: &str| spec.annotations().as_ref()?.get(name).map(String::as_str);
        if annotation("io.container.manager") == Some("libpod") {
            return Self::Single;
        }
        let kind = annotation("io.kubernetes.cri.container-type")
            .or_else(|| annotation("io.kubernetes.cri-o.ContainerType"));
        let sandbox = annotation("io.kubernetes.cri.sandbox-id")
            .or_else(|| annotation("io.kubernetes.cri-o.SandboxID"));
        match (kind, sandbox) {
            (Some("sandbox"), _) => Self::Sandbox,
            (Some("container"), Some(sandbox)) if sandbox != id => Self::Member {
                sandbox: sandbox.into(),
            },
            _ => Self::Single,
        }
    }
}

/// Removes the annotations of Kubernetes interfaces, for an engine whose users choose annotations: its containers are no pods,
/// and join none.
pub(crate) fn drop_pod_annotations(spec: &mut Spec) {
    if let Some(annotations) = spec.annotations_mut() {
        annotations.retain(|name, _| !name.starts_with("io.kubernetes.cri"));
    }
}
