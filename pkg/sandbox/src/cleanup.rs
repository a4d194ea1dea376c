// SPDX-License-Identifier: Apache-2.0
//! Releasing what a shim left that did not end in order.
//!
//! Its children died with it (parent-death signal) and its mounts with its mount
//! namespace. What can be left is the tap and redirects in the pod's network
//! namespace, the cgroup, and files.

use podhull_types::{Deadline, SandboxId};

use crate::error::SandboxError;
use crate::rundir::RunDir;
use crate::spec::Runtime;

/// Removes whatever is left of sandbox `id`. Succeeds, and does nothing, if
/// nothing is; safe to repeat and to run beside another.
///
/// # Errors
/// The first thing that could not be removed; the rest was tried all the same.
pub async fn cleanup(
    runtime: &Runtime,
    namespace: &str,
    id: &SandboxId,
    by: Deadline,
) -> Result<(), SandboxError> {
    let run_dir = RunDir::of(&runtime.config.run_dir, namespace, id);
    let record = run_dir.read_record();
    let mut first = Ok(());
    let mut note = |step: &str, result: Result<(), SandboxError>| {
        if let Err(error) = result {
            tracing::warn!(sandbox = %id, step, %error, "not cleaned up");
            if first.is_ok() {
                first = Err(error);
            }
        }
    };
    if let Some(record) = &record {
        let cgroup = record
            .cgroups_path
            .as_deref()
            .map(podhull_vmm::CgroupPlacement::from_oci);
        let swept = podhull_vmm::sweep(&run_dir.vm(), cgroup.as_ref(), by).await;
        note("vm", swept.map_err(Into::into));
        if let Some(netns) = &record.netns {
            note(
                "network",
                podhull_network::sweep(netns, by).await.map_err(Into::into),
            );
        }
    }
    let swept = podhull_storage::sweep(&run_dir.share(), by);
    note("tree", swept.map(drop).map_err(Into::into));
    note("folder", run_dir.remove());
    first
}
