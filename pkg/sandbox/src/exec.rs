// SPDX-License-Identifier: Apache-2.0
//! The way of an exec, and of every other operation on one process: ask the
//! agent, connect the process's session, relay, wait, release.

use std::sync::Arc;
use std::time::Duration;

use oci_spec::runtime::Process as ProcessSpec;
use podhull_api::agent;
use podhull_transport::{HolderKind, HostSession, SessionTarget, open_session};
use podhull_types::{Deadline, ProcessRef, VsockPort};

use crate::error::SandboxError;
use crate::process::Process;
use crate::sandbox::Sandbox;
use crate::spec::{Status, Stdio};
use crate::stdio::{Fifos, ProcessIo};
use crate::translate::check_fields;

/// SIGKILL and SIGTERM: what stops a pause task.
const FATAL: [u32; 2] = [9, 15];

pub(crate) fn exec_id(process: &ProcessRef) -> String {
    process
        .exec
        .as_ref()
        .map(ToString::to_string)
        .unwrap_or_default()
}

pub(crate) fn wire_stdio(stdio: &Stdio) -> agent::Stdio {
    agent::Stdio {
        stdin: stdio.stdin.is_some(),
        stdout: stdio.stdout.is_some(),
        stderr: stdio.stderr.is_some(),
        terminal: stdio.terminal,
    }
}

impl Sandbox {
    /// Prepares an added process; it runs at [`start`](Self::start).
    ///
    /// # Errors
    /// If its container does not run, its id is taken, or podhull cannot do what a
    /// field asks for.
    pub async fn create_exec(
        self: &Arc<Self>,
        id: ProcessRef,
        spec: ProcessSpec,
        stdio: Stdio,
    ) -> Result<(), SandboxError> {
        self.check_usable()?;
        check_fields(&spec, "process")?;
        let container = self.process(&ProcessRef::init(id.container.clone()))?;
        container.expect(&[Status::Running], "running")?;
        if container.pause {
            return Err(SandboxError::refused(
                "container_id",
                "the sandbox itself runs no process",
            ));
        }
        let process = self.enter(&id, self.pids.next(), stdio, false)?;
        let prepared = self.prepare_exec(&process, &spec).await;
        match prepared {
            Ok(()) => process.made(),
            Err(_) => self.give_up(&process),
        }
        prepared
    }

    async fn prepare_exec(
        &self,
        process: &Process,
        spec: &ProcessSpec,
    ) -> Result<(), SandboxError> {
        let process_json = serde_json::to_vec(spec).map_err(|source| SandboxError::Encode {
            what: "exec process",
            container: process.id.container.clone(),
            source,
        })?;
        let request = agent::CreateExecRequest {
            container_id: process.id.container.to_string(),
            exec_id: exec_id(&process.id),
            process_json,
            stdio: Some(wire_stdio(&process.stdio)),
        };
        self.ask("CreateExec", self.call_deadline(), async |mut client| {
            client.create_exec(request).await
        })
        .await?;
        let connected = self.connect_stdio(process).await;
        if connected.is_err() {
            self.forget_in_guest(&process.id).await;
        }
        connected
    }

    /// Connects a process's FIFOs with its session in the guest.
    pub(crate) async fn connect_stdio(&self, process: &Process) -> Result<(), SandboxError> {
        let stdio = &process.stdio;
        if stdio.stdin.is_none() && stdio.stdout.is_none() && stdio.stderr.is_none() {
            return Ok(());
        }
        let fifos = Fifos::open(stdio, &process.id)?;
        let session = self
            .dial_session(&SessionTarget::Process(process.id.clone()))
            .await?;
        let io = ProcessIo::start(fifos, session, &self.runtime.metrics, &self.relays);
        match process.attach_io(io) {
            Ok(()) => Ok(()),
            // It was deleted, or the pod's teardown has been here.
            Err(late) => {
                let report = late.finish(Deadline::after(Duration::ZERO)).await;
                tracing::debug!(process = %process.id, ?report, "its streams came too late");
                Err(self.stopping())
            }
        }
    }

