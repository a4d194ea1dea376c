// SPDX-License-Identifier: Apache-2.0
//! The containers of the pod and their processes.

mod complete;
mod devices;
mod exec;
mod limits;
mod shared;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::unistd::Pid;
use oci_spec::runtime::{LinuxResources, Spec};
use podhull_api::agent::{self, PidNamespace, event};
use podhull_types::{ContainerId, Deadline, ProcessRef};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use crate::cgroup::Cgroup;
use crate::error::GuestError;
use crate::events::Events;
use crate::helper::{Helper, Streams};
use crate::init::RUN;
use crate::oci::create;
use crate::pod::Pod;
use crate::process::{Process, Waiting};
use crate::reaper::Reaper;
use crate::stdio::Ends;
use crate::stdio::console::{self, ConsoleSocket};

/// Time for a helper's work. Far more than it takes: emulated guests are slow.
const HELPER: Duration = Duration::from_secs(25);
/// Time for a killed container's processes to be gone.
const GONE: Duration = Duration::from_secs(5);
/// Time for a container's processes to stand still.
const FROZEN: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Container {
    spec: Spec,
    processes: HashMap<ProcessRef, Arc<Process>>,
    oom_kills: u64,
}

/// Every container of the pod. Cloning gives another handle.
#[derive(Debug, Clone)]
pub struct Containers {
    table: Arc<Mutex<HashMap<ContainerId, Container>>>,
    reaper: Reaper,
    events: Events,
    /// PID 1 of the pod's shared PID namespace, once a container asked for it.
    pod_init: Arc<tokio::sync::Mutex<Option<Pid>>>,
    pod: Pod,
}

fn bundle(id: &ContainerId) -> PathBuf {
    Path::new(RUN).join("bundles").join(id.as_str())
}

fn state() -> PathBuf {
    Path::new(RUN).join("state")
}

fn deadline() -> Deadline {
    Deadline::after(HELPER)
}

/// The guest's wall clock in nanoseconds.
pub(crate) fn now_ns() -> i64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(now.as_nanos()).unwrap_or(i64::MAX)
}

impl Containers {
    /// No containers.
    #[must_use]
    pub fn new(reaper: Reaper, events: Events) -> Self {
        Self {
            table: Arc::default(),
            reaper,
            events,
            pod_init: Arc::default(),
            pod: Pod::default(),
        }
    }

