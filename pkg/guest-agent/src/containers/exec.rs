// SPDX-License-Identifier: Apache-2.0
//! Processes that are added to a running container.

use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;

use nix::unistd::Pid;
use oci_spec::runtime::Process as ProcessSpec;
use podhull_api::agent;
use podhull_types::{Deadline, ProcessRef};

use super::{Containers, deadline, limits, streams};
use crate::cgroup::Cgroup;
use crate::error::GuestError;
use crate::helper::Helper;
use crate::oci::exec;
use crate::process::{Process, Waiting};
use crate::stdio::Ends;
use crate::stdio::console::{ARRIVED, ConsoleSocket};

impl Containers {
    /// Prepares an added process; it is made at its start.
    ///
    /// # Errors
    /// If its container does not run or its id is taken.
    pub fn create_exec(
        &self,
        id: &ProcessRef,
        process_json: &[u8],
        stdio: agent::Stdio,
    ) -> Result<(), GuestError> {
        let mut spec: ProcessSpec =
            serde_json::from_slice(process_json).map_err(|error| GuestError::Invalid {
                field: "process",
                reason: error.to_string(),
            })?;
        limits::complete(&mut spec)?;
        self.init_pid(&id.container)?;
        let waiting = Some(Waiting::Exec(Box::new(spec)));
        let process = Arc::new(Process::new(id.clone(), stdio, waiting));
        let mut table = self.lock();
        let Some(container) = table.get_mut(&id.container) else {
            return Err(GuestError::NoProcess(id.clone()));
        };
        if container.processes.contains_key(id) {
            return Err(GuestError::Exists(id.clone()));
        }
        container.processes.insert(id.clone(), process);
        Ok(())
    }

    pub(super) async fn start_exec(
        &self,
        process: &Arc<Process>,
        spec: ProcessSpec,
    ) -> Result<(), GuestError> {
        let id = &process.id;
        let init = self.init_pid(&id.container)?;
        let seccomp = {
            let table = self.lock();
            let container = table.get(&id.container);
            let linux = container.and_then(|container| container.spec.linux().as_ref());
            linux.and_then(|linux| linux.seccomp().clone())
        };
        let (streams, console) = streams(process)?;
        let task = exec::Task {
            init: init.as_raw(),
            cgroup: Cgroup::of(&id.container).path().to_owned(),
            process: spec,
            seccomp,
            console: console.as_ref().map(|console| console.path().to_owned()),
            users: self.pod.users().map(Into::into),
        };
        let helper = Helper::start(&self.reaper, "exec", &task, streams)?;
        self.run_exec(process, helper, console, deadline())
            .await
            .map_err(|error| error.in_runcs_words("exec failed: exec failed"))
    }

    /// Waits until `helper` has made the process and that runs its program. What
    /// it makes is killed if this fails, or if nobody asks for it any more.
    async fn run_exec(
        &self,
        process: &Arc<Process>,
        mut helper: Helper,
        console: Option<ConsoleSocket>,
        by: Deadline,
    ) -> Result<(), GuestError> {
        let pid = match helper.pid(by).await {
            Err(late @ GuestError::Deadline(_)) => {
                self.kill_once_made(process.id.clone(), helper);
                return Err(late);
            }
            made => made?,
        };
        let exit = self.reaper.claim(pid, helper.since());
        let runs = executed(process, &mut helper, console, by).await;
        let wanted = runs.and_then(|()| {
            // Before the look: a delete finds the PID, or is found here.
            process.set_pid(pid);
            if process.give_up.is_cancelled() {
                return Err(GuestError::NoProcess(process.id.clone()));
            }
            Ok(())
        });
        match &wanted {
            Ok(()) => self.watch(process, exit),
            Err(_) => self.kill(&process.id, pid),
        }
        wanted
    }

    /// Kills what `helper` makes too late for its caller.
    fn kill_once_made(&self, id: ProcessRef, mut helper: Helper) {
        let containers = self.clone();
        // Ends with the helper's answer: before that there is no PID to kill.
        tokio::spawn(async move {
            loop {
                match helper.pid(deadline()).await {
                    Err(error @ GuestError::Deadline(_)) => {
                        tracing::warn!(process = %id, %error, "a start that was given up goes on");
                    }
                    Ok(pid) => {
                        drop(containers.reaper.claim(pid, helper.since()));
                        return containers.kill(&id, pid);
                    }
                    Err(error) => return tracing::debug!(process = %id, %error, "nothing to kill"),
                }
            }
        });
    }

    /// Kills an added process that nobody asks for any more.
    pub(super) fn kill(&self, id: &ProcessRef, pid: Pid) {
        match self.reaper.signal(pid, libc::SIGKILL) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                tracing::warn!(process = %id, %error, "not killed");
            }
            _ => {}
        }
    }
}

/// Waits until the process that `helper` has made runs its program.
async fn executed(
    process: &Process,
    helper: &mut Helper,
    console: Option<ConsoleSocket>,
    by: Deadline,
) -> Result<(), GuestError> {
    if let Some(console) = console {
        let master = terminal(&console, helper, by).await?;
        let (ends, terminal) = Ends::terminal(master)?;
        process.set_terminal(ends, terminal);
    }
    helper.executed(by).await
}

