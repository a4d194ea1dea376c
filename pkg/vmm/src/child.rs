// SPDX-License-Identifier: Apache-2.0
//! Children: started by a thread that outlives them, watched and signalled by
//! pidfd, reaped once.
//!
//! A helper says one byte over a socket pair once it would die with us, and goes
//! on when it is answered. The kernel names the sender, by our PIDs: that is the
//! child. It may be another process than the one that was started, which has
//! ended then: the first in a PID namespace cannot put itself there.

use std::fs::File;
use std::io::{self, IoSliceMut, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, setsockopt, sockopt,
};
use podhull_types::Deadline;
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, kill_process, kill_process_group, pidfd_open,
    pidfd_send_signal, waitpgid, waitpid,
};
use serde::Serialize;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use crate::console::Console;
use crate::error::VmmError;
use crate::sys;

/// Where a helper finds its task.
pub(crate) const TASK_FD: i32 = 3;
/// A helper's end of the socket pair with us.
pub(crate) const SHIM_FD: i32 = 4;
/// The first of the descriptors that a child is given.
pub(crate) const FIRST_FD: i32 = 5;
/// Bytes of a child's standard error that are kept.
const STDERR_BYTES: usize = 8 * 1024;
/// How long the last words of one that has ended may be on their way.
const LAST_WORDS: Duration = Duration::from_millis(300);
/// How long the kernel may take to end what was killed. What it then still holds
/// is reaped when it ends, and not waited for.
pub(crate) const DIES: Duration = Duration::from_secs(2);

/// A child that was started as a helper of ours.
#[derive(Debug, Clone)]
pub(crate) struct Child {
    name: &'static str,
    pid: u32,
    pidfd: Arc<OwnedFd>,
    exit: watch::Receiver<Option<ExitStatus>>,
    said: Console,
    lingers: bool,
}

/// What a child is given besides its task.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    /// Its standard output; /dev/null if absent.
    pub(crate) stdout: Option<OwnedFd>,
    /// Its descriptors from [`FIRST_FD`] on, in order.
    pub(crate) fds: Vec<OwnedFd>,
}

type Job = Box<dyn FnOnce() + Send>;

/// Starts a process on the thread whose end would be the children's end: the
/// kernel sends a parent-death signal when the *thread* that forked ends.
/// Gives its PID; whoever called reaps it.
async fn spawn_on_lasting_thread(mut command: Command) -> io::Result<Pid> {
    static THREAD: OnceLock<std::sync::mpsc::Sender<Job>> = OnceLock::new();
    let jobs = THREAD.get_or_init(|| {
        let (sender, jobs) = std::sync::mpsc::channel::<Job>();
        std::thread::spawn(move || {
            for job in jobs {
                job();
            }
        });
        sender
    });
    let (sender, spawned) = oneshot::channel();
    let job: Job = Box::new(move || {
        // The receiver is gone only if the runtime is.
        drop(sender.send(command.spawn().and_then(|process| pid_of(&process))));
    });
    jobs.send(job)
        .map_err(|_| io::Error::other("the starting thread is gone"))?;
    spawned.await.map_err(io::Error::other)?
}

/// A child that is not reaped yet, so that its PID is its own.
#[derive(Debug)]
struct Unreaped {
    pid: Pid,
    pidfd: Arc<OwnedFd>,
    /// The same, to be watched.
    ended: AsyncFd<OwnedFd>,
}

impl Unreaped {
    /// Takes over our child `pid`; one that cannot be watched is killed.
    fn adopt(pid: Pid) -> io::Result<Self> {
        Self::adopt_with(pid, |pid| Ok(pidfd_open(pid, PidfdFlags::NONBLOCK)?))
    }

    fn adopt_with(pid: Pid, open: impl FnOnce(Pid) -> io::Result<OwnedFd>) -> io::Result<Self> {
        let opened = open(pid).and_then(|pidfd| Ok((sys::watched(pidfd.try_clone()?)?, pidfd)));
        match opened {
            Ok((ended, pidfd)) => Ok(Self {
                pid,
                pidfd: Arc::new(pidfd),
                ended,
            }),
            Err(error) => {
                let killed = kill_process(pid, Signal::KILL);
                let status = reap(pid);
                tracing::debug!(%pid, ?killed, ?status, "a child that cannot be watched");
                Err(error)
            }
        }
    }