    /// What its containers share.
    pub(crate) fn pod(&self) -> &Pod {
        &self.pod
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ContainerId, Container>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn process(&self, id: &ProcessRef) -> Result<Arc<Process>, GuestError> {
        self.lock()
            .get(&id.container)
            .and_then(|container| container.processes.get(id))
            .cloned()
            .ok_or_else(|| GuestError::NoProcess(id.clone()))
    }

    fn init_pid(&self, id: &ContainerId) -> Result<Pid, GuestError> {
        let init = ProcessRef::init(id.clone());
        let process = self.process(&init)?;
        match (process.pid(), process.exit_code()) {
            (Some(pid), None) => Ok(pid),
            _ => Err(GuestError::WrongState {
                process: init,
                state: "does not run",
            }),
        }
    }

    /// Makes a container; its init process waits for [`start`](Self::start).
    ///
    /// # Errors
    /// [`GuestError::Start`] in runc's words if its program cannot be executed.
    pub async fn create(
        &self,
        id: ContainerId,
        spec_json: &[u8],
        rootfs: &str,
        stdio: agent::Stdio,
        pid_namespace: PidNamespace,
        pid_target: &str,
    ) -> Result<Pid, GuestError> {
        let init = ProcessRef::init(id.clone());
        let mut spec: Spec =
            serde_json::from_slice(spec_json).map_err(|error| GuestError::Invalid {
                field: "spec",
                reason: error.to_string(),
            })?;
        let shared = self.pid_path(pid_namespace, pid_target).await?;
        complete::complete(&mut spec, &id, rootfs, shared, self.pod.users().is_some())?;
        let process = Arc::new(Process::new(init.clone(), stdio, None));
        {
            let mut table = self.lock();
            if table.contains_key(&id) {
                return Err(GuestError::Exists(init));
            }
            let processes = HashMap::from([(init.clone(), Arc::clone(&process))]);
            table.insert(
                id.clone(),
                Container {
                    spec: spec.clone(),
                    processes,
                    oom_kills: 0,
                },
            );
        }
        let made = self.make(&process, &spec, rootfs).await;
        if made.is_err() {
            self.lock().remove(&id);
            self.release(&id).await;
        }
        made
    }

    async fn make(
        &self,
        process: &Arc<Process>,
        spec: &Spec,
        rootfs: &str,
    ) -> Result<Pid, GuestError> {
        let id = &process.id.container;
        let bundle = bundle(id);
        fs::create_dir_all(&bundle).map_err(GuestError::file("make folder", &bundle))?;
        spec.save(bundle.join("config.json"))
            .map_err(|error| GuestError::Invalid {
                field: "spec",
                reason: error.to_string(),
            })?;
        let (streams, console) = streams(process)?;
        let process_of = spec.process().as_ref();
        let cwd = process_of.map_or(Path::new("/"), |process| process.cwd());
        let mounts = spec.mounts().as_deref().unwrap_or_default();
        let task = create::Task {
            id: id.to_string(),
            bundle: bundle.clone(),
            state: state(),
            console: console.as_ref().map(|console| console.path().to_owned()),
            cwd: create::WorkingDirectory::find(cwd, Path::new(rootfs), mounts),
            process: process_of.cloned(),
            users: self.pod.users().map(Into::into),
        };
        let by = deadline();
        let mut helper = Helper::start(&self.reaper, "create", &task, streams)?;
        let failed = |error: GuestError| error.in_runcs_words("create failed");
        let pid = helper.pid(by).await.map_err(failed)?;
        if let Some(console) = console {
            // Sent before the helper's process waits for its start.
            let master = console.receive(by.at_most(console::ARRIVED)).await?;
            let (ends, terminal) = Ends::terminal(master)?;
            if let Some(size) = process_of.and_then(|process| process.console_size()) {
                terminal.resize(size.width(), size.height())?;
            }
            process.set_terminal(ends, terminal);
        }
        process.set_pid(pid);
        let exit = self.reaper.claim(pid, helper.since());
        process.set_waiting(Waiting::Init(helper));
        self.watch(process, exit);
        Ok(pid)
    }

    /// Tells a process's end once it has ended.
    fn watch(&self, process: &Arc<Process>, exit: oneshot::Receiver<u8>) {
        let (containers, process) = (self.clone(), Arc::clone(process));
        // Ends with the process, which is what others wait for.
        tokio::spawn(async move {
            if let Ok(code) = exit.await {
                containers.ended(&process, code);
            }
        });
    }

    fn ended(&self, process: &Process, code: u8) {
        let id = &process.id;
        let cgroup = Cgroup::of(&id.container);
        if id.exec.is_none() {
            // With a shared PID namespace its children do not end with it.
            if let Err(error) = cgroup.kill() {
                tracing::warn!(container = %id.container, %error, "rest of the container not killed");
            }
        }
        let kills = cgroup.oom_kills();
        let new_kills = {
            let mut table = self.lock();
            table
                .get_mut(&id.container)
                .is_some_and(|container| kills > std::mem::replace(&mut container.oom_kills, kills))
        };
        if new_kills {
            let container_id = id.container.to_string();
            self.events
                .push(event::Kind::Oom(agent::OutOfMemory { container_id }));
        }
        process.set_exit(code);
        self.events.push(event::Kind::Exited(agent::ProcessExited {
            container_id: id.container.to_string(),
            exec_id: id
                .exec
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            exit: Some(agent::Exit {
                code: code.into(),
                at_ns: now_ns(),
            }),
        }));
    }

    /// Starts a created process, and waits until its program runs.
    ///
    /// # Errors
    /// [`GuestError::Start`] in runc's words if it cannot be executed.
    pub async fn start(&self, id: &ProcessRef) -> Result<Pid, GuestError> {
        let process = self.process(id)?;
        match process.take_waiting() {
            Some(Waiting::Init(mut helper)) => {
                let socket = state().join(id.container.as_str()).join("notify.sock");
                let by = deadline();
                let notify = async {
                    let mut stream = UnixStream::connect(&socket).await?;
                    stream.write_all(b"start container").await?;
                    stream.shutdown().await
                };
                by.run(notify)
                    .await
                    .map_err(|_| GuestError::Deadline("start the container"))?
                    .map_err(GuestError::file("notify", &socket))?;
                helper.executed(by).await?;
            }
            Some(Waiting::Exec(spec)) => self.start_exec(&process, *spec).await?,
            None => {
                let (process, state) = (id.clone(), "was started already");
                return Err(GuestError::WrongState { process, state });
            }
        }
        process
            .pid()
            .ok_or_else(|| GuestError::NoProcess(id.clone()))
    }

    /// Signals a process, or all of its container.
    ///
    /// # Errors
    /// [`GuestError::NoProcess`] if it has ended.
    pub fn signal(&self, id: &ProcessRef, signal: u32, all: bool) -> Result<(), GuestError> {
        let process = self.process(id)?;
        let signal = i32::try_from(signal).map_err(|error| GuestError::Invalid {
            field: "signal",
            reason: error.to_string(),
        })?;
        if all && signal == libc::SIGKILL {
            return Cgroup::of(&id.container).kill();
        }
        if all {
            return Cgroup::of(&id.container).signal(signal);
        }
        let gone = || GuestError::NoProcess(id.clone());
        let pid = process.pid().ok_or_else(gone)?;
        match self.reaper.signal(pid, signal) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(gone()),
            result => result.map_err(GuestError::system("signal the process")),
        }
    }

