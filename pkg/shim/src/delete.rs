// SPDX-License-Identifier: Apache-2.0
//! `delete`: releases what a shim left, in a fresh process.
//!
//! containerd runs it per container when it cannot reach a shim, and gives it
//! 5 s. A shim that is still there is told to end if it is the sandbox that is
//! deleted, and killed if it does not: it may hang. For a container of a living
//! sandbox there is nothing to release, and the VM that others share goes on.
//! Warnings go to standard error: containerd puts them into its log.

use std::path::Path;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::{DeleteResponse, ShutdownRequest};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use podhull_config::Config;
use podhull_sandbox::{RunDir, Runtime};
use podhull_telemetry::{Metrics, log};
use podhull_types::{Deadline, SandboxId, chain};

use crate::SELF;
use crate::address;
use crate::args::Args;
use crate::bundle;
use crate::error::ShimError;
use crate::identity::{DIES, Identity, Running};
use crate::wire::timestamp;

/// As if killed: nobody knows better any more.
const EXIT_STATUS: u32 = 137;
/// Time for all of it; containerd waits 5 s.
const WITHIN: Duration = Duration::from_secs(4);
/// Time for a living shim to release what it has.
const ENDS: Duration = Duration::from_millis(1500);

/// Releases what is left of `args.id`; gives what containerd reads on standard
/// output.
///
/// # Errors
/// The first thing that could not be released; the rest was.
pub async fn delete(args: &Args, bundle: &Path) -> Result<Vec<u8>, ShimError> {
    let by = Deadline::after(WITHIN);
    // A configuration that became unreadable must not keep a pod from going.
    let mut config = Config::load(Path::new(podhull_config::PATH)).unwrap_or_else(|error| {
        tracing::warn!(error = chain(&error), "defaults are used");
        Config::default()
    });
    let spec = bundle::read(bundle).unwrap_or_else(|error| {
        tracing::warn!(error = chain(&error), "the bundle says nothing");
        None
    });
    let sandbox = SandboxId::new(bundle::sandbox_of(spec.as_ref(), &args.id))?;
    // Where the pod runs, whatever the configuration has become since.
    if let Some(parent) = address::parent(bundle, &args.namespace, &sandbox) {
        config.run_dir = parent;
    }
    let run_dir = RunDir::of(&config.run_dir, &args.namespace, &sandbox);
    log_to(&config, &run_dir);
    let ended = match Identity::find(&run_dir.shim()) {
        Some(_) if sandbox.as_str() != args.id => {
            tracing::info!(container = args.id, %sandbox, "its sandbox goes on");
            return response();
        }
        Some(shim) => end(&shim, &run_dir, by).await,
        None => Ok(()),
    };
    let metrics = Metrics::new().map_err(|error| ShimError::Metrics(error.to_string()))?;
    let runtime = Runtime {
        config,
        helper: SELF.into(),
        metrics,
    };
    let cleaned = podhull_sandbox::cleanup(&runtime, &args.namespace, &sandbox, by).await;
    ended.and(cleaned.map_err(Into::into))?;
    tracing::info!(%sandbox, "nothing is left");
    response()
}

/// The shim's log shows what was done after its end, as long as anything is left.
fn log_to(config: &Config, run_dir: &RunDir) {
    if let Err(error) = log::init_beside(&config.log, &run_dir.log(), true) {
        let text = format!("podhull: {}\n", chain(&error));
        let written = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
        debug_assert!(written.is_ok());
    }
}

/// Asks a shim to end, waits for it, and kills it if it does not.
async fn end(shim: &Running, run_dir: &RunDir, by: Deadline) -> Result<(), ShimError> {
    let asked = by.at_most(ENDS);
    match asked.run(ask(run_dir)).await {
        Ok(answer) => tracing::info!(pid = shim.pid, ?answer, "asked the shim to end"),
        Err(_) => tracing::warn!(pid = shim.pid, "the shim does not answer"),
    }
    if shim.ends_by(asked).await {
        return Ok(());
    }
    tracing::warn!(pid = shim.pid, "the shim does not end and is killed");
    shim.kill();
    if shim.ends_by(by.at_most(DIES)).await {
        Ok(())
    } else {
        Err(ShimError::Stays(shim.pid))
    }
}

async fn ask(run_dir: &RunDir) -> ttrpc::Result<()> {
    let address = format!("unix://{}", run_dir.socket().display());
    let shim = TaskClient::new(Client::connect(&address).await?);
    let request = ShutdownRequest {
        now: true,
        ..ShutdownRequest::default()
    };
    let nanoseconds = i64::try_from(ENDS.as_nanos()).unwrap_or(i64::MAX);
    let context = ttrpc::context::with_timeout(nanoseconds);
    shim.shutdown(context, &request).await.map(drop)
}

fn response() -> Result<Vec<u8>, ShimError> {
    let response = DeleteResponse {
        exit_status: EXIT_STATUS,
        exited_at: timestamp(SystemTime::now()),
        ..DeleteResponse::default()
    };
    response
        .write_to_bytes()
        .map_err(|error| ShimError::System {
            step: "encode the answer",
            source: std::io::Error::other(error),
        })
}
