// SPDX-License-Identifier: Apache-2.0
//! `delete`: releases what a shim left, in a fresh process.
//!
//! containerd runs it per container when it cannot reach a shim, and gives it
//! 5 s. A shim that is still there is told to end if it is the sandbox that is
//! deleted; for a container of a living sandbox there is nothing to release,
//! and the VM that others share goes on.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::{ConnectRequest, DeleteResponse, ShutdownRequest};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use podhull_config::Config;
use podhull_sandbox::{RunDir, Runtime};
use podhull_telemetry::Metrics;
use podhull_types::{Deadline, SandboxId};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::args::Args;
use crate::bundle;
use crate::error::{ShimError, chain};
use crate::wire::timestamp;

/// As if killed: nobody knows better any more.
const EXIT_STATUS: u32 = 137;
/// Time for all of it; containerd waits 5 s.
const WITHIN: Duration = Duration::from_secs(4);
/// Time for a living shim to release what it has.
const ENDS: Duration = Duration::from_secs(2);

/// Releases what is left of `args.id`; gives what containerd reads on standard
/// output. `program` is our own.
///
/// # Errors
/// The first thing that could not be released; the rest was.
pub async fn delete(args: &Args, bundle: &Path, program: &Path) -> Result<Vec<u8>, ShimError> {
    let by = Deadline::after(WITHIN);
    // A configuration that became unreadable must not keep a pod from going.
    let config = Config::load(Path::new(podhull_config::PATH)).unwrap_or_else(|error| {
        tracing::warn!(error = chain(&error), "defaults are used");
        Config::default()
    });
    let spec = bundle::read(bundle).unwrap_or_else(|error| {
        tracing::warn!(error = chain(&error), "the bundle says nothing");
        None
    });
    let sandbox = SandboxId::new(bundle::sandbox_of(spec.as_ref(), &args.id))?;
    let run_dir = RunDir::of(&config.run_dir, &args.namespace, &sandbox);
    let address = format!("unix://{}", run_dir.socket().display());
    let alive = Client::connect(&address).await.ok().map(TaskClient::new);
    let is_sandbox = sandbox.as_str() == args.id;
    match alive {
        Some(shim) if is_sandbox => end(&shim, by).await,
        Some(_) => return response(),
        None => {}
    }
    let metrics = Metrics::new().map_err(|error| ShimError::Metrics(error.to_string()))?;
    let runtime = Runtime {
        config,
        helper: program.to_path_buf(),
        metrics,
    };
    podhull_sandbox::cleanup(&runtime, &args.namespace, &sandbox, by).await?;
    response()
}

/// Asks a shim to end, waits for it, and kills it if it does not.
async fn end(shim: &TaskClient, by: Deadline) {
    let context = || {
        let nanoseconds = i64::try_from(ENDS.as_nanos()).unwrap_or(i64::MAX);
        ttrpc::context::with_timeout(nanoseconds)
    };
    let connected = shim.connect(context(), &ConnectRequest::default()).await;
    let pid = connected
        .ok()
        .and_then(|answer| i32::try_from(answer.shim_pid).ok());
    let pidfd = pid
        .and_then(Pid::from_raw)
        .and_then(|pid| pidfd_open(pid, PidfdFlags::NONBLOCK).ok());
    let request = ShutdownRequest {
        now: true,
        ..ShutdownRequest::default()
    };
    let asked = shim.shutdown(context(), &request).await;
    tracing::debug!(?asked, "asked the shim to end");
    let Some(pidfd) = pidfd else { return };
    if !has_ended(&pidfd, by.at_most(ENDS)) {
        let killed = pidfd_send_signal(&pidfd, Signal::KILL);
        let gone = has_ended(&pidfd, by);
        tracing::warn!(?killed, gone, "the shim did not end by itself");
    }
}

/// Waits for a process's end. Blocks: this program has nothing else to do.
fn has_ended(pidfd: &OwnedFd, by: Deadline) -> bool {
    let timeout = PollTimeout::try_from(by.remaining()).unwrap_or(PollTimeout::MAX);
    let mut watched = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    poll(&mut watched, timeout).is_ok_and(|ready| ready > 0)
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
