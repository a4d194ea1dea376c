// SPDX-License-Identifier: Apache-2.0
//! The Sandbox service: a pod without a pause container (containerd 2.x with
//! `sandboxer = "shim"`).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::Sandbox as SandboxApi;
use podhull_sandbox::{ContainerStats, Sandbox, SandboxError};
use podhull_types::Deadline;
use ttrpc::r#async::TtrpcContext;

use crate::error::ShimError;
use crate::shim::{Shim, detached};
use crate::status::reply;
use crate::wire::{any, timestamp};
use crate::{cri, stats};

/// Time for a stop that names none.
const STOP: Duration = Duration::from_secs(20);
/// How containerd calls the type of an OCI spec.
const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
/// The states that containerd's CRI plugin knows.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct SandboxService(pub(crate) Arc<Shim>);

impl SandboxService {
    /// This process serves one sandbox: any other is not found.
    fn check(&self, id: &str) -> Result<(), ShimError> {
        if id == self.0.id.as_str() {
            return Ok(());
        }
        let container = podhull_types::ContainerId::new(id)?;
        Err(SandboxError::NoProcess(podhull_types::ProcessRef::init(container)).into())
    }

    fn describe(&self, request: &CreateSandboxRequest) -> Result<(), ShimError> {
        self.check(&request.sandbox_id)?;
        let shim = &self.0;
        let config = cri::decode(request.options.as_ref())?;
        let spec = cri::sandbox_spec(
            &shim.namespace,
            &shim.id,
            &config,
            &request.netns_path,
            shim.started,
        )?;
        shim.describe(spec)
    }

    async fn boot(&self, id: &str) -> Result<StartSandboxResponse, ShimError> {
        self.check(id)?;
        let spec = self.0.described()?;
        let sandbox = self.0.boot(spec).await?;
        let created_at = self.0.created_at().unwrap_or_else(SystemTime::now);
        Ok(StartSandboxResponse {
            pid: sandbox.vmm_pid(),
            created_at: timestamp(created_at),
            spec: MessageField::some(spec_of(&sandbox)),
            ..StartSandboxResponse::default()
        })
    }

    /// A sandbox that never ran is stopped.
    async fn stop(&self, id: &str, within: Duration) -> Result<(), ShimError> {
        self.check(id)?;
        let Ok(sandbox) = self.0.sandbox() else {
            return Ok(());
        };
        let report = sandbox.stop(Deadline::after(within)).await;
        tracing::info!(sandbox = id, %report, "sandbox stopped");
        Ok(())
    }

    fn status(&self, request: &SandboxStatusRequest) -> Result<SandboxStatusResponse, ShimError> {
        self.check(&request.sandbox_id)?;
        let sandbox = self.0.sandbox().ok();
        let exit = sandbox.as_ref().and_then(|sandbox| sandbox.exit());
        let ready = sandbox.is_some() && exit.is_none();
        let mut info = HashMap::new();
        if let Some(sandbox) = sandbox.as_ref().filter(|_| request.verbose) {
            for (phase, at) in sandbox.boot_times().iter() {
                info.insert(format!("boot.{phase}"), format!("{} ms", at.as_millis()));
            }
            info.insert("emulated".into(), sandbox.emulated().to_string());
        }
        Ok(SandboxStatusResponse {
            sandbox_id: request.sandbox_id.clone(),
            pid: sandbox.as_ref().map_or(0, |sandbox| sandbox.vmm_pid()),
            state: if ready { READY } else { NOT_READY }.to_owned(),
            info,
            created_at: self
                .0
                .created_at()
                .map_or_else(MessageField::none, timestamp),
            exited_at: exit.map_or_else(MessageField::none, |exit| timestamp(exit.at)),
            ..SandboxStatusResponse::default()
        })
    }

    /// The sum of the containers' figures.
    async fn metrics(&self, id: &str) -> Result<SandboxMetricsResponse, ShimError> {
        self.check(id)?;
        let sandbox = self.0.sandbox()?;
        let mut all: Vec<ContainerStats> = Vec::new();
        for container in sandbox.containers() {
            all.push(sandbox.stats(&container).await?);
        }
        let mut response = SandboxMetricsResponse::default();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.id = id.to_owned();
        metrics.timestamp = timestamp(SystemTime::now());
        metrics.data = MessageField::some(stats::pack(&stats::metrics(&stats::sum(&all)))?);
        Ok(response)
    }
}

/// The sandbox as an OCI spec, which containerd shows as its runtime spec.
fn spec_of(sandbox: &Sandbox) -> Any {
    let spec = serde_json::json!({
        "ociVersion": oci_spec::runtime::VERSION,
        "hostname": sandbox.spec().hostname,
        "linux": {"cgroupsPath": sandbox.spec().cgroups_path},
    });
    any(SPEC, spec.to_string().into_bytes())
}

#[async_trait]
impl SandboxApi for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        reply(self.describe(&request))?;
        Ok(CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        reply(self.0.asked_for(self.boot(&request.sandbox_id)).await)
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        request: PlatformRequest,
    ) -> ttrpc::Result<PlatformResponse> {
        reply(self.check(&request.sandbox_id))?;
        let mut response = PlatformResponse::default();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".to_owned();
        // As Go calls it.
        platform.architecture = "amd64".to_owned();
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let within = match request.timeout_secs {
            0 => STOP,
            seconds => Duration::from_secs(seconds.into()),
        };
        let service = self.clone();
        let stopped =
            detached(async move { service.stop(&request.sandbox_id, within).await }).await;
        reply(stopped)?;
        Ok(StopSandboxResponse::default())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        reply(self.check(&request.sandbox_id))?;
        let exit = reply(self.0.sandbox())?.stopped().await;
        Ok(WaitSandboxResponse {
            exit_status: exit.code.into(),
            exited_at: timestamp(exit.at),
            ..WaitSandboxResponse::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        reply(self.status(&request))
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        request: PingRequest,
    ) -> ttrpc::Result<PingResponse> {
        reply(self.check(&request.sandbox_id))?;
        reply(self.0.sandbox())?;
        Ok(PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        reply(self.check(&request.sandbox_id))?;
        self.0.end();
        Ok(ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        reply(self.metrics(&request.sandbox_id).await)
    }
}
