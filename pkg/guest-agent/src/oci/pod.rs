// SPDX-License-Identifier: Apache-2.0
//! `oci pod`: makes the namespaces of a pod with a user namespace, and
//! `oci sysctls`: sets sysctls in them. No process stays.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, pipe2};
use rustix::process::{Resource, Rlimit, setrlimit};
use serde::{Deserialize, Serialize};

use crate::error::GuestError;
use crate::helper::{Line, receive};
use crate::pod::{self, KINDS, Mapping, set_sysctl};
use crate::sys;

/// What the helper is to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Task {
    pub(crate) users: Mapping,
    pub(crate) hostname: String,
    pub(crate) domainname: String,
}

/// What the kernel limits for a user namespace as a whole to what its maker may:
/// the containers have limits of their own.
const FOR_ALL: [Resource; 3] = [Resource::Memlock, Resource::Sigpending, Resource::Msgqueue];

/// In the first process of the namespaces, which then ends.
fn inside(task: &Task, mut ready: fs::File, mut go: fs::File) -> Result<(), GuestError> {
    let namespaces = CloneFlags::CLONE_NEWUSER
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC;
    unshare(namespaces).map_err(GuestError::system("make the pod's namespaces"))?;
    let told = ready.write_all(&[0]).and_then(|()| go.read_exact(&mut [0]));
    told.map_err(GuestError::system("wait for the mapping"))?;
    pod::become_root()?;
    nix::unistd::sethostname(&task.hostname).map_err(GuestError::system("set the hostname"))?;
    rustix::system::setdomainname(task.domainname.as_bytes())
        .map_err(GuestError::system("set the domain name"))
}

fn map(pid: Pid, task: &Task) -> Result<(), GuestError> {
    let users = task.users.users()?;
    for (file, ids) in [("uid_map", users.uids), ("gid_map", users.gids)] {
        let path = format!("/proc/{pid}/{file}");
        fs::write(&path, ids.to_string()).map_err(GuestError::file("write", path))?;
    }
    KINDS.iter().try_for_each(|kind| pod::keep(pid, kind))
}

fn make(task: &Task, tell: impl FnOnce(GuestError)) -> Result<(), GuestError> {
    let none = Rlimit {
        current: None,
        maximum: None,
    };
    for limit in FOR_ALL {
        setrlimit(limit, none).map_err(GuestError::system("raise a limit"))?;
    }
    let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(GuestError::system("make a pipe"));
    let ((ready, to_ready), (go, to_go)) = (pipe()?, pipe()?);
    let ends: (OwnedFd, OwnedFd) = (ready, to_go);
    let pid = sys::fork(|| match inside(task, to_ready.into(), go.into()) {
        Ok(()) => 0,
        Err(error) => {
            tell(error);
            1
        }
    })
    .map_err(GuestError::system("fork"))?;
    let (mut ready, mut to_go) = (fs::File::from(ends.0), fs::File::from(ends.1));
    let mapped = match ready.read(&mut [0]) {
        Ok(1) => map(pid, task).and_then(|()| {
            to_go
                .write_all(&[0])
                .map_err(GuestError::system("tell the pod's first process"))
        }),
        // It has said why.
        Ok(_) => Ok(()),
        Err(error) => Err(GuestError::system("wait for the namespaces")(error)),
    };
    // Otherwise it would wait for ever.
    drop(to_go);
    let ended = waitpid(pid, None).map_err(GuestError::system("wait for the first process"))?;
    mapped?;
    match ended {
        WaitStatus::Exited(_, 0 | 1) => Ok(()),
        other => Err(GuestError::system("set up the namespaces")(
            io::Error::other(format!("{other:?}")),
        )),
    }
}

pub(super) fn main() -> bool {
    let Ok((task, report)) = receive::<Task>() else {
        return false;
    };
    let words = report.clone();
    let made = make(&task, |error| words.send(&Line::Error(error.to_string())));
    if let Err(error) = &made {
        report.send(&Line::Error(error.to_string()));
    }
    made.is_ok()
}

fn set(sysctls: &HashMap<String, String>) -> Result<(), GuestError> {
    for kind in KINDS {
        pod::enter(kind).map_err(GuestError::file("enter", pod::path(kind)))?;
    }
    pod::become_root()?;
    sysctls
        .iter()
        .try_for_each(|(name, value)| set_sysctl(name, value))
}

pub(super) fn sysctls() -> bool {
    let Ok((sysctls, report)) = receive::<HashMap<String, String>>() else {
        return false;
    };
    let set = set(&sysctls);
    if let Err(error) = &set {
        report.send(&Line::Error(error.to_string()));
    }
    set.is_ok()
}
