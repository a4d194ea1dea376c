// SPDX-License-Identifier: Apache-2.0
//! What a leak would make grow: counted whenever the numbers are read, or for as
//! long as it exists.

use podhull_telemetry::Metrics;
use podhull_transport::LeaseSet;
use prometheus::{Error, IntGauge};
use tokio::runtime::Handle;

/// A session that is open: counted as long as this exists, whatever ends it.
#[derive(Debug)]
pub(crate) struct OpenSession(IntGauge);

impl OpenSession {
    pub(crate) fn count(metrics: &Metrics, kind: &str) -> Self {
        let gauge = metrics.sessions.with_label_values(&[kind]);
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for OpenSession {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Makes the tasks of this runtime, the transports, and the leases on a VM part
/// of `metrics`.
///
/// # Errors
/// If they are already.
pub(crate) fn register(metrics: &Metrics, leases: &LeaseSet) -> Result<(), Error> {
    podhull_transport::metrics::register(&metrics.registry)?;
    let tasks = Handle::current().metrics();
    metrics.computed(
        "podhull_tasks",
        "Tasks that live in the shim",
        &[],
        move |gauge| {
            let alive = i64::try_from(tasks.num_alive_tasks()).unwrap_or(i64::MAX);
            gauge.with_label_values::<&str>(&[]).set(alive);
        },
    )?;
    let held = leases.clone();
    let help = "Leases on the VM: what is connected to it";
    metrics.computed("podhull_vm_leases", help, &["kind"], move |gauge| {
        for lease in held.held() {
            let kind = lease.holder.kind.to_string();
            gauge.with_label_values(&[&kind]).inc();
        }
    })?;
    let held = leases.clone();
    let help = "Age of the oldest lease of each kind";
    metrics.computed(
        "podhull_vm_lease_age_seconds",
        help,
        &["kind"],
        move |gauge| {
            for lease in held.held() {
                let kind = lease.holder.kind.to_string();
                let age = i64::try_from(lease.age.as_secs()).unwrap_or(i64::MAX);
                let oldest = gauge.with_label_values(&[&kind]);
                oldest.set(oldest.get().max(age));
            }
        },
    )
}

#[cfg(test)]
mod tests {
    use podhull_transport::{Holder, HolderKind};

    use super::*;

    #[tokio::test]
    async fn leases_and_tasks_are_counted_when_they_are_read() {
        let (metrics, leases) = (Metrics::new().unwrap(), LeaseSet::new("vm"));
        register(&metrics, &leases).unwrap();
        let held = leases.issue(Holder::new(HolderKind::Session, "c1"));
        let task = tokio::spawn(std::future::pending::<()>());
        let text = metrics.text().unwrap();
        for line in [
            "podhull_tasks 1",
            "podhull_vm_leases{kind=\"session\"} 1",
            "podhull_vm_lease_age_seconds{kind=\"session\"} 0",
            "podhull_transport_dropped_unclosed_total",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        drop(held);
        task.abort();
        assert!(task.await.unwrap_err().is_cancelled());
        let text = metrics.text().unwrap();
        assert!(text.contains("podhull_tasks 0"), "{text}");
        assert!(!text.contains("podhull_vm_leases{"), "{text}");
    }
}
