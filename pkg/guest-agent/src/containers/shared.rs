// SPDX-License-Identifier: Apache-2.0
//! What the containers of the pod share.

use std::collections::HashMap;
use std::path::PathBuf;

use nix::unistd::Pid;
use podhull_api::agent::{self, PidNamespace};
use podhull_types::ContainerId;

use super::{Containers, deadline};
use crate::error::GuestError;
use crate::helper::{Helper, Streams};
use crate::oci::pause;
use crate::pod;

impl Containers {
    /// The PID namespace that a container joins; `None` for one of its own.
    pub(super) async fn pid_path(
        &self,
        kind: PidNamespace,
        target: &str,
    ) -> Result<Option<PathBuf>, GuestError> {
        let pid = match kind {
            PidNamespace::Container => return Ok(None),
            PidNamespace::Pod if self.pod.users().is_some() => {
                self.pod_init().await?;
                return Ok(Some(pod::path("pid")));
            }
            PidNamespace::Pod => self.pod_init().await?,
            PidNamespace::Target => self.init_pid(&ContainerId::new(target)?)?,
        };
        Ok(Some(format!("/proc/{pid}/ns/pid").into()))
    }

    async fn pod_init(&self) -> Result<Pid, GuestError> {
        let mut pod_init = self.pod_init.lock().await;
        if let Some(pid) = *pod_init {
            return Ok(pid);
        }
        let in_user_namespace = self.pod.users().is_some();
        let task = pause::Task { in_user_namespace };
        let mut helper = Helper::start(&self.reaper, "pause", &task, Streams::default())?;
        let pid = helper.pid(deadline()).await?;
        if in_user_namespace {
            pod::keep(pid, "pid")?;
        }
        *pod_init = Some(pid);
        Ok(pid)
    }

    /// Makes the pod's namespaces, if it is to have its own.
    pub(crate) async fn make_pod(
        &self,
        request: &agent::ConfigureRequest,
    ) -> Result<(), GuestError> {
        self.pod.make(&self.reaper, request, deadline()).await
    }

    /// Sets the pod's sysctls.
    pub(crate) async fn set_sysctls(
        &self,
        sysctls: &HashMap<String, String>,
    ) -> Result<(), GuestError> {
        let by = deadline();
        self.pod.set_sysctls(&self.reaper, sysctls, by).await
    }
}
