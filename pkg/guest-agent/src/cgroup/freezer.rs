// SPDX-License-Identifier: Apache-2.0
//! Freezing a cgroup. The kernel only begins with that when it is told to, and
//! says in `cgroup.events` when every process stands still.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use podhull_types::Deadline;
use rustix::fs::inotify;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::{Cgroup, parse_flat};
use crate::error::GuestError;

const EVENTS: &str = "cgroup.events";

/// Tells of a file's changes: the kernel writes each as into a pipe.
#[derive(Debug)]
struct Changes(pipe::Receiver);

impl Changes {
    fn of(path: &Path) -> io::Result<Self> {
        let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
        let watch = inotify::init(flags)?;
        inotify::add_watch(&watch, path, inotify::WatchFlags::MODIFY)?;
        pipe::Receiver::from_owned_fd_unchecked(watch).map(Self)
    }

    /// Waits for one since the last time. What it says is not needed.
    async fn next(&mut self) -> io::Result<()> {
        self.0.read(&mut [0; 512]).await.map(drop)
    }
}

impl Cgroup {
    /// Freezes its processes, or lets them run again, and waits until it is so.
    ///
    /// # Errors
    /// What the kernel says, or [`GuestError::Deadline`]: they run on then.
    pub(crate) async fn freeze(&self, frozen: bool, by: Deadline) -> Result<(), GuestError> {
        let path = self.path().join(EVENTS);
        let mut changes = Changes::of(&path).map_err(GuestError::file("watch", &path))?;
        let wanted = u64::from(frozen);
        self.write("cgroup.freeze", &wanted.to_string())?;
        let settled = async {
            loop {
                let events = self.read(EVENTS)?;
                let events: HashMap<String, u64> = parse_flat(&events);
                if events.get("frozen") == Some(&wanted) {
                    return Ok(());
                }
                changes.next().await?;
            }
        };
        match by.run(settled).await {
            Ok(settled) => settled.map_err(GuestError::file("wait for", &path)),
            Err(_) if frozen => {
                self.write("cgroup.freeze", "0")?;
                Err(GuestError::Deadline("freeze the container"))
            }
            Err(_) => Err(GuestError::Deadline("let the container run")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::*;

    /// A folder with the two files, and what the kernel would write.
    fn cgroup(events: &str) -> (tempfile::TempDir, Cgroup) {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("cgroup.freeze"), "").unwrap();
        fs::write(folder.path().join(EVENTS), events).unwrap();
        let cgroup = Cgroup(folder.path().to_owned());
        (folder, cgroup)
    }

    #[tokio::test]
    async fn a_freeze_is_over_when_the_kernel_says_so() {
        for (frozen, before, after) in [(true, "0", "1"), (false, "1", "0")] {
            let events = |value: &str| format!("populated 1\nfrozen {value}\n");
            let (_folder, cgroup) = cgroup(&events(before));
            let mut freezing =
                Box::pin(cgroup.freeze(frozen, Deadline::after(Duration::from_secs(20))));
            // Another change than the one that is waited for.
            for _ in 0..2 {
                let short = tokio::time::timeout(Duration::from_millis(50), &mut freezing);
                assert!(short.await.is_err(), "it is said to be so too early");
                fs::write(cgroup.path().join(EVENTS), events(before)).unwrap();
            }
            assert_eq!(cgroup.read("cgroup.freeze").unwrap(), after);
            fs::write(cgroup.path().join(EVENTS), events(after)).unwrap();
            freezing.await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_does_not_freeze_in_time_runs_on() {
        let (_folder, cgroup) = cgroup("frozen 0\n");
        let freezing = cgroup.freeze(true, Deadline::after(Duration::from_millis(20)));
        let error = freezing.await.unwrap_err();
        assert!(matches!(error, GuestError::Deadline(_)), "{error}");
        assert_eq!(cgroup.read("cgroup.freeze").unwrap(), "0");
    }
}
