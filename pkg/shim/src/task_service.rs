// SPDX-License-Identifier: Apache-2.0
//! The Task service: containerd's requests about containers and processes.
//! Decode, hand to the sandbox, map the error; nothing else happens here.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest,
    StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse,
    Status as TaskStatus, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskIO, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::topics;
use containerd_shim_protos::types::task::ProcessInfo;
use podhull_sandbox::{ContainerSpec, SandboxError, Status};
use podhull_types::{ContainerId, Deadline, ProcessRef};
use ttrpc::r#async::TtrpcContext;

use crate::error::ShimError;
use crate::shim::{Shim, detached};
use crate::status::{reply, unimplemented};
use crate::streaming::Uris;
use crate::wire::{any, json, path_text, process, rootfs, timestamp};
use crate::{bundle, stats};

/// containerd gives a Delete 10 s; output that is still on its way gets most.
const DELETE: Duration = Duration::from_secs(9);

/// The service, under both its names.
#[derive(Debug, Clone)]
pub(crate) struct TaskService(pub(crate) Arc<Shim>);

impl TaskService {
    /// Boots the pod for its pause container, or makes a container in it.
    async fn create_task(&self, request: &CreateTaskRequest) -> Result<u32, ShimError> {
        if !request.checkpoint.is_empty() {
            let reason = "restoring a container from a checkpoint is not offered";
            return Err(SandboxError::refused("checkpoint", reason).into());
        }
        let folder = Path::new(&request.bundle);
        let oci = bundle::read(folder)?.ok_or_else(|| ShimError::File {
            what: "read",
            path: folder.join("config.json"),
            source: std::io::ErrorKind::NotFound.into(),
        })?;
        let id = process(&request.id, "")?;
        let uris = Uris {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
        };
        let claim = self.0.streams.claim(&id, uris, request.terminal)?;
        if bundle::is_sandbox(&oci) {
            let shim = &self.0;
            let spec = bundle::sandbox_spec(&shim.namespace, &shim.id, &oci, shim.started)?;
            let pid = shim.boot(spec).await?.create_pause(claim.stdio())?;
            claim.start();
            return Ok(pid);
        }
        let sandbox = self.0.sandbox()?;
        let spec = ContainerSpec {
            id: id.container,
            oci,
            rootfs: rootfs(&request.rootfs),
            stdio: claim.stdio(),
        };
        let pid = sandbox.create_container(spec).await?;
        claim.start();
        Ok(pid)
    }