    /// One connection to the guest for one session. A teardown has closed the
    /// set of leases, so none begins once it has.
    pub(crate) async fn dial_session(
        &self,
        target: &SessionTarget,
    ) -> Result<HostSession, SandboxError> {
        let by = self.call_deadline();
        let holder = podhull_transport::Holder::new(HolderKind::Session, target.to_string());
        let lease = self
            .leases
            .issue(holder)
            .map_err(podhull_transport::TransportError::from)?;
        let dialled = async {
            let transport = self.address.dial(VsockPort::SESSIONS, lease, by).await?;
            Ok(open_session(transport, &self.token, target, by).await?)
        };
        self.unless_cut(by, dialled).await
    }

    /// Makes the guest forget a process that the host gave up.
    pub(crate) async fn forget_in_guest(&self, id: &ProcessRef) {
        let request = agent::DeleteRequest {
            container_id: id.container.to_string(),
            exec_id: exec_id(id),
        };
        let deleted = self
            .ask("Delete", self.call_deadline(), async |mut client| {
                client.delete(request).await
            })
            .await;
        if let Err(error) = deleted {
            tracing::warn!(process = %id, %error, "the guest keeps a process that was given up");
        }
    }

    /// Starts a created process. `announce` is called with its PID before
    /// anything is told of its end, so that containerd hears of the start first.
    ///
    /// # Errors
    /// If it is not created, or cannot be executed: runc's words then.
    pub async fn start(
        self: &Arc<Self>,
        id: &ProcessRef,
        announce: impl FnOnce(u32),
    ) -> Result<u32, SandboxError> {
        self.check_usable()?;
        let process = self.made_process(id).await?;
        process.expect(&[Status::Created], "created")?;
        if !process.pause {
            let request = agent::StartRequest {
                container_id: id.container.to_string(),
                exec_id: exec_id(id),
            };
            self.ask("Start", self.call_deadline(), async |mut client| {
                client.start(request).await
            })
            .await?;
        }
        process.started(announce);
        if id.exec.is_none() && !process.pause {
            self.note_container_started();
        }
        Ok(process.pid)
    }

    /// Sends a signal to a process, or to all of its container. Killing the
    /// pause task stops the pod.
    ///
    /// # Errors
    /// [`SandboxError::Finished`] if it has ended, as with runc.
    pub async fn kill(
        self: &Arc<Self>,
        id: &ProcessRef,
        signal: u32,
        all: bool,
    ) -> Result<(), SandboxError> {
        let process = self.made_process(id).await?;
        if process.state().status == Status::Stopped {
            return Err(SandboxError::Finished(id.clone()));
        }
        if process.pause {
            if FATAL.contains(&signal) {
                self.stop_in_background();
            }
            return Ok(());
        }
        // An added process does not exist before its start. containerd 1.6 waits
        // for the end of what it killed unless it is told so, as by runc.
        if id.exec.is_some() {
            process.expect(&[Status::Running, Status::Paused], "running")?;
        }
        let request = agent::SignalRequest {
            container_id: id.container.to_string(),
            exec_id: exec_id(id),
            signal,
            all,
        };
        self.ask("Signal", self.call_deadline(), async |mut client| {
            client.signal(request).await
        })
        .await?;
        Ok(())
    }

    /// Stops the pod without making the caller wait for it.
    pub(crate) fn stop_in_background(self: &Arc<Self>) {
        let sandbox = Arc::clone(self);
        let by = Deadline::after(self.runtime.config.stop_timeout());
        self.tasks.spawn(async move {
            let report = sandbox.stop(by).await;
            tracing::info!(sandbox = %sandbox.spec.id, %report, "sandbox stopped");
        });
    }

    /// Resizes a process's terminal.
    ///
    /// # Errors
    /// If there is no such process.
    pub async fn resize(
        &self,
        id: &ProcessRef,
        columns: u32,
        rows: u32,
    ) -> Result<(), SandboxError> {
        let process = self.process(id)?;
        if process.pause || process.state().status == Status::Stopped {
            return Ok(());
        }
        let request = agent::ResizeRequest {
            container_id: id.container.to_string(),
            exec_id: exec_id(id),
            columns,
            rows,
        };
        self.ask("Resize", self.call_deadline(), async |mut client| {
            client.resize(request).await
        })
        .await?;
        Ok(())
    }

    /// Closes the shim's hold on a process's stdin: once containerd's side has
    /// ended too, the process reads its end.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn close_stdin(&self, id: &ProcessRef) -> Result<(), SandboxError> {
        self.process(id)?.close_stdin();
        Ok(())
    }
}
