// SPDX-License-Identifier: Apache-2.0
//! From containerd's OCI spec to one that is true inside the guest.
//!
//! The guest is the pod: its network, UTS and IPC namespaces are the guest's
//! own, or owned by its user namespace, its cgroup tree is the agent's, and every
//! path comes from the shared tree. What cannot be had there is refused by its field's name.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, LinuxNamespaceType, Mount, Spec};
use podhull_api::agent;
use podhull_storage::{GuestPath, Propagation, SharedTree, StorageError, Volume};
use podhull_types::{ContainerId, SandboxId, chain};
use serde::Serialize;

use crate::error::SandboxError;
use crate::fields;
use crate::spec::{ContainerSpec, PodFiles, SandboxSpec};
use crate::users;

mod oci_fields;

pub use oci_fields::OCI_FIELDS;

/// Where the guest sees the shared tree.
const SHARE: &str = "/run/podhull/share";
/// The pod's shared memory in the guest.
const SHM: &str = "/run/podhull/shm";
/// Host folders that a guest must not see: what they show is the host's.
const HOST_ONLY: [&str; 3] = ["/dev", "/proc", "/sys"];

/// What a container's PID namespace is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PidNamespace {
    Own,
    Pod,
    Of(ContainerId),
}

impl PidNamespace {
    pub(crate) fn to_wire(&self) -> (agent::PidNamespace, String) {
        match self {
            Self::Own => (agent::PidNamespace::Container, String::new()),
            Self::Pod => (agent::PidNamespace::Pod, String::new()),
            Self::Of(container) => (agent::PidNamespace::Target, container.to_string()),
        }
    }
}

/// A container as the guest makes it.
#[derive(Debug)]
pub(crate) struct GuestSpec {
    pub(crate) oci: Spec,
    pub(crate) rootfs: String,
    pub(crate) pid_namespace: PidNamespace,
}

/// Translates `container`'s spec and puts its files into `tree`. `targets` are
/// the PIDs that its PID namespace may be named by; `None` is the pod's own.
pub(crate) fn translate(
    sandbox: &SandboxSpec,
    container: &ContainerSpec,
    tree: &SharedTree,
    targets: &[(u32, Option<ContainerId>)],
) -> Result<GuestSpec, SandboxError> {
    let mut oci = container.oci.clone();
    refuse_namespaces(&oci)?;
    users::check(&oci, sandbox.users)?;
    check_fields(&oci, "")?;
    let pid_namespace = pid_namespace(&oci, targets)?;
    strip_host(&mut oci);
    open_devices(&mut oci);
    let rootfs = in_share(&tree.mount_rootfs(&container.id, &container.rootfs)?);
    let mut mounts = oci.mounts().clone().unwrap_or_default();
    let missing = missing_files(&sandbox.files, &mounts);
    mounts.extend(missing);
    let mut translated = Vec::with_capacity(mounts.len());
    for mount in mounts {
        translated.push(translate_mount(mount, container, tree, sandbox)?);
    }
    oci.set_mounts(Some(translated));
    Ok(GuestSpec {
        oci,
        rootfs,
        pid_namespace,
    })
}

fn in_share(path: &GuestPath) -> String {
    Path::new(SHARE)
        .join(path.as_path())
        .to_string_lossy()
        .into_owned()
}

/// Refuses what no guest can have, by the field's name. `part` is a specification,
/// or the part of one with that name.
pub(crate) fn check_fields(part: &impl Serialize, name: &str) -> Result<(), SandboxError> {
    let fields = serde_json::to_value(part)
        .map_err(|error| SandboxError::refused(name, error.to_string()))?;
    fields::check(&fields, name, OCI_FIELDS)
}

fn refuse_namespaces(oci: &Spec) -> Result<(), SandboxError> {
    let linux = oci.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_ref());
    let mut namespaces = namespaces.into_iter().flatten();
    if namespaces.any(|namespace| namespace.typ() == LinuxNamespaceType::Time) {
        return Err(SandboxError::refused(
            "linux.namespaces[time]",
            "time namespaces are not supported",
        ));
    }
    Ok(())
}

