// SPDX-License-Identifier: Apache-2.0
//! For tests: a shim whose sandbox was never made.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use podhull_config::Config;
use podhull_sandbox::Runtime;
use podhull_telemetry::Metrics;
use podhull_types::SandboxId;

use crate::publisher::Publisher;
use crate::shim::Shim;

pub(crate) fn runtime(run_dir: &Path) -> Arc<Runtime> {
    Arc::new(Runtime {
        config: Config {
            run_dir: run_dir.into(),
            ..Config::default()
        },
        helper: "/nonexistent".into(),
        metrics: Metrics::new().unwrap(),
    })
}

/// The shim of the sandbox `s1`, with its files in `run_dir`.
pub(crate) fn shim(run_dir: &Path) -> Arc<Shim> {
    Shim::new(
        "k8s.io".into(),
        SandboxId::new("s1").unwrap(),
        runtime(run_dir),
        Arc::new(Publisher::start("k8s.io", "")),
        Instant::now(),
    )
}
