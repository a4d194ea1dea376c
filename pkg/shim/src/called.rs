// SPDX-License-Identifier: Apache-2.0
//! When containerd called `start`, told to the process that is made then.

use std::io;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

/// The variable that holds it.
pub(crate) const CALLED: &str = "PODHULL_CALLED";

/// Of the clock that an [`Instant`] reads, which is the same in every process.
fn clock() -> io::Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_MONOTONIC)?.into())
}

/// The present moment, as a word for another process.
pub(crate) fn now() -> io::Result<String> {
    Ok(clock()?.as_nanos().to_string())
}

/// The moment of `word`; `None` if it is none, or in the future.
pub(crate) fn moment(word: &str) -> Option<Instant> {
    let called = Duration::from_nanos(word.parse().ok()?);
    let since = clock().ok()?.checked_sub(called)?;
    Instant::now().checked_sub(since)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_the_same_for_who_reads_it() {
        let before = Instant::now();
        let word = now().unwrap();
        let after = Instant::now();
        let told = moment(&word).unwrap();
        // The two clocks are read one after the other.
        let slack = Duration::from_millis(100);
        assert!(before <= told && told <= after + slack, "{told:?}");
        let earlier: u64 = word.parse().unwrap();
        let earlier = moment(&(earlier - 5_000_000_000).to_string()).unwrap();
        let apart = told.duration_since(earlier).as_millis();
        assert!((4900..5100).contains(&apart), "{apart} ms");
    }

    #[test]
    fn what_is_no_moment_is_none() {
        let later = clock().unwrap() + Duration::from_secs(60);
        for word in ["", "soon", "-1", &later.as_nanos().to_string()] {
            assert_eq!(moment(word), None, "{word:?}");
        }
    }
}