/// Mounts of the pod's files that containerd leaves out where the shim makes
/// them; a container's own mounts come first.
fn missing_files(files: &PodFiles, mounts: &[Mount]) -> Vec<Mount> {
    ["/etc/hostname", "/etc/hosts", "/etc/resolv.conf"]
        .map(Path::new)
        .into_iter()
        .filter(|destination| made_by_shim(files, destination).is_some())
        .filter(|destination| {
            !mounts
                .iter()
                .any(|mount| mount.destination() == destination)
        })
        .map(|destination| {
            let mut mount = Mount::default();
            mount
                .set_destination(destination.into())
                .set_typ(Some("bind".into()))
                // There is none on the host: the file is written into the tree.
                .set_source(Some(Path::new("/nonexistent").join("podhull")))
                .set_options(Some(vec!["rbind".into(), "rprivate".into(), "rw".into()]));
            mount
        })
        .collect()
}

/// Whether a mount is the pod's shared memory: containerd's own folder for it,
/// or, where containerd makes none, the default of an image. A volume at the
/// same place is the container's.
fn is_pod_shm(mount: &Mount, sandbox: &SandboxId) -> bool {
    if mount.destination() != Path::new("/dev/shm") {
        return false;
    }
    let of_containerd = |source: &PathBuf| {
        source.ends_with(Path::new("sandboxes").join(sandbox.as_str()).join("shm"))
    };
    mount.typ().as_deref() == Some("tmpfs") || mount.source().as_ref().is_some_and(of_containerd)
}

fn pod_shm(mut mount: Mount) -> Mount {
    mount
        .set_typ(Some("bind".into()))
        .set_source(Some(SHM.into()))
        .set_options(Some(vec!["rbind".into(), "rw".into()]));
    mount
}

fn pid_namespace(
    oci: &Spec,
    targets: &[(u32, Option<ContainerId>)],
) -> Result<PidNamespace, SandboxError> {
    let namespaces = oci
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref());
    let pid = namespaces
        .into_iter()
        .flatten()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Pid);
    let Some(pid) = pid else {
        return Err(SandboxError::refused(
            "hostPID",
            "a pod in a VM cannot see the host's processes",
        ));
    };
    let Some(path) = pid.path() else {
        return Ok(PidNamespace::Own);
    };
    let named = path
        .to_str()
        .and_then(|path| path.strip_prefix("/proc/")?.strip_suffix("/ns/pid"));
    let target = named
        .and_then(|pid| pid.parse::<u32>().ok())
        .and_then(|pid| targets.iter().find(|(known, _)| *known == pid));
    match target {
        Some((_, Some(container))) => Ok(PidNamespace::Of(container.clone())),
        Some((_, None)) => Ok(PidNamespace::Pod),
        None => Err(SandboxError::refused(
            "linux.namespaces[pid].path",
            format!("{} is no namespace of this pod", path.display()),
        )),
    }
}

/// Removes what only means something on the host.
fn strip_host(oci: &mut Spec) {
    oci.set_hostname(None);
    oci.set_domainname(None);
    oci.set_annotations(None);
    if let Some(linux) = oci.linux_mut() {
        let shared = [
            LinuxNamespaceType::Network,
            LinuxNamespaceType::Uts,
            LinuxNamespaceType::Ipc,
            LinuxNamespaceType::Pid,
            LinuxNamespaceType::User,
        ];
        let namespaces = linux.namespaces().clone().unwrap_or_default();
        let own = namespaces
            .into_iter()
            .filter(|ns| !shared.contains(&ns.typ()))
            .collect();
        linux.set_namespaces(Some(own));
        linux.set_uid_mappings(None);
        linux.set_gid_mappings(None);
        linux.set_cgroups_path(None);
        linux.set_mount_label(None);
        if let Some(resources) = linux.resources_mut() {
            // All are zero: what asks for some was refused.
            resources.set_hugepage_limits(None);
            // There is no swap in a guest, nor a file to limit it by.
            if let Some(memory) = resources.memory_mut() {
                memory.set_swap(None);
            }
        }
        // Said of the host's mounts; what the guest shows of them follows by
        // itself.
        linux.set_rootfs_propagation(None);
    }
    if let Some(process) = oci.process_mut() {
        process.set_apparmor_profile(None);
        process.set_selinux_label(None);
    }
}

