// SPDX-License-Identifier: Apache-2.0
//! What a sandbox and its containers are made from, and what they tell.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use oci_spec::runtime::Spec;
use podhull_config::Config;
use podhull_storage::RootfsMount;
use podhull_telemetry::Metrics;
use podhull_types::{ContainerId, ExitStatus, ProcessRef, SandboxId, UserNamespace};

/// What all sandboxes of a process share.
#[derive(Debug)]
pub struct Runtime {
    /// The node's settings.
    pub config: Config,
    /// Our own program, re-executed as the helpers' confinement.
    pub helper: PathBuf,
    /// Where figures go.
    pub metrics: Metrics,
}

/// What a pod sandbox is made from.
#[derive(Debug, Clone)]
pub struct SandboxSpec {
    /// containerd's id.
    pub id: SandboxId,
    /// containerd's namespace, `k8s.io` for Kubernetes.
    pub namespace: String,
    /// The pod's hostname.
    pub hostname: String,
    /// Its NIS domain name, usually empty.
    pub domainname: String,
    /// The pod's network namespace; `None` for a pod without network.
    pub netns: Option<PathBuf>,
    /// What the pod's user namespace maps; `None` for the guest's own users.
    pub users: Option<UserNamespace>,
    /// The sandbox's cgroup as an OCI `linux.cgroupsPath`.
    pub cgroups_path: Option<String>,
    /// Sysctls of the pod.
    pub sysctls: BTreeMap<String, String>,
    /// Sum of the pod's memory limits in bytes; `None` without a limit.
    pub memory_limit_bytes: Option<u64>,
    /// Whole CPUs that the pod may use; `None` without a limit.
    pub vcpus: Option<u32>,
    /// Size of the pod's /dev/shm in bytes; `None` for the field's usual 64 MiB.
    pub shm_size: Option<u64>,
    /// Files that containerd left to the shim.
    pub files: PodFiles,
    /// When containerd called `start`.
    pub started: Instant,
}

/// Files of the pod that containerd makes itself, except with
/// `sandboxer = "shim"`: then a container's spec names sources that do not exist.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodFiles {
    /// For /etc/resolv.conf.
    pub resolv_conf: Option<String>,
    /// For /etc/hosts.
    pub hosts: Option<String>,
    /// For /etc/hostname.
    pub hostname: Option<String>,
}

/// The FIFOs of a process, as containerd made them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Read by the process.
    pub stdin: Option<PathBuf>,
    /// Written by the process, or by its terminal.
    pub stdout: Option<PathBuf>,
    /// Written by the process; never with a terminal.
    pub stderr: Option<PathBuf>,
    /// The process has a terminal.
    pub terminal: bool,
}

/// What a container is made from.
#[derive(Debug)]
pub struct ContainerSpec {
    /// containerd's id.
    pub id: ContainerId,
    /// The bundle's config.json.
    pub oci: Spec,
    /// The snapshotter's mounts, in order.
    pub rootfs: Vec<RootfsMount>,
    /// Its init process's FIFOs.
    pub stdio: Stdio,
}

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Made, waiting for Start.
    Created,
    /// Running.
    Running,
    /// Frozen with its container.
    Paused,
    /// Ended.
    Stopped,
}

/// A process as `State` tells it.
#[derive(Debug, Clone)]
pub struct ProcessState {
    /// Where it is in its life.
    pub status: Status,
    /// The PID reported to containerd: no process of the host has it.
    pub pid: u32,
    /// How it ended.
    pub exit: Option<ExitStatus>,
    /// Its FIFOs.
    pub stdio: Stdio,
}

/// What is known of a process that was deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deleted {
    /// The PID that was reported.
    pub pid: u32,
    /// How it ended.
    pub exit: ExitStatus,
}

/// Something that happened in the sandbox without being asked for.
#[derive(Debug, Clone)]
pub enum SandboxEvent {
    /// A process ended. Comes once per process, after its start was announced.
    Exited {
        /// Which.
        process: ProcessRef,
        /// The PID that was reported.
        pid: u32,
        /// How it ended.
        exit: ExitStatus,
    },
    /// The guest's kernel killed a process of the container for memory.
    OutOfMemory {
        /// Which container.
        container: ContainerId,
    },
    /// The VM ended by itself; every process has been reported as exited.
    Died {
        /// Why, for people.
        reason: String,
    },
}

/// Where events go. Called in the order in which things happened, before
/// whoever waits for them is woken: it must not block.
#[derive(Clone)]
pub struct EventSink(Arc<dyn Fn(SandboxEvent) + Send + Sync>);

impl EventSink {
    /// A sink that calls `take`.
    pub fn new(take: impl Fn(SandboxEvent) + Send + Sync + 'static) -> Self {
        Self(Arc::new(take))
    }

    pub(crate) fn send(&self, event: SandboxEvent) {
        (self.0)(event);
    }
}

impl fmt::Debug for EventSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EventSink")
    }
}
