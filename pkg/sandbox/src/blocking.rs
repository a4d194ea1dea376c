// SPDX-License-Identifier: Apache-2.0
//! Work that can block in the kernel for as long as a volume's server is away.

use podhull_types::Deadline;
use tokio::task::JoinError;

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unfinished {
    #[error("it still blocks in the kernel")]
    Blocked,
    #[error("it died")]
    Died(#[source] JoinError),
}

/// Does `work` on a thread that may block. Beyond the deadline it goes on, and is
/// not waited for.
pub(crate) async fn blocking<T: Send + 'static>(
    by: Deadline,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Unfinished> {
    match by.run(tokio::task::spawn_blocking(work)).await {
        Ok(done) => done.map_err(Unfinished::Died),
        Err(_) => Err(Unfinished::Blocked),
    }
}
