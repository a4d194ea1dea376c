// SPDX-License-Identifier: Apache-2.0
//! A point in time by which something must have happened.

use std::future::Future;
use std::time::Duration;
use tokio::time::Instant;

/// The deadline passed before the work was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("deadline passed")]
pub struct Elapsed;

/// A point in (monotonic) time. Durations end in configuration; inside the code
/// a deadline is passed on, so that nested waits share one budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// A deadline `duration` from now.
    #[must_use]
    pub fn after(duration: Duration) -> Self {
        Self(Instant::now() + duration)
    }

    /// Time left; zero once passed.
    #[must_use]
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Whether it has passed.
    #[must_use]
    pub fn passed(self) -> bool {
        self.remaining().is_zero()
    }

    /// The earlier of this deadline and one `duration` from now: a step's share
    /// of a larger budget.
    #[must_use]
    pub fn at_most(self, duration: Duration) -> Self {
        self.min(Self::after(duration))
    }

    /// The instant, for timers.
    #[must_use]
    pub fn instant(self) -> Instant {
        self.0
    }

    /// Runs `future` until it is done or the deadline passes. Cancel safe if
    /// `future` is.
    ///
    /// # Errors
    /// [`Elapsed`] if the deadline passed first; `future` is dropped then.
    pub async fn run<F: Future>(self, future: F) -> Result<F::Output, Elapsed> {
        tokio::time::timeout_at(self.0, future)
            .await
            .map_err(|_| Elapsed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn run_ends_at_the_deadline() {
        let by = Deadline::after(Duration::from_secs(1));
        assert_eq!(by.run(std::future::pending::<()>()).await, Err(Elapsed));
        assert!(by.passed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_share_never_exceeds_the_whole() {
        let whole = Deadline::after(Duration::from_secs(1));
        assert_eq!(whole.at_most(Duration::from_secs(9)), whole);
        assert!(whole.at_most(Duration::from_millis(10)) < whole);
    }
}