/// The terminal that the helper's process sends before it executes its program,
/// or why it could not.
async fn terminal(
    console: &ConsoleSocket,
    helper: &mut Helper,
    by: Deadline,
) -> Result<OwnedFd, GuestError> {
    let mut receiving = pin!(console.receive(by));
    tokio::select! {
        biased;
        received = &mut receiving => return received,
        executed = helper.executed(by) => executed?,
    }
    // Its answer ended: what it sent has arrived, or never comes.
    let sent = by.at_most(ARRIVED).run(receiving).await;
    sent.unwrap_or_else(|_| Err(GuestError::Start("no terminal came".into())))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::io::Write;
    use std::process::Command;
    use std::time::Duration;

    use nix::fcntl::OFlag;
    use nix::unistd::pipe2;
    use podhull_types::{ContainerId, ExecId};
    use tokio::io::AsyncReadExt;
    use tokio::net::unix::pipe;

    use super::super::Container;
    use super::*;
    use crate::events::Events;
    use crate::helper::Streams;
    use crate::reaper::Reaper;

    /// Longer than a test waits.
    const MAKE: &str = "sleep 60";
    /// What the helper says of it, which has its answer as descriptor 4.
    const SAY: &str = r#"printf '{"pid":%d}\n' $! >&4"#;

    /// A container with one added process, whose helper is a shell.
    struct Exec {
        containers: Containers,
        process: Arc<Process>,
        helper: Helper,
        /// The helper reads from it.
        go: std::fs::File,
        /// Ends with the helper and what it makes.
        alive: pipe::Receiver,
    }

    impl Exec {
        fn new(script: &str) -> Self {
            let containers = Containers::new(Reaper::default(), Events::default());
            let container = ContainerId::new("c1").unwrap();
            let id = ProcessRef {
                container: container.clone(),
                exec: Some(ExecId::new("e1").unwrap()),
            };
            let process = Arc::new(Process::new(id.clone(), agent::Stdio::default(), None));
            let entry = Container {
                spec: oci_spec::runtime::Spec::default(),
                processes: HashMap::from([(id, Arc::clone(&process))]),
                oom_kills: 0,
            };
            containers.lock().insert(container, entry);
            let (stdin, go) = pipe2(OFlag::O_CLOEXEC).unwrap();
            let (alive, stdout) = pipe2(OFlag::O_CLOEXEC).unwrap();
            let streams = Streams {
                stdin: Some(stdin),
                stdout: Some(stdout),
                stderr: None,
            };
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            let helper = Helper::spawn(&containers.reaper, command, &(), streams).unwrap();
            Self {
                containers,
                process,
                helper,
                go: go.into(),
                alive: pipe::Receiver::from_owned_fd(alive).unwrap(),
            }
        }
    }

    async fn is_killed(alive: &mut pipe::Receiver) -> bool {
        let soon = Deadline::after(Duration::from_secs(20));
        matches!(soon.run(alive.read(&mut [0])).await, Ok(Ok(0)))
    }

    #[tokio::test]
    async fn an_exec_that_does_not_run_in_time_is_killed() {
        // It keeps the helper's answer open, as what has not executed its program.
        let mut exec = Exec::new(&format!("{MAKE} & {SAY}"));
        let by = Deadline::after(Duration::from_secs(2));
        let started = exec
            .containers
            .run_exec(&exec.process, exec.helper, None, by);
        let error = started.await.unwrap_err();
        assert!(matches!(error, GuestError::Deadline(_)), "{error}");
        assert!(is_killed(&mut exec.alive).await, "it runs on");
    }

    #[tokio::test]
    async fn an_exec_that_is_made_too_late_is_killed() {
        let mut exec = Exec::new(&format!("read go; {MAKE} 4>&- & {SAY}"));
        let by = Deadline::after(Duration::ZERO);
        let started = exec
            .containers
            .run_exec(&exec.process, exec.helper, None, by);
        let error = started.await.unwrap_err();
        assert!(matches!(error, GuestError::Deadline(_)), "{error}");
        exec.go.write_all(b"go\n").unwrap();
        assert!(is_killed(&mut exec.alive).await, "it runs on");
    }

    #[tokio::test]
    async fn an_exec_that_is_deleted_while_it_starts_is_killed() {
        let mut exec = Exec::new(&format!("read go; {MAKE} 4>&- & {SAY}"));
        exec.containers.delete(&exec.process.id).await.unwrap();
        exec.go.write_all(b"go\n").unwrap();
        let started = exec
            .containers
            .run_exec(&exec.process, exec.helper, None, deadline());
        let error = started.await.unwrap_err();
        assert!(matches!(error, GuestError::NoProcess(_)), "{error}");
        assert!(is_killed(&mut exec.alive).await, "it runs on");
    }

    /// The host has not heard of its start: it knows no process to kill.
    #[tokio::test]
    async fn an_exec_that_runs_is_killed_by_its_delete() {
        let mut exec = Exec::new(&format!("{MAKE} 4>&- & {SAY}"));
        let started = exec
            .containers
            .run_exec(&exec.process, exec.helper, None, deadline());
        started.await.unwrap();
        exec.containers.delete(&exec.process.id).await.unwrap();
        assert!(is_killed(&mut exec.alive).await, "it runs on");
    }
}
