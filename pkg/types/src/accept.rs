// SPDX-License-Identifier: Apache-2.0
//! What a listener does after an accept that failed: one policy for all.

use std::io::{self, ErrorKind};
use std::time::Duration;

/// Nothing tells when descriptors or memory are back, and trying at once would
/// spin.
const PAUSE: Duration = Duration::from_millis(50);

/// Resolves when a listener whose accept failed with `error` is to accept again:
/// at once if only a connection was lost, else after a pause. False if it is no
/// listener any more, so that no later accept can succeed. Cancel safe.
pub async fn accept_again(error: &io::Error) -> bool {
    match error.kind() {
        // accept(2) passes on what became of a connection in the queue.
        ErrorKind::ConnectionAborted
        | ErrorKind::ConnectionReset
        | ErrorKind::Interrupted
        | ErrorKind::PermissionDenied
        | ErrorKind::NetworkDown
        | ErrorKind::NetworkUnreachable
        | ErrorKind::HostUnreachable => true,
        ErrorKind::InvalidInput => false,
        _ => {
            tokio::time::sleep(PAUSE).await;
            true
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    // Of errno.h.
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    const ENOMEM: i32 = 12;
    const EINVAL: i32 = 22;
    const EPROTO: i32 = 71;
    const ECONNABORTED: i32 = 103;
    const ENOBUFS: i32 = 105;
    const EHOSTUNREACH: i32 = 113;

    /// Whether it goes on, and after how long.
    async fn after(errno: i32) -> (bool, Duration) {
        let begin = Instant::now();
        let again = accept_again(&io::Error::from_raw_os_error(errno)).await;
        (again, begin.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_pass_by_itself_is_not_spun_on() {
        for errno in [EMFILE, ENFILE, ENOBUFS, ENOMEM, EPROTO] {
            let (again, took) = after(errno).await;
            assert!(again && took >= PAUSE, "{errno}: {again}, {took:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_connection_does_not_keep_the_next_waiting() {
        for errno in [ECONNABORTED, EHOSTUNREACH] {
            assert_eq!(after(errno).await, (true, Duration::ZERO), "{errno}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_listener_is_given_up() {
        assert_eq!(after(EINVAL).await, (false, Duration::ZERO));
    }
}
