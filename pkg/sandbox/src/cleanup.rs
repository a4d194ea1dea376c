// SPDX-License-Identifier: Apache-2.0
//! Releasing what a shim left that did not end in order.
//!
//! Its children died with it (parent-death signal) and its mounts with its mount
//! namespace. What can be left is the tap and redirects in the pod's network
//! namespace, the cgroup, and files.

use podhull_storage::RemoveReport;
use podhull_types::{Deadline, SandboxId, chain};

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
            tracing::warn!(sandbox = %id, step, error = chain(&error), "not cleaned up");
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
    note("tree", swept.map_err(Into::into).and_then(all_of_it));
    note("folder", run_dir.remove());
    first
}

fn all_of_it(report: RemoveReport) -> Result<(), SandboxError> {
    if report.is_clean() {
        Ok(())
    } else {
        Err(SandboxError::Left(report.problems))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use podhull_config::Config;
    use podhull_telemetry::Metrics;

    use super::*;

    #[tokio::test]
    async fn what_cannot_be_removed_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = Runtime {
            config: Config {
                run_dir: folder.path().into(),
                ..Config::default()
            },
            helper: "/nonexistent".into(),
            metrics: Metrics::new().unwrap(),
        };
        let id = SandboxId::new("s1").unwrap();
        let clean = async || {
            cleanup(
                &runtime,
                "k8s.io",
                &id,
                Deadline::after(Duration::from_secs(5)),
            )
            .await
        };
        clean().await.unwrap();
        let run_dir = RunDir::of(folder.path(), "k8s.io", &id);
        let stranger = run_dir.share().join("c1/rootfs/precious");
        fs::create_dir_all(&stranger).unwrap();
        let error = clean().await.unwrap_err();
        assert!(matches!(error, SandboxError::Left(_)), "{error}");
        assert!(error.to_string().contains("c1/rootfs"), "{error}");
        fs::remove_dir(&stranger).unwrap();
        clean().await.unwrap();
        assert!(!run_dir.path().exists());
    }
}
