// SPDX-License-Identifier: Apache-2.0
//! Processes that are added to a running container.

use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;

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
        };
        let by = deadline();
        let mut helper = Helper::start(&self.reaper, "exec", &task, streams)?;
        let failed = |error: GuestError| error.in_runcs_words("exec failed: exec failed");
        let pid = helper.pid(by).await.map_err(failed)?;
        let exit = self.reaper.claim(pid, helper.since());
        if let Some(console) = console {
            let master = terminal(&console, &mut helper, by).await.map_err(failed)?;
            let (ends, terminal) = Ends::terminal(master)?;
            process.set_terminal(ends, terminal);
        }
        helper.executed(by).await.map_err(failed)?;
        process.set_pid(pid);
        self.watch(process, exit);
        Ok(())
    }
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
