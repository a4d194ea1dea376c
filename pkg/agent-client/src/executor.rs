// SPDX-License-Identifier: Apache-2.0
//! Where gRPC's tasks run, so that closing can join them.
//!
//! hyper moves the connection's I/O into a task that it spawns through the
//! executor it is given. Whoever does not own that executor does not own the
//! descriptor.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

#[derive(Debug, Clone, Default)]
pub(crate) struct OwnExecutor {
    tasks: TaskTracker,
    cancel: CancellationToken,
    panicked: Arc<AtomicBool>,
}

impl OwnExecutor {
    /// Waits until every task has ended by itself. No later task counts.
    pub(crate) async fn joined(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Whether one of the tasks panicked. The others went on.
    pub(crate) fn has_panicked(&self) -> bool {
        self.panicked.load(Ordering::Relaxed)
    }

    /// Ends the tasks at their next await.
    pub(crate) fn cancel(&self) {
        self.cancel.cancel();
    }
}

impl hyper::rt::Executor<Pin<Box<dyn Future<Output = ()> + Send>>> for OwnExecutor {
    fn execute(&self, task: Pin<Box<dyn Future<Output = ()> + Send>>) {
        let cancel = self.cancel.clone();
        let witness = Witness(Arc::clone(&self.panicked));
        self.tasks.spawn(async move {
            let _witness = witness;
            // `None`: cancelled; dropping the task drops the I/O it holds.
            let _ = cancel.run_until_cancelled(task).await;
        });
    }
}

/// Dropped with the task that it was given to; tells if a panic did that.
#[derive(Debug)]
struct Witness(Arc<AtomicBool>);

impl Drop for Witness {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}
