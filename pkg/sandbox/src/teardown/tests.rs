// SPDX-License-Identifier: Apache-2.0
//! Ends of a sandbox whose VM is none.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use podhull_transport::SessionTarget;
use podhull_types::{ContainerId, ProcessRef};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::error::SandboxError;
use crate::fixture::{self, Stop, runtime, soon, spec};
use crate::spec::EventSink;

/// One that has died.
async fn sandbox(folder: &Path, stop: Stop) -> (Arc<Sandbox>, UnixStream) {
    let (sandbox, guest) = fixture::sandbox(folder, stop).await;
    sandbox.death.set("it is none".into()).unwrap();
    (sandbox, guest)
}

fn at_once() -> Stop {
    let ends = CancellationToken::new();
    ends.cancel();
    Stop::Waits(ends)
}

#[tokio::test]
async fn a_stop_that_panics_is_an_error_for_later_callers() {
    let folder = tempfile::tempdir().unwrap();
    let (sandbox, _guest) = sandbox(folder.path(), Stop::Panics).await;
    let waits = tokio::spawn({
        let sandbox = Arc::clone(&sandbox);
        async move { sandbox.stopped().await }
    });
    let stops = tokio::spawn({
        let sandbox = Arc::clone(&sandbox);
        async move { sandbox.stop(soon()).await }
    });
    assert!(stops.await.unwrap_err().is_panic());
    let began = Instant::now();
    let report = sandbox.stop(soon()).await;
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "it was waited for"
    );
    assert!(report.to_string().contains("cut short"), "{report}");
    assert_eq!(waits.await.unwrap().code, ExitStatus::vm_gone().code);
    assert!(sandbox.exit().is_some());
}

#[tokio::test]
async fn a_second_stop_has_nothing_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let (sandbox, _guest) = sandbox(folder.path(), at_once()).await;
    let first = sandbox.stop(soon()).await;
    assert!(first.steps().any(|(step, _)| step == "vm"), "{first}");
    assert!(sandbox.stop(soon()).await.is_clean());
}

#[tokio::test]
async fn a_boot_after_the_end_began_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let give_up = CancellationToken::new();
    give_up.cancel();
    let events = EventSink::new(|_| {});
    let booted = Sandbox::boot(runtime(folder.path()), spec(), events, &give_up).await;
    let error = booted.unwrap_err();
    assert!(
        matches!(&error, SandboxError::Stopping(id) if id.as_str() == "s1"),
        "{error}"
    );
    // Nothing was made for it.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// It hangs where nothing cuts it.
#[tokio::test]
async fn a_forwarded_connection_that_does_not_end_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let (sandbox, _guest) = sandbox(folder.path(), at_once()).await;
    let ends = sandbox.cut_forwards.clone();
    sandbox
        .forwards
        .spawn(async move { ends.cancelled().await });
    let hangs = sandbox.forwards.spawn(std::future::pending::<()>());
    tokio::time::pause();
    let report = sandbox.stop(Deadline::after(Duration::ZERO)).await;
    let said = "cut: the output of 0 processes, 2 forwarded connections; still open: 1";
    assert_eq!(
        report.first_problem(),
        Some(("sessions", &Outcome::Failed(said.into())))
    );
    let metrics = &sandbox.runtime.metrics;
    let failures = metrics.teardown_failures.with_label_values(&["sessions"]);
    assert_eq!(failures.get(), 1);
    hangs.abort();
}

/// Who passed the check before the teardown began.
#[tokio::test]
async fn l10_a_dial_behind_the_teardowns_begin_gets_no_connection() {
    let folder = tempfile::tempdir().unwrap();
    let sessions = tokio::net::UnixListener::bind(folder.path().join("vsock")).unwrap();
    let (sandbox, _silent_agent) = fixture::sandbox(folder.path(), at_once()).await;
    let stops = tokio::spawn({
        let sandbox = Arc::clone(&sandbox);
        async move { sandbox.stop(Deadline::after(Duration::from_secs(1))).await }
    });
    let mut phase = sandbox.phase.subscribe();
    let begun = phase.wait_for(|phase| matches!(phase, Phase::Stopping));
    assert!(begun.await.is_ok());
    let process = ProcessRef::init(ContainerId::new("c1").unwrap());
    let dialled = sandbox.dial_session(&SessionTarget::Process(process)).await;
    assert!(dialled.is_err());
    let came = Deadline::after(Duration::ZERO).run(sessions.accept()).await;
    assert!(came.is_err(), "it was connected");
    assert!(stops.await.is_ok());
}