/// Lets a privileged container use every device: the guest has nodes of its own for
/// such a one. CRI's word for it does not reach a runtime, but only then does
/// containerd leave /sys writable (`WithPrivileged` of its pkg/oci).
fn open_devices(oci: &mut Spec) {
    let writable = |mount: &Mount| {
        let options = mount.options().iter().flatten();
        mount.typ().as_deref() == Some("sysfs") && !options.into_iter().any(|it| it == "ro")
    };
    if !oci.mounts().iter().flatten().any(writable) {
        return;
    }
    if let Some(linux) = oci.linux_mut() {
        let mut resources = linux.resources().clone().unwrap_or_default();
        let mut all = LinuxDeviceCgroup::default();
        all.set_allow(true)
            .set_typ(Some(LinuxDeviceType::A))
            .set_access(Some("rwm".into()));
        resources.set_devices(Some(vec![all]));
        linux.set_resources(Some(resources));
    }
}

fn translate_mount(
    mut mount: Mount,
    container: &ContainerSpec,
    tree: &SharedTree,
    sandbox: &SandboxSpec,
) -> Result<Mount, SandboxError> {
    if is_pod_shm(&mount, &sandbox.id) {
        return Ok(pod_shm(mount));
    }
    let options = mount.options().clone().unwrap_or_default();
    let has = |name: &str| options.iter().any(|option| option == name);
    if !(mount.typ().as_deref() == Some("bind") || has("bind") || has("rbind")) {
        return Ok(mount);
    }
    let destination = mount.destination().clone();
    let field = || format!("mounts[{}]", destination.display());
    if has("shared") || has("rshared") {
        let reason = "Bidirectional propagation: a mount made in a VM cannot reach the host";
        return Err(SandboxError::refused(field(), reason));
    }
    let ids = users::of_mount(&mount)?;
    let Some(source) = mount.source().clone() else {
        return Err(SandboxError::refused(
            field(),
            "a bind mount needs a source",
        ));
    };
    let recursive = !has("bind");
    let source =
        bindable(&source, recursive).map_err(|reason| SandboxError::refused(field(), reason))?;
    let path = match made_by_shim(&sandbox.files, &destination).filter(|_| !source.exists()) {
        Some((name, content)) => {
            tree.write_file(&container.id, name, content.as_bytes(), sandbox.users)?
        }
        None => {
            let volume = Volume {
                source,
                recursive,
                // containerd sends "rro" without "ro".
                read_only: has("ro") || has("rro"),
                recursive_read_only: has("rro"),
                propagation: match (has("slave"), has("rslave")) {
                    (false, false) => Propagation::Private,
                    _ => Propagation::HostToContainer,
                },
                ids,
            };
            tree.bind(&container.id, &volume)
                .map_err(|error| refuse_owners(error, &destination))?
        }
    };
    mount.set_source(Some(in_share(&path).into()));
    mount.set_uid_mappings(None).set_gid_mappings(None);
    // The host has done what these ask for.
    let left = |option: &String| option != "idmap" && option != "ridmap";
    mount.set_options(Some(options.into_iter().filter(left).collect()));
    Ok(mount)
}

/// Where a mount cannot show other owners, it is refused by its field's name.
fn refuse_owners(error: StorageError, destination: &Path) -> SandboxError {
    match error {
        StorageError::Owners { .. } => {
            let field = format!("mounts[{}].uidMappings", destination.display());
            SandboxError::refused(field, chain(&error))
        }
        error => error.into(),
    }
}

/// The path without links that a bind of `source` is to bind, or why there must be
/// none. One that is missing is named by who binds it.
fn bindable(source: &Path, recursive: bool) -> Result<PathBuf, String> {
    let resolved = std::fs::canonicalize(source).unwrap_or_else(|_| source.into());
    let shown = HOST_ONLY.into_iter().find(|folder| {
        resolved.starts_with(folder) || (recursive && Path::new(folder).starts_with(&resolved))
    });
    match shown {
        Some(folder) => Err(format!("{} shows the host's {folder}", source.display())),
        None => Ok(resolved),
    }
}

/// The file that containerd left to the shim for this mount, if it is one.
fn made_by_shim<'a>(files: &'a PodFiles, destination: &Path) -> Option<(&'static str, &'a str)> {
    let (name, content) = match destination.to_str()? {
        "/etc/resolv.conf" => ("resolv.conf", &files.resolv_conf),
        "/etc/hosts" => ("hosts", &files.hosts),
        "/etc/hostname" => ("hostname", &files.hostname),
        _ => return None,
    };
    Some((name, content.as_deref()?))
}

#[cfg(test)]
mod tests;
