// SPDX-License-Identifier: Apache-2.0
//! Making and releasing containers.

use std::sync::Arc;
use std::time::Duration;

use oci_spec::runtime::LinuxResources;
use podhull_api::agent;
use podhull_storage::{RemoveReport, SharedTree, StorageError};
use podhull_types::{ContainerId, Deadline, ProcessRef, chain};
use tokio_util::sync::CancellationToken;

use crate::ContainerStats;
use crate::blocking::{Unfinished, blocking};
use crate::error::SandboxError;
use crate::exec::{exec_id, wire_stdio};
use crate::process::Process;
use crate::sandbox::Sandbox;
use crate::spec::{ContainerSpec, Status};
use crate::translate::{GuestSpec, check_fields, translate};

/// What is kept of a delete's time for what comes after the last output.
const AFTER_DRAIN: Duration = Duration::from_secs(3);
/// Time for unmounting a container's tree.
const UNMOUNT: Duration = Duration::from_secs(5);
/// Least time for it: what nobody uses goes at once, the rest is detached.
const UNUSED: Duration = Duration::from_secs(1);

impl Sandbox {
    /// Makes a container ready to start. Returns the PID to report.
    ///
    /// # Errors
    /// What cannot be served, by its field's name; an entrypoint that cannot be
    /// executed, in runc's words. Nothing of the container stays then.
    pub async fn create_container(
        self: &Arc<Self>,
        spec: ContainerSpec,
    ) -> Result<u32, SandboxError> {
        self.check_usable()?;
        let spec = Arc::new(spec);
        let id = ProcessRef::init(spec.id.clone());
        let tree = self.tree().await?;
        let process = self.enter(&id, self.pids.next(), spec.stdio.clone(), false)?;
        match self.make(&process, &spec, &tree).await {
            Ok(()) => {
                process.made();
                Ok(process.pid)
            }
            Err(error) => {
                self.give_up(&process);
                remove_tree(tree, &spec.id, Deadline::after(UNMOUNT)).await;
                Err(error)
            }
        }
    }

    async fn tree(&self) -> Result<Arc<SharedTree>, SandboxError> {
        let parts = self.parts.lock().await;
        parts
            .as_ref()
            .and_then(|parts| parts.tree.clone())
            .ok_or_else(|| SandboxError::Stopping(self.spec.id.clone()))
    }

    async fn make(
        &self,
        process: &Process,
        spec: &Arc<ContainerSpec>,
        tree: &Arc<SharedTree>,
    ) -> Result<(), SandboxError> {
        let GuestSpec {
            oci,
            rootfs,
            pid_namespace,
        } = self.translate(spec, tree, self.call_deadline()).await?;
        let spec_json = serde_json::to_vec(&oci).map_err(|source| SandboxError::Encode {
            what: "spec",
            container: spec.id.clone(),
            source,
        })?;
        let (pid_namespace, pid_target) = pid_namespace.to_wire();
        let request = agent::CreateContainerRequest {
            container_id: spec.id.to_string(),
            spec_json,
            rootfs,
            stdio: Some(wire_stdio(&spec.stdio)),
            pid_namespace: pid_namespace.into(),
            pid_target,
        };
        let created = self
            .ask(
                "CreateContainer",
                self.call_deadline(),
                async |mut client| client.create_container(request).await,
            )
            .await;
        let made = match created {
            Ok(_) => self.connect_stdio(process).await,
            Err(error) => Err(error),
        };
        // Also after a deadline: the guest may have made it all the same.
        if made.is_err() && !self.is_gone() {
            self.forget_in_guest(&process.id).await;
        }
        made
    }

    /// Mounts what the container needs and translates its spec. A mount, and a
    /// look at a volume, can block in the kernel for as long as a server is away:
    /// what is then given up is undone by who did it, once it can go on.
    async fn translate(
        &self,
        spec: &Arc<ContainerSpec>,
        tree: &Arc<SharedTree>,
        by: Deadline,
    ) -> Result<GuestSpec, SandboxError> {
        let (sandbox, targets) = (self.spec.clone(), self.pid_targets());
        let (spec, tree) = (Arc::clone(spec), Arc::clone(tree));
        let id = spec.id.clone();
        let given_up = CancellationToken::new();
        let seen = given_up.clone();
        let _gives_up = given_up.drop_guard();
        let translated = blocking(by, move || {
            let translated = translate(&sandbox, &spec, &tree, &targets);
            if seen.is_cancelled() {
                let removed = tree.remove_container(&spec.id, Deadline::after(UNMOUNT));
                note_removal(&spec.id, removed);
            }
            translated
        });
        match translated.await {
            Ok(translated) => translated,
            Err(Unfinished::Blocked) => Err(SandboxError::Blocked(id)),
            Err(died @ Unfinished::Died(_)) => {
                tracing::error!(container = %id, error = chain(&died), "translating a spec");
                Err(SandboxError::refused("spec", "it cannot be translated"))
            }
        }
    }

    /// The PIDs that a container's spec may name in `/proc/<PID>/ns/pid`.
    fn pid_targets(&self) -> Vec<(u32, Option<ContainerId>)> {
        let containers = self
            .all_processes()
            .into_iter()
            .filter(|process| process.id.exec.is_none() && !process.pause)
            .map(|process| (process.pid, Some(process.id.container.clone())));
        // The pod's own PID is the VMM's, with and without a pause container.
        std::iter::once((self.vmm_pid(), None))
            .chain(containers)
            .collect()
    }

