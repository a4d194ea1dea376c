// SPDX-License-Identifier: Apache-2.0
//! `oci pause`: PID 1 of the pod's shared PID namespace. It reaps and does
//! nothing else.

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::wait::waitpid;

use crate::error::GuestError;
use crate::helper::{Line, receive};
use crate::sys;

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

fn make() -> Result<i32, GuestError> {
    unshare(CloneFlags::CLONE_NEWPID).map_err(GuestError::system("make a PID namespace"))?;
    let pid = sys::fork(hold).map_err(GuestError::system("fork"))?;
    Ok(pid.as_raw())
}

pub(super) fn main() -> bool {
    let Ok(((), report)) = receive::<()>() else {
        return false;
    };
    match make() {
        Ok(pid) => report.send(&Line::Pid(pid)),
        Err(error) => report.send(&Line::Error(error.to_string())),
    }
    true
}
