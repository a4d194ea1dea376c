// SPDX-License-Identifier: Apache-2.0
//! The sandbox: one VM, its processes, and what they need.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use podhull_agent_client::AgentChannel;
use podhull_api::agent;
use podhull_network::LoopbackListener;
use podhull_transport::{CloseReport, GuestAddress, LeaseSet};
use podhull_types::{
    BootPhase, BootTimes, ContainerId, Deadline, ExecId, ExitStatus, ProcessRef, Token,
};
use tokio::sync::{RwLock, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::error::SandboxError;
use crate::guest_counts::GuestCounts;
use crate::pids::{Pids, of_guest};
use crate::process::Process;
use crate::spec::{Deleted, EventSink, ProcessState, Runtime, SandboxSpec, Status, Stdio};
use crate::stdio::Relays;
use crate::teardown::{self, Parts};

/// Time for the guest to list a container's processes.
const PIDS: Duration = Duration::from_secs(1);

/// How far the sandbox is from its end.
#[derive(Debug, Clone)]
pub(crate) enum Phase {
    Running,
    /// New work is refused; why, if the VM ended by itself.
    Stopping,
    /// Everything is released.
    Stopped(ExitStatus),
    /// A step of the teardown panicked; what it had not released may be left.
    Broken,
}

/// A running pod sandbox.
///
/// Ended by [`stop`](Self::stop), or by the death of its VM, which leads to the
/// same teardown.
#[derive(Debug)]
pub struct Sandbox {
    pub(crate) spec: SandboxSpec,
    pub(crate) runtime: Arc<Runtime>,
    pub(crate) emulated: bool,
    pub(crate) token: Token,
    pub(crate) address: GuestAddress,
    pub(crate) leases: LeaseSet,
    vmm_pid: u32,
    processes: Mutex<HashMap<ProcessRef, Arc<Process>>>,
    pub(crate) pids: Pids,
    /// `None` once teardown has taken it. Calls hold it for reading.
    pub(crate) channel: RwLock<Option<AgentChannel>>,
    /// What teardown releases; taken once.
    pub(crate) parts: tokio::sync::Mutex<Option<Parts>>,
    pub(crate) phase: watch::Sender<Phase>,
    pub(crate) suspect: watch::Sender<bool>,
    /// Why the VM ended, if it did by itself.
    pub(crate) death: OnceLock<String>,
    pub(crate) events: EventSink,
    pub(crate) tasks: TaskTracker,
    /// The streams of all processes.
    pub(crate) relays: Relays,
    /// The forwarded connections.
    pub(crate) forwards: TaskTracker,
    /// Cancelled when their servers have ended.
    pub(crate) drain_forwards: CancellationToken,
    /// Cancelled when they must not hold the teardown up any more.
    pub(crate) cut_forwards: CancellationToken,
    pub(crate) stop_watching: CancellationToken,
    /// Cancelled when the guest's answers are not waited for any more: it is dead,
    /// or they must not hold the teardown up.
    pub(crate) cut_calls: CancellationToken,
    pub(crate) guest_counts: GuestCounts,
    times: Mutex<BootTimes>,
}

/// What `boot` has made when it is done.
#[derive(Debug)]
pub(crate) struct Booted {
    pub(crate) channel: AgentChannel,
    pub(crate) parts: Parts,
    /// Absent where the host's kernel cannot redirect.
    pub(crate) loopback: Option<LoopbackListener>,
    pub(crate) token: Token,
    pub(crate) address: GuestAddress,
    pub(crate) leases: LeaseSet,
    pub(crate) vmm_pid: u32,
    pub(crate) emulated: bool,
    pub(crate) times: BootTimes,
}

#[cfg(test)]
impl Booted {
    /// As if a VM had booted that only `parts` know.
    pub(crate) fn with(
        channel: AgentChannel,
        parts: Parts,
        address: GuestAddress,
        leases: LeaseSet,
    ) -> Self {
        Self {
            channel,
            parts,
            loopback: None,
            token: Token::from_bytes([7; Token::LEN]),
            address,
            leases,
            vmm_pid: 1,
            emulated: false,
            times: BootTimes::default(),
        }
    }
}

impl Sandbox {
    /// Boots a sandbox; what happens in it is told to `events`. Once `give_up`
    /// is cancelled, the guest is not waited for any longer.
    ///
    /// # Errors
    /// What failed; everything made until then has been released.
    pub async fn boot(
        runtime: Arc<Runtime>,
        spec: SandboxSpec,
        events: EventSink,
        give_up: &CancellationToken,
    ) -> Result<Arc<Self>, SandboxError> {
        if give_up.is_cancelled() {
            return Err(SandboxError::Stopping(spec.id));
        }
        let mut booted = crate::boot::boot(&runtime, &spec, give_up).await?;
        let loopback = booted.loopback.take();
        let sandbox = Self::new(runtime, spec, events, booted);
        if let Err(error) = crate::gauges::register(&sandbox.runtime.metrics, &sandbox.leases) {
            tracing::error!(%error, "tasks and leases are not counted");
        }
        crate::watch::start(&sandbox).await;
        if let Some(listener) = loopback {
            crate::forward::start(&sandbox, listener);
        }
        crate::boot::show(&sandbox, &sandbox.boot_times());
        Ok(sandbox)
    }

    /// The sandbox of what has booted; nothing watches it yet.
    pub(crate) fn new(
        runtime: Arc<Runtime>,
        spec: SandboxSpec,
        events: EventSink,
        booted: Booted,
    ) -> Arc<Self> {
        Arc::new(Self {
            spec,
            runtime,
            emulated: booted.emulated,
            token: booted.token,
            address: booted.address,
            leases: booted.leases,
            vmm_pid: booted.vmm_pid,
            processes: Mutex::default(),
            pids: Pids::default(),
            channel: RwLock::new(Some(booted.channel)),
            parts: tokio::sync::Mutex::new(Some(booted.parts)),
            phase: watch::Sender::new(Phase::Running),
            suspect: watch::Sender::new(false),
            death: OnceLock::new(),
            events,
            tasks: TaskTracker::new(),
            relays: Relays::default(),
            forwards: TaskTracker::new(),
            drain_forwards: CancellationToken::new(),
            cut_forwards: CancellationToken::new(),
            stop_watching: CancellationToken::new(),
            cut_calls: CancellationToken::new(),
            guest_counts: GuestCounts::default(),
            times: Mutex::new(booted.times),
        })
    }

    /// The PID of the VMM on the host.
    #[must_use]
    pub fn vmm_pid(&self) -> u32 {
        self.vmm_pid
    }

    /// What the sandbox was made from.
    #[must_use]
    pub fn spec(&self) -> &SandboxSpec {
        &self.spec
    }

    /// Whether its VM runs under emulation.
    #[must_use]
    pub fn emulated(&self) -> bool {
        self.emulated
    }

    /// The moments of its boot.
    #[must_use]
    pub fn boot_times(&self) -> BootTimes {
        self.times
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Notes that the first container runs, and shows the whole boot.
    pub(crate) fn note_container_started(&self) {
        let times = {
            let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
            if times
                .iter()
                .any(|(phase, _)| phase == BootPhase::ContainerStarted)
            {
                return;
            }
            times.note(BootPhase::ContainerStarted, self.spec.started.elapsed());
            times.clone()
        };
        self.runtime.metrics.note_boot(&times);
        crate::boot::show(self, &times);
    }

    pub(crate) fn table(&self) -> MutexGuard<'_, HashMap<ProcessRef, Arc<Process>>> {
        self.processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn process(&self, id: &ProcessRef) -> Result<Arc<Process>, SandboxError> {
        self.table()
            .get(id)
            .cloned()
            .ok_or_else(|| SandboxError::NoProcess(id.clone()))
    }

    /// The same once it has been made. What is asked of one that is being made, as by a
    /// containerd that was killed and is back, would pass it by; runc's shim holds its
    /// lock meanwhile.
    pub(crate) async fn made_process(&self, id: &ProcessRef) -> Result<Arc<Process>, SandboxError> {
        self.process(id)?.until_made().await;
        self.process(id)
    }

    pub(crate) fn all_processes(&self) -> Vec<Arc<Process>> {
        self.table().values().cloned().collect()
    }

    /// Enters a new process into the table.
    pub(crate) fn enter(
        &self,
        id: &ProcessRef,
        pid: u32,
        stdio: Stdio,
        pause: bool,
    ) -> Result<Arc<Process>, SandboxError> {
        let process = Arc::new(Process::new(
            id.clone(),
            pid,
            stdio,
            pause,
            self.events.clone(),
        ));
        let mut table = self.table();
        if table.contains_key(id) {
            return Err(SandboxError::ProcessExists(id.clone()));
        }
        table.insert(id.clone(), Arc::clone(&process));
        Ok(process)
    }

    /// Forgets a process that was not made; whoever waits for it is answered.
    pub(crate) fn give_up(&self, process: &Process) {
        self.table().remove(&process.id);
        process.exited(ExitStatus::vm_gone());
    }

    /// Fails if the sandbox takes no new work.
    pub(crate) fn check_usable(&self) -> Result<(), SandboxError> {
        if let Some(reason) = self.death.get() {
            let (id, reason) = (self.spec.id.clone(), reason.clone());
            return Err(SandboxError::VmDied { id, reason });
        }
        if !matches!(*self.phase.borrow(), Phase::Running) {
            return Err(self.stopping());
        }
        if *self.suspect.borrow() {
            return Err(SandboxError::Suspect(self.spec.id.clone()));
        }
        Ok(())
    }

    /// Whether the guest is no more, or will not be asked for anything again. One
    /// that only misses its heartbeat is still there.
    pub(crate) fn is_gone(&self) -> bool {
        self.death.get().is_some() || !matches!(*self.phase.borrow(), Phase::Running)
    }

    pub(crate) fn stopping(&self) -> SandboxError {
        SandboxError::Stopping(self.spec.id.clone())
    }

    /// Registers the pause task: it has no process in the guest, its PID is the
    /// VMM's, and killing it stops the pod.
    ///
    /// # Errors
    /// If there is one already.
    pub fn create_pause(&self, stdio: Stdio) -> Result<u32, SandboxError> {
        let id = ProcessRef::init(ContainerId::new(self.spec.id.as_str())?);
        self.enter(&id, self.vmm_pid, stdio, true)
            .map(|process| process.pid)
    }

    /// Where a process is in its life.
    ///
    /// # Errors
    /// [`SandboxError::NoProcess`].
    pub async fn state(&self, process: &ProcessRef) -> Result<ProcessState, SandboxError> {
        let process = self.made_process(process).await?;
        Ok(process.state())
    }

    /// Waits for a process's end. Cancel safe.
    ///
    /// # Errors
    /// [`SandboxError::NoProcess`].
    pub async fn wait(&self, process: &ProcessRef) -> Result<ExitStatus, SandboxError> {
        let process = self.process(process)?;
        Ok(process.wait().await)
    }

    /// The ids of the containers, the pause task's among them.
    #[must_use]
    pub fn containers(&self) -> Vec<ContainerId> {
        let table = self.table();
        table
            .keys()
            .filter(|id| id.exec.is_none())
            .map(|id| id.container.clone())
            .collect()
    }

    /// The PIDs of a container's processes, and the exec ids of those that were
    /// added.
    ///
    /// # Errors
    /// If there is no such container, or the guest does not answer.
    pub async fn pids(
        &self,
        container: &ContainerId,
    ) -> Result<Vec<(u32, Option<ExecId>)>, SandboxError> {
        let init = self.process(&ProcessRef::init(container.clone()))?;
        let ours: Vec<_> = self
            .all_processes()
            .into_iter()
            .filter(|process| process.id.container == *container)
            // containerd, when it comes back, forgets a task without processes,
            // and with it the exit code of an init process that has ended.
            .filter(|process| {
                process.id.exec.is_none() || process.state().status != Status::Stopped
            })
            .map(|process| (process.pid, process.id.exec.clone()))
            .collect();
        if init.pause || init.state().status == Status::Stopped {
            return Ok(ours);
        }
        let request = agent::PidsRequest {
            container_id: container.to_string(),
        };
        // containerd asks for all its containers within 5 s when it comes back: a
        // guest that is slow then must not cost the pod its life.
        let by = Deadline::after(PIDS);
        let asked = self.ask("Pids", by, async |mut client| client.pids(request).await);
        let answer = match asked.await {
            Ok(answer) => answer,
            Err(error) => {
                tracing::warn!(%container, %error, "only the processes that the host knows are listed");
                return Ok(ours);
            }
        };
        // Which of the guest's are ours is not known; the rest is listed behind.
        let others = answer
            .pids
            .into_iter()
            .skip(ours.len())
            .map(|pid| (of_guest(pid), None));
        Ok(ours.into_iter().chain(others).collect())
    }

    /// Ends the sandbox: everything it owns is released, in the fixed order,
    /// whatever fails on the way. Later calls wait for the first one's end.
    pub async fn stop(self: &Arc<Self>, by: Deadline) -> CloseReport {
        teardown::stop(self, by).await
    }

    /// How the pod ended, once its teardown is over.
    #[must_use]
    pub fn exit(&self) -> Option<ExitStatus> {
        match *self.phase.borrow() {
            Phase::Stopped(exit) => Some(exit),
            Phase::Broken => Some(ExitStatus::vm_gone()),
            Phase::Running | Phase::Stopping => None,
        }
    }

    /// Resolves once the teardown is over; says how the pod ended. Cancel safe.
    pub async fn stopped(&self) -> ExitStatus {
        let mut phase = self.phase.subscribe();
        let stopped = phase
            .wait_for(|phase| matches!(phase, Phase::Stopped(_) | Phase::Broken))
            .await;
        match stopped.as_deref() {
            Ok(Phase::Stopped(exit)) => *exit,
            _ => ExitStatus::vm_gone(),
        }
    }

    /// Forgets a process that has ended, or never ran. Its output is delivered
    /// first, within the deadline.
    ///
    /// # Errors
    /// [`SandboxError::WrongState`] while it runs.
    pub async fn delete(
        self: &Arc<Self>,
        id: &ProcessRef,
        by: Deadline,
    ) -> Result<Deleted, SandboxError> {
        let process = self.made_process(id).await?;
        process.expect(&[Status::Created, Status::Stopped], "created or stopped")?;
        if !process.claim() {
            return Err(SandboxError::NoProcess(id.clone()));
        }
        if !process.pause
            && let Err(error) = crate::container::release(self, &process, by).await
        {
            process.unclaim();
            return Err(error);
        }
        self.table().remove(id);
        let exit = process.state().exit.unwrap_or_else(ExitStatus::vm_gone);
        Ok(Deleted {
            pid: process.pid,
            exit,
        })
    }
}

#[cfg(test)]
mod tests;