    /// Freezes a container.
    ///
    /// # Errors
    /// If it does not run.
    pub async fn pause(&self, container: &ContainerId) -> Result<(), SandboxError> {
        let process = self.process(&ProcessRef::init(container.clone()))?;
        process.expect(&[Status::Running], "running")?;
        let request = agent::PauseRequest {
            container_id: container.to_string(),
        };
        self.ask("Pause", self.call_deadline(), async |mut client| {
            client.pause(request).await
        })
        .await?;
        process.set_paused(true);
        Ok(())
    }

    /// Lets a frozen container run again.
    ///
    /// # Errors
    /// If it is not paused.
    pub async fn resume(&self, container: &ContainerId) -> Result<(), SandboxError> {
        let process = self.process(&ProcessRef::init(container.clone()))?;
        process.expect(&[Status::Paused], "paused")?;
        let request = agent::ResumeRequest {
            container_id: container.to_string(),
        };
        self.ask("Resume", self.call_deadline(), async |mut client| {
            client.resume(request).await
        })
        .await?;
        process.set_paused(false);
        Ok(())
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// If podhull cannot apply one of them, by its field's name, or the guest cannot.
    pub async fn update(
        &self,
        container: &ContainerId,
        resources: &LinuxResources,
    ) -> Result<(), SandboxError> {
        let process = self.process(&ProcessRef::init(container.clone()))?;
        if process.pause {
            return Ok(());
        }
        check_fields(resources, "linux.resources")?;
        let resources_json =
            serde_json::to_vec(resources).map_err(|source| SandboxError::Encode {
                what: "resources",
                container: container.clone(),
                source,
            })?;
        let request = agent::UpdateRequest {
            container_id: container.to_string(),
            resources_json,
        };
        self.ask("Update", self.call_deadline(), async |mut client| {
            client.update(request).await
        })
        .await?;
        Ok(())
    }

    /// A container's figures; the pause task uses nothing.
    ///
    /// # Errors
    /// If there is no such container or the guest does not answer.
    pub async fn stats(&self, container: &ContainerId) -> Result<ContainerStats, SandboxError> {
        let process = self.process(&ProcessRef::init(container.clone()))?;
        if process.pause {
            return Ok(ContainerStats::default());
        }
        let request = agent::StatsRequest {
            container_id: container.to_string(),
        };
        self.ask("Stats", self.call_deadline(), async |mut client| {
            client.stats(request).await
        })
        .await
    }
}

/// Frees what a process holds: its output is delivered first, then the guest
/// forgets it, and with a container its tree goes.
pub(crate) async fn release(
    sandbox: &Sandbox,
    process: &Process,
    by: Deadline,
) -> Result<(), SandboxError> {
    let never_ran = process.state().status == Status::Created;
    let gone = sandbox.is_gone();
    // The guest ends the streams of a process that never ran when it forgets
    // it; those of one that ran end by themselves, or with its last child.
    if !gone && never_ran {
        ask_delete(sandbox, process, by).await?;
    }
    if let Some(io) = process.take_io() {
        // The guest's own work comes after it and needs its time.
        let drained = by.remaining().saturating_sub(AFTER_DRAIN);
        let report = io.finish(Deadline::after(drained)).await;
        if !report.complete && !never_ran {
            tracing::warn!(process = %process.id, closed = %report.closed, "output dropped at delete");
        }
    }
    if !gone && !never_ran {
        ask_delete(sandbox, process, by).await?;
    }
    if process.id.exec.is_none() {
        let parts = sandbox.parts.lock().await;
        let tree = parts.as_ref().and_then(|parts| parts.tree.clone());
        drop(parts);
        if let Some(tree) = tree {
            remove_tree(tree, &process.id.container, by).await;
        }
    }
    Ok(())
}

async fn ask_delete(
    sandbox: &Sandbox,
    process: &Process,
    by: Deadline,
) -> Result<(), SandboxError> {
    let request = agent::DeleteRequest {
        container_id: process.id.container.to_string(),
        exec_id: exec_id(&process.id),
    };
    let call = by.at_most(sandbox.call_deadline().remaining());
    match sandbox
        .ask("Delete", call, async |mut client| {
            client.delete(request).await
        })
        .await
    {
        Ok(_) => Ok(()),
        // A VM that ended meanwhile holds nothing any more.
        Err(_) if sandbox.is_gone() => Ok(()),
        Err(error) => Err(error),
    }
}

async fn remove_tree(tree: Arc<SharedTree>, container: &ContainerId, by: Deadline) {
    let id = container.clone();
    let ends = by.max(Deadline::after(UNUSED));
    match blocking(ends, move || tree.remove_container(&id, by)).await {
        Ok(removed) => note_removal(container, removed),
        Err(error) => {
            tracing::error!(%container, error = chain(&error), "removing a container's tree");
        }
    }
}

fn note_removal(container: &ContainerId, removed: Result<RemoveReport, StorageError>) {
    match removed {
        // The guest, or the file server, still has something of what was detached.
        Ok(report) if !report.is_clean() || !report.detached.is_empty() => {
            tracing::warn!(%container, ?report, "container's tree not quite removed");
        }
        Ok(report) => tracing::debug!(%container, ?report, "container's tree removed"),
        Err(error) => {
            tracing::warn!(%container, error = chain(&error), "container's tree not removed");
        }
    }
}

#[cfg(test)]
mod tests;
