// SPDX-License-Identifier: Apache-2.0
//! Which process serves a pod, written down so that another can end it: one that
//! hangs does not say its PID any more.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use podhull_types::Deadline;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::error::ShimError;

/// Time for the kernel to end a shim that was killed.
pub(crate) const DIES: Duration = Duration::from_secs(1);

/// A process. PIDs are used again; the moment of its start tells it from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pid: i32,
    /// In clock ticks since the node's boot, from /proc/PID/stat.
    start_time: u64,
}

impl Identity {
    /// The calling process.
    pub(crate) fn own() -> io::Result<Self> {
        let pid = nix::unistd::getpid().as_raw();
        let start_time = start_time(pid)?;
        Ok(Self { pid, start_time })
    }

    /// Writes it down, whole: it may be read at any moment.
    pub(crate) fn write(&self, path: &Path) -> Result<(), ShimError> {
        let new = path.with_extension("new");
        serde_json::to_vec(self)
            .map_err(io::Error::other)
            .and_then(|text| fs::write(&new, text))
            .and_then(|()| fs::rename(&new, path))
            .map_err(ShimError::file("write", path))
    }

    /// The process that is written down at `path`, if it still runs.
    pub(crate) fn find(path: &Path) -> Option<Running> {
        let identity: Self = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        identity.running()
    }

    fn running(self) -> Option<Running> {
        let running = Running::open(self.pid).ok()?;
        // Looked at after the open: what has this PID and this start now had it
        // then, too.
        if start_time(self.pid).ok()? != self.start_time {
            return None;
        }
        (!running.has_ended()).then_some(running)
    }
}

/// A process that ran when it was found.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) pid: i32,
    pidfd: Arc<OwnedFd>,
}

impl Running {
    /// A child of ours, which nobody has waited for yet.
    pub(crate) fn child(child: &std::process::Child) -> io::Result<Self> {
        Self::open(i32::try_from(child.id()).map_err(io::Error::other)?)
    }

    fn open(pid: i32) -> io::Result<Self> {
        let raw = Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
        let pidfd = Arc::new(pidfd_open(raw, PidfdFlags::NONBLOCK)?);
        Ok(Self { pid, pidfd })
    }

    fn has_ended(&self) -> bool {
        self.ends_within(Duration::ZERO)
    }

    /// Waits on this thread for its end; whether it came.
    pub(crate) fn ends_within(&self, time: Duration) -> bool {
        ends_within(&self.pidfd, time)
    }

    /// Waits for its end; whether it came. The calling thread goes on with what
    /// else it has to do: a connection to the shim that is to be closed.
    pub(crate) async fn ends_by(&self, by: Deadline) -> bool {
        let (pidfd, time) = (Arc::clone(&self.pidfd), by.remaining());
        let waits = tokio::task::spawn_blocking(move || ends_within(&pidfd, time));
        waits.await.unwrap_or_else(|_| self.has_ended())
    }

    /// Kills it.
    pub(crate) fn kill(&self) {
        if let Err(errno) = pidfd_send_signal(&self.pidfd, Signal::KILL) {
            tracing::warn!(pid = self.pid, %errno, "a shim cannot be killed");
        }
    }
}

fn ends_within(pidfd: &OwnedFd, time: Duration) -> bool {
    let timeout = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
    let mut watched = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    poll(&mut watched, timeout).is_ok_and(|ready| ready > 0)
}

fn start_time(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    start_time_in(&stat).ok_or_else(|| io::Error::other("/proc/PID/stat has no start time"))
}

/// Field 22. The name, field 2, is in brackets and may itself hold any character.
fn start_time_in(stat: &str) -> Option<u64> {
    let (_, behind_name) = stat.rsplit_once(')')?;
    behind_name.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn sleeping() -> (Child, Identity) {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let start_time = start_time(pid).unwrap();
        (child, Identity { pid, start_time })
    }

    #[tokio::test]
    async fn a_stopped_process_is_found_and_killed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shim.json");
        assert!(Identity::find(&path).is_none());
        let (mut child, identity) = sleeping();
        identity.write(&path).unwrap();
        let found = Identity::find(&path).unwrap();
        assert_eq!(found.pid, identity.pid);
        pidfd_send_signal(&found.pidfd, Signal::STOP).unwrap();
        assert!(
            !found
                .ends_by(Deadline::after(Duration::from_millis(10)))
                .await
        );
        found.kill();
        assert!(found.ends_by(Deadline::after(Duration::from_secs(5))).await);
        // A zombie has ended.
        assert!(Identity::find(&path).is_none());
        child.wait().unwrap();
        assert!(Identity::find(&path).is_none());
    }

    #[test]
    fn a_pid_that_another_process_has_now_is_left_alone() {
        let (mut child, identity) = sleeping();
        let earlier = Identity {
            start_time: identity.start_time - 1,
            ..identity
        };
        assert!(earlier.running().is_none());
        assert!(identity.running().is_some());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn the_start_is_found_behind_any_name() {
        let stat = "7 (a) b) R 1 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 98765 0 0";
        assert_eq!(start_time_in(stat), Some(98765));
        assert_eq!(start_time_in("7 (a) R 1"), None);
        assert!(Identity::own().unwrap().running().is_some());
    }
}
