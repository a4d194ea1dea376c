// SPDX-License-Identifier: Apache-2.0
//! Pods.

use std::fs;
use std::path::PathBuf;
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use k8s_cri::v1::{
    DnsConfig, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption,
    PodSandboxConfig, PodSandboxMetadata, PodSandboxState, PodSandboxStatus,
    PodSandboxStatusRequest, PodSandboxStatusResponse, RemovePodSandboxRequest,
    RunPodSandboxRequest, StopPodSandboxRequest,
};

use super::{Client, ContainerBuilder};

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A pod's configuration, as the kubelet would write it.
#[derive(Debug, Clone)]
#[must_use]
pub struct PodBuilder {
    client: Client,
    handler: String,
    /// Everything CRI can say about a pod; change it freely before `run`.
    pub config: PodSandboxConfig,
}

impl PodBuilder {
    pub(super) fn new(client: Client, name: &str) -> Self {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let uid = format!("{:08x}-{number:04x}", process::id());
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.into(),
                uid: uid.clone(),
                namespace: "default".into(),
                attempt: 0,
            }),
            hostname: name.into(),
            log_directory: format!("/var/log/pods/default_{name}_{uid}"),
            dns_config: Some(DnsConfig::default()),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(NamespaceOption::default()),
                    ..LinuxSandboxSecurityContext::default()
                }),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        };
        Self {
            client,
            handler: "runc".into(),
            config,
        }
    }

    /// The runtime handler.
    pub fn handler(mut self, handler: &str) -> Self {
        self.handler = handler.into();
        self
    }

    /// Adds a label.
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.config.labels.insert(key.into(), value.into());
        self
    }

    /// Adds an annotation.
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.config.annotations.insert(key.into(), value.into());
        self
    }

    /// Changes what only Linux has.
    pub fn linux(mut self, change: impl FnOnce(&mut LinuxPodSandboxConfig)) -> Self {
        change(self.config.linux.get_or_insert_default());
        self
    }

    /// Changes the namespaces of the pod.
    pub fn namespaces(self, change: impl FnOnce(&mut NamespaceOption)) -> Self {
        self.linux(|linux| {
            let context = linux.security_context.get_or_insert_default();
            change(context.namespace_options.get_or_insert_default());
        })
    }

    /// Changes anything.
    pub fn edit(mut self, change: impl FnOnce(&mut PodSandboxConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// RunPodSandbox.
    ///
    /// # Errors
    /// containerd's reply.
    pub async fn run(self) -> Result<Pod> {
        fs::create_dir_all(&self.config.log_directory).context("create the pod's log folder")?;
        let request = RunPodSandboxRequest {
            config: Some(self.config.clone()),
            runtime_handler: self.handler.clone(),
        };
        let response = match self.client.runtime().run_pod_sandbox(request).await {
            Ok(response) => response.into_inner(),
            Err(status) => {
                fs::remove_dir_all(&self.config.log_directory)
                    .context("remove the pod's log folder")?;
                return Err(status).context("RunPodSandbox");
            }
        };
        Ok(Pod {
            client: self.client,
            id: response.pod_sandbox_id,
            handler: self.handler,
            config: self.config,
        })
    }
}

/// A pod that was run. It stays until it is removed.
#[derive(Debug, Clone)]
pub struct Pod {
    client: Client,
    id: String,
    handler: String,
    config: PodSandboxConfig,
}

impl Pod {
    /// Its sandbox id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its runtime handler.
    #[must_use]
    pub fn handler(&self) -> &str {
        &self.handler
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &PodSandboxConfig {
        &self.config
    }

    /// The client it was made with.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The folder of its containers' logs.
    #[must_use]
    pub fn log_directory(&self) -> PathBuf {
        PathBuf::from(&self.config.log_directory)
    }

    /// A container to be.
    pub fn container(&self, name: &str) -> ContainerBuilder {
        ContainerBuilder::new(self.clone(), name)
    }

    /// PodSandboxStatus, whole.
    ///
    /// # Errors
    /// containerd's reply.
    pub async fn full_status(&self) -> Result<PodSandboxStatusResponse> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: true,
        };
        let response = self.client.runtime().pod_sandbox_status(request).await;
        Ok(response.context("PodSandboxStatus")?.into_inner())
    }

    /// PodSandboxStatus.
    ///
    /// # Errors
    /// containerd's reply.
    pub async fn status(&self) -> Result<PodSandboxStatus> {
        self.full_status().await?.status.context("no status")
    }

    /// True while the pod is Ready.
    ///
    /// # Errors
    /// containerd's reply.
    pub async fn is_ready(&self) -> Result<bool> {
        Ok(self.status().await?.state() == PodSandboxState::SandboxReady)
    }

    /// Waits until the pod is no longer Ready.
    ///
    /// # Errors
    /// If it still is after `within`.
    pub async fn not_ready(&self, within: Duration) -> Result<Duration> {
        let begin = Instant::now();
        while self.is_ready().await? {
            ensure!(
                begin.elapsed() < within,
                "the pod is still Ready after {within:?}"
            );
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        Ok(begin.elapsed())
    }

    /// Its addresses, IPv4 first.
    ///
    /// # Errors
    /// containerd's reply, or if there are not two.
    pub async fn addresses(&self) -> Result<(String, String)> {
        let network = self
            .status()
            .await?
            .network
            .context("the pod has no network")?;
        let more: Vec<String> = network.additional_ips.into_iter().map(|ip| ip.ip).collect();
        match &more[..] {
            [v6] => Ok((network.ip, v6.clone())),
            other => bail!("expected one more address than {}: {other:?}", network.ip),
        }
    }

    /// StopPodSandbox.
    ///
    /// # Errors
    /// containerd's reply.
    pub async fn stop(&self) -> Result<()> {
        let request = StopPodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        self.client
            .runtime()
            .stop_pod_sandbox(request)
            .await
            .context("StopPodSandbox")?;
        Ok(())
    }

    /// RemovePodSandbox, and the log folder, as the kubelet does.
    ///
    /// # Errors
    /// containerd's reply.
    pub async fn remove(&self) -> Result<()> {
        let request = RemovePodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        self.client
            .runtime()
            .remove_pod_sandbox(request)
            .await
            .context("RemovePodSandbox")?;
        match fs::remove_dir_all(&self.config.log_directory) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            result => result.context("remove the pod's log folder"),
        }
    }
}
