// SPDX-License-Identifier: Apache-2.0
//! What the guest says that has gone wrong in it, as numbers of the host.

use std::sync::{Mutex, PoisonError};

use podhull_api::agent::Counts;
use podhull_telemetry::Metrics;
use podhull_types::SandboxId;
use prometheus::IntCounter;

use crate::sandbox::Sandbox;

/// Why the guest refused a connection, or what else went wrong, and how often.
fn kinds(counts: &Counts, metrics: &Metrics) -> [(&'static str, u64, IntCounter); 7] {
    let refused = |reason, number| {
        let counter = metrics.guest_refused.with_label_values(&[reason]);
        (reason, number, counter)
    };
    let error = |kind, number| {
        let counter = metrics.guest_errors.with_label_values(&[kind]);
        (kind, number, counter)
    };
    [
        refused("token", counts.refused_token),
        refused("greeting", counts.refused_greeting),
        refused("silence", counts.refused_silence),
        refused("crowd", counts.refused_crowd),
        refused("accept", counts.refused_accept),
        error("protocol", counts.protocol_errors),
        error("transport_dropped_unclosed", counts.transports_dropped),
    ]
}

/// The most that was told of each kind. The guest is not trusted: a number that
/// goes back changes nothing.
#[derive(Debug, Default)]
pub(crate) struct GuestCounts(Mutex<[u64; 7]>);

impl GuestCounts {
    /// Takes over what the guest tells. The first of each kind is logged.
    fn told(&self, counts: &Counts, sandbox: &SandboxId, metrics: &Metrics) {
        let mut most = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (most, (kind, number, counter)) in most.iter_mut().zip(kinds(counts, metrics)) {
            let more = number.saturating_sub(*most);
            counter.inc_by(more);
            if *most == 0 && more > 0 {
                tracing::warn!(%sandbox, kind, number, "something went wrong in the guest");
            }
            *most += more;
        }
    }
}

impl Sandbox {
    /// Takes over what the guest told with an answer.
    pub(crate) fn note_counts(&self, counts: Option<Counts>) {
        if let Some(counts) = counts {
            let metrics = &self.runtime.metrics;
            self.guest_counts.told(&counts, &self.spec.id, metrics);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_counts_only_grows() {
        let (metrics, told) = (Metrics::new().unwrap(), GuestCounts::default());
        let id = SandboxId::new("s1").unwrap();
        for (token, errors) in [(0, 0), (2, 1), (1, u64::MAX), (3, 5)] {
            let counts = Counts {
                refused_token: token,
                protocol_errors: errors,
                ..Counts::default()
            };
            told.told(&counts, &id, &metrics);
        }
        let refused = |reason| metrics.guest_refused.with_label_values(&[reason]).get();
        assert_eq!((refused("token"), refused("silence")), (3, 0));
        let errors = metrics.guest_errors.with_label_values(&["protocol"]);
        assert_eq!(errors.get(), u64::MAX);
    }
}