    /// Forgets a process; one that was added is killed if it still runs. A
    /// container takes its added processes with it. Idempotent.
    ///
    /// # Errors
    /// If a container's cgroup cannot be removed.
    pub async fn delete(&self, id: &ProcessRef) -> Result<Option<u8>, GuestError> {
        let Ok(process) = self.process(id) else {
            return Ok(None);
        };
        process.give_up.cancel();
        if id.exec.is_some() {
            // The host deletes what it has seen end, and what it gave up starting.
            if let (Some(pid), None) = (process.pid(), process.exit_code()) {
                self.kill(id, pid);
            }
            if let Some(container) = self.lock().get_mut(&id.container) {
                container.processes.remove(id);
            }
            return Ok(process.exit_code());
        }
        let container = self.lock().remove(&id.container);
        for process in container
            .iter()
            .flat_map(|container| container.processes.values())
        {
            process.give_up.cancel();
        }
        self.release(&id.container).await;
        Ok(process.exit_code())
    }

    /// Removes everything that a container has in the guest.
    async fn release(&self, id: &ContainerId) {
        let cgroup = Cgroup::of(id);
        let removed = match cgroup.kill() {
            Ok(()) => cgroup.remove(Deadline::after(GONE)).await,
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            tracing::warn!(container = %id, %error, "cgroup not removed");
        }
        for folder in [bundle(id), state().join(id.as_str())] {
            match fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(container = %id, folder = %folder.display(), %error, "not removed");
                }
                _ => {}
            }
        }
    }

    /// Kills every container and waits for their processes.
    pub async fn end_all(&self, by: Deadline) -> Vec<String> {
        let all: Vec<_> = self.lock().keys().cloned().collect();
        let mut problems = Vec::new();
        for id in &all {
            if let Err(error) = Cgroup::of(id).kill() {
                problems.push(format!("kill {id}: {error}"));
            }
        }
        for id in all {
            let init = ProcessRef::init(id);
            if let Ok(process) = self.process(&init)
                && process.pid().is_some()
            {
                let mut exit = process.exit();
                if by.run(exit.wait_for(Option::is_some)).await.is_err() {
                    problems.push(format!("{init} does not end"));
                }
            }
        }
        problems
    }

    /// Resizes a process's terminal; a process without one is left alone.
    ///
    /// # Errors
    /// [`GuestError::NoProcess`].
    pub fn resize(&self, id: &ProcessRef, columns: u32, rows: u32) -> Result<(), GuestError> {
        match self.process(id)?.terminal() {
            Some(terminal) => terminal.resize(columns.into(), rows.into()),
            None => Ok(()),
        }
    }

    fn cgroup(&self, id: &ContainerId) -> Result<Cgroup, GuestError> {
        self.process(&ProcessRef::init(id.clone()))?;
        Ok(Cgroup::of(id))
    }

    /// The PIDs of a container's processes in the guest.
    ///
    /// # Errors
    /// [`GuestError::NoProcess`].
    pub fn pids(&self, id: &ContainerId) -> Result<Vec<u32>, GuestError> {
        Ok(self.cgroup(id)?.pids())
    }

    /// Freezes a container, or lets it run again, and waits until it is so.
    ///
    /// # Errors
    /// [`GuestError::NoProcess`], what the kernel says, or that it does not freeze
    /// in time: then it runs on.
    pub async fn freeze(&self, id: &ContainerId, frozen: bool) -> Result<(), GuestError> {
        let cgroup = self.cgroup(id)?;
        cgroup.freeze(frozen, Deadline::after(FROZEN)).await
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// [`GuestError::NoProcess`], or what the kernel says.
    pub fn update(&self, id: &ContainerId, resources_json: &[u8]) -> Result<(), GuestError> {
        let resources: LinuxResources =
            serde_json::from_slice(resources_json).map_err(|error| GuestError::Invalid {
                field: "resources",
                reason: error.to_string(),
            })?;
        self.cgroup(id)?.update(&resources)
    }

    /// A container's figures.
    ///
    /// # Errors
    /// [`GuestError::NoProcess`].
    pub fn stats(&self, id: &ContainerId) -> Result<agent::StatsResponse, GuestError> {
        Ok(self.cgroup(id)?.stats())
    }
}

/// Makes the process's streams; a terminal's come over the console socket.
fn streams(process: &Process) -> Result<(Streams, Option<ConsoleSocket>), GuestError> {
    if process.stdio.terminal {
        return Ok((Streams::default(), Some(ConsoleSocket::bind()?)));
    }
    let (ends, streams) = Ends::pipes(&process.stdio)?;
    process.set_ends(ends);
    Ok((streams, None))
}
