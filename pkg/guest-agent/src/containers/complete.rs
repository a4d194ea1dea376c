// SPDX-License-Identifier: Apache-2.0
//! What only the guest knows of a container.

use std::path::PathBuf;

use oci_spec::runtime::{LinuxNamespaceBuilder, LinuxNamespaceType, Spec};
use podhull_types::ContainerId;

use super::{devices, limits};
use crate::cgroup::Cgroup;
use crate::error::GuestError;
use crate::pod;

/// Adds to a spec what only the guest knows.
pub(super) fn complete(
    spec: &mut Spec,
    id: &ContainerId,
    rootfs: &str,
    pid_path: Option<PathBuf>,
    in_user_namespace: bool,
) -> Result<(), GuestError> {
    let mut root = spec.root().clone().unwrap_or_default();
    root.set_path(rootfs.into());
    spec.set_root(Some(root));
    if let Some(process) = spec.process_mut() {
        limits::complete(process)?;
    }
    let invalid = |reason: String| GuestError::Invalid {
        field: "linux.namespaces",
        reason,
    };
    let mut pid = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Pid);
    if let Some(path) = pid_path {
        pid = pid.path(path);
    }
    // A host with cgroups v1 asks for no cgroup namespace, but ours are v2: a
    // container sees its own limits at /sys/fs/cgroup, and nobody else's.
    let cgroup = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Cgroup);
    let own = [pid.build(), cgroup.build()];
    let kinds = [
        LinuxNamespaceType::User,
        LinuxNamespaceType::Network,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Ipc,
    ];
    let pods = kinds.into_iter().zip(pod::KINDS).map(|(kind, name)| {
        let namespace = LinuxNamespaceBuilder::default().typ(kind);
        namespace.path(pod::path(name)).build()
    });
    let linux = spec
        .linux_mut()
        .as_mut()
        .ok_or_else(|| invalid("no linux section".into()))?;
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    for namespace in own.into_iter().chain(pods.filter(|_| in_user_namespace)) {
        let namespace = namespace.map_err(|error| invalid(error.to_string()))?;
        namespaces.retain(|other| other.typ() != namespace.typ());
        namespaces.push(namespace);
    }
    linux.set_namespaces(Some(namespaces));
    linux.set_cgroups_path(Some(Cgroup::oci_path(id).into()));
    devices::complete(linux)
}
