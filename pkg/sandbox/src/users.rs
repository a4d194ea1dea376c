// SPDX-License-Identifier: Apache-2.0
//! User namespaces as an OCI specification describes them.
//!
//! One belongs to a pod. Its IDs outside are those that containerd's snapshotter and
//! its volumes are given, and the guest's, where the pod's namespace maps the same.

use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Mount, Spec};
use podhull_api::agent;
use podhull_storage::MappedIds;
use podhull_types::{IdMapping, UserNamespace};

use crate::error::SandboxError;

fn ids(mappings: Option<&Vec<LinuxIdMapping>>, field: &str) -> Result<IdMapping, SandboxError> {
    let all = mappings.into_iter().flatten();
    IdMapping::only(all.map(|ids| (ids.container_id(), ids.host_id(), ids.size())))
        .map_err(|error| SandboxError::refused(field, error.to_string()))
}

/// What the user namespace maps that `oci` asks for, if it does.
///
/// # Errors
/// A mapping that no pod can have, by its field's name.
pub fn of_spec(oci: &Spec) -> Result<Option<UserNamespace>, SandboxError> {
    let Some(linux) = oci.linux() else {
        return Ok(None);
    };
    let mut namespaces = linux.namespaces().iter().flatten();
    if !namespaces.any(|namespace| namespace.typ() == LinuxNamespaceType::User) {
        return Ok(None);
    }
    Ok(Some(UserNamespace {
        uids: ids(linux.uid_mappings().as_ref(), "linux.uidMappings")?,
        gids: ids(linux.gid_mappings().as_ref(), "linux.gidMappings")?,
    }))
}

/// Refuses a container whose users are not those of its pod.
pub(crate) fn check(oci: &Spec, pod: Option<UserNamespace>) -> Result<(), SandboxError> {
    match (of_spec(oci)?, pod) {
        (None, None) => Ok(()),
        (Some(own), Some(pod)) if own == pod => Ok(()),
        (Some(own), Some(pod)) => {
            let (field, own, pod) = if own.uids == pod.uids {
                ("linux.gidMappings", own.gids, pod.gids)
            } else {
                ("linux.uidMappings", own.uids, pod.uids)
            };
            let reason = format!("{own} is not the pod's {pod}");
            Err(SandboxError::refused(field, reason))
        }
        (Some(_), None) => Err(SandboxError::refused(
            "linux.namespaces[user]",
            "the pod has no user namespace, and its containers have its users",
        )),
        (None, Some(_)) => Err(SandboxError::refused(
            "linux.namespaces[user]",
            "the pod has a user namespace, which its containers share",
        )),
    }
}

/// What owners a mount is to show, if others than its files have (OCI's `idmap`, and
/// `ridmap` for what is mounted below it, too).
pub(crate) fn of_mount(mount: &Mount) -> Result<Option<MappedIds>, SandboxError> {
    let (uids, gids) = (mount.uid_mappings().as_ref(), mount.gid_mappings().as_ref());
    if uids.is_none_or(Vec::is_empty) && gids.is_none_or(Vec::is_empty) {
        return Ok(None);
    }
    let field = |name: &str| format!("mounts[{}].{name}", mount.destination().display());
    let users = UserNamespace {
        uids: ids(uids, &field("uidMappings"))?,
        gids: ids(gids, &field("gidMappings"))?,
    };
    let mut options = mount.options().iter().flatten();
    Ok(Some(MappedIds {
        users,
        recursive: options.any(|option| option == "ridmap"),
    }))
}

pub(crate) fn to_wire(users: UserNamespace) -> agent::UserNamespace {
    let ids = |ids: IdMapping| agent::IdMapping {
        host: ids.root(),
        size: ids.size(),
    };
    agent::UserNamespace {
        uids: Some(ids(users.uids)),
        gids: Some(ids(users.gids)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(namespaces: &[&str], uid: u32, gid: u32) -> Spec {
        let namespaces: Vec<_> = namespaces
            .iter()
            .map(|kind| serde_json::json!({ "type": kind }))
            .collect();
        let ids = |host| serde_json::json!([{ "containerID": 0, "hostID": host, "size": 9 }]);
        serde_json::from_value(serde_json::json!({
            "ociVersion": "1.0.2",
            "linux": { "namespaces": namespaces, "uidMappings": ids(uid), "gidMappings": ids(gid) },
        }))
        .unwrap()
    }

    fn users(uid: u32, gid: u32) -> UserNamespace {
        UserNamespace {
            uids: IdMapping::new(0, uid, 9).unwrap(),
            gids: IdMapping::new(0, gid, 9).unwrap(),
        }
    }

    #[test]
    fn a_container_has_the_users_of_its_pod() {
        let own = spec(&["pid", "user"], 5, 7);
        assert_eq!(of_spec(&own).unwrap(), Some(users(5, 7)));
        check(&own, Some(users(5, 7))).unwrap();
        let none = spec(&["pid"], 5, 7);
        check(&none, None).unwrap();
        for (oci, pod, field) in [
            (&own, Some(users(6, 7)), "linux.uidMappings: 0 5 9 is not"),
            (&own, Some(users(5, 8)), "linux.gidMappings: 0 7 9 is not"),
            (&own, None, "linux.namespaces[user]"),
            (&none, Some(users(5, 7)), "linux.namespaces[user]"),
        ] {
            let error = check(oci, pod).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }

    #[test]
    fn a_bad_mapping_is_named_by_its_field() {
        let bad = spec(&["user"], u32::MAX, 7);
        let error = of_spec(&bad).unwrap_err().to_string();
        assert!(error.starts_with("linux.uidMappings"), "{error}");
        let mount = |gids: serde_json::Value| -> Mount {
            serde_json::from_value(serde_json::json!({
                "destination": "/data", "type": "bind", "source": "/x",
                "options": ["rbind", "ridmap"],
                "uidMappings": [{ "containerID": 0, "hostID": 5, "size": 9 }],
                "gidMappings": gids,
            }))
            .unwrap()
        };
        let error = of_mount(&mount(serde_json::json!([])))
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("mounts[/data].gidMappings"), "{error}");
        let gids = serde_json::json!([{ "containerID": 0, "hostID": 7, "size": 9 }]);
        let mapped = of_mount(&mount(gids)).unwrap().unwrap();
        assert_eq!((mapped.users, mapped.recursive), (users(5, 7), true));
        assert_eq!(of_mount(&Mount::default()).unwrap(), None);
    }
}
