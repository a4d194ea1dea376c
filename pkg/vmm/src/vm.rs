// SPDX-License-Identifier: Apache-2.0
//! A running VM.

use std::fmt;

use async_trait::async_trait;
use podhull_transport::{GuestAddress, HeldLease, LeaseSet};
use podhull_types::Deadline;
use tokio::sync::watch;

use crate::accel::Acceleration;

/// Why a VM is no more, though nobody stopped it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmDeath {
    /// Which child ended first.
    pub child: &'static str,
    /// How.
    pub status: String,
    /// The kernel had to kill one for want of memory in the pod's cgroup.
    pub out_of_memory: bool,
    /// Its last words.
    pub said: String,
    /// The guest's last console lines.
    pub console: String,
}

impl fmt::Display for VmDeath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ended ({})", self.child, self.status)?;
        if self.out_of_memory {
            f.write_str(
                ", killed for want of memory: the limit of the pod's cgroup must hold the VM, \
                 too (a RuntimeClass's overhead.podFixed)",
            )?;
        }
        if !self.said.is_empty() {
            write!(f, ", it said: {}", self.said)?;
        }
        if !self.console.is_empty() {
            write!(f, "; last console lines: {}", self.console)?;
        }
        Ok(())
    }
}

/// How a VM's stop went.
#[derive(Debug, Clone, Default)]
pub struct StopReport {
    /// Who still held a connection to the guest when it was stopped.
    pub holders: Vec<HeldLease>,
    /// Children that had to be killed.
    pub killed: Vec<&'static str>,
    /// What could not be released, by step.
    pub problems: Vec<String>,
}

impl StopReport {
    /// True if everything ended by itself and everything was released.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.holders.is_empty() && self.killed.is_empty() && self.problems.is_empty()
    }
}

/// A VM, whichever VMM runs it.
///
/// Dropped without [`stop`](Self::stop), its children are killed.
#[async_trait]
pub trait Vm: Send + Sync + fmt::Debug {
    /// Leases on the VM: it is stopped after they have ended.
    fn leases(&self) -> &LeaseSet;
    /// Where the guest is reached.
    fn address(&self) -> &GuestAddress;
    /// How its instructions are executed.
    fn acceleration(&self) -> Acceleration;
    /// The VMM's PID.
    fn pid(&self) -> u32;
    /// Name and PID of every process of the VM.
    fn processes(&self) -> Vec<(&'static str, u32)>;
    /// Why it ended, once it has ended by itself.
    fn died(&self) -> watch::Receiver<Option<VmDeath>>;
    /// The guest's last console lines.
    fn console_tail(&self) -> String;
    /// Ends it and releases what it had. New leases are refused first; who
    /// still holds one at the deadline is named, and the VM ended all the same.
    /// A second call does nothing.
    async fn stop(&self, by: Deadline) -> StopReport;
}
