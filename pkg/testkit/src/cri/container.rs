// SPDX-License-Identifier: Apache-2.0
//! Containers and what is run in them.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_cri::v1::{
    AttachRequest, ContainerConfig, ContainerMetadata, ContainerState, ContainerStatus,
    ContainerStatusRequest, CreateContainerRequest, ExecRequest, ExecSyncRequest, ImageSpec,
    KeyValue, LinuxContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext, Mount,
    RemoveContainerRequest, StartContainerRequest, StopContainerRequest,
};

use super::{Client, Log, Pod};
use crate::image;

const EXEC_WITHIN: Duration = Duration::from_secs(60);

/// A container's configuration, as the kubelet would write it.
#[derive(Debug, Clone)]
#[must_use]
pub struct ContainerBuilder {
    pod: Pod,
    /// Everything CRI can say about a container; change it freely before `create`.
    pub config: ContainerConfig,
}

impl ContainerBuilder {
    pub(super) fn new(pod: Pod, name: &str) -> Self {
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.into(),
                attempt: 0,
            }),
            image: Some(ImageSpec {
                image: image::BUSYBOX.into(),
                ..ImageSpec::default()
            }),
            log_path: format!("{name}/0.log"),
            linux: Some(LinuxContainerConfig {
                resources: Some(LinuxContainerResources::default()),
                security_context: Some(LinuxContainerSecurityContext {
                    // A container is in the namespaces of its pod.
                    namespace_options: namespaces_of(&pod),
                    ..LinuxContainerSecurityContext::default()
                }),
            }),
            ..ContainerConfig::default()
        };
        Self { pod, config }
    }

    /// The command, instead of the image's.
    pub fn command<const N: usize>(mut self, command: [&str; N]) -> Self {
        self.config.command = command.map(str::to_owned).into();
        self
    }

    /// A line for the shell.
    pub fn shell(self, script: &str) -> Self {
        self.command(["sh", "-c", script])
    }

    /// A command that stays until it is told to end, and ends with 0 then. It
    /// writes `up` once it listens to signals.
    pub fn idle(self) -> Self {
        self.shell("trap 'exit 0' TERM; echo up; while :; do sleep 1000000 & wait $!; done")
    }

    /// Adds a variable.
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.config.envs.push(KeyValue {
            key: key.into(),
            value: value.into(),
        });
        self
    }

    /// Which start of the container this is; names must differ.
    pub fn attempt(mut self, attempt: u32) -> Self {
        let metadata = self.config.metadata.get_or_insert_default();
        metadata.attempt = attempt;
        self.config.log_path = format!("{}/{attempt}.log", metadata.name);
        self
    }

    /// Adds a bind mount.
    pub fn mount(mut self, host: &str, container: &str, readonly: bool) -> Self {
        self.config.mounts.push(Mount {
            host_path: host.into(),
            container_path: container.into(),
            readonly,
            ..Mount::default()
        });
        self
    }

    /// Changes the security context.
    pub fn security(mut self, change: impl FnOnce(&mut LinuxContainerSecurityContext)) -> Self {
        let linux = self.config.linux.get_or_insert_default();
        change(linux.security_context.get_or_insert_default());
        self
    }

    /// Changes the resources.
    pub fn resources(mut self, change: impl FnOnce(&mut LinuxContainerResources)) -> Self {
        let linux = self.config.linux.get_or_insert_default();
        change(linux.resources.get_or_insert_default());
        self
    }

    /// Changes anything.
    pub fn edit(mut self, change: impl FnOnce(&mut ContainerConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// CreateContainer.
    ///
    /// # Errors
    /// containerd's reply.
    pub async fn create(self) -> Result<Container> {
        let log = self.pod.log_directory().join(&self.config.log_path);
        if let Some(folder) = log.parent() {
            fs::create_dir_all(folder).context("create the container's log folder")?;
        }
        let request = CreateContainerRequest {
            pod_sandbox_id: self.pod.id().into(),
            config: Some(self.config),
            sandbox_config: Some(self.pod.config().clone()),
        };
        let response = self.pod.client().runtime().create_container(request).await;
        let id = response
            .context("CreateContainer")?
            .into_inner()
            .container_id;
        Ok(Container {
            client: self.pod.client().clone(),
            id,
            log,
        })
    }

    /// CreateContainer and StartContainer.
    ///
    /// # Errors
    /// containerd's reply.
    pub async fn start(self) -> Result<Container> {
        let container = self.create().await?;
        container.start().await?;
        Ok(container)
    }

    /// Starts it, waits for its end, and gives what it wrote and its status.
    ///
    /// # Errors
    /// containerd's reply, or if it takes longer than a minute.
    pub async fn run(self) -> Result<(Log, ContainerStatus)> {
        let container = self.start().await?;
        let status = container.exited(EXEC_WITHIN).await?;
        Ok((container.log()?, status))
    }
}

fn namespaces_of(pod: &Pod) -> Option<k8s_cri::v1::NamespaceOption> {
    let linux = pod.config().linux.as_ref()?;
    linux.security_context.as_ref()?.namespace_options.clone()
}

/// A container that was created. It stays until it or its pod is removed.
#[derive(Debug, Clone)]
pub struct Container {
    client: Client,
    id: String,
    log: PathBuf,
}

impl Container {
    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// StartContainer.
    ///
    /// # Errors
    /// containerd's reply.
    pub async fn start(&self) -> Result<()> {
        let request = StartContainerRequest {
            container_id: self.id.clone(),
        };
        self.client
            .runtime()
            .start_container(request)
            .await
            .context("StartContainer")?;
        Ok(())
    }

    /// Where a client streams an exec of `command`; a terminal has no stderr.
    ///
    /// # Errors
    /// If containerd refuses.
    pub async fn exec_url(&self, command: &[&str], stdin: bool, tty: bool) -> Result<String> {
        let request = ExecRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(|&word| word.into()).collect(),
            tty,
            stdin,
            stdout: true,
            stderr: !tty,
        };
        let response = self.client.runtime().exec(request).await.context("Exec")?;
        Ok(response.into_inner().url)
    }

    /// Where a client attaches to the init process; a terminal has no stderr.
    ///
    /// # Errors
    /// If containerd refuses.
    pub async fn attach_url(&self, stdin: bool, tty: bool) -> Result<String> {
        let request = AttachRequest {
            container_id: self.id.clone(),
            stdin,
            tty,
            stdout: true,
            stderr: !tty,
        };
        let response = self.client.runtime().attach(request).await;
        Ok(response.context("Attach")?.into_inner().url)
    }

    /// ExecSync. The process's exit code is part of the result, not an error.
    ///
    /// # Errors
    /// containerd's reply.
    pub async fn exec<I: IntoIterator<Item: Into<String>>>(&self, command: I) -> Result<Output> {
        let request = ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: command.into_iter().map(Into::into).collect(),
            timeout: i64::try_from(EXEC_WITHIN.as_secs())?,
        };
        let response = self.client.runtime().exec_sync(request).await;
        let response = response.context("ExecSync")?.into_inner();
        Ok(Output {
            stdout: response.stdout,
            stderr: response.stderr,
            code: response.exit_code,
        })
    }

    /// Runs a line of shell in the container.
    ///
    /// # Errors
    /// containerd's reply.
    pub async fn shell(&self, script: &str) -> Result<Output> {
        self.exec(["sh", "-c", script]).await
    }

    /// ContainerStatus.
    ///
    /// # Errors
    /// containerd's reply.
    pub async fn status(&self) -> Result<ContainerStatus> {
        let request = ContainerStatusRequest {
            container_id: self.id.clone(),
            verbose: false,
        };
        let response = self.client.runtime().container_status(request).await;
        response
            .context("ContainerStatus")?
            .into_inner()
            .status
            .context("no status")
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it still runs after `within`.
    pub async fn exited(&self, within: Duration) -> Result<ContainerStatus> {
        let by = Instant::now() + within;
        loop {
            let status = self.status().await?;
            if status.state() == ContainerState::ContainerExited {
                return Ok(status);
            }
            ensure!(
                Instant::now() < by,
                "the container is still {} after {within:?}",
                status.state().as_str_name()
            );
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    /// Waits until standard output has `text`.
    ///
    /// # Errors
    /// If it has not after `within`.
    pub async fn wrote(&self, text: &str, within: Duration) -> Result<Log> {
        let by = Instant::now() + within;
        loop {
            let log = self.log()?;
            if log.text().contains(text) {
                return Ok(log);
            }
            ensure!(
                Instant::now() < by,
                "no {text:?} after {within:?}, only {:?}",
                log.text()
            );
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    /// What it wrote so far.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn log(&self) -> Result<Log> {
        let bytes = match fs::read(&self.log) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => {
                return Err(error).with_context(|| format!("read {}", self.log.display()));
            }
        };
        // The last line may be half written.
        let whole = bytes
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |at| at + 1);
        Log::parse(&bytes[..whole])
    }

    /// StopContainer with `grace` seconds.
    ///
    /// # Errors
    /// containerd's reply.
    pub async fn stop(&self, grace: i64) -> Result<()> {
        let request = StopContainerRequest {
            container_id: self.id.clone(),
            timeout: grace,
        };
        self.client
            .runtime()
            .stop_container(request)
            .await
            .context("StopContainer")?;
        Ok(())
    }

    /// RemoveContainer.
    ///
    /// # Errors
    /// containerd's reply.
    pub async fn remove(&self) -> Result<()> {
        let request = RemoveContainerRequest {
            container_id: self.id.clone(),
        };
        self.client
            .runtime()
            .remove_container(request)
            .await
            .context("RemoveContainer")?;
        Ok(())
    }
}

/// What a process in a container left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// Exit code.
    pub code: i32,
}

impl Output {
    /// Standard output as text, without white space around it.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }

    /// Standard error as text, without white space around it.
    #[must_use]
    pub fn error_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim().to_owned()
    }

    /// The same, if the exit code is 0.
    ///
    /// # Errors
    /// If it is not.
    pub fn success(self) -> Result<Self> {
        ensure!(
            self.code == 0,
            "exit code {}: {} {}",
            self.code,
            self.text(),
            self.error_text()
        );
        Ok(self)
    }
}
