// SPDX-License-Identifier: Apache-2.0
//! Doing something inside of a network namespace, on a thread of its own.

use std::fs::File;
use std::path::Path;

use nix::sched::{CloneFlags, setns};
use podhull_types::Deadline;
use rtnetlink::{Handle, new_connection};
use tokio::sync::oneshot;

use crate::error::NetworkError;

/// Runs `work` with a routing socket of the namespace at `netns`. The thread
/// ends with the work: no other code ever runs in the pod's namespace.
pub(crate) async fn inside<T, F, Fut>(
    netns: &Path,
    by: Deadline,
    work: F,
) -> Result<T, NetworkError>
where
    T: Send + 'static,
    F: FnOnce(Handle) -> Fut + Send + 'static,
    Fut: Future<Output = Result<T, NetworkError>>,
{
    let path = netns.to_path_buf();
    let (sender, answer) = oneshot::channel();
    std::thread::spawn(move || {
        // Nobody waits any more if the deadline has passed.
        drop(sender.send(enter_and_run(&path, by, work)));
    });
    match by.run(answer).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(NetworkError::Lost),
        Err(_) => Err(NetworkError::Deadline),
    }
}

fn enter_and_run<T, F, Fut>(netns: &Path, by: Deadline, work: F) -> Result<T, NetworkError>
where
    F: FnOnce(Handle) -> Fut,
    Fut: Future<Output = Result<T, NetworkError>>,
{
    let namespace = |source: std::io::Error| NetworkError::Namespace {
        path: netns.into(),
        source,
    };
    let file = File::open(netns).map_err(namespace)?;
    setns(file, CloneFlags::CLONE_NEWNET).map_err(|errno| namespace(errno.into()))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(NetworkError::step("start a runtime"))?;
    runtime.block_on(async {
        let (driver, handle, _) =
            new_connection().map_err(NetworkError::step("open a routing socket"))?;
        tokio::spawn(driver);
        match by.run(work(handle)).await {
            Ok(result) => result,
            Err(_) => Err(NetworkError::Deadline),
        }
    })
}
