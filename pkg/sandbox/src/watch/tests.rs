// SPDX-License-Identifier: Apache-2.0
//! A guest that falls silent.

use std::os::unix::net::UnixListener;

use podhull_agent_client::AgentError;
use podhull_transport::SessionTarget;
use podhull_types::{ContainerId, ProcessRef};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::error::SandboxError;
use crate::fixture::{self, Stop};
use crate::spec::Stdio;

/// What is under way when the verdict falls is answered by it, and does not wait
/// for the end of a VM that is slow to end.
#[tokio::test(start_paused = true)]
async fn the_verdict_on_a_silent_guest_answers_what_is_under_way() {
    let folder = tempfile::tempdir().unwrap();
    // As for a frozen guest: it connects and says nothing.
    let _sessions = UnixListener::bind(folder.path().join("vsock")).unwrap();
    let vm_ends = CancellationToken::new();
    let (sandbox, _agent) = fixture::sandbox(folder.path(), Stop::Waits(vm_ends.clone())).await;
    let id = ProcessRef::init(ContainerId::new("c1").unwrap());
    let process = sandbox.enter(&id, 7, Stdio::default(), false).unwrap();
    process.started(|_| {});
    start(&sandbox).await;

    let begin = Instant::now();
    let target = SessionTarget::Process(id.clone());
    let (killed, dialled) =
        tokio::join!(sandbox.kill(&id, 15, false), sandbox.dial_session(&target));
    let took = begin.elapsed();
    for error in [killed.unwrap_err(), dialled.unwrap_err()] {
        assert!(
            matches!(&error, SandboxError::VmDied { reason, .. } if reason.contains("silent")),
            "{error:?}"
        );
    }
    let dead_after = Duration::from_secs(sandbox.runtime.config.dead_after_seconds);
    let verdict = dead_after..dead_after + Duration::from_secs(2);
    assert!(verdict.contains(&took), "answered after {took:?}");
    assert!(sandbox.exit().is_none(), "its VM has not ended");

    vm_ends.cancel();
    assert_eq!(process.wait().await.code, ExitStatus::vm_gone().code);
    sandbox.stopped().await;
}

/// The connection ends with the VM, whose end is seen later.
#[tokio::test]
async fn a_call_that_a_vms_end_breaks_is_told_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let (sandbox, guest) = fixture::sandbox(folder.path(), Stop::Panics).await;
    let id = ProcessRef::init(ContainerId::new("c1").unwrap());
    let process = sandbox.enter(&id, 7, Stdio::default(), false).unwrap();
    process.started(|_| {});
    let ends = async {
        drop(guest);
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(pass_verdict(&sandbox, "it is out of ideas"));
    };
    let (killed, ()) = tokio::join!(sandbox.kill(&id, 15, false), ends);
    let error = killed.unwrap_err();
    assert!(
        matches!(&error, SandboxError::VmDied { reason, .. } if reason.contains("ideas")),
        "{error:?}"
    );
}

/// A connection that ends without its VM: nobody waits long for a reason.
#[tokio::test]
async fn a_call_on_a_broken_connection_fails_without_a_verdict() {
    let folder = tempfile::tempdir().unwrap();
    let (sandbox, guest) = fixture::sandbox(folder.path(), Stop::Panics).await;
    drop(guest);
    let by = Deadline::after(Duration::from_millis(500));
    let begin = Instant::now();
    let ping = async |mut client: Client| client.ping(agent::PingRequest::default()).await;
    let error = sandbox.ask("Ping", by, ping).await.unwrap_err();
    assert!(
        matches!(error, SandboxError::Agent(AgentError::VmGone { .. })),
        "{error:?}"
    );
    assert!(begin.elapsed() < Duration::from_millis(950), "its deadline");
}