    /// Kills it; how it ended, if it did in time.
    async fn kill(self) -> io::Result<ExitStatus> {
        let pid = self.pid;
        if let Err(errno) = pidfd_send_signal(&self.pidfd, Signal::KILL) {
            tracing::debug!(%pid, %errno, "not killed");
        }
        // Ends with the process, also if that is waited for no longer.
        let reaping = tokio::spawn(self.ended());
        in_time(pid, reaping).await
    }

    /// The same with all that it has started: a helper goes on in a process whose
    /// PID is not known before it greets, but which is of its group.
    async fn kill_group(self) -> io::Result<ExitStatus> {
        let pid = self.pid;
        if let Err(errno) = kill_process_group(pid, Signal::KILL) {
            tracing::debug!(%pid, %errno, "not killed");
        }
        // Ends with the processes.
        let reaping = tokio::task::spawn_blocking(move || reap_group(pid));
        in_time(pid, reaping).await
    }

    /// Waits for its end, and reaps it.
    async fn ended(self) -> io::Result<ExitStatus> {
        // Readable once the process is a zombie; an error would mean that the
        // reactor is gone, and the process is waited for all the same.
        let seen = self.ended.readable().await.map(drop);
        tracing::trace!(pid = %self.pid, ?seen, "child ended");
        reap(self.pid)
    }
}

fn reap(pid: Pid) -> io::Result<ExitStatus> {
    match waitpid(Some(pid), WaitOptions::empty())? {
        Some((_, status)) => Ok(ExitStatus::from_raw(status.as_raw())),
        None => Err(io::ErrorKind::WouldBlock.into()),
    }
}