    async fn create_and_tell(&self, request: CreateTaskRequest) -> Result<u32, ShimError> {
        let pid = self.create_task(&request).await?;
        let mut event = TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            io: MessageField::some(TaskIO {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
                ..TaskIO::default()
            }),
            pid,
            ..TaskCreate::default()
        };
        // The same message, generated a second time under a name of its own.
        event
            .rootfs
            .resize_with(request.rootfs.len(), Default::default);
        for (to, from) in event.rootfs.iter_mut().zip(request.rootfs) {
            to.type_ = from.type_;
            to.source = from.source;
            to.target = from.target;
            to.options = from.options;
        }
        let publisher = &self.0.publisher;
        publisher.publish(topics::TASK_CREATE_EVENT_TOPIC, "TaskCreate", &event);
        Ok(pid)
    }

    async fn start_process(&self, id: ProcessRef) -> Result<u32, ShimError> {
        let sandbox = self.0.sandbox()?;
        let container_id = id.container.to_string();
        let exec_id = id.exec.as_ref().map(ToString::to_string);
        let publisher = Arc::clone(&self.0.publisher);
        let announce = move |pid| match exec_id {
            None => {
                let event = TaskStart {
                    container_id,
                    pid,
                    ..TaskStart::default()
                };
                publisher.publish(topics::TASK_START_EVENT_TOPIC, "TaskStart", &event);
            }
            Some(exec_id) => {
                let event = TaskExecStarted {
                    container_id,
                    exec_id,
                    pid,
                    ..TaskExecStarted::default()
                };
                let topic = topics::TASK_EXEC_STARTED_EVENT_TOPIC;
                publisher.publish(topic, "TaskExecStarted", &event);
            }
        };
        Ok(sandbox.start(&id, announce).await?)
    }

    async fn delete_process(&self, id: ProcessRef) -> Result<DeleteResponse, ShimError> {
        let sandbox = self.0.sandbox()?;
        let by = Deadline::after(DELETE);
        let deleted = sandbox.delete(&id, by).await?;
        self.0.streams.finish(&id, by).await;
        let exited_at = timestamp(deleted.exit.at);
        if id.exec.is_none() {
            let event = TaskDelete {
                container_id: id.container.to_string(),
                pid: deleted.pid,
                exit_status: deleted.exit.code.into(),
                exited_at: exited_at.clone(),
                ..TaskDelete::default()
            };
            let publisher = &self.0.publisher;
            publisher.publish(topics::TASK_DELETE_EVENT_TOPIC, "TaskDelete", &event);
        }
        Ok(DeleteResponse {
            pid: deleted.pid,
            exit_status: deleted.exit.code.into(),
            exited_at,
            ..DeleteResponse::default()
        })
    }

    async fn add_process(&self, request: ExecProcessRequest) -> Result<(), ShimError> {
        let id = process(&request.id, &request.exec_id)?;
        let Some(exec_id) = &id.exec else {
            return Err(SandboxError::refused("exec_id", "it is empty").into());
        };
        let exec_id = exec_id.to_string();
        let spec = json("spec", &request.spec)?;
        let uris = Uris {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        let claim = self.0.streams.claim(&id, uris, request.terminal)?;
        let sandbox = self.0.sandbox()?;
        sandbox.create_exec(id, spec, claim.stdio()).await?;
        claim.start();
        let event = TaskExecAdded {
            container_id: request.id,
            exec_id,
            ..TaskExecAdded::default()
        };
        let topic = topics::TASK_EXEC_ADDED_EVENT_TOPIC;
        self.0.publisher.publish(topic, "TaskExecAdded", &event);
        Ok(())
    }

    async fn state_of(&self, request: &StateRequest) -> Result<StateResponse, ShimError> {
        let id = process(&request.id, &request.exec_id)?;
        let state = self.0.sandbox()?.state(&id).await?;
        if matches!(state.status, Status::Stopped) {
            self.0.streams.read(&id).await;
        }
        let uris = self.0.streams.uris(&id).unwrap_or_else(|| Uris {
            stdin: path_text(state.stdio.stdin.as_ref()),
            stdout: path_text(state.stdio.stdout.as_ref()),
            stderr: path_text(state.stdio.stderr.as_ref()),
        });
        let status = match state.status {
            Status::Created => TaskStatus::CREATED,
            Status::Running => TaskStatus::RUNNING,
            Status::Paused => TaskStatus::PAUSED,
            Status::Stopped => TaskStatus::STOPPED,
        };
        Ok(StateResponse {
            id: request.id.clone(),
            exec_id: request.exec_id.clone(),
            pid: state.pid,
            status: status.into(),
            stdin: uris.stdin,
            stdout: uris.stdout,
            stderr: uris.stderr,
            terminal: state.stdio.terminal,
            exit_status: state.exit.map_or(0, |exit| exit.code.into()),
            exited_at: state
                .exit
                .map_or_else(MessageField::none, |exit| timestamp(exit.at)),
            ..StateResponse::default()
        })
    }

    async fn processes(&self, request: &PidsRequest) -> Result<PidsResponse, ShimError> {
        let sandbox = self.0.sandbox()?;
        let id = ContainerId::new(request.id.as_str())?;
        // A sandbox without a pause container is asked for by its own id when
        // containerd comes back.
        let pids = if self.0.is_bare_sandbox(&id)? {
            vec![(sandbox.vmm_pid(), None)]
        } else {
            sandbox.pids(&id).await?
        };
        let mut processes = Vec::with_capacity(pids.len());
        for (pid, exec) in pids {
            let mut info = ProcessInfo {
                pid,
                ..ProcessInfo::default()
            };
            if let Some(exec) = exec {
                let details = ProcessDetails {
                    exec_id: exec.to_string(),
                    ..ProcessDetails::default()
                };
                let value = details.write_to_bytes().unwrap_or_default();
                info.info = MessageField::some(any("containerd.runc.v1.ProcessDetails", value));
            }
            processes.push(info);
        }
        Ok(PidsResponse {
            processes,
            ..PidsResponse::default()
        })
    }

    async fn freeze(&self, id: &str, frozen: bool) -> Result<(), ShimError> {
        let sandbox = self.0.sandbox()?;
        let container = ContainerId::new(id)?;
        let publisher = &self.0.publisher;
        if frozen {
            sandbox.pause(&container).await?;
            let event = TaskPaused {
                container_id: id.to_owned(),
                ..TaskPaused::default()
            };
            publisher.publish(topics::TASK_PAUSED_EVENT_TOPIC, "TaskPaused", &event);
        } else {
            sandbox.resume(&container).await?;
            let event = TaskResumed {
                container_id: id.to_owned(),
                ..TaskResumed::default()
            };
            publisher.publish(topics::TASK_RESUMED_EVENT_TOPIC, "TaskResumed", &event);
        }
        Ok(())
    }

    async fn change(&self, request: UpdateTaskRequest) -> Result<(), ShimError> {
        let resources = json("resources", &request.resources)?;
        let id = ContainerId::new(request.id.as_str())?;
        Ok(self.0.sandbox()?.update(&id, &resources).await?)
    }

    async fn figures(&self, id: &str) -> Result<StatsResponse, ShimError> {
        let sandbox = self.0.sandbox()?;
        let figures = sandbox.stats(&ContainerId::new(id)?).await?;
        Ok(StatsResponse {
            stats: MessageField::some(stats::pack(&stats::metrics(&figures))?),
            ..StatsResponse::default()
        })
    }
}

