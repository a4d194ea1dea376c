// SPDX-License-Identifier: Apache-2.0
//! The one place where children are waited for.
//!
//! PID 1 inherits every orphan. Whoever else waited would take exits away from
//! their owners, so nobody else does: children are spawned and signalled under
//! the same lock under which they are reaped, hence no exit is lost and no PID
//! is signalled after it was given to another process.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::error::GuestError;
use crate::sys;

/// Exits of processes that nobody has claimed yet: those of helpers' children
/// that ended before their PID was known. More are orphans nobody asks for.
const UNCLAIMED: usize = 128;

#[derive(Debug)]
struct Unclaimed {
    pid: Pid,
    code: u8,
    at: Instant,
}

#[derive(Debug, Default)]
struct Table {
    waiting: HashMap<Pid, oneshot::Sender<u8>>,
    unclaimed: VecDeque<Unclaimed>,
}

/// Reaps every child of the process.
#[derive(Debug, Clone, Default)]
pub struct Reaper {
    table: Arc<Mutex<Table>>,
}

/// What the kernel says of an end, as an exit code.
fn code(status: WaitStatus) -> Option<(Pid, u8)> {
    match status {
        WaitStatus::Exited(pid, code) => Some((pid, u8::try_from(code & 0xff).unwrap_or(u8::MAX))),
        WaitStatus::Signaled(pid, signal, _) => Some((
            pid,
            128u8.saturating_add(u8::try_from(signal as i32).unwrap_or(0)),
        )),
        _ => None,
    }
}

impl Reaper {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reaps until the process ends. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// If SIGCHLD cannot be received.
    pub fn start(&self) -> Result<(), GuestError> {
        let mut children =
            signal(SignalKind::child()).map_err(GuestError::system("receive SIGCHLD"))?;
        let reaper = self.clone();
        tokio::spawn(async move {
            while children.recv().await.is_some() {
                reaper.reap();
            }
        });
        Ok(())
    }

    fn reap(&self) {
        let mut table = self.lock();
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(status) => {
                    if let Some((pid, code)) = code(status) {
                        table.ended(pid, code);
                    }
                }
                Err(Errno::EINTR) => {}
                Err(errno) => {
                    tracing::error!(%errno, "waiting for children");
                    return;
                }
            }
        }
    }

    /// Spawns a child whose exit comes on the channel.
    ///
    /// # Errors
    /// If it cannot be spawned.
    pub fn spawn(&self, command: &mut Command) -> io::Result<(Pid, oneshot::Receiver<u8>)> {
        let mut table = self.lock();
        let child = command.spawn()?;
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
        let (sender, receiver) = oneshot::channel();
        table.waiting.insert(pid, sender);
        Ok((pid, receiver))
    }

    /// Claims the exit of a process that was made after `since` by a helper and
    /// is, or becomes, a child of this process.
    #[must_use]
    pub fn claim(&self, pid: Pid, since: Instant) -> oneshot::Receiver<u8> {
        let mut table = self.lock();
        let (sender, receiver) = oneshot::channel();
        let ended = table
            .unclaimed
            .iter()
            .position(|exit| exit.pid == pid && exit.at >= since);
        match ended.and_then(|index| table.unclaimed.remove(index)) {
            Some(exit) => drop(sender.send(exit.code)),
            None => drop(table.waiting.insert(pid, sender)),
        }
        receiver
    }

    /// Signals a process that has not been reaped.
    ///
    /// # Errors
    /// ESRCH if it has.
    pub fn signal(&self, pid: Pid, signal: i32) -> io::Result<()> {
        let table = self.lock();
        if !table.waiting.contains_key(&pid) {
            return Err(Errno::ESRCH.into());
        }
        sys::kill_raw(pid, signal)
    }
}

impl Table {
    fn ended(&mut self, pid: Pid, code: u8) {
        match self.waiting.remove(&pid) {
            // Whoever stopped waiting does not need the code.
            Some(waiter) => drop(waiter.send(code)),
            None => {
                self.unclaimed.push_back(Unclaimed {
                    pid,
                    code,
                    at: Instant::now(),
                });
                if self.unclaimed.len() > UNCLAIMED {
                    self.unclaimed.pop_front();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::Signal;

    use super::*;

    #[test]
    fn ends_become_exit_codes() {
        let pid = Pid::from_raw(5);
        assert_eq!(code(WaitStatus::Exited(pid, 42)), Some((pid, 42)));
        assert_eq!(
            code(WaitStatus::Signaled(pid, Signal::SIGKILL, false)),
            Some((pid, 137))
        );
        assert_eq!(code(WaitStatus::StillAlive), None);
    }

    // One test, because reaping takes every child of the process.
    #[expect(clippy::zombie_processes, reason = "the reaper under test waits")]
    #[tokio::test]
    async fn every_exit_reaches_its_owner_and_gone_pids_are_not_signalled() {
        let reaper = Reaper::default();
        reaper.start().unwrap();
        for expected in [0, 1, 42] {
            let (pid, exit) = reaper
                .spawn(Command::new("sh").args(["-c", &format!("exit {expected}")]))
                .unwrap();
            assert_eq!(exit.await.unwrap(), expected);
            let error = reaper.signal(pid, libc::SIGTERM).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
        }
        let (pid, exit) = reaper.spawn(Command::new("sleep").arg("60")).unwrap();
        reaper.signal(pid, libc::SIGTERM).unwrap();
        assert_eq!(exit.await.unwrap(), 128 + 15);

        // An exit that came before it was claimed.
        let since = Instant::now();
        let child = Command::new("sh").args(["-c", "exit 7"]).spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        assert_eq!(reaper.claim(pid, since).await.unwrap(), 7);
    }
}
