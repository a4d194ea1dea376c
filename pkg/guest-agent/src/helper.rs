// SPDX-License-Identifier: Apache-2.0
//! Re-executions of the agent that do what a process with many threads cannot:
//! make namespaces, enter them, and become a container's process.
//!
//! A helper gets a task as JSON and answers with lines of JSON on a pipe. The
//! pipe's writing end is close-on-exec in the process that it makes, so its end
//! says that the process's program runs.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::Instant;

use command_fds::{CommandFdExt, FdMapping};
use nix::fcntl::OFlag;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Pid, pipe2};
use podhull_types::Deadline;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

use crate::error::GuestError;
use crate::init::SELF;
use crate::reaper::Reaper;
use crate::sys;

/// Where a helper finds its task.
const TASK_FD: i32 = 3;
/// Where it answers.
const REPORT_FD: i32 = 4;
/// Most bytes of an answer.
const MAX_REPORT: usize = 64 * 1024;

/// One line of a helper's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// The process that was made.
    Pid(i32),
    /// Why it was not made, or could not be executed.
    Error(String),
}

/// The writing end of a helper's answer, in the helper.
#[derive(Debug, Clone)]
pub struct Report(std::rc::Rc<File>);

impl Report {
    /// Writes a line. There is nobody to tell if that fails.
    pub fn send(&self, line: &Line) {
        if let Ok(mut text) = serde_json::to_vec(line) {
            text.push(b'\n');
            let written = (&*self.0).write_all(&text);
            debug_assert!(written.is_ok());
        }
    }
}

/// In a helper: its task and where it answers.
///
/// # Errors
/// If the task is not what is expected.
pub fn receive<T: DeserializeOwned>() -> Result<(T, Report), GuestError> {
    let report = Report(std::rc::Rc::new(File::from(sys::inherited(REPORT_FD))));
    rustix::io::fcntl_setfd(&*report.0, rustix::io::FdFlags::CLOEXEC)
        .map_err(GuestError::system("set close-on-exec"))?;
    let mut text = Vec::new();
    File::from(sys::inherited(TASK_FD))
        .read_to_end(&mut text)
        .map_err(GuestError::system("read the helper's task"))?;
    let task = serde_json::from_slice(&text).map_err(|error| GuestError::Invalid {
        field: "helper's task",
        reason: error.to_string(),
    })?;
    Ok((task, report))
}

/// The standard streams that a helper passes on to the process that it makes.
#[derive(Debug, Default)]
pub struct Streams {
    /// Absent streams are /dev/null.
    pub stdin: Option<OwnedFd>,
    /// See `stdin`.
    pub stdout: Option<OwnedFd>,
    /// See `stdin`.
    pub stderr: Option<OwnedFd>,
}

/// A helper under way, seen from the agent.
#[derive(Debug)]
pub struct Helper {
    report: pipe::Receiver,
    buffer: Vec<u8>,
    since: Instant,
    exit: oneshot::Receiver<u8>,
}

impl Helper {
    /// Starts the helper `name` with `task`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(
        reaper: &Reaper,
        name: &str,
        task: &impl Serialize,
        streams: Streams,
    ) -> Result<Self, GuestError> {
        let mut command = Command::new(SELF);
        command.args(["oci", name]).env_clear();
        Self::spawn(reaper, command, task, streams)
    }

    /// Starts `command` as a helper.
    pub(crate) fn spawn(
        reaper: &Reaper,
        mut command: Command,
        task: &impl Serialize,
        streams: Streams,
    ) -> Result<Self, GuestError> {
        let system = |errno: nix::Error| GuestError::system("start a helper")(errno);
        let text = serde_json::to_vec(task).map_err(|error| GuestError::Invalid {
            field: "helper's task",
            reason: error.to_string(),
        })?;
        let mut file = File::from(memfd_create(c"task", MFdFlags::MFD_CLOEXEC).map_err(system)?);
        file.write_all(&text)
            .and_then(|()| file.rewind())
            .map_err(GuestError::system("write the helper's task"))?;
        let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(system)?;
        let report = pipe::Receiver::from_owned_fd(read)
            .map_err(GuestError::system("watch a helper's answer"))?;
        let stream = |fd: Option<OwnedFd>| fd.map_or_else(Stdio::null, Stdio::from);
        command
            .stdin(stream(streams.stdin))
            .stdout(stream(streams.stdout))
            .stderr(stream(streams.stderr))
            .fd_mappings(vec![
                FdMapping {
                    parent_fd: file.into(),
                    child_fd: TASK_FD,
                },
                FdMapping {
                    parent_fd: write,
                    child_fd: REPORT_FD,
                },
            ])
            .map_err(|error| GuestError::Invalid {
                field: "helper's descriptors",
                reason: error.to_string(),
            })?;
        let since = Instant::now();
        let (_, exit) = reaper
            .spawn(&mut command)
            .map_err(GuestError::system("start a helper"))?;
        Ok(Self {
            report,
            buffer: Vec::new(),
            since,
            exit,
        })
    }

    /// When it was started; the processes it makes are younger.
    #[must_use]
    pub fn since(&self) -> Instant {
        self.since
    }

    /// The next line; `None` at the end of the answer. Cancel safe.
    async fn line(&mut self) -> Result<Option<Line>, GuestError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let parsed = serde_json::from_slice(&line);
                return parsed
                    .map(Some)
                    .map_err(|error| GuestError::Start(error.to_string()));
            }
            if self.buffer.len() > MAX_REPORT {
                return Err(GuestError::Start("a helper's answer is too long".into()));
            }
            let read = self.report.read_buf(&mut self.buffer).await;
            if read.map_err(GuestError::system("read a helper's answer"))? == 0 {
                return Ok(None);
            }
        }
    }

    /// Waits for the PID of the process that the helper makes.
    ///
    /// # Errors
    /// [`GuestError::Start`] with the helper's words.
    pub async fn pid(&mut self, by: Deadline) -> Result<Pid, GuestError> {
        match by
            .run(self.line())
            .await
            .map_err(|_| GuestError::Deadline("make the process"))??
        {
            Some(Line::Pid(pid)) => Ok(Pid::from_raw(pid)),
            Some(Line::Error(words)) => Err(GuestError::Start(words)),
            None => {
                let code = by.run(&mut self.exit).await;
                let code = code.ok().and_then(Result::ok);
                Err(GuestError::Start(format!(
                    "the helper ended with code {code:?} and no answer"
                )))
            }
        }
    }

    /// Waits until the process's program runs.
    ///
    /// # Errors
    /// [`GuestError::Start`] if it cannot be executed.
    pub async fn executed(&mut self, by: Deadline) -> Result<(), GuestError> {
        match by
            .run(self.line())
            .await
            .map_err(|_| GuestError::Deadline("execute the process"))??
        {
            Some(Line::Error(words)) => Err(GuestError::Start(words)),
            Some(Line::Pid(_)) | None => Ok(()),
        }
    }
}
