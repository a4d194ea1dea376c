// SPDX-License-Identifier: Apache-2.0
//! What is asked of processes that are being made.

use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use podhull_types::{ContainerId, ProcessRef};

use super::Sandbox;
use crate::error::SandboxError;
use crate::fixture::{self, Stop};
use crate::process::Process;
use crate::spec::{Status, Stdio};

fn id() -> ProcessRef {
    ProcessRef::init(ContainerId::new("c1").unwrap())
}

fn being_made(sandbox: &Sandbox) -> Arc<Process> {
    sandbox
        .enter(&id(), 5_000_000, Stdio::default(), false)
        .unwrap()
}

async fn waits<T>(mut asked: std::pin::Pin<&mut impl Future<Output = T>>) -> bool {
    std::future::poll_fn(|cx| Poll::Ready(asked.as_mut().poll(cx).is_pending())).await
}

#[tokio::test]
async fn a_process_that_is_being_made_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let (sandbox, _guest) = fixture::sandbox(folder.path(), Stop::Panics).await;
    let process = being_made(&sandbox);
    let id = id();
    let mut state = pin!(sandbox.state(&id));
    assert!(waits(state.as_mut()).await);
    // A kill would find no process in the guest, and be taken for done.
    let mut killed = pin!(sandbox.kill(&id, 9, true));
    assert!(waits(killed.as_mut()).await);
    process.made();
    assert_eq!(state.await.unwrap().status, Status::Created);
}

#[tokio::test]
async fn a_process_that_was_not_made_is_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let (sandbox, _guest) = fixture::sandbox(folder.path(), Stop::Panics).await;
    let process = being_made(&sandbox);
    let id = id();
    let mut killed = pin!(sandbox.kill(&id, 9, true));
    let mut deleted = pin!(sandbox.delete(&id, fixture::soon()));
    assert!(waits(killed.as_mut()).await && waits(deleted.as_mut()).await);
    sandbox.give_up(&process);
    for answer in [killed.await, deleted.await.map(drop)] {
        assert!(
            matches!(answer, Err(SandboxError::NoProcess(_))),
            "{answer:?}"
        );
    }
}
