// SPDX-License-Identifier: Apache-2.0
//! Children: started by a thread that outlives them, watched and signalled by
//! pidfd, reaped once.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, OnceLock};

use command_fds::{CommandFdExt, FdMapping};
use nix::sys::memfd::{MFdFlags, memfd_create};
use podhull_types::Deadline;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::Serialize;
use tokio::sync::{oneshot, watch};

use crate::console::Console;
use crate::error::VmmError;
use crate::sys;

/// Where a helper finds its task.
pub(crate) const TASK_FD: i32 = 3;
/// The first of the descriptors that a child is given.
pub(crate) const FIRST_FD: i32 = 4;
/// Bytes of a child's standard error that are kept.
const STDERR_BYTES: usize = 8 * 1024;

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
async fn spawn_on_lasting_thread(mut command: Command) -> io::Result<std::process::Child> {
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
        drop(sender.send(command.spawn()));
    });
    jobs.send(job)
        .map_err(|_| io::Error::other("the starting thread is gone"))?;
    spawned.await.map_err(io::Error::other)?
}

impl Child {
    /// Starts `helper` as `role` with `task`.
    pub(crate) async fn start(
        name: &'static str,
        helper: &Path,
        role: &str,
        task: &impl Serialize,
        streams: Streams,
    ) -> Result<Self, VmmError> {
        let system = VmmError::system::<io::Error>(name);
        Self::try_start(name, helper, role, task, streams)
            .await
            .map_err(system)
    }

    async fn try_start(
        name: &'static str,
        helper: &Path,
        role: &str,
        task: &impl Serialize,
        streams: Streams,
    ) -> io::Result<Self> {
        let mut file = File::from(memfd_create(c"task", MFdFlags::MFD_CLOEXEC)?);
        file.write_all(&serde_json::to_vec(task)?)?;
        file.rewind()?;
        let (said, stderr) = Console::new(STDERR_BYTES)?;
        let mut mappings = vec![FdMapping {
            parent_fd: file.into(),
            child_fd: TASK_FD,
        }];
        for (child_fd, parent_fd) in (FIRST_FD..).zip(streams.fds) {
            mappings.push(FdMapping {
                parent_fd,
                child_fd,
            });
        }
        let mut command = Command::new(helper);
        command
            .arg(role)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(streams.stdout.map_or_else(Stdio::null, Stdio::from))
            .stderr(stderr)
            .fd_mappings(mappings)
            .map_err(io::Error::other)?;
        let mut process = spawn_on_lasting_thread(command).await?;
        let raw = i32::try_from(process.id()).ok().and_then(Pid::from_raw);
        let pid = raw.ok_or_else(|| io::Error::other("no PID"))?;
        let pidfd = Arc::new(pidfd_open(pid, PidfdFlags::NONBLOCK)?);
        let (ended, exit) = watch::channel(None);
        let ready = sys::watched(pidfd.try_clone()?)?;
        tokio::spawn(async move {
            // Readable once the process is a zombie; an error would mean that
            // the reactor is gone, and the process is waited for all the same.
            let seen = ready.readable().await.map(drop);
            let status = process.wait();
            tracing::debug!(name, ?seen, ?status, "child ended");
            ended.send_replace(status.ok());
        });
        tracing::debug!(name, pid = process_id(pid), "child started");
        Ok(Self {
            name,
            pid: process_id(pid),
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

    /// Whether it has to be asked to end once the VMM is gone.
    pub(crate) fn lingers(&self) -> bool {
        self.lingers
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

    /// Waits until `grace` has passed, then asks it to end, then kills it.
    /// Returns whether it had to be killed, or `None` if even that did not help.
    pub(crate) async fn end(&self, grace: Deadline, asked: Deadline, by: Deadline) -> Option<bool> {
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

fn process_id(pid: Pid) -> u32 {
    pid.as_raw_nonzero().get().unsigned_abs()
}
