// SPDX-License-Identifier: Apache-2.0
//! `oci pause`: PID 1 of the pod's shared PID namespace. It reaps and does
//! nothing else.

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::wait::waitpid;
use serde::{Deserialize, Serialize};

use crate::error::GuestError;
use crate::helper::{Line, receive};
use crate::pod;
use crate::sys;

/// What the helper is to do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Task {
    /// The pod has a user namespace: it owns the PID namespace, too.
    pub in_user_namespace: bool,
}

fn hold() -> i32 {
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    if sigprocmask(SigmaskHow::SIG_BLOCK, Some(&children), None).is_err() {
        return 1;
    }
    loop {
        while waitpid(None, Some(nix::sys::wait::WaitPidFlag::WNOHANG))
            .is_ok_and(|status| status.pid().is_some())
        {}
        if children.wait().is_err() {
            return 1;
        }
    }
}

fn make(task: &Task) -> Result<i32, GuestError> {
    if task.in_user_namespace {
        pod::enter("user").map_err(GuestError::file("enter", pod::path("user")))?;
        pod::become_root()?;
    }
    unshare(CloneFlags::CLONE_NEWPID).map_err(GuestError::system("make a PID namespace"))?;
    let pid = sys::fork(hold).map_err(GuestError::system("fork"))?;
    Ok(pid.as_raw())
}

pub(super) fn main() -> bool {
    let Ok((task, report)) = receive::<Task>() else {
        return false;
    };
    match make(&task) {
        Ok(pid) => report.send(&Line::Pid(pid)),
        Err(error) => report.send(&Line::Error(error.to_string())),
    }
    true
}
