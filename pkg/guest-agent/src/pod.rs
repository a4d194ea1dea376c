// SPDX-License-Identifier: Apache-2.0
//! The namespaces of a pod with a user namespace.
//!
//! The user namespace owns the network, UTS and IPC namespaces that the pod's
//! containers share. A helper makes them ([`crate::oci::pod`]) and leaves them in
//! files: who is in a user namespace may enter those, but see into no process of
//! ours. Without a user namespace the guest's own are the pod's, and nothing of
//! this is there.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns};
use nix::unistd::{Gid, Pid, Uid};
use podhull_api::agent;
use podhull_types::{Deadline, IdMapping, MappingError, UserNamespace};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::error::GuestError;
use crate::helper::{Helper, Streams};
use crate::init::RUN;
use crate::reaper::Reaper;

/// The namespaces of the pod, by the kernel's names for their files; the user
/// namespace comes first, as it has to be entered first.
pub(crate) const KINDS: [&str; 4] = ["user", "net", "uts", "ipc"];

/// The file that holds the pod's namespace of this kind.
pub(crate) fn path(kind: &str) -> PathBuf {
    Path::new(RUN).join("pod").join(kind)
}

/// Keeps the namespace of this kind of the process `pid` in its file.
pub(crate) fn keep(pid: Pid, kind: &str) -> Result<(), GuestError> {
    let (from, to) = (PathBuf::from(format!("/proc/{pid}/ns/{kind}")), path(kind));
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).map_err(GuestError::file("make folder", folder))?;
    }
    fs::write(&to, "").map_err(GuestError::file("make", &to))?;
    let none = None::<&str>;
    mount(Some(&from), &to, none, MsFlags::MS_BIND, none)
        .map_err(|errno| GuestError::file("keep a namespace in", to)(errno.into()))
}

/// Enters the pod's namespace of this kind, with the calling thread only.
pub(crate) fn enter(kind: &str) -> io::Result<()> {
    // The file says of which kind it is.
    Ok(setns(File::open(path(kind))?, CloneFlags::empty())?)
}

/// Becomes the root of the user namespace that the process is in.
pub(crate) fn become_root() -> Result<(), GuestError> {
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    nix::unistd::setgroups(&[])
        .and_then(|()| nix::unistd::setresgid(gid, gid, gid))
        .and_then(|()| nix::unistd::setresuid(uid, uid, uid))
        .map_err(GuestError::system("become root of the user namespace"))
}

/// The outer IDs of a process's user and group, or those of root.
pub(crate) fn outside(users: &UserNamespace, uid: u32, gid: u32) -> (u32, u32) {
    let of = |ids: IdMapping, id| ids.outside(id).unwrap_or(ids.root());
    (of(users.uids, uid), of(users.gids, gid))
}

/// A mapping on its way to a helper: first outer ID and size, of users and groups.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Mapping([u32; 4]);

impl From<UserNamespace> for Mapping {
    fn from(users: UserNamespace) -> Self {
        let (uids, gids) = (users.uids, users.gids);
        Self([uids.root(), uids.size(), gids.root(), gids.size()])
    }
}

impl Mapping {
    pub(crate) fn users(self) -> Result<UserNamespace, GuestError> {
        let [uid, uids, gid, gids] = self.0;
        let ids = |host, size| IdMapping::new(0, host, size).map_err(invalid);
        Ok(UserNamespace {
            uids: ids(uid, uids)?,
            gids: ids(gid, gids)?,
        })
    }
}

fn invalid(error: MappingError) -> GuestError {
    GuestError::Invalid {
        field: "user_namespace",
        reason: error.to_string(),
    }
}

fn from_wire(users: agent::UserNamespace) -> Result<UserNamespace, GuestError> {
    let ids = |ids: Option<agent::IdMapping>| {
        let ids = ids.unwrap_or_default();
        IdMapping::new(0, ids.host, ids.size).map_err(invalid)
    };
    Ok(UserNamespace {
        uids: ids(users.uids)?,
        gids: ids(users.gids)?,
    })
}

/// The pod. Cloning gives another handle.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pod(Arc<OnceLock<UserNamespace>>);

impl Pod {
    /// What its user namespace maps, if it has one.
    pub(crate) fn users(&self) -> Option<UserNamespace> {
        self.0.get().copied()
    }

    /// Makes its namespaces, with the host's name in them, if it asks for a user
    /// namespace.
    pub(crate) async fn make(
        &self,
        reaper: &Reaper,
        request: &agent::ConfigureRequest,
        by: Deadline,
    ) -> Result<(), GuestError> {
        let Some(users) = request.user_namespace else {
            return Ok(());
        };
        let users = from_wire(users)?;
        let task = crate::oci::pod::Task {
            users: users.into(),
            hostname: request.hostname.clone(),
            domainname: request.domainname.clone(),
        };
        let mut helper = Helper::start(reaper, "pod", &task, Streams::default())?;
        helper.executed(by).await?;
        if self.0.set(users).is_err() {
            let reason = "the pod was configured already".to_owned();
            let field = "user_namespace";
            return Err(GuestError::Invalid { field, reason });
        }
        Ok(())
    }

    /// Sets its sysctls, by its own root if it has one.
    pub(crate) async fn set_sysctls(
        &self,
        reaper: &Reaper,
        sysctls: &HashMap<String, String>,
        by: Deadline,
    ) -> Result<(), GuestError> {
        if self.users().is_none() {
            return sysctls
                .iter()
                .try_for_each(|(name, value)| set_sysctl(name, value));
        }
        let mut helper = Helper::start(reaper, "sysctls", sysctls, Streams::default())?;
        helper.executed(by).await
    }

    /// Does `work` in its network namespace, on a thread that does nothing else
    /// and ends with it: no other code of ours ever runs there.
    pub(crate) async fn in_network<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        if self.users().is_none() {
            return work();
        }
        let runtime = tokio::runtime::Handle::current();
        let (sender, answer) = oneshot::channel();
        std::thread::Builder::new().spawn(move || {
            let _entered = runtime.enter();
            // Who asked may have gone away.
            drop(sender.send(enter("net").and_then(|()| work())));
        })?;
        answer.await.map_err(io::Error::other)?
    }
}

/// Sets a sysctl of the calling process's namespaces.
pub(crate) fn set_sysctl(name: &str, value: &str) -> Result<(), GuestError> {
    let fine = name.split(['.', '/']).all(|part| {
        !part.is_empty()
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b))
    });
    if !fine {
        return Err(GuestError::Invalid {
            field: "sysctls",
            reason: format!("{name:?} is no name"),
        });
    }
    let path = PathBuf::from("/proc/sys").join(name.replace('.', "/"));
    fs::write(&path, value).map_err(GuestError::file("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_survives_its_ways_and_a_bad_one_is_named() {
        let ids = |host, size| agent::IdMapping { host, size };
        let wire = agent::UserNamespace {
            uids: Some(ids(100_000, 65_536)),
            gids: Some(ids(200_000, 1000)),
        };
        let users = from_wire(wire).unwrap();
        let text = serde_json::to_string(&Mapping::from(users)).unwrap();
        let read: Mapping = serde_json::from_str(&text).unwrap();
        assert_eq!(read.users().unwrap(), users);
        assert_eq!(outside(&users, 5, 7), (100_005, 200_007));
        // Who is in no mapping has no IDs: the process cannot be made.
        assert_eq!(outside(&users, 5, 5000), (100_005, 200_000));
        let error = from_wire(agent::UserNamespace::default()).unwrap_err();
        assert!(error.to_string().contains("user_namespace"), "{error}");
    }
}
