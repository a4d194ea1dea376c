// SPDX-License-Identifier: Apache-2.0
//! What the guest says that has gone wrong in it, and that its agent holds, as
//! numbers of the host.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use podhull_api::agent::{Counts, Held};
use podhull_telemetry::Metrics;
use podhull_types::SandboxId;
use prometheus::IntCounter;

use crate::sandbox::Sandbox;

/// One reason to refuse a connection, or one thing that went wrong otherwise.
struct Kind {
    name: &'static str,
    /// How often, as the guest says.
    number: u64,
    counter: IntCounter,
}

fn kinds(counts: &Counts, metrics: &Metrics) -> impl IntoIterator<Item = Kind> {
    let refused = |name, number| Kind {
        name,
        number,
        counter: metrics.guest_refused.with_label_values(&[name]),
    };
    let error = |name, number| Kind {
        name,
        number,
        counter: metrics.guest_errors.with_label_values(&[name]),
    };
    [
        refused("token", counts.refused_token),
        refused("greeting", counts.refused_greeting),
        refused("silence", counts.refused_silence),
        refused("accept", counts.refused_accept),
        error("protocol", counts.protocol_errors),
        error("transport_dropped_unclosed", counts.transports_dropped),
    ]
}

/// The most that was told of each kind, by its name. The guest is not trusted: a
/// number that goes back changes nothing.
#[derive(Debug, Default)]
pub(crate) struct GuestCounts(Mutex<BTreeMap<&'static str, u64>>);

impl GuestCounts {
    /// Takes over what the guest tells. The first of each kind is logged.
    fn told(&self, counts: &Counts, sandbox: &SandboxId, metrics: &Metrics) {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for kind in kinds(counts, metrics) {
            let most = told.entry(kind.name).or_default();
            let more = kind.number.saturating_sub(*most);
            kind.counter.inc_by(more);
            if *most == 0 && more > 0 {
                let (kind, number) = (kind.name, kind.number);
                tracing::warn!(%sandbox, kind, number, "something went wrong in the guest");
            }
            *most += more;
        }
    }
}

/// Takes over what the guest's agent holds now.
fn holds(held: &Held, metrics: &Metrics) {
    for (what, number) in [
        ("descriptors", held.descriptors),
        ("tasks", held.tasks),
        ("leases", held.leases),
        ("threads", held.threads),
        ("resident_kib", held.resident_kib),
    ] {
        let number = i64::try_from(number).unwrap_or(i64::MAX);
        let gauge = metrics.guest_holds.with_label_values(&[what]);
        gauge.set(number);
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

    /// The same of what its agent holds.
    pub(crate) fn note_held(&self, held: Option<Held>) {
        if let Some(held) = held {
            holds(&held, &self.runtime.metrics);
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

    #[test]
    fn each_count_of_the_guest_has_its_own_number() {
        let (metrics, told) = (Metrics::new().unwrap(), GuestCounts::default());
        let id = SandboxId::new("s1").unwrap();
        let counts = Counts {
            refused_token: 1,
            refused_greeting: 2,
            refused_silence: 3,
            refused_accept: 4,
            protocol_errors: 5,
            transports_dropped: 6,
        };
        told.told(&counts, &id, &metrics);
        let refused = ["token", "greeting", "silence", "accept"]
            .map(|reason| metrics.guest_refused.with_label_values(&[reason]).get());
        let errors = ["protocol", "transport_dropped_unclosed"]
            .map(|kind| metrics.guest_errors.with_label_values(&[kind]).get());
        assert_eq!((refused, errors), ([1, 2, 3, 4], [5, 6]));
    }

    #[test]
    fn what_the_agent_holds_is_what_it_said_last() {
        let metrics = Metrics::new().unwrap();
        for descriptors in [30, 20, u64::MAX] {
            let held = Held {
                descriptors,
                tasks: 9,
                leases: 2,
                threads: 4,
                resident_kib: 5000,
            };
            holds(&held, &metrics);
        }
        let now = ["descriptors", "tasks", "leases", "threads", "resident_kib"]
            .map(|what| metrics.guest_holds.with_label_values(&[what]).get());
        assert_eq!(now, [i64::MAX, 9, 2, 4, 5000]);
    }
}