/// Reaps the children of `leader`'s group; gives how `leader` ended.
fn reap_group(leader: Pid) -> io::Result<ExitStatus> {
    let mut ended = Err(io::ErrorKind::NotFound.into());
    loop {
        match waitpgid(leader, WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == leader => {
                ended = Ok(ExitStatus::from_raw(status.as_raw()));
            }
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::CHILD) => return ended,
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// The end of what was killed.
async fn in_time(pid: Pid, reaping: JoinHandle<io::Result<ExitStatus>>) -> io::Result<ExitStatus> {
    match Deadline::after(DIES).run(reaping).await {
        Ok(reaped) => reaped.map_err(io::Error::other)?,
        Err(elapsed) => {
            tracing::error!(%pid, "a child was killed and does not end");
            Err(io::Error::new(io::ErrorKind::TimedOut, elapsed))
        }
    }
}

/// Waits for a helper's byte; gives the PID of who sent it.
async fn greeting(channel: &tokio::net::UnixStream) -> io::Result<Pid> {
    let sender = channel
        .async_io(Interest::READABLE, || {
            let mut byte = [0];
            let mut data = [IoSliceMut::new(&mut byte)];
            let mut space = nix::cmsg_space!(UnixCredentials);
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message = recvmsg::<()>(channel.as_raw_fd(), &mut data, Some(&mut space), flags)?;
            if message.bytes == 0 {
                return Ok(None);
            }
            Ok(message.cmsgs()?.find_map(|part| match part {
                ControlMessageOwned::ScmCredentials(sender) => Some(sender.pid()),
                _ => None,
            }))
        })
        .await?;
    let pid = sender.and_then(Pid::from_raw);
    pid.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

impl Child {
    /// Starts `helper` as `role` with `task`; done once the child would die with
    /// us. It need not have become what it is to be.
    pub(crate) async fn start(
        name: &'static str,
        helper: &Path,
        role: &str,
        task: &impl Serialize,
        streams: Streams,
        by: Deadline,
    ) -> Result<Self, VmmError> {
        let failed = VmmError::system::<io::Error>;
        let (said, stderr) = Console::new(STDERR_BYTES).map_err(failed(name))?;
        let (mut channel, theirs) = channel().map_err(failed(name))?;
        let command = command(helper, role, task, streams, stderr, theirs).map_err(failed(name))?;
        let pid = spawn_on_lasting_thread(command)
            .await
            .map_err(failed(name))?;
        let first = Unreaped::adopt(pid).map_err(failed(name))?;
        let greeted = by.run(greeting(&channel)).await;
        let Ok(Ok(pid)) = greeted else {
            let status = first.kill_group().await;
            said.ended(Deadline::after(LAST_WORDS)).await;
            let said = said.tail();
            return Err(match (greeted, status) {
                (Err(_), _) => VmmError::ChildSlow { name, said },
                (Ok(_), Ok(status)) => VmmError::ChildDied {
                    name,
                    status: status.to_string(),
                    said,
                },
                (Ok(_), Err(error)) => failed(name)(error),
            });
        };
        let process = if pid == first.pid {
            first
        } else {
            // Ends with the first process, which has nothing to do any more.
            let reaping = tokio::spawn(first.ended());
            let second = Unreaped::adopt(pid).map_err(failed(name))?;
            let Ok(status) = by.run(reaping).await else {
                let status = second.kill().await;
                tracing::error!(name, ?status, "its first process does not end");
                let said = said.tail();
                return Err(VmmError::ChildSlow { name, said });
            };
            tracing::trace!(name, ?status, "the child has a process of its own");
            second
        };
        if let Err(error) = channel.write_all(&[0]).await {
            let status = process.kill().await;
            tracing::debug!(name, ?status, "the child does not listen");
            return Err(failed(name)(error));
        }
        let pidfd = Arc::clone(&process.pidfd);
        let (ended, exit) = watch::channel(None);
        // Ends with the process, and `exit` tells it.
        tokio::spawn(async move {
            let status = process.ended().await;
            tracing::debug!(name, ?status, "child ended");
            ended.send_replace(status.ok());
        });
        tracing::debug!(name, %pid, "child started");
        Ok(Self {
            name,
            pid: pid.as_raw_nonzero().get().unsigned_abs(),
            pidfd,
            exit,
            said,
            lingers: false,
        })
    }

    /// The same child, known not to end with the VMM's connection.
    pub(crate) fn lingering(mut self) -> Self {
        self.lingers = true;
        self
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits until everything that it wrote on standard error is there.
    pub(crate) async fn said_all(&self, by: Deadline) {
        self.said.ended(by).await;
    }

    /// Its last words on standard error.
    pub(crate) fn said(&self) -> String {
        self.said.tail()
    }

    /// How it ended. Cancel safe.
    pub(crate) async fn ended(&self) -> String {
        let mut exit = self.exit.clone();
        let ended = exit.wait_for(Option::is_some).await;
        match ended.as_deref() {
            Ok(Some(status)) => status.to_string(),
            _ => "unknown".to_owned(),
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.exit.borrow().is_some() || self.exit.has_changed().is_err()
    }

    fn signal(&self, signal: Signal) {
        if self.has_ended() {
            return;
        }
        if let Err(errno) = pidfd_send_signal(&self.pidfd, signal) {
            tracing::debug!(name = self.name, %errno, "not signalled");
        }
    }

    /// Kills it at once.
    pub(crate) fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// Waits until `grace` has passed, then asks it to end, then kills it; one
    /// that lingers is killed at once, which is its usual end. Returns whether it
    /// had to be killed, or `None` if even that did not help.
    pub(crate) async fn end(&self, grace: Deadline, asked: Deadline, by: Deadline) -> Option<bool> {
        if self.lingers {
            self.kill();
            return by.run(self.ended()).await.is_ok().then_some(false);
        }
        if grace.run(self.ended()).await.is_ok() {
            return Some(false);
        }
        self.signal(Signal::TERM);
        if asked.run(self.ended()).await.is_ok() {
            return Some(false);
        }
        self.kill();
        by.run(self.ended()).await.is_ok().then_some(true)
    }
}

/// A socket pair whose first end, ours, is told who sends.
fn channel() -> io::Result<(tokio::net::UnixStream, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair()?;
    setsockopt(&ours, sockopt::PassCred, &true)?;
    ours.set_nonblocking(true)?;
    Ok((tokio::net::UnixStream::from_std(ours)?, theirs.into()))
}

fn command(
    helper: &Path,
    role: &str,
    task: &impl Serialize,
    streams: Streams,
    stderr: OwnedFd,
    channel: OwnedFd,
) -> io::Result<Command> {
    let mut file = File::from(memfd_create(c"task", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&serde_json::to_vec(task)?)?;
    file.rewind()?;
    let fds = [file.into(), channel].into_iter().chain(streams.fds);
    let mappings = (TASK_FD..).zip(fds).map(|(child_fd, parent_fd)| FdMapping {
        parent_fd,
        child_fd,
    });
    let mut command = Command::new(helper);
    command
        .arg(role)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(streams.stdout.map_or_else(Stdio::null, Stdio::from))
        .stderr(stderr)
        .fd_mappings(mappings.collect())
        .map_err(io::Error::other)?;
    Ok(command)
}

fn pid_of(process: &std::process::Child) -> io::Result<Pid> {
    let raw = i32::try_from(process.id()).ok().and_then(Pid::from_raw);
    raw.ok_or_else(|| io::Error::other("no PID"))
}

#[cfg(test)]
mod tests;
