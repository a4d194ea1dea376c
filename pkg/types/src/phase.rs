// SPDX-License-Identifier: Apache-2.0
//! Where the time of a pod's start goes.

use std::fmt;
use std::time::Duration;

/// A moment in a sandbox's boot, in the order in which they happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BootPhase {
    /// containerd called `start`.
    StartCalled,
    /// Network and shared tree are ready.
    HostReady,
    /// The VMM process was spawned.
    VmmSpawned,
    /// The guest kernel began to run (its own clock's zero).
    KernelEntered,
    /// The agent's `main` began.
    AgentStarted,
    /// The agent said READY.
    AgentReady,
    /// The pod's settings are applied in the guest.
    Configured,
    /// The first container's process runs.
    ContainerStarted,
}

impl BootPhase {
    /// The name used in logs and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::StartCalled => "start_called",
            Self::HostReady => "host_ready",
            Self::VmmSpawned => "vmm_spawned",
            Self::KernelEntered => "kernel_entered",
            Self::AgentStarted => "agent_started",
            Self::AgentReady => "agent_ready",
            Self::Configured => "configured",
            Self::ContainerStarted => "container_started",
        }
    }
}

impl fmt::Display for BootPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The moments of one boot, as time since the first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BootTimes(Vec<(BootPhase, Duration)>);

impl BootTimes {
    /// Notes that `phase` was reached `since_start` after the first moment. A
    /// phase is noted once; later notes of it are ignored.
    pub fn note(&mut self, phase: BootPhase, since_start: Duration) {
        if !self.0.iter().any(|(known, _)| *known == phase) {
            self.0.push((phase, since_start));
            self.0.sort();
        }
    }

    /// The moments in order.
    pub fn iter(&self) -> impl Iterator<Item = (BootPhase, Duration)> + '_ {
        self.0.iter().copied()
    }
}