impl Shim {
    /// Whether `id` is the sandbox's own and no pause container has it.
    fn is_bare_sandbox(&self, id: &ContainerId) -> Result<bool, ShimError> {
        let is_sandbox = id.as_str() == self.id.as_str();
        Ok(is_sandbox && !self.sandbox()?.containers().contains(id))
    }

    /// The PID reported for `id`; 0 if nothing is known of it.
    async fn task_pid(&self, id: &str) -> u32 {
        let known = async || -> Result<u32, ShimError> {
            let (sandbox, id) = (self.sandbox()?, ContainerId::new(id)?);
            if self.is_bare_sandbox(&id)? {
                return Ok(sandbox.vmm_pid());
            }
            Ok(sandbox.state(&ProcessRef::init(id)).await?.pid)
        };
        known().await.unwrap_or(0)
    }
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        reply(self.state_of(&request).await)
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let service = self.clone();
        let makes_the_sandbox = request.id == self.0.id.as_str();
        let making = detached(async move { service.create_and_tell(request).await });
        let pid = if makes_the_sandbox {
            self.0.asked_for(making).await
        } else {
            making.await
        };
        let pid = reply(pid)?;
        Ok(CreateTaskResponse {
            pid,
            ..CreateTaskResponse::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let id = reply(process(&request.id, &request.exec_id))?;
        let service = self.clone();
        let pid = reply(detached(async move { service.start_process(id).await }).await)?;
        Ok(StartResponse {
            pid,
            ..StartResponse::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        let id = reply(process(&request.id, &request.exec_id))?;
        let service = self.clone();
        reply(detached(async move { service.delete_process(id).await }).await)
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        reply(self.processes(&request).await)
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let service = self.clone();
        reply(detached(async move { service.freeze(&request.id, true).await }).await)?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let service = self.clone();
        reply(detached(async move { service.freeze(&request.id, false).await }).await)?;
        Ok(Empty::default())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        unimplemented("Checkpoint")
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let id = reply(process(&request.id, &request.exec_id))?;
        let sandbox = reply(self.0.sandbox())?;
        let killed = async move { Ok(sandbox.kill(&id, request.signal, request.all).await?) };
        reply(detached(killed).await)?;
        Ok(Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let service = self.clone();
        reply(detached(async move { service.add_process(request).await }).await)?;
        Ok(Empty::default())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let id = reply(process(&request.id, &request.exec_id))?;
        let sandbox = reply(self.0.sandbox())?;
        let resized = async move { Ok(sandbox.resize(&id, request.width, request.height).await?) };
        reply(detached(resized).await)?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let id = reply(process(&request.id, &request.exec_id))?;
        if request.stdin {
            reply(reply(self.0.sandbox())?.close_stdin(&id))?;
        }
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let service = self.clone();
        reply(detached(async move { service.change(request).await }).await)?;
        Ok(Empty::default())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let id = reply(process(&request.id, &request.exec_id))?;
        let exit = reply(reply(self.0.sandbox())?.wait(&id).await)?;
        Ok(WaitResponse {
            exit_status: exit.code.into(),
            exited_at: timestamp(exit.at),
            ..WaitResponse::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        reply(self.figures(&request.id).await)
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        // Always answered: an error here would make containerd drop the pod.
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.0.task_pid(&request.id).await,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..ConnectResponse::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        // Sent after every task's delete: the others still need the process, and
        // a sandbox without a pause container lives until ShutdownSandbox.
        let in_use = match self.0.sandbox() {
            Ok(sandbox) => self.0.serves_sandbox_api() || !sandbox.containers().is_empty(),
            Err(_) => false,
        };
        if request.now || !in_use {
            self.0.end();
        }
        Ok(Empty::default())
    }
}
